"""One place that every measurement passes through: a registry of metrics, and a Recorder that fans out to sinks.

`record(name, value)` costs no synchronization: a tensor stays on its device until `flush(step)`, which fetches all of them with
one copy per device and hands the samples to each sink: a JSONL file always, the console and Weights & Biases if wanted.
Several values of a metric between two flushes become one by its kind: the last (gauge), the sum (counter) or the mean
(histogram). Only rank 0 records; elsewhere the calls do nothing but check the name.

A package adds its metrics with one entry each, on import:

    register(Metric("mc.loss.wc", "{nat}", "histogram", "Mean next-token loss in the working context.", short="wc",
                    healthy="falls", where="mc/runtime.py", buckets=NATS))
"""

import errno
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TextIO

import torch
from torch import Tensor

from nanochat.common import UserError, parse_json
from nanochat.outputs import BASE_DIR, output_file, reason, write_file
from nanochat.redact import scrubbed
from nanochat.telemetry.tracing import Reading, Span, Trace, runs


@dataclass(frozen=True)
class Metric:
    """What is measured, and how to read it.

    name: dotted lower case, without the unit. unit: UCUM ("s", "By", "{token}", "{nat}", "1"). description: what it is, with
    its formula. short: label on the console line. healthy: the values or the course of a run that goes well. where: the file
    that records it. buckets: ascending upper bounds that a histogram's values are counted by.
    """

    name: str
    unit: str
    kind: Literal["gauge", "counter", "histogram"]
    description: str
    short: str = ""
    healthy: str = ""
    where: str = ""
    buckets: tuple[float, ...] = ()


def one_two_five(low: int, high: int) -> tuple[float, ...]:
    """Bounds 1, 2, 5 of every decade from 10**low to 10**high."""
    return tuple(float(f"{digit}e{power}") for power in range(low, high) for digit in (1, 2, 5)) + (float(f"1e{high}"),)


SECONDS = one_two_five(-4, 2)
NATS = (*one_two_five(-3, 0)[:-1], 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0)
DELTA_NATS = (*(-x for x in reversed(one_two_five(-3, 1))), 0.0, *one_two_five(-3, 1))
SHARES = (0.0, 0.01, 0.02, 0.05, *(round(0.1 * i, 1) for i in range(1, 10)), 0.95, 1.0)
NORMS = one_two_five(-4, 3)


METRICS: dict[str, Metric] = {}


def register(*metrics: Metric) -> None:
    """Add metrics to the registry. Raises ValueError for a malformed name, kind or buckets, or a name taken by another definition."""
    for metric in metrics:
        if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+", metric.name):
            raise ValueError(f"metric name {metric.name!r} is not dotted lower case")
        if metric.kind not in ("gauge", "counter", "histogram"):
            raise ValueError(f"metric {metric.name}: unknown kind {metric.kind!r}")
        if bool(metric.buckets) != (metric.kind == "histogram") or list(metric.buckets) != sorted(set(metric.buckets)):
            raise ValueError(f"metric {metric.name}: ascending buckets belong to a histogram, and to nothing else")
        if METRICS.setdefault(metric.name, metric) != metric:
            raise ValueError(f"metric {metric.name} is already registered differently")


TRAIN = "scripts/base_train.py"

register(
    Metric("train.loss", "{nat}", "histogram", "Next-token loss of the training batch.", short="loss",
           healthy="falls; below ln(vocabulary) from the first steps on", where=TRAIN, buckets=NATS),
    Metric("train.tokens", "{token}", "gauge", "Tokens trained on since the start of the run.", healthy="rises", where=TRAIN),
    Metric("train.flops", "{flop}", "gauge", "Floating-point operations since the start of the run, counted from shapes.",
           healthy="rises", where=TRAIN),
    Metric("train.tokens_per_second", "{token}/s", "gauge", "Training throughput since the last log line, all ranks; evaluating and saving apart.",
           short="tok/s", healthy="steady", where=TRAIN),
    Metric("train.mfu", "1", "gauge", "Share of the devices' peak FLOP/s that counted FLOPs reach, over the time of train.tokens_per_second.",
           short="mfu", healthy="steady; a drop means waiting for data, a slower device or more work", where=TRAIN),
    Metric("train.step_time", "s", "gauge", "Wall time of a step, mean since the last log line; evaluating and saving apart.",
           short="s/step", healthy="steady", where=TRAIN),
    Metric("train.data_wait", "s", "histogram", "Part of a step spent waiting for its batch.", healthy="below 5 % of train.step_time",
           where=TRAIN, buckets=SECONDS),
    Metric("train.optimizer_time", "s", "histogram", "Part of a step spent in the optimizer, on CPU.", healthy="steady",
           where=TRAIN, buckets=SECONDS),
    Metric("train.elapsed", "s", "gauge", "Wall time of all steps since the start of the run; evaluating, probing and saving apart.", healthy="rises", where=TRAIN),
    Metric("train.nonfinite", "1", "gauge", "1 when a loss was not finite, which stops the run; else 0.", healthy="0", where=TRAIN),
    Metric("train.memory", "By", "gauge", "Peak memory: of the device on CUDA, else of the process.", healthy="flat after the first steps", where=TRAIN),
    Metric("train.grad_norm", "1", "histogram", "L2 norm of the base model's gradients together, before clipping.",
           healthy="falls, then steady; no jumps", where=TRAIN, buckets=NORMS),
    Metric("optim.lr", "1", "gauge", "Multiplier on every learning rate.", short="lr", healthy="the schedule: rises, stays at 1, falls", where=TRAIN),
    Metric("optim.momentum", "1", "gauge", "Muon's momentum.", healthy="the schedule: 0.85 to 0.95", where=TRAIN),
    Metric("val.loss", "{nat}", "gauge", "Next-token loss on held-out documents.", healthy="falls", where=TRAIN),
    Metric("val.bpb", "{bit}/By", "gauge", "Bits per byte on held-out documents.", short="val bpb", healthy="falls", where=TRAIN),
    Metric("telemetry.overhead", "1", "gauge", "Time that recording, flushing and timing spans took the training thread ÷ time of the steps, since the last log line.",
           healthy="below 0.01", where=TRAIN),
    Metric("telemetry.not_finite", "{value}", "gauge", "Recorded values that were NaN or infinite since the process began; null in metrics.jsonl, left out of OTLP.",
           healthy="0", where="nanochat/telemetry/recorder.py"),
    Metric("telemetry.jsonl.lost", "{line}", "gauge", "Lines that metrics.jsonl lacks since the process began, because they could not be written.",
           healthy="0", where="nanochat/telemetry/recorder.py"),
    Metric("checkpoint.save_time", "s", "gauge", "Wall time of the last checkpoint.", healthy="steady", where=TRAIN),
)


class Labelled(str):
    """A metric's name with attributes, as one dictionary key: `labelled == "name{lod=1}"`. `Recorder.record` takes it for a name."""

    def __new__(cls, name: str, **attributes: str | int | float):
        key = super().__new__(cls, _key(name, attributes))
        key.name, key.attributes = name, attributes
        return key


@dataclass(frozen=True)
class Sample:
    """All values of one metric, under one set of attributes, since the last flush; oldest first."""

    metric: Metric
    attributes: dict[str, str | int | float]
    values: list[float]

    @property
    def key(self) -> str:
        """The name, with attributes as `name{lod=1}`."""
        return _key(self.metric.name, self.attributes)

    @property
    def value(self) -> float:
        match self.metric.kind:
            case "gauge":
                return self.values[-1]
            case "counter":
                return math.fsum(self.values)
            case _:
                return sum(self.values) / len(self.values)


def _key(name: str, attributes: dict) -> str:
    return name + ("{" + ",".join(f"{k}={v}" for k, v in sorted(attributes.items())) + "}" if attributes else "")


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


class Recorder:
    """Takes measurements and fans them out; use as a context manager, or `close` at the end.

    run_dir: metrics.jsonl is written (or continued) there. sinks: beside that file. rank: others than 0 record nothing.
    Raises UserError when run_dir cannot be written.
    """

    def __init__(self, run_dir: str | Path, *sinks: Sink, rank: int = 0):
        self.sinks: list[Sink] = [JsonlSink(Path(run_dir) / "metrics.jsonl"), *sinks] if rank == 0 else []
        self._pending: dict[str, tuple[Metric, dict, list[float | Tensor | Reading]]] = {}
        self._traces: list[Trace] = []
        self.step = 0  # what a flush at the end, or after a failure, is labelled with
        self._spent = 0.0
        self._not_finite = 0
        self._warned: set[type[Sink]] = set()

    def record(self, name: str, value: float | Tensor | Reading, **attributes: str | int | float) -> None:
        """Note one value; a tensor has one element and may be overwritten by the caller afterwards. A Reading is read at the flush.

        Raises KeyError for a name that is not registered, ValueError for a tensor with several elements.
        """
        entered = time.perf_counter()
        if isinstance(name, Labelled):
            name, attributes = name.name, name.attributes | attributes
        if name not in METRICS:
            raise KeyError(f"metric {name!r} is not registered: add it with nanochat.telemetry.recorder.register")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"metric {name}: one value expected, got a tensor of shape {tuple(value.shape)}")
        if not self.sinks:
            return
        if isinstance(value, Tensor):
            value = (value.detach() if value.requires_grad else value).clone()
            value = value.view(()) if value.ndim else value
        elif not isinstance(value, Reading):
            value = float(value)
        key = _key(name, attributes) if attributes else name
        if key not in self._pending:
            self._pending[key] = METRICS[name], attributes, []
        self._pending[key][2].append(value)
        self._spent += time.perf_counter() - entered

    def trace(self, trace: Trace) -> None:
        """End a trace; a kept one reaches the sinks that draw time lines with the next flush."""
        trace.finish()
        self._spent += trace.spent
        if trace.keep and any(sink.traces for sink in self.sinks):
            self._traces.append(trace)

    def take_spent(self) -> float:
        """Seconds that recording, flushing and the spans of traces have taken the caller since this was last asked."""
        spent, self._spent = self._spent, 0.0
        return spent

    def flush(self, step: int) -> None:
        """Hand what was recorded since the last flush to the sinks, as of `step`; nothing recorded, nothing written."""
        entered = time.perf_counter()
        self.step = step
        traces, self._traces = self._traces, []
        for trace in traces:
            _fetch_attributes(trace.root)
            for sink in self.sinks:
                sink.trace(trace)
        if self._pending:
            self._record_health(self.sinks)
            self._write(step)
        self._spent += time.perf_counter() - entered

    def _record_health(self, sinks: Sequence[Sink]) -> None:
        for sink in sinks:
            for name, value in sink.health().items():
                self.record(name, value)

    def _write(self, step: int) -> None:
        pending, self._pending = list(self._pending.values()), {}
        fetched = iter(_fetch([v for _, _, values in pending for v in values if isinstance(v, Tensor)]))
        samples = [
            Sample(metric, attributes, [next(fetched) if isinstance(v, Tensor) else float(v) for v in values])
            for metric, attributes, values in pending
        ]
        self._not_finite += sum(not math.isfinite(v) for sample in samples for v in sample.values)
        samples.append(Sample(METRICS["telemetry.not_finite"], {}, [float(self._not_finite)]))
        now = time.time()
        for sink in self.sinks:
            with self._going_on(sink):
                sink.write(step, now, samples)

    @contextmanager
    def _going_on(self, sink: Sink) -> Iterator[None]:
        """No place where metrics go (a console piped into a full disk, say) ends a training: it is said once."""
        try:
            yield
        except OSError as e:
            if type(sink) not in self._warned:
                self._warned.add(type(sink))
                with suppress(OSError):
                    print(f"warning: {type(sink).__name__} takes no metrics ({reason(e)}). Training goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush what is left and close the sinks, the file last: it hears of what the others lost. A second call does nothing."""
        self.flush(self.step)
        while self.sinks:
            sink = self.sinks.pop()
            with self._going_on(sink):
                sink.close()
            if self.sinks:
                self._record_health([sink])
                self.flush(self.step)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _fetch(tensors: list[Tensor]) -> list[float]:
    """Values of 0-d tensors, in order, with one copy per device. float64 keeps its precision on the CPU alone."""
    places: dict[torch.device, dict[torch.dtype, list[int]]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, {}).setdefault(tensor.dtype, []).append(i)
    values: list[float] = [0.0] * len(tensors)
    for device, by_dtype in places.items():
        wide = torch.float64 if device.type == "cpu" else torch.float32
        joined = torch.cat([torch.stack([tensors[i] for i in own]).to(wide) for own in by_dtype.values()])
        for i, value in zip(chain.from_iterable(by_dtype.values()), joined.tolist()):
            values[i] = value
    return values


def _fetch_attributes(span: Span) -> None:
    """Tensors among the attributes of a span's events, and of those below it, become numbers or `runs`."""
    for _, _, attributes in span.events:
        for key, value in attributes.items():
            if isinstance(value, Tensor):
                attributes[key] = value.item() if value.numel() == 1 else runs(value.flatten().tolist())
    for child in span.children:
        _fetch_attributes(child)


class JsonlSink(Sink):
    """One JSON object per flush: {"step": n, "time": Unix seconds, metric: value, ...}; a value that is not finite is null.

    An existing file is continued; a last line cut short by a crash is removed first. A line that cannot be written during the run
    (no space left) is left out whole and counted; one warning is printed, training goes on, and later lines are tried again.
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
                print(f"warning: cannot write metrics to {self.path}: {e.strerror}. Training goes on; lines that are lost are counted", file=sys.stderr, flush=True)
            self.lost += 1
            self.file.truncate(whole)
            self.file.seek(whole)

    def health(self) -> dict[str, float]:
        return {"telemetry.jsonl.lost": self.lost}

    def close(self) -> None:
        self.file.close()
        if self.lost:
            print(f"warning: {self.path} lacks {self.lost} lines that could not be written", file=sys.stderr, flush=True)


def _drop_torn_line(path: Path) -> None:
    """Said on stderr: what is left of the last step that was logged before a crash goes."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
            print(f"note: the last line of {path} was cut off and is removed", file=sys.stderr, flush=True)


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics file, one per step in order. Where a resumed run repeated a step, or a step was flushed twice,
    later values win. Lines that are no row (torn when a run was killed, blank, foreign) are counted on stderr and left out; UserError
    where there are no others, OSError where there is no file."""
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
        print(f"warning: {path}: {len(strange)} of {len(lines)} lines are no rows of metrics, the first is {strange[0]}; they are left out", file=sys.stderr, flush=True)
    return [rows[step] for step in sorted(rows)]


def checked_row(row: object) -> dict[str, int | float | None]:
    """A line of metrics.jsonl: {"step": n, "time": s, metric: value, …}. What is not finite is None, as the recorder writes it; ValueError for
    another thing than an object with a step and a time, and for a value that is no number."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or type(row.get("time")) not in (int, float) or not math.isfinite(row["time"]):
        raise ValueError("not an object with a step and a time")
    if other := [name for name, x in row.items() if not (x is None or type(x) in (int, float) and (type(x) is float or abs(x) < 2**63))]:
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
        parts = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps} ({step / max(self.total_steps, 1):4.0%})"]
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
    """Weights & Biases. WANDB_MODE is honoured (online, offline, disabled); without a key or network the run is kept offline,
    and stderr says so. Metric names get "/" for ".", by which W&B groups panels; `step` is the x axis.

    Where its background process is lost during the run, one warning is printed, training goes on, and the end says how many lines are missing.
    A run resumed in the same run_dir continues under the same W&B id. Raises UserError without the wandb package, or if wandb
    cannot even start offline.
    """

    INIT_TIMEOUT = 20  # [s] wandb's own patience without network is 90

    def __init__(self, name: str, run_dir: str | Path, config: dict):
        try:
            import wandb
        except ImportError:
            raise UserError("--run needs the wandb package: pip install 'megacontext[wandb]', or leave --run out") from None
        self.wandb, self.lost, run_dir = wandb, 0, Path(run_dir)
        options = {"project": os.environ.get("WANDB_PROJECT", "megacontext"), "name": name, "dir": str(run_dir), "config": config}
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
            print(f"warning: W&B cannot be used online ({obstacle}); the run is kept offline in {run_dir}", file=sys.stderr, flush=True)
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
                print(f"warning: W&B takes no more metrics ({scrubbed(str(e))}). Training goes on; metrics.jsonl has them", file=sys.stderr, flush=True)
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


def open_recorder(run_dir: str | Path, *, run: str = "", config: dict, total_steps: int, first_step: int = 0, rank: int = 0,
                  labels: dict[str, str] | None = None) -> Recorder:
    """The recorder of a training run: JSONL, console, W&B unless `run` is empty or "dummy", and OTLP where the environment names an endpoint.

    run_dir: see Recorder. config: what W&B shows as the run's configuration. labels: attributes of all that goes out by OTLP; mc.run.id,
    the directory's name and the run's id, comes with them. Raises UserError as the sinks do.
    """
    from nanochat.telemetry.otlp import otlp_sink  # not above: it needs this module

    if rank != 0:
        return Recorder(run_dir, rank=rank)
    own_id = f"{Path(run_dir).name}-{run_id(run_dir)}"
    otlp = otlp_sink("megacontext", f"{own_id}/{rank}", {"mc.run.id": own_id, **(labels or {})})
    wandb_sink = [WandbSink(run, run_dir, config)] if run not in ("", "dummy") else []
    return Recorder(run_dir, ConsoleSink(total_steps, first_step), *wandb_sink, *([otlp] if otlp else []))


def metric_table() -> Iterator[str]:
    """Lines of a Markdown table of all registered metrics, for the documentation."""
    yield "| Metric | Unit | Kind | Meaning | Healthy | Recorded in |"
    yield "|---|---|---|---|---|---|"
    for m in sorted(METRICS.values(), key=lambda m: m.name):
        kind = m.kind + (f", {len(m.buckets)} bounds from {m.buckets[0]:g} to {m.buckets[-1]:g}" if m.buckets else "")
        yield f"| `{m.name}` | `{m.unit}` | {kind} | {m.description} | {m.healthy} | `{m.where}` |".replace("<", "&lt;")
