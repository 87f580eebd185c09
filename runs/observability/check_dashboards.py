"""Does every panel show something? `python runs/observability/check_dashboards.py --url=http://127.0.0.1:8428`

Asks a Prometheus-compatible store that holds real runs (one with MegaContext, one vanilla, one inference session) every
query of every committed dashboard, over the time that the store has points of them, and every alert rule. A query
without a point fails the check; so does a side of an alert's comparison without one (the alert itself being silent is
what a healthy run looks like).
"""

import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from mc.observe.dashboards import ALERTS, ALL_RUNS, RULE_WINDOW, Expr, as_expr
from nanochat.common import FlagParser, UserError, run_main


def ask(url: str, path: str, **parameters: str | float) -> list:
    """What the store answers to a query. UserError when it refuses it or is not there."""
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as e:
        raise UserError(f"the store refuses {parameters.get('query', path)}: "
                        f"{e.read().decode(errors='replace')[:300]}") from None
    except (urllib.error.URLError, TimeoutError) as e:
        raise UserError(f"no store at {url}: {e}; start one (runs/observability/up.sh) and give its --url") from None


class Store:
    """The queries' scope: its runs, and the time that they cover."""

    def __init__(self, url: str, minutes: float):
        self.url, self.end = url, time.time() + 1
        self.start = self.end - 60 * minutes
        self.step = max((self.end - self.start) / 2000, 0.5)
        labels = {kind: self.label_values(f'train_tokens{{mc_variant="{kind}"}}') for kind in ("mc", "vanilla")}
        if not all(labels.values()):
            raise UserError(f"the store at {url} holds no run of {' and '.join(k for k, v in labels.items() if not v)} "
                            f"in the last {minutes:g} minutes; "
                            f"train one with OTLP on, or give more --minutes")  # fmt: skip
        self.variables = {"run": ".*", "mc": labels["mc"][-1], "vanilla": labels["vanilla"][-1],
                          "__rate_interval": f"{max(round(4 * self.step), 60)}s"}

    def label_values(self, series: str) -> list[str]:
        return ask(self.url, "label/mc_run_id/values", **{"match[]": series, "start": self.start, "end": self.end})

    def points(self, expression: str) -> int:
        """How many points that are numbers a query returns."""
        for name, value in self.variables.items():
            expression = expression.replace(f"${name}", value)
        found = ask(self.url, "query_range", query=expression, start=self.start, end=self.end, step=self.step)["result"]
        return sum(value not in ("NaN", "+Inf", "-Inf") for series in found for _, value in series["values"])


def queries() -> Iterator[tuple[str, str, str]]:
    """(dashboard, panel, expression) of every target of every committed dashboard."""
    for file in sorted((HERE / "dashboards").glob("*.json")):
        board = json.loads(file.read_text(encoding="utf-8"))
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield board["title"], panel["title"], target["expr"]


def conditions() -> Iterator[tuple[str, str]]:
    """(alert, expression): the rule itself, and each side of its comparisons that is measured."""
    for alert in ALERTS:
        sides: list[Expr] = [alert.left, as_expr(alert.right), *([alert.when[0]] if alert.when else [])]
        for side in sides:
            if next(side.metrics(), None):
                yield alert.name, side.promql(ALL_RUNS, RULE_WINDOW)


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python runs/observability/check_dashboards.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8428", help="of the store's Prometheus API")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back the runs may lie")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    store = Store(args.url.rstrip("/"), args.minutes)
    asked = [(f"{board} / {panel}", expression) for board, panel, expression in queries()]
    asked += [(f"alert {alert}", expression) for alert, expression in conditions()]
    empty = [f"{where}: {expression}" for where, expression in asked if not store.points(expression)]
    firing = [a.name for a in ALERTS if ask(store.url, "query", query=a.expression, time=store.end)["result"]]
    for line in empty:
        print(f"no points: {line}")
    print(f"{len(asked) - len(empty)} of {len(asked)} queries of {len({b for b, *_ in queries()})} dashboards and "
          f"{len(ALERTS)} alerts return points; "
          f"conditions that hold now: {', '.join(firing) or 'none'}")  # fmt: skip
    print(json.dumps({"asked": len(asked), "empty": len(empty), "holding": firing}))
    if empty:
        raise UserError(f"{len(empty)} queries return nothing")


if __name__ == "__main__":
    run_main(main)
