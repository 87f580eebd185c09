import math

import numpy as np
import pytest
from matplotlib.image import imread

from nanochat.common import UserError
from scripts.studies import study as ablation
from scripts.studies.formula import Formula
from scripts.studies.study import estimates, read_study, step_time_cells, study_report, study_results

BASE = ("{data: random, depth: 2, aspect_ratio: 16, head_dim: 16, max_seq_len: 128, device_batch_size: 2, "
        "total_batch_size: 256, num_iterations: 6, eval_every: 0, "
        "eval_tokens: 256, save_every: 2, mc_enabled: 1, mc_block_size: 8, mc_budget: 40, mc_horizon: 8, mc_recent: 8, "
        "mc_start: 0.2, mc_ramp: 2, mc_lens_queries: 48, "
        "mc_lens_key_dim: 8, mc_gist_width: 16}")
STUDY = f"""
question: What does a teacher matter?
base: {BASE}
seeds: [1, 2]
factors: {{mc_teacher: [attention], evaluate.contexts: [3]}}
arms: {{both: {{mc_teacher: attention, mc_lens_keys: 2}}}}
evaluate: {{function: "scripts.eval.measures:focus", contexts: 4}}
report: {{regret: nll_lens - nll_oracle, closed: (nll_window - nll_lens) / (nll_window - nll_full)}}
step_time: {{pairs: 2, steps: 1}}
"""


def write(path, text=STUDY):
    path.write_text(text)
    return path


def study_of(tmp_path, **replaced):
    return read_study(write(tmp_path / "study.yaml",
                            f"question: q\nbase: {{}}\nseeds: [1, 2, 3]\nevaluate: {{function: f}}\nfactors: "
                            f"{replaced.get('factors', {})}\nreport: {replaced.get('report', {})}"))


# -- what a study says
# ----------------------------------------------------------------------------------------------------


def test_arms_change_one_thing(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/data")
    study = read_study(write(tmp_path / "s.yaml",
                             STUDY.replace("data: random",
                                           "data: $SOMEWHERE/x, init_from: 'base_{seed}', smear: true")))
    assert list(study.arms) == ["default", "mc_teacher=attention", "contexts=3", "both"]
    default = study.flags("default", 7)
    assert (default["data"], default["init_from"], default["smear"]) == ("/data/x", "base_7",
                                                                         "1") and "mc_teacher" not in default
    assert study.flags("mc_teacher=attention", 7) == default | {"mc_teacher": "attention"}
    assert study.flags("both", 7) == default | {"mc_teacher": "attention", "mc_lens_keys": "2"}
    assert study.flags("contexts=3", 7) == default and study.options("contexts=3", 7)["contexts"] == 3
    cell, other = study.cell("default", 7), study.cell("contexts=3", 7)
    assert cell["model_tag"] == other["model_tag"] and cell["key"] != other["key"]
    assert len({study.cell(arm, seed)["model_tag"] for arm in study.arms for seed in (1, 2)}) == 6


@pytest.mark.parametrize(("old", "new", "error"), [
    ("seeds: [1, 2]", "seeds: 3", "seeds must be a list"),
    ("seeds: [1, 2]", "seeds: [1, 1]", "different whole numbers"),
    ("arms: {both:", "arms: {default:", "'default' names the arm"),
    ("mc_teacher: [attention]", "mc_teacher: attention", "mc_teacher: a factor is a list"),
    ("{both: {mc_teacher: attention, mc_lens_keys: 2}}", "{both: 3}", "an arm a mapping"),
    ("contexts: 4}", "contexts: 4, command: x}", "a function or a command"),
    ("nll_lens - nll_oracle", "max(nll_lens)", "no arithmetic"),
    ("data: random", "data: random, seed: 3", "seeds belong"), ("base: {", "base: 3\nx: {", "unknown key x")])
def test_bad_studies(tmp_path, old, new, error):
    assert old in STUDY
    with pytest.raises(UserError, match=error):
        read_study(write(tmp_path / "s.yaml", STUDY.replace(old, new)))


def test_step_times_are_of_a_seed_that_was_run(tmp_path):
    """`--seeds=2` has trained nothing else. The keys of old records stay."""
    study = read_study(write(tmp_path / "study.yaml", STUDY))
    first, second = (step_time_cells(study, list(study.arms), seed) for seed in (1, 2))
    assert [cell["key"] for cell in first] == ["time-9f5175511559", "time-22cd8eb0067f"]
    assert {tag for cell in second for tag in (cell["model_tag"], cell["against"])} == {study.cell(arm, 2)["model_tag"]
                                                                                        for arm in study.arms}
    done = {cell["key"]: {"results": {"ratio": ratio}}
            for ratio, cell in ((1.5, second[0]), (1.6, second[1]), (1.1, first[1]))}
    assert study_results(study, done, [1, 2])[1] == {"mc_teacher=attention": {"ratio": 1.5}, "both": {"ratio": 1.1}}


# -- estimates ------------------------------------------------------------------------------------------------------------  # noqa: E501


def record(**results) -> dict:
    return {"results": {name: list(values) for name, values in results.items()}, "commit": "abc"}


def test_difference_to_the_default_is_paired():
    rng = np.random.default_rng(0)
    records = {}
    for seed in (1, 2, 3, 4):
        hard = rng.normal(3, 2, 50)
        records["default", seed] = record(x=hard)
        records["better", seed] = record(x=hard - 0.2 + rng.normal(0, 0.05, 50))
        records["same", seed] = record(x=hard)
    del records["better", 4]
    found = estimates(Formula("x"), records, ["default", "better", "same"])
    better, same = found["better"], found["same"]
    assert better.difference == pytest.approx(-0.2,
                                              abs=0.03) and better.difference_interval[0] < -0.2 < better.difference_interval[1] < -0.15 and better.p < 0.01  # noqa: E501
    assert better.interval[1] - better.interval[0] > 0.5  # of the mean itself: contexts differ much more
    assert (same.difference, same.difference_interval, same.p) == (0, (0, 0), 1)
    assert found["default"].mean == pytest.approx(np.mean([records["default", s]["results"]["x"]
                                                           for s in (1, 2, 3, 4)]))
    assert math.isnan(found["default"].p)
    one = estimates(Formula("x"), {key: r for key, r in records.items() if key[1] == 1},
                    ["default", "better"])["better"]
    assert one.difference_interval[1] < 0 and math.isnan(one.p)  # one seed says nothing about others


def test_one_number_per_seed_is_a_t_test():
    records = {(arm, seed): {"results": {"x": value}, "commit": "a"} for seed in (1, 2, 3)
               for arm, value in (("default", seed), ("arm", 2 * seed))}
    found = estimates(Formula("x"), records, ["default", "arm"])["arm"]
    assert found.difference == 2 and found.p == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)


def test_measures_must_fit():
    records = {("default", 1): record(x=[1, 2], y=[1, 2, 3]), ("default", 2): record(x=[1, 2, 3], y=[1, 2, 3])}
    with pytest.raises(UserError, match="no measure z; there are x, y"):
        estimates(Formula("z"), records, ["default"])
    with pytest.raises(UserError, match="different numbers of contexts in different cells"):
        estimates(Formula("x"), records, ["default"])
    del records["default", 2]
    with pytest.raises(UserError, match=r"different numbers of contexts \(2, 3\)"):
        estimates(Formula("x - y"), records, ["default"])


def test_table(tmp_path):
    study = study_of(tmp_path, factors="{a: [1]}")
    records = {(arm, seed): record(x=np.arange(4.0) + (arm != "default")) for arm in study.arms for seed in (1, 2, 3)}
    text, found = study_report(study, records, {"a=1": {"ratio": 1.5, "low": 1.4, "high": 1.6}})
    assert "| default | 3 | 1.500 [" in text and "| a=1 | 3 | 2.500 [" in text and "| +1.000 [+1.000, +1.000] | 0.0005 |" in text  # noqa: E501
    assert "| a=1 | 1.500 [1.400, 1.600] |" in text and "paired: t-distribution over seeds and bootstrap over 4 contexts" in text and "Commits: abc. Seeds: 1, 2, 3." in text  # noqa: E501
    assert found["x"]["a=1"].difference == 1
    ablation.plot_study(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF") and imread(tmp_path / "plot.png").shape[0] > 200
