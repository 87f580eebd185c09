"""What an inference session reports: once per append, refocus and request, never per token.

A `SessionPool` with a recorder gives every session a meter. Times of generation follow
OpenTelemetry's `gen_ai.server.*`.
"""

import time
from collections import Counter
from contextlib import contextmanager

import torch

import mc.observe.metrics  # noqa: F401  registers the metrics
from mc.session.refocus import Edits, Node
from nanochat.telemetry.recorder import Recorder


class SessionMeter:
    """Records through `recorder`; `step` of what it flushes is the session's number of
    tokens. cooldown: the allocator's."""

    def __init__(self, recorder: Recorder, cooldown: int):
        # within the cooldown no edit is reversed: what counts as undone must reach beyond it
        self.recorder, self.within = recorder, 2 * max(cooldown, 1)
        # refocus at which an edit flipped a node last, and whether it opened it
        self._flips: dict[Node, tuple[int, bool]] = {}
        self._shown: dict[int, int] = {}  # refocus at which an edit showed a block that is still shown
        self._begun: float | None = None  # of the request that is being answered
        self._first: float | None = None
        self._interval = (0, 0.0)  # tokens and seconds since the last refocus

    def ingested(self, tokens: int, seconds: float, history: int) -> None:
        """An append of `tokens` is done; the history now has `history` tokens."""
        self._begun = self._begun or time.perf_counter() - seconds
        self.recorder.record("mc.session.ingest_rate", tokens / max(seconds, 1e-9))
        self.recorder.record("mc.session.history", history)

    def refocused(self, at: int, edits: Edits, trigger: str, *, seconds: float, entries_by_lod: dict[int, int],
                  omitted: int, swappable: int, utilization: float,
                  kv_kept: int, kv_recomputed: int, store_reads: int) -> None:  # fmt: skip
        """Refocus number `at` and the pass after it are done. trigger: why it came; omitted: tokens in no entry;
        swappable: blocks shown raw or as LOD1; entries whose keys and values were kept or computed; records read since
        the refocus before."""
        record = self.recorder.record
        self._end_interval()
        record("mc.session.refocus_time", seconds)
        record("mc.session.triggers", 1, by=trigger)
        for name in ("expands", "collapses", "forced"):
            record(f"mc.session.{name}", getattr(edits, name))
        record("mc.session.undone", self._undone(at, edits))
        record("mc.session.swap_rate", (edits.expands + edits.collapses) / max(swappable, 1))
        record("mc.session.utilization", utilization)
        for lod, block in (*edits.closed, *edits.collapsed):
            if lod == 1 and block in self._shown:
                record("mc.session.residency", at - self._shown.pop(block))
        self._shown |= {block: at for lod, block in edits.opened if lod == 1}
        for lod, count in entries_by_lod.items():
            record("mc.session.entries", count, lod=lod)
        record("mc.session.omitted", omitted)
        record("mc.session.kv_kept", kv_kept)
        record("mc.session.kv_recomputed", kv_recomputed)
        record("mc.session.store_reads", store_reads)

    def staying(self, at: int) -> list[int]:
        """Refocuses, up to number `at`, that each block still shown by an edit has stayed shown."""
        return [at - begun for begun in self._shown.values()]

    def _undone(self, at: int, edits: Edits) -> int:
        """Flips by edits that undo another edit's of a short while ago."""
        # older flips count no more: kept, they would grow with the session
        self._flips = {node: flip for node, flip in self._flips.items() if at - flip[0] <= self.within}
        flips = {**dict.fromkeys(edits.opened, True), **dict.fromkeys(edits.closed, False)}
        undone = sum(self._flips.get(node, (at, opened))[1] != opened for node, opened in flips.items())
        self._flips |= {node: (at, opened) for node, opened in flips.items()}
        return undone

    def decoded(self, seconds: float) -> None:
        """One more token of a request, `seconds` after the one before. Kept here, and recorded at the next refocus."""
        if self._first is None:
            # its wait has a metric of its own and would spoil the mean of the others
            self._first = time.perf_counter()
            return
        tokens, spent = self._interval
        self._interval = tokens + 1, spent + seconds

    def _end_interval(self) -> None:
        tokens, spent = self._interval
        self._interval = 0, 0.0
        if tokens:
            self.recorder.record("gen_ai.server.time_per_output_token", spent / tokens)

    def finished(self, began: float, history: int) -> None:
        """A request is answered that was asked for at `began`, or at the append before it; the
        sinks get everything so far."""
        began = min(began, self._begun or began)
        self._end_interval()
        if self._first is not None:
            self.recorder.record("gen_ai.server.time_to_first_token", self._first - began)
        self.recorder.record("gen_ai.server.request.duration", time.perf_counter() - began)
        self.recorder.flush(history)
        self._begun = self._first = None


class Timing:
    """Seconds by part. `synchronize`: wait for the device at each end, so that times belong to
    their part (benchmarks only)."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self.synchronize = False

    @contextmanager
    def __call__(self, part: str):
        start = self._now()
        yield
        self.seconds[part] += self._now() - start

    def _now(self) -> float:
        if self.synchronize and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
