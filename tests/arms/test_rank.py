"""The ranking term against a loop over its definition."""

import torch

from mc.arms.rank import MARGIN, RIVALS, rank_term
from per_query import VISIBLE, check, loop, randoms

torch.set_num_threads(1)


def test_rank_term():
    logits, target = 3 * randoms(3, 7, 12), randoms(3, 7, 12, seed=1).clamp_min(0)

    def one(b, q, seen):
        if len(seen) < 2:
            return 0.0
        best = max(seen, key=lambda i: target[b, q, i])
        rivals = sorted((logits[b, q, i].item() for i in seen if i != best), reverse=True)[:RIVALS]
        return sum(max(MARGIN - logits[b, q, best].item() + x, 0) for x in rivals) / len(rivals)

    check(rank_term(logits, target, VISIBLE), loop(one))
