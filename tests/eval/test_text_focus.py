"""The study of focus on text: oracles by horizon, targets that refer back, and a predictor that cannot
have read the continuation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mc import H, K, N, R, tiny_base, tiny_batch, tiny_mc

from scripts.eval.comparison import FocusComparison
from scripts.eval.run_text import share
from scripts.eval.text_focus import (  # noqa: E501
    HORIZONS,
    Tried,
    far_only,
    features,
    fit,
    judge_cuts,
    keep_best,
    oracle,
    past_gate,
    search,
)

torch.set_num_threads(1)
FREE = (N - R) // K


def comparison(tokens=None, **config) -> FocusComparison:
    batch, gpt = tiny_batch(), tiny_base()
    tokens = batch.inputs if tokens is None else tokens
    targets = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    return FocusComparison(gpt, tiny_mc(gpt, **config).model, tokens, targets, N, 0, batch.rows)


def test_the_best_of_the_scores_are_kept():
    scores = torch.tensor([[3.0, 1.0, 2.0, 9.0]])
    inf = float("inf")
    assert keep_best(scores, 3, 2).tolist() == [[3, -inf, 2, -inf]] and keep_best(scores, 3,
                                                                                  9).tolist() == [[3, 1, 2, -inf]]


def test_one_search_serves_all_horizons():
    focus = comparison()
    alone = [Tried(1, one.nll_BP) for one in focus.alone()]
    tried = [*alone, *search(focus, alone, candidates=3, rounds=3)]
    assert sorted({one.blocks for one in tried}) == [1, 2, 3] and len(tried) == FREE + 2 * 2 * 3
    for horizon in (4, 8):
        for blocks in (1, 2, 3):
            found = oracle(tried, blocks, horizon)[:, :horizon].mean(1)
            expected = torch.stack([one.nll_BP
                                    for one in tried if one.blocks <= blocks])[..., :horizon].mean(-1).amin(0)
            assert torch.equal(found, expected)
    assert (oracle(tried, 3, 8).mean(1) < oracle(tried, 1, 8).mean(1)).any()


def test_judged_cuts_are_those_of_the_scores():
    focus = comparison()
    scores = {name: focus.scores(name) for name in ("lens", "recency")}
    found, utility = judge_cuts(focus, scores, [1, 2], candidates=1, rounds=2)
    assert set(found) == {"full", "window", "gists", *(f"{name}@{m}" for name in scores for m in (1, 2)),
                          *(f"oracle {h}@{m}" for h in HORIZONS for m in (1, 2))}
    only = torch.full((4, N // K), -torch.inf).index_fill(1, torch.tensor([FREE - 1, FREE - 2]), 0.0)
    assert torch.equal(found["recency@2"], focus.outcome(only).nll_BP)
    assert found["recency@2"].shape == (4, H)
    for name in scores:
        assert (found["oracle 64@2"].mean(1) <= found[f"{name}@2"].mean(1)).all()
    alone = focus.alone()
    for i, horizon in enumerate(HORIZONS):
        saved = (found["gists"] - alone[3].nll_BP)[:, :horizon].mean(1)
        torch.testing.assert_close(utility[i, :, 3], saved)


def test_features_have_not_read_the_continuation():
    focus = comparison()
    other = focus.tokens.clone()
    other[:, N:] = (other[:, N:] + 1) % 50
    assert torch.equal(features(comparison(other)), features(focus))
    other = focus.tokens.clone()
    other[:, N - 1] = (other[:, N - 1] + 1) % 50
    changed = (features(comparison(other)) != features(focus)).any(1).any(0)
    # the distance; what helped over the last 64 tokens, for no block stands before them
    # here; the last pair, which is new
    still = {1, 9, 11}
    assert set(range(len(changed))) - set(changed.nonzero()[:, 0].tolist()) == still, "the others look at the last token"  # noqa: E501
    x = features(focus)
    assert x.shape[:2] == (4, FREE) and x.isfinite().all() and x.mean(1).abs().max() < 1e-4


def test_past_gates_are_of_blocks_before_the_past():
    gate = past_gate(comparison(), 8)
    assert gate.shape == (4, N // K) and gate[:, :(N - 9) // K].ne(0).all() and not gate[:, (N - 9) // K:].any()


def test_a_predictor_finds_what_can_be_known():
    """One feature names the useful block, others are noise; rows of the future are new."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(80, 12, 5, generator=draw)
    utility = torch.where(x[..., 2] == x[..., 2].amax(1, keepdim=True), 1.0, -0.1)
    model = fit(x[:60], utility[:60])
    assert (model(x[60:]).argmax(1) == utility[60:].argmax(1)).float().mean() > 0.75
    assert torch.equal(fit(x[:60], utility[:60])(x), model(x))


def slow_far(row: list[int], n: int, window: int, length: int) -> list[bool]:
    found = []
    for place in range(n, len(row)):
        wanted = row[place - length + 1:place + 1]
        ends = [e for e in range(length - 1, place) if row[e - length + 1:e + 1] == wanted]
        found.append(any(e < place - window for e in ends) and not any(e >= place - window for e in ends))
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=12, max_size=24), st.integers(1, 8), st.integers(1, 2))
def test_far_targets(row, window, length):
    n = len(row) // 2
    assert far_only(torch.tensor([row]), n, window, length)[0].tolist() == slow_far(row, n, window, length)


def test_shares_and_when_there_are_none():
    upper, mine, lower = (np.full((5, 4), x) for x in (3.0, 2.5, 2.0))
    mask = np.ones((5, 4))
    assert share(upper, mine, lower, mask, 1)["mean"] == pytest.approx(0.5)
    assert share(upper, mine, upper - 0.05, mask, 1, least=0.1) is None and share(upper, mine, upper, mask, 1) is None
    unsure = upper - np.array([2.0, -1.0, 1.0, -1.0, 1.0])[:, None]
    assert share(upper, mine, unsure, mask, 1) is None, "a gap of 0.4 nats that is none in many resamples"
    mine[:, 2:] = 99
    mask[:, 2:] = 0
    assert share(upper, mine, lower, mask, 1, least=0.1) == {"mean": pytest.approx(0.5),
                                                             "interval": [pytest.approx(0.5)] * 2}
