"""Panels, alerts and the offline page: one definition, checked against the registry, Grafana's schema, PromQL, real
runs and a real browser (G4)."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc.observe.dashboards import ALERTS, DASHBOARDS, TRAINING, WINDOW, Alert, Value, panel, prometheus_name
from mc.observe.page import MOST, Run, figure, page, series_of, standings, thinned, ticks
from nanochat.common import UserError
from nanochat.telemetry.metrics import METRICS, SHARES, Metric
from nanochat.telemetry.sinks import read_metrics
from scripts.mc_dash import load_run

ROOT = Path(__file__).resolve().parents[2]
OBSERVABILITY = ROOT / "runs" / "observability"
DATA = ROOT / "tests" / "fixtures" / "data" / "telemetry"
RUNS = {path.stem: read_metrics(path) for path in sorted(DATA.glob("*.jsonl"))}


# ---------------------------------------------------------------------------------------------------------------------
# Definitions


def test_every_metric_has_a_panel_and_every_panel_a_registered_metric():
    shown = {name for board in DASHBOARDS for p in board.panels for line in p.lines
             for name in (*line.expr.metrics(), *([p.x] if p.x else []))}
    assert shown == set(METRICS)
    assert {name for a in ALERTS for e in (a.left, *([a.right] if not isinstance(a.right, (int, float)) else []))
            for name in e.metrics()} <= set(METRICS)


def test_panels_say_what_healthy_looks_like():
    for board in DASHBOARDS:
        titles = [p.title for p in board.panels]
        assert len(titles) == len(set(titles)) and all("Healthy: " in p.description for p in board.panels)
    assert all(a.summary and a.cause and a.remedy for a in ALERTS) and len({a.name for a in ALERTS}) == len(ALERTS)


@pytest.mark.parametrize("name, unit, kind, expected", [
    ("mc.delta_nll", "{nat}", "gauge", "mc_delta_nll"),
    ("train.memory", "By", "gauge", "train_memory_bytes"),
    ("train.step_time", "s", "gauge", "train_step_time_seconds"),
    ("train.tokens_per_second", "{token}/s", "gauge", "train_tokens_per_second"),
    ("mc.session.ingest_rate", "{token}/s", "gauge", "mc_session_ingest_rate_per_second"),
    ("val.bpb", "{bit}/By", "gauge", "val_bpb_per_By"),
    ("train.mfu", "1", "gauge", "train_mfu_ratio"),
    ("mc.lens.hit", "1", "histogram", "mc_lens_hit"),
    ("mc.session.kv_kept", "{entry}", "counter", "mc_session_kv_kept_total"),
])  # fmt: skip
def test_prometheus_names(name, unit, kind, expected):
    assert prometheus_name(Metric(name, unit, kind, "", buckets=SHARES if kind == "histogram" else ())) == expected


def test_no_two_metrics_share_a_prometheus_name():
    assert len({prometheus_name(m) for m in METRICS.values()}) == len(METRICS)


def expressions() -> list[str]:
    panels = [line.expr.promql('mc_run_id=~"$run"') for board in DASHBOARDS for p in board.panels for line in p.lines]
    return [e.replace(WINDOW, "1m") for e in panels] + [a.expression for a in ALERTS]


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_every_expression_is_promql(expression):
    parser = pytest.importorskip("promql_parser")
    parser.parse(expression)
    with pytest.raises(ValueError):
        parser.parse(expression + ")")


ROWS = [{"step": 1, "time": 10.0, "train.mfu": 0.4, "mc.val.delta_nll{shown=lens}": 1.0,
         "mc.val.delta_nll{shown=window}": 4.0, "mc.session.kv_kept": 30.0},
        {"step": 2, "time": 20.0, "train.mfu": 0.2, "mc.val.delta_nll{shown=lens}": None, "mc.session.kv_kept": 50.0,
         "train.loss": 3.0}]  # fmt: skip


def test_expressions_are_evaluated_line_by_line():
    lens, window = Value("mc.val.delta_nll", shown="lens"), Value("mc.val.delta_nll", shown="window")
    assert Value("mc.val.delta_nll", by="shown").at(ROWS, 0) == {"lens": 1, "window": 4}
    assert (1 - lens / window).at(ROWS, 0) == {"": 0.75} and (1 - lens / window).at(ROWS, 1) == {}
    assert (2 * lens + 1).at(ROWS, 0) == {"": 3} and (window - lens).at(ROWS,
                                                                        0) == {"": 3} and (lens / 0).at(ROWS, 0) == {}
    assert Value("mc.session.kv_kept").at(ROWS, 0) == {} and Value("mc.session.kv_kept").at(ROWS, 1) == {"": 5}
    assert Value("train.mfu", over="1h").at(ROWS, 1) == {"": pytest.approx(0.3)} and Value("train.loss").at(ROWS,
                                                                                                            0) == {}


def test_an_alert_holds_where_both_its_conditions_do():
    alert = Alert("A", Value("train.mfu"), "<", 0.7 * Value("train.mfu", over="1h"), "", "", "",
                  when=(Value("train.loss"), ">", 2))
    assert [alert.at(ROWS, i) for i in (0, 1)] == [None, True]
    assert Alert("A", Value("train.mfu"), ">", 0.3, "", "", "").at(ROWS, 1) is False


# ---------------------------------------------------------------------------------------------------------------------
# What is made of them


def test_committed_dashboards_and_rules_are_current(tmp_path):
    pytest.importorskip("grafana_foundation_sdk")
    done = subprocess.run([sys.executable, OBSERVABILITY / "make_dashboards.py", f"--out={tmp_path}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in ("alerts.yaml", *(f"dashboards/{board.uid}.json" for board in DASHBOARDS)):
        assert (OBSERVABILITY / file).read_text() == (tmp_path
                                                      / file).read_text(), f"{file} is out of date: run python runs/observability/make_dashboards.py"  # noqa: E501


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda b: b.uid)
def test_dashboards_survive_grafanas_schema(board):
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    data = json.loads((OBSERVABILITY / "dashboards" / f"{board.uid}.json").read_text())
    assert json.loads(JSONEncoder().encode(Dashboard.from_json(data))) == data
    panels = [p for p in data["panels"] if p["type"] != "row"]
    ids = [p["id"] for p in data["panels"]]
    assert len(ids) == len(set(ids)) and [p["title"] for p in panels] == [p.title for p in board.panels]
    cells = [(x, y) for p in data["panels"] for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
             for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "panels overlap"
    assert {v["name"] for v in data["templating"]["list"]} >= {"datasource", "run"}
    for p in panels:
        assert all(t["datasource"]["uid"] == "${datasource}" for t in p["targets"])


def test_an_overlay_names_the_columns_it_draws():
    data = json.loads((OBSERVABILITY / "dashboards" / f"{TRAINING.uid}.json").read_text())
    overlays = [p for p in data["panels"] if p["type"] == "xychart"]
    assert len(overlays) == sum(bool(p.x) for p in TRAINING.panels) == 6
    for p in overlays:
        columns = {t["legendFormat"] for t in p["targets"]}
        assert {s[axis]["matcher"]["options"] for s in p["options"]["series"]
                for axis in "xy"} == columns and len(columns) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Provisioning


def load_yaml(name: str):
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):
        """With compose's tags for what replaces a value."""

    Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))
    Loader.add_constructor("!reset", lambda loader, node: None)
    return yaml.load((OBSERVABILITY / name).read_text(), Loader)


@pytest.mark.parametrize("name", ["docker-compose.yaml", "docker-compose.prometheus.yaml"])
def test_services_mount_files_that_exist_and_listen_on_loopback(name):
    compose = load_yaml(name)
    for service, of in compose["services"].items():
        for volume in (of or {}).get("volumes", []):
            source = volume.split(":")[0]
            assert source == "metrics" or (OBSERVABILITY / source).exists(), f"{service}: {source}"
        assert all(port.startswith("127.0.0.1:") for port in (of or {}).get("ports", [])), service
        assert ":" in (of or {}).get("image", "a:1") and not (of or {}).get("image", "a:1").endswith(":latest")


def test_grafana_finds_the_dashboards_and_the_store():
    grafana = load_yaml("docker-compose.yaml")["services"]["grafana"]
    mounted = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    provider, = load_yaml("grafana/provisioning/dashboards/megacontext.yaml")["providers"]
    assert provider["options"]["path"] == mounted["./dashboards"]
    sources = load_yaml("grafana/provisioning/datasources/store.yaml")["datasources"]
    assert {s["url"].strip("$") for s in sources} == {name for name in grafana["environment"] if name.endswith("_URL")}


def test_the_collectors_pipelines_are_of_parts_that_it_has():
    config = load_yaml("otel-collector.yaml")
    for pipeline in config["service"]["pipelines"].values():
        for kind, parts in pipeline.items():
            assert set(parts) <= set(config[kind])
    assert set(load_yaml("prometheus.yaml")["rule_files"]) == {"alerts.yaml"}


# ---------------------------------------------------------------------------------------------------------------------
# Alerts on real runs: tests/fixtures/data/telemetry holds what runs/observability/plant_faults.py wrote


EXPECTED = {"healthy": set(), "frozen_lens": {"NetworkFrozen"},
            "thrashing": {"SwapRateHigh", "ResidencyLow", "Thrash"}, "nan": {"LossNotFinite"}}


def script(name: str):
    """A module of runs/observability."""
    spec = importlib.util.spec_from_file_location(name, OBSERVABILITY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_run_for_every_fault():
    assert set(RUNS) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_alerts_fire_on_planted_faults_and_on_nothing_else(name, tmp_path):
    """By Prometheus's own evaluation of the committed rules."""
    module = script("check_alerts")
    if module.promtool() is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    assert module.fired(DATA / f"{name}.jsonl", tmp_path) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_offline_page_sees_the_same_faults(name):
    held = {s.alert.name for s in standings(Run(name, RUNS[name])) if s.steps} - {"MfuDrop"}  # which needs ten minutes
    assert held >= EXPECTED[name] if name != "healthy" else held == set()


# ---------------------------------------------------------------------------------------------------------------------
# Every panel asked of a store (runs/observability/e2e.sh does so with a real one)


@pytest.fixture
def store():
    """A store that has one point of everything but of what is in `missing`; and its URL."""
    missing: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            query = parse_qs(urlparse(self.path).query).get("query", [""])[0]
            point = {"metric": {}, "values": [[1, "0.5"]], "value": [1, "0.5"]}
            data = ["a-run"] if "/label/" in self.path else {"result": [] if any(name in query for name in missing)
                                                             else [point]}
            body = json.dumps({"status": "success", "data": data}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield missing, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_panel_without_points_is_named(store, monkeypatch, capsys):
    missing, url = store
    module = script("check_dashboards")
    monkeypatch.setattr(sys, "argv", ["check_dashboards.py", f"--url={url}"])
    module.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    # an overlay asks two runs for x and y
    lines = sum(4 if p.x else len(p.lines) for board in DASHBOARDS for p in board.panels)
    assert told == {"asked": lines + len(list(module.conditions())), "empty": 0, "holding": [a.name for a in ALERTS]}
    missing.append("mc_lens_regret")
    with pytest.raises(UserError, match="1 queries return nothing"):
        module.main()
    assert "no points: MegaContext: focus / Regret: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["check_dashboards.py", "--url=http://127.0.0.1:9"])
    with pytest.raises(UserError, match="no store at http://127.0.0.1:9"):
        module.main()


# ---------------------------------------------------------------------------------------------------------------------
# The offline page


class Checked(HTMLParser):
    """Tags that open and close, what is loaded from elsewhere, and what is drawn."""

    VOID = {"meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.count, self.links, self.words = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_stands_alone():
    runs = [Run("recall <mc>", RUNS["healthy"]), Run("short", RUNS["healthy"][:20])]
    seen = Checked(page(runs))
    assert not seen.open and all(link.startswith("#") for link in seen.links) and "script" not in seen.count
    drawn = sum(len(series_of(p, runs)) for board in DASHBOARDS for p in board.panels)
    assert seen.count["polyline"] == drawn > 100
    text = " ".join(seen.words)
    assert "recall <mc>" in text and all(p.title in text and p.description in text for board in DASHBOARDS
                                         for p in board.panels)
    assert all(a.name in text for a in ALERTS)


def test_lines_of_a_panel_are_those_of_the_run():
    p = panel("P", "", Value("mc.val.delta_nll", by="shown"))
    lens, window = series_of(p, [Run("r", ROWS)])
    assert (lens.name, lens.points, window.points) == ("lens", [(1, 1.0)], [(1, 4.0)]) and lens.colour != window.colour
    over_tokens = panel("P", "", Value("train.mfu"), x="train.tokens")
    assert series_of(over_tokens, [Run("r", ROWS)]) == []
    rows = [{**row, "train.tokens": 100.0 * row["step"]} for row in ROWS]
    one, two = series_of(over_tokens, [Run("a", rows), Run("b", rows)])
    assert one.points == [(100, 0.4), (200, 0.2)] and (one.name, two.name) == ("a", "b") and one.colour != two.colour


@settings(max_examples=50)
@given(count=st.integers(1, 5 * MOST), spike=st.integers(0, 5 * MOST))
def test_a_long_line_keeps_its_extremes_and_its_end(count, spike):
    points = [(float(i), 1e6 if i == spike else float(i % 7)) for i in range(count)]
    drawn = thinned(points)
    assert len(drawn) <= MOST and drawn[-1] == points[-1] and set(drawn) <= set(points) and [x for x, _ in drawn] == sorted(x for x, _ in drawn)  # noqa: E501
    assert max(y for _, y in drawn) == max(y for _, y in points) and (count > MOST or drawn == points)


@settings(max_examples=200)
@given(low=st.floats(-1e12, 1e12), size=st.floats(1e-9, 1e12))
def test_ticks_cover_the_range(low, size):
    high = low + max(size, abs(low) * 1e-6)
    found = ticks(low, high)
    step = found[1] - found[0]
    assert found[0] <= low + step * 1e-6 and found[-1] >= high - step * 1e-6 and 3 <= len(found) <= 8
    assert all(b > a for a, b in zip(found, found[1:]))


@pytest.mark.parametrize("x, text", [(0, "0"), (0.034, "0.034"), (12_000, "12k"), (8000, "8000"), (-1030.4, "-1030"),
                                     (1.5e6, "1.5M"), (9.25e12, "9.25T"), (-3e9, "-3G"), (5e-7, "5e-07"), (999, "999")])
def test_figures_are_short(x, text):
    assert figure(x) == text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADLESS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page(scheme, tmp_path):
    from matplotlib.image import imread

    file, shot = tmp_path / "dash.html", tmp_path / "shot.png"
    file.write_text(page([Run("recall", RUNS["healthy"])]), encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([CHROMIUM, *HEADLESS, f"--user-data-dir={profile}", "--window-size=1500,3000",
                        f"--screenshot={shot}",
                        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", file.as_uri()],
                       capture_output=True, timeout=60, check=True)  # fmt: skip
    pixels = (imread(shot)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    back = {"light": (255, 255, 255), "dark": (0x15, 0x18, 0x1C)}[scheme]
    line = {"light": (0x00, 0x72, 0xB2), "dark": (0x56, 0xB4, 0xE9)}[scheme]
    assert (pixels == back).all(1).mean() > (0.5 if scheme == "light" else 0.1), "background"
    assert (pixels == line).all(1).sum() > 2000, "first colour of the lines"
    assert len({tuple(p) for p in pixels[::97].tolist()}) > 20


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_a_page(tmp_path):
    run = tmp_path / "d2"
    run.mkdir()
    lines = (DATA / "healthy.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines,
                                                  json.dumps({"step": 401, "time": 2e9,
                                                              "train.nonfinite": 1.0})]) + "\n")
    done = subprocess.run([sys.executable, "-m", "scripts.mc_dash", str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["page"] == str(run / "dash.html") and "LossNotFinite" in told["alerts"]["d2"]
    assert "<title>d2</title>" in (run / "dash.html").read_text()


@pytest.mark.parametrize("content, message",
                         [(None, "no metrics in"), ("", "is empty"), ("{not json", "no metrics file"),
                          ('{"time": 1}\n', "no metrics file")])
def test_what_is_no_run_is_refused_in_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)
