"""Send a gauge, a histogram and a trace where the OTEL_* variables say, and see whether they
are accepted: before a long run.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 python -m scripts.mc_bench otlp
"""

import time
from argparse import Namespace

import torch

from nanochat.common import FlagParser, UserError
from nanochat.telemetry.otlp import otlp_sink
from nanochat.telemetry.metrics import METRICS, Sample
from nanochat.telemetry.tracing import Trace
from scripts.bench.base import print_json


def add_flags(parser: FlagParser) -> None:
    """None: the OTEL_* variables say it all."""


def run(args: Namespace) -> None:
    sink = otlp_sink("megacontext", "preflight/0",
                     {"mc.run.id": "preflight", "mc.stage": "preflight", "mc.variant": "preflight"}, background=False)
    if sink is None:
        raise UserError("OTLP is off: set OTEL_EXPORTER_OTLP_ENDPOINT, and neither OTEL_SDK_DISABLED=true nor "
                        "OTEL_*_EXPORTER=none")
    trace = Trace("mc.preflight", torch.device("cpu"), keep=True)
    with trace.span("mc.preflight.part"):
        trace.event("mc.preflight.event", number=1)
    trace.finish()
    sink.trace(trace)
    sink.write(0, time.time(), [Sample(METRICS["telemetry.preflight"], {}, [1.0])])
    begin = time.perf_counter()
    problems = sink.deliver()
    taken = time.perf_counter() - begin
    sink.write(0, time.time(), [Sample(METRICS["telemetry.preflight_time"], {}, [taken])])
    problems = problems or sink.deliver()
    if problems:
        raise UserError("; ".join(problems.values()))
    sink.close()
    print(f"accepted after {taken:.3f} s")
    print_json({"seconds": round(taken, 4), **sink.accepted()})
