"""Suites and their reports, on records made by hand: what the tables say is what the numbers are."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from nanochat.common import UserError
from nanochat.tasks.schema import TaskBatch
from scripts.eval.methods.interface import Models
from scripts.studies import suite_report
from scripts.studies.suite import by_distance, judge_cell, read_suite
from scripts.studies.suite_report import Results, Condition, gap_closed, score_table, write_report
from tiny_mc import T, H, N, VOCAB, tiny_base, tiny_mc

SUITE = """
title: t
seeds: [1, 2, 3]
models: {m: {tag: "x_{seed}", train: {data: tasks, init_from: "base_{seed}"}, finetune: {steps: 3}}}
texts: {prose: $SOMEWHERE/prose}
files: {qa: {path: $SOMEWHERE/qa.jsonl, format: longbench}}
cells:
  - {model: m, tasks: [alias, prose], systems: [full, window, gists_lens], lengths: [256, 512], budgets: [64, 128], documents: 8}
  - {model: m, tasks: [alias], systems: [window], lengths: [256], budgets: [64], documents: 8}
"""  # noqa: E501


def write(path: Path, text: str = SUITE) -> Path:
    path.write_text(text)
    return path


def test_cells_of_a_suite(tmp_path):
    cells = read_suite(write(tmp_path / "s.yaml")).cells([1, 2])
    # seeds x tasks x (lengths x budgets x systems; full once per length)
    assert len(cells) == len({cell["key"] for cell in cells}) == 2 * 2 * (2 * (2 + 2) + 2)
    assert {(cell["length"], cell["budget"]) for cell in cells if cell["system"] == "full"} == {(256, 256), (512, 512)}
    first = cells[0]
    assert first["model"] == {"name": "m", "seed": 1, "tag": "x_1", "flags": {"data": "tasks", "init_from": "base_1"},
                              "finetune": {"steps": 3}, "keep_drop": None, "after": None}
    assert {cell["task"]: cell["text"] for cell in cells} == {"alias": None, "prose": "$SOMEWHERE/prose"}
    assert (first["documents"], first["batch"]) == (8, 16)


@pytest.mark.parametrize(("old", "new", "error"), [
    ("seeds: [1, 2, 3]", "seeds: []", "seeds must be"),
    ("model: m,", "model: q,", "there is no model 'q'; there are m"),
    ("systems: [full,", "systems: [foll,", "systems: foll"),
    ("tasks: [alias, prose]", "tasks: [alias, verse]", "tasks: verse"),
    ("tasks: [alias, prose]", "tasks: alias", "tasks: alias: use a list"),
    ("lengths: [256, 512]", "lengths: [0]", "lengths: "), ("documents: 8}", "documents: none}", "documents: none"),
    ("lengths: [256]", "lenghts: [256]", "every entry of cells"),
    ("systems: [full,", "systems: [drop_learned,", "drop_learned needs finetune and keep_drop"),
    ("finetune:", "after: q, finetune:", "model m comes after 'q'"), ("finetune:", "fine:", "model m is a mapping"),
    ("texts: {prose", "texts: {alias", "texts is a mapping"),
    ("files: {qa", "files: {prose", "files is a mapping"),
    ("format: longbench", "format: long", "files: qa is a mapping of path and format, which is one of kvpress"),
    ("title: t", "x: t", "unknown key x")])
def test_bad_suites(tmp_path, old, new, error):
    assert old in SUITE
    with pytest.raises(UserError, match=error) as found:
        read_suite(write(tmp_path / "s.yaml", SUITE.replace(old, new)))
    assert "\n" not in str(found.value)


# -- one cell -------------------------------------------------------------------------------------------------------------  # noqa: E501


def make_batch(first: int, last: int) -> TaskBatch:
    rows = np.arange(first, last)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (100, N + H))[rows]
    targets = np.full_like(tokens, -1)
    targets[:, N - 1:N + H - 1] = tokens[:, N:]
    examples = [type("Example", (), {"depth": None if row % 2 else row / 10})() for row in rows]
    return TaskBatch(tokens, targets, N, examples)


@pytest.mark.parametrize("system", ["full", "window", "gists_lens"])
def test_a_cell_does_not_depend_on_its_batches(system):
    gpt = tiny_base()
    models = Models(gpt, tiny_mc(gpt, T=T).model)
    cell = {"name": "c", "system": system, "budget": N if system == "full" else 40, "documents": 7, "batch": 7,
            "text": None}
    whole, parts = (judge_cell(cell | {"batch": batch}, models, make_batch) for batch in (7, 3))
    assert whole["depth"] == [0.0, None, 0.2, None, 0.4, None, 0.6] == parts["depth"]
    assert whole["nll"] == pytest.approx(parts["nll"],
                                         abs=1e-9) and len(whole["nll"]) == 7 and whole["acc"] == parts["acc"]
    assert whole["entries"] == parts["entries"] and whole["entries"] <= cell["budget"] and whole["entries"] > 30
    assert whole["flops"] > 0 and whole["bytes"] > 0 and whole["seconds"] > 0 and whole["buckets"] == {}
    assert judge_cell(cell, models, make_batch)["nll"] == whole["nll"]  # to the bit


def test_buckets_by_hand():
    """History 5 6 7 8, then 6 (3 back), 9 (never), 9 (1 back)."""
    tokens = np.array([[5, 6, 7, 8, 6, 9, 9]])
    targets = np.array([[-1, -1, -1, 6, 9, 9, -1]])
    found = by_distance(TaskBatch(tokens, targets, 4, []), np.array([[1.0, 10.0, 3.0]]))
    assert {name: values for name, values in found.items() if values != [None]} == {"never": [10.0],
                                                                                    "<128": [2.0]} and len(found) > 2


# -- tables ---------------------------------------------------------------------------------------------------------------  # noqa: E501


def record(system: str, task: str, seed: int, nll, acc, length: int = 256, budget: int = 64, depth=None, buckets=None,
           text=None) -> dict:
    C = len(nll)
    return {"key": f"{system}{task}{seed}{length}{budget}", "model": {"name": "m"}, "system": system, "task": task,
            "length": length,
            "budget": length if system == "full" else budget, "seed": seed, "documents": C, "text": text,
            "commit": "abc", "environment": {"python": "3"},
            "results": {"nll": list(nll), "acc": list(acc), "depth": depth or [None] * C, "buckets": buckets or {},
                        "entries": 60.0, "flops": 1e6, "bytes": 1e4, "seconds": 0.01}}


def records(seeds=(1, 2, 3), C: int = 40, **cell) -> list[dict]:
    """full is perfect, the window knows nothing, MC closes 0.75 of the gap, BM25 is as good as MC, random
    blocks a little worse than MC."""
    rng = np.random.default_rng(0)
    depth = list(np.linspace(0, 0.999, C))
    found = []
    for task in ("alias", "topic_lm"):
        for seed in seeds:
            hard = rng.uniform(2, 4, C)
            for system, share in {"full": 1.0, "window": 0.0, "gists_lens": 0.75, "bm25": 0.75,
                                  "random_blocks": 0.6}.items():
                noise = 0 if share in (0, 1, 0.75) else rng.normal(0, 0.1, C)
                found.append(record(system, task, seed, hard * (1 - share) + noise, np.full(C, share), depth=depth,
                                    **cell))
    return found


SETTING = Condition("m", 256, 64)


def test_scores_and_verdicts():
    results = Results(records())
    lines, counts = score_table(results, SETTING)
    cells = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in lines[2:]}
    assert lines[0] == "| system | alias (acc) | topic_lm (nll) |" and list(cells) == ["full context",
                                                                                       "sliding window",
                                                                                       "random blocks", "BM25 blocks",
                                                                                       "gists + LensNet (MC)"]
    assert cells["full context"][0] == "1.00 [1.00, 1.00] +" and cells["sliding window"][0] == "0.00 [0.00, 0.00] −"
    assert cells["BM25 blocks"][0] == "0.75 [0.75, 0.75]" and cells["gists + LensNet (MC)"][0] == "0.75 [0.75, 0.75]"
    assert cells["random blocks"][1].endswith(" −") and cells["full context"][1].endswith(
        " +") and not cells["BM25 blocks"][1].endswith(("+", "−"))
    assert counts == {"full": [0, 2, 0], "window": [2, 0, 0], "random_blocks": [2, 0, 0], "bm25": [0, 0, 2]}


def test_gap_closed():
    results = Results(records())
    share, (low, high) = gap_closed(results, SETTING, ["alias"], "gists_lens")
    assert share == pytest.approx(0.75) and low == pytest.approx(0.75) and high == pytest.approx(0.75)
    share, (low, high) = gap_closed(results, SETTING, ["alias", "topic_lm"], "random_blocks")
    assert low < 0.6 < high and high - low < 0.1
    assert gap_closed(results, SETTING, ["alias"], "quest") is None
    small = [r | {"results": r["results"] | {"nll": [x / 100 for x in r["results"]["nll"]]}} for r in records()]
    assert gap_closed(Results(small), SETTING, ["alias"], "gists_lens") is None


def test_gap_closed_by_distance():
    """Near tokens, of which half of the documents have none: MC closes a quarter; far ones: three;
    where there is no gap, nothing."""
    near = {"full": 1.0, "window": 3.0, "gists_lens": 2.5}
    far = {"full": 2.0, "window": 6.0, "gists_lens": 3.0}
    texts = [record(s, "code", seed, np.full(8, 4.0), np.zeros(8), text="/p",
                    buckets={"<128": [near[s]] * 4 + [None] * 4, "128-511": [far[s]] * 8, "never": [5.0] * 8})
             for s in near for seed in (1, 2, 3)]
    lines = suite_report.bucket_table(Results([*texts, *records()]), SETTING)
    assert lines[2] == "| system | <128 tokens | 128-511 tokens |" and lines[4:] == ["| gists + LensNet (MC) | 0.25 "
                                                                                     "[0.25, 0.25] | 0.75 [0.75, 0.75] |", ""]  # noqa: E501


def test_intervals_of_accuracies_lie_between_0_and_1():
    x_SC = np.array([[1.0, 1.0], [1.0, 0.5], [1.0, 1.0]])
    assert suite_report.mean_interval(x_SC, "acc")[1] == 1 < suite_report.mean_interval(x_SC, "nll")[1]


def test_what_looks_at_every_token_against_each_system():
    again = [record("gists_lens_again", task, seed, np.zeros(40), np.ones(40)) for task in ("alias", "topic_lm")
             for seed in (1, 2, 3)]
    lines = suite_report.pair_table(Results([*records(), *again]), SETTING, "gists_lens_again")
    cells = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in lines[4:-1]}
    assert lines[2] == "| system | alias | topic_lm |" and "gists + LensNet (MC)" in cells and "gists + LensNet, every token" not in cells  # noqa: E501
    assert cells["full context"] == ["+0.000 [+0.000, +0.000], q 1.000"] * 2
    window = np.mean([r["results"]["nll"] for r in records() if (r["system"], r["task"]) == ("window", "alias")])
    assert cells["sliding window"][0].startswith(f"{-window:+.3f} [-") and cells["sliding window"][0].endswith(
        "q 0.001")
    assert suite_report.pair_table(Results(records()), SETTING, "gists_lens_again") == []


def test_seeds_that_all_have_are_compared():
    some = [r for r in records((1, 2, 3, 4)) if not (r["system"] == "gists_lens" and r["seed"] == 4)]
    _, counts = score_table(Results(some), SETTING)
    assert counts["window"] == [2, 0, 0]
    assert math.isclose(gap_closed(Results(some), SETTING, ["alias"], "gists_lens")[0], 0.75)


def test_report(tmp_path):
    suite = read_suite(write(tmp_path / "s.yaml"))
    buckets = {"near": [1.0] * 20 + [None] * 20, "far": [2.0] * 40}
    everything = [*records(), *records(budget=128), *records(length=4096),
                  *(record(s, "prose", seed, np.full(40, x), np.zeros(40), buckets=buckets, text="/p")
                                                                         for seed in (1, 2)
                    for s, x in (("full", 1.0), ("window", 2.0), ("gists_lens", 1.5)))]
    decode = {"budget": 64, "threads": 1, "device": "cpu", "rounds": 2, "curve": [
        {"history": n, "mc": {"mean_ms": 1.0, "median_ms": 1.0, "p95_ms": 1.1, "bytes": 1000},
         "vanilla": {"mean_ms": n / 1000, "median_ms": 1.0, "p95_ms": 2.0, "bytes": n},
         "speedup": {"ratio": n / 1000, "low": 1.0, "high": 9.0}} for n in (1024, 4096)]}
    step = {"ratio": 1.2, "low": 1.1, "high": 1.3, "vanilla_s": 2.0, "mc_s": 2.4, "parts": {"wc": 0.2}}
    text = write_report(suite, everything, tmp_path, costs={"decode": decode, "step": step}, trained={"m": 288},
                        overlay={}, studies=[])
    assert (tmp_path / "report.md").read_text() == text
    assert "## m: n = 256, W = 64 (1/4)" in text and "## m: beyond the training length of 288 tokens, W = 64" in text and "| 4,096 | 14 | alias | full context | 0.00" in text  # noqa: E501
    # gaps, the last of prose
    assert "| gists + LensNet (MC) | 0.75 [0.75, 0.75] | 0.75 [0.75, 0.75] | 0.50 [0.50, 0.50] |" in text
    assert "MC takes 1.200 [1.100, 1.300] times a vanilla step. In shares of a vanilla step: wc 10.0%." in text and "| 4,096 | 1.00 | 4.10 | 4.10 [1.00, 9.00] | 1,000 | 4,096 |" in text  # noqa: E501
    assert "Commits abc." in text and "only: these numbers" not in text
    for name in ("buckets", "gap", "depth_m", "beyond_m_64", "decode"):
        assert f"({name}.png)" in text and (tmp_path / f"{name}.pdf").read_bytes().startswith(
            b"%PDF") and imread(tmp_path / f"{name}.png").shape[0] > 200
    few = write_report(suite, records(seeds=(1, 2)), tmp_path, costs={}, trained={"m": 288}, overlay={}, studies=[])
    assert "**2 seeds only" in few and "Cost: MC beside vanilla" not in few


def test_depth_is_where_the_fact_lies(tmp_path, monkeypatch):
    """Right only in the last fifth of the context."""
    depth = [0.05, 0.25, 0.45, 0.65, 0.85, 0.95, None]
    drawn = []
    monkeypatch.setattr(suite_report, "save_figure", lambda figure, path: drawn.append(figure))
    assert suite_report.plot_depth(Results([record("window", "alias", 1, np.ones(7), [0, 0, 0, 0, 1, 0, 1],
                                                   depth=depth)]), "m", tmp_path / "x.png")
    assert [t.get_text() for t in drawn[0].axes[0].texts] == ["0.00", "0.00", "0.00", "0.00", "0.50"]


def test_the_gap_against_the_tokens_between_two_looks(tmp_path, monkeypatch):
    """A line per model and budget, its points where they were measured; a setting with two of them is none."""
    drawn, nll = [], {"gists_lens_again": 1.0, "gists_lens_again_8": 1.5, "gists_lens": 2.0}
    monkeypatch.setattr(suite_report, "save_figure", lambda figure, path: drawn.append(figure))
    every = [record(system, "prose", seed, np.full(9, value), np.zeros(9)) for seed in (1, 2, 3)
             for system, value in (nll | {"full": 0.0, "window": 2.0}).items()]
    assert suite_report.plot_intervals(Results(every), tmp_path / "x.png")
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "4", "8", "16", "32", "once"]
    (line,) = [container.lines[0] for container in axis.containers]
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.5], [2, 0.25], [5, 0]])
    assert not suite_report.plot_intervals(Results([r for r in every if r["system"] != "gists_lens_again_8"]),
                                           tmp_path / "x.png")
