"""Every measurement passes through one registry and reaches every sink."""

import io
import json
import math
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mc.observe.metrics  # noqa: F401  registers MegaContext's metrics
from nanochat.common import UserError
from nanochat.telemetry.metrics import METRICS, Metric, metric_table, register
from nanochat.telemetry.opening import open_recorder
from nanochat.telemetry.recorder import Recorder
from nanochat.telemetry.sinks import ConsoleSink, Sink, WandbSink, duration, read_metrics
from wandb_file import wandb_history

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def registry():
    """Metrics of its own for every test; the real registry is put back."""
    before = dict(METRICS)
    register(
        Metric("test.last", "1", "gauge", "A gauge.", short="last"),
        Metric("test.sum", "{token}", "counter", "A counter."),
        Metric("test.mean", "{nat}", "histogram", "A histogram.", short="mean", buckets=(0.0, 2.0, 5.0)),
    )
    yield
    METRICS.clear()
    METRICS.update(before)


class Keep(Sink):
    """A sink that keeps what it is given: rows, and apart from them what the recorder says of itself."""

    def __init__(self):
        self.rows, self.own, self.closed = [], [], 0

    def write(self, step, now, samples):
        self.own.append({s.key: s.value for s in samples if s.key.startswith("telemetry.")})
        samples = [s for s in samples if not s.key.startswith("telemetry.")]
        self.rows.append((step, {s.key: s.value for s in samples}, samples))

    def close(self):
        self.closed += 1


def test_kinds_and_attributes(tmp_path):
    sink = Keep()
    with Recorder(tmp_path, sink) as r:
        for value in (1.0, 2.0, 6.0):
            for name in ("test.last", "test.sum", "test.mean"):
                r.record(name, value)
        r.record("test.mean", torch.tensor(5), lod=1, variant="a")
        r.record("test.mean", 7, variant="a", lod=1)
        r.flush(10)
        r.flush(20)  # nothing new: nothing written
        r.record("test.last", torch.tensor([[0.1]], dtype=torch.float64))
    assert sink.rows[0][:2] == (10, {"test.last": 6, "test.sum": 9, "test.mean": 3, "test.mean{lod=1,variant=a}": 6})
    assert sink.rows[0][2][0].values == [1, 2, 6] and sink.rows[0][2][0].metric.unit == "1"
    assert sink.rows[1][:2] == (20, {"test.last": 0.1}) and sink.closed == 1 and len(sink.rows) == 2
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]


def test_unregistered_metric_is_refused(tmp_path):
    for rank in (0, 1):
        with pytest.raises(KeyError, match="test.unknown.*not registered"):
            Recorder(tmp_path, rank=rank).record("test.unknown", 1.0)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        Recorder(tmp_path).record("test.last", torch.zeros(2))


def test_registry_rules():
    register(Metric("test.last", "1", "gauge", "A gauge.", short="last"))  # the same again is fine
    with pytest.raises(ValueError, match="already registered"):
        register(Metric("test.last", "s", "gauge", "Another."))
    for bad in ("Loss", "loss", "train.Loss", "train..loss", "train.loss "):
        with pytest.raises(ValueError, match="dotted lower case"):
            register(Metric(bad, "1", "gauge", ""))
    with pytest.raises(ValueError, match="kind"):
        register(Metric("test.x", "1", "meter", ""))  # type: ignore[arg-type]
    for kind, buckets in (("histogram", ()), ("histogram", (2.0, 1.0)), ("histogram", (1.0, 1.0)), ("gauge", (1.0,))):
        with pytest.raises(ValueError, match="buckets"):
            register(Metric("test.x", "1", kind, "", buckets=buckets))


def test_real_registry_is_documented():
    real = {name: m for name, m in METRICS.items() if not name.startswith("test.")}
    assert all(m.unit and m.description.endswith(".") and m.healthy and name == m.name for name, m in real.items())
    assert {m.where for m in real.values() if not (ROOT / m.where).is_file()} == set()
    assert len([line for line in metric_table() if line.startswith("| `") and "`test." not in line]) == len(real)


def test_tensors_are_fetched_once_and_not_before_the_flush(tmp_path, monkeypatch):
    fetches = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor,
                            name, lambda self, *a, _f=original, _n=name: (fetches.append(_n), _f(self, *a))[1])
    sink = Keep()
    r = Recorder(tmp_path, sink)
    running = torch.zeros((), requires_grad=True) + 0
    for i in range(5):
        running = running + 1
        r.record("test.mean", running)
        r.record("test.sum", torch.tensor(i))
    buffer = torch.tensor(3.0)
    r.record("test.last", buffer)
    buffer.zero_()  # the caller's own business
    assert fetches == []
    r.flush(1)
    assert fetches == ["tolist"]
    assert sink.rows[0][1] == {"test.mean": 3, "test.sum": 10, "test.last": 3}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_synchronized_only_by_the_flush(tmp_path):
    sink = Keep()
    r = Recorder(tmp_path, sink)
    values = torch.arange(4, device="cuda", dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for value in values.unbind():
            r.record("test.mean", value)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    r.flush(1)
    assert sink.rows[0][1] == {"test.mean": 1.5}


def test_jsonl_lines_and_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    r = Recorder(path.parent)
    r.record("test.last", math.nan)
    r.record("test.sum", math.inf)
    r.record("test.mean", 1.5)
    r.flush(1)
    row = json.loads(path.read_text())  # on disk before close: a crash loses nothing that was flushed
    assert row["test.last"] is None and row["test.sum"] is None and row["test.mean"] == 1.5 and row["step"] == 1
    assert abs(row["time"] - time.time()) < 60
    with open(path, "a") as f:
        f.write('{"step": 2, "ti')  # cut short by a crash
    for value in (10.0, 20.0):
        with Recorder(path.parent) as resumed:
            resumed.record("test.mean", value)
            resumed.flush(2)
            resumed.record("test.last", value)
            resumed.flush(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 2, 2]
    assert [(row["step"], row["test.mean"]) for row in read_metrics(path)] == [(1, 1.5), (2, 20.0)]
    assert read_metrics(path)[1]["test.last"] == 20.0


def test_unwritable_run_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics"):
        Recorder(tmp_path / "file")


def test_other_ranks_write_nothing(tmp_path):
    sink = Keep()
    with Recorder(tmp_path / "run", sink, rank=1) as r:
        r.record("test.last", 1.0)
        r.flush(1)
    assert not sink.rows and not sink.closed and not (tmp_path / "run").exists()
    assert not open_recorder(tmp_path / "run", run="x", config={}, total_steps=1, rank=1).sinks


def test_console_line(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    out = io.StringIO()
    r = Recorder(tmp_path, ConsoleSink(total_steps=1000, first_step=100, stream=out))
    for step, seconds in ((110, 60), (120, 10), (1000, 880)):  # the first ten steps compile
        now += seconds
        r.record("test.mean", 2.34567)
        r.record("test.last", 1e-7)
        r.record("test.mean", 9.0, lod=1)
        r.record("test.sum", 5)
        r.flush(step)
    assert out.getvalue().splitlines() == [
        "step  110/1000 ( 11%) | mean 2.3457 | last 1e-07 | eta 1h29m",
        "step  120/1000 ( 12%) | mean 2.3457 | last 1e-07 | eta 14m40s",
        "step 1000/1000 (100%) | mean 2.3457 | last 1e-07",
    ]


def test_console_colours_only_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert ConsoleSink(10, stream=io.StringIO()).rich is None and ConsoleSink(10, stream=Terminal()).rich is not None


def test_duration():
    assert [duration(s) for s in (0, 44.6, 59.4, 60, 185, 3599, 3600, 7620)] == ["0s", "45s", "59s", "1m00s", "3m05s",
                                                                                 "59m59s", "1h00m", "2h07m"]


@pytest.mark.parametrize("run", ["", "dummy"])
def test_wandb_off(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    with open_recorder(tmp_path, run=run, config={}, total_steps=1) as r:
        assert len(r.sinks) == 2


def test_wandb_package_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'megacontext\[wandb\]'"):
        open_recorder(tmp_path, run="x", config={}, total_steps=1)


def record_two_steps(directory):
    with open_recorder(directory, run="trial", config={"depth": 4}, total_steps=2) as r:
        for step in (1, 2):
            r.record("test.last", torch.tensor(step / 2))
            r.record("test.mean", 3.0, lod=2)
            r.flush(step)


@pytest.fixture
def no_credentials(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_wandb_offline_receives_everything(tmp_path, no_credentials, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record_two_steps(tmp_path / "run")
    rows = wandb_history(tmp_path / "run")
    assert [(row["step"], row["test/last"], row["test/mean{lod=2}"]) for row in rows] == [(1, 0.5, 3.0), (2, 1.0, 3.0)]
    assert "warning" not in capsys.readouterr().err
    jsonl = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["test.last"] for row in jsonl] == [row["test/last"] for row in rows]


@pytest.mark.parametrize("obstacle", ["no key", "no network"])
def test_wandb_falls_back_to_offline_and_says_so(tmp_path, no_credentials, monkeypatch, capsys, obstacle):
    import wandb

    if obstacle == "no network":

        def unreachable(**kwargs):
            raise wandb.errors.CommError("connection refused\nand much more")

        monkeypatch.setattr(wandb, "login", unreachable)
    record_two_steps(tmp_path / "run")
    warnings = [line for line in capsys.readouterr().err.splitlines()
                if line.startswith("warning: W&B cannot be used online")]
    assert len(warnings) == 1 and ("WANDB_API_KEY" if obstacle == "no key" else "connection refused") in warnings[0]
    assert len(wandb_history(tmp_path / "run")) == 2


def test_unknown_wandb_mode(tmp_path, no_credentials, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE=sometimes"):
        WandbSink("a", tmp_path, {})


def test_wandb_id_survives_a_resume(tmp_path, no_credentials, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    WandbSink("a", tmp_path, {}).close()
    first = (tmp_path / "run_id").read_text()
    WandbSink("a", tmp_path, {}).close()
    assert (tmp_path / "run_id").read_text() == first and len(first) == 8


def test_a_line_that_cannot_be_written_is_left_out_whole(tmp_path, capsys):
    """No space for a while: lines before and after are whole, what is lost is counted, warned of once."""
    sink, path = Keep(), tmp_path / "metrics.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Recorder(tmp_path, sink) as r:
        for step in range(1, 7):
            r.record("test.last", step)
            if step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 7, limits[1]))  # part of a line fits
            try:
                r.flush(step)
            finally:
                if step >= 4:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 5, 6]
    assert [row["telemetry.jsonl.lost"] for row in sink.own] == [0, 0, 0, 1, 2,
                                                                 2] and [s for s, _, _ in sink.rows] == list(range(1, 7))  # noqa: E501
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "Training goes on" in errors[0] and "lacks 2 lines" in errors[1]


def test_values_that_are_not_finite_are_counted(tmp_path):
    sink = Keep()
    with Recorder(tmp_path, sink) as r:
        for value in (math.nan, 1.0, math.inf):
            r.record("test.mean", value)
        r.record("test.last", 1.0)
        r.flush(8)
        r.record("test.mean", -math.inf)
        r.record("test.last", 1.0)
        r.step = 9  # where a failure is noticed
    assert [step for step, _, _ in sink.rows] == [8, 9] and [row["telemetry.not_finite"] for row in sink.own] == [2, 3]


def test_a_closed_sinks_last_words_are_on_file(tmp_path):
    class Late(Keep):
        def health(self):
            return {"test.last": 3.0 * self.closed}

    late = Late()
    with Recorder(tmp_path, late) as r:
        r.record("test.mean", 1)
        r.flush(1)
    assert [row["test.last"] for _, row, _ in late.rows] == [0]
    assert [json.loads(line)["test.last"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 3]


def test_weights_and_biases_lost_during_the_run(tmp_path, no_credentials, monkeypatch, capsys):
    """What its client raises when its background process is gone; measured by killing it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    sink = WandbSink("a", tmp_path, {})
    with Recorder(tmp_path, sink) as r:
        for step in range(1, 5):
            if step == 3:

                def gone(*args):
                    raise ConnectionResetError("Connection lost")

                monkeypatch.setattr(sink, "run", SimpleNamespace(log=gone, finish=gone))
            r.record("test.last", step)
            r.flush(step)
    assert [row["test.last"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(errors) == 3 and "Training goes on" in errors[0] and "could not be closed" in errors[1] and "lacks 2 lines" in errors[2]  # noqa: E501
