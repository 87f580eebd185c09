"""Write Grafana's dashboards and the alert rules from `mc/observe/dashboards.py`: `python
runs/observability/make_dashboards.py`.

    dashboards/mc-training.json, mc-focus.json, mc-runtime.json     provisioned by
                                                                    docker-compose.yaml, or imported by hand
    alerts.yaml                                                     for Prometheus, or vmalert beside VictoriaMetrics

The files are committed; a test makes them again and compares. Needs `pip install 'megacontext[dashboards]'`.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import yaml

try:
    from grafana_foundation_sdk.builders import common as common_builders
    from grafana_foundation_sdk.builders import dashboard as builders
    from grafana_foundation_sdk.builders import prometheus, timeseries, xychart
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common, dashboard
    from grafana_foundation_sdk.models import xychart as xychart_models
except ModuleNotFoundError as e:
    sys.exit(f"error: make_dashboards.py needs the package {e.name}: pip install 'megacontext[dashboards]'")

from mc.observe.dashboards import ALERTS, DASHBOARDS, Alert, Dashboard, Line, Panel, Value
from nanochat.common import FlagParser, run_main

DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
SCOPE = 'mc_run_id=~"$run"'
OVERLAY = {"MegaContext": 'mc_run_id=~"$mc"', "vanilla": 'mc_run_id=~"$vanilla"'}  # one run each
WIDTH, HEIGHT = 8, 8  # of a panel, in Grafana's grid of 24 columns
RUNBOOK = "obsidian/ops/Training & Operations.md"


def query(expr: str, legend: str, ref_id: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(DATASOURCE).expr(expr).legend_format(legend).ref_id(ref_id).range()


def legend_of(line: Line) -> str:
    return " ".join(part for part in ("{{mc_run_id}}", line.label, f"{{{{{line.by}}}}}" if line.by else "") if part)


def over_time(panel: Panel) -> timeseries.Panel:
    built = timeseries.Panel()
    for i, line in enumerate(panel.lines):
        built.with_target(query(line.expr.promql(SCOPE), legend_of(line), chr(ord("A") + i)))
    built.line_width(2).fill_opacity(0).span_nulls(True)
    if panel.limit is not None:
        steps = [dashboard.Threshold(value=None, color="transparent"),
                 dashboard.Threshold(value=panel.limit, color="orange")]
        built.thresholds(builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
        built.thresholds_style(common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    return built


def over_x(panel: Panel) -> xychart.Panel:
    """One run of each kind against another metric: joined by time, one x and one y column a run."""
    built, series = xychart.Panel(), []
    for i, (name, scope) in enumerate(OVERLAY.items()):
        built.with_target(query(Value(panel.x).promql(scope), f"x {name}", f"{'AC'[i]}"))
        built.with_target(query(panel.lines[0].expr.promql(scope), name, f"{'BD'[i]}"))
        by_name = lambda field: xychart_models.MatcherConfig("byName", field)  # noqa: E731
        series.append(xychart.XYSeriesConfig().name(xychart.XychartXYSeriesConfigName().fixed(name))
                      .frame(xychart.XychartXYSeriesConfigFrame().matcher(xychart.MatcherConfig().id(
                          "byIndex").options(0)))
                      .x(xychart.XychartXYSeriesConfigX().matcher(matcher(by_name(f"x {name}"))))
                      .y(xychart.XychartXYSeriesConfigY().matcher(matcher(by_name(name)))))  # fmt: skip
    built.transformations([dashboard.DataTransformerConfig(id_val="joinByField",
                                                           options={"byField": "Time", "mode": "outer"})])
    return built.mapping(xychart_models.SeriesMapping.MANUAL).series(series).show(xychart_models.XYShowMode.LINES)


def matcher(model: xychart_models.MatcherConfig) -> xychart.MatcherConfig:
    return xychart.MatcherConfig().id(model.id_val).options(model.options)


def grafana_panel(panel: Panel, panel_id: int, x: int, y: int):
    built = over_x(panel) if panel.x else over_time(panel)
    built.id(panel_id).title(panel.title).description(panel.description).datasource(DATASOURCE).unit(panel.unit)
    built.grid_pos(dashboard.GridPos(h=HEIGHT, w=WIDTH, x=x, y=y))
    if panel.zero:
        built.min(0)
    legend = common_builders.VizLegendOptions().show_legend(True).display_mode(common.LegendDisplayMode.LIST).placement(common.LegendPlacement.BOTTOM)  # noqa: E501
    return built.legend(legend)


def variable(name: str, label: str, query_text: str, several: bool) -> builders.QueryVariable:
    built = builders.QueryVariable(name).label(label).datasource(DATASOURCE).query(query_text).refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)  # noqa: E501
    return built.sort(dashboard.VariableSort.ALPHABETICAL_ASC).multi(several).include_all(several)


def grafana_dashboard(board: Dashboard) -> str:
    built = builders.Dashboard(board.title).uid(board.uid).description(board.description).tags(["megacontext"]).editable()  # noqa: E501
    built.refresh("30s").time("now-6h", "now").timezone(common.TimeZoneBrowser)
    built.with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    built.with_variable(variable("run", "Run", "label_values(mc_run_id)", several=True))
    if any(panel.x for panel in board.panels):
        for name, label, kind in (("mc", "MegaContext run", "mc"), ("vanilla", "Vanilla run", "vanilla")):
            built.with_variable(variable(name, label, f'label_values(train_tokens{{mc_variant="{kind}"}}, mc_run_id)',
                                         several=False))
    panel_id, y = 1, 0
    for title, row in board.rows.items():
        built.with_row(builders.Row(title).id(panel_id).grid_pos(dashboard.GridPos(h=1, w=24, x=0, y=y)))
        panel_id, y = panel_id + 1, y + 1
        for i, panel in enumerate(row):
            built.with_panel(grafana_panel(panel, panel_id, i % 3 * WIDTH, y + i // 3 * HEIGHT))
            panel_id += 1
        y += -(-len(row) // 3) * HEIGHT
    return json.dumps(json.loads(JSONEncoder(sort_keys=True).encode(built.build())), indent=1, sort_keys=True,
                      ensure_ascii=False) + "\n"


def rule(alert: Alert) -> dict:
    return {
        "alert": alert.name, "expr": alert.expression, "for": alert.wait, "labels": {"severity": alert.severity},
        "annotations": {"summary": f"{alert.summary} Run {{{{ $labels.mc_run_id }}}}: {{{{ $value | humanize }}}}.",
                        "description": f"Cause: {alert.cause} Remedy: {alert.remedy}", "runbook": RUNBOOK},
    }  # fmt: skip


def alert_rules() -> str:
    made = "# Made by runs/observability/make_dashboards.py from mc/observe/dashboards.py; edit that.\n"
    return made + yaml.safe_dump({"groups": [{"name": "megacontext", "rules": [rule(a) for a in ALERTS]}]},
                                 sort_keys=False, width=1000, allow_unicode=True)


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python runs/observability/make_dashboards.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder that dashboards/ and alerts.yaml are written to")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    (args.out / "dashboards").mkdir(parents=True, exist_ok=True)
    files = {f"dashboards/{board.uid}.json": grafana_dashboard(board)
             for board in DASHBOARDS} | {"alerts.yaml": alert_rules()}
    for name, text in files.items():
        (args.out / name).write_text(text, encoding="utf-8")
    print(f"wrote {len(files)} files in {args.out}")
    print(json.dumps({"files": [str(args.out / name) for name in files]}))


if __name__ == "__main__":
    run_main(main)
