"""Where samples go: a JSONL file, the console, Weights & Biases. OTLP has a module of its own (`otlp`).

No sink ends a training: what it cannot take is counted, said once, and said again at the end.
"""

import errno
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from nanochat.common import UserError, parse_json
from nanochat.outputs import BASE_DIR, output_file, write_file
from nanochat.redact import scrubbed
from nanochat.telemetry.metrics import Sample
from nanochat.telemetry.tracing import Trace


class Sink:
    """Where samples go, and traces where `traces` is set. `now` is Unix time [s]."""

    traces = False

    def write(self, step: int, now: float, samples: Sequence[Sample]) -> None:
        raise NotImplementedError

    def trace(self, trace: Trace) -> None:
        """A kept trace, finished, its attributes fetched from the device."""

    def health(self) -> dict[str, float]:
        """What has been delivered and lost so far, by metric; recorded with every flush."""
        return {}

    def close(self) -> None:
        """Bring what is left where it belongs."""


class JsonlSink(Sink):
    """One JSON object per flush: {"step": n, "time": Unix seconds, metric: value, ...}; a
    value that is not finite is null.

    An existing file is continued; a last line cut short by a crash is removed first. A line that cannot be written
    during the run (no space left) is left out whole and counted; one warning is printed, training goes on,
    and later lines are tried again.
    """

    def __init__(self, path: Path):
        self.path, self.lost = path, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(path)
            self.file = open(path, "ab", buffering=0)
        except OSError as e:
            raise UserError(f"cannot write metrics to {path}: {e}") from e

    def write(self, step: int, now: float, samples: Sequence[Sample]) -> None:
        values = {s.key: s.value if math.isfinite(s.value) else None for s in samples}
        line = (json.dumps({"step": step, "time": round(now, 3), **values}, allow_nan=False) + "\n").encode()
        whole = self.file.tell()
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            if not self.lost:
                print(f"warning: cannot write metrics to {self.path}: {e.strerror}. Training goes on; lines that are "
                      "lost are counted", file=sys.stderr, flush=True)
            self.lost += 1
            self.file.truncate(whole)
            self.file.seek(whole)

    def health(self) -> dict[str, float]:
        return {"telemetry.jsonl.lost": self.lost}

    def close(self) -> None:
        self.file.close()
        if self.lost:
            print(f"warning: {self.path} lacks {self.lost} lines that could not be written", file=sys.stderr,
                  flush=True)


def _drop_torn_line(path: Path) -> None:
    """Said on stderr: what is left of the last step that was logged before a crash goes."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
            print(f"note: the last line of {path} was cut off and is removed", file=sys.stderr, flush=True)


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics file, one per step in order. Where a resumed run repeated a step, or a step was flushed
    twice, later values win. Lines that are no row (torn when a run was killed, blank, foreign) are counted on stderr
    and left out; UserError where there are no others, OSError where there is no file."""
    rows: dict[int, dict] = {}
    strange, lines = [], Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = checked_row(parse_json(line)) if line.strip() else None
        except ValueError as e:
            strange.append(f"line {number}: {e}")
            continue
        if row:
            rows.setdefault(row["step"], {}).update(row)
    if strange and not rows:
        raise UserError(f"{path} is no metrics file: {strange[0]}; name another file")
    if strange:
        print(f"warning: {path}: {len(strange)} of {len(lines)} lines are no rows of metrics, the first is "
              f"{strange[0]}; they are left out", file=sys.stderr, flush=True)
    return [rows[step] for step in sorted(rows)]


def checked_row(row: object) -> dict[str, int | float | None]:
    """A line of metrics.jsonl: {"step": n, "time": s, metric: value, …}. What is not finite is None, as the recorder
    writes it; ValueError for another thing than an object with a step and a time, and for a value that is no number."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or type(row.get(
        "time")) not in (int, float) or not math.isfinite(row["time"]):
        raise ValueError("not an object with a step and a time")
    if other := [name for name, x in row.items()
                 if not (x is None or type(x) in (int, float) and (type(x) is float or abs(x) < 2**63))]:
        raise ValueError(f"{other[0]!r} has no number that a metric can be")
    return {name: x if x is None or math.isfinite(x) else None for name, x in row.items()}


class ConsoleSink(Sink):
    """One line per flush: step, share done, the metrics that have a short label, and the time left.

    total_steps: length of the run, for share and time left. first_step: where a resumed run begins. Coloured by rich if
    the stream is a terminal.
    """

    def __init__(self, total_steps: int, first_step: int = 0, stream: TextIO | None = None):
        self.total_steps, self.stream = total_steps, stream or sys.stdout
        self.mark = (first_step, time.time())  # progress is timed from here
        self.warm = False
        self.rich = None
        if self.stream.isatty():
            from rich.console import Console

            self.rich = Console(file=self.stream, soft_wrap=True)

    def write(self, step: int, now: float, samples: Sequence[Sample]) -> None:
        shown = [s for s in samples if s.metric.short and not s.attributes]
        if not shown:
            return
        parts = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps} "
                 f"({step / max(self.total_steps, 1):4.0%})"]
        parts += [f"{s.metric.short} {_figure(s.value, s.metric.unit)}" for s in shown]
        if (left := self._seconds_left(step, now)) is not None:
            parts.append(f"eta {duration(left)}")
        line = " | ".join(parts)
        if self.rich:
            self.rich.print(line)
        else:
            print(line, file=self.stream, flush=True)

    def _seconds_left(self, step: int, now: float) -> float | None:
        first, began = self.mark
        if step <= first or step >= self.total_steps:
            return None
        left = (now - began) / (step - first) * (self.total_steps - step)
        if not self.warm:  # the first interval holds warm-up and compilation: time the rest from its end
            self.mark, self.warm = (step, now), True
        return left

    def close(self) -> None:
        self.stream.flush()


def _figure(value: float, unit: str) -> str:
    if unit == "{token}/s":
        return f"{value:,.0f}"
    return f"{value:.4f}" if unit in ("{nat}", "{bit}/By") else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m05s or 2h07m."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02}m"


class WandbSink(Sink):
    """Weights & Biases. WANDB_MODE is honoured (online, offline, disabled); without a key or network the run is kept
    offline, and stderr says so. Metric names get "/" for ".", by which W&B groups panels; `step` is the x axis.

    Where its background process is lost during the run, one warning is printed, training goes on, and the end says how
    many lines are missing. A run resumed in the same run_dir continues under the same W&B id. Raises UserError without
    the wandb package, or if wandb cannot even start offline.
    """

    INIT_TIMEOUT = 20  # [s] wandb's own patience without network is 90

    def __init__(self, name: str, run_dir: str | Path, config: dict):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "--run needs the wandb package: pip install 'megacontext[wandb]', or leave --run out") from None
        self.wandb, self.lost, run_dir = wandb, 0, Path(run_dir)
        options = {"project": os.environ.get("WANDB_PROJECT", "megacontext"), "name": name, "dir": str(run_dir),
                   "config": config}
        options["id"] = run_id(run_dir)
        mode, obstacle = os.environ.get("WANDB_MODE", "online"), ""
        if mode not in ("online", "offline", "disabled"):
            raise UserError(f"WANDB_MODE={mode} is not one of online, offline, disabled")
        try:
            if mode == "online" and not wandb.login(prompt=False):
                obstacle = "no key: set WANDB_API_KEY or run `wandb login`"
            if not obstacle:
                self.run = self._start(mode, options)
        except wandb.Error as e:
            obstacle = scrubbed(next(iter(str(e).splitlines()), type(e).__name__))
            if mode != "online":
                raise UserError(f"wandb cannot start: {obstacle}; leave --run out to go without") from e
        if obstacle:
            print(f"warning: W&B cannot be used online ({obstacle}); the run is kept offline in {run_dir}",
                  file=sys.stderr, flush=True)
            self.run = self._start("offline", options)
        self.run.define_metric("*", step_metric="step")

    def _start(self, mode: str, options: dict):
        patience = float(os.environ.get("WANDB_INIT_TIMEOUT") or self.INIT_TIMEOUT)
        settings = self.wandb.Settings(init_timeout=patience, silent=True, console="off")
        return self.wandb.init(mode=mode, resume="allow" if mode == "online" else None, settings=settings, **options)

    def write(self, step: int, now: float, samples: Sequence[Sample]) -> None:
        try:
            self.run.log({"step": step, **{s.key.replace(".", "/"): s.value for s in samples}})
        except (OSError, self.wandb.Error) as e:
            if not self.lost:
                print(f"warning: W&B takes no more metrics ({scrubbed(str(e))}). Training goes on; metrics.jsonl has them", file=sys.stderr, flush=True)  # noqa: E501
            self.lost += 1

    def close(self) -> None:
        try:
            self.run.finish()
        except (OSError, self.wandb.Error) as e:
            print(f"warning: W&B could not be closed ({scrubbed(str(e))})", file=sys.stderr, flush=True)
        if self.lost:
            print(f"warning: W&B lacks {self.lost} lines that metrics.jsonl has", file=sys.stderr, flush=True)


def run_id(run_dir: str | Path) -> str:
    """What tells a run from all others, also once it is resumed: eight hex digits, kept in the file `run_id`."""
    path = Path(run_dir) / "run_id"
    if not path.exists() or not path.read_text().strip():
        write_file(output_file(path, flag=BASE_DIR), secrets.token_hex(4))
    return path.read_text().strip()
