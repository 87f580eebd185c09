"""Random draws that depend on a key alone: (seed, step, global row, purpose). No generator state, no order of calls, so
the same numbers whatever the number of ranks or micro-steps, and nothing to checkpoint. The mixer is SplitMix64's
finalizer (Steele, Lea, Flood 2014) on int64 tensors, which wrap around.
"""

import torch
from torch import Tensor

from nanochat.common import key_seed

_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mix(z: Tensor) -> Tensor:
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor  # masking makes the shift logical
    return z


def uniform_at(rows_B: Tensor, index_BI: Tensor, *key: int | str) -> Tensor:
    """[B, I] float32 in [0, 1): a function of each global row number, each index (int64 ≥ 0; also
    [I], for all rows) and `key`."""
    base = _mix(rows_B.long() * _GOLDEN + key_seed(*key))
    bits = _mix(base[:, None] + (index_BI + 1) * _GOLDEN)
    return ((bits >> 40) & ((1 << 24) - 1)).float() / (1 << 24)


def gumbel_at(rows_B: Tensor, index_BI: Tensor, *key: int | str) -> Tensor:
    """[B, I] standard Gumbel noise, as `uniform_at`."""
    return -torch.log(-torch.log(uniform_at(rows_B, index_BI, *key).clamp(1e-7, 1 - 1e-7)))


def uniform(rows_B: Tensor, count: int, *key: int | str) -> Tensor:
    """[B, count] float32 in [0, 1): `uniform_at` 0 … count − 1."""
    return uniform_at(rows_B, torch.arange(count, device=rows_B.device), *key)


def gumbel(rows_B: Tensor, count: int, *key: int | str) -> Tensor:
    """[B, count] standard Gumbel noise."""
    return gumbel_at(rows_B, torch.arange(count, device=rows_B.device), *key)
