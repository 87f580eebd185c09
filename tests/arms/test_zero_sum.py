"""The zero-sum term against its definition."""

import torch

from mc.arms.zero_sum import zero_sum_term
from per_query import VISIBLE, check, loop, randoms

torch.set_num_threads(1)


def test_zero_sum_term():
    logits = randoms(3, 7, 12)
    check(zero_sum_term(logits, VISIBLE),
          loop(lambda b, q, seen: (sum(logits[b, q, i].item() for i in seen) / max(len(seen), 1)) ** 2))
