"""Parts of a step, nested, with the times they really took, on the CPU and on CUDA."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.telemetry.recorder import Recorder
from nanochat.telemetry.sinks import Sink
from nanochat.telemetry.tracing import MOST_RUNS, Trace, now, runs
from tiny_mc import step, tiny_base, tiny_batch, tiny_mc

CPU = torch.device("cpu")
PARTS = ["mc.lm.forward", "mc.tree.build", "mc.lens.score", "mc.focus.apply", "mc.wc.forward"]


class Keep(Sink):
    def __init__(self, traces=True):
        self.traces, self.kept, self.rows = traces, [], []

    def write(self, step, now, samples):
        self.rows.append({s.key: s.value for s in samples if not s.key.startswith("telemetry.")})

    def trace(self, trace):
        self.kept.append(trace)


def test_spans_nest_and_last_as_long_as_what_they_hold():
    trace = Trace("root", CPU, step=3)
    with trace.span("outer", part="a") as outer:
        time.sleep(0.02)
        with trace.span("inner") as inner:
            time.sleep(0.01)
    with trace.span("next"):
        pass
    trace.finish()
    assert [s.name for s in trace.root.children] == ["outer", "next"] and [s.name for s in outer.children] == ["inner"]
    assert trace.root.attributes == {"step": 3} and outer.attributes == {"part": "a"}
    assert 0.01 <= float(inner.elapsed) <= float(outer.elapsed) - 0.02 and float(outer.elapsed) <= float(trace.root.elapsed) < 0.5  # noqa: E501
    assert abs(trace.unix_time_ns(trace.root.end) - time.time_ns()) < 0.1e9
    assert trace.unix_time_ns(inner.begin) - trace.unix_time_ns(outer.begin) >= 0.02e9
    assert 0 < trace.spent < 0.01


def test_events_are_noted_in_kept_traces_alone_and_fetched_at_the_flush(tmp_path):
    sink = Keep()
    with Recorder(tmp_path, sink) as recorder:
        for keep in (False, True):
            trace = Trace("root", CPU, keep=keep)
            lods = torch.tensor([2, 2, 1, 0, 0, 0])
            with trace.span("part"):
                trace.event("seen", lods=lods, n=torch.tensor(6), name="x")
            lods.zero_()  # the caller's own business
            recorder.trace(trace)
        assert not sink.kept
        recorder.flush(1)
        (kept,) = sink.kept
        ((name, _, attributes),) = kept.root.children[0].events
        assert (name, attributes) == ("seen", {"lods": "2*2 1*1 0*3", "n": 6, "name": "x"})
        assert not sink.rows, "a trace is no sample"
    unread = Keep(traces=False)
    with Recorder(tmp_path, unread) as recorder:
        recorder.trace(Trace("root", CPU, keep=True))
    assert not unread.kept


@given(st.lists(st.integers(-1, 3), max_size=400))
def test_runs_keep_a_bounded_beginning(values):
    text = runs(values)
    assert len(text) <= MOST_RUNS * 8 + 2
    kept = [int(v) for run in text.removesuffix(" …").split() for v in [run.split("*")[0]] * int(run.split("*")[1])]
    assert kept == values[: len(kept)] and (len(kept) == len(values)) == (not text.endswith("…"))
    assert all(a.split("*")[0] != b.split("*")[0] for a, b in zip(text.split(), text.removesuffix(" …").split()[1:]))


def test_a_reading_is_recorded_like_a_number(tmp_path):
    sink = Keep()
    with Recorder(tmp_path, sink) as recorder:
        trace = Trace("root", CPU)
        with trace.span("part") as part:
            time.sleep(0.01)
        recorder.record("train.data_wait", part.elapsed)
    assert sink.rows == [{"train.data_wait": float(part.elapsed)}] and float(part.elapsed) >= 0.01


def test_what_the_recorder_takes_is_accounted(tmp_path, monkeypatch):
    clock = iter(range(1000))
    with Recorder(tmp_path) as recorder:
        trace = Trace("root", CPU)
        monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
        recorder.record("train.mfu", 0.5)  # read at its beginning and its end: one second
        recorder.flush(1)  # the same; inside it one value is recorded: three reads more, and its second
        with trace.span("part"):  # begin: read, taken, read; end: read, taken, read
            pass
        recorder.trace(trace)
        monkeypatch.undo()
        assert recorder.take_spent() == 1 + 3 + 1 + 2 + 2 and recorder.take_spent() == 0


def test_a_training_step_is_traced_part_by_part():
    gpt = tiny_base()
    mc = tiny_mc(gpt)
    trace = Trace("train.step", CPU, keep=True)
    result = mc.training_step(gpt, tiny_batch(), 0, trace)
    trace.finish()
    (root,) = trace.root.children
    assert root.name == "mc.step" and [s.name for s in root.children] == [*PARTS, "mc.lens.teach"]
    assert all(float(s.elapsed) > 0 for s in root.children)
    assert sum(float(s.elapsed) for s in root.children) < float(root.elapsed)
    marks = [m for s in root.children for m in (s.begin, s.end)]
    assert marks == sorted(marks) and root.begin <= marks[0] and marks[-1] <= root.end
    times = [float(result.metrics[f"mc.time.{part}"]) for part in ("lm", "tree", "score", "focus", "wc", "lens")]
    assert times == [float(s.elapsed) for s in root.children]
    ((name, _, snapshot),) = root.events
    used = result.primary.used_B[0]
    assert name == "mc.wc.snapshot" and snapshot["tokens"] == 56
    lods = snapshot["lods"]
    assert torch.equal(lods[:used], result.primary.lod_BM[0][:used]) and (lods[used:] == -1).all() or len(lods) <= used


def test_tracing_changes_nothing():
    gpt = tiny_base()
    one, two = (tiny_mc(gpt).training_step(gpt, tiny_batch(), 0, trace)
                for trace in (None, Trace("train.step", CPU, keep=True)))
    assert torch.equal(one.loss, two.loss)
    assert step(tiny_mc(gpt), gpt, tiny_batch()).metrics.keys() == step(tiny_mc(gpt), gpt, tiny_batch()).metrics.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_times_are_the_devices_and_nothing_waits():
    device, x = torch.device("cuda"), torch.randn(4096, 4096, device="cuda")
    trace = Trace("root", device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with trace.span("long") as long:
            for _ in range(50):
                x = torch.nn.functional.normalize(x @ x)
        with trace.span("short") as short:
            x = x + 1
        launched = time.perf_counter()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trace.finish()
    assert float(long.elapsed) > 10 * float(short.elapsed) > 0
    assert now(device).query() in (True, False) and time.perf_counter() > launched
