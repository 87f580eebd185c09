"""The session's allocator: the batched one's decisions, on the few nodes that matter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc import working_context as wc
from mc.focus_allocator import FocusConfig, check_budget, check_feasible, entries_needed, fits
from mc.session.refocus import UNSCORED, PathEdits
from nanochat.common import UserError
from scripts.eval.replay import ReplayAllocator

torch.set_num_threads(1)


def feasible_config(n: int, slack: int, **config) -> FocusConfig:
    """The least budget that holds every history up to n tokens, and `slack` entries more."""
    need = 1
    for m in range(1, n + 1):
        while True:
            try:
                check_feasible(m, FocusConfig(need, **config))
                break
            except UserError:
                need += 1
    return FocusConfig(need + slack, **config)


def check_cut(edits: PathEdits) -> None:
    """A valid cut within the budget, with its tail raw but for what is pruned of it."""
    lod, index = (torch.from_numpy(x)[None] for x in edits.cut())
    c = edits.cfg
    # unprotected, the last may go too
    n = edits.n_tokens if c.recent or not edits.omits else int(((index + 1) * c.block_size**lod).amax() if lod.numel()
                                                               else 0)
    wc.check(wc.Cut(lod, index, torch.ones_like(lod, dtype=torch.bool), c.block_size), torch.tensor([n]), c.budget,
             c.max_lod, gaps=edits.omits)
    assert len(lod[0]) == edits.entries or edits.omits and int((lod == 0).sum()) == edits.entries
    gists = (lod > 0) & ((index + 1) * c.block_size ** lod > edits.n_tokens - c.recent)
    assert (lod[gists] == 1).all()
    assert set(index[gists].tolist()) == edits.pruned.intersection(edits.tail_blocks())


@st.composite
def growth(draw):
    K = draw(st.sampled_from([2, 3, 4]))
    config = dict(block_size=K, max_lod=draw(st.integers(1, 3)), recent=draw(st.integers(0, 3)) * K,
                  max_edits=draw(st.integers(0, 4)),
                  cooldown=draw(st.integers(0, 3)), span=draw(st.sampled_from([1, 2, 5])),
                  tau_expand=draw(st.sampled_from([0.0, 0.2])), margin=draw(st.sampled_from([0.0, 0.2])))
    steps = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    return config, steps, draw(st.integers(0, 40)), draw(st.integers(0, 2**31))


@settings(max_examples=150, deadline=None)
@given(growth())
def test_decides_as_the_batched_allocator(case):
    """Blocks without a score count as the lowest: same nodes, edit counts, and cut, refocus after refocus."""
    config, steps, slack, seed = case
    K, n_blocks = config["block_size"], sum(steps) // config["block_size"]
    cfg = feasible_config(sum(steps), slack, **config)
    dense, sparse = ReplayAllocator(cfg), PathEdits(cfg)
    state = dense.allocate(torch.full((1, n_blocks), -torch.inf), torch.tensor([0]))
    rng, n = np.random.default_rng(seed), 0
    for step in steps:
        few = rng.random(n_blocks) < 0.7
        few[max(n // K - 1, 0):] = True  # those just completed are always scored
        values = np.where(few, rng.choice(np.linspace(-0.9, 0.9, 7), n_blocks), UNSCORED)
        n += step
        if step // K > cfg.budget // K:
            return
        scores = {b: values[b] for b in range(n // K) if few[b]}
        sparse.advance(n, set(scores))
        edits = sparse.refocus(scores)
        state, report = dense.refocus(dense.advance(state, torch.tensor([n])), torch.from_numpy(values)[None])
        want = {(lod + 1, int(i)) for lod, x in enumerate(state.expanded) for i in x[0].nonzero()[:, 0]}
        assert sparse.expanded == want
        assert (edits.paths, edits.expands, edits.collapses, edits.forced) == tuple(
            int(x) for x in (report.edits_B, report.expands_B, report.collapses_B, report.forced_B))
        cut, fits = dense.cut(state)
        assert fits.all()
        used = int(cut.valid_BW.sum())
        assert [x.tolist() for x in sparse.cut()] == [cut.lod_BW[0, :used].tolist(), cut.index_BW[0, :used].tolist()]
        check_cut(sparse)


@settings(max_examples=60, deadline=None)
@given(growth(), st.lists(st.integers(0, 2000), min_size=1, max_size=5))
def test_any_growth_stays_within_the_budget(case, steps):
    """Also when one append is far longer than the budget, and when the budget does not tile the history: a valid cut,
    the tail raw, expanded nodes closed upward, and the best block that is asked for among what is shown."""
    config, _, slack, seed = case
    cfg = FocusConfig(config["recent"] + 2 * config["block_size"] - 1 + slack,
                      **{**config, "max_edits": max(config["max_edits"], 1), "max_lod": 3})
    check_budget(cfg)
    edits, rng, n = PathEdits(cfg), np.random.default_rng(seed), 0
    for step in steps:
        n += step
        complete = n // cfg.block_size
        near = {b for node in edits.expanded if node[0] == 1
                for b in [node[1]]} | set(range(max(complete - cfg.budget // cfg.block_size - 1, 0), complete))
        listed = near | set(rng.integers(0, max(complete, 1), 6).tolist()) if complete else set()
        edits.advance(n, listed)
        edits.changed.clear()  # nothing cools down
        edits.refocus({b: float(rng.uniform(-1, 1)) for b in sorted(listed)} | ({best: 5.0}
                                                                                if (best := min(listed,
                                                                                                default=-1)) >= 0
                                                                                else {}))
        check_cut(edits)
        assert best < 0 or (1, best) in edits.expanded, "the best block did not find its place"
        for lod, index in edits.expanded:
            assert edits.exists((lod, index))
            if edits.omits:
                assert lod == 1
            else:
                assert not edits.exists((lod + 1, index // cfg.block_size)) or (lod + 1,
                                                                                index // cfg.block_size) in edits.expanded  # noqa: E501


def spans_of(edits: PathEdits) -> list[tuple[int, int, int]]:
    """(lod, first token, end) of the entries above LOD0."""
    K = edits.cfg.block_size
    return [(lod, i * K**lod, (i + 1) * K**lod) for lod, i in zip(*(x.tolist() for x in edits.cut())) if lod]


def test_the_fewest_tokens_are_left_out():
    """Of the nodes that hold nothing raw the coarsest, and of those the newest, are shown."""
    cfg = FocusConfig(budget=25, block_size=4, max_lod=2, recent=4)
    edits = PathEdits(cfg)
    edits.advance(16 * 40 + 3, {7})
    edits.refocus({7: 0.9})
    assert edits.omits and [x for x in edits.expanded] != [] and (1, 7) in edits.expanded
    shown = spans_of(edits)
    left = 25 - 3 - 4 * len(edits.expanded)
    assert len(shown) == left and all(lod == 2 for lod, *_ in shown)
    assert [start for _, start, _ in shown] == [16 * i
                                                for i in range(39 - left,
                                                               39)], "the newest, but for the node that holds the tail"
    edits = PathEdits(FocusConfig(budget=200, block_size=4, max_lod=1, recent=4))
    edits.advance(4 * 10**7 + 2, {5})
    edits.refocus({5: 0.9})
    shown = spans_of(edits)
    assert shown[-1][2] == 4 * 10**7 - 4 and all(a[2] == b[1]
                                                 for a, b in zip(shown, shown[1:])), "gists right before the tail"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.integers(1, 3), st.integers(0, 9), st.integers(0, 40))
def test_fits_says_whether_every_length_so_far_did(k, max_lod, recent, slack):
    cfg, so_far = FocusConfig(recent + 2 * k + slack, k, max_lod, recent=recent), True
    for n in range(1, 400):
        so_far = so_far and sum(entries_needed(n, cfg)) <= cfg.budget
        assert fits(n, cfg) == so_far, n


@pytest.mark.parametrize("K", [2, 8, 32])
@pytest.mark.parametrize("n", [1023, 1025, 10**4, 10**6, 10**7])
def test_a_refocus_handles_as_many_nodes_at_any_length(n, K):
    """Nothing is listed node by node that grows with the history: calls into numpy and Python stay as they are."""
    cfg = FocusConfig(3 * K + 40, K, 1, recent=K)
    edits = PathEdits(cfg)
    visited = []
    around = edits._around
    edits._around = lambda opened: (visited.append(node) or node for node in around(opened))
    edits.advance(n, {3})
    edits.refocus({3: 0.9})
    edits.cut()
    assert len(edits.expanded) <= cfg.budget and len(visited) <= cfg.budget + 1


def test_what_is_pruned_is_never_opened():
    cfg = FocusConfig(40, 4, 2, recent=4)
    edits = PathEdits(cfg, pruned={2, 9})
    edits.advance(40, set(range(10)))
    edits.refocus({b: 0.9 if b == 2 else -0.5 for b in range(10)})
    assert (1, 2) not in edits.expanded and (1, 9) not in edits.expanded
    lod, index = edits.cut()
    assert ((lod == 1) & (index == 9)).any(), "a pruned block is a gist even in the tail"


@settings(max_examples=60, deadline=None)
@given(growth(), st.lists(st.tuples(st.integers(0, 300), st.sets(st.integers(0, 3))), min_size=2, max_size=6))
def test_the_tail_is_raw_wherever_its_detail_is_there(case, steps):
    """Whatever is pruned of it, and given back, between two refocuses; tiled or not."""
    config, _, slack, seed = case
    cfg = FocusConfig(config["recent"] + 2 * config["block_size"] - 1 + slack, **{**config, "max_lod": 3})
    edits, rng, n = PathEdits(cfg), np.random.default_rng(seed), 0
    for step, pruned in steps:
        n += step
        end = n // cfg.block_size
        listed = set(range(max(end - cfg.budget // cfg.block_size - 1, 0), end)) | {b for _, b in edits.expanded}
        edits.pruned = {end - 1 - back for back in pruned if back < end}
        edits.advance(n, listed)
        edits.refocus({b: float(rng.uniform(-1, 1)) for b in sorted(listed) if b < end})
        check_cut(edits)


def test_settles_and_then_changes_nothing():
    cfg = FocusConfig(60, 4, 2, recent=4)
    edits, scores = PathEdits(cfg), {b: (b * 7 % 19) / 9.5 - 1 for b in range(32)}
    edits.advance(130, set(scores))
    for _ in range(20):
        edits.refocus(scores)
    before = set(edits.expanded)
    assert edits.refocus(scores) == type(edits.refocus(scores))() and edits.expanded == before


@pytest.mark.parametrize("n", [1, 31, 32, 33, 77, 1023, 1025])
def test_coarsest_cut_of_odd_lengths(n):
    edits = PathEdits(FocusConfig(400, 32, 2, recent=0))
    edits.n_tokens = n
    want = wc.coarsest(n, 32, 2, 400)
    used = int(want.valid_BW.sum())
    lod, index = edits.cut()
    assert lod.tolist() == want.lod_BW[0, :used].tolist() and index.tolist() == want.index_BW[0, :used].tolist()
