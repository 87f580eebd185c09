"""The comparison that everything is about: the same targets for every system, and an oracle that none of them beats."""

import pytest
import torch
from tiny_mc import H, K, N, R, T, W, tiny_base, tiny_batch, tiny_mc

from mc.model import recency_scores, run_entries, with_continuation
from mc.teachers import attention_mass, gate_utility, keep_gradients
from nanochat.gpt import GPT, GPTConfig, token_losses
from scripts.eval.comparison import FocusComparison, Outcome, plain_outcomes

torch.set_num_threads(1)
POLICIES = ("random", "recency", "lens")
BLOCKS = N // K


def comparison(gpt: GPT, rows=(0, 1, 2, 3), seed: int = 0, tokens=None, **config) -> FocusComparison:
    batch = tiny_batch(rows)
    mc = tiny_mc(gpt, **{"budget": 32, **config}).model
    return FocusComparison(gpt, mc, batch.inputs if tokens is None else tokens, batch.targets, N, seed, batch.rows)


def mean_nll(logits, targets) -> torch.Tensor:
    return torch.stack([token_losses(x[None], t[None])[0][t >= 0].mean() for x, t in zip(logits, targets)])


@torch.no_grad()
def test_full_and_window_are_explicit_forwards_on_the_same_targets():
    gpt, batch = tiny_base(), tiny_batch()
    plain = plain_outcomes(gpt, batch.inputs, batch.targets, N, W)
    wanted = batch.targets[:, N - 1:N - 1 + H]
    assert (wanted >= 0).any(1).all()
    for name, begin, entries in (("full", 0, N), ("window", N - W, W)):
        logits = gpt(batch.inputs[:, begin:N - 1 + H])[:, -H:]
        torch.testing.assert_close(plain[name].nll_B, mean_nll(logits, wanted))
        right = torch.stack([(x.argmax(-1) == t)[t >= 0].double().mean() for x, t in zip(logits, wanted)])
        torch.testing.assert_close(plain[name].acc_B.double(), right)
        assert plain[name].entries_B.tolist() == [entries] * 4 and plain[name].shown_BN is None


@torch.no_grad()
def test_a_working_context_of_every_token_is_the_full_context():
    gpt, batch = tiny_base(), tiny_batch()
    focus = comparison(gpt)
    focus.mc = tiny_mc(gpt, T=T + N, budget=N + R, recent=R).model
    focus.allocator = focus.mc.allocator
    shown = focus.outcome(torch.zeros(4, BLOCKS))
    assert shown.shown_BN.all() and shown.entries_B.tolist() == [N] * 4
    torch.testing.assert_close(shown.nll_B, plain_outcomes(gpt, batch.inputs, batch.targets, N, W)["full"].nll_B,
                               rtol=0, atol=1e-12)
    nothing = focus.outcome(torch.full((4, BLOCKS), -torch.inf))
    assert nothing.shown_BN.sum(1).tolist() == [R // K] * 4 and not torch.isclose(nothing.nll_B, shown.nll_B).any()


@torch.no_grad()
def test_an_outcome_is_the_nll_given_the_chosen_cut():
    gpt, batch = tiny_base(), tiny_batch()
    focus = comparison(gpt)
    scores = torch.randn(4, BLOCKS, generator=torch.Generator().manual_seed(0))
    outcome, mc = focus.outcome(scores), focus.mc
    state = mc.allocator.allocate(scores, torch.full((4,), N))
    entries = with_continuation(mc.allocator.cut(state)[0], torch.full((4,), N), H - 1)
    logits = gpt.logits(run_entries(gpt, mc, mc.build_tree(gpt.embed(batch.inputs)), batch.inputs, entries))
    logits = torch.stack([x[u - 1:u - 1 + H] for x, u in zip(logits, entries.used_B.tolist())])
    torch.testing.assert_close(outcome.nll_B, mean_nll(logits, batch.targets[:, N - 1:N - 1 + H]))
    assert torch.equal(outcome.entries_B, entries.used_B) and outcome.entries_B.max() <= W
    raw = entries.valid_BM & (entries.lod_BM == 0) & (entries.index_BM < N)
    for b in range(4):
        assert entries.index_BM[b][raw[b]].tolist() == [t for t in range(N) if outcome.shown_BN[b, t // K]]


def successor(right: bool) -> GPT:
    """Sure that the next token is the present one plus one, or that it is the same."""
    gpt = GPT(GPTConfig(128, 50, 1, 4, 4, 64, value_embeds=False)).double()
    with torch.no_grad():
        gpt.transformer.wte.weight.copy_(torch.eye(64))
        gpt.lm_head.weight.zero_()[:40, :40] = 20 * torch.eye(40).roll(int(right), 0)
    return gpt


@pytest.mark.parametrize("right", [True, False])
@torch.no_grad()
def test_every_system_is_judged_on_the_next_token(right):
    gpt = successor(right)
    tokens = (torch.arange(T + 1) + 7 * torch.arange(4)[:, None]) % 40
    focus = FocusComparison(gpt, tiny_mc(gpt).model, tokens[:, :-1], tokens[:, 1:], N, 0, torch.arange(4))
    outcomes = plain_outcomes(gpt, tokens[:, :-1], tokens[:, 1:], N, W) | {p: focus.outcome(focus.scores(p))
                                                                           for p in POLICIES}
    for name, o in outcomes.items():
        assert (o.acc_B == right).all() and ((o.nll_B < 0.01) if right else (o.nll_B > 10)).all(), name


@torch.no_grad()
def test_only_the_continuations_targets_count():
    gpt = tiny_base()
    focus = comparison(gpt)
    before = focus.outcome(focus.scores("recency"))
    focus.targets = focus.targets.clone()
    focus.targets[:, :N - 1] = 0
    focus.targets[:, N - 1 + H:] = 0
    assert torch.equal(focus.outcome(focus.scores("recency")).nll_B, before.nll_B)
    for place in range(N - 1, N - 1 + H):
        other = focus.targets.clone()
        other[:, place] = torch.where(other[:, place] == 3, 4, 3)
        focus.targets, kept = other, focus.targets
        assert not torch.isclose(focus.outcome(focus.scores("recency")).nll_B, before.nll_B, atol=1e-12).any()
        focus.targets = kept


def test_the_oracle_is_never_beaten():
    focus = comparison(tiny_base(), rows=range(6))
    tested = {p: focus.outcome(focus.scores(p)) for p in POLICIES}
    tried = []
    oracle = focus.oracle(tested, lambda: tried.append(1))
    teachers = [focus.outcome(s) for s in focus.teacher_scores().values()]
    alone = []
    for block in range(BLOCKS - R // K):
        scores = torch.full((6, BLOCKS), -torch.inf)
        scores[:, block] = 0
        alone.append(focus.outcome(scores))
        assert alone[-1].shown_BN.sum(1).tolist() == [1 + R // K] * 6
    nothing = focus.outcome(torch.full((6, BLOCKS), -torch.inf))
    assert nothing.shown_BN.sum(1).tolist() == [R // K] * 6
    for other in [*tested.values(), *teachers, *alone, nothing]:
        assert (oracle.nll_B <= other.nll_B).all()
    assert (oracle.nll_B < torch.stack([o.nll_B for o in tested.values()]).amin(0)).any()
    assert len(tried) % (BLOCKS - R // K) == 0 and len(tried) >= 2 * (BLOCKS - R // K)
    assert (oracle.entries_B <= W).all()
    best = torch.stack([o.nll_B for o in alone]).argmin(0)
    for block in range(BLOCKS - R // K):  # greedy: each other block beside the best
        scores = torch.full((6, BLOCKS), -torch.inf).scatter(1, best[:, None], 0.0)
        scores[:, block] = 0
        assert (oracle.nll_B <= focus.outcome(scores).nll_B).all()
    again = focus.outcome(torch.where(oracle.shown_BN, 0.0, -torch.inf))  # what it reports is one cut's
    torch.testing.assert_close(again.nll_B, oracle.nll_B)
    tested["lens"].nll_B[2] = -1.0
    assert focus.oracle(tested).nll_B.tolist() == pytest.approx(oracle.nll_B.index_fill(0, torch.tensor(2),
                                                                                        -1.0).tolist())


def test_teacher_scores_are_the_teachers_on_the_continuations_queries():
    gpt, batch = tiny_base(), tiny_batch()
    scores = comparison(gpt).teacher_scores()
    captured, wanted, queries = [], batch.targets[:, N - 1:N - 1 + H], slice(N - 1, N - 1 + H)
    hidden = gpt.hidden(batch.inputs, capture=captured)
    keep_gradients(captured)
    token_losses(gpt.logits(hidden[:, queries]), wanted).sum().backward()
    counted = (wanted >= 0)[..., None]
    for name, teacher in (("gate", gate_utility), ("attention", attention_mass)):
        expected = (teacher(captured, slice(None), queries, BLOCKS, K) * counted).sum(1)
        torch.testing.assert_close(scores[name], expected, rtol=0, atol=1e-12)
        assert not scores[name].requires_grad


def test_teacher_scores_leave_no_gradient_behind():
    gpt = tiny_base()
    with torch.no_grad():
        comparison(gpt).teacher_scores()
    assert all(p.grad is None for p in gpt.parameters())


def test_scores():
    gpt = tiny_base()
    focus = comparison(gpt)
    random = focus.scores("random")
    assert torch.equal(random[[2]], comparison(gpt, rows=[2]).scores("random")) and not torch.equal(random,
                                                                                                    comparison(gpt, seed=1).scores("random"))  # noqa: E501
    assert torch.equal(focus.scores("recency"), recency_scores(focus.n_B, BLOCKS))
    other = focus.tokens.clone()
    other[:, N:] = (other[:, N:] + 1) % 50
    assert torch.equal(focus.scores("lens"),
                       comparison(gpt, tokens=other).scores("lens")), "the lens has seen the continuation"
    other = focus.tokens.clone()
    other[:, N - 1] = (other[:, N - 1] + 1) % 50
    assert not torch.equal(focus.scores("lens"), comparison(gpt, tokens=other).scores("lens"))


def test_permuting_the_rows_permutes_the_outcomes():
    gpt, order = tiny_base(), [2, 0, 3, 1]
    one, two = comparison(gpt), comparison(gpt, rows=order)
    for p in POLICIES:
        a, b = one.outcome(one.scores(p)), two.outcome(two.scores(p))
        assert torch.equal(a.shown_BN[order], b.shown_BN)
        torch.testing.assert_close(a.nll_B[order], b.nll_B)


def test_outcomes_are_joined_row_by_row():
    a, b = (Outcome(*(torch.full((n,), float(n)) for _ in range(3)), shown)
            for n, shown in ((2, torch.zeros(2, 5)), (3, torch.ones(3, 5))))
    both = Outcome.cat([a, b])
    assert both.nll_B.tolist() == [2, 2, 3, 3, 3] and both.shown_BN.shape == (5, 5)
    assert Outcome.cat([Outcome(a.nll_B, a.acc_B, a.entries_B)] * 2).shown_BN is None


@pytest.mark.parametrize("n_gists", [1, 2])
@torch.no_grad()
def test_a_history_at_one_lod_costs_its_gists(n_gists):
    """C5: G entries per node; what has no such node, and the protected tail, are raw."""
    gpt, batch = tiny_base(), tiny_batch()
    mc = tiny_mc(gpt, gists_per_block=n_gists, budget=40).model
    focus = FocusComparison(gpt, mc, batch.inputs, batch.targets, N, 0, batch.rows)
    protected = mc.config.protected
    outcomes = {lod: focus.at_lod(lod) for lod in (0, 1, 2)}
    blocks = (N - protected) // K
    entries = {0: N, 1: n_gists * blocks + protected, 2: n_gists * (blocks // K + blocks % K) + protected}
    assert {lod: set(o.entries_B.tolist()) for lod, o in outcomes.items()} == {lod: {e} for lod, e in entries.items()}
    torch.testing.assert_close(outcomes[0].nll_B, plain_outcomes(gpt, batch.inputs, batch.targets, N, W)["full"].nll_B,
                               rtol=0, atol=1e-12)
    assert not torch.isclose(outcomes[1].nll_B, outcomes[2].nll_B).any()
