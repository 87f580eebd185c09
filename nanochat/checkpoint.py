"""Checkpoints that are whole or invisible, and resume bit for bit.

A step's files, in nanochat's layout:

    model_000100.pt         state dict of the model
    mc_000100.pt            other modules' state, if any was given
    meta_000100.json        what describes the run: configuration, step, data position, losses
    optim_000100_rank0.pt   one per rank: its optimizer shard, its random number generators, its loader
    complete_000100.json    the commit record, written last: name, size and sha256 of all the others

Everything is written to `*.tmp`, flushed to disk and renamed; a step without its commit record does not exist. Loading
compares sizes and checksums first, and never unpickles code (`weights_only=True`). All ranks see the same directory.
"""

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import UserError, one_line, parse_json, whole_number
from nanochat.outputs import write_file

State = dict[str, object]  # nested dicts, lists and tuples of tensors, numbers, strings and None


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read for one rank. `rng` goes to `set_rng_state`, `optimizer` to the
    optimizer's load_state_dict."""

    step: int
    model: dict[str, Tensor]
    meta: dict
    mc: State | None
    optimizer: State
    loader: State
    rng: State


def rng_state() -> State:
    """The state of this process's generators (torch CPU and CUDA, NumPy, Python), in types
    that load without unpickling."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, torch.tensor(words), next_gauss],
    }


def set_rng_state(state: State) -> None:
    """Put the generators where `rng_state` found them. A CUDA state is ignored without CUDA."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), next_gauss))


def save_checkpoint(
    directory: str | Path,
    step: int,
    *,
    model: dict[str, Tensor],
    optimizer_shard: State,
    meta: dict,
    mc: State | None = None,
    loader: State | None = None,
    rank: int = 0,
    world_size: int = 1,
    keep_last: int | None = None,
) -> None:
    """Write one step; every rank calls it (rank 0 writes what is common), and returns once the step is complete.

    loader: where this rank is in the data. keep_last: afterwards only the newest N complete steps up to this one stay.
    Raises UserError on every rank if any rank cannot write; earlier steps are untouched then. Raises TypeError, before
    anything is written, for a value that could not be loaded again.
    """
    directory = Path(directory)
    own: dict[str, object] = {
        f"optim_{step:06d}_rank{rank}.pt": {"optimizer": optimizer_shard, "rng": rng_state(), "loader": loader or {}}
    }
    if rank == 0:
        own |= {f"model_{step:06d}.pt": dict(model), f"meta_{step:06d}.json": {"step": step, **meta}}
        if mc is not None:
            own[f"mc_{step:06d}.pt"] = mc
    for name, content in own.items():
        if name.endswith(".pt"):
            _assert_loadable(content, name)

    files, error = {}, None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = {name: _write_temporary(directory / name, content) for name, content in own.items()}
    except (OSError, RuntimeError) as e:  # torch reports a failed write as a RuntimeError
        error = str(e)
    everyone = _gather((files, error), world_size)
    errors = [e for _, e in everyone if e]
    if not errors:
        errors = _commit(directory, step, own, {k: v for f, _ in everyone for k, v in f.items()}, rank, world_size)
    if errors:
        for name in own:
            with contextlib.suppress(OSError):
                _temporary(directory / name).unlink(missing_ok=True)
        raise UserError(f"cannot save the checkpoint of step {step} in {directory}: {errors[0]}; earlier checkpoints "
                        "are untouched")
    if rank == 0 and keep_last is not None:
        _prune(directory, step, keep_last)


def _commit(directory: Path, step: int, own: dict, files: dict, rank: int, world_size: int) -> list[str]:
    """Rename this rank's files; when all ranks have, rank 0 writes the commit record.
    Returns the errors of all ranks."""
    record = directory / f"complete_{step:06d}.json"

    def attempt(action) -> list[str]:
        try:
            action()
            error = None
        except OSError as e:
            error = str(e)
        return [e for e in _gather(error, world_size) if e]

    def rename_own() -> None:
        for name in own:
            os.replace(_temporary(directory / name), directory / name)

    def write_record() -> None:
        if rank == 0:
            _write_temporary(record, {"step": step, "world_size": world_size, "files": files})
            _sync(directory)
            os.replace(_temporary(record), record)
            _sync(directory)

    return attempt(rename_own) or attempt(write_record)


def annotate(directory: str | Path, step: int, **facts: object) -> None:
    """Add to what a complete step's meta says, e.g. an evaluation that came after the save. One rank calls it.

    The facts stand in the commit record, which is replaced as a whole: the step is intact at every moment.
    """
    record = Path(directory) / f"complete_{step:06d}.json"
    write_file(record, json.dumps(json.loads(record.read_text()) | {"facts": facts}, indent=1))


def complete_steps(directory: str | Path) -> list[int]:
    """Steps with a commit record, oldest first; whether they are intact is not looked at."""
    return sorted(int(m[1]) for p in Path(directory).glob("complete_*.json")
                  if (m := re.fullmatch(r"complete_(\d+)\.json", p.name)))


def damage(directory: str | Path, step: int) -> str | None:
    """What is wrong with a step's files, by size and checksum, or None if it is intact."""
    directory = Path(directory)
    record = directory / f"complete_{step:06d}.json"
    try:
        files = parse_json(record.read_bytes())["files"]
        for name, expected in files.items():
            if Path(name).name != name or not expected["size"] >= 0:
                raise ValueError
            if not (directory / name).exists():
                return f"{name} is missing"
            size = (directory / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if _sha256(directory / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{record.name} is missing: it was never completed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{record.name} is unreadable ({type(e).__name__})"
    return None


def find_step(directory: str | Path, step: int | str = "latest") -> int:
    """The step to load: the one named, which must be intact, or the newest intact one ("latest").

    Newer steps that were passed over are named on stderr with the reason. Raises UserError when there is none.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no checkpoint directory {directory}")
    if step != "latest":
        if whole_number(str(step)) is None:
            raise UserError(f"checkpoint step {step!r} is neither a number nor 'latest'")
        if reason := damage(directory, int(step)):
            raise UserError(f"checkpoint of step {step} in {directory} cannot be used: {reason}; "
                            f"{_choices(directory, int(step))}")
        return int(step)
    begun = {int(m[1]) for p in directory.iterdir()
             if (m := re.fullmatch(r"(?:model|complete)_(\d+)\.(?:pt|json)", p.name))}
    for candidate in sorted(begun, reverse=True):
        if (reason := damage(directory, candidate)) is None:
            return candidate
        print(f"warning: skipping the checkpoint of step {candidate} in {directory}: {reason}", file=sys.stderr,
              flush=True)
    raise UserError(f"no intact checkpoint in {directory}")


def _choices(directory: Path, step: int) -> str:
    others = [s for s in complete_steps(directory) if s != step]
    return f"other steps there: {', '.join(map(str, others))}" if others else "there are no other steps there"


def load_checkpoint(
    directory: str | Path,
    step: int | str = "latest",
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Checkpoint:
    """Read one step for this rank; every rank calls it and gets the same step. Model and mc tensors arrive on `device`,
    what is this rank's alone on the CPU (the optimizer copies it to where its state is).

    Raises UserError on every rank when there is nothing intact, or it was saved by another number of ranks.
    """
    directory = Path(directory)
    found: int | str = 0
    if rank == 0:
        try:
            found = find_step(directory, step)
            saved_by = parse_json((directory / f"complete_{found:06d}.json").read_bytes()).get("world_size")
            if saved_by != world_size:
                found = (
                    f"checkpoint of step {found} in {directory} was saved by {saved_by} rank(s) and cannot resume on "
                    f"{world_size}: "
                    f"run with {saved_by}, or start anew from the model weights"
                )
        except UserError as e:
            found = str(e)
    found = _gather(found, world_size)[0]
    if isinstance(found, str):
        raise UserError(found)
    model, meta = _read_model(directory, found, device)
    mc_path = directory / f"mc_{found:06d}.pt"
    mine = read_tensors(directory / f"optim_{found:06d}_rank{rank}.pt", "cpu")
    return Checkpoint(
        found, model, meta, read_tensors(mc_path, device) if mc_path.exists() else None, mine["optimizer"],
        mine["loader"], mine["rng"]
    )


def load_model_state(
    directory: str | Path, step: int | str = "latest", device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict]:
    """(state dict, meta) of one step, for scripts that do not resume; saved by any number of ranks.
    Raises UserError as `find_step`."""
    return _read_model(Path(directory), find_step(directory, step), device)


def load_mc_state(directory: str | Path, step: int, device: torch.device | str = "cpu") -> State | None:
    """What was saved as `mc` with a step that `find_step` returned, or None."""
    path = Path(directory) / f"mc_{step:06d}.pt"
    return read_tensors(path, device) if path.exists() else None


def _read_model(directory: Path, step: int, device: torch.device | str) -> tuple[dict[str, Tensor], dict]:
    record = directory / f"complete_{step:06d}.json"
    facts = json.loads(record.read_text()).get("facts", {})
    if not isinstance(facts, dict):
        raise UserError(f"{record}: facts is {one_line(facts)}; it was written by another version, or damaged")
    meta = read_meta(directory / f"meta_{step:06d}.json", step)
    return read_tensors(directory / f"model_{step:06d}.pt", device), meta | facts


def read_meta(path: Path, step: int) -> dict:
    """What describes a step. UserError for anything but a mapping that names it, and where a part is no
    mapping or number as it is read."""
    try:
        meta = parse_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {one_line(e)}") from None
    if not isinstance(meta, dict) or meta.get("step") != step:
        raise UserError(f"{path} is not the description of step {step}")
    for name, kinds in META_TYPES.items():
        if name in meta and not isinstance(meta[name], kinds):
            raise UserError(f"{path}: {name} is {one_line(meta[name])}; it was written by another version, or damaged")
    return meta


META_TYPES = {"flags": dict, "mc": (dict, type(None)), "tokenizer": str, "num_iterations": int, "flops": (int, float),
              "tokens": int, "trained_s": (int, float)}


def read_tensors(path: Path, device: torch.device | str) -> dict:
    """A file of tensors and plain values, a dictionary. UserError for anything else."""
    try:
        found = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {one_line(e)}") from None
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError,
            pickle.UnpicklingError) as e:
        raise UserError(f"{path} holds no tensors that can be loaded ({type(e).__name__}: {one_line(e)}); restore it "
                        "from a copy, or use another step") from None
    return found


def load_weights(module: torch.nn.Module, state: dict, where: str, assign: bool = False) -> None:
    """Strictly. assign: the module gets these very tensors, in their dtype and on their device. UserError for what is
    missing, unknown, of another shape or no tensor."""
    wrong = [one_line(name) for name, x in state.items()
             if not (isinstance(name, str) and isinstance(x, Tensor) and x.is_floating_point())]
    try:
        if wrong:
            raise RuntimeError(f"{wrong[0]} is no tensor of floating-point numbers")
        module.load_state_dict(state, assign=assign)
    except RuntimeError as e:
        raise UserError(f"weights in {where}: {one_line(e, 600)}") from None


def _prune(directory: Path, step: int, keep_last: int) -> None:
    """Remove all but the newest `keep_last` complete steps up to `step`, steps before it that
    never completed, and leftovers.

    Steps after this one (of a run resumed from an earlier step) are not touched. A file that cannot be removed stays.
    """
    kept = [s for s in complete_steps(directory) if s <= step][-max(keep_last, 1) :]
    for path in _in_removal_order(directory):
        m = re.fullmatch(r"(?:complete|model|mc|meta|optim)_(\d+)(?:_rank\d+)?\.(?:pt|json)(\.tmp)?", path.name)
        if m and (m[2] or (int(m[1]) < step and int(m[1]) not in kept)):
            with contextlib.suppress(OSError):
                path.unlink()


def _in_removal_order(directory: Path) -> Iterator[Path]:
    """Commit records first: a step half removed must not look complete."""
    yield from sorted(directory.iterdir(), key=lambda p: (not p.name.startswith("complete_"), p.name))


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _write_temporary(path: Path, content: object) -> dict:
    """Write `path`.tmp down to the disk; returns its size [bytes] and sha256 (hex)."""
    temporary = _temporary(path)
    with open(temporary, "wb") as f:
        if path.suffix == ".pt":
            torch.save(content, f)
        else:
            f.write(json.dumps(content, indent=1).encode())
        f.flush()
        os.fsync(f.fileno())
    return {"size": temporary.stat().st_size, "sha256": _sha256(temporary)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gather(mine: object, world_size: int) -> list:
    """Every rank's object, by rank; also a barrier."""
    if world_size == 1:
        return [mine]
    everyone: list = [None] * world_size
    dist.all_gather_object(everyone, mine)
    return everyone


def _assert_loadable(value: object, where: str) -> None:
    """TypeError for anything but tensors, plain numbers, strings, None and dicts, lists or tuples of them."""
    if isinstance(value, dict):
        for k, v in value.items():
            _assert_loadable(k, f"a key of {where}")
            _assert_loadable(v, f"{where}[{k!r}]")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            _assert_loadable(v, f"{where}[{i}]")
    elif not (isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes, type(None))):
        raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers, strings and "
                        "containers of them")
