"""What telemetry costs a training step: with every sink against none.

The same MegaContext training, alternating blocks of steps in one process: in one block nothing is recorded, in the
other everything that base_train records, and at its end a flush to the console (into a file), metrics.jsonl, OTLP and,
if asked for, Weights & Biases. OTLP goes where the environment says, else to a server that this command
starts and that accepts everything.

Reported: the ratio of the blocks' times, median over pairs with a bootstrap interval; the same of the process's CPU
time, its exporting thread included, which other processes on the machine disturb less; and the share of the steps' time
that the recorder accounts for itself.
"""

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanochat.common import FlagParser
from nanochat.telemetry.opening import open_recorder
from nanochat.telemetry.tracing import Trace
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import add_block_flags, print_json, synchronize, timed_meta
from scripts.bench.train_step import training_step
from scripts.eval.statistics import median_interval


class TelemetryCost(NamedTuple):
    ratio: float  # recorded / unrecorded, median over pairs of blocks
    low: float  # 95 % interval
    high: float
    cpu_ratio: float  # the same of CPU time
    cpu_low: float
    cpu_high: float
    accounted: float  # share of the recorded steps' time that the recorder says it took
    step_s: float  # seconds per step, unrecorded
    values_per_step: float


def telemetry_cost(meta: dict, tokenizer: Tokenizer, run_dir: str | Path, *, pairs: int = 10, steps: int = 10,
                   device: str = "cpu", run: str = "") -> TelemetryCost:
    """run_dir: where the sinks' files go. steps: of a block, which ends with a log line and
    holds one trace that is kept."""
    step = training_step(meta, tokenizer, with_mc=True, device=device)
    values = 0

    def timed(recorder=None) -> tuple[float, float]:
        """Seconds of wall time and of CPU time."""
        nonlocal values
        synchronize(device)
        begin = time.perf_counter(), time.process_time()
        unlogged: list[dict] = []
        for i in range(steps):
            trace = Trace("train.step", torch.device(device), keep=recorder is not None and i == 0)
            step(unlogged.append, trace)
            if recorder:
                recorder.record("train.data_wait", 0.0)
                recorder.record("train.optimizer_time", 0.0)
                recorder.trace(trace)
        if recorder:
            for metrics in unlogged:
                for name, value in metrics.items():
                    recorder.record(name, value)
                    values += 1
            recorder.flush(recorder.step + steps)
        synchronize(device)
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    timed()
    with open(Path(run_dir) / "console", "w") as console, contextlib.redirect_stdout(console), \
            open_recorder(run_dir, run=run, config={}, total_steps=2 * pairs * steps) as recorder:
        timed(recorder)
        recorder.take_spent()
        values, taken = 0, []
        for pair in range(pairs):  # which comes first takes turns, too
            order = [None, recorder] if pair % 2 else [recorder, None]
            block = {with_recorder is not None: timed(with_recorder) for with_recorder in order}
            taken.append((block[False], block[True]))
        accounted = recorder.take_spent()
    seconds = np.array(taken)  # [pairs, without or with, wall or CPU]
    wall, cpu = (seconds[:, 1] / seconds[:, 0]).T
    return TelemetryCost(float(np.median(wall)), *median_interval(wall), float(np.median(cpu)), *median_interval(cpu),
                         float(accounted / seconds[:, 1, 0].sum()),
                float(np.median(seconds[:, 0, 0])) / steps, values / (pairs * steps))


# ---------------------------------------------------------------------------------------------------------------------
# A collector that accepts everything, in a process of its own


def _accept_all(port_to) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port_to.send(server.server_address[1])
    server.serve_forever()


@contextlib.contextmanager
def collector() -> Iterator[None]:
    """OTEL_EXPORTER_OTLP_ENDPOINT names a collector: the user's, or one of our own while this is open."""
    if any(os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT") for signal in ("", "METRICS_", "TRACES_")):
        yield
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_accept_all, args=(there,), daemon=True)
    process.start()
    try:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{here.recv()}"
        yield
    finally:
        os.environ.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
        process.kill()
        process.join()


def add_flags(parser: FlagParser) -> None:
    add_block_flags(parser, pairs=10, steps=10, about="with and without telemetry")
    parser.add_argument("--run", default="dummy",
                        help="name of a Weights & Biases run, to have its cost too; dummy: none")


def run(args: argparse.Namespace) -> None:
    meta = timed_meta(args)
    with collector(), tempfile.TemporaryDirectory() as run_dir:
        cost = telemetry_cost(meta, Tokenizer.load(), run_dir, pairs=args.pairs, steps=args.steps, device=args.device,
                              run=args.run)
    print(f"with telemetry / without: step time {cost.ratio:.4f} [{cost.low:.4f}, {cost.high:.4f}], CPU time "
          f"{cost.cpu_ratio:.4f} [{cost.cpu_low:.4f}, {cost.cpu_high:.4f}], "
          f"{args.pairs} pairs of {args.steps} steps of {cost.step_s:.3f} s; {cost.values_per_step:.0f} values per "
          f"step; accounted for by the recorder {cost.accounted:.3%}")
    print_json(cost._asdict())
