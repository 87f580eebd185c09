"""What tells a working MegaContext from a broken one: each number against its formula,
spelled out entry by entry (G2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_spearman import slow_spearman
from tiny_mc import K, N, tiny_base, tiny_batch, tiny_mc

from mc.focus_allocator import FocusConfig
from mc.mega_context import Tree, TreeShape
from mc.telemetry import gist_statistics, shares_by_lod, spread
from mc.working_context import from_expanded
from scripts.eval.comparison import FocusComparison, plain_outcomes
from scripts.eval.probe import SAMPLED, FocusDynamics, just_fitting_price, probe_batch, replay
from scripts.eval.replay import ReplayAllocator

torch.set_num_threads(1)
seeds = st.integers(0, 2**32 - 1)


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Every step


@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(8, 70))
def test_shares_by_lod_count_entries_and_tokens(seed, n):
    allocator = ReplayAllocator(FocusConfig(budget=n, block_size=4, max_lod=2, recent=4))
    n_B = torch.tensor([n, max(n - 7, 4)])
    scores = rand(seed, 2, n // 4).masked_fill(rand(seed + 1, 2, n // 4) < 0.5, -torch.inf)
    cut, fits = from_expanded(allocator.allocate(scores, n_B).expanded, n_B, 4, n)
    assert fits.all()
    found = shares_by_lod(cut, n_B, 2)
    for lod in range(3):
        entries = [[lods[i] == lod for i in range(sum(valid))]
                   for lods, valid in zip(cut.lod_BW.tolist(), cut.valid_BW.tolist())]
        assert float(found[f"mc.focus.entry_share{{lod={lod}}}"]) == pytest.approx(sum(sum(e) / len(e)
                                                                                       for e in entries) / 2)
        tokens = [sum(e) * 4**lod / n for e, n in zip(entries, n_B.tolist())]
        assert float(found[f"mc.focus.token_share{{lod={lod}}}"]) == pytest.approx(sum(tokens) / 2)
    assert float(found["mc.focus.compression"]) == pytest.approx(float((n_B / cut.valid_BW.sum(1)).mean()))


@pytest.mark.parametrize("nodes, width", [(5, 16), (16, 5)])
def test_gist_statistics_are_those_of_the_covariance(nodes, width):
    table = torch.cat([torch.zeros(2, nodes * 4, width),
                       torch.randn(2, nodes, width, generator=torch.Generator().manual_seed(0))], 1).double()
    found = gist_statistics(Tree(table, TreeShape(nodes * 4, 4, 1)))
    rank, variance = [], []
    for row in table[:, nodes * 4:]:
        values = torch.linalg.eigvalsh(torch.cov(row.T, correction=0))
        rank.append(values.sum() ** 2 / values.square().sum())
        variance.append(values.sum() / width)
    assert float(found["mc.gist.effective_rank{lod=1}"]) == pytest.approx(float(sum(rank) / 2))
    assert float(found["mc.gist.variance{lod=1}"]) == pytest.approx(float(sum(variance) / 2))
    assert float(found["mc.gist.rms{lod=1}"]) == pytest.approx(float(table[:, nodes
                                                                           * 4:].square().mean(-1).sqrt().mean()))


def test_gists_that_collapse_are_seen():
    shape, tokens = TreeShape(40, 4, 2), torch.zeros(1, 40, 8)
    line = torch.linspace(-1, 1, 10)[None, :, None] * torch.ones(8)
    for gists, rank, variance in ((line, 1, line.var(correction=0)), (torch.ones(1, 10, 8), 0, 0)):
        found = gist_statistics(Tree(torch.cat([tokens, gists, torch.ones(1, 2, 8)], 1), shape))
        assert float(found["mc.gist.effective_rank{lod=1}"]) == pytest.approx(rank, abs=1e-5)
        assert float(found["mc.gist.variance{lod=1}"]) == pytest.approx(float(variance))
    single = gist_statistics(Tree(torch.ones(1, 20 + 5 + 1, 8), TreeShape(20, 4, 2)))
    assert not [name for name in single if "lod=2" in name], "one node has no variance"


@pytest.mark.parametrize("queries", [1, 7])
def test_spread_is_the_deviation_over_visible_blocks(queries):
    logits, visible = torch.randn(3, queries, 6), rand(1, 3, queries, 6) < 0.6
    visible[0, 0] = False
    rows = []
    for x, v in zip(logits, visible):
        several = [q[m].std(correction=0) for q, m in zip(x, v) if m.sum() > 1]
        rows.append(sum(several) / len(several) if several else torch.tensor(0.0))
    assert float(spread(logits, visible)) == pytest.approx(float(sum(rows) / 3), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Focus over time


def slow_dynamics(steps, cooldown: int) -> dict[str, float]:
    """What `FocusDynamics` counts, node by node: a history of who set which node to what, and when."""
    flipped = undone = 0
    stays, open_since = [], {}
    edits: dict[tuple, tuple[int, bool]] = {}
    for now, (before, after, _) in enumerate(steps, 1):
        for level, (then, new, at) in enumerate(zip(before.expanded, after.expanded, after.changed_at)):
            for b, node in ((b, i) for b in range(then.shape[0]) for i in range(then.shape[1])):
                was, is_, key = bool(then[b, node]), bool(new[b, node]), (level, b, node)
                by_edit = int(at[b, node]) == now and was != is_
                if by_edit:
                    flipped += 1
                    last = edits.get(key)
                    undone += bool(last and now - last[0] <= 2 * max(cooldown, 1) and last[1] == was)
                    edits[key] = (now, is_)
                if level == 0 and was and not is_ and key in open_since:
                    stays.append(now - open_since.pop(key))
                if level == 0 and by_edit and is_:
                    open_since[key] = now
    total = len(steps)
    lasting = [total - since for since in open_since.values() if total > since]
    every = stays + lasting or [total]
    return {"mc.focus.thrash": undone / max(flipped, 1), "mc.focus.residency": sum(every) / max(len(stays), 1),
            "mc.focus.residency_p95": float(torch.tensor(every).double().quantile(0.95)),
            "mc.focus.swap_rate": sum(float(r.swap_rate_B.mean()) for *_, r in steps) / total}  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(seed=seeds, cooldown=st.integers(0, 3), max_lod=st.integers(1, 2), growing=st.booleans())
def test_dynamics_against_a_history_of_every_node(seed, cooldown, max_lod, growing):
    """Also where the number of blocks grows, as in a session."""
    allocator = ReplayAllocator(FocusConfig(budget=24, block_size=4, max_lod=max_lod, recent=4, cooldown=cooldown,
                                            max_edits=3))
    blocks, rows = 14, 2
    n = lambda t: torch.full((rows,), (6 + min(t, 8)) * 4)  # noqa: E731
    state, steps, dynamics = allocator.allocate(rand(seed, rows, blocks), n(0)), [], FocusDynamics(cooldown)
    for t in range(1, 12):
        before = allocator.advance(state, n(t))
        state, report = allocator.refocus(before, 2 * rand(seed + t, rows, blocks) - 1)
        seen = [x if not growing
                else x._replace(**{name: tuple(level[:, : int(n(t)[0]) // 4 // 4**i]
                                               for i, level in enumerate(getattr(x, name)))
                                                    for name in ("expanded", "changed_at")})
                for x in (before, state)]  # fmt: skip
        dynamics.update(*seen, report)
        steps.append((*seen, report))
    found = {name: float(value) for name, value in dynamics.metrics().items()}
    expected = slow_dynamics(steps, cooldown)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_calm_lens_is_calm_and_a_fickle_one_thrashes():
    """Scores that stay change nothing once settled; scores drawn anew at each refocus are undone as
    soon as the cooldown allows."""
    gpt = tiny_base(dtype=torch.float32)
    mc = tiny_mc(gpt, budget=28).model
    embeds = gpt.embed(tiny_batch(range(16)).inputs).detach()
    still = rand(0, 16, N // K)
    calm = replay(mc, embeds, N, lambda n_B: still).metrics()
    fickle = replay(mc, embeds, N, lambda n_B: 20 * (rand(int(n_B[0]), 16, N // K) - 0.5)).metrics()
    assert calm["mc.focus.thrash"] < 0.05 and calm["mc.focus.thrash"] < fickle["mc.focus.thrash"] / 3
    assert calm["mc.focus.swap_rate"] < fickle["mc.focus.swap_rate"] / 2
    assert calm["mc.focus.residency"] > fickle["mc.focus.residency"]


@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(10, 16))
def test_the_just_fitting_price_parts_what_the_budget_shows_from_what_it_does_not(seed, n):
    allocator = ReplayAllocator(FocusConfig(budget=28, block_size=4, max_lod=1, recent=4))
    logits, n_B = 10 * rand(seed, 2, 16), torch.tensor([4 * n, 40])
    price, shown = just_fitting_price(allocator, logits, n_B), allocator.allocate(logits, n_B).expanded[0]
    for b in range(2):
        free = range(int(n_B[b]) // 4 - 1)  # without the recent block
        assert [bool(logits[b, i] > price[b]) for i in free] == [bool(shown[b, i]) for i in free]


# ---------------------------------------------------------------------------------------------------------------------
# The probe


def test_the_probe_measures_what_it_says():
    gpt, batch = tiny_base(), tiny_batch()
    mc = tiny_mc(gpt, budget=28)
    found = {str(name): float(value) for name, value in probe_batch(mc, gpt, batch).items()}
    focus = FocusComparison(gpt, mc.model, batch.inputs, batch.targets, N, mc.seed, batch.rows)
    plain = plain_outcomes(gpt, batch.inputs, batch.targets, N, 28)
    lens, full = focus.outcome(focus.scores("lens")).nll_B, plain["full"].nll_B
    assert found["mc.val.nll{shown=full}"] == pytest.approx(float(full.mean()))
    assert found["mc.val.nll{shown=window}"] == pytest.approx(float(plain["window"].nll_B.mean()))
    assert found["mc.val.delta_nll{shown=lens}"] == pytest.approx(float((lens - full).mean()))
    assert found["mc.val.delta_nll{shown=lod2}"] == pytest.approx(float((focus.at_lod(2).nll_B - full).mean()))
    blocks = (N - mc.config.protected) // K
    assert blocks <= SAMPLED, "all are sampled here"
    nothing = torch.full((4, N // K), -torch.inf)
    utility = []
    for block in range(blocks):
        one = nothing.clone()
        one[:, block] = 1
        utility.append(focus.outcome(nothing).nll_B - focus.outcome(one).nll_B)
    utility, scores = torch.stack(utility, 1).tolist(), focus.scores("lens").tolist()
    correlation = [slow_spearman(s[:len(u)], u) for s, u in zip(scores, utility)]
    assert found["mc.lens.rank_correlation"] == pytest.approx(sum(correlation) / 4)
    hits = [max(range(len(u)), key=u.__getitem__) == max(range(len(u)), key=s.__getitem__)
            for s, u in zip(scores, utility)]
    assert found["mc.lens.hit_at{k=1}"] == pytest.approx(sum(hits) / 4)
    assert found["mc.lens.regret"] >= float((lens - torch.stack([focus.outcome(focus.scores(p)).nll_B
                                                                 for p in ("random", "recency",
                                                                           "lens")]).amin(0)).mean()) > -1e-12
    assert set(found) >= {f"mc.focus.{name}" for name in ("swap_rate", "residency", "residency_p95", "thrash",
                                                          "replay_utilization", "forced")}


def test_bands_are_measured_at_their_ratios(monkeypatch):
    seen, gpt = [], tiny_base()
    mc, outcome = tiny_mc(gpt, budget=28, recent=K), FocusComparison.outcome
    monkeypatch.setattr(FocusComparison,
                        "outcome", lambda self, scores: seen.append((self.allocator.cfg.budget, outcome(self, scores)))
                        or seen[-1][1])
    found = probe_batch(mc, gpt, tiny_batch())
    bands = [name for name in found if name.startswith("mc.val.band_delta_nll")]
    assert bands == ["mc.val.band_delta_nll{band=to_5}"], "an eighth of 56 tokens holds no coarsest cut and tail"
    entries = [o.entries_B for budget, o in seen if budget == N // 4]
    assert len(entries) == 1 and (entries[0] <= N // 4).all() and (N / entries[0]).max() <= 5


def test_the_probe_changes_nothing():
    gpt, batch = tiny_base(), tiny_batch()
    mc, generator = tiny_mc(gpt), torch.get_rng_state()
    first, second = probe_batch(mc, gpt, batch), probe_batch(mc, gpt, batch)
    assert {k: float(v) for k, v in first.items()} == {k: float(v) for k, v in second.items()}
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for m in (gpt, mc.model) for p in m.parameters()) and mc._pending is None


def test_a_frozen_lens_agrees_with_nothing():
    """No opinion: no correlation, and hits as by chance."""
    gpt = tiny_base()
    mc = tiny_mc(gpt, budget=28)
    with torch.no_grad():
        mc.model.lensnet.log_gain.fill_(-torch.inf)
        mc.model.lensnet.distance_steps.zero_()
    found = probe_batch(mc, gpt, tiny_batch())
    assert float(found["mc.lens.rank_correlation"]) == 0
    assert float(found["mc.lens.hit_at{k=1}"]) == pytest.approx(1 / ((N - mc.config.protected) // K))


def test_a_history_one_block_over_the_budget_has_no_dynamics():
    """Nothing to refocus: no metrics, and no error in the middle of a training."""
    assert FocusDynamics(2).metrics() == {}
