"""The dashboards as a workspace of Weights & Biases: a file that its library loads, or a saved view in a project.

One section a row of panels, in the order of `mc.observe.dashboards`, that ends with what healthy looks like. A line
that is drawn per value of an attribute is a pattern over the keys that `WandbSink` logs (`mc/val/nll{shown=lens}`).
What Grafana computes from several metrics is drawn as these metrics, and the limits of alerts have no line.

Needs `pip install 'megacontext[wandb]'`: `wandb-workspaces` knows the format, which W&B does not document otherwise.
"""

import json
import re
from collections.abc import Iterator

from mc.observe.dashboards import DASHBOARDS, Dashboard, Expr, Panel, Value, as_expr
from nanochat.common import UserError, one_line
from nanochat.telemetry.metrics import key_of

NAME = "MegaContext"
NEEDS = "the W&B workspace needs the package wandb-workspaces: pip install 'megacontext[wandb]'"


def logged_key(name: str, attributes: dict[str, str]) -> str:
    """The key under which `WandbSink` logs a metric."""
    return key_of(name, attributes).replace(".", "/")


def metrics_drawn(expr: Expr) -> Iterator[Value]:
    if isinstance(expr, Value):
        yield expr
    for side in ("left", "right"):
        if hasattr(expr, side):
            yield from metrics_drawn(as_expr(getattr(expr, side)))


def pattern(value: Value) -> str:
    """A regular expression of the keys of a value, those of every value of `by` included."""
    if not value.by:
        return re.escape(logged_key(value.name, value.where))
    return re.escape(logged_key(value.name, {})) + r"\{([^}]*,)?" + re.escape(value.by) + r"=[^}]*\}"


def line_plot(panel: Panel):
    import wandb_workspaces.reports.v2 as reports

    values = list({pattern(value): value for line in panel.lines for value in metrics_drawn(line.expr)}.values())
    shown = ({"metric_regex": f"^({'|'.join(map(pattern, values))})$"} if any(value.by for value in values)
             else {"y": [logged_key(value.name, value.where) for value in values]})
    return reports.LinePlot(title=panel.title, x=logged_key(panel.x, {}) if panel.x else "step",
                            range_y=(0 if panel.zero else None, None), **shown)


def sections(board: Dashboard) -> list:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    found = []
    for title, panels in board.rows.items():
        healthy = "\n\n".join(f"**{panel.title}.** {panel.description}" for panel in panels)
        found.append(workspaces.Section(name=f"{board.title.removeprefix('MegaContext: ')}: {title}", is_open=not found,
                                        panels=[*map(line_plot, panels), reports.MarkdownPanel(markdown=healthy)]))
    return found


def workspace(entity: str, project: str):
    """A `wandb_workspaces` Workspace of all dashboards, not saved yet. UserError without that package."""
    try:
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError(NEEDS) from None
    return workspaces.Workspace(entity=entity, project=project, name=NAME,
                                sections=[section for board in DASHBOARDS for section in sections(board)])


def workspace_file(project: str) -> str:
    """The view as JSON, the same at every call: what W&B keeps of a workspace, of no entity yet."""
    view = json.loads(workspace("", project)._to_model().model_dump_json(by_alias=True, exclude_none=True))
    panels = [p for s in view["spec"]["section"]["panelBankConfig"]["sections"] for p in s["panels"]]
    for number, panel in enumerate(panels):
        panel["__id__"] = f"mc{number:03d}"  # the library draws them at random
    return json.dumps(view, indent=1, ensure_ascii=False) + "\n"


def save_workspace(entity: str, project: str) -> str:
    """Save it as a new view of a project; its address. UserError where W&B does not take it."""
    view = workspace(entity, project)
    import wandb

    try:
        return view.save_as_new_view().url
    except (wandb.Error, OSError, ValueError) as e:
        raise UserError(f"W&B does not take the workspace for {entity}/{project}: {one_line(e, 300)}; log in with "
                        "`wandb login`, and name a project of yours that has runs") from None
