"""Telemetry of whole training runs: everything arrives everywhere, faults change nothing, and it costs next to
nothing (G1, G3, G5, trap 21)."""

import json
import math
import resource
import time
from pathlib import Path

import pytest
from e2e_commands import GIST_LOSSES, KINDS, MC, last_checkpoint, losses, run, same, start

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")

import mc.observe.metrics  # noqa: F401  registers MegaContext's metrics
from nanochat.telemetry import otlp as otel
from nanochat.telemetry.metrics import METRICS
from nanochat.telemetry.opening import open_recorder
from otlp_receiver import Receiver, unused_port
from test_session import tiny_pool, tokens
from wandb_file import wandb_history

OFTEN = {"OTEL_METRIC_EXPORT_INTERVAL": "100"}
PREFILLED = 8 * 2**20  # bytes that metrics.jsonl holds before the disk is "full"


def lines(base: Path) -> list[dict]:
    return [json.loads(line) for line in (base / "runs" / "t" / "metrics.jsonl").read_text().splitlines()]


def health(base: Path) -> dict[str, float]:
    """The last word on each telemetry.* metric."""
    return {name: value for line in lines(base) for name, value in line.items() if name.startswith("telemetry.")}


# ---------------------------------------------------------------------------------------------------------------------
# Faults: the quiet run is `reference["mc"]`

FAULTS = {  # name: (protocol, the receiver's fault, or where there is no receiver)
    "absent": ("http/protobuf", "http://collector.invalid:4318"),
    "refused": ("http/protobuf", None),
    "hanging": ("http/protobuf", "hang"),
    "hanging over gRPC": ("grpc", "hang"),
    "slow": ("http/protobuf", "slow"),
    "500s": ("http/protobuf", "500"),
    "dies mid-run": ("http/protobuf", "dies"),
    "disk full": ("http/protobuf", ""),
    "W&B without network": ("http/protobuf", ""),
}


@pytest.fixture(scope="module")
def troubled(reference, prepared, train_flags, tmp_path_factory):
    """All of them at once: name -> (base directory, result, when it had ended, the receiver or None)."""
    started, done = {}, {}
    for name, (protocol, fault) in FAULTS.items():
        base = tmp_path_factory.mktemp("trouble") / "base"
        base.mkdir()
        (base / "tokenizer").symlink_to(prepared / "base" / "tokenizer")
        flags, environment = list(train_flags) + MC, {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **OFTEN}
        receiver = None
        if fault is None or fault.startswith("http"):
            environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = fault or f"http://127.0.0.1:{unused_port()}"
        else:
            receiver = Receiver(protocol, fault)
            receiver.__enter__()
            environment |= receiver.environment
        if name == "W&B without network":
            flags += ["--run=trial"]
            environment |= {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40,
                            "WANDB_BASE_URL": f"http://127.0.0.1:{unused_port()}", "WANDB_INIT_TIMEOUT": "2"}
        if name == "disk full":
            log = base / "runs" / "t" / "metrics.jsonl"
            log.parent.mkdir(parents=True)
            log.write_text(json.dumps({"step": 0, "time": 0, "filler": "x" * PREFILLED}) + "\n")
        running = start(base, "base_train", *flags, "--trace_every=2", **environment)
        if name == "disk full":  # no file may grow beyond what lets two or three more lines in
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (PREFILLED + 8000, PREFILLED + 8000))
        started[name] = base, running, receiver
    for name, (base, running, receiver) in started.items():
        result = running.wait(400)
        done[name] = base, result, receiver
        if receiver:
            receiver.__exit__()
    return done


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_no_loss_and_ends_in_time(name, troubled, reference):
    base, result, receiver = troubled[name]
    result.ok()
    assert same(last_checkpoint(base), last_checkpoint(reference["mc"])), "weights, optimizer and generators"
    after = [line for line in lines(base) if line["step"] == 20 and "train.loss" not in line]  # what was delivered
    if name == "disk full":
        kept = {step: values for step, values in losses(base).items() if values}
        assert kept and kept.items() <= losses(reference["mc"]).items() and len(kept) < 20, "what was written is right"
        return
    assert losses(base) == losses(reference["mc"]) and len(losses(base)) == 20
    assert len(after) == 1 and any("checkpoint.save_time" in line
                                   for line in lines(base)), "a last step is logged when it is saved"
    assert after[0]["time"] - lines(base)[-2]["time"] <= 3, "the end waited for the collector"


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ("slow", "disk full", "W&B without network")])
def test_losses_are_counted_and_told(name, troubled):
    base, result, receiver = troubled[name]
    last, protocol = health(base), FAULTS[name][0]
    (warning,) = [line for line in result.err.splitlines() if line.startswith("warning")]
    assert f"warning: {protocol} http://" in warning
    assert last["telemetry.otlp.lost"] > 20 * 20
    told = [line for line in result.out.splitlines() if line.startswith("OTLP: ")]
    assert [f"to {protocol} " in line for line in told] == [True, True]
    assert sum(int(line.split()[-2]) for line in told) == last["telemetry.otlp.lost"]
    if name == "dies mid-run":
        assert len(receiver.points()) + len(receiver.spans()) == last["telemetry.otlp.delivered"] > 0
    else:
        assert last["telemetry.otlp.delivered"] == 0
    assert last["telemetry.otlp.failures"] > 0 or name != "500s"
    assert json.loads(result.out.splitlines()[-1])["step"] == 20


def test_a_slow_collector_gets_everything(troubled):
    base, result, receiver = troubled["slow"]
    assert not result.err and health(base)["telemetry.otlp.lost"] == 0
    assert len([p for p in receiver.points() if p.name == "train.tokens"]) == 20


def test_a_full_disk_loses_whole_lines_and_says_so(troubled):
    base, result, receiver = troubled["disk full"]
    errors = result.err.splitlines()
    assert "cannot write metrics" in errors[0] and "Training goes on" in errors[0] and len(errors) == 2
    lost = int(errors[1].partition(" lacks ")[2].split()[0])
    written = (base / "runs" / "t" / "metrics.jsonl").read_text()
    assert written.endswith("}\n") and len(lines(base)) - 1 + lost == 20 + 1  # steps, what was delivered
    seen = [p.value for p in receiver.points() if p.name == "telemetry.jsonl.lost"]
    # but for the last two lines
    assert sorted(set(seen)) == list(range(int(max(seen)) + 1)) and lost - 2 <= max(seen) <= lost, "seen from outside while it happens"  # noqa: E501
    assert len([p for p in receiver.points() if p.name == "train.tokens"]) == 20, "the other sinks go on"


def test_weights_and_biases_without_network_stays_here(troubled):
    base, result, _ = troubled["W&B without network"]
    (warning,) = [line for line in result.err.splitlines() if line.startswith("warning")]
    assert "W&B cannot be used online" in warning and "kept offline" in warning
    compare_with_jsonl(base)


def compare_with_jsonl(base: Path) -> None:
    """What the offline file of W&B holds is what metrics.jsonl holds, row by row."""
    ours = [{k.replace(".", "/"): v for k, v in line.items() if k != "time"} for line in lines(base)]
    theirs = [{k: v for k, v in row.items() if not k.startswith("_")} for row in wandb_history(base / "runs" / "t")]
    # the last line: what was lost, or delivered, by then
    assert len(theirs) >= 21 and theirs == ours[: len(theirs)] and len(ours) - len(theirs) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Everything arrives


def test_every_registered_name_arrives(troubled, train_flags, prepared, tmp_path, monkeypatch):
    """A MegaContext and a vanilla run with a collector in trouble at first, a session, a preflight, a value that is not
    finite, a queue that is too small; and from above a run whose disk is full (trap 21)."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer").symlink_to(prepared / "base" / "tokenizer")
    found = {}
    with Receiver(fault="500") as receiver:
        environment = receiver.environment | OFTEN
        both = [start(base, "base_train", *train_flags, *flags, *(GIST_LOSSES if flags else []), f"--model_tag={kind}",
                      "--run=trial", **environment)
                for kind, flags in KINDS.items()]
        deadline = time.monotonic() + 60
        while receiver.arrived < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        receiver.fault = ""  # from now on it works: what failed is sent again, and the failures are on record
        for running in both:
            running.wait().ok()
        run(base, "mc_bench", "otlp", **environment).ok()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with open_recorder(tmp_path / "session", config={}, total_steps=1) as recorder:
            session = tiny_pool(budget=50, recorder=recorder).open()
            session.begin(tokens(90))
            for i in range(12):
                session.append(tokens(3, i))
                list(session.generate(9))
            recorder.record("train.loss", math.nan)
        monkeypatch.setattr(otel, "MOST", 3)
        with open_recorder(tmp_path / "small", config={}, total_steps=1) as recorder:
            for step in range(30):
                recorder.record("train.tokens", step)
                recorder.flush(step)
    for source in (receiver, troubled["disk full"][2]):
        for point in source.points():
            found.setdefault(point.name, set()).add((point.unit, {"sum": "counter"}.get(point.kind, point.kind)))
    wanted = {name: {(m.unit, m.kind)} for name, m in METRICS.items()}
    assert {name: kinds for name, kinds in found.items() if wanted.get(name) != kinds} == {}
    assert set(wanted) - set(found) == set()
    variants = {p.attributes["mc.variant"] for p in receiver.points() if p.attributes.get("mc.stage") == "train"}
    assert variants == {"mc", "vanilla"} and len({p.attributes["mc.run.id"] for p in receiver.points()}) == 5


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def test_telemetry_accounts_for_less_than_a_hundredth_of_the_steps(base, prepared):
    """G5, on a small model: every sink on, a log line every five steps and a trace every five."""
    flags = ["--depth=4", "--aspect_ratio=32", "--head_dim=32", "--max_seq_len=256", "--device_batch_size=2",
             "--total_batch_size=1024", "--num_iterations=10",
             "--eval_every=0", "--eval_tokens=512", "--log_every=5", "--probe_every=0", "--device=cpu",
             "--model_tag=t", "--mc_enabled=1", "--mc_block_size=8",
             "--mc_budget=64", "--mc_horizon=16", "--mc_start=0", "--mc_lens_queries=96",
             f"--data={prepared / 'texts'}"]  # fmt: skip
    with Receiver() as receiver:
        run(base, "base_train", *flags, "--run=trial", "--trace_every=5", **receiver.environment, **OFTEN).ok()
    rows = [line for line in lines(base) if "train.step_time" in line]
    shares = [row["telemetry.overhead"] for row in rows]
    spent = sum(row["telemetry.overhead"] * row["train.step_time"] for row in rows) / sum(row["train.step_time"]
                                                                                          for row in rows)
    assert len(rows) == 2 and 0 < min(shares) and spent <= 0.01, shares
    assert [p.value for p in receiver.points() if p.name == "telemetry.overhead"] == shares
