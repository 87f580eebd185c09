"""What benchmarks share: flags, the device, ratios of neighbours, the last line.

Machines are shared and noisy, so what is compared takes turns in one process, in blocks of a few steps; reported are
ratios of neighbours, with the median over pairs and a bootstrap interval over them.
"""

import argparse
import json
from typing import NamedTuple

import numpy as np
import torch

from nanochat.checkpoint import load_model_state
from nanochat.common import UserError
from scripts.eval.statistics import median_interval
from scripts.eval.subcommands import check_least


class Ratio(NamedTuple):
    ratio: float  # median over pairs of blocks
    low: float  # 95 % interval
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio_of(seconds: np.ndarray) -> Ratio:
    """Of the second to the first. seconds: [pairs, 2]."""
    ratios = seconds[:, 1] / seconds[:, 0]
    return Ratio(float(np.median(ratios)), *median_interval(ratios))


def add_checkpoint_flag(parser: argparse.ArgumentParser, about: str = "of a run with --mc_enabled=1") -> None:
    parser.add_argument("--checkpoint_dir", required=True, help=f"checkpoint directory {about}")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")


def add_block_flags(parser: argparse.ArgumentParser, pairs: int, steps: int, about: str) -> None:
    """Of a training step in blocks that take turns."""
    add_checkpoint_flag(parser)
    parser.add_argument("--pairs", type=int, default=pairs, help=f"pairs of blocks, {about} in turn")
    parser.add_argument("--steps", type=int, default=steps, help="steps per block")
    add_device_flag(parser)


def timed_meta(args: argparse.Namespace) -> dict:
    """The checkpoint's `meta`, of `add_block_flags`. UserError for numbers or a device that are none."""
    check_least(args, pairs=1, steps=1)
    check_device(args.device)
    return load_model_state(args.checkpoint_dir)[1]


def check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no CUDA device; use --device=cpu")


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def print_json(found: dict) -> None:
    """The last line, for programs."""
    print(json.dumps(found), flush=True)
