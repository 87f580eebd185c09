"""What every script shares: where files go, errors a user can act on, flags, processes and seeds."""

import argparse
import contextlib
import errno
import hashlib
import importlib
import importlib.util
import json
import os
import random
import re
import signal
import sys
import traceback
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Callable, NoReturn, TypeVar, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist

from nanochat.redact import scrubbed
from nanochat.streams import INTERRUPTED, READER_LEFT, StreamLost, flushed_streams, leave_at_once, on_interrupt, prepare_streams, reader_left  # noqa: E501

T = TypeVar("T")

# full, or not to be written: nothing that a program did wrong
MEDIUM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class UserError(Exception):
    """A mistake the user can mend: one line saying what is wrong, which value, and what to do. Exit code 2.

    It is one line that a terminal can show whatever the value is: foreign text in it is cut and cleaned.
    """

    def __str__(self) -> str:
        return one_line(super().__str__(), 1500)


def base_dir() -> Path:
    """Where artefacts go: `$NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat`. Not created here."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()


def parse_json(text: str | bytes) -> object:
    """`json.loads`, whose every refusal is a ValueError of one line, also of bytes that are no UTF-8 and
    of what is nested too deeply."""
    try:
        return json.loads(text)
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8: {e.reason} at byte {e.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def from_plain(kind: type[T], values: object, where: str) -> T:
    """A dataclass of plain values from what was stored of it; a field may be left out that has a
    default, an int may stand for a float.

    UserError for anything but a mapping of its fields to values of their types, and what `kind` itself refuses.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a mapping of names to values")
    types = get_type_hints(kind)
    if unknown := sorted(map(str, set(values) - set(types))):
        raise UserError(f"{where} has unknown fields: {', '.join(unknown)[:200]}; it was written by another version")
    if missing := [f.name for f in fields(kind) if f.name not in values and f.default is MISSING]:
        raise UserError(f"{where} lacks {', '.join(missing)}; it was written by another version, or damaged")
    for name, value in values.items():
        wanted = get_origin(types[name]) or types[name]
        if type(value) not in {float: (int, float), bool: (bool, int)}.get(wanted, (wanted,)):
            raise UserError(f"{where}: {name} is {one_line(value)}, not of type {wanted.__name__}; it was written by "
                            "another version, or damaged")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise UserError(f"{where}: {name} is {one_line(value)}, beyond 64 bits")
    return kind(**values)


def one_line(value: object, most: int = 80) -> str:
    """A foreign value, or an error's text, as it can stand in an error of ours: one printable line that is not long."""
    text = " ".join((value if isinstance(value, str) else str(value) if isinstance(value, Exception)
                     else repr(value))[:4 * most].split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= most else text[:most - 1] + "…"


def whole_number(text: str) -> int | None:
    """A number ≥ 0 of decimal digits alone, at most 18; None for any other text, ² and - among them."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def boolean(text: str) -> bool:
    """What a flag that is 0 or 1 stands for; see `FlagParser.add_switch`."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")
    return text == "1"


def flag_type(default: object) -> Callable[[str], object]:
    """What reads a flag that has this default: `bool("0")` would be true."""
    return boolean if isinstance(default, bool) else type(default)


DEVICES = ("auto", "cpu", "cuda")


class FlagParser(argparse.ArgumentParser):
    """argparse with one-line errors (exit code 2), defaults in the help, and `--a-b 1` meaning `--a_b=1`."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def add_switch(self, name: str, default: bool, help: str) -> None:
        """A flag that is 0 or 1 on the command line, and a bool from there on."""
        self.add_argument(name, type=boolean, default=default, metavar="{0,1}", help=help)

    # what many commands take is one flag: one name, one form, one help
    def add_checkpoint(self, what: str = "of a training run", required: bool = True) -> None:
        self.add_argument("--checkpoint_dir", type=Path, required=required, help=f"checkpoint directory {what}")

    def add_step(self) -> None:
        self.add_argument("--step", default="latest",
                          help="training step to load, or 'latest' (the newest intact one)")

    def add_device(self, what: str = "where to run") -> None:
        self.add_argument("--device", default="auto", choices=DEVICES, help=f"{what}; auto: CUDA when there is one")

    def add_seed(self, what: str, default: int = 0) -> None:
        self.add_argument("--seed", type=int, default=default, help=f"of {what}")

    def add_out(self, what: str, default: str = "") -> None:
        """default: below $NANOCHAT_BASE_DIR; "": the flag must be given."""
        self.add_argument("--out", type=Path, required=not default,
                          help=what + (f"; default $NANOCHAT_BASE_DIR/{default}" if default else ""))

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        for i, arg in enumerate(args):
            if arg.startswith("--") and arg != "--":
                name, eq, value = arg.partition("=")
                args[i] = "--" + name[2:].replace("-", "_") + eq + value
        return super().parse_known_args(args, namespace)

    def _get_value(self, action, arg_string: str):
        """Refuses what no flag can mean: an empty path, a whole number that 64 bits do not hold. What is
        finite a command asks itself."""
        value = super()._get_value(action, arg_string)
        if action.type is Path and not arg_string:
            raise argparse.ArgumentError(action, "an empty path")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise argparse.ArgumentError(action, f"{arg_string[:30]} does not fit 64 bits")
        return value

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message, 1500)} (see --help)\n")


def import_optional(package: str, name: str):
    """A module of a package that `--<package>_enabled=1` has switched on, and that is imported only
    then. UserError without it."""
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != package:
            raise
        raise UserError(f"--{package}_enabled=1 needs the package {e.name}, which is not installed: put the folder "
                        f"{package} back, "
                        f"or use --{package}_enabled=0") from None


def optional_module(name: str, what: str, extra: str) -> ModuleType:
    """A module of a package that `what` needs and that an extra installs. UserError without it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise UserError(f"{what} needs the package {e.name}, which is not installed: pip install "
                        f"'megacontext[{extra}]'") from None


def parse_optional(make_parser: Callable[[bool], FlagParser], package: str) -> tuple[FlagParser, argparse.Namespace]:
    """The parser and the flags of this process's command line, those of an optional
    package only where it is switched on.

    make_parser(with_package): with_package when `--<package>_enabled=1` is given (the last mention counts), or all help
    is asked for and the package is there. Exits like argparse for unknown flags, and for the
    package's flags while it is off.
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
    """Call `main`. A UserError becomes one line on stderr and exit code 2, as does an output that cannot be written, a
    full or read-only disk and a lack of memory; Ctrl-C one line and 130; an output that nobody reads any more ends the
    command with 141, silently. No line, and no traceback, shows a secret of the environment."""
    prepare_streams()
    on_interrupt(signal.default_int_handler)
    try:
        with flushed_streams():
            main()
        if dist.is_initialized():
            leave_together()
    except UserError as e:
        leave(f"error: {e}", 2)
    except StreamLost as e:
        sys.exit(READER_LEFT) if reader_left(e) else leave(f"error: cannot write to {e.filename}: {e.strerror}", 2)
    except KeyboardInterrupt:
        on_interrupt(leave_at_once)
        leave("interrupted", INTERRUPTED)
    except Exception as e:
        leave(f"error: {said}", 2) if (said := beyond_this_machine(e)) else leave(traceback.format_exc().rstrip(), 1)
    finally:
        shutdown_distributed()


def beyond_this_machine(e: Exception) -> str:
    """The words of an exception that says the disk or the memory is not enough; "" for any other."""
    if isinstance(e, OSError) and e.errno in MEDIUM:
        return f"{f'cannot write {e.filename}: ' if e.filename else ''}{e.strerror}"
    # torch's on the CPU
    if isinstance(e, MemoryError | torch.OutOfMemoryError) or (isinstance(e, RuntimeError)
                                                               and "allocate memory" in str(e)):
        return f"out of memory ({(str(e).splitlines() or ['this machine has no more'])[0]}); use smaller sizes"
    return ""


def leave(last_words: str, code: int) -> NoReturn:
    """Say why on stderr, if that can be done, and exit."""
    with contextlib.suppress(StreamLost):
        print(scrubbed(last_words), file=sys.stderr, flush=True)
    sys.exit(code)


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device


def pick_device(device: str) -> str:
    """"cpu" or "cuda" for a value of --device. UserError for CUDA where there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no CUDA device; use --device=cpu")
    return device


def init_distributed(device: str = "auto") -> Ranks:
    """Join the process group when started by torchrun (NCCL on CUDA, gloo on CPU), else run alone.

    device: "auto" (CUDA when there is one), "cpu" or "cuda".
    """
    device = pick_device(device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch_device = torch.device(device)
    if device == "cuda":
        torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(torch_device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return Ranks(rank, world_size, torch_device)


def leave_together() -> None:
    """End this process when every rank is done, without tearing anything down: gloo's threads, destroyed at an exit
    while another rank still talks, aborted finished runs now and then (1 of 13; with a barrier and an orderly
    exit still 1 in some thirty)."""
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
    """A 63-bit seed that depends on `key` alone, e.g. (seed, "cuts", step, row): the same
    whatever the number of ranks."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair: json and command lines can hold one, UTF-8 cannot.
    Halves side by side are a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def shown(name: str | os.PathLike) -> str:
    """The name of a file or a field as one printable line: bytes that are no UTF-8, line ends and other
    unprintable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(name))
