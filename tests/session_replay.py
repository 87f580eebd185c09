"""What an inference session reports, from the real allocator on scores that are made up: every refocus looks elsewhere."""

import torch

from mc.focus_allocator import FocusConfig, GreedyAllocator
from mc.session_meter import SessionMeter
from nanochat.recorder import Recorder


def replay_session(recorder: Recorder, refocuses: int = 10) -> None:
    """A history that grows by a block per refocus, then a request of eight tokens per refocus."""
    draw = torch.Generator().manual_seed(0)
    scores = lambda: 2 * torch.rand(1, 16, generator=draw) - 1
    allocator = GreedyAllocator(FocusConfig(budget=24, block_size=4, max_lod=2, recent=4, cooldown=1))
    meter, n = SessionMeter(recorder, cooldown=1), 24
    state = allocator.allocate(scores(), torch.tensor([n]))
    for _ in range(refocuses):
        n = min(n + 4, 64)
        meter.ingested(4, 0.5, n)
        before = allocator.advance(state, torch.tensor([n]))
        state, report = allocator.refocus(before, scores())
        cut, _ = allocator.cut(state)
        meter.refocused(before, state, report, seconds=0.25, lod_BW=cut.lod_BW, valid_BW=cut.valid_BW, max_lod=2, kv_kept=3, kv_recomputed=2, store_reads=5)
        meter.decoded(8, 2.0)
        recorder.flush(n)
    meter.finished(0.75, 21.0, n)
