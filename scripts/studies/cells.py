"""Cells of a study or a suite: run once, in processes of their own, and their records.

A cell is one dict that says all its numbers depend on. Each runs in a process of its own and appends one
line of JSON, its record, when it
is done: so what a kill interrupts is lost, what was finished is not run again, and two runners may work on one file.
"""

import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from nanochat.common import UserError, one_line, parse_json, print0
from nanochat.outputs import locked
from nanochat.telemetry.sinks import duration
from scripts.eval.provenance import commit, environment


def read_yaml(path: Path, known: Iterable[str], required: Iterable[str]) -> dict:
    """A study or a suite. UserError unless it is a mapping with these keys."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a date that there is not is a ValueError
        raise UserError(f"{path} is not YAML: {one_line(e, 400)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a mapping of names to values")
    if unknown := [str(key) for key in found if key not in known]:
        raise UserError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    if missing := [key for key in required if key not in found]:
        raise UserError(f"{path}: {', '.join(missing)} is missing")
    return found


def whole_numbers(text: str, flag: str) -> list[int]:
    """"1,2,3" as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}={text}: whole numbers with commas between them, like 1,2,3") from None


# ---------------------------------------------------------------------------------------------------------------------
# Records


class CellRecords:
    """A file of records: JSON lines with a "key" each. The last record of a key counts."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict]:
        """key -> record. A line that is no record (torn when a run was killed) is named on stderr and left out."""
        found = {}
        if self.path.exists():
            for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
                try:
                    record = parse_json(line)
                    found[record["key"]] = record
                except (ValueError, KeyError, TypeError):
                    print(f"warning: {self.path}:{number} is no whole record; it is left out", file=sys.stderr,
                          flush=True)
        return found

    def append(self, record: dict) -> None:
        """On the medium when this returns."""
        line = json.dumps(record).encode() + b"\n"
        with locked(self.path), open(self.path, "ab+") as f:
            if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
                line = b"\n" + line  # behind a torn line
            f.write(line)
            f.flush()
            os.fsync(f.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Running

_context = multiprocessing.get_context("forkserver")


def find_function(name: str) -> Callable:
    """"module:function". UserError if there is none."""
    module, _, function = str(name).partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"there is no function {name}: {e}") from None


def _run_cell(cell: dict, work: str, records: CellRecords, log: Path, again: bool, errors) -> None:
    """In a process of its own, output into `log`. Dies with the runner, and does nothing
    if another runner was faster."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    with open(log, "a") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    try:
        with locked(log):
            if again or cell["key"] not in records.read():
                begin = time.time()
                results = find_function(work)(cell)
                records.append({**cell, "results": results, "seconds": round(time.time() - begin, 2),
                                "commit": commit(), "environment": environment(),
                                "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
    except UserError as e:
        errors.send(str(e))
    except BaseException as e:
        traceback.print_exc()
        errors.send(f"{type(e).__name__}: {e}")


def run_cells(cells: list[dict], work: str, records: CellRecords, *, what: str, jobs: int = 1,
              again: bool = False) -> None:
    """Run the cells whose key has no record yet (`again`: all), `jobs` at a time. Each is {"key", "name", …} and is
    handed whole to `work`, the function "module:name" that gives its results.

    A cell that fails does not stop the others; then UserError names the first one's error and log.
    """
    done = {} if again else records.read()
    waiting = [cell for cell in cells if cell["key"] not in done]
    logs = records.path.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    main = sys.modules["__main__"].__spec__
    # every cell runs the main module anew anyway
    preload = {"torch", "matplotlib.pyplot", work.partition(":")[0]} - {main and main.name}
    _context.set_forkserver_preload(sorted(preload))
    print0(f"{what}: {len(cells)} cells, {len(cells) - len(waiting)} of them done before")
    running, failures, begin, finished, total = [], [], time.monotonic(), 0, len(waiting)
    while waiting or running:
        while waiting and len(running) < jobs:
            cell, (receiver, sender) = waiting.pop(0), _context.Pipe(duplex=False)
            process = _context.Process(target=_run_cell, args=(cell, work, records, logs / f"{cell['key']}.log", again,
                                                               sender), daemon=True)
            process.start()
            sender.close()
            running.append((cell, process, receiver))
            print0(f"{what}: {cell['name']} …")
        multiprocessing.connection.wait([process.sentinel for _, process, _ in running])
        for entry in [entry for entry in running if not entry[1].is_alive()]:
            cell, process, receiver = entry
            running.remove(entry)
            process.join()
            finished += 1
            error = _received(receiver) or (f"ended with code {process.exitcode}" if process.exitcode else "")
            if error:
                failures.append(f"{cell['name']}: {error}; log: {logs / cell['key']}.log")
                print0(f"{what}: FAILED {failures[-1]}")
            left = (time.monotonic() - begin) / finished * (total - finished)
            print0(f"{what}: {finished}/{total} cells, ETA {duration(left)}")
    if failures:
        raise UserError(f"{len(failures)} of {total} cells failed, the others are recorded; the first: {failures[0]}")


def _received(receiver) -> str:
    try:
        return receiver.recv()
    except EOFError:
        return ""
