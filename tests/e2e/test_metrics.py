"""Every registered metric is recorded by a run that exercises it (G2, trap 21)."""

import json

import mc.observe.metrics  # noqa: F401  registers MegaContext's metrics
import nanochat.telemetry.otlp  # noqa: F401  and those of the exporter
from mc.config import POLICIES
from nanochat.telemetry.metrics import METRICS

# see test_telemetry.py
TRANSPORT = {name for name in METRICS if name.startswith(("telemetry.otlp", "telemetry.preflight"))}
# tests/session/test_session.py records each of them
SESSION = {name for name, m in METRICS.items() if m.where == "mc/session/meter.py"}


def recorded(base) -> set[str]:
    lines = map(json.loads, (base / "runs" / "t" / "metrics.jsonl").read_text().splitlines())
    return {name.partition("{")[0] for line in lines for name in line} - {"step", "time"}


def test_every_registered_metric_is_recorded(reference, base, train):
    from e2e_commands import GIST_LOSSES, MC

    train(base, *MC, *GIST_LOSSES, "--num_iterations=8").ok()
    assert recorded(base) == set(METRICS) - SESSION - TRANSPORT
    off = {"mc.loss.contrast", "mc.loss.horizon_gist", "mc.loss.placed", *(f"mc.cuts.best.{p}" for p in POLICIES)}
    assert recorded(base) - recorded(reference["mc"]) == off, "what is off is not recorded"
    assert recorded(reference["vanilla"]) == {name for name in METRICS
                                              if not name.startswith(("mc.", "gen_ai."))} - TRANSPORT


def test_probes_have_steps_of_their_own_and_cost_no_step_time(base, train):
    from e2e_commands import MC, losses, rows

    train(base, *MC, "--probe_every=3", "--log_every=20").ok()
    found = rows(base)
    assert [row["step"] for row in found if "mc.lens.regret" in row] == [6, 9, 12, 15, 18,
                                                                         20], "from the start of MegaContext on"
    assert all(row["mc.time.probe"] > 0 for row in found if "mc.lens.regret" in row)
    assert [row["step"] for row in found if "val.loss" in row] == [20]
    steps = found[-1]["train.elapsed"]
    assert found[-1]["time"] - found[0]["time"] > steps * 14 / 20 and steps < sum(r["train.step_time"] * n
                                                                                  for r, n in zip(found,
                                                                                                  (6, 3, 3, 3, 3,
                                                                                                   2))) * 1.01
    assert len(losses(base)) == 6
