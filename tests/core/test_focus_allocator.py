"""The allocator: never beyond the budget, near the optimum, and settled once there is nothing to gain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc import working_context as wc
from mc.focus_allocator import FocusConfig, GreedyAllocator, check_feasible, pick_best, utilization
from mc.mega_context import tiling
from nanochat.common import UserError
from scripts.eval.replay import ReplayAllocator, ReplayState

torch.set_num_threads(1)
SIZES = [1, 31, 32, 33, 77, 1023, 1025]
quick = settings(max_examples=40, deadline=None)


def check_state(allocator: ReplayAllocator, state: ReplayState) -> wc.Cut:
    """The cut within the budget, its tail raw, expanded nodes existing and closed upward."""
    cfg = allocator.cfg
    cut, fits_B = allocator.cut(state)
    assert fits_B.all()
    wc.check(cut, state.n_tokens_B, cfg.budget, cfg.max_lod)
    start_BW, length_BW = wc.spans(cut)
    in_tail_BW = cut.valid_BW & (start_BW + length_BW > (state.n_tokens_B - cfg.recent)[:, None])
    assert (cut.lod_BW[in_tail_BW] == 0).all()
    for b, n in enumerate(state.n_tokens_B.tolist()):
        for level, nodes in enumerate(state.expanded):
            for i in nodes[b].nonzero()[:, 0].tolist():
                assert (i + 1) * cfg.block_size ** (level + 1) <= n
                parent = i // cfg.block_size
                if level + 1 < cfg.max_lod and (parent + 1) * cfg.block_size ** (level + 2) <= n:
                    assert state.expanded[level + 1][b, parent]
    return cut


def feasible(k, max_lod, recent, sizes, slack, span=1, n_gists=1):
    """A budget that holds every size with one deep block, and `slack` more."""
    for budget in range(1, 4000):
        cfg = FocusConfig(budget + slack, k, max_lod, recent=recent, span=span, n_gists=n_gists)
        try:
            for n in sizes:
                check_feasible(n, FocusConfig(budget, k, max_lod, recent=recent, n_gists=n_gists))
            return cfg
        except UserError:
            continue
    raise AssertionError("no budget is feasible")


def raw_blocks(cut: wc.Cut, n_blocks: int) -> torch.Tensor:
    """Blocks shown as LOD0, bool [B, N1]."""
    out = torch.zeros(cut.lod_BW.shape[0], n_blocks + 1, dtype=torch.bool)
    block_BW = torch.where(cut.valid_BW & (cut.lod_BW == 0), cut.index_BW // cut.block_size, n_blocks)
    return out.scatter(1, block_BW.clamp(max=n_blocks), True)[:, :n_blocks]


cases = st.tuples(
    st.sampled_from([2, 4, 8, 32]), st.integers(1, 3), st.lists(st.sampled_from(SIZES), min_size=1, max_size=3),
    st.integers(0, 40), st.integers(0, 200), st.integers(0, 2**31), st.sampled_from([1, 2, 5]),
)
gists = st.sampled_from([1, 1, 2, 3])  # entries of a node; as many as a block has tokens are refused


@quick
@given(cases, gists)
def test_allocate_fills_the_budget_and_keeps_every_invariant(case, n_gists):
    k, max_lod, sizes, recent, slack, seed, span = case
    cfg = feasible(k, max_lod, recent, sizes, slack, span, min(n_gists, k - 1))
    n_B, gen = torch.tensor(sizes), torch.Generator().manual_seed(seed)
    allocator, n_blocks = ReplayAllocator(cfg), max(sizes) // k
    logits_BN1 = 10 * torch.randn(len(sizes), n_blocks, generator=gen)
    state = allocator.allocate(logits_BN1, n_B)
    cut = check_state(allocator, state)
    used_B = wc.entries_used(cut)
    cheapest_B = torch.where(cut.lod_BW > 0, k * torch.where(cut.lod_BW > 1, cfg.n_gists, 1) - cfg.n_gists,
                             2**31).amin(1)
    assert (used_B + cheapest_B > cfg.budget).all(), "what could be opened does not fit"
    share_B = utilization(used_B, n_B, cfg)
    assert (share_B <= 1).all() and (max_lod > 1 < cfg.n_gists or torch.equal(share_B, torch.ones(len(sizes))))
    for raw_N1, logits_N1, n in zip(raw_blocks(cut, n_blocks), logits_BN1, sizes):  # feasible: the best block is raw
        assert n < k or raw_N1[logits_N1[: n // k].argmax()]


@quick
@given(cases, gists)
def test_refocus_and_growth_keep_every_invariant(case, n_gists):
    k, max_lod, sizes, recent, slack, seed, span = case
    gen = torch.Generator().manual_seed(seed)
    steps = [torch.tensor(sizes) + extra for extra in (0, 0, 1, 5, 38, 40)]
    cfg = feasible(k, max_lod, recent, {n for step in steps for n in step.tolist()}, slack, span, min(n_gists, k - 1))
    allocator, n_blocks = ReplayAllocator(cfg), int(steps[-1].max()) // k
    state = allocator.allocate(torch.randn(len(sizes), n_blocks, generator=gen), steps[0])
    for n_B in steps:
        grown = allocator.advance(state, n_B)
        state, report = allocator.refocus(grown, torch.randn(len(sizes), n_blocks, generator=gen).tanh())
        cut = check_state(allocator, state)
        flips_B = sum((a ^ b).sum(1) for a, b in zip(grown.expanded, state.expanded))
        assert (flips_B <= report.expands_B + report.collapses_B + report.forced_B).all()
        assert (report.edits_B <= cfg.max_edits).all()
        assert torch.equal(report.utilization_B, utilization(wc.entries_used(cut), n_B, cfg))


@quick
@given(cases)
def test_fixed_scores_settle(case):
    k, max_lod, sizes, recent, slack, seed, span = case
    cfg, n_B, gen = feasible(k, max_lod, recent, sizes, slack,
                             span), torch.tensor(sizes), torch.Generator().manual_seed(seed)
    allocator, n_blocks = ReplayAllocator(cfg), max(sizes) // k
    state = allocator.allocate(torch.randn(len(sizes), n_blocks, generator=gen), n_B)
    scores_BN1 = torch.randn(len(sizes), n_blocks, generator=gen).tanh()
    calm = 0
    for _ in range(1200):
        state, report = allocator.refocus(state, scores_BN1)
        calm = calm + 1 if not report.edits_B.any() else 0
        if calm == cfg.cooldown + 2:
            return
    raise AssertionError("still changing at fixed scores")


def flat(score: float, n_blocks: int, **blocks: float) -> torch.Tensor:
    """Scores of one row: `score` everywhere but where named, e.g. b3=0.9."""
    out = torch.full((1, n_blocks), score, dtype=torch.float64)
    for name, value in blocks.items():
        out[0, int(name[1:])] = value
    return out


def shown(allocator: ReplayAllocator, state: ReplayState) -> list[int]:
    return raw_blocks(check_state(allocator, state), state.expanded[0].shape[1])[0].nonzero()[:, 0].tolist()


def start(cfg: FocusConfig, n: int, **blocks: float) -> tuple[ReplayAllocator, ReplayState]:
    allocator = ReplayAllocator(cfg)
    return allocator, allocator.allocate(flat(-torch.inf, n // cfg.block_size, **blocks), torch.tensor([n]))


def test_a_block_is_swapped_in_only_by_the_margin_and_not_swapped_back_at_once():
    cfg = FocusConfig(budget=16 + 2 * 3, block_size=4, recent=0, margin=0.2, cooldown=2)  # room for two raw blocks
    allocator, state = start(cfg, 64, b2=1.0, b5=0.5)
    assert shown(allocator, state) == [2, 5]
    state, report = allocator.refocus(state, flat(0.0, 16, b2=0.5, b5=0.6, b9=0.65))
    assert shown(allocator, state) == [2, 5] and not report.edits_B.any()  # 0.65 does not beat 0.5 by 0.2
    state, report = allocator.refocus(state, flat(0.0, 16, b2=0.5, b5=0.6, b9=0.75))
    assert shown(allocator, state) == [5, 9]
    assert [int(x) for x in report[:4]] == [1, 1, 1, 0] and float(report.swap_rate_B) == 2 / 16  # one path edit
    for _ in range(cfg.cooldown):  # block 2 may not return, nor block 9 leave; block 5 may be swapped
        state, _ = allocator.refocus(state, flat(0.0, 16, b2=0.9, b5=0.8, b9=-0.9))
        assert shown(allocator, state) == [5, 9]
    state, _ = allocator.refocus(state, flat(0.0, 16, b2=0.9, b5=0.8, b9=-0.9))
    assert shown(allocator, state) == [2, 5]


def test_thresholds_and_max_edits():
    cfg = FocusConfig(budget=64, block_size=4, recent=0, max_edits=3)
    allocator, state = start(cfg, 64, b1=1.0, b2=1.0)
    for scores in (flat(0.19, 16), flat(-0.19, 16)):
        assert shown(allocator, allocator.refocus(state, scores)[0]) == [1, 2]
    state, report = allocator.refocus(state, flat(-0.21, 16, b7=0.3, b8=0.4, b9=0.5, b10=0.6))
    assert shown(allocator, state) == [1, 2, 8, 9, 10] and int(report.edits_B) == 3  # shows first, the best first
    state, report = allocator.refocus(state, flat(-0.21, 16, b7=0.3))
    assert shown(allocator, state) == [7, 8, 9, 10] and int(report.collapses_B) == 2  # the new ones are cooling


def test_showing_opens_the_path_and_hiding_closes_it_as_one_edit():
    cfg = FocusConfig(budget=40, block_size=4, max_lod=2, recent=0, cooldown=0)
    allocator, state = start(cfg, 64)
    assert wc.entries_used(allocator.cut(state)[0]).tolist() == [4]
    state, report = allocator.refocus(state, flat(0.0, 16, b6=0.5))
    assert shown(allocator, state) == [6] and [int(x) for x in report[:3]] == [1, 2, 0]
    kept, report = allocator.refocus(state, flat(0.0, 16, b6=-0.5))  # siblings at 0 keep the parent open
    assert wc.entries_used(allocator.cut(kept)[0]).tolist() == [7] and int(report.collapses_B) == 1
    state, report = allocator.refocus(state, flat(-0.5, 16))
    assert wc.entries_used(allocator.cut(state)[0]).tolist() == [4] and [int(x) for x in report[:3]] == [1, 0, 2]


def test_a_dull_parent_does_not_hide_a_good_grandchild():
    cfg = FocusConfig(budget=4 + 6, block_size=4, max_lod=2, recent=0)
    allocator, state = start(cfg, 64)
    state, _ = allocator.refocus(state, flat(-1.0, 16, b6=0.9))
    assert shown(allocator, state) == [6]


def test_a_bundle_opens_siblings_and_coarsens_what_is_near_as_one_edit():
    cfg = FocusConfig(budget=16 + 3 * 3, block_size=4, recent=0, span=3, max_edits=1)  # room for three raw blocks
    allocator, state = start(cfg, 64, b1=1.0, b4=1.0, b10=1.0)
    scores = flat(-0.9, 16, b1=-0.4, b4=-0.3, b10=-0.3, b5=0.9, b6=0.15, b7=0.3, b8=0.9)
    state, report = allocator.refocus(state, scores)
    # 6 is dull alone, and 8 no sibling
    assert shown(allocator, state) == [5, 6, 7] and [int(x) for x in report[:4]] == [1, 3, 3, 0]
    allocator, state = start(FocusConfig(budget=16 + 3 * 3, block_size=4, recent=0, span=2, max_edits=1), 64, b1=1.0,
                             b7=1.0, b10=1.0)
    state, report = allocator.refocus(state, flat(-0.9, 16, b1=-0.4, b7=-0.2, b10=-0.3, b6=0.3, b5=-0.4))
    # 7 is near, 1 and 10 are lower: the near pay first
    assert shown(allocator, state) == [1, 6, 10] and int(report.edits_B) == 1


def test_a_bundle_is_worth_its_mean():
    cfg = FocusConfig(budget=64, block_size=4, recent=0, span=2, max_edits=1)
    allocator, state = start(cfg, 64)
    calm, report = allocator.refocus(state, flat(-0.9, 16, b4=0.19, b5=0.2))
    assert shown(allocator, calm) == [] and not report.edits_B.any()  # two dull blocks together are dull
    state, report = allocator.refocus(state, flat(-0.9, 16, b4=0.15, b5=0.3, b6=0.1))
    assert shown(allocator, state) == [4, 5] and int(report.expands_B) == 2


def test_growth_starts_raw_then_is_forced_down_lowest_first_nearest_the_tail():
    cfg = FocusConfig(budget=24, block_size=4, recent=4, cooldown=100)
    allocator = ReplayAllocator(cfg)
    n_B = torch.tensor([16])
    state = allocator.allocate(torch.zeros(1, 12), n_B)
    assert shown(allocator, state) == [0, 1, 2, 3]
    grown = allocator.advance(state, n_B + 20)  # 36 tokens: all raw would be 36 entries, 9 blocks tile them
    assert allocator.cut(grown)[1].tolist() == [False]
    state, report = allocator.refocus(grown, flat(0.1, 12, b6=0.15, b1=0.0))
    assert int(report.forced_B) == 4 and [int(x) for x in report[:3]] == [0, 0, 0]
    assert shown(allocator, state) == [0, 2, 3, 6, 8]  # 1 is lowest; 7, 5, 4 are the last of the ties; 8 is the tail


@pytest.mark.parametrize("span", [1, 4])
def test_permuting_the_batch_permutes_the_result(span):
    gen, order, n_B = torch.Generator().manual_seed(0), torch.tensor([2, 0, 3, 1]), torch.tensor([1025, 31, 77, 1023])
    allocator = ReplayAllocator(feasible(8, 2, 16, n_B.tolist(), 60, span))
    scores, later = torch.randn(4, 128, generator=gen), torch.randn(4, 128, generator=gen).tanh()

    def run(scores, later, n_B):
        state, report = allocator.refocus(allocator.allocate(scores, n_B), later)
        return [*allocator.cut(state)[0][:3], *state.changed_at, *report]

    for a, b in zip(run(scores, later, n_B), run(scores[order], later[order], n_B[order]), strict=True):
        assert torch.equal(a[order], b)


def test_scores_are_only_compared():
    """Any sign and size, -inf and NaN never shown; utilities at or below zero are not shown either."""
    allocator = ReplayAllocator(FocusConfig(budget=8 + 9, block_size=4, recent=0))
    n_B = torch.tensor([32])
    logits = torch.tensor([[-900.0, -3.0, -torch.inf, torch.nan, -5e6, -2.0, -80.0, -4.0]])
    assert shown(allocator, allocator.allocate(logits, n_B)) == [1, 5, 7]
    only = torch.tensor([[-torch.inf, 0.1, -torch.inf, torch.nan, -torch.inf, -0.1, -torch.inf, -torch.inf]])
    assert shown(allocator, allocator.allocate(only, n_B)) == [1, 5]


def test_of_equal_scores_the_cheapest_is_shown_then_the_nearest_to_the_tail():
    """Of three blocks the last two. Of eight 1, which is best, then its siblings, which cost 3 entries, not 5, which
    costs 6."""
    scores_BN = torch.tensor([[0.5, 0.9, 0.5, 0.5, -torch.inf, 0.5, -torch.inf, -torch.inf]])
    three, eight = (GreedyAllocator(FocusConfig(budget, 4, 2, recent=0)) for budget in (3 + 6, 2 + 6 + 6))
    assert shown(three, three.allocate(torch.full((1, 3), 0.5), torch.tensor([12]))) == [1, 2]
    assert shown(eight, eight.allocate(scores_BN, torch.tensor([32]))) == [1, 2, 3]


@quick
@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5]), st.integers(0, 3), st.booleans()), min_size=1, max_size=9))
def test_the_best_choice_is_the_highest_then_the_cheapest_then_the_last(choices):
    score, cost, can = (torch.tensor([column]) for column in zip(*choices))
    allowed = [i for i, (*_, may) in enumerate(choices) if may]
    best = max(allowed, key=lambda i: (choices[i][0], -choices[i][1], i), default=None)
    assert best is None or int(pick_best(score, cost, can)) == best


def test_infeasible_budgets_are_refused_with_the_numbers():
    cfg = FocusConfig(budget=128, block_size=32, recent=32)
    check_feasible(1024, cfg, deep_blocks=2)  # 31 + 62 + 32 = 125
    with pytest.raises(UserError, match=r"tiling 31 \+ 3 raw block\(s\) 93 \+ recent tail 32 = 156"):
        check_feasible(1024, cfg, deep_blocks=3)
    with pytest.raises(UserError, match="raise max_lod"):
        check_feasible(8192, cfg)
    check_feasible(8192, FocusConfig(budget=128, block_size=32, max_lod=2, recent=0))
    assert FocusConfig(budget=4096).recent == 128 and FocusConfig(budget=100).recent == 25


@quick
@given(st.sampled_from([3, 4, 8]), st.integers(1, 3), st.integers(1, 90), gists, st.integers(0, 2**31))
def test_opening_a_node_adds_its_price(k, max_lod, n, n_gists, seed):
    """Against the cut itself: entries of any state = the tiling + the prices of the expanded nodes."""
    cfg, gen = FocusConfig(n + 1, k, max_lod, recent=0, n_gists=n_gists if n_gists < k
                           else 1), torch.Generator().manual_seed(seed)
    allocator = ReplayAllocator(cfg)
    state = allocator.allocate(torch.randn(1, n // k,
                                           generator=gen).masked_fill(torch.rand(1, n // k, generator=gen) < 0.5,
                                                                      -torch.inf), torch.tensor([n]))
    price = sum(cfg.price(lod) * int(open_BN.sum()) for lod, open_BN in enumerate(state.expanded, 1))
    assert int(wc.entries_used(allocator.cut(state)[0])) == tiling(n, k, max_lod, cfg.n_gists) + price


@pytest.mark.parametrize(
    "bad", [dict(budget=0), dict(n_gists=32), dict(n_gists=0), dict(block_size=1), dict(max_lod=0),
            dict(recent=-1), dict(margin=-0.1),
            dict(tau_expand=3.0), dict(max_edits=-1), dict(cooldown=-1), dict(span=0)],
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        FocusConfig(**{"budget": 64, **bad})


def test_compiles_once_for_changing_values():
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    allocator = GreedyAllocator(FocusConfig(budget=60, block_size=8, max_lod=2, recent=8))

    def step(scores, n_B):
        return tuple(allocator.cut(allocator.allocate(scores, n_B))[0][:3])

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    gen = torch.Generator().manual_seed(0)
    for n in (77, 130, 200):
        args = torch.randn(2, 26, generator=gen), torch.tensor([n, n // 2])
        assert all(map(torch.equal, compiled(*args), step(*args)))
    assert len(graphs) == 1
