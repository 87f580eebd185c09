"""The benchmark runner, end to end, on a suite that takes seconds: killed and resumed, one cell again
from its record, bad input."""

import json
import shutil
import time

import pytest
from e2e_commands import run, start
from test_study import BASE

SUITE = """
title: seconds
seeds: [1, 2]
texts: {{code: {texts}}}
files: {{qa: {{path: {files}/qa.jsonl, format: kvpress}}}}
models: {{m: {{train: {base}, finetune: {{steps: 1, rows: 2, lr_scales: "0.1", dev: 1, budgets: "40", history: 64, horizon: 16}}}}}}
cells:
  - {{model: m, tasks: [code], systems: [full, window, gists_lens], lengths: [64], budgets: [40, 48], documents: 4, batch: 2}}
  - {{model: m, tasks: [qa], systems: [window], lengths: [64], budgets: [40], documents: 2, batch: 2}}
"""  # noqa: E501
CONTEXTS = ["too short", "one two three " * 80, "four five six " * 120]


@pytest.fixture(scope="module")
def suite(prepared, tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "seconds.yaml"
    (path.parent / "qa.jsonl").write_text("".join(json.dumps({"context": c, "question": "what?", "answer": " seven",
                                                              "answer_prefix": " It is"}) + "\n" for c in CONTEXTS))
    path.write_text(SUITE.format(texts=prepared / "texts", files=path.parent,
                                 base=BASE.replace("data: random", f"data: {prepared / 'texts'}")))
    return path


def records(base) -> list[dict]:
    return [json.loads(line)
            for line in next((base / "evals").glob("*/seconds/results.jsonl")).read_text().splitlines()]


def numbers(base) -> dict[str, dict]:
    return {r["key"]: {name: value for name, value in r["results"].items() if name != "seconds"} for r in records(base)}


def test_a_suite_resumes_and_its_cells_can_be_run_again(suite, base, prepared, tmp_path):
    other = shutil.copytree(prepared / "base", tmp_path / "other" / "base")
    under_way, deadline = start(base, "mc_study", "suite", str(suite)), time.monotonic() + 900
    while not list((base / "evals").glob("*/seconds/results.jsonl")) or len(records(base)) < 3:
        assert time.monotonic() < deadline and under_way.process.is_alive()
        time.sleep(0.02)
    under_way.kill()
    first = records(base)
    done = run(base, "mc_study", "suite", str(suite)).ok()
    assert records(base)[: len(first)] == first and len(records(base)) == 12 and len(numbers(base)) == 12
    assert "12 cells, " in done.out and "training" not in done.out.split("12 cells")[1]
    last = json.loads(done.out.splitlines()[-1])
    assert last["cells"] == 12 and "| gists + LensNet (MC) |" in done.out and "**2 seeds only" in done.out
    record = records(base)[0]
    assert {"commit", "environment", "model", "results",
            "seed"} <= record.keys() and len(record["results"]["nll"]) == 4 and record["results"]["buckets"]["never"]

    results = next((base / "evals").glob("*/seconds/results.jsonl"))
    line = 1 + next(i for i, r in enumerate(records(base)) if r["system"] == "gists_lens")
    recorded = records(base)[line - 1]
    external = next(i for i, r in enumerate(records(base), 1) if r["task"] == "qa")
    assert json.loads(run(base, "mc_study", "suite", f"--rerun={results}:{external}").ok().out.splitlines()[-1])["same"]
    alone = tmp_path / "record.jsonl"
    alone.write_text(results.read_text().splitlines()[line - 1] + "\n")
    again = json.loads(run(base, "mc_study", "suite", f"--rerun={results}:{line}").ok().out.splitlines()[-1])
    assert again["same"] and again["nll"] == pytest.approx(sum(recorded["results"]["nll"]) / 4, abs=0)
    # trains what it needs
    elsewhere = json.loads(run(other, "mc_study", "suite", f"--rerun={alone}:1").ok().out.splitlines()[-1])
    assert elsewhere == again

    alone.write_text(json.dumps(recorded | {"results": recorded["results"] | {"nll": [9.0] * 4}}) + "\n")
    wrong = run(base, "mc_study", "suite", f"--rerun={alone}:1")
    assert wrong.code == 1 and not json.loads(wrong.out.splitlines()[-1])["same"]

    changed = tmp_path / "seconds.yaml"  # the same tags: their checkpoints are no longer what the suite says
    changed.write_text(suite.read_text().replace("mc_lens_key_dim: 8", "mc_lens_key_dim: 16"))
    stale = run(base, "mc_study", "suite", str(changed))
    assert stale.code and "was trained with --mc_lens_key_dim=8, the suite asks for 16" in stale.error and len(records(base)) == 12  # noqa: E501


@pytest.mark.parametrize(("flags", "error"), [
    ([], "name one of"), (["quick", "--rerun=x:1"], "name one of"),
    (["--rerun=nothing.jsonl:1"], "--rerun=nothing.jsonl:1: no record"), (["nothing.yaml"], "cannot read nothing.yaml"),
    (["quick", "--seeds=one"], "--seeds=one"), (["quick", "--report=1"], "no results"),
    (["quick", "--jobs=0"], "--jobs=0")])
def test_refused(base, flags, error):
    assert error in run(base, "mc_study", "suite", *flags).error and not (base / "evals").exists()


def test_shipped_suites_are_understood(monkeypatch):
    from scripts.studies.suite import read_suite
    from scripts.studies.run_suite import SUITES
    for path in SUITES.glob("*.yaml"):
        suite = read_suite(path)
        assert suite.cells(suite.seeds) and all(suite.model(name, 1)["flags"] for name in suite.models)
