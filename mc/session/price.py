"""From the lens's logits to the scores that a refocus goes by.

    score = tanh(logit − λ)        λ, the price of an entry: half way between the worst logit that fits the budget and
                                   the best that does not, so that what fits scores above 0

Allocators other than greedy are arms (`--mc_allocator=bundle:…`, `stochastic:…`): how many adjacent blocks one edit
may show, and noise on the logits.

The adaptive price adds a shift of its own to λ, which falls while less than TARGET of the budget is
used and returns slowly towards 0
while it is: between the market price and +tau_expand lie blocks that would fit but are not shown.

Shapes: B rows, I blocks that have a logit (of a session, those that its search names).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc.arm import ALLOCATORS, load
from mc.focus_allocator import FocusConfig
from mc.lensnet import focus_scores
from mc.mega_context import tiling
from nanochat.common import UserError

TARGET = 0.95  # utilization below which the adaptive price falls
FALL, RETURN, LOWEST = 0.2, 0.02, -3.0  # of the shift, per refocus [logits]; there tanh has saturated


@dataclass(frozen=True)
class Allocator:
    """A value of `--mc_allocator`: greedy without an arm."""

    arm: Any = None

    @property
    def span(self) -> int:
        """Adjacent blocks that one edit may show."""
        return self.arm.span if self.arm else 1

    @staticmethod
    def parse(text: str) -> "Allocator":
        """UserError for anything but greedy and the arms."""
        name, colon, values = text.partition(":")
        if name in ALLOCATORS:
            arm = load(ALLOCATORS[name])
            try:
                return Allocator(arm.parse(values))
            except ValueError:
                raise UserError(f"--mc_allocator={text}: use greedy, or {arm.SYNTAX}") from None
        if text != "greedy":
            raise UserError(f"--mc_allocator={text}: use greedy, or the arms {', '.join(f'{x}:…' for x in ALLOCATORS)}")
        return Allocator()

    def scores(self, logits_BI: Tensor, index_BI: Tensor, rival_BI: Tensor, room_B: Tensor, shift_B: Tensor, *,
               rows_B: Tensor, seed: int,
               refocus: int) -> Tensor:
        """[B, I] scores in [−1, 1] of the blocks `index`. rival: those that compete for the `room`
        (in blocks) that is to be had."""
        if self.arm:
            logits_BI = self.arm.disturb(logits_BI, index_BI, rows_B, seed, refocus)
        price_B = market_price(logits_BI.masked_fill(~rival_BI, -torch.inf), room_B) + shift_B
        return focus_scores(logits_BI, price_B[:, None])


def market_price(logits_BI: Tensor, room_B: Tensor) -> Tensor:
    """[B] half way between the logit of rank room ≥ 1 and the next; the lowest − 1 where all fit, 0
    without any. −inf: no rival."""
    count_B = logits_BI.isfinite().sum(1)
    if not logits_BI.shape[1]:
        return logits_BI.new_zeros(len(logits_BI))
    falling_BI = logits_BI.sort(1, descending=True).values
    at = lambda rank_B: falling_BI.gather(1, rank_B.clamp(0, falling_BI.shape[1] - 1)[:, None])[:, 0]  # noqa: E731
    scarce_B = (at(room_B - 1) + at(room_B)) / 2
    return torch.where(count_B > room_B, scarce_B, torch.where(count_B > 0, at(count_B - 1) - 1, 0.0))


def room(n_tokens_B: Tensor, cfg: FocusConfig) -> Tensor:
    """[B] blocks that the budget shows raw beside the protected tail, each at the full price of
    its path; at least 1. int64."""
    k, widths = cfg.block_size, [cfg.block_size**lod for lod in range(1, cfg.max_lod + 1)]
    nodes_B = (cfg.budget - tiling(n_tokens_B, k, cfg.max_lod)) // (k - 1)
    tail_B = sum(n_tokens_B // w - (n_tokens_B - cfg.recent).clamp(min=0) // w for w in widths)
    levels_B = sum((n_tokens_B >= w).long() for w in widths).clamp(min=1)
    return ((nodes_B - tail_B) // levels_B).clamp(min=1)


def next_shift(shift_B: Tensor, utilization_B: Tensor) -> Tensor:
    """[B] the adaptive price's shift after a refocus that used so much of the budget."""
    # at most 0: above the market price blocks would be left out that the budget has room for
    return torch.where(utilization_B < TARGET, shift_B - FALL, shift_B + RETURN).clamp(LOWEST, 0)
