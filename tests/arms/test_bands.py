"""D5: compression bands are what the cuts have, and open one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc.arms.bands import BAND_EDGES, blocks_in_band, entries_shown
from mc.focus_allocator import FocusConfig, GreedyAllocator, entries_needed
from mc.working_context import entries_used
from tiny_mc import tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)


def shown(scores: torch.Tensor, blocks_B: torch.Tensor, n_B: torch.Tensor, cfg: FocusConfig) -> torch.Tensor:
    """[B] entries of the allocator's cut that shows so many of the best blocks."""
    rank = scores.argsort(1, descending=True).argsort(1)
    state = GreedyAllocator(cfg).allocate(scores.masked_fill(rank >= blocks_B[:, None], -torch.inf), n_B)
    return entries_used(GreedyAllocator(cfg).cut(state)[0])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([3, 4, 8]), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3), st.integers(0, 2**20),
       st.booleans())
def test_the_entries_of_a_cut_are_known_before_it_is_made(k, max_lod, n_gists, recent, seed, latest_first):
    """Of as many of the best blocks as one likes: those of one parent share their path, those
    in the tail are raw anyway."""
    gen = torch.Generator().manual_seed(seed)
    n_B = torch.randint(recent * k, 200, (48,), generator=gen)
    blocks = 200 // k
    cfg = FocusConfig(256, k, max_lod, recent=recent * k, n_gists=n_gists)
    scores = torch.arange(blocks).float().expand(48, -1) if latest_first else torch.rand(48, blocks, generator=gen)
    blocks_B = torch.randint(blocks + 1, (48,), generator=gen)
    known = entries_shown(scores.argsort(1, descending=True).argsort(1), n_B, cfg)
    assert torch.equal(known.gather(1, blocks_B[:, None])[:, 0], shown(scores, blocks_B, n_B, cfg))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**20), st.floats(0, 1),
       st.booleans(), st.sampled_from([2, 4, 5]))
def test_bands_open_one_after_the_other_and_are_what_the_cuts_have(k, max_lod, n_gists, seed, done, latest_first,
                                                                   ratio):
    n, gen = 512, torch.Generator().manual_seed(seed)
    cfg = FocusConfig(n // ratio, k, max_lod, recent=k, n_gists=n_gists)
    if sum(entries_needed(n, cfg)) > cfg.budget:
        return
    draw_B, n_B = torch.rand(64, generator=gen), torch.full((64,), n)
    scores = torch.arange(n // k).float().expand(64, -1) if latest_first else torch.rand(64, n // k, generator=gen)
    scores = scores.masked_fill(torch.arange(n // k) == n // k - 1, -torch.inf)  # the tail
    rank = scores.argsort(1, descending=True).argsort(1)
    entries_B = shown(scores, blocks_in_band(draw_B, done, n_B, rank, cfg), n_B, cfg)
    bands, reach_BN = min(int(3 * done) + 1, 3), entries_shown(rank, n_B, cfg)
    block = sum(map(cfg.price, range(1, max_lod + 1)))
    for draw, entries, reach in zip(draw_B.tolist(), entries_B.tolist(), reach_BN.tolist()):
        band = int(draw * bands)
        most, least = (max(min(n / edge if edge else n, cfg.budget), reach[0])
                       for edge in ((0.0, *BAND_EDGES)[band], BAND_EDGES[band]))
        if any(least <= x <= most for x in reach):
            assert least <= entries <= most
        assert abs(entries - most
                   * (least / most) ** (draw * bands - band)) <= block, "log-uniform within the band, in whole blocks"


@pytest.mark.parametrize("policy", ["random", "recency"])
def test_training_begins_with_cuts_of_at_most_five_tokens_per_entry(policy):
    gpt, history = tiny_base(sequence_len=256), 248
    mc = tiny_mc(gpt, T=256, budget=64, bands=1, cuts=f"{policy}:1", micro_batch=8)
    used = mc.training_step(gpt, tiny_batch(range(8), T=256), 0).primary.used_B
    assert (used >= history / BAND_EDGES[0]).all()
