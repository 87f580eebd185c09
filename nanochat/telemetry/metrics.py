"""What can be measured: a registry of metrics, and samples of them.

A package adds its metrics with one entry each, on import:

    register(Metric("mc.loss.wc", "{nat}", "histogram", "Mean next-token loss in the working context.", short="wc",
                    healthy="falls", where="mc/runtime.py", buckets=NATS))

Several values of a metric between two flushes of the recorder become one by its kind: the last (gauge), the sum
(counter) or the mean (histogram).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """What is measured, and how to read it.

    name: dotted lower case, without the unit. unit: UCUM ("s", "By", "{token}", "{nat}", "1"). description: what it is,
    with its formula. short: label on the console line. healthy: the values or the course of a run that goes well.
    where: the file that records it. buckets: ascending upper bounds that a histogram's values are counted by.
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
    """Add metrics to the registry. Raises ValueError for a malformed name, kind or buckets, or a name
    taken by another definition."""
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
    Metric("train.tokens", "{token}", "gauge", "Tokens trained on since the start of the run.", healthy="rises",
           where=TRAIN),
    Metric("train.flops", "{flop}", "gauge",
           "Floating-point operations since the start of the run, counted from shapes.",
           healthy="rises", where=TRAIN),
    Metric("train.tokens_per_second", "{token}/s", "gauge",
           "Training throughput since the last log line, all ranks; evaluating and saving apart.",
           short="tok/s", healthy="steady", where=TRAIN),
    Metric("train.mfu", "1", "gauge", "Share of the devices' peak FLOP/s that counted FLOPs reach, over the time of "
                                      "train.tokens_per_second.",
           short="mfu", healthy="steady; a drop means waiting for data, a slower device or more work", where=TRAIN),
    Metric("train.step_time", "s", "gauge",
           "Wall time of a step, mean since the last log line; evaluating and saving apart.",
           short="s/step", healthy="steady", where=TRAIN),
    Metric("train.data_wait", "s", "histogram", "Part of a step spent waiting for its batch.",
           healthy="below 5 % of train.step_time",
           where=TRAIN, buckets=SECONDS),
    Metric("train.optimizer_time", "s", "histogram", "Part of a step spent in the optimizer, on CPU.", healthy="steady",
           where=TRAIN, buckets=SECONDS),
    Metric("train.elapsed", "s", "gauge", "Wall time of all steps since the start of the run; evaluating, probing and "
                                          "saving apart.", healthy="rises", where=TRAIN),
    Metric("train.nonfinite", "1", "gauge", "1 when a loss was not finite, which stops the run; else 0.", healthy="0",
           where=TRAIN),
    Metric("train.memory", "By", "gauge", "Peak memory: of the device on CUDA, else of the process.",
           healthy="flat after the first steps", where=TRAIN),
    Metric("train.grad_norm", "1", "histogram", "L2 norm of the base model's gradients together, before clipping.",
           healthy="falls, then steady; no jumps", where=TRAIN, buckets=NORMS),
    Metric("optim.lr", "1", "gauge", "Multiplier on every learning rate.", short="lr",
           healthy="the schedule: rises, stays at 1, falls", where=TRAIN),
    Metric("optim.momentum", "1", "gauge", "Muon's momentum.", healthy="the schedule: 0.85 to 0.95", where=TRAIN),
    Metric("val.loss", "{nat}", "gauge", "Next-token loss on held-out documents.", healthy="falls", where=TRAIN),
    Metric("val.bpb", "{bit}/By", "gauge", "Bits per byte on held-out documents.", short="val bpb", healthy="falls",
           where=TRAIN),
    Metric("telemetry.overhead", "1", "gauge",
           "Time that recording, flushing and timing spans took the training thread ÷ time of the steps, since the "
           "last log line.",
           healthy="below 0.01", where=TRAIN),
    Metric("telemetry.not_finite", "{value}", "gauge",
           "Recorded values that were NaN or infinite since the process began; null in metrics.jsonl, left out of OTLP.",  # noqa: E501
           healthy="0", where="nanochat/telemetry/recorder.py"),
    Metric("telemetry.jsonl.lost", "{line}", "gauge",
           "Lines that metrics.jsonl lacks since the process began, because they could not be written.",
           healthy="0", where="nanochat/telemetry/sinks.py"),
    Metric("checkpoint.save_time", "s", "gauge", "Wall time of the last checkpoint.", healthy="steady", where=TRAIN),
)


class Labelled(str):
    """A metric's name with attributes, as one dictionary key: `labelled == "name{lod=1}"`.
    `Recorder.record` takes it for a name."""

    def __new__(cls, name: str, **attributes: str | int | float):
        key = super().__new__(cls, key_of(name, attributes))
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
        return key_of(self.metric.name, self.attributes)

    @property
    def value(self) -> float:
        match self.metric.kind:
            case "gauge":
                return self.values[-1]
            case "counter":
                return math.fsum(self.values)
            case _:
                return sum(self.values) / len(self.values)


def key_of(name: str, attributes: dict) -> str:
    """A metric's name, with attributes as `name{lod=1}`."""
    return name + ("{" + ",".join(f"{k}={v}" for k, v in sorted(attributes.items())) + "}" if attributes else "")


def metric_table() -> Iterator[str]:
    """Lines of a Markdown table of all registered metrics, for the documentation."""
    yield "| Metric | Unit | Kind | Meaning | Healthy | Recorded in |"
    yield "|---|---|---|---|---|---|"
    for m in sorted(METRICS.values(), key=lambda m: m.name):
        kind = m.kind + (f", {len(m.buckets)} bounds from {m.buckets[0]:g} to {m.buckets[-1]:g}" if m.buckets else "")
        yield f"| `{m.name}` | `{m.unit}` | {kind} | {m.description} | {m.healthy} | `{m.where}` |".replace("<", "&lt;")
