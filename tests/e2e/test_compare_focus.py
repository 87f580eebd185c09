"""compare_focus, eval_focus and mc_bench on tiny checkpoints, and the trainings that quickstart.sh would run: the
report's shape, same numbers twice, mistakes in one line."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from e2e_commands import ROOT, run, start, tree

from nanochat import dataset
from scripts import base_train
from scripts.eval.report import SYSTEMS
from scripts.eval.provenance import commit
from scripts.mc_eval import make_parser
from scripts.eval.run_focus import LABELS
from scripts.eval.scores import CHEATS, SCORES

TINY = ["--depth=1", "--aspect_ratio=16", "--head_dim=16", "--smear=0", "--value_embeds=0", "--device_batch_size=2",
        "--num_iterations=2",
        "--save_every=1", "--eval_every=0", "--eval_tokens=1", "--log_every=1", "--device=cpu", "--seed=3"]  # fmt: skip
LENS = ["--mc_enabled=1", "--mc_start=0", "--mc_ramp=1", "--mc_gist_width=16", "--mc_lens_key_dim=8",
        "--mc_lens_keys=1", "--mc_lens_queries=48"]
TASKS = {  # flags of both trainings, flags of MegaContext, and (n, W, R, H, block size)
    "recall": (["--data=recall", "--max_seq_len=1088", "--total_batch_size=2176"], ["--mc_budget=96"],
               (1056, 96, 32, 32, 32)),
    "text": (["--max_seq_len=128", "--total_batch_size=256"],
             ["--mc_block_size=8", "--mc_budget=48", "--mc_horizon=8", "--mc_recent=8"],
             (120, 48, 8, 8, 8)),
}  # fmt: skip
FACTS_ALONE = ("mc_bm25", "mc_lens_exchanged")  # systems of facts in text
ROW = {"system", "nll", "delta_nll", "acc", "entries"}


@pytest.fixture(scope="session")
def trained(prepared, once, tmp_path_factory) -> Path:
    """A base directory with a checkpoint of each task and kind. Not to be changed."""
    def make(folder: Path) -> None:
        base = Path(shutil.copytree(prepared / "base", folder / "base"))
        for task, (flags, mc, _) in TASKS.items():
            data = [] if task == "recall" else [f"--data={prepared / 'texts'}"]
            for kind, extra in (("mc", [*LENS, *mc]), ("vanilla", [])):
                run(base, "base_train", *TINY, *flags, *data, *extra, f"--model_tag={task}_{kind}").ok()

    return Path(shutil.copytree(once("compared_models", make) / "base", tmp_path_factory.mktemp("compare") / "base"))


def compare(base: Path, *flags: str, contexts: int = 2, **checkpoints: Path):
    """compare_focus on the checkpoints of `base`, or those named."""
    places = {f"{task}_{kind}": base / "checkpoints" / f"{task}_{kind}" for task in TASKS
              for kind in ("mc", "vanilla")} | checkpoints
    named = [f"--{name}={place}" for name, place in places.items()]
    return run(base, "mc_eval", "compare", *named, f"--contexts={contexts}", "--pairs=1", *flags)


@pytest.fixture(scope="session")
def compared(trained):
    """(base directory, what compare_focus printed)."""
    return trained, compare(trained).ok()


# -- report ---------------------------------------------------------------------------------------------------------------  # noqa: E501


def test_report(compared):
    base, done = compared
    out = base / "quickstart"
    found = json.loads((out / "report.json").read_text())
    assert {"tasks", "step_time_ratio", "seed", "commit"} <= set(found) and set(found["tasks"]) == set(TASKS)
    assert found["seed"] == 3 and isinstance(found["commit"], str) and found["commit"]
    assert found["step_time_ratio"] == max(cost["ratio"] for cost in found["step_times"].values()) > 0
    for name, (_, _, (n, budget, recent, horizon, block)) in TASKS.items():
        task = found["tasks"][name]
        assert (task["history"], task["budget"], task["recent"], task["horizon"],
                task["block_size"]) == (n, budget, recent, horizon, block)
        assert [row["system"] for row in task["rows"]] == [s for s in SYSTEMS if s not in FACTS_ALONE]
        assert all(ROW <= set(row) for row in task["rows"])
        assert task["contexts"] == 2 and task["tokens"] == 2 * (2176 if name == "recall" else 256)
        assert task["flops"]["mc"] > task["flops"]["vanilla"] > 0
        of = {row["system"]: row for row in task["rows"]}
        for system, row in of.items():
            assert 0 < row["nll"] < 20 and isinstance(row["entries"], int)
            assert row["acc"] is None if name == "text" else 0 <= row["acc"] <= 1
            own_full = of["vanilla_full" if system.startswith("vanilla") else "full"]["nll"]
            assert row["delta_nll"] == pytest.approx(row["nll"] - own_full, abs=1e-6)
            if system.endswith("full"):
                assert row["entries"] == n and row["delta_nll"] == 0
            elif system.endswith("window"):
                assert row["entries"] == budget
            else:
                assert recent < row["entries"] <= budget
        assert of["mc_oracle"]["nll"] <= min(of[f"mc_{policy}"]["nll"] for policy in ("random", "recency", "lens"))
        assert len({of[system]["nll"] for system in ("full", "vanilla_full", "sliding_window", "vanilla_window")}) == 4
        parts = found["step_times"][name]["shares"]
        # one pair: medians are the pair's
        assert sum(parts.values()) == pytest.approx(found["step_times"][name]["ratio"] - 1, abs=1e-6)


def test_what_is_printed(compared):
    base, done = compared
    text = (base / "quickstart" / "report.md").read_text()
    assert text in done.out and not done.err
    assert len(re.findall(r"^\| (?:MC|vanilla) \|", text, re.M)) == 2 * (len(SYSTEMS) - len(FACTS_ALONE))
    last = json.loads(done.out.splitlines()[-1])
    found = json.loads((base / "quickstart" / "report.json").read_text())
    assert last == {"report": str(base / "quickstart" / "report.json"), "step_time_ratio": found["step_time_ratio"]}
    for name in TASKS:
        assert f"{name}: timing steps" in done.out
    for plot in ("systems.png", "training.png"):
        assert (base / "quickstart" / plot).stat().st_size > 20_000


def test_facts_in_text(prepared, tmp_path, monkeypatch):
    """A tiny model that knows nothing: BM25 beside the lens, the oracle shows the note, text by itself, no twin."""
    base = Path(shutil.copytree(prepared / "base", tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    modules = tmp_path / "modules"
    modules.mkdir()
    for i in range(12):
        prose = "Say it at length. " * 20
        functions = "".join(f'def f{j}(x):\n    """What {i} and {j} are for. {prose}"""\n    return x\n\n'
                            for j in range(12))
        (modules / f"m{i}.py").write_text(functions)
    dataset.build_stdlib(modules)
    run(base, "base_train", *TINY, *LENS, "--data=facts", "--max_seq_len=716", "--total_batch_size=1432",
        "--mc_budget=96", "--mc_horizon=12", "--model_tag=facts").ok()
    done = run(base, "mc_eval", "compare", f"--facts_mc={base / 'checkpoints' / 'facts'}", "--contexts=4",
               "--pairs=1").ok()
    (name, task), = json.loads((base / "quickstart" / "report.json").read_text())["tasks"].items()
    of = {row["system"]: row for row in task["rows"]}
    assert name == "facts" and list(of) == [s for s in SYSTEMS if not s.startswith("vanilla")]
    assert task["history"] == 704 and task["contexts"] == 4 and "vanilla" not in task["flops"]
    assert of["mc_oracle"]["entries"] > of["sliding_window"]["entries"] - 32
    assert all(0 <= row["acc"] <= 1 for row in of.values())
    for other in ("sliding_window", "mc_bm25"):
        ahead = task["lens_ahead"][other]
        assert ahead["accuracy"] == pytest.approx(of["mc_lens"]["acc"] - of[other]["acc"]) and 0 < ahead["p"] <= 1
        assert f"LensNet focus minus {SYSTEMS[other][0].removeprefix('MC, ')}, accuracy: " in done.out
    text = task["text"]
    assert text["contexts"] == 4 and text["lens_to_window"] == pytest.approx(text["lens"] - text["window"])
    assert len({text["full"], text["window"], text["lens"]}) == 3 and "Plain held-out code and prose" in done.out


def test_what_compare_refuses_to_begin_with(tmp_path):
    assert "nothing to compare: give --recall_mc" in run(tmp_path, "mc_eval", "compare").error
    assert "--facts_mc=DIR, which is not given" in run(tmp_path, "mc_eval", "compare", "--facts_vanilla=x").error


def numbers(report: Path) -> dict:
    """What depends neither on the clock nor on what is committed."""
    return json.loads(report.read_text())["tasks"]


def test_again(compared, tmp_path):
    """The same numbers, and nothing done to the checkpoints."""
    base, _ = compared
    before = tree(base / "checkpoints")
    compare(base, f"--out={tmp_path / 'again'}").ok()
    first, again = numbers(base / "quickstart" / "report.json"), numbers(tmp_path / "again" / "report.json")
    assert again == first and tree(base / "checkpoints") == before


def test_commit(monkeypatch):
    """Of a checkout, a copy without one, or a machine without git."""
    assert re.fullmatch(r"\S+|not a git checkout", commit())
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() == "not a git checkout"


def test_mc_bench(trained):
    done = run(trained, "mc_bench", "train", f"--checkpoint_dir={trained / 'checkpoints' / 'text_mc'}", "--pairs=2",
               "--steps=1").ok()
    found = json.loads(done.out.splitlines()[-1])
    assert set(found) == {"ratio", "low", "high", "vanilla_s", "mc_s",
                          "parts"} and 0 < found["low"] <= found["ratio"] <= found["high"]
    assert sum(found["parts"].values()) == pytest.approx(found["mc_s"] - found["vanilla_s"])
    printed = dict(re.findall(r"^  (\S.*?) +(-?[\d.]+)% of a vanilla step$", done.out, re.M))
    assert {name: float(share) for name, share in printed.items()} == pytest.approx(
        {name: 100 * seconds / found["vanilla_s"] for name, seconds in found["parts"].items()}, abs=0.051)  # fmt: skip
    assert f"step time MC / vanilla {found['ratio']:.3f} [" in done.out.splitlines()[0]


def test_mc_bench_lens(trained):
    """All kinds judged on the same rows: what does not depend on the lens is the same, what does is not."""
    done = run(trained, "mc_bench", "lens", f"--checkpoint_dir={trained / 'checkpoints' / 'text_mc'}", "--steps=2",
               "--contexts=3", "--horizon=4").ok()
    found = json.loads(done.out.splitlines()[-1])["lenses"]
    assert list(found) == ["bilinear", "transformer", "perceiver",
                           "slots"] and len({row["nats_lens"] for row in found.values()}) == 4
    for kind, row in found.items():
        assert {name: row[name]
                for name in ("nats_even", "nats_least", "won_best", "won_recency")}.items() <= found["bilinear"].items()
        assert row["nats_least"] <= row["nats_lens"] and row["won_lens"] <= row["won_best"] and row["of_the_pass"] > 0
        assert row["nats_lens_gain"][0] == pytest.approx(row["nats_lens"] - found["bilinear"]["nats_lens"])
        assert f"{kind:12s} {row['nats_lens']:.4f} nats" in done.out


def test_mc_stream(trained, tmp_path):
    """The tiny recall model knows nothing, and the numbers say so; every part of the report is there."""
    checkpoints = trained / "checkpoints"
    done = run(trained, "mc_eval", "stream", f"--checkpoint_dir={checkpoints / 'recall_mc'}",
               f"--text_checkpoint_dir={checkpoints / 'text_mc'}", "--streams=2",
               "--windows=8", "--filler=pairs", "--mc_budget=192", "--max_length=4096", "--length_budget=192",
               "--length_streams=1", "--passages=2",
               f"--out={tmp_path / 'out'}").ok()
    summary, report = json.loads(done.out.splitlines()[-1]), json.loads((tmp_path / "out" / "stream.json").read_text())
    assert (summary["n"], summary["windows"], summary["budget"], summary["streams"]) == (1536, 8, 192, 2)
    assert set(summary["accuracy"]) == {"pairs"} and set(summary["accuracy"]["pairs"]) == {"lens", "oracle", "window"}
    for system, found in summary["accuracy"]["pairs"].items():
        assert list(found) == ["1-2", "2-4", "4-8"] and all(0 <= acc < 0.5 for acc in found.values()), system
    assert summary["least_lens"] == min(summary["accuracy"]["pairs"]["lens"].values())
    assert [r["questions"] for r in report["distance"]] == [2] * 9
    assert {(r["group"], r["place"]) for r in report["length"]} == {(f"recall, {g}", n) for g in ("start", "near")
                                                                    for n in ("1024", "4096")}
    assert {(r["system"], r["place"]) for r in report["text"]} == {(s, n) for s in ("lens", "window")
                                                                   for n in ("120", "480", "1920")}
    for row in (*report["distance"], *report["length"], *report["text"]):
        assert row["nll"] > 0 and row["entries"] <= 192 and (row["entries"] > 0) == (row["system"] != "window")
    assert all((tmp_path / "out" / name).exists() for name in ("stream.md", "stream.png", "stream.pdf"))
    assert (tmp_path / "out" / "stream.md").read_text() in done.out


@pytest.mark.parametrize("checkpoint, flags, message", [
    ("recall_vanilla", [], "no MegaContext"), ("text_mc", [], "not on --data=recall"),
    ("recall_mc", ["--windows=1"], "at least 2"),
    ("recall_mc", ["--filler=music"], "pairs, text"), ("recall_mc", ["--mc_budget=64", "--streams=1"], "too small"),
])  # fmt: skip
def test_mistakes_of_mc_stream(checkpoint, flags, message, trained, tmp_path):
    done = run(trained, "mc_eval", "stream", f"--checkpoint_dir={trained / 'checkpoints' / checkpoint}", *flags,
               f"--out={tmp_path / 'out'}")
    assert message in done.error and not (tmp_path / "out").exists()


# -- eval_focus ---------------------------------------------------------------------------------------------------------------  # noqa: E501


def eval_focus(base: Path, out: Path, *flags: str):
    return run(base, "mc_eval", "focus", *flags, "--contexts=2", "--batch=1", "--candidates=1", f"--out={out}")


def test_eval_focus(trained, tmp_path):
    """Recall within and beyond the trained length, text at two budgets, two seeds (the same twice): every
    number of the report is there."""
    recall, text = (trained / "checkpoints" / f"{task}_mc" for task in TASKS)
    done = eval_focus(trained, tmp_path, f"--recall_mc={recall},{recall}", "--recall_sizes=3:1,33:8",
                      f"--text_mc={text}", "--text_budgets=40,48").ok()
    report = json.loads((tmp_path / "focus.json").read_text())
    assert [(s["name"], s["n"], s["budget"], s["seeds"], s["shown"]) for s in report["settings"]] == [
        ("recall, 3 blocks at 1/1", 128, 96, 2, 2), ("recall, 33 blocks at 1/8", 1088, 132, 2, 3),
        ("text (texts), blocks of 8", 120, 40, 1, 4), ("text (texts), blocks of 8", 120, 48, 1, 5)]
    for s in report["settings"]:
        systems = s["systems"]
        assert set(systems) == {*LABELS, "full", "window"}
        for name, row in systems.items():
            assert row["entries"] <= (s["n"] if name == "full" else s["budget"]) and 0 < row["nll"]["mean"] < 20
            assert ("acc" in row) == (s["task"] == "recall") and len(row["nll"]["seeds"]) == s["seeds"]
            if name in (*SCORES, *CHEATS):
                assert row["regret"]["mean"] == pytest.approx(row["nll"]["mean"] - systems["oracle"]["nll"]["mean"],
                                                              abs=1e-6) and row["regret"]["interval"][0] >= 0
                assert 0 <= row["hit_at_1"]["mean"] <= 1 and -1 <= row["spearman"]["mean"] <= 1
        if s["seeds"] == 2:
            assert systems["lens"]["nll"]["seeds"][0] == systems["lens"]["nll"]["seeds"][1]
    last = json.loads(done.out.splitlines()[-1])
    lens = [s["systems"]["lens"] for s in report["settings"][:2]]
    assert last["regret"] == max(row["regret"]["mean"]
                                 for row in lens) and last["hit_at_1"] == min(row["hit_at_1"]["mean"] for row in lens)
    assert last["spearman"] == min(row["spearman"]["mean"]
                                   for row in lens) and last["gap_closed_text"] is None, "untrained: no gap to close"
    assert (tmp_path / "focus.md").read_text() in done.out and last["report"] == str(tmp_path / "focus.json")


def test_eval_focus_on_hops(trained, tmp_path):
    """A tiny model of two hops, trained for two steps: all questions were put, and it knows no answer."""
    flags = ["--data=hops", "--recall_blocks=8", "--max_seq_len=320", "--total_batch_size=640", "--model_tag=hops_mc"]
    base = Path(shutil.copytree(trained, tmp_path / "base", ignore=shutil.ignore_patterns("runs", "tokens-*")))
    run(base, "base_train", *TINY, *LENS, *flags, "--mc_budget=160").ok()
    done = eval_focus(base, tmp_path / "out", f"--hops_mc={base / 'checkpoints' / 'hops_mc'}").ok()
    report = json.loads((tmp_path / "out" / "focus.json").read_text())
    assert [(row["announced"], row["blocks"], row["budget"], row["contexts"])
            for row in report["hops"]] == [(0, 8, 160, 2), (5, 8, 160, 2)]
    for row in report["hops"]:
        assert set(row["systems"]) == {"refocused", "once", "oracle", "window", "full"} and all(one["mean"] < 0.5
                                                                                                for one in row["systems"].values())  # noqa: E501
    last = json.loads(done.out.splitlines()[-1])
    assert last["accuracy_two_hops"] == report["hops"][0]["systems"]["refocused"]["mean"] and last["regret"] is None and report["settings"] == []  # noqa: E501


def test_blocks_of_a_model_that_are_not_the_tasks(trained, tmp_path):
    """Facts stand in blocks of 32 tokens, as in training: recall is judged in the model's blocks,
    chains and streams are refused."""
    base = Path(shutil.copytree(trained, tmp_path / "base", ignore=shutil.ignore_patterns("runs", "tokens-*")))
    for task, flags in {"recall": TASKS["recall"][0], "hops": ["--data=hops", "--recall_blocks=8", "--max_seq_len=320",
                                                               "--total_batch_size=640"]}.items():
        run(base, "base_train", *TINY, *LENS, *flags, "--mc_block_size=8", "--mc_budget=96",
            f"--model_tag={task}_8").ok()
    recall, hops, out = base / "checkpoints" / "recall_8", base / "checkpoints" / "hops_8", f"--out={tmp_path / 'no'}"
    eval_focus(base, tmp_path / "out", f"--recall_mc={recall}", "--recall_sizes=8:2").ok()
    (setting,) = json.loads((tmp_path / "out" / "focus.json").read_text())["settings"]
    assert (setting["n"], setting["budget"], setting["shown"]) == (288, 128,
                                                                   13) and setting["systems"]["lens"]["hit_at_most"] is not None  # noqa: E501
    errors = [run(base, "mc_eval", "focus", f"--hops_mc={hops}", out).error,
              run(base, "mc_eval", "stream", f"--checkpoint_dir={recall}", out).error,
              run(base, "mc_eval", "focus", f"--recall_mc={recall},{trained / 'checkpoints' / 'recall_mc'}", out).error]
    for error, message in zip(errors, ("--mc_block_size=8, --data=hops", "--mc_block_size=8, --data=recall",
                                       "of one block size")):
        assert message in error


def test_text_focus_study(trained, prepared, tmp_path):
    """Every number is there, also from what was kept, and the predictor is left out when it is not asked for."""
    flags = [f"--text_mc={trained / 'checkpoints' / 'long'}", "--contexts=3", "--batch=2", "--candidates=1",
             "--rounds=2", f"--out={tmp_path / 'out'}"]
    base = Path(shutil.copytree(trained, tmp_path / "base", ignore=shutil.ignore_patterns("runs")))
    run(base, "base_train", *TINY, *LENS, f"--data={prepared / 'texts'}", "--max_seq_len=192",
        "--total_batch_size=384", "--mc_block_size=8", "--mc_budget=48",
        "--mc_horizon=8", "--mc_recent=8", "--model_tag=long").ok()
    flags[0] = f"--text_mc={base / 'checkpoints' / 'long'}"
    done = run(base, "mc_eval", "text", *flags, "--train_contexts=4").ok()
    report = json.loads((tmp_path / "out" / "text_focus.json").read_text())
    (setting,) = report["settings"]
    assert (setting["n"], setting["budget"], setting["counts"], setting["contexts"]) == (128, 48, [1, 2, 4, 5], 3)
    for row in setting["summary"]["horizons"].values():
        assert set(row["nll"]) == {"full", "window", "gists", "gists@0",
                                   *(f"{s}@{c}" for s in ("lens", "recency", "random", "bm25", "tail_attention",
                                                          "predictor", "oracle") for c in (1, 2, 4, 5))}
        assert all(row["nll"]["oracle@5"] <= row["nll"][f"{s}@5"]
                   for s in ("lens", "recency", "random",
                             "predictor")) and row["nll"]["oracle@5"] <= row["nll"]["oracle@1"]
    assert (tmp_path / "out" / "text_focus.md").read_text() in done.out
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.npz")}
    again = run(base, "mc_eval", "text", *flags, "--train_contexts=4").ok()
    assert len(kept) == 1 and {p: p.stat().st_mtime_ns
                               for p in (tmp_path
                                         / "out").glob(
                                             "*.npz")} == kept and again.out.splitlines()[-1] == done.out.splitlines()[-1]  # noqa: E501
    run(base, "mc_eval", "text", *flags, "--contexts=1", "--train_contexts=0").ok()
    (setting,) = json.loads((tmp_path / "out" / "text_focus.json").read_text())["settings"]
    assert "predictor@5" not in setting["summary"]["horizons"]["8"]["nll"]
    assert "number of entries" in run(base, "mc_eval", "text", *flags, "--text_budgets=x").error


@pytest.mark.parametrize("flags, message", [
    ([], "nothing to judge"), (["--hops_mc={recall_mc}"], "not trained on --data=hops"),
    (["--recall_mc={recall_vanilla}"], "no MegaContext"), (["--recall_mc={text_mc}"], "not on recall"),
    (["--recall_mc={recall_mc}", "--recall_sizes=64"], "'64' is not blocks:ratio"),
    (["--recall_mc={recall_mc}", "--recall_sizes=64:32"], "too small"),
    (["--text_mc={text_mc}", "--text_budgets=many"], "'many' is no number"),
    (["--text_mc={text_mc},{recall_mc}"], "one shape"),
    (["--text_mc={text_mc}", "--contexts=0"], "--contexts"),
    (["--text_mc={text_mc}", "--contexts=100000"], "the held-out split has"),
])  # fmt: skip
def test_mistakes_of_eval_focus(flags, message, trained, tmp_path):
    places = {p.name: p for p in (trained / "checkpoints").iterdir()}
    done = run(trained, "mc_eval", "focus", *(flag.format(**places) for flag in flags), f"--out={tmp_path / 'out'}")
    assert message in done.error and not (tmp_path / "out").exists()


# -- mistakes -------------------------------------------------------------------------------------------------------------  # noqa: E501


@pytest.fixture(scope="module")
def kept(trained, tmp_path_factory) -> Path:
    """A base directory of checkpoints that nothing here may touch, with no report. `shorter`: of the first step only;
    `unlogged`: copied without its log; `reseeded`: another seed; `slower`: other rates."""
    base = Path(shutil.copytree(trained, tmp_path_factory.mktemp("mistakes") / "base"))
    shutil.rmtree(base / "quickstart", ignore_errors=True)
    shutil.copytree(base / "checkpoints" / "recall_vanilla", base / "checkpoints" / "shorter",
                    ignore=shutil.ignore_patterns("*_000002*"))
    shutil.copytree(base / "checkpoints" / "recall_vanilla", base / "checkpoints" / "unlogged")
    run(base, "base_train", *TINY, *TASKS["recall"][0], "--seed=4", "--model_tag=reseeded").ok()
    run(base, "base_train", *TINY, *TASKS["recall"][0], "--matrix_lr=0.01", "--recall_grow=0.1", "--keep_last=1",
        "--model_tag=slower").ok()
    return base


MISTAKES = {  # flag -> the checkpoint named instead, and what the line says
    "missing": ("recall_mc", "nowhere", "no checkpoint directory"),
    "missing vanilla": ("recall_vanilla", "nowhere", "no checkpoint directory"),
    "missing text": ("text_mc", "nowhere", "no checkpoint directory"),
    "vanilla as mc": ("recall_mc", "recall_vanilla", "has no MegaContext"),
    "mc as vanilla": ("recall_vanilla", "recall_mc", "--mc_enabled=1"),
    "fewer tokens": ("recall_vanilla", "shorter", "differ in tokens"),
    "another seed": ("recall_vanilla", "reseeded", "differ in --seed:"),
    "other rates": ("recall_vanilla", "slower", "differ in --matrix_lr, --recall_grow:"),
    "no log": ("recall_vanilla", "unlogged", "metrics.jsonl: the training's log"),
    "another shape": ("recall_vanilla", "text_vanilla", "differ in model_config"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_checkpoint(mistake, kept):
    flag, instead, message = MISTAKES[mistake]
    before = tree(kept)
    done = compare(kept, **{flag: kept / "checkpoints" / instead})
    assert message in done.error and instead in done.error and tree(kept) == before
    assert not done.out, "seen only after minutes of work"


def test_impossible_values(kept, tmp_path):
    before = tree(kept)
    assert "--contexts" in compare(kept, contexts=0).error
    assert "--batch" in compare(kept, "--batch=0").error
    assert "--contexts: invalid int value: 'many'" in compare(kept, "--contexts=many").error
    assert "unrecognized arguments: --context=3" in compare(kept, "--context=3").error
    assert "give --recall_mc" in run(kept, "mc_eval", "compare").error
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in compare(kept, f"--out={tmp_path / 'file'}").error
    assert tree(kept) == before


def test_another_tokenizer(kept, tmp_path):
    base = Path(shutil.copytree(kept, tmp_path / "base"))
    run(base, "tok_train", f"--data={ROOT / 'nanochat'}", "--vocab_size=300").ok()
    before = tree(base)
    assert "tokenizer" in compare(base).error and tree(base) == before
    assert "tokenizer" in run(base, "mc_bench", "train", f"--checkpoint_dir={base / 'checkpoints' / 'text_mc'}").error


@pytest.mark.parametrize(("checkpoint", "flags", "message"), [
    ("nowhere", [], "no checkpoint directory"), ("text_vanilla", [], "--mc_enabled=0"),
    ("text_mc", ["--pairs=0"], "--pairs=0"),
    ("text_mc", ["--steps=0"], "--steps=0"),
    ("text_mc", ["--device=tpu"], "--device: invalid choice: 'tpu'")])  # fmt: skip
def test_mistakes_of_mc_bench(checkpoint, flags, message, kept):
    before = tree(kept)
    assert message in run(kept, "mc_bench", "train", f"--checkpoint_dir={kept / 'checkpoints' / checkpoint}",
                          *flags).error
    assert tree(kept) == before


# -- quickstart -----------------------------------------------------------------------------------------------------------  # noqa: E501

STUB = """#!/bin/sh
printf '%s\\0' "$(basename "$0")" "$@" >> "$RECORD"
printf '\\n' >> "$RECORD"
"""


def quickstart(folder: Path, **env: str) -> list[list[str]]:
    """The commands that quickstart.sh gives, without running them: python and torchrun only
    write down their arguments."""
    stubs, record = folder / "stubs", folder / "record"
    stubs.mkdir(exist_ok=True)
    record.write_text("")
    for name in ("python", "torchrun"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SEED")}
    subprocess.run(["bash", str(ROOT / "runs" / "quickstart.sh")], cwd=folder, check=True, capture_output=True,
                   timeout=60, env={
        **clean, "PATH": f"{stubs}:{os.environ['PATH']}", "RECORD": str(record), "NO_INSTALL": "1",
                       "NANOCHAT_BASE_DIR": str(folder / "base"), **env})
    return [line.rstrip("\0").split("\0") for line in record.read_text().splitlines()]


def trainings(commands: list[list[str]]) -> list[list[str]]:
    """The flags of base_train in each call of torchrun."""
    return [words[words.index("scripts/base_train.py") + 1:] for words in commands if words[0] == "torchrun"]


def parsed(flags: list[str]) -> dict:
    return vars(base_train.make_parser().parse_args(flags))


def test_quickstart_trains_twins(tmp_path):
    """Recall twice, differing in MegaContext alone, at equal tokens, seed and shape; facts in text from the first of
    them; and every flag is accepted."""
    commands = quickstart(tmp_path, SEED="7")
    assert [words[0] for words in commands] == ["python", *["torchrun"] * 3, "python", "python"]
    assert commands[0][:3] == ["python", "-m", "scripts.tok_train"]
    flags = trainings(commands)
    planned = [start(tmp_path / "base", "base_train", *words, "--dry_run=1", "--vocab_size=4096") for words in flags]
    plans = [json.loads(plan.wait().ok().out) for plan in planned]
    mc, vanilla, facts = plans
    assert (mc["mc"], vanilla["mc"], facts["mc"]) == (True, False, True)
    same = ("layers", "width", "heads", "vocabulary", "sequence", "rows_per_step", "tokens_per_step", "accumulation",
            "iterations", "tokens")
    assert {name: mc[name] for name in same} == {name: vanilla[name] for name in same}
    assert mc["flops"] > vanilla["flops"] and mc["parameters"] > vanilla["parameters"] and facts["width"] == mc["width"]
    a, b = ({k: v for k, v in parsed(words).items() if not k.startswith("mc_") and k != "model_tag"}
            for words in flags[:2])
    assert a == b and a["seed"] == parsed(flags[2])["seed"] == 7
    tags = [parsed(words)["model_tag"] for words in flags]
    assert len(set(tags)) == 3 and [parsed(words)["data"] for words in flags] == ["recall", "recall", "facts"]
    assert parsed(flags[2])["init_from"] == str(tmp_path / "base" / "checkpoints" / tags[0])
    assert commands[-2][:3] == ["python", "-m", "scripts.mc_eval"]
    args = vars(make_parser().parse_args(commands[-2][3:]))
    places = [tmp_path / "base" / "checkpoints" / tag for tag in tags]
    assert [args[name] for name in ("recall_mc", "recall_vanilla", "facts_mc")] == places
    assert args["out"] == tmp_path / "base" / "quickstart"
    assert commands[-1][:3] == ["python", "-m", "scripts.mc_eval"]
    assert make_parser().parse_args(commands[-1][3:]).checkpoint_dir == places[0]


def test_quickstart_reuses_what_is_there(tmp_path):
    """Each training is left out once its last step's record is there, and resumed before."""
    base = tmp_path / "base"
    (base / "tokenizer").mkdir(parents=True)
    (base / "tokenizer" / "tokenizer.json").write_text("{}")
    commands = quickstart(tmp_path)
    assert [words[0] for words in commands] == ["torchrun"] * 3 + ["python"] * 2
    for words in trainings(commands):
        flags = parsed(words)
        assert flags["resume"] == 1
        directory = base / "checkpoints" / flags["model_tag"]
        directory.mkdir(parents=True)
        (directory / f"complete_{flags['num_iterations']:06d}.json").write_text("{}")
    assert [words[0] for words in quickstart(tmp_path)] == ["python"] * 2
    assert len(trainings(quickstart(tmp_path, SEED="8"))) == 3
