"""Bradley–Terry over variants, and what an edit costs, against loops over their definitions."""

import math

import torch

from mc.arms.preference import EDIT_PRICE, bradley_terry, variant_cost
from per_query import check, randoms

torch.set_num_threads(1)


def test_bradley_terry_and_the_price_of_edits():
    logits, loss = randoms(2, 6), randoms(2, 4, seed=2)
    shown = randoms(2, 4, 6, seed=3) > 0
    recency = torch.tensor([[False] * 4 + [True] * 2] * 2)
    visible = torch.tensor([[True] * 6, [True] * 5 + [False]])
    cost, expected = variant_cost(loss, shown, recency), []
    for b in range(2):
        seen = visible[b].nonzero()[:, 0].tolist()
        centred = {i: (logits[b, i] - logits[b, seen].mean()).item() for i in seen}
        strengths, costs = [], []
        for v in range(4):
            now, then = ({i for i in range(6) if x[i]} for x in (shown[b, v], recency[b]))
            costs.append(loss[b, v].item() + EDIT_PRICE * max(len(now - then), len(then - now)))
            strengths.append(sum(centred[i] for i in now if i in centred))
        best = costs.index(min(costs))
        expected.append(sum(math.log1p(math.exp(strengths[v] - strengths[best])) for v in range(4) if v != best) / 3)
        torch.testing.assert_close(cost[b], torch.tensor(costs, dtype=torch.float64))
    check(bradley_terry(logits, visible, shown, cost), torch.tensor(expected, dtype=torch.float64))


def test_among_variants_that_are_as_good_the_cheapest_edit_path_wins():
    recency = torch.tensor([[False, False, False, True, True]])
    shown = torch.tensor([[[True, True, False, False, False], [True, False, False, False, True],
                           [True, False, True, False, False]]])
    assert variant_cost(torch.zeros(1, 3), shown, recency).argmin() == 1
    assert variant_cost(torch.tensor([[0.0, 0.1, 0.1]]), shown, recency).argmin() == 0, "a price, not a rule"
