"""What every script shares: where files go, errors a user can act on, flags, processes and seeds."""

import argparse
import hashlib
import importlib
import importlib.util
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NoReturn

import numpy as np
import torch
import torch.distributed as dist


class UserError(Exception):
    """A mistake the user can mend: one line saying what is wrong, which value, and what to do. Exit code 2."""


def base_dir() -> Path:
    """Where artefacts go: `$NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat`. Not created here."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()


class FlagParser(argparse.ArgumentParser):
    """argparse with one-line errors (exit code 2), defaults in the help, and `--a-b 1` meaning `--a_b=1`."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        for i, arg in enumerate(args):
            if arg.startswith("--") and arg != "--":
                name, eq, value = arg.partition("=")
                args[i] = "--" + name[2:].replace("-", "_") + eq + value
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def import_optional(package: str, name: str):
    """A module of a package that `--<package>_enabled=1` has switched on, and that is imported only then. UserError without it."""
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != package:
            raise
        raise UserError(f"--{package}_enabled=1 needs the package {e.name}, which is not installed: put the folder {package} back, "
                        f"or use --{package}_enabled=0") from None


def parse_optional(make_parser: Callable[[bool], FlagParser], package: str) -> tuple[FlagParser, argparse.Namespace]:
    """The parser and the flags of this process's command line, those of an optional package only where it is switched on.

    make_parser(with_package): with_package when `--<package>_enabled=1` is given (the last mention counts), or all help is asked
    for and the package is there. Exits like argparse for unknown flags, and for the package's flags while it is off.
    """
    argv = " ".join(sys.argv[1:]).replace("-", "_").replace("=", " ")
    on = re.findall(rf"(?:^| )__{package}_enabled (\S+)", argv)[-1:] == ["1"]
    helps = {"-h", "--help"} & set(sys.argv[1:]) and importlib.util.find_spec(package) is not None
    parser = make_parser(on or bool(helps))
    args, unknown = parser.parse_known_args()
    names = [name for name in unknown if name.startswith("--")]
    if names and all(name.startswith(f"--{package}_") for name in names) and not getattr(args, f"{package}_enabled"):
        parser.error(f"{' '.join(unknown)}: needs --{package}_enabled=1")
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    return parser, args


def run_main(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
        if dist.is_initialized():
            leave_together()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        shutdown_distributed()


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device


def init_distributed(device: str = "auto") -> Ranks:
    """Join the process group when started by torchrun (NCCL on CUDA, gloo on CPU), else run alone.

    device: "auto" (CUDA when there is one), "cpu" or "cuda".
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no CUDA device; use --device=cpu")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch_device = torch.device(device)
    if device == "cuda":
        torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(torch_device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return Ranks(rank, world_size, torch_device)


def leave_together() -> None:
    """End this process when every rank is done, without tearing anything down: gloo's threads, destroyed at an exit while another rank
    still talks, aborted finished runs now and then (1 of 13; with a barrier and an orderly exit still 1 in some thirty)."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def shutdown_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def print0(*args, **kwargs) -> None:
    """Print on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **{"flush": True, **kwargs})


def seed_everything(seed: int) -> None:
    """One seed for Python, NumPy and torch. Every other draw is keyed from the same seed (`key_seed`)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def key_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on `key` alone, e.g. (seed, "cuts", step, row): the same whatever the number of ranks."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
