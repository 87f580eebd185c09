"""The illegality term against its definition."""

import math

import torch

from mc.arms.illegal import illegal_term
from per_query import VISIBLE, check, loop, randoms

torch.set_num_threads(1)


def test_illegal_term():
    logits, illegal = randoms(3, 7, 12), ~VISIBLE & (randoms(3, 7, 12, seed=1) > 0)

    def one(b, q, seen):
        legal, banned = (sum(math.exp(logits[b, q, i].item()) for i in where)
                         for where in (seen, illegal[b, q].nonzero()[:, 0].tolist()))
        return -math.log(legal / (legal + banned)) if seen else 0.0

    check(illegal_term(logits, VISIBLE, illegal), loop(one))
