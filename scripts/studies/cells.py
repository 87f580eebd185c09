"""What the experiment runners share: cells that are run once, their records, and statistics on them.

A cell is one dict that says all its numbers depend on. Each runs in a process of its own and appends one line of JSON, its record, when it
is done: so what a kill interrupts is lost, what was finished is not run again, and two runners may work on one file.

Statistics. A measure is x_SC: one number per seed and document. Intervals and p-values come from draws of how its mean would come out with other
seeds and other documents, the same draws for every arm and every measure, so that every comparison is paired and any arithmetic on means (a gap
closed, say) has its distribution too. Documents are drawn with replacement (the bootstrap). Seeds are too few for that: three agree by chance in
one case of four, and would then agree in every draw. Their mean is spread as the t-distribution says instead. Both deviations are added, so what
differs by seed and document together counts twice: conservative. A measure that has one number per seed is tested by the paired t-test over
seeds, which is the same without documents. False positives, measured: obsidian/log/2026-11-23 What three seeds can say.md.

Shapes: S seeds, C documents, D draws of the bootstrap.
"""

import ast
import hashlib
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import operator
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml

from nanochat.common import UserError, one_line, parse_json, print0
from nanochat.outputs import locked
from nanochat.recorder import duration

DRAWS = 4000
ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# Where a number comes from


def commit() -> str:
    """What git calls the checked-out code, "-dirty" where it was changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    found = shutil.which("git") and subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found or "not a git checkout"


def environment() -> dict:
    """What besides code and configuration may change a result or a time."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def digest(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


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
                    print(f"warning: {self.path}:{number} is no whole record; it is left out", file=sys.stderr, flush=True)
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
    """In a process of its own, output into `log`. Dies with the runner, and does nothing if another runner was faster."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    with open(log, "a") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    try:
        with locked(log):
            if again or cell["key"] not in records.read():
                begin = time.time()
                results = find_function(work)(cell)
                records.append({**cell, "results": results, "seconds": round(time.time() - begin, 2), "commit": commit(), "environment": environment(),
                                "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
    except UserError as e:
        errors.send(str(e))
    except BaseException as e:
        traceback.print_exc()
        errors.send(f"{type(e).__name__}: {e}")


def run_cells(cells: list[dict], work: str, records: CellRecords, *, what: str, jobs: int = 1, again: bool = False) -> None:
    """Run the cells whose key has no record yet (`again`: all), `jobs` at a time. Each is {"key", "name", …} and is handed whole to `work`, the function
    "module:name" that gives its results.

    A cell that fails does not stop the others; then UserError names the first one's error and log.
    """
    done = {} if again else records.read()
    waiting = [cell for cell in cells if cell["key"] not in done]
    logs = records.path.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    main = sys.modules["__main__"].__spec__
    preload = {"torch", "matplotlib.pyplot", work.partition(":")[0]} - {main and main.name}  # every cell runs the main module anew anyway
    _context.set_forkserver_preload(sorted(preload))
    print0(f"{what}: {len(cells)} cells, {len(cells) - len(waiting)} of them done before")
    running, failures, begin, finished, total = [], [], time.monotonic(), 0, len(waiting)
    while waiting or running:
        while waiting and len(running) < jobs:
            cell, (receiver, sender) = waiting.pop(0), _context.Pipe(duplex=False)
            process = _context.Process(target=_run_cell, args=(cell, work, records, logs / f"{cell['key']}.log", again, sender), daemon=True)
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


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def seed_weights(seeds: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[D, S] weights of sum 1, negative ones among them: for any x_S, weights @ x is distributed as mean + t · deviation / √S, t with S − 1 degrees
    of freedom.

    Beside 1/S a weight is a multivariate t in the S − 1 dimensions in which weights of sum 0 lie, and any projection of that is a t.
    """
    if seeds == 1:
        return np.ones((draws, 1))
    normal_DS = rng.standard_normal((draws, seeds))
    normal_DS -= normal_DS.mean(1, keepdims=True)
    chi_D1 = np.sqrt(rng.chisquare(seeds - 1, (draws, 1)) / (seeds - 1))
    return 1 / seeds + normal_DS / chi_D1 / math.sqrt(seeds * (seeds - 1))


class Bootstrap:
    """Draws of seeds and documents, the same for every measure of one shape."""

    def __init__(self, seeds: int, documents: int, draws: int = DRAWS):
        rng = np.random.default_rng(0)
        self.seeds_DS = seed_weights(seeds, draws, rng)
        self.documents_DC = rng.multinomial(documents, np.full(documents, 1 / documents), draws).astype(float)

    def means(self, x_SC: np.ndarray) -> np.ndarray:
        """[D] mean of each draw. NaN stands for a document that has no such value, and counts for nothing; a seed without any gives NaN."""
        there = ~np.isnan(x_SC)
        mean = lambda axis: np.where(there, x_SC, 0.0).sum(axis) / there.sum(axis)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_document_C, some_C = mean(0), there.any(0)
            documents_D = self.documents_DC @ np.where(some_C, of_document_C, 0.0) / (self.documents_DC @ some_C)
            return self.seeds_DS @ mean(1) + documents_D - mean(None)


bootstrap = lru_cache(maxsize=16)(Bootstrap)


def interval(draws_D: np.ndarray) -> tuple[float, float]:
    """95 %. NaN where a draw has no value."""
    return float(np.quantile(draws_D, 0.025)), float(np.quantile(draws_D, 0.975))


def bootstrap_p(difference_D: np.ndarray) -> float:
    """Two-sided: how often the sign of a difference turns, at least 2 / (D + 1). NaN where a draw has no value."""
    if np.isnan(difference_D).any():
        return math.nan
    least = min((difference_D <= 0).sum(), (difference_D >= 0).sum())
    return float(min(1.0, 2 * (least + 1) / (len(difference_D) + 1)))


def t_test(difference_S: np.ndarray) -> tuple[tuple[float, float], float]:
    """95 % interval of the mean, and the p-value of its being 0 (paired t-test, two-sided). One seed has neither: NaN. UserError without scipy."""
    if len(difference_S) < 2:
        return (math.nan, math.nan), math.nan
    if np.ptp(difference_S) == 0:
        return (float(difference_S[0]), float(difference_S[0])), 1.0 if difference_S[0] == 0 else 0.0
    try:
        from scipy.stats import ttest_1samp
    except ImportError:
        raise UserError("the paired t-test needs the package scipy: pip install 'megacontext[eval]'") from None
    found = ttest_1samp(difference_S, 0)
    low, high = found.confidence_interval(0.95)
    return (float(low), float(high)), float(found.pvalue)


def false_discovery(p: list[float]) -> list[float]:
    """q-values (Benjamini and Hochberg 1995): of the differences with q < 0.05 one in twenty is expected to be none. NaN is no test.

    Not Holm's correction, which wants that there be not a single one: of twenty systems, with three seeds, it asks for a difference twenty times its
    standard error.
    """
    out, least = list(p), 1.0
    tests = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    for rank, (value, i) in reversed(list(enumerate(tests, 1))):
        least = out[i] = min(least, value * len(tests) / rank)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Formulas

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.USub: operator.neg}


class Formula:
    """Arithmetic on names of measures, like "(nll_window - nll_lens) / (nll_window - nll_full)". UserError if it is anything else."""

    def __init__(self, text: str):
        self.text = text
        try:
            self.tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # of deep nesting, and of what is no text for a parser
            raise UserError(f"{text!r} is no arithmetic on names of measures") from None
        self.names: set[str] = set()
        self._check(self.tree)

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            self.names.add(node.id)
        elif isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in OPERATORS:
            for child in (node.left, node.right) if isinstance(node, ast.BinOp) else (node.operand,):
                self._check(child)
        elif not (isinstance(node, ast.Constant) and isinstance(node.value, int | float)):
            raise UserError(f"{self.text!r} is no arithmetic on names of measures: {ast.unparse(node)!r}")

    def __call__(self, values: dict[str, np.ndarray]) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._value(self.tree, values)

    def _value(self, node: ast.AST, values: dict[str, np.ndarray]) -> np.ndarray:
        if isinstance(node, ast.Name):
            return values[node.id]
        if isinstance(node, ast.Constant):
            return np.float64(node.value)
        children = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.operand,)
        return OPERATORS[type(node.op)](*(self._value(child, values) for child in children))
