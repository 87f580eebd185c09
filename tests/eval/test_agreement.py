"""Rank correlation and hits against their definitions, ties included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_spearman import slow_spearman

from scripts.eval.agreement import average_ranks, best_of, hit_at, spearman

torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=9))
def test_spearman_is_the_correlation_of_ranks_with_ties(pairs):
    x, y = (list(map(float, v)) for v in zip(*pairs))
    found = spearman(torch.tensor([x, y]), torch.tensor([y, y]))
    assert found.tolist() == pytest.approx([slow_spearman(x, y), slow_spearman(y, y)], abs=1e-9)


def test_spearman_by_hand():
    x = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 2, 3], [5, 5, 5, 5]])
    y = torch.tensor([[10.0, 20, 30, 99], [4, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4]])
    assert average_ranks(x)[2].tolist() == [0, 1.5, 1.5, 3]
    assert spearman(x, y).tolist() == pytest.approx([1, -1, 4.5 / math.sqrt(4.5 * 5), 0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=8), st.integers(1, 4),
       st.integers(0, 2**32 - 1))
def test_hit_at_is_the_expected_share_of_what_matters_that_is_taken(blocks, k, seed):
    """Ties are broken at random: the mean over many breakings."""
    scores, matter = (torch.tensor([x]) for x in zip(*blocks))
    found, count = hit_at(scores.float(), matter, k), int(matter.sum())
    if not count:
        assert found.isnan().all()
        return
    noise = torch.rand(4000, len(blocks), generator=torch.Generator().manual_seed(seed))
    best = (scores + 0.5 * noise).topk(min(k, len(blocks)), 1).indices
    hits = matter.expand(4000, -1).gather(1, best).sum(1).double() / min(k, count)
    assert float(found) == pytest.approx(float(hits.mean()), abs=0.04)


def test_without_ties_hits_are_counted():
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2, -torch.inf]])
    matter = torch.tensor([[True, True, False, True, False]])
    assert [float(hit_at(scores, matter, k)) for k in (1, 2, 3, 4)] == [1.0, 0.5, pytest.approx(2 / 3), 1.0]
    assert best_of(scores, 2).tolist() == [[False, True, True, False, False]]
