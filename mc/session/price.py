"""From the lens's logits to the scores that a refocus goes by, for each allocator of `--mc_allocator`.

    score = tanh(logit − λ)        λ, the price of an entry: what fits in the budget scores above 0, what does not below

    greedy               the market price: half way between the worst logit that fits and the best that does not
    bundle:S             the same; one edit shows up to S adjacent siblings (`mc.focus_allocator`)
    stochastic:T         the same, on logits with Gumbel noise of temperature T, drawn anew at every
                         refocus: blocks are then drawn without
                         replacement in proportion to exp(logit / T). Keyed by (seed, row, refocus, block): nothing else
                         changes a draw. A session is row 0 of its own seed, so that the sessions beside it do not
                         matter: other draws, another seed

The adaptive price adds a shift of its own to λ, which falls while less than TARGET of the budget is
used and returns slowly towards 0
while it is: between the market price and +tau_expand lie blocks that would fit but are not shown.

Shapes: B rows, I blocks that have a logit (of a session, those that its search names).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mc.focus_allocator import FocusConfig
from mc.keyed_random import gumbel_at
from mc.lensnet import focus_scores
from mc.mega_context import tiling
from nanochat.common import UserError

TARGET = 0.95  # utilization below which the adaptive price falls
FALL, RETURN, LOWEST = 0.2, 0.02, -3.0  # of the shift, per refocus [logits]; there tanh has saturated
SYNTAX = "greedy, bundle:BLOCKS or stochastic:TEMPERATURE"


@dataclass(frozen=True)
class Allocator:
    """A value of `--mc_allocator`."""

    span: int = 1
    temperature: float = 0.0

    @staticmethod
    def parse(text: str) -> "Allocator":
        """UserError for anything but SYNTAX."""
        name, colon, values = text.partition(":")
        try:
            if name == "greedy" and not colon:
                return Allocator()
            if name == "bundle" and int(values) > 1:
                return Allocator(span=int(values))
            if name == "stochastic" and 0 < float(values) < float("inf"):
                return Allocator(temperature=float(values))
        except ValueError:
            pass
        raise UserError(
            f"--mc_allocator={text}: use {SYNTAX}, with blocks of 2 or more and a finite temperature above 0")

    def scores(self, logits_BI: Tensor, index_BI: Tensor, rival_BI: Tensor, room_B: Tensor, shift_B: Tensor, *,
               rows_B: Tensor, seed: int,
               refocus: int) -> Tensor:
        """[B, I] scores in [−1, 1] of the blocks `index`. rival: those that compete for the `room`
        (in blocks) that is to be had."""
        if self.temperature:
            logits_BI = logits_BI + self.temperature * gumbel_at(rows_B, index_BI, seed, "refocus", refocus)
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
    return torch.where(utilization_B < TARGET, shift_B - FALL, shift_B + RETURN).clamp(LOWEST, 0)
