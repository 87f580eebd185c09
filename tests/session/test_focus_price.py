"""Logits to scores: prices that clear the market, noise by key, and a price that moves until the budget is used."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from batched_refocus import BatchedRefocus
from test_focus_allocator import check_state

from mc.focus_allocator import FocusConfig, utilization
from mc.session.config import SessionConfig
from mc.session.price import LOWEST, TARGET, Allocator, market_price, next_shift, room
from mc.session.refocus import PathEdits
from mc.working_context import entries_used
from nanochat.common import UserError

torch.set_num_threads(1)
ALLOCATORS = ["greedy", "bundle:3", "stochastic:0.5"]


def scores(allocator: Allocator, logits_BI, *, room_B=None, shift=0.0, index_BI=None, rival_BI=None, row=0, seed=0,
           refocus=1):
    B, count = logits_BI.shape
    index_BI = torch.arange(count).expand(B, count) if index_BI is None else index_BI
    rival_BI = torch.ones(B, count, dtype=torch.bool) if rival_BI is None else rival_BI
    return allocator.scores(logits_BI, index_BI, rival_BI, torch.full((B,), 3) if room_B is None else room_B,
                            torch.full((B,), shift).double(),
                            rows_B=torch.arange(row, row + B), seed=seed, refocus=refocus)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-20, 20), max_size=12), st.integers(1, 14), st.integers(0, 3))
def test_the_market_price_lets_in_as_many_as_there_is_room_for(values, places, rivals_less):
    logits_BI = torch.tensor([values]).double()
    logits_BI[:, :rivals_less] = -torch.inf
    rivals = sorted(values[rivals_less:], reverse=True)
    price = float(market_price(logits_BI, torch.tensor([places])))
    if not rivals:
        assert price == 0
    elif len(rivals) <= places:
        assert price == rivals[-1] - 1
    else:
        assert price == (rivals[places - 1] + rivals[places]) / 2


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8, 32]), st.integers(1, 3), st.integers(0, 2100), st.integers(0, 64), st.integers(0, 400))
def test_room_counts_what_the_tail_leaves(k, max_lod, n, recent, budget):
    cfg = FocusConfig(budget + 1, k, max_lod, recent=recent)
    focus = PathEdits(cfg, n)
    assume(not focus.omits)  # else a block costs its own entries alone: `PathEdits.room`
    tail = sum(focus.exists((lod, i)) and focus.protected((lod, i)) for lod in range(1, max_lod + 1)
               for i in range(n // k**lod))
    levels = max(sum(k**lod <= n for lod in range(1, max_lod + 1)), 1)
    assert int(room(torch.tensor([n]), cfg)) == max((focus.free // (k - 1) - tail) // levels, 1)


def test_only_rivals_set_the_price():
    logits_BI, rival_BI = torch.tensor([[9.0, 3.0, 2.0, 8.0, 1.0]]).double(), torch.tensor([[False, True, True, False,
                                                                                             True]])
    found = scores(Allocator(), logits_BI, room_B=torch.tensor([1]), rival_BI=rival_BI)
    np.testing.assert_allclose(found, (logits_BI - 2.5).tanh())


@pytest.mark.parametrize("text", ["", "best", "greedy:1", "bundle", "bundle:1", "bundle:x", "stochastic",
                                  "stochastic:0", "stochastic:nan", "threshold:0,0,1"])
def test_what_is_no_allocator_is_refused(text):
    with pytest.raises(UserError, match=f"--mc_allocator={text}: use greedy"):
        SessionConfig(allocator=text)


def process(kind: str, steps: int, n_blocks: int, gen: torch.Generator):
    """[B, N] logits step after step: "recent" decay by age, "wander" each by itself, "jump"
    anew, "flat" hardly differ."""
    B = 6
    wander = 2 * torch.randn(B, n_blocks, generator=gen).double()
    for step in range(steps):
        noise = torch.randn(B, n_blocks, generator=gen).double()
        wander = 0.95 * wander + 0.6 * noise
        yield {"recent": torch.arange(n_blocks) * 0.5 + 0.3 * noise, "wander": wander, "jump": 2 * noise,
               "flat": 0.02 * noise}[kind]


def long_stream(kind: str, allocator: Allocator, adaptive: bool, budget: int = 96, seed: int = 0) -> torch.Tensor:
    """[steps, B] utilization as histories grow block by block from 2 budgets to 12."""
    k = 8
    cfg = FocusConfig(budget, k, 2, recent=8, span=allocator.span)
    greedy, blocks = BatchedRefocus(cfg), 12 * budget // k
    first, used = 2 * budget // k, []
    gen = torch.Generator().manual_seed(seed)
    state = greedy.allocate(torch.full((6, blocks), -torch.inf).double(), torch.full((6,), first * k))
    shift_B = torch.zeros(6).double()
    for step, logits_BN in enumerate(process(kind, blocks - first, blocks, gen), 1):
        n_B = torch.full((6,), (first + step) * k)
        state = greedy.advance(state, n_B)
        end_N = (torch.arange(blocks) + 1) * k
        scores_BN = allocator.scores(logits_BN, torch.arange(blocks).expand(6, -1),
                                     (end_N <= n_B[:, None] - cfg.recent), room(n_B, cfg), shift_B,
                                     rows_B=torch.arange(6), seed=0, refocus=step)
        state, report = greedy.refocus(state, scores_BN)
        if adaptive:
            shift_B = next_shift(shift_B, report.utilization_B)
        used.append(report.utilization_B)
    check_state(greedy, state)
    return torch.stack(used)


@pytest.mark.parametrize("kind, allocator", [("recent", "greedy"), ("wander", "greedy"), ("jump", "greedy"),
                                             ("flat", "greedy"), ("recent", "bundle:3")])
def test_the_adaptive_price_moves_until_the_budget_is_used(kind, allocator):
    """On logits that decay by age, wander, jump or hardly differ."""
    used = long_stream(kind, Allocator.parse(allocator), True)
    assert used[10:].mean() >= TARGET, f"{used[10:].mean():.3f}"


def test_the_market_price_alone_leaves_some_unused():
    assert long_stream("recent", Allocator(), False)[10:].mean() < 0.8


def test_the_shift_falls_while_unused_returns_while_used_and_is_bounded():
    shift_B = torch.zeros(2).double()
    for _ in range(100):
        shift_B = next_shift(shift_B, torch.tensor([0.5, 1.0]))
    assert shift_B.tolist() == [LOWEST, 0]
    for _ in range(400):
        shift_B = next_shift(shift_B, torch.tensor([1.0, 1.0]))
    assert shift_B.tolist() == [0, 0]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(ALLOCATORS), st.sampled_from([31, 32, 33, 77, 1023, 1025]), st.sampled_from([4, 8, 32]),
       st.integers(0, 2**31))
def test_the_session_decides_as_the_batch_and_a_row_as_alone(text, n, k, seed):
    """Every allocator of a session: prices, noise, edits; `PathEdits` on the blocks that have a
    logit, the batched one on all."""
    allocator, gen, rng = Allocator.parse(text), torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    cfg, blocks, rows = FocusConfig(330, k, 3, recent=k, span=allocator.span), n // k, torch.arange(2)
    dense, sparse, n_B = BatchedRefocus(cfg), [PathEdits(cfg), PathEdits(cfg)], torch.full((2,), n)
    state = dense.advance(dense.allocate(torch.full((2, blocks), -torch.inf), 0 * n_B), 0 * n_B)
    for refocus in range(1, 7):
        grown = torch.full((2,), n * refocus // 6)
        there = int(grown[0]) // k
        listed = torch.from_numpy(np.flatnonzero(rng.random(there) < 0.8))
        # as a session lists what is new
        listed = torch.cat([listed, torch.arange(max(there - cfg.budget // k - 1, 0), there)]).unique()
        listed = torch.cat([listed, torch.tensor(sorted({i for s in sparse for lod, i in s.expanded if lod == 1}),
                                                 dtype=torch.int64)]).unique()
        logits = torch.randn(2, len(listed), generator=gen).double()
        shift_B, places_B = torch.rand(2, generator=gen).double() - 1, room(grown, cfg)
        rival = ((listed + 1) * k <= grown[0] - cfg.recent).expand(2, -1)

        def both(b: slice) -> torch.Tensor:
            return allocator.scores(logits[b], listed.expand(2, -1)[b], rival[b], places_B[b], shift_B[b],
                                    rows_B=rows[b], seed=7, refocus=refocus)

        values = both(slice(None))
        assert all(torch.equal(both(slice(b, b + 1)), values[b:b + 1]) for b in (0, 1))
        state = dense.advance(state, grown)
        state, report = dense.refocus(state, torch.full((2, blocks), -1.0).double().index_copy(1, listed, values))
        assert torch.equal(report.utilization_B, utilization(entries_used(check_state(dense, state)), grown, cfg))
        for b, focus in enumerate(sparse):
            focus.advance(int(grown[b]), set(listed.tolist()))
            edits = focus.refocus(dict(zip(listed.tolist(), values[b].tolist())))
            assert focus.expanded == {(lod + 1, int(i)) for lod, x in enumerate(state.expanded)
                                      for i in x[b].nonzero()[:, 0]}
            assert (edits.paths, edits.expands, edits.collapses, edits.forced) == tuple(int(x[b]) for x in report[:4])
