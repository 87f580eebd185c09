"""OTLP to a real receiver over HTTP and gRPC: what arrives, what the environment decides, and that a collector in
trouble costs nothing (G1)."""

import json
import math
import os
import random
import subprocess
import sys
import time
from argparse import Namespace
from bisect import bisect_left
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")

from nanochat.common import UserError
from nanochat.telemetry import otlp as otel
from nanochat.telemetry import recorder as recorder_module
from nanochat.telemetry.otlp import otlp_sink
from nanochat.telemetry.metrics import METRICS, NATS, Metric, Sample
from nanochat.telemetry.opening import open_recorder
from nanochat.telemetry.recorder import Recorder
from nanochat.telemetry.sinks import read_metrics
from nanochat.telemetry.tracing import Trace
from otlp_receiver import Receiver, unused_port
from scripts.bench import otlp as preflight

CPU = torch.device("cpu")
protocols = pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """None of the machine's own settings; and a counter."""
    monkeypatch.setattr(recorder_module, "METRICS",
                        METRICS | {"test.events": Metric("test.events", "{event}", "counter", "A counter.")})
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def use(monkeypatch, receiver: Receiver, **more: str) -> None:
    for name, value in (receiver.environment | more).items():
        monkeypatch.setenv(name, value)


def record_run(run_dir: Path, steps: int = 3, pause: float = 0.0) -> None:
    """Gauges, counters, histograms and a trace per step."""
    with open_recorder(run_dir, config={}, total_steps=steps, labels={"mc.variant": "mc"}) as recorder:
        for step in range(1, steps + 1):
            trace = Trace("train.step", CPU, keep=True, step=step)
            with trace.span("train.forward"), trace.span("mc.step"):
                trace.event("mc.wc.snapshot", lods=torch.arange(200) % 3)
                time.sleep(0.002)
            recorder.trace(trace)
            recorder.record("train.tokens", step * 512)
            recorder.record("train.loss", torch.tensor(6.0 / step))
            recorder.record("train.loss", -0.25)  # the SDK's own histogram would drop it, as it would a negative ΔNLL
            recorder.record("val.loss", 3.0 / step, shown="lens")
            recorder.record("test.events", step, of="x")
            recorder.flush(step)
            time.sleep(pause)


@protocols
def test_what_is_recorded_arrives(protocol, tmp_path, monkeypatch, capsys):
    with Receiver(protocol) as receiver:
        use(monkeypatch, receiver)
        record_run(tmp_path / "run")
    name = f"run-{(tmp_path / 'run' / 'run_id').read_text()}"
    assert all(r["service.name"] == "megacontext" and r["service.instance.id"] == f"{name}/0"
               for r in receiver.resources())
    points = receiver.points()
    assert all(p.attributes.items() >= {"mc.run.id": name, "mc.variant": "mc"}.items() for p in points)
    assert {(p.name, p.unit, p.kind) for p in points if not p.name.startswith("telemetry.")} == {
        ("train.tokens", "{token}", "gauge"), ("train.loss", "{nat}", "histogram"), ("val.loss", "{nat}", "gauge"),
        ("test.events", "{event}", "sum")}  # fmt: skip
    of = {n: [p for p in points if p.name == n] for n in {p.name for p in points}}
    assert [p.value for p in of["train.tokens"]] == [512, 1024, 1536]
    assert [p.value for p in of["test.events"]] == [1, 3, 6], "a counter is the total so far"
    assert [(p.value, p.attributes["shown"]) for p in of["val.loss"]] == [(3, "lens"), (1.5, "lens"), (1, "lens")]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [round(p.time_ns / 1e9, 3) for p in of["train.tokens"]] == [row["time"]
                                                                       for row in rows if "train.tokens" in row][:2] + [
        round(of["train.tokens"][-1].time_ns / 1e9, 3)]  # the last row's time is that of the closing flush
    sums = 0.0
    for step, point in enumerate(of["train.loss"], 1):
        bounds, counts, total = point.value
        sums += 6.0 / step - 0.25
        assert bounds == NATS and sum(counts) == 2 * step and total == pytest.approx(sums, abs=1e-6)
        assert counts[0] == step and counts[bisect_left(NATS, 6.0)] >= 1
    spans = {s.name: s for s in receiver.spans()}
    assert len(receiver.spans()) == 9 and set(spans) == {"train.step", "train.forward", "mc.step"}
    assert len({s.trace_id for s in receiver.spans()}) == 3
    assert not spans["train.step"].parent_span_id and spans["train.forward"].parent_span_id == spans["train.step"].span_id  # noqa: E501
    assert spans["mc.step"].parent_span_id == spans["train.forward"].span_id
    assert all(s.end_time_unix_nano - s.start_time_unix_nano > 2e6
               and abs(s.start_time_unix_nano / 1e9 - time.time()) < 60 for s in receiver.spans())
    (event,) = spans["mc.step"].events
    assert event.name == "mc.wc.snapshot" and event.attributes[0].value.string_value.endswith(
        "…") and event.ByteSize() < 1000
    assert rows[-1]["telemetry.otlp.delivered"] == len(points) + 9 and rows[-1]["telemetry.otlp.lost"] == rows[-1]["telemetry.otlp.failures"] == 0  # noqa: E501
    out = capsys.readouterr().out
    assert f"OTLP: {len(points)} data points delivered to {protocol} {receiver.url}, 0 lost" in out and "9 spans delivered" in out  # noqa: E501


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(st.floats(-20, 20), st.sampled_from([*NATS, math.nan, math.inf])), max_size=8),
                max_size=6))
def test_histograms_are_the_counts_of_all_values(flushes):
    """Cumulative points against counting everything anew; a value that is not finite is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
        sink = otlp_sink("s", "i", {}, background=False)
    seen, expected = [], []
    for values in flushes:
        sink.write(1, 0.0, [Sample(METRICS["train.loss"], {}, values)])
        finite = [v for v in values if math.isfinite(v)]
        seen += finite
        if finite:
            edges = (-math.inf, *NATS, math.inf)
            expected.append(([sum(low < v <= high for v in seen) for low, high in zip(edges, edges[1:])],
                             math.fsum(seen)))
    found = [point[-1] for point in sink._signals["metrics"].queue]
    assert [counts for counts, _ in found] == [counts for counts, _ in expected]
    assert [total for _, total in found] == pytest.approx([total for _, total in expected])


def test_delta_temporality(tmp_path, monkeypatch):
    with Receiver() as receiver:
        use(monkeypatch, receiver, OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE="delta")
        record_run(tmp_path)
    assert [p.value for p in receiver.points() if p.name == "test.events"] == [1, 2, 3]
    assert [sum(p.value[1]) for p in receiver.points() if p.name == "train.loss"] == [2, 2, 2]
    assert {m.sum.aggregation_temporality for q in receiver.requests["metrics"] for r in q.resource_metrics
            for s in r.scope_metrics
            for m in s.metrics if m.name == "test.events"} == {1}  # fmt: skip


def test_the_global_generator_is_left_alone(tmp_path, monkeypatch):
    """OpenTelemetry draws span ids and waiting times from it, and its state is part of a checkpoint."""
    with Receiver() as receiver:
        use(monkeypatch, receiver)
        random.seed(5)
        before = random.getstate()
        record_run(tmp_path)
        assert random.getstate() == before and len(receiver.spans()) == 9


# ---------------------------------------------------------------------------------------------------------------------
# The environment decides


OFF = [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
       {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
       {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRICS_EXPORTER": "none",
        "OTEL_TRACES_EXPORTER": "none"}]  # fmt: skip


def test_off_and_nothing_is_imported(tmp_path):
    code = f"""
import os, sys
from nanochat.telemetry.opening import open_recorder
for settings in {OFF!r}:
    os.environ.update(settings)
    with open_recorder({str(tmp_path)!r}, config={{}}, total_steps=1) as recorder:
        assert len(recorder.sinks) == 2, settings
    for name in settings:
        del os.environ[name]
assert not [m for m in sys.modules if m.startswith(('opentelemetry', 'grpc'))]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("signal", ["metrics", "traces"])
def test_one_signal_alone(signal, tmp_path, monkeypatch):
    with Receiver() as receiver:
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT", f"{receiver.url}/anywhere/v1/{signal}")
        record_run(tmp_path)
    assert bool(receiver.points()) == (signal == "metrics") and bool(receiver.spans()) == (signal == "traces")


def test_signals_by_different_protocols(tmp_path, monkeypatch):
    with Receiver() as http, Receiver("grpc") as rpc:
        use(monkeypatch, http, OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="grpc", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=rpc.url)
        record_run(tmp_path)
    assert http.points() and not http.spans() and rpc.spans() and not rpc.points()


@protocols
def test_names_headers_and_compression_are_the_environments(protocol, tmp_path, monkeypatch):
    with Receiver(protocol) as receiver:
        use(monkeypatch, receiver, OTEL_SERVICE_NAME="mine",
            OTEL_RESOURCE_ATTRIBUTES="site=lab,service.instance.id=seven",
            OTEL_EXPORTER_OTLP_HEADERS="x-key=secret", OTEL_EXPORTER_OTLP_COMPRESSION="gzip")
        record_run(tmp_path)
    assert all((r["service.name"], r["site"], r["service.instance.id"]) == ("mine", "lab", "seven")
               for r in receiver.resources())
    assert receiver.points() and receiver.spans() and all(h["x-key"] == "secret" for h in receiver.headers)


def test_sampler_and_span_limits(tmp_path, monkeypatch):
    with Receiver() as receiver:
        use(monkeypatch, receiver, OTEL_TRACES_SAMPLER="always_off")
        record_run(tmp_path)
        assert receiver.points() and not receiver.spans()
        monkeypatch.delenv("OTEL_TRACES_SAMPLER")
        monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "8")
        record_run(tmp_path)
    assert [len(e.attributes[0].value.string_value) for s in receiver.spans() for e in s.events] == [8, 8, 8]


def test_the_export_interval(tmp_path, monkeypatch):
    with Receiver() as receiver:
        use(monkeypatch, receiver, OTEL_METRIC_EXPORT_INTERVAL="50")
        record_run(tmp_path / "often", steps=8, pause=0.05)
        often = len(receiver.requests["metrics"])
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "60000")
        record_run(tmp_path / "once", steps=8, pause=0.05)
    assert often >= 3 and len(receiver.requests["metrics"]) == often + 1


@pytest.mark.parametrize("settings, message", [
    ({"PROTOCOL": "http/json"}, "http/json for metrics is not one of http/protobuf, grpc"),
    ({"TRACES_PROTOCOL": "udp"}, "udp for traces"),
    ({"ENDPOINT": "127.0.0.1:4318"}, "127.0.0.1:4318 for metrics must begin with http://"),
    ({"TIMEOUT": "soon"}, "OTEL_EXPORTER_OTLP_TIMEOUT=soon is not a positive number"),
    ({"METRICS_TIMEOUT": "-1"}, "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT=-1"),
    ({"COMPRESSION": "zip"}, "OTEL_EXPORTER_OTLP_COMPRESSION=zip"),
    ({"/OTEL_METRIC_EXPORT_INTERVAL": "0"}, "OTEL_METRIC_EXPORT_INTERVAL=0"),
    ({"/OTEL_METRICS_EXPORTER": "console"}, "OTEL_METRICS_EXPORTER=console"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings, message, tmp_path, monkeypatch):
    for name, value in ({"ENDPOINT": "http://127.0.0.1:9"} | settings).items():
        monkeypatch.setenv(name[1:] if name.startswith("/") else f"OTEL_EXPORTER_OTLP_{name}", value)
    with pytest.raises(UserError, match=message):
        open_recorder(tmp_path, config={}, total_steps=1)


@pytest.mark.parametrize("module",
                         ["opentelemetry.sdk.resources", "opentelemetry.exporter.otlp.proto.http.metric_exporter"])
def test_package_missing(module, tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'megacontext\[otel\]'"):
        open_recorder(tmp_path, config={}, total_steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# Collectors in trouble


def twenty_steps(recorder) -> float:
    """Seconds: without a collector 0.1 on a quiet machine, more than one on a busy one."""
    begin = time.perf_counter()
    for step in range(20):
        recorder.record("train.loss", 1.0)
        recorder.flush(step)
        time.sleep(0.005)
    return time.perf_counter() - begin


@protocols
@pytest.mark.parametrize("fault", ["refused", "hang", "500", "slow"])
def test_a_collector_in_trouble_costs_no_time_and_losses_are_counted(protocol, fault, tmp_path, monkeypatch, capsys):
    with open_recorder(tmp_path / "alone", config={}, total_steps=20) as recorder:
        usual = twenty_steps(recorder)
    with Receiver(protocol, "" if fault == "refused" else fault) as receiver:
        use(monkeypatch, receiver, OTEL_METRIC_EXPORT_INTERVAL="20")
        # the real one is tried on whole runs
        monkeypatch.setattr(otel, "GRACE", 0.5 if fault != "slow" else otel.GRACE)
        if fault == "refused":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{unused_port()}")
        recorder = open_recorder(tmp_path, config={}, total_steps=20)
        assert twenty_steps(recorder) < 1 + 5 * usual, "the training loop waited"
        begin = time.perf_counter()
        recorder.close()
        assert time.perf_counter() - begin < otel.GRACE + 0.4, "the end waited"
    health = read_metrics(tmp_path / "metrics.jsonl")[-1]
    # step and time are no metrics
    sent = sum(len(json.loads(line)) - 2 for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1])
    captured = capsys.readouterr()
    if fault == "slow":
        assert health["telemetry.otlp.delivered"] == sent == len(receiver.points()) and not captured.err
        assert f"OTLP: {sent} data points delivered" in captured.out
    else:
        assert health["telemetry.otlp.lost"] == sent and health["telemetry.otlp.delivered"] == 0
        # One that hangs or is refused may be told so before the end, or be under way, or be waiting to try again.
        assert health["telemetry.otlp.failures"] > 0 or fault != "500"
        assert f"OTLP: 0 data points delivered to {protocol}" in captured.out and f"{sent} lost" in captured.out
        (warning,) = captured.err.splitlines()
        assert warning.startswith(f"warning: {protocol} http://") and "Training goes on" in warning


def test_a_collector_that_comes_back_gets_what_waited(tmp_path, monkeypatch):
    with Receiver(fault="500") as receiver:
        use(monkeypatch, receiver, OTEL_METRIC_EXPORT_INTERVAL="20")
        with open_recorder(tmp_path, config={}, total_steps=20) as recorder:
            for step in range(20):
                if step == 10:
                    assert receiver.arrived > 1 and not receiver.points()
                    receiver.fault = ""
                recorder.record("train.tokens", step)
                recorder.flush(step)
                time.sleep(0.02)
    assert [p.value for p in receiver.points() if p.name == "train.tokens"] == list(range(20))
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["telemetry.otlp.delivered"] == len(receiver.points()) and last["telemetry.otlp.lost"] == 0 < last["telemetry.otlp.failures"]  # noqa: E501


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_item_is_delivered_or_lost(data):
    """The queue's books: whatever is put before, during and after requests that succeed or fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(otel, "MOST", 10)
        patch.setattr(otel, "BATCH", 4)
        arrived, items = [], iter(range(10**6))
        put = lambda: signal.put([next(items) for _ in range(data.draw(st.integers(0, 8)))])

        def export(batch):
            put()  # the training loop goes on meanwhile
            if data.draw(st.booleans()):
                arrived.extend(batch)
                return True
            return False

        signal = otel._Signal("metrics", "", export, lambda: None)
        for _ in range(data.draw(st.integers(0, 6))):
            put()
            if data.draw(st.booleans()):
                signal.send()
            assert len(signal.queue) <= 10
        assert arrived == sorted(set(arrived)) and signal.delivered == len(arrived)
        assert signal.delivered + signal.evicted + len(signal.queue) == signal.put_count
        assert not set(arrived) & set(signal.queue)


def test_a_burst_is_sent_before_the_interval_is_over(tmp_path, monkeypatch):
    with Receiver() as receiver:
        use(monkeypatch, receiver, OTEL_METRIC_EXPORT_INTERVAL="60000")
        with open_recorder(tmp_path, config={}, total_steps=1) as recorder:
            # with what the recorder says of itself six points each: some requests, and less than evicts
            for step in range(otel.BATCH):
                recorder.record("train.tokens", step)
                recorder.flush(step)
            deadline = time.monotonic() + 10
            while not receiver.points() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert otel.BATCH <= len(receiver.points()) <= otel.MOST
    assert len([p for p in receiver.points() if p.name == "train.tokens"]) == otel.BATCH


def test_an_exporter_that_raises_does_not_end_the_thread(tmp_path, monkeypatch, capsys):
    with Receiver() as receiver:
        use(monkeypatch, receiver, OTEL_METRIC_EXPORT_INTERVAL="20")
        sink = otlp_sink("s", "i", {}, background=True)
        export, sink._signals["metrics"].export = sink._signals["metrics"].export, lambda batch: 1 / 0
        with Recorder(tmp_path, sink) as recorder:
            recorder.record("train.tokens", 1)
            recorder.flush(1)
            time.sleep(0.1)
            sink._signals["metrics"].export = export
    assert len(receiver.points()) >= 1 and "ZeroDivisionError" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The preflight


@protocols
def test_preflight_says_what_was_accepted(protocol, monkeypatch, capsys):
    with Receiver(protocol) as receiver:
        use(monkeypatch, receiver)
        preflight.run(Namespace())
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["metrics"], told["traces"]) == (2, 2) == (len(receiver.points()),
                                                           len(receiver.spans())) and 0 < told["seconds"] < 10
    assert {p.name for p in receiver.points()} == {"telemetry.preflight", "telemetry.preflight_time"}
    child, root = receiver.spans()
    assert (root.name, child.name) == ("mc.preflight", "mc.preflight.part") and child.parent_span_id == root.span_id


@pytest.mark.parametrize("fault, message", [("500", "did not accept metrics: .*did not accept traces"),
                                            ("off", "OTLP is off: set OTEL_EXPORTER_OTLP_ENDPOINT")])
def test_preflight_that_fails_is_one_line(fault, message, monkeypatch, capsys):
    with Receiver(fault=fault) as receiver:
        if fault != "off":
            use(monkeypatch, receiver)
        with pytest.raises(UserError, match=message) as refused:
            preflight.run(Namespace())
    assert "\n" not in str(refused.value) and not capsys.readouterr().out
