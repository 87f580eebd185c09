import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from scripts.eval.statistics import Bootstrap, bootstrap_p, false_discovery, interval, t_test
from scripts.studies.cells import CellRecords, read_yaml, run_cells, whole_numbers
from scripts.studies.formula import Formula

# -- statistics -----------------------------------------------------------------------------------------------------------  # noqa: E501


@pytest.mark.parametrize(("df", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045)])
def test_t_agrees_with_the_printed_table(df, quantile):
    spread = np.arange(df + 1) - df / 2
    error = spread.std(ddof=1) / math.sqrt(df + 1)

    def p(t: float) -> float:
        return t_test(spread + t * error)[1]

    assert p(quantile) == pytest.approx(0.05, abs=5e-5) and p(-quantile) == pytest.approx(p(quantile), abs=1e-9)
    assert p(0) == pytest.approx(1, abs=1e-9) and p(1e6) < 1e-4


def test_t_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t = 2√3; with two degrees of freedom
    P(|T| ≥ t) = 1 − t/√(t² + 2)."""
    (low, high), p = t_test(np.array([1.0, 2.0, 3.0]))
    assert p == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)
    assert (low + high) / 2 == pytest.approx(2) and high - 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert t_test(np.full(4, 2.0)) == ((2.0, 2.0), 0.0) and t_test(np.zeros(3))[1] == 1
    assert all(math.isnan(x) for x in (t_test(np.array([1.0]))[1], *t_test(np.array([1.0]))[0]))


def test_false_discovery_by_hand():
    assert false_discovery([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert false_discovery([0.5, 0.6, 0.001]) == pytest.approx([0.6, 0.6, 0.003])
    assert false_discovery([0.02, math.nan, 0.01])[0::2] == pytest.approx([0.02,
                                                                           0.02]) and math.isnan(false_discovery([math.nan])[0])  # noqa: E501


def test_bootstrap_of_one_seed_is_that_of_a_mean():
    x = np.random.default_rng(2).normal(3, 2, (1, 400))
    low, high = interval(Bootstrap(1, 400).means(x))
    error = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - error, abs=0.1 * error) and high == pytest.approx(x.mean() + error,
                                                                                             abs=0.1 * error)


def test_bootstrap_sees_seeds_and_documents():
    """Seeds that differ widen the interval, documents that differ too; where nothing differs there is none."""
    draws, effect = Bootstrap(4, 100), np.random.default_rng(0).normal(size=100)
    width = {name: np.ptp(interval(draws.means(x))) for name, x in {
        "nothing": np.ones((4, 100)), "seeds": np.arange(4.0)[:, None] + np.zeros(100),
        "documents": effect + np.zeros((4, 1)),
        "both": np.arange(4.0)[:, None] + effect}.items()}
    assert width["nothing"] == pytest.approx(0, abs=1e-12)
    # as if there were one seed: they agree
    assert width["documents"] == pytest.approx(2 * 1.96 * effect.std() / 10, rel=0.1)
    # t with three degrees of freedom
    assert width["seeds"] == pytest.approx(2 * 3.18 * np.arange(4).std(ddof=1) / 2, rel=0.1)
    assert width["both"] > max(width["seeds"], width["documents"])


def test_bootstrap_is_paired():
    """A small difference behind a large common noise."""
    noise = np.random.default_rng(1).normal(0, 5, (3, 60))
    draws = Bootstrap(3, 60)
    difference = draws.means(noise + 0.1 + 0.01 * noise) - draws.means(noise)
    low, high = interval(difference)
    assert low < 0.1 + 0.01 * noise.mean() < high and high - low < 0.1
    assert bootstrap_p(difference) == bootstrap_p(-difference) and bootstrap_p(draws.means(np.ones((3, 60)))) == 2 / (len(difference) + 1)  # noqa: E501
    assert bootstrap_p(np.r_[np.ones(50), -np.ones(50)]) == 1 and math.isnan(bootstrap_p(np.array([1.0, math.nan])))


def test_seeds_alone_are_the_t_test():
    x_S = np.array([0.3, 0.1, 0.45])
    drawn = Bootstrap(3, 5, draws=200_000).means(np.repeat(x_S[:, None], 5, 1))
    (low, high), p = t_test(x_S)
    assert interval(drawn) == pytest.approx((low, high), rel=0.02) and bootstrap_p(drawn) == pytest.approx(p, rel=0.05)


@pytest.mark.parametrize("by_seed, by_document, by_both", [(0.1, 0, 0), (0.1, 0, 0.3), (0, 0.3, 0.1), (0, 0, 0.3)])
def test_false_positives_with_three_seeds(by_seed, by_document, by_both):
    """Where there is no effect, no more than one in twenty is called significant, whatever the noise comes from."""
    rng, draws, found = np.random.default_rng(0), Bootstrap(3, 24, draws=1000), []
    for _ in range(300):
        x_SC = (by_seed * rng.normal(size=(3, 1)) + by_document * rng.normal(size=(1, 24))
                + by_both * rng.normal(size=(3, 24)))
        found.append(bootstrap_p(draws.means(x_SC)))
    assert np.mean(np.array(found) < 0.05) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300) and min(found) > 0.001


@given(st.lists(st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=3, max_size=3), min_size=1, max_size=4))
def test_means_against_drawing_one_by_one(values):
    x = np.array(values)
    draws = Bootstrap(len(x), 3, draws=20)
    mean = lambda cells: float(np.mean(kept)) if len(kept := [v for v in cells if not math.isnan(v)]) else math.nan
    for d, drawn in enumerate(draws.means(x)):
        columns = [mean(x[:, c]) for c in range(3) for _ in range(int(draws.documents_DC[d, c]))]
        by_seed = sum(weight * mean(row) for weight, row in zip(draws.seeds_DS[d], x))
        assert len(columns) == 3
        assert drawn == pytest.approx(by_seed + mean(columns) - mean(x.flat), abs=1e-9, nan_ok=True)


# -- formulas -------------------------------------------------------------------------------------------------------------  # noqa: E501


@given(st.floats(-10, 10), st.floats(1, 10))
def test_formulas(a, b):
    values = {"a": np.array([a, 1.0]), "b": np.array([b, 2.0])}
    formula = Formula("-(a - 2*b) / b + 1")
    assert formula.names == {"a", "b"} and formula(values) == pytest.approx(np.array([-(a - 2 * b) / b + 1, 2.5]))


@pytest.mark.parametrize("text", ["a +", "f(a)", "a.b", "a if b else 1", "'x'", "a ** 2", "[a]", "__import__('os')"])
def test_formulas_are_arithmetic_only(text):
    with pytest.raises(UserError, match="no arithmetic"):
        Formula(text)


# -- records --------------------------------------------------------------------------------------------------------------  # noqa: E501


def test_records_survive_torn_lines(tmp_path, capsys):
    records = CellRecords(tmp_path / "new" / "results.jsonl")
    assert records.read() == {}
    records.append({"key": "a", "x": 1})
    with open(records.path, "a") as f:
        f.write('{"key": "b", "x"')  # a run was killed here
    records.append({"key": "c", "x": 3})
    records.append({"key": "a", "x": 4})
    with open(records.path, "a") as f:
        f.write('[1]\n{"x": 2}\n')
    assert records.read() == {"a": {"key": "a", "x": 4}, "c": {"key": "c", "x": 3}}
    warned = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2].split()[0] for line in warned] == ["2", "5", "6"]


def cells(tmp_path, values) -> list[dict]:
    return [{"key": f"k{value}", "name": f"cell {value}", "value": value, "marks": str(tmp_path / "marks")}
            for value in values]


def test_cells_are_run_once(tmp_path, capsys):
    records = CellRecords(tmp_path / "results.jsonl")
    run_cells(cells(tmp_path, [1, 2]), "experiment_cells:note", records, what="test")
    run_cells(cells(tmp_path, [2, 3, 1]), "experiment_cells:note", records, what="test", jobs=2)
    assert sorted((tmp_path / "marks").read_text().split()) == ["k1", "k2", "k3"]
    found = records.read()
    assert {key: record["results"]["double"] for key, record in found.items()} == {"k1": 2, "k2": 4, "k3": 6}
    assert all({"commit", "environment", "seconds", "time"} <= record.keys() for record in found.values())
    assert "3 cells, 2 of them done before" in capsys.readouterr().out


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_another_runner_has_finished_is_left(tmp_path, jobs):
    """Two of one key, both waiting: as when two runners share a folder. The second finds a record and does nothing."""
    run_cells(cells(tmp_path, [1, 1]), "experiment_cells:note", CellRecords(tmp_path / "results.jsonl"), what="test",
              jobs=jobs)
    assert (tmp_path / "marks").read_text().split() == ["k1"]


def test_a_failing_cell_does_not_stop_the_others(tmp_path, capsys):
    records = CellRecords(tmp_path / "results.jsonl")
    with pytest.raises(UserError, match="3 of 5 cells failed, the others are recorded; the first: cell 1: one is too "
                                        "many; log: "):
        run_cells(cells(tmp_path, [0, 1, 2, 3, 4]), "experiment_cells:fail", records, what="test")
    assert set(records.read()) == {"k0", "k4"}
    printed = capsys.readouterr().out
    assert "ZeroDivisionError: two" in printed and "ended with code -9" in printed
    assert "Traceback" in (tmp_path / "logs" / "k2.log").read_text()


def test_a_function_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no function experiment_cells:nothing"):
        run_cells(cells(tmp_path, [1]), "experiment_cells:nothing", CellRecords(tmp_path / "results.jsonl"),
                  what="test")


# -- input ----------------------------------------------------------------------------------------------------------------  # noqa: E501


@pytest.mark.parametrize(("text", "error"), [
    ("a: [1", "is not YAML"), ("- 1", "is not a mapping"), ("a: 1\nz: 2", "unknown key z; known are a, b"),
    ("b: 1", "a is missing")])
def test_bad_yaml(tmp_path, text, error):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=error) as found:
        read_yaml(path, ("a", "b"), ("a",))
    assert "\n" not in str(found.value) and "x.yaml" in str(found.value)


def test_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    with pytest.raises(UserError, match="cannot read"):
        read_yaml(path, ("a",), ("a",))
    path.write_text("a: {b: 1}")
    assert read_yaml(path, ("a",), ("a",)) == {"a": {"b": 1}} and json.dumps(read_yaml(path, ("a",), ()))


def test_whole_numbers():
    assert whole_numbers("1,2, 30", "--seeds") == [1, 2, 30]
    with pytest.raises(UserError, match="--seeds=1,x"):
        whole_numbers("1,x", "--seeds")
