"""Which alerts a run sets off: `python runs/observability/check_alerts.py RUN.jsonl …`, by Prometheus's
own evaluation of alerts.yaml.

Each line of a run's metrics.jsonl is taken for one minute. Needs promtool (Debian package prometheus) and `pip
install 'megacontext[dashboards]'`.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import yaml

from mc.observe.dashboards import keys_of, prometheus_name
from nanochat.common import FlagParser, UserError, run_main
from nanochat.telemetry.metrics import METRICS
from nanochat.telemetry.sinks import read_metrics


def promtool() -> str | None:
    return shutil.which("promtool")


def input_series(rows: list[dict], run: str) -> dict[str, list[str]]:
    """Every series of a run as a Prometheus store would hold it: series -> value per line, "_" where there is none.

    A histogram's line is its mean: one observation of it is what is counted.
    """
    series: dict[str, list[float | str]] = {}
    sums: dict[str, float] = {}
    for i, row in enumerate(rows):
        keys = tuple(row)
        for name in {key.partition("{")[0] for key in keys} - {"step", "time"}:
            metric, prom = METRICS[name], prometheus_name(METRICS[name])
            for key, attributes in keys_of(name, keys):
                if row[key] is None:
                    continue
                labels = ",".join(f'{k.replace(".", "_")}="{v}"'
                                  for k, v in {"mc_run_id": run, "mc_variant": "mc", **attributes}.items())
                values = ({prom: row[key]} if metric.kind == "gauge" else {prom: row[key]}
                          if metric.kind == "counter" else {f"{prom}_sum": row[key], f"{prom}_count": 1.0})
                for suffixed, value in values.items():
                    full = f"{suffixed}{{{labels}}}"
                    if metric.kind != "gauge":
                        value = sums[full] = sums.get(full, 0.0) + value
                    series.setdefault(full, ["_"] * len(rows))[i] = repr(float(value))
    return series


def fired(path: Path, folder: Path) -> set[str]:
    """Names of the alerts that fire at any time while the run's lines come in, and five minutes after.
    UserError without promtool."""
    if promtool() is None:
        raise UserError("promtool is not installed: apt-get install prometheus")
    rows = read_metrics(path)
    series = [{"series": name, "values": " ".join(values)} for name, values in input_series(rows, path.stem).items()]
    ask = [{"expr": "count by (alertname) (ALERTS{alertstate=\"firing\"})", "eval_time": f"{minute}m",
            "exp_samples": []} for minute in range(len(rows) + 5)]
    shutil.copy(HERE / "alerts.yaml", folder / "alerts.yaml")
    test = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m",
            "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": ask}]}
    (folder / "test.yaml").write_text(yaml.safe_dump(test, width=10**9), encoding="utf-8")
    done = subprocess.run([promtool(), "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True)
    told = done.stdout + done.stderr
    # nothing was expected, so what fires is reported as a difference
    names = set(re.findall(r'alertname="(\w+)"', told))
    if (done.returncode == 0) != (not names):
        raise UserError(f"promtool cannot test {path}: {told.strip().splitlines()[0] if told.strip() else 'no output'}")
    return names


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python runs/observability/check_alerts.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="metrics.jsonl of runs")
    return parser


def main() -> None:
    found = {}
    for path in make_parser().parse_args().runs:
        with tempfile.TemporaryDirectory() as folder:
            found[str(path)] = sorted(fired(path, Path(folder)))
        print(f"{path}: {', '.join(found[str(path)]) or 'silent'}")
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
