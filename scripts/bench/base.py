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
from nanochat.common import FlagParser, pick_device
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


TRAINED_WITH_MC = "of a run with --mc_enabled=1"


def add_block_flags(parser: FlagParser, pairs: int, steps: int, about: str) -> None:
    """Of a training step in blocks that take turns."""
    parser.add_checkpoint(TRAINED_WITH_MC)
    parser.add_argument("--pairs", type=int, default=pairs, help=f"pairs of blocks, {about} in turn")
    parser.add_argument("--steps", type=int, default=steps, help="steps per block")
    parser.add_device()


def timed_meta(args: argparse.Namespace) -> dict:
    """The checkpoint's `meta`, of `add_block_flags`; --device is settled. UserError for numbers or a device that are
    none."""
    check_least(args, pairs=1, steps=1)
    args.device = pick_device(args.device)
    return load_model_state(args.checkpoint_dir)[1]


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def print_json(found: dict) -> None:
    """The last line, for programs."""
    print(json.dumps(found), flush=True)
