"""OTLP: metrics and traces to a collector, by a thread of its own, so that training never waits for one.

    sink = otlp_sink("megacontext", instance="d6-1a2b3c4d/0", labels={"mc.run.id": "d6-1a2b3c4d"})
      # None: nothing is asked for

The standard variables decide. Off unless OTEL_EXPORTER_OTLP_ENDPOINT, or that of one signal
(OTEL_EXPORTER_OTLP_METRICS_ENDPOINT, …_TRACES_ENDPOINT), is set; OTEL_EXPORTER_OTLP_PROTOCOL is http/protobuf or grpc.
OpenTelemetry's packages (extra `otel`) are imported only then. Its exporters do the sending; aggregation is done here,
because the SDK's histogram drops negative values and ΔNLL can be negative. Cumulative by default: a collector that was
away for a while lacks some points of the curves, but no sum.

An endpoint's user and password go to the collector as a header, and into no message (`nanochat.redact`).

Every flush becomes points with its own time, kept in a bounded queue until the thread sends them. What is not accepted
is sent again with what follows; when the queue is full the oldest go first, and are counted.
"""

import base64
import importlib
import logging
import math
import os
import random
import sys
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from nanochat.common import UserError
from nanochat.redact import redacted, scrubbed, userinfo
from nanochat.telemetry.metrics import SECONDS, Metric, Sample, register
from nanochat.telemetry.sinks import Sink
from nanochat.telemetry.tracing import Span, Trace

INTERVAL_MS = 5000  # between exports, unless OTEL_METRIC_EXPORT_INTERVAL says otherwise
GRACE = 2.5  # [s] that the end of a run waits for the last export
BATCH, MOST = 2048, 16384  # points or spans of one request, and that wait at most
PROTOCOLS = ("http/protobuf", "grpc")
HERE = "nanochat/telemetry/otlp.py"

register(
    Metric("telemetry.otlp.delivered", "{item}", "gauge",
           "Data points and spans that a collector has accepted since the process began.",
           healthy="rises", where=HERE),
    Metric("telemetry.otlp.lost", "{item}", "gauge",
           "Data points and spans given up since the process began: the queue was full, or the run ended.",
           healthy="0", where=HERE),
    Metric("telemetry.otlp.failures", "{request}", "gauge",
           "Export requests since the process began that no collector accepted; they are repeated.",
           healthy="0", where=HERE),
    Metric("telemetry.preflight", "1", "gauge", "1, sent by a preflight.", healthy="1", where="scripts/bench/otlp.py"),
    Metric("telemetry.preflight_time", "s", "histogram",
           "Time that a collector took to accept a preflight's first request of each signal.",
           healthy="below 0.5", where="scripts/bench/otlp.py", buckets=SECONDS),
)


def otlp_sink(service: str, instance: str, labels: dict[str, str], background: bool = True) -> "OtlpSink | None":
    """The sink that the environment asks for, or None. service, instance: the resource's name and instance id, unless
    the environment names others. labels: attributes of every data point and of every trace's root. background: send
    from a thread, every few seconds.

    Raises UserError for settings that cannot work, and without the packages.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    signals = [signal for signal in ("metrics", "traces") if _endpoint(signal) and _wanted(signal)]
    return OtlpSink(signals, service, instance, labels, background) if signals else None


def _setting(signal: str, name: str) -> str:
    """A signal's own variable, else the one for all signals."""
    return os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}") or os.environ.get(
        f"OTEL_EXPORTER_OTLP_{name}", "")


def _endpoint(signal: str) -> str:
    return _setting(signal, "ENDPOINT").strip()


def _login(signal: str) -> dict:
    """What an exporter by gRPC needs to be told of an endpoint with user and password; the
    one by HTTP reads them itself."""
    login, endpoint = userinfo(_endpoint(signal))
    if not login:
        return {}
    from opentelemetry.util.re import parse_env_headers

    headers = parse_env_headers(_setting(signal, "HEADERS"), liberal=True)
    return {"endpoint": endpoint,
            "headers": headers | {"authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}}


def _wanted(signal: str) -> bool:
    name = f"OTEL_{signal.upper()}_EXPORTER"
    chosen = os.environ.get(name) or "otlp"
    if chosen not in ("otlp", "none"):
        raise UserError(f"{name}={chosen}, but only otlp and none are to be had")
    return chosen == "otlp"


def _protocol(signal: str) -> str:
    protocol = _setting(signal, "PROTOCOL") or PROTOCOLS[0]
    if protocol not in PROTOCOLS:
        raise UserError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} for {signal} is not one of {', '.join(PROTOCOLS)}")
    if protocol == PROTOCOLS[0] and not _endpoint(signal).startswith(("http://", "https://")):
        raise UserError(f"the OTLP endpoint {redacted(_endpoint(signal))} for {signal} must begin with http:// or "
                        "https://")
    compression = _setting(signal, "COMPRESSION").strip().lower()
    if compression not in ("", "none", "gzip", "deflate"):
        raise UserError(f"OTEL_EXPORTER_OTLP_COMPRESSION={compression} for {signal} is not one of none, gzip, deflate")
    return protocol


def _number(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{name}={text} is not a positive number")
    return value


class _Reason(logging.Handler):
    """Keeps the first complaint of OpenTelemetry since it was last cleared; it would print every one, with the headers
    and addresses it is about."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.text = ""
        logger = logging.getLogger("opentelemetry")
        logger.handlers, logger.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or scrubbed(" ".join(record.getMessage().split()))[:300]


class _Signal:
    """What waits to be sent of one kind. export: sends a list of items, and says whether they were accepted."""

    def __init__(self, name: str, url: str, export: Callable[[list], bool], shutdown: Callable[[], None]):
        self.name, self.url, self.export, self.shutdown = name, url, export, shutdown
        self.queue: deque = deque()
        self.put_count = self.delivered = self.evicted = self.failures = 0
        self.lock = threading.Lock()  # the thread takes from the queue what the training loop may evict

    def put(self, items: Sequence) -> None:
        with self.lock:
            self.queue.extend(items)
            self.put_count += len(items)
            while len(self.queue) > MOST:
                self.queue.popleft()
                self.evicted += 1

    def send(self) -> bool:
        """Send what waits, until all of it is accepted or one request is not."""
        while True:
            with self.lock:
                batch = list(islice(self.queue, BATCH))
                evicted = self.evicted
            if not batch:
                return True
            accepted = self.export(batch)
            with self.lock:
                if not accepted:
                    self.failures += 1
                    return False
                self.delivered += len(batch)
                already_gone = min(self.evicted - evicted, len(batch))
                self.evicted -= already_gone  # given up while they were on their way, but they arrived
                for _ in range(len(batch) - already_gone):
                    self.queue.popleft()


class OtlpSink(Sink):
    """See the module. Points and spans wait in one queue per signal; `deliver` sends them, from the thread
    or, without one, when called."""

    def __init__(self, signals: Sequence[str], service: str, instance: str, labels: dict[str, str], background: bool):
        self.labels = dict(labels)
        self.start_ns = time.time_ns()
        self.delta = os.environ.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
                                    "").lower() in ("delta", "lowmemory")
        self.interval = _number("OTEL_METRIC_EXPORT_INTERVAL", INTERVAL_MS) / 1e3
        self.reason = _Reason()
        self._totals: dict[str, tuple[list[int], float]] = {}  # by key: values per bucket, sum
        self._signals: dict[str, _Signal] = {}
        try:
            resource = _resource(service, instance)
            for signal in signals:
                self._signals[signal] = self._open(signal, resource)
            if "traces" in self._signals:
                self._tracer = _tracer(resource, self._signals["traces"])
        except ImportError as e:
            raise UserError(f"an OTLP endpoint is set, but the package of {e.name} is missing: pip install "
                            "'megacontext[otel]', "
                            f"or unset OTEL_EXPORTER_OTLP_ENDPOINT") from None
        if self.reason.text:  # of a setting that OpenTelemetry passes over
            print(f"warning: {self.reason.text}", file=sys.stderr, flush=True)
        self.traces = "traces" in self._signals
        self._warned = False
        self._stop, self._wake = threading.Event(), threading.Event()
        _keep_random_apart()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True) if background else None
        if self._thread:
            self._thread.start()

    def _open(self, signal: str, resource) -> _Signal:
        protocol, timeout = _protocol(signal), f"OTEL_EXPORTER_OTLP_{signal.upper()}_TIMEOUT"
        _number(timeout if os.environ.get(timeout) else "OTEL_EXPORTER_OTLP_TIMEOUT", 10)
        package = f"opentelemetry.exporter.otlp.proto.{protocol.partition('/')[0]}"
        options = _login(signal) if protocol == "grpc" else {}
        if signal == "traces":
            exporter = importlib.import_module(f"{package}.trace_exporter").OTLPSpanExporter(**options)
            pack = list
        else:
            exporter = importlib.import_module(f"{package}.metric_exporter").OTLPMetricExporter(**options)
            pack = _packer(resource, self.delta)
        return _Signal(signal,
                       f"{protocol} {redacted(_endpoint(signal))}", lambda items: exporter.export(pack(items)).name
                       == "SUCCESS", exporter.shutdown)

    # -- what the recorder calls; nothing here waits for a collector
    # --------------------------------------------------------

    def write(self, step: int, now: float, samples: Sequence[Sample]) -> None:
        if "metrics" not in self._signals:
            return
        points, time_ns = [], round(now * 1e9)
        for sample in samples:
            values = [v for v in sample.values if math.isfinite(v)]
            if values:
                points.append((sample.metric, {**self.labels, **sample.attributes}, self.start_ns, time_ns,
                               self._aggregate(sample, values)))
        self._put("metrics", points)
        if self.delta:
            self._totals.clear()
            self.start_ns = time_ns

    def _aggregate(self, sample: Sample, values: list[float]) -> float | tuple[list[int], float]:
        """A gauge's value, a counter's total, or a histogram's (values per bucket, sum)."""
        metric = sample.metric
        if metric.kind == "gauge":
            return values[-1]
        counts, total = self._totals.get(sample.key, ([0] * (len(metric.buckets) + 1), 0.0))
        if metric.kind == "histogram":
            counts = counts.copy()
            for value in values:
                counts[bisect_left(metric.buckets, value)] += 1  # a bound belongs to the bucket below it
        self._totals[sample.key] = counts, total + math.fsum(values)
        return self._totals[sample.key] if metric.kind == "histogram" else self._totals[sample.key][1]

    def trace(self, trace: Trace) -> None:
        if self.traces:
            spans = []
            self._tracer(trace, self.labels, spans)
            self._put("traces", spans)

    def _put(self, signal: str, items: list) -> None:
        self._signals[signal].put(items)
        if len(self._signals[signal].queue) >= BATCH:
            self._wake.set()

    def health(self) -> dict[str, float]:
        signals = self._signals.values()
        return {"telemetry.otlp.delivered": sum(s.delivered for s in signals),
                "telemetry.otlp.lost": sum(s.evicted for s in signals),
                "telemetry.otlp.failures": sum(s.failures for s in signals)}

    def accepted(self) -> dict[str, int]:
        """Data points ("metrics") and spans ("traces") that a collector has accepted."""
        return {name: signal.delivered for name, signal in self._signals.items()}

    def close(self) -> None:
        """Send what is left within GRACE seconds, give up the rest, and say how it went."""
        self._stop.set()
        self._wake.set()
        if self._thread:
            self._thread.join(GRACE)
            if self._thread.is_alive():
                self._warn([f"{signal.url} has not taken all {signal.name} {GRACE} s after the end"
                            for signal in self._signals.values()])
        for signal in self._signals.values():
            signal.shutdown()
            with signal.lock:
                signal.evicted = signal.put_count - signal.delivered
                signal.queue.clear()
            what = "data points" if signal.name == "metrics" else "spans"
            print(f"OTLP: {signal.delivered} {what} delivered to {signal.url}, {signal.evicted} lost", flush=True)

    def _warn(self, problems: Iterable[str]) -> None:
        """The first trouble of a run is told; the end tells what was lost."""
        if not self._warned:
            self._warned = True
            print(f"warning: {'; '.join(problems)}. Training goes on; what is lost is counted", file=sys.stderr,
                  flush=True)

    # -- sending ------------------------------------------------------------------------------------------------------------  # noqa: E501

    def deliver(self) -> dict[str, str]:
        """Send what waits. What went wrong, by signal."""
        problems = {}
        for signal in self._signals.values():
            self.reason.text = ""
            try:
                accepted = signal.send()
            # of a third party's exporter: it must not end the thread, and is reported like any failure
            except Exception as e:
                accepted, self.reason.text = False, scrubbed(f"{type(e).__name__}: {e}")
                signal.failures += 1
            if not accepted:
                problems[signal.name] = (f"{signal.url} did not accept {signal.name}: "
                                         f"{self.reason.text or 'no reason given'}")
        return problems

    def _run(self) -> None:
        while True:
            self._wake.wait(self.interval)
            self._wake.clear()
            last = self._stop.is_set()  # asked before sending: what came before the end is in the queue now
            problems = self.deliver()
            if problems:
                self._warn(problems.values())
            if last:
                return
            if problems:
                self._stop.wait(self.interval)  # a full queue is no reason to press a collector that is in trouble


# ---------------------------------------------------------------------------------------------------------------------
# OpenTelemetry's types


def _resource(service: str, instance: str):
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own = Resource({"service.name": service, "service.instance.id": instance})
    # OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES win
    return Resource.create().merge(own).merge(OTELResourceDetector().detect())


def _packer(resource, delta: bool) -> Callable[[list], object]:
    """Turns points into what a metric exporter takes, one metric per name."""
    from opentelemetry.sdk.metrics import export as otel
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    temporality = otel.AggregationTemporality.DELTA if delta else otel.AggregationTemporality.CUMULATIVE
    scope = InstrumentationScope("nanochat.telemetry.recorder")

    def number(attributes, start_ns, time_ns, value):
        return otel.NumberDataPoint(attributes, start_ns, time_ns, value)

    def histogram(metric, attributes, start_ns, time_ns, totals):
        counts, total = totals
        return otel.HistogramDataPoint(attributes, start_ns, time_ns, sum(counts), total, counts, metric.buckets, None,
                                       None)

    def pack(points: list):
        by_name: dict[str, tuple[Metric, list]] = {}
        for metric, *point in points:
            made = histogram(metric, *point) if metric.kind == "histogram" else number(*point)
            by_name.setdefault(metric.name, (metric, []))[1].append(made)
        metrics = []
        for metric, made in by_name.values():
            match metric.kind:
                case "gauge":
                    data = otel.Gauge(made)
                case "counter":
                    data = otel.Sum(made, temporality, is_monotonic=True)
                case _:
                    data = otel.Histogram(made, temporality)
            metrics.append(otel.Metric(metric.name, metric.description, metric.unit, data))
        return otel.MetricsData([otel.ResourceMetrics(resource, [otel.ScopeMetrics(scope, metrics, "")], "")])

    return pack


def _tracer(resource, signal: _Signal) -> Callable[[Trace, dict, list], None]:
    """Appends a trace's spans as the SDK makes them, by its sampler and limits
    (OTEL_TRACES_SAMPLER, OTEL_SPAN_*_LIMIT)."""
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import set_span_in_context

    ended: list = []

    class Collect(SpanProcessor):
        def on_end(self, span) -> None:
            ended.append(span)

    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(Collect())
    tracer = provider.get_tracer("nanochat.telemetry.recorder")

    def emit(trace: Trace, span: Span, attributes: dict, context) -> None:
        made = tracer.start_span(span.name, context, attributes=attributes, start_time=trace.unix_time_ns(span.begin))
        for name, when, noted in span.events:
            made.add_event(name, noted, trace.unix_time_ns(when))
        for child in span.children:
            emit(trace, child, child.attributes, set_span_in_context(made))
        made.end(trace.unix_time_ns(span.end))

    def spans(trace: Trace, labels: dict, out: list) -> None:
        emit(trace, trace.root, {**labels, **trace.root.attributes}, Context())
        out.extend(ended)
        ended.clear()

    return spans


def _keep_random_apart() -> None:
    """OpenTelemetry draws ids and waiting times from Python's global generator, whose state belongs to the training
    run: give it one of its own."""
    own = random.Random()
    for name, module in list(sys.modules.items()):
        if name.startswith("opentelemetry.") and getattr(module, "random", None) is random:
            module.random = own
