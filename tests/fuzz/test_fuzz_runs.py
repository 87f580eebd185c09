"""Logs of runs: metrics.jsonl as mc_dash and a resumed run read it, and the records of experiments."""

import json
from pathlib import Path

import pytest
from fuzzing import Intact, changes, command, dumped, fuzzed, image, json_changes, put_image, tried

from mc.observe.dashboards import METRICS
from nanochat.telemetry.recorder import Recorder
from scripts import mc_dash
from scripts.studies.cells import CellRecords


@pytest.fixture(scope="module")
def metrics(tmp_path_factory) -> bytes:
    """What the recorder writes: every metric there is, some with attributes, over a few steps."""
    folder = tmp_path_factory.mktemp("metrics")
    with Recorder(folder) as recorder:
        for step in range(4):
            for i, name in enumerate(METRICS):
                recorder.record(name, (i + step) % 7 / 3 - 0.5, **({"lod": step % 3} if i % 5 == 0 else {}))
            recorder.flush(step)
    return Intact((folder / "metrics.jsonl").read_bytes())


@fuzzed(changes())
def test_bytes_of_metrics(metrics, work, change):
    dash(work, change(metrics))


@fuzzed(json_changes(3))
def test_values_of_metrics(metrics, work, change):
    rows = change([json.loads(line) for line in metrics.splitlines()])
    dash(work, b"".join(dumped(row) + b"\n" for row in rows) if isinstance(rows, list) else dumped(rows))


def dash(work: Path, data: bytes) -> None:
    """The page is there and whole, or not there; the log is as it was."""
    put_image(work, {"metrics.jsonl": data})
    done = command("metrics.jsonl, mc_dash", mc_dash.main, str(work))
    assert (work / "metrics.jsonl").read_bytes() == data
    assert image(work).keys() == ({"metrics.jsonl", "dash.html"} if done else {"metrics.jsonl"})
    assert not done or (work / "dash.html").read_text().endswith("</html>\n")


@fuzzed(changes())
def test_a_resumed_run_goes_on_behind_what_is_there(metrics, work, change):
    """Whole lines stay as they are, and the new one can be read by itself."""
    data = change(metrics)
    path = put_image(work, {"metrics.jsonl": data}) / "metrics.jsonl"

    def go_on() -> None:
        with Recorder(work) as recorder:
            recorder.record("train.loss", 1.0)
            recorder.flush(10**6)

    tried("metrics.jsonl, resume", go_on)
    assert path.read_bytes().startswith(data[:data.rfind(b"\n") + 1])
    assert json.loads(path.read_bytes().splitlines()[-1])["step"] == 10**6


@fuzzed(changes())
def test_records_of_experiments(work, change):
    """A line that is no record is left out, and said; the others are read, and a new one goes behind them."""
    rows = [{"key": f"{i:012x}", "results": {"nll": [0.1 * i, 2.0]}, "name": f"cell {i}"} for i in range(6)]
    records = CellRecords(put_image(work,
                                    {"results.jsonl": change(b"".join(dumped(row) + b"\n"
                                                                      for row in rows))}) / "results.jsonl")
    found = tried("records of experiments", records.read)
    records.append({"key": "new"})
    assert records.read() == {**found, "new": {"key": "new"}}
