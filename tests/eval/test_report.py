"""The report of a comparison, from hand-made outcomes: its numbers, its table, its plots; and
the step times that it quotes."""

import json
import os
import re
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from tiny_mc import SMALL, T

from mc import runtime
from mc.config import MCConfig, to_dict
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.telemetry import tracing
from nanochat.telemetry.sinks import read_metrics
from scripts.bench import telemetry as telemetry_benchmark
from scripts.bench import train_step as benchmark
from scripts.eval import report
from scripts.eval.comparison import Outcome
from scripts.eval.statistics import bootstrap_interval, median_interval

matplotlib.use("Agg")
torch.set_num_threads(1)
CONTEXTS, HISTORY, BUDGET = 40, 1056, 128
TOKENIZER = SimpleNamespace(vocab_size=50, fingerprint="abc")
ABOVE_FULL = {"full": 0.0, "sliding_window": 1.0, "mc_random": 0.9, "mc_recency": 1.2, "mc_lens": 0.25,
              "mc_oracle": -0.1,
              "vanilla_full": -0.5, "vanilla_window": 0.4}  # nats, in every row  # fmt: skip
FACTS = {"horizon": 32, "recent": 32, "block_size": 32, "tokens": 1_740_800, "flops": {"mc": 2.5e12, "vanilla": 2e12},
         "trained_lods": [1, 2]}


def outcomes(noise: float = 0.0, count: int = CONTEXTS, **above_full: float) -> dict[str, Outcome]:
    """Every system: a difficulty that the row has for all of them, what the system is above
    full, and noise of its own."""
    rng = np.random.default_rng(1)
    difficulty = rng.normal(5, 2, count)
    found = {}
    for i, (name, above) in enumerate((ABOVE_FULL | above_full).items()):
        nll = torch.tensor(difficulty + above + noise * rng.normal(size=count))
        entries = torch.full((count,), HISTORY if name.endswith("full") else BUDGET - i)
        found[name] = Outcome(nll, torch.tensor(rng.uniform(size=count)), entries)
    return found


def task(name: str, found: dict[str, Outcome] | None = None) -> dict:
    return report.task_report(found or outcomes(0.2), history=HISTORY, budget=BUDGET, with_accuracy=name == "recall",
                              facts=FACTS)


@pytest.fixture
def whole() -> dict:
    """What compare_focus hands to `write`; on its text the gap is too small to be measured."""
    cost = {"ratio": 1.217, "low": 1.18, "high": 1.26,
            "shares": {"tree": 0.031, "wc": 0.124, "backward and optimizer": 0.062}}
    tasks = {"recall": task("recall"), "text": task("text", outcomes(0.01, sliding_window=0.05))}
    return {"tasks": tasks, "step_times": {"recall": cost, "text": cost | {"ratio": 1.1}}, "step_time_ratio": 1.217,
            "seed": 7, "commit": "abc123"}


@pytest.fixture
def runs(tmp_path) -> dict[str, dict[str, Path]]:
    """Logs of four trainings; MegaContext began at the third line."""
    def log(name: str, mc: bool) -> Path:
        lines = [{"step": s, "time": 0.0, "train.tokens": 100 * s,
                  "train.loss": 9.0 - s - mc} | ({"mc.loss.wc": 9.5 - s} if mc and s > 2 else {})
                 for s in range(1, 6)]  # fmt: skip
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    return {name: {kind: log(f"{name}-{kind}", kind == "mc") for kind in ("mc", "vanilla")}
            for name in ("recall", "text")}


# -- numbers --------------------------------------------------------------------------------------------------------------  # noqa: E501


def test_rows_are_the_outcomes():
    found = outcomes(0.2)
    rows = {row["system"]: row for row in task("recall", found)["rows"]}
    facts_alone = ("mc_bm25", "mc_lens_exchanged")
    assert list(rows) == [name for name in report.SYSTEMS if name not in facts_alone] == list(found)
    for name, row in rows.items():
        full = found["vanilla_full" if "vanilla" in name else "full"]
        assert row["nll"] == pytest.approx(float(found[name].nll_B.mean())) and row["acc"] == pytest.approx(float(found[name].acc_B.mean()))  # noqa: E501
        assert row["delta_nll"] == pytest.approx(float((found[name].nll_B - full.nll_B).mean()))
        assert row["entries"] == int(found[name].entries_B[0])
        low, high = row["delta_nll_interval"]
        assert low <= row["delta_nll"] <= high and (low < high) == ("full" not in name)
    for name in ("full", "vanilla_full"):
        assert rows[name]["delta_nll"] == 0 and rows[name]["delta_nll_interval"] == [0, 0]


def test_accuracy_is_for_recall_only():
    assert all(row["acc"] is None for row in task("text")["rows"])


def test_share_of_the_gap():
    """Every system shifted by the same in every row: however hard the rows are, nothing is left to chance."""
    closed = task("text", outcomes())["gap_closed"]
    assert set(closed) == {"mc_random", "mc_recency", "mc_lens", "mc_oracle"}
    for name, share in {"mc_random": 0.1, "mc_recency": -0.2, "mc_lens": 0.75, "mc_oracle": 1.1}.items():
        assert closed[name]["share"] == pytest.approx(share) and closed[name]["interval"] == pytest.approx([share,
                                                                                                            share])


@pytest.mark.parametrize(("gap", "measurable"), [(-1.0, False), (0.0, False), (0.09, False), (0.11, True), (3.0, True)])
def test_a_gap_too_small_to_measure(gap, measurable):
    closed = report.compared_gap_closed(outcomes(sliding_window=gap, mc_lens=gap / 4), "mc_lens")
    assert (closed is not None) == measurable and (not measurable or closed["share"] == pytest.approx(0.75))


def test_interval_of_the_share():
    few, many = (report.compared_gap_closed(outcomes(0.5, count), "mc_lens") for count in (20, 2000))
    for closed in (few, many):
        low, high = closed["interval"]
        assert low < closed["share"] < high and low < 0.75 < high
    assert np.ptp(few["interval"]) > 5 * np.ptp(many["interval"])
    assert report.compared_gap_closed(outcomes(0.5, 20), "mc_lens") == few


def test_bootstrap_is_that_of_a_mean():
    x = np.random.default_rng(2).normal(3, 2, 400)
    low, high = bootstrap_interval(lambda i: x[i].mean(), len(x))
    error = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - error, abs=0.1 * error) and high == pytest.approx(x.mean() + error,
                                                                                             abs=0.1 * error)


def test_bootstrap_draws_a_context_with_all_of_its_seeds():
    """The same contexts judged three times are no more contexts."""
    once = np.random.default_rng(2).normal(3, 2, 80)
    x = np.tile(once, 3)
    assert bootstrap_interval(lambda i: x[i].mean(), len(x),
                              seeds=3) == pytest.approx(bootstrap_interval(lambda i: once[i].mean(), len(once)))
    seen = []
    bootstrap_interval(lambda i: seen.append(i) or 0.0, 6, draws=50, seeds=2)
    assert all((i[3:] == i[:3] + 3).all() for i in seen) and set(np.concatenate(seen)) == set(range(6))


# -- table ----------------------------------------------------------------------------------------------------------------  # noqa: E501


def test_the_table_is_the_json(whole):
    text = report.comparison_markdown(whole)
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert set(sections) == {"recall", "text", "Cost"}
    for name, task in whole["tasks"].items():
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in sections[name].splitlines()
                 if line.startswith("|")][2:]
        assert len(table) == len(task["rows"]) == 8
        for (checkpoint, label, nll, delta, accuracy, entries), row in zip(table, task["rows"], strict=True):
            low, high = row["delta_nll_interval"]
            assert (label, checkpoint) == report.SYSTEMS[row["system"]]
            assert nll == f"{row['nll']:.3f}" and delta == f"{row['delta_nll']:+.3f} [{low:+.3f}, {high:+.3f}]"
            assert accuracy == ("" if name == "text" else f"{row['acc']:.3f}") and int(entries) == row["entries"]
        for fact in ("n = 1056", "W = 128", "(8.2:1)", "R = 32", "H = 32", "block size 32", "40 held-out", "1,740,800",
                     "2.5e+12", "2e+12"):
            assert fact in sections[name], fact
    lens = whole["tasks"]["recall"]["gap_closed"]["mc_lens"]
    assert f"closes {lens['share']:.2f} [{lens['interval'][0]:.2f}, {lens['interval'][1]:.2f}] of the gap" in sections["recall"]  # noqa: E501
    assert "not measurable" in sections["text"] and "closes 0" not in sections["text"]
    for name, ratio in (("recall", "1.217"), ("text", "1.100")):
        assert f"* {name}: a training step with MC takes {ratio} [1.180, 1.260] times" in sections["Cost"]
    assert "tree 3.1%, wc 12.4%, backward and optimizer 6.2%" in sections["Cost"] and "Seed 7, commit abc123." in text


# -- files ----------------------------------------------------------------------------------------------------------------  # noqa: E501


def test_write(whole, runs, tmp_path):
    out = tmp_path / "new" / "folder"
    text = report.write_comparison(whole, runs, out)
    assert (out / "report.md").read_text() == text == report.comparison_markdown(whole)

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((out / "report.json").read_text(), parse_constant=refuse) == whole
    for name, colours in (("systems", ["#0072B2", "#D55E00"]), ("training", ["#0072B2", "#D55E00", "#009E73"])):
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        pixels = matplotlib.image.imread(out / f"{name}.png")[..., :3]
        assert pixels.shape[0] > 300 and pixels.shape[1] > 1000
        for half in np.array_split(pixels, 2, axis=1):  # one panel per task
            for colour in colours:
                near = np.abs(half - matplotlib.colors.to_rgb(colour)).max(-1) < 0.02
                assert near.sum() > 100, (name, colour)


@pytest.fixture
def figures(monkeypatch) -> list:
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def test_bars_are_the_nlls(whole, figures):
    report.plot_systems(whole, Path("unused"))
    for axis, (name, task) in zip(figures[0].axes, whole["tasks"].items(), strict=True):
        bars = dict(zip((label.get_text() for label in axis.get_yticklabels()), axis.patches, strict=True))
        assert len(bars) == 8 and name in axis.get_title()
        for row in task["rows"]:
            label, checkpoint = report.SYSTEMS[row["system"]]
            bar = bars[f"{label} ({checkpoint})"]
            assert bar.get_width() == pytest.approx(row["nll"])
            assert bar.get_facecolor()[:3] == matplotlib.colors.to_rgb(report.COLOUR_OF[checkpoint])
            written = next(t.get_text()
                           for t in axis.texts if t.get_position()[1] == round(bar.get_y() + bar.get_height() / 2))
            assert f"{row['nll']:.2f}" in written and ("acc" in written) == (name == "recall")


def test_curves_are_the_logs(runs, figures):
    report.plot_training(runs, Path("unused"))
    for axis in figures[0].axes:
        curves = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
        assert curves == {"MC: LM loss": [[100 * s, 8 - s] for s in range(1, 6)],
                          "vanilla: LM loss": [[100 * s, 9 - s] for s in range(1, 6)],
                          "MC: working-context loss": [[100 * s, 9.5 - s] for s in (3, 4, 5)]}  # fmt: skip


# -- step times -----------------------------------------------------------------------------------------------------------  # noqa: E501


def test_interval_of_the_median():
    assert median_interval(np.full(5, 1.5)) == (1.5, 1.5)
    values = np.array([1.1, 1.2, 1.25, 1.3, 9.0])  # one pair was disturbed
    low, high = median_interval(values)
    assert 1.1 <= low < np.median(values) < high <= 9.0 and median_interval(values) == (low, high)


def meta(**flags) -> dict:
    """What the checkpoint of a tiny run says: two micro-batches of two rows a step, stopped after 2 of 6 steps."""
    flags = dict(data="random", seed=0, total_batch_size=4 * T, device_batch_size=2, dtype="float32", rows="long",
                 text_column="text", needles=4,
                 recall_grow=0.5, recall_blocks=32, matrix_lr=0.02, embedding_lr=0.3, unembedding_lr=0.004,
                 scalar_lr=0.1, weight_decay=0.0) | flags  # fmt: skip
    config = GPTConfig(T, 50, 1, 1, 1, 16, smear=False, value_embeds=False)
    return {"flags": flags, "model_config": asdict(config), "num_iterations": 6, "step": 2, "tokens": 2 * 4 * T,
            "tokenizer": "abc",
            "mc": {"config": to_dict(MCConfig(**{**SMALL, "start": 0.5, "ramp": 3})),
                   "trained_lods": [1, 2]}}  # fmt: skip


@pytest.fixture
def clock(monkeypatch) -> list[str]:
    """A clock on which a micro-step takes 1 s, the lens's lesson another 0.5 s, and nothing else takes
    time. Gives what ran, in order."""
    ran: list[str] = []

    def spend(owner, method: str, name: str):
        real = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda *args: (ran.append(name), real(*args))[1])

    spend(GPT, "loss", "micro-step")
    spend(runtime, "lens_objective", "lens")
    now = lambda: ran.count("micro-step") + 0.5 * ran.count("lens")
    for module in (benchmark, tracing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=now, time_ns=lambda: 0))
    return ran


@pytest.mark.parametrize("total_batch_size", [4 * T, 0])
def test_step_times(clock, total_batch_size):
    """A batch size that the flags left to be derived is found again, also where the run was stopped early."""
    times = benchmark.training_step_times(meta(total_batch_size=total_batch_size), TOKENIZER, pairs=2, steps=3)
    assert times[:5] == pytest.approx((1.5, 1.5, 1.5, 2.0, 3.0))
    # a block to warm up, then two pairs
    assert clock.count("lens") == 3 * 3 * 2 and clock.count("micro-step") == 2 * 3 * 3 * 2
    assert times.parts == pytest.approx({"tree": 0, "score": 0, "focus": 0, "wc": 0, "lens": 1.0,
                                         "backward and optimizer": 0})


def test_step_times_on_a_real_clock():
    times = benchmark.training_step_times(meta(), TOKENIZER, pairs=3, steps=1)
    assert 0 < times.low <= times.ratio <= times.high and times.vanilla_s > 0
    assert set(times.parts) == {"tree", "score", "focus", "wc", "lens", "backward and optimizer"}
    assert all(seconds > 0 for name, seconds in times.parts.items() if name != "backward and optimizer")
    assert sum(times.parts.values()) == pytest.approx(times.mc_s - times.vanilla_s)


def test_step_times_need_megacontext_and_its_tokenizer():
    with pytest.raises(UserError, match="--mc_enabled=0"):
        benchmark.training_step_times({**meta(), "mc": None}, TOKENIZER)
    with pytest.raises(UserError, match="tokenizer abc, here is xyz"):
        benchmark.training_step_times(meta(), SimpleNamespace(vocab_size=50, fingerprint="xyz"))


@pytest.mark.parametrize("otlp", [True, False])
def test_telemetry_cost_is_of_real_sinks(otlp, tmp_path, monkeypatch):
    """Everything a step records reaches metrics.jsonl, and the collector that the command starts where
    the environment names none."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    with telemetry_benchmark.collector() if otlp else nullcontext():
        cost = telemetry_benchmark.telemetry_cost(meta(), TOKENIZER, tmp_path, pairs=3, steps=2)
    assert 0 < cost.low <= cost.ratio <= cost.high and 0 < cost.cpu_low <= cost.cpu_ratio <= cost.cpu_high and cost.step_s > 0  # noqa: E501
    assert 0 < cost.accounted < 1 and cost.values_per_step > 2 * 20
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert len(found) == 1 + 3 and "mc.loss.wc" in found[1] and "OTEL_EXPORTER_OTLP_ENDPOINT" not in os.environ
    if otlp:
        assert found[-1]["telemetry.otlp.lost"] == 0 and found[-1]["telemetry.otlp.delivered"] > 4 * 20
