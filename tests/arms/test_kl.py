"""The KL from the earlier policy against a loop over its definition."""

import math

import torch

from mc.arms.kl import policy_term
from per_query import VISIBLE, check, loop, randoms

torch.set_num_threads(1)


def test_policy_term():
    now, earlier = randoms(3, 7, 12), randoms(3, 7, 12, seed=1)

    def one(b, q, seen):
        p, o = ([math.exp(x[b, q, i].item()) for i in seen] for x in (now, earlier))
        return sum(y / sum(o) * math.log(y / sum(o) / (x / sum(p))) for x, y in zip(p, o))

    check(policy_term(now, earlier, VISIBLE), loop(one))
