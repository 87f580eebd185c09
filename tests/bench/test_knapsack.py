"""The exact knapsack against every set of blocks, and greedy against it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_focus_allocator import check_state

from mc.focus_allocator import FocusConfig, GreedyAllocator
from mc.mega_context import tiling
from scripts.bench.knapsack import optimum, value

torch.set_num_threads(1)


def brute_force(utility_N1: torch.Tensor, n: int, cfg: FocusConfig) -> float:
    """Every set of raw blocks, the tail's and all ancestors added, within the budget: the best summed utility."""
    n_blocks, K = n // cfg.block_size, cfg.block_size
    sets_SN = (torch.arange(2**n_blocks)[:, None] >> torch.arange(n_blocks)) & 1
    in_tail_N = (torch.arange(n_blocks) + 1) * K > n - cfg.recent
    sets_SN = sets_SN[(sets_SN >= in_tail_N.long()).all(1)]
    nodes_S, level_SN = sets_SN.sum(1), sets_SN
    for lod in range(2, cfg.max_lod + 1):
        width = n // K**lod
        level_SN = level_SN[:, : width * K].unflatten(1, (width, K)).amax(-1)
        # a node there is expanded even if no complete block of it is
        in_tail_N = (torch.arange(width) + 1) * K**lod > n - cfg.recent
        nodes_S = nodes_S + torch.maximum(level_SN, in_tail_N.long()).sum(1)
    entries_S = tiling(n, K, cfg.max_lod) + (K - 1) * nodes_S
    return float((sets_SN * utility_N1[:n_blocks]).sum(1)[entries_S <= cfg.budget].max())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.integers(1, 3), st.lists(st.integers(0, 33), min_size=1, max_size=3),
       st.integers(0, 9), st.integers(0, 12), st.integers(0, 2**31))
def test_is_the_best_of_all_sets(k, max_lod, sizes, recent, slack, seed):
    sizes = [min(n, 11 * k + 1) for n in sizes]
    need = [tiling(n, k, max_lod) + (k - 1) * sum(n // k**lod - max(n - recent, 0) // k**lod
                                                  for lod in range(1, max_lod + 1)) for n in sizes]
    cfg, n_B = FocusConfig(max(need) + slack + 1, k, max_lod, recent=recent), torch.tensor(sizes)
    utility_BN1 = torch.randn(len(sizes), max(sizes) // k, generator=torch.Generator().manual_seed(seed),
                              dtype=torch.float64) + 0.5
    state = optimum(utility_BN1, n_B, cfg)
    check_state(GreedyAllocator(cfg), state)
    want = [brute_force(row, n, cfg) for row, n in zip(utility_BN1, sizes)]
    np.testing.assert_allclose(value(utility_BN1, state).numpy(), want, atol=1e-9)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 77, 1023, 1025])
def test_odd_lengths_and_what_no_budget_holds(n):
    cfg = FocusConfig(160, 32, 2, recent=32)
    utility_BN1 = torch.rand(1, n // 32, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    state = optimum(utility_BN1, torch.tensor([n]), cfg)
    check_state(GreedyAllocator(cfg), state)
    assert (value(utility_BN1, state) >= value(utility_BN1,
                                               GreedyAllocator(cfg).allocate(utility_BN1,
                                                                             torch.tensor([n]))) - 1e-9).all()
    with pytest.raises(ValueError, match="a budget of 31 entries does not hold 1025 tokens"):
        optimum(torch.zeros(1, 32), torch.tensor([1025]), FocusConfig(31, 32, 1, recent=0))


@pytest.mark.parametrize("k, max_lod, n", [(2, 1, 17), (2, 3, 16), (2, 3, 47), (3, 2, 59), (4, 2, 205)])
def test_greedy_is_near_the_optimum(k, max_lod, n):
    """Exponential utilities: 0.9 of the optimum on average, never more than all of it."""
    gen, trials, least = torch.Generator().manual_seed(0), 20, tiling(n, k, max_lod)
    utility_BN1 = -torch.rand(trials, n // k, generator=gen, dtype=torch.float64).log()
    for nodes in (max_lod, max_lod + 2, max_lod + 4):
        cfg, n_B = FocusConfig(least + (k - 1) * nodes, k, max_lod, recent=0), torch.full((trials,), n)
        state = GreedyAllocator(cfg).allocate(utility_BN1, n_B)
        share_B = value(utility_BN1, state) / value(utility_BN1, optimum(utility_BN1, n_B, cfg))
        assert (share_B <= 1 + 1e-9).all() and share_B.mean() >= 0.9, f"{nodes} nodes: {share_B.mean():.3f}"
