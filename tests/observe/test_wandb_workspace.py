"""The dashboards as a workspace of Weights & Biases: the committed file against the registry and a run's keys; with
its library, that the file is current, loads, and is what is saved."""

import json
import re
import sys
from pathlib import Path

import pytest

from mc.observe.dashboards import DASHBOARDS
from mc.observe.wandb_workspace import NEEDS, logged_key, save_workspace, workspace_file
from nanochat.common import UserError
from nanochat.telemetry.metrics import METRICS
from nanochat.telemetry.sinks import read_metrics
from scripts import mc_dash

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "runs" / "observability" / "wandb_workspace.json"
SECTIONS = json.loads(FILE.read_text(encoding="utf-8"))["spec"]["section"]["panelBankConfig"]["sections"]
PLOTS = [p["config"] for s in SECTIONS for p in s["panels"] if p["viewType"] == "Run History Line Plot"]
KEYS = {logged_key(name, {}): name for name in METRICS}


def named(plot: dict) -> set[str]:
    """Metrics, as they are logged, that a plot names; of a pattern those before any attribute."""
    whole = "|".join(plot["metrics"]) or plot["metricRegex"].removeprefix("^(").removesuffix(")$")
    return {re.sub(r"\\(.)", r"\1", part).partition("{")[0]
            for part in re.split(r"\|", re.sub(r"\(\[\^}\]\*,\)\?", "", whole))}


def test_every_panel_names_metrics_that_exist_and_every_metric_has_a_panel():
    shown = [(plot["chartTitle"], name) for plot in PLOTS for name in named(plot)]
    assert [pair for pair in shown if pair[1] not in KEYS] == []
    assert {KEYS[name] for _, name in shown} == {name for board in DASHBOARDS for panel in board.panels
                                                 for line in panel.lines for name in line.expr.metrics()}
    assert {plot["xAxis"] for plot in PLOTS} == {"step", *(logged_key(panel.x, {}) for board in DASHBOARDS
                                                           for panel in board.panels if panel.x)}
    assert all(bool(plot["metrics"]) != bool(plot.get("useMetricRegex")) for plot in PLOTS)


def test_sections_are_the_rows_of_the_dashboards():
    rows = [(title, panels) for board in DASHBOARDS for title, panels in board.rows.items()]
    assert len(rows) == len(SECTIONS)
    for (title, panels), section in zip(rows, SECTIONS):
        *plots, text = section["panels"]
        assert section["name"].endswith(f": {title}")
        assert [p["config"]["chartTitle"] for p in plots] == [panel.title for panel in panels]
        assert all(panel.description in text["config"]["value"] for panel in panels)
        assert [p["config"].get("yAxisMin") for p in plots] == [0 if panel.zero else None for panel in panels]
    ids = [p["__id__"] for s in SECTIONS for p in s["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("run", ["healthy"])
def test_all_that_a_run_logs_is_drawn_by_the_panel_of_its_metric(run):
    """Keys as WandbSink writes them, attributes included."""
    rows = read_metrics(ROOT / "tests" / "fixtures" / "data" / "telemetry" / f"{run}.jsonl")
    keys = {key.replace(".", "/") for row in rows for key in row} - {"step", "time"}
    assert any("{" in key for key in keys)
    xs = {plot["xAxis"] for plot in PLOTS}
    for key in keys:
        drawn = [plot for plot in PLOTS if key in plot["metrics"]
                 or plot.get("metricRegex") and re.fullmatch(plot["metricRegex"], key)]
        assert drawn or key in xs, key
        assert all(key.partition("{")[0] in named(plot) for plot in drawn), key


def test_without_the_library_the_command_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=re.escape(NEEDS)):
        workspace_file("megacontext")


@pytest.mark.parametrize("flags, message", [
    ([], "give the folders"),
    (["--wandb=a.json", "run"], "give the folders"),
    (["--save=a/b", "run"], "--save=a/b saves what --wandb=FILE writes"),
    (["--wandb=a.json", "--save=a"], "--save=a is not ENTITY/PROJECT"),
    (["--wandb=a.json", "--save=a/b/c"], "--save=a/b/c is not ENTITY/PROJECT"),
])  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mc_dash", *flags])
    with pytest.raises(UserError, match=re.escape(message)):
        mc_dash.main()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# With the library


def test_the_committed_file_is_current(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setattr(sys, "argv", ["mc_dash", f"--wandb={tmp_path / 'w.json'}"])
    mc_dash.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"workspace": str(tmp_path / "w.json")}
    assert (tmp_path / "w.json").read_text(encoding="utf-8") == FILE.read_text(
        encoding="utf-8"), f"run python -m scripts.mc_dash --wandb={FILE.relative_to(ROOT)}"


def test_the_file_loads_and_is_what_is_saved(monkeypatch):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    from wandb_workspaces.workspaces import internal

    sent: list = []
    monkeypatch.setattr(internal, "upsert_view2", lambda view: sent.append(view) or {
        "upsertView": {"view": {"name": view.name, "id": "id"}}})
    monkeypatch.setattr(workspaces.Workspace, "url", property(lambda self: f"{self.entity}/{self.project}"))
    loaded = workspaces.Workspace._from_model(internal.View.model_validate_json(FILE.read_text(encoding="utf-8")))
    loaded.entity = "me"
    loaded.save_as_new_view()
    assert save_workspace("me", "mine") == "me/mine"
    plots = lambda view: [p.config.model_dump() for s in view.spec.section.panel_bank_config.sections for p in s.panels]
    assert plots(sent[0]) == plots(sent[1]) and len(plots(sent[0])) > 60 and sent[1].project == "mine"


def test_a_refusal_of_wandb_is_one_line(monkeypatch):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    wandb = pytest.importorskip("wandb")

    def refused(self):
        raise wandb.errors.CommError("project not found\nand much more")

    monkeypatch.setattr(workspaces.Workspace, "save_as_new_view", refused)
    with pytest.raises(UserError, match="does not take the workspace for me/mine: project not found") as e:
        save_workspace("me", "mine")
    assert "\n" not in str(e.value)
