"""What an inference session reports: once per append, refocus and request, never per token.

    meter = SessionMeter(recorder, cooldown)
    meter.ingested(…); meter.refocused(…); meter.decoded(…); meter.finished(…)

The caller measures times with its own clock, and hands over what it has anyway. Times of generation follow OpenTelemetry's
`gen_ai.server.*`. Shapes: B rows (1 in a session), W entries.
"""

from torch import Tensor

from mc.diagnostics import FocusDynamics
from mc.focus_allocator import FocusReport, FocusState
from nanochat.recorder import Recorder


class SessionMeter:
    """Records through `recorder`; `step` of what it flushes is the session's number of tokens. cooldown: the allocator's."""

    def __init__(self, recorder: Recorder, cooldown: int):
        self.recorder, self.dynamics = recorder, FocusDynamics(cooldown)

    def ingested(self, tokens: int, seconds: float, history: int) -> None:
        """An append of `tokens` is done; the history now has `history` tokens."""
        self.recorder.record("mc.session.ingest_rate", tokens / max(seconds, 1e-9))
        self.recorder.record("mc.session.history", history)

    def refocused(self, before: FocusState, after: FocusState, report: FocusReport, *, seconds: float, lod_BW: Tensor, valid_BW: Tensor,
                  max_lod: int, kv_kept: int, kv_recomputed: int, store_reads: int) -> None:  # fmt: skip
        """A refocus is done. before, after, report: as of `GreedyAllocator.refocus`; lod, valid: the working context after it;
        entries whose keys and values were kept or computed, and records read, for it and since the one before."""
        record = self.recorder.record
        flips = self.dynamics.update(before, after, report)
        record("mc.session.refocus_time", seconds)
        for name in ("expands", "collapses", "forced"):
            record(f"mc.session.{name}", getattr(report, f"{name}_B").sum())
        record("mc.session.undone", flips.undone)
        record("mc.session.swap_rate", report.swap_rate_B.mean())
        record("mc.session.utilization", report.utilization_B.mean())
        for stay in flips.stays.tolist():
            record("mc.session.residency", stay)
        for lod in range(max_lod + 1):
            record("mc.session.entries", (valid_BW & (lod_BW == lod)).sum(), lod=lod)
        record("mc.session.kv_kept", kv_kept)
        record("mc.session.kv_recomputed", kv_recomputed)
        record("mc.session.store_reads", store_reads)
        self.dynamics.reports.clear()  # they are on record: a session has no end
        self.dynamics.flips.clear()

    def decoded(self, tokens: int, seconds: float) -> None:
        """`tokens` after a request's first, generated between two refocuses."""
        if tokens:
            self.recorder.record("gen_ai.server.time_per_output_token", seconds / tokens)

    def finished(self, first_token_s: float, total_s: float, history: int) -> None:
        """A request is answered, `first_token_s` and `total_s` after its first token came in; the sinks get everything so far."""
        self.recorder.record("gen_ai.server.time_to_first_token", first_token_s)
        self.recorder.record("gen_ai.server.request.duration", total_s)
        self.recorder.flush(history)
