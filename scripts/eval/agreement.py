"""How far two scores of the same things agree: rank correlation, and hits among the best.
Shapes: B rows, N things scored.

Equal scores: in a correlation they share the mean of their ranks; among the best each has the same chance of being
taken, so that a scorer without an opinion gets what chance gives.
"""

import torch
from torch import Tensor


def average_ranks(x_BN: Tensor) -> Tensor:
    """[B, N] float64 ranks from 0 up, equal values sharing the mean of their ranks."""
    below = (x_BN[:, None, :] < x_BN[:, :, None]).sum(-1)
    equal = (x_BN[:, None, :] == x_BN[:, :, None]).sum(-1)
    return below + (equal - 1).double() / 2


def spearman(x_BN: Tensor, y_BN: Tensor) -> Tensor:
    """[B] float64 rank correlation; 0 where one side is all alike and so names no order."""
    x, y = (ranks - ranks.mean(1, keepdim=True) for ranks in (average_ranks(x_BN), average_ranks(y_BN)))
    norm = x.norm(dim=1) * y.norm(dim=1)
    return torch.where(norm > 0, (x * y).sum(1) / norm.clamp_min(1e-12), 0.0)


def best_of(values_BN: Tensor, k: int) -> Tensor:
    """bool [B, N]: the k highest values of each row."""
    return torch.zeros_like(values_BN, dtype=torch.bool).scatter(1, values_BN.topk(k, 1).indices, True)


def hit_at(scores_BN: Tensor, matter_BN: Tensor, k: int) -> Tensor:
    """[B] float64 expected share of what matters (bool) among the k best scored, at most k of it
    counted. NaN where nothing matters."""
    above = (scores_BN[:, None, :] > scores_BN[:, :, None]).sum(-1)
    equal = (scores_BN[:, None, :] == scores_BN[:, :, None]).sum(-1)
    taken = ((k - above).double() / equal).clamp(0, 1)
    return (taken * matter_BN).sum(1) / matter_BN.sum(1).clamp_max(k)
