"""The recorder of a run, with every sink that its flags and its environment ask for."""

from pathlib import Path

from nanochat.telemetry.otlp import otlp_sink
from nanochat.telemetry.recorder import Recorder
from nanochat.telemetry.sinks import ConsoleSink, WandbSink, run_id


def open_recorder(run_dir: str | Path, *, run: str = "", config: dict, total_steps: int, first_step: int = 0,
                  rank: int = 0,
                  labels: dict[str, str] | None = None) -> Recorder:
    """The recorder of a training run: JSONL, console, W&B unless `run` is empty or "dummy", and OTLP where the
    environment names an endpoint.

    run_dir: see Recorder. config: what W&B shows as the run's configuration. labels: attributes of all that goes out by
    OTLP; mc.run.id, the directory's name and the run's id, comes with them. Raises UserError as the sinks do.
    """
    if rank != 0:
        return Recorder(run_dir, rank=rank)
    own_id = f"{Path(run_dir).name}-{run_id(run_dir)}"
    otlp = otlp_sink("megacontext", f"{own_id}/{rank}", {"mc.run.id": own_id, **(labels or {})})
    wandb_sink = [WandbSink(run, run_dir, config)] if run not in ("", "dummy") else []
    return Recorder(run_dir, ConsoleSink(total_steps, first_step), *wandb_sink, *([otlp] if otlp else []))
