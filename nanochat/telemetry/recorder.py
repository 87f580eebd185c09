"""The one place that every measurement passes through: a Recorder takes values and hands samples to sinks.

`record(name, value)` costs no synchronization: a tensor stays on its device until `flush(step)`, which fetches all of
them with one copy per device and hands the samples to each sink (`sinks`, `otlp`): a JSONL file always. Only rank 0
records; elsewhere the calls do nothing but check the name. `opening.open_recorder` makes the recorder of a run.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from nanochat.outputs import reason
from nanochat.telemetry.metrics import METRICS, Labelled, Metric, Sample, key_of
from nanochat.telemetry.sinks import JsonlSink, Sink
from nanochat.telemetry.tracing import Reading, Span, Trace, runs


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
        """Note one value; a tensor has one element and may be overwritten by the caller afterwards.
        A Reading is read at the flush.

        Raises KeyError for a name that is not registered, ValueError for a tensor with several elements.
        """
        entered = time.perf_counter()
        if isinstance(name, Labelled):
            name, attributes = name.name, name.attributes | attributes
        if name not in METRICS:
            raise KeyError(f"metric {name!r} is not registered: add it with nanochat.telemetry.metrics.register")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"metric {name}: one value expected, got a tensor of shape {tuple(value.shape)}")
        if not self.sinks:
            return
        if isinstance(value, Tensor):
            value = (value.detach() if value.requires_grad else value).clone()
            value = value.view(()) if value.ndim else value
        elif not isinstance(value, Reading):
            value = float(value)
        key = key_of(name, attributes) if attributes else name
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
                    print(f"warning: {type(sink).__name__} takes no metrics ({reason(e)}). Training goes on",
                          file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush what is left and close the sinks, the file last: it hears of what the others lost.
        A second call does nothing."""
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
