"""The frame of the fuzzing: inputs made wrong, and what may become of one: read, or refused in one line.

    @fuzzed(change=changes())
    def test_metrics(metrics, work, change):
        (work / "metrics.jsonl").write_bytes(change(metrics))
        tried("metrics", lambda: load_run(work))

`tried` counts each input by its kind and fails for an exception that is no refusal, a refusal of several lines, and a
hang. `changes` damages bytes as media and editors do, `json_changes` values as other programs do; both are lists of few
small steps, so that hypothesis shrinks them.

FUZZ_EXAMPLES: inputs per test, by default few, so that all take half a minute. A test's `cost` divides it.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.common import UserError, run_main

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 12))
HANG_SECONDS = 30  # far above what the slowest input takes on a busy machine
T = TypeVar("T")
COUNTS: dict[str, Counter] = {}  # kind of input -> "read", "refused"


class Hang(BaseException):
    """An input that took longer than HANG_SECONDS. No Exception: what is fuzzed must not take
    it for a fault of its input."""


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def ring(*_):
        raise Hang(f"still at it after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(kind: str, read: Callable[[], T]) -> T | None:
    """What `read` makes of one input, None where it refuses it by a UserError of one line.
    Whatever else it raises goes on."""
    try:
        with no_hang():
            found = read()
    except UserError as e:
        check_line(str(e))
        COUNTS.setdefault(kind, Counter())["refused"] += 1
        return None
    COUNTS.setdefault(kind, Counter())["read"] += 1
    return found


def check_line(text: str) -> None:
    """A refusal is one line of at most a screen, that can be printed wherever it goes."""
    assert text.strip() and text.isprintable() and len(text) < 2000, repr(text)
    text.encode("utf-8")


def command(kind: str, main: Callable[[], None], *flags: str) -> str | None:
    """What a command prints for these flags, None where it refuses them: exit code 2, the last line on
    stderr an error, no traceback.

    An exit code of 1 is `verify`'s, for a store that is damaged: it counts as read. The
    terminal's own help counts as read too.
    """
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["fuzzed", *flags]
    try:
        with no_hang(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_main(main)
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv
    assert "Traceback" not in err.getvalue(), err.getvalue()
    assert code in (0, 1, 2), (code, err.getvalue())
    if code == 2:
        *warnings, error = err.getvalue().splitlines() or [""]
        assert error.startswith("error: ") and all(line.startswith(("warning: ", "note: "))
                                                   for line in warnings), err.getvalue()
        check_line(error)
    COUNTS.setdefault(kind, Counter())["refused" if code == 2 else "read"] += 1
    return None if code == 2 else out.getvalue()


def fuzzed(*strategies: st.SearchStrategy, cost: float = 1, **named: st.SearchStrategy) -> Callable:
    """`given`, with FUZZ_EXAMPLES ÷ cost examples. Fixtures are made once per test: it
    must put back what it changes."""
    unhurried = settings(max_examples=max(round(EXAMPLES / cost), 3), deadline=None, print_blob=True,
                         report_multiple_bugs=False,
                         suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow,
                                                HealthCheck.data_too_large])
    return lambda test: unhurried(given(*strategies, **named)(test))


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


class Intact(bytes):
    """A whole file, as a fixture: hypothesis prints the arguments of what fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


Change = Callable[[bytes], bytes]
TEXTS = (b"", b"\0", b"\n", b"\r\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"null", b"NaN", b"-Infinity",
         b"1e999", b"-1", b"[]", b"{}",
         b'"x"', b"9" * 400, b"[" * 3000, b"\xf0\x9f\x92\xa9", b"\x1b[31m", "\u2028".encode())


class _Bytes:
    """A list of steps; its repr says what hypothesis found. Places are shares of the length, so that
    they fit whatever is changed."""

    def __init__(self, steps: list[tuple]):
        self.steps = steps

    def __repr__(self) -> str:
        return f"changed by {self.steps}"

    def __call__(self, data: bytes) -> bytes:
        for step in self.steps:
            data = _step(data, *step)
        return data


def _step(data: bytes, what: str, place: float, value: int) -> bytes:
    at = min(int(place * len(data)), max(len(data) - 1, 0))
    lines = data.split(b"\n")
    line = min(int(place * len(lines)), len(lines) - 1)
    match what:
        case "flip" if data:
            return data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1:]
        case "byte" if data:
            return data[:at] + bytes([value % 256]) + data[at + 1:]
        case "cut":
            return data[:at]
        case "zero":
            return data[:at] + bytes(len(data[at:at + value])) + data[at + value:]
        case "drop":
            return data[:at] + data[at + value:]
        case "twice":
            return data[:at + value] + data[at:]
        case "insert":
            return data[:at] + TEXTS[value % len(TEXTS)] + data[at:]
        case "swap lines":
            other = value % len(lines)
            lines[line], lines[other] = lines[other], lines[line]
        case "drop line":
            del lines[line]
        case "repeat line":
            lines.insert(line, lines[value % len(lines)])
        case "whole":
            return TEXTS[value % len(TEXTS)]
    return b"\n".join(lines) if "line" in what else data


STEPS = ("flip", "byte", "cut", "zero", "drop", "twice", "insert", "swap lines", "drop line", "repeat line", "whole")


def changes(most: int = 3, steps: tuple[str, ...] = STEPS) -> st.SearchStrategy[Change]:
    """Functions from intact bytes to damaged ones."""
    step = st.tuples(st.sampled_from(steps), st.floats(0, 1, exclude_max=True, allow_subnormal=False),
                     st.integers(0, 600))
    return st.lists(step, min_size=1, max_size=most).map(_Bytes)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


EDGES = (None, True, False, 0, 1, -1, 2, 31, 33, 1.5, -0.5, 1e308, 1e-320, float("nan"), float("inf"), 2**31, 2**63,
         -(2**63), 10**30, 10**320, "", "x", "0",
         "\ud800", "a\nb", "../x", "\0", "\x1b[31m", "x" * 3000, [], [1], [[]], [None], {}, {"x": 1}, {"": {}})


class _Json:
    def __init__(self, steps: list[tuple]):
        self.steps = steps

    def __repr__(self) -> str:
        return f"changed by {self.steps}"

    def __call__(self, value):
        value = copy.deepcopy(value)
        for what, place, new in self.steps:
            value = _json_step(value, what, place, new)
        return value


def _places(value, parent=None, key=None) -> Iterator[tuple]:
    """(container, key) of every value, the outermost first."""
    yield parent, key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in list(items)[:200]:
        yield from _places(inner, value, name)


def _json_step(value, what: str, place: float, new):
    places = list(_places(value))
    parent, key = places[min(int(place * len(places)), len(places) - 1)]
    if parent is None:
        return new if what == "put" else value
    if what == "put":
        parent[key] = copy.deepcopy(new)
    elif what == "drop":
        del parent[key]
    elif what == "add" and isinstance(parent, dict):
        parent["unknown"] = copy.deepcopy(new)
    elif what == "add":
        parent.insert(key, copy.deepcopy(new))
    elif what == "nudge" and type(parent[key]) in (int, float):
        parent[key] += new if type(new) is int and abs(new) < 2**64 else 1
    return value


def json_changes(most: int = 2) -> st.SearchStrategy[Callable]:
    """Functions from a JSON value to one with foreign types, numbers at the edges, and keys too few or too many."""
    step = st.tuples(st.sampled_from(("put", "put", "drop", "add", "nudge")),
                     st.floats(0, 1, exclude_max=True, allow_subnormal=False), st.sampled_from(EDGES))
    return st.lists(step, min_size=1, max_size=most).map(_Json)


def dumped(value) -> bytes:
    """JSON as Python's writer and others make it, lone surrogates and NaN included."""
    return json.dumps(value).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Folders


class Image(dict):
    """Files below a folder: content by relative path, None of folders. Its repr is short, as `Intact`'s."""

    def __repr__(self) -> str:
        return f"<{len(self)} files>"


def image(folder: Path) -> Image:
    """Every file below a folder, and every folder; but for what SQLite leaves beside a database that was read."""
    return Image((str(p.relative_to(folder)), p.read_bytes() if p.is_file() else None)
                 for p in sorted(folder.rglob("*")) if not p.name.endswith(("-shm", "-wal")))


def put_image(folder: Path, files: dict[str, bytes | None]) -> Path:
    """Make a folder be what `image` saw, whatever it holds now."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        if content is None:
            (folder / name).mkdir(exist_ok=True)
        else:
            (folder / name).write_bytes(content)
    return folder
