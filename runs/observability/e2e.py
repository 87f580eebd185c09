"""Train, and look for every number in a metrics store (called by e2e.sh, which brings the store).

1. VictoriaMetrics and the collector rotel start on loopback; rotel hands metrics on to the store and traces to this
process. 2. Four small runs: MegaContext and vanilla straight to the store over HTTP, and each again through
rotel, by gRPC and by HTTP. Then an
   inference session of the first, straight to the store.
3. Of every run, every line of metrics.jsonl is compared with what the store holds: gauges
point by point, counters as totals,
   histograms by sum and count. Traces: what rotel delivered are the spans that the runs made.
4. Every panel of every dashboard and every alert expression is asked of the store
(runs/observability/check_dashboards.py).
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fixtures")]

import nanochat.telemetry.otlp  # noqa: F401  registers the transport's metrics
from mc.observe.dashboards import prometheus_name
from nanochat.common import FlagParser, UserError, run_main
from nanochat.telemetry.metrics import METRICS

TOLERANCE = 1e-6  # relative
MODEL = ["--depth=2", "--aspect_ratio=16", "--head_dim=16", "--max_seq_len=128", "--device_batch_size=2",
         "--total_batch_size=512",
         "--eval_tokens=512", "--eval_every=10", "--save_every=20", "--log_every=1", "--trace_every=5",
         "--device=cpu"]  # fmt: skip
MC = ["--mc_enabled=1", "--mc_block_size=8", "--mc_budget=40", "--mc_horizon=8", "--mc_recent=8", "--mc_start=0.1",
      "--mc_ramp=2",
      "--mc_lens_queries=48", "--mc_lens_key_dim=8", "--mc_gist_width=16", "--probe_every=5",
      "--mc_arms=contrast,horizon,placed", "--mc_placed_stride=1", "--mc_variants=2"]  # fmt: skip
MICRO_STEPS = 2
SESSION = ["--mc_enabled=1", "--mc_budget=96", "--mc_interval=4", "--max_tokens=16", "--mc_tau_expand=0",
           "--mc_tau_collapse=0", "--mc_margin=0", "--mc_cooldown=0"]
PROMPTS = 20


def make_parser() -> FlagParser:
    parser = FlagParser(prog="bash runs/observability/e2e.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--keep", default="",
                        help="directory to keep the runs and the store's files in; default: removed at the end")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    folder = Path(args.keep or tempfile.mkdtemp(prefix="observability-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        end_to_end(folder, args.steps)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def end_to_end(folder: Path, steps: int) -> None:
    from otlp_receiver import Receiver

    base = folder / "base"
    command(base, "scripts.tok_train", f"--data={ROOT / 'nanochat'}", "--vocab_size=512")
    with victoria_metrics(folder / "store") as store, Receiver() as traces, rotel(folder, store,
                                                                                  traces.url) as (rpc, http):
        direct = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{store}/opentelemetry/v1/metrics"}
        by_rpc = {"OTEL_EXPORTER_OTLP_ENDPOINT": rpc, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
        by_http = {"OTEL_EXPORTER_OTLP_ENDPOINT": http, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        for environment in (by_rpc, by_http):
            print(command(base, "scripts.mc_bench", "otlp", environment=environment).strip(), flush=True)
        runs = {"mc": (MC, direct), "vanilla": ([], direct), "mc_grpc": (MC, by_rpc), "vanilla_http": ([], by_http)}
        for pair in (("mc", "vanilla"), ("mc_grpc", "vanilla_http")):
            started = [begin(base, "scripts.base_train", *MODEL, f"--num_iterations={steps}",
                             f"--data={ROOT / 'nanochat'}", f"--model_tag={tag}", *runs[tag][0],
                             environment=runs[tag][1]) for tag in pair]  # fmt: skip
            for process in started:
                finish(process)
        session = begin(base, "scripts.chat_cli", f"--checkpoint_dir={base / 'checkpoints' / 'mc'}",
                        f"--log_dir={base / 'runs' / 'session'}", *SESSION,
                        environment=direct,
                        lines=(ROOT / "nanochat" / "gpt.py").read_text().splitlines()[40:])  # fmt: skip
        finish(session)
        runs["session"] = ([], direct)
        totals = {tag: compare(base / "runs" / tag, store, steps, settle_s=20) for tag in runs}
        for tag, (gauges, counters, histograms) in totals.items():
            print(f"{tag}: {gauges} gauge values, {counters} counters and {histograms} histogram values are the "
                  "JSONL's", flush=True)
        sent = {tag: [json.loads(line)
                      for line in (base / "runs" / tag / "metrics.jsonl").read_text().splitlines()][-1] for tag in runs}
        lost = sum(row.get("telemetry.otlp.lost", 0) for row in sent.values())
        if lost:
            raise UserError(f"{lost} points or spans were lost on their way")
        check_traces(traces, steps)
        dashboards = ROOT / "runs" / "observability" / "check_dashboards.py"
        if subprocess.run([sys.executable, str(dashboards), f"--url={store}"]).returncode:
            raise UserError("panels or alerts return nothing from the store: see above")
    print(json.dumps({"runs": list(runs), "compared": {tag: sum(counts) for tag, counts in totals.items()},
                      "spans": len(traces.spans()), "lost": lost}))


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def begin(base: Path, module: str, *flags: str, environment: dict[str, str] | None = None,
          lines: Sequence[str] = ()) -> subprocess.Popen:
    """`python -m module flags`, with the first PROMPTS of `lines` that are not empty as its input."""
    prompts = tempfile.TemporaryFile("w+")
    prompts.write("".join(f"{line}\n" for line in [line for line in lines if line.strip()][:PROMPTS]) + "\n")
    prompts.seek(0)
    own = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    settings = {"NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                "OTEL_METRIC_EXPORT_INTERVAL": "500"}
    return subprocess.Popen([sys.executable, "-m", module, *flags], cwd=ROOT, env=own | settings | (environment or {}),
                            stdin=prompts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    if process.returncode or "warning" in err:
        raise UserError(f"{' '.join(process.args[2:4])} ended with {process.returncode}: {err.strip() or out.strip()}")
    return out


def command(base: Path, module: str, *flags: str, environment: dict[str, str] | None = None) -> str:
    return finish(begin(base, module, *flags, environment=environment))


@contextmanager
def server(*words: str, log: Path) -> Iterator[None]:
    with open(log, "w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def victoria_metrics(folder: Path) -> Iterator[str]:
    from otlp_receiver import unused_port

    if not shutil.which("victoria-metrics"):
        raise UserError("victoria-metrics is not in the PATH: use bash runs/observability/e2e.sh, which fetches it")
    folder.mkdir(exist_ok=True)
    url = f"http://127.0.0.1:{unused_port()}"
    with server("victoria-metrics", f"-httpListenAddr={url.removeprefix('http://')}",
                f"-storageDataPath={folder / 'data'}", "-opentelemetry.usePrometheusNaming",
                "-search.latencyOffset=0s", log=folder / "log"):  # fmt: skip
        wait_for(lambda: get(f"{url}/health") == "OK", f"VictoriaMetrics does not start, see {folder / 'log'}")
        yield url


@contextmanager
def rotel(folder: Path, store: str, traces: str) -> Iterator[tuple[str, str]]:
    """The collector; its gRPC and its HTTP endpoint."""
    from otlp_receiver import unused_port

    found = importlib.util.find_spec("rotel")
    if not found:
        raise UserError("the collector rotel is missing: pip install 'megacontext[collector]'")
    rpc, http = (f"127.0.0.1:{unused_port()}" for _ in range(2))
    with server(str(Path(found.origin).parent / "rotel-agent"), "start", f"--otlp-grpc-endpoint={rpc}",
                f"--otlp-http-endpoint={http}", "--exporter=otlp",
                "--otlp-exporter-protocol=http", f"--otlp-exporter-metrics-endpoint={store}/opentelemetry/v1/metrics",
                f"--otlp-exporter-traces-endpoint={traces}/v1/traces",
                f"--otlp-exporter-logs-endpoint={traces}/v1/logs", log=folder / "rotel.log"):  # fmt: skip
        wait_for(lambda: accepts(rpc) and accepts(http), f"rotel does not start, see {folder / 'rotel.log'}")
        yield f"http://{rpc}", f"http://{http}"


def accepts(address: str) -> bool:
    import socket

    host, _, port = address.partition(":")
    with socket.socket() as s:
        return s.connect_ex((host, int(port))) == 0


def wait_for(condition, problem: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(problem)
        time.sleep(0.1)


def get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.URLError:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def compare(run_dir: Path, store: str, steps: int, settle_s: float) -> tuple[int, int, int]:
    """Numbers of gauge values, counters and histogram values of a run that the store holds as its
    metrics.jsonl does. UserError otherwise."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # the last was written after the sending
    lines = [line for line in lines if any(not key.startswith(("step", "time", "telemetry.")) for key in line)]
    expected: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key not in ("step", "time") and value is not None:
                expected.setdefault(key, []).append(value)
    run = f"{run_dir.name}-{(run_dir / 'run_id').read_text()}"
    last_key, last_count = next((key, len(values)) for key, values in reversed(expected.items())
                                if METRICS[parts(key)[0]].kind == "gauge")
    stored = prometheus_name(METRICS[parts(last_key)[0]])
    arrived = lambda: len(series(store, run, stored).get(frozenset(parts(last_key)[1].items()), [])) >= last_count
    wait_for(arrived, f"{run}: the store lacks points of {last_key}", settle_s)
    gauges = counters = histograms = 0
    for key, values in expected.items():
        name, attributes = parts(key)
        metric, wanted = METRICS[name], frozenset(attributes.items())
        stored = prometheus_name(metric)
        if metric.kind == "histogram":
            sums, counts = (series(store, run, f"{stored}_{what}").get(wanted, []) for what in ("sum", "count"))
            steps_of = [(s - s0, c - c0) for s, s0, c, c0 in zip(sums, [0.0, *sums], counts, [0.0, *counts])]
            agree(key, values, [s / c for s, c in steps_of], scale=max(1.0, *map(abs, sums)))
            if name == "train.loss" and counts[-1] != steps * MICRO_STEPS:
                raise UserError(f"{run} {key}: {counts[-1]} values counted, {steps * MICRO_STEPS} recorded")
            histograms += len(values)
        elif metric.kind == "counter":
            agree(key, [math.fsum(values)], series(store, run, stored).get(wanted, [])[-1:])
            counters += 1
        else:
            agree(key, values, series(store, run, stored).get(wanted, []))
            gauges += len(values)
    return gauges, counters, histograms


def parts(key: str) -> tuple[str, dict[str, str]]:
    """"name{lod=1}" as name and attributes."""
    name, _, inside = key.partition("{")
    return name, dict(pair.split("=", 1) for pair in inside.removesuffix("}").split(",") if pair)


def series(store: str, run: str, name: str) -> dict[frozenset, list[float]]:
    """What the store holds of a name, by attributes: all points, in the order of time."""
    match = urllib.parse.quote(f'{{__name__="{name}",mc_run_id="{run}"}}')
    found = {}
    for line in get(f"{store}/api/v1/export?match[]={match}&reduce_mem_usage=1").splitlines():
        row = json.loads(line)
        own = {k: v for k, v in row["metric"].items() if k not in ("__name__", "job", "instance")
               and not k.startswith(("mc_", "service", "telemetry_"))}
        points = found.setdefault(frozenset(own.items()), [])
        points.extend(zip(row["timestamps"], row["values"]))
    return {own: [value for _, value in sorted(points)] for own, points in found.items()}


def agree(key: str, wanted: list[float], found: list[float], scale: float = 0.0) -> None:
    if len(wanted) != len(found):
        raise UserError(f"{key}: {len(wanted)} values recorded, {len(found)} in the store")
    for a, b in zip(wanted, found):
        if abs(a - b) > TOLERANCE * max(abs(a), scale):
            raise UserError(f"{key}: {a} recorded, {b} in the store")


def check_traces(traces, steps: int) -> None:
    """What rotel delivered: of both runs a trace every five steps, whole, with the parts of a MegaContext step."""
    roots = lambda: [s for s in traces.spans() if s.name == "train.step"]
    wait_for(lambda: len(roots()) >= 2 * math.ceil(steps / 5), "rotel has not delivered all traces")
    spans = {s.span_id: s for s in traces.spans()}
    orphans = [s.name for s in spans.values() if s.parent_span_id and s.parent_span_id not in spans]
    within = [("mc.step", part) for part in ("mc.lm.forward", "mc.tree.build", "mc.lens.score", "mc.focus.apply",
                                             "mc.wc.forward")]
    found = {(spans[s.parent_span_id].name, s.name) for s in spans.values() if s.parent_span_id in spans}
    if orphans or not found.issuperset(within):
        raise UserError(f"spans without their parents: {orphans}; missing: {set(within) - found}")
    print(f"{len(spans)} spans of {len(roots())} traces came through rotel, each with its parent", flush=True)


if __name__ == "__main__":
    run_main(main)
