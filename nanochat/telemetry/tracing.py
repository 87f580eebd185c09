"""How long the parts of a step take, nested, on the CPU and on CUDA, without waiting for the device.

    trace = Trace("train.step", device, keep=step % 100 == 0, step=step)
    with trace.span("train.forward") as part:
        ...
        trace.event("mc.wc.snapshot", tokens=n, lods=lods_W)   # noted at the innermost open span
    seconds = part.elapsed                                     # a Reading: float(seconds) when it is wanted
    recorder.trace(trace)                                      # ends it; a kept one goes to
                                                               the sinks that draw time lines

On CUDA the times are those of the device: events in the current stream, read at the recorder's next flush. Reading one
earlier waits for that event alone.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_RUNS = 64  # of a tensor that an event keeps

Mark = float | torch.cuda.Event  # a point in time: time.perf_counter() [s], or a CUDA event


def now(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass(frozen=True, slots=True)
class Reading:
    """The time between two marks; float(reading) is in seconds, and on CUDA waits until the
    device has passed the second."""

    begin: Mark
    end: Mark

    def __float__(self) -> float:
        if isinstance(self.begin, float):
            return self.end - self.begin
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3


@dataclass(slots=True)
class Span:
    """A part of a step. events: (name, when, attributes); attributes: numbers, strings, or tensors of integers."""

    name: str
    begin: Mark
    attributes: dict
    end: Mark | None = None
    children: list["Span"] = field(default_factory=list)
    events: list[tuple[str, Mark, dict]] = field(default_factory=list)

    @property
    def elapsed(self) -> Reading:
        return Reading(self.begin, self.end)


class Trace:
    """The spans of one step under a root that is open from the start. keep: whether events are
    noted and sinks shall have it."""

    def __init__(self, name: str, device: torch.device, keep: bool = False, **attributes: str | int | float):
        self.device, self.keep = device, keep
        self.unix_ns = time.time_ns()  # the root's begin by the wall clock; all else is placed relative to it
        self.root = Span(name, now(device), attributes)
        self.spent = 0.0  # [s] that taking the times took
        self._open = [self.root]

    @contextmanager
    def span(self, name: str, /, **attributes: str | int | float) -> Iterator[Span]:
        """Time what runs inside; a child of the span around it. Left by an exception, it is not ended and
        its trace is not to be used."""
        entered = time.perf_counter()
        span = Span(name, now(self.device), attributes)
        self._open[-1].children.append(span)
        self._open.append(span)
        self.spent += time.perf_counter() - entered
        yield span
        left = time.perf_counter()
        span.end = now(self.device)
        self._open.pop()
        self.spent += time.perf_counter() - left

    def event(self, name: str, /, **attributes: str | int | float | Tensor) -> None:
        """Note something at the innermost open span, if the trace is kept. A tensor stays on
        its device until the flush."""
        if self.keep:
            noted = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in attributes.items()}
            self._open[-1].events.append((name, now(self.device), noted))

    def finish(self) -> None:
        self.root.end = now(self.device)

    def unix_time_ns(self, mark: Mark) -> int:
        """When a mark was passed, in Unix nanoseconds."""
        return self.unix_ns + round(float(Reading(self.root.begin, mark)) * 1e9)


def runs(values: Sequence[int]) -> str:
    """Integers as runs, "2*3 1*8 0*64": value*count, the first MOST_RUNS of them, then "…" where there are more."""
    found: list[list[int]] = []
    for value in values:
        if found and found[-1][0] == value:
            found[-1][1] += 1
        else:
            found.append([value, 1])
    return " ".join(f"{value}*{count}" for value, count in found[:MOST_RUNS]) + " …" * (len(found) > MOST_RUNS)
