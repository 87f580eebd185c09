"""Preference as the lens's teacher (`--mc_teacher=preference`): Bradley–Terry over the working contexts of a row
(`--mc_variants`).

The best one beats each other; a variant's strength is the summed logit of the blocks that it shows. Best is the least
next-token loss, unweighted, + price · path edits away from what recency shows.

Shapes: B rows, N blocks, V variants.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.arm import Arm, Part
from mc.config import MCConfig
from mc.lens_loss import Asked, Lesson, cursor_logits, visible_blocks
from mc.mega_context import Tree
from mc.model import MegaContext, recency_scores
from mc.runtime import MCController, Seen
from mc.teachers import beyond_average
from nanochat.common import UserError

EDIT_PRICE = 1e-3  # nats per token of next-token loss, a path edit: among variants that are as good, the cheapest wins


class Variants(NamedTuple):
    """Working contexts of histories of n_B tokens: which blocks each shows raw, and what it costs (`variant_cost`)."""

    n_B: Tensor
    shown_BVN: Tensor
    cost_BV: Tensor


def variant_cost(nll_BV: Tensor, shown_BVN: Tensor, recency_BN: Tensor) -> Tensor:
    """[B, V] nats per token: next-token loss + price of the path edits from what recency shows; a block shown pays with
    a block hidden."""
    added_BV = (shown_BVN & ~recency_BN[:, None]).sum(-1)
    removed_BV = (recency_BN[:, None] & ~shown_BVN).sum(-1)
    return nll_BV + EDIT_PRICE * torch.maximum(added_BV, removed_BV)


def bradley_terry(logits_BN: Tensor, visible_BN: Tensor, shown_BVN: Tensor, cost_BV: Tensor) -> Tensor:
    """[B] −log probability that the cheapest variant beats another one, mean over the others; 0 with a single variant.

    A variant's strength is the sum, over the blocks that it shows, of logits beyond their mean.
    """
    strength_BV = (beyond_average(logits_BN, visible_BN)[:, None] * (shown_BVN & visible_BN[:, None])).sum(-1)
    best_B1 = cost_BV.argmin(1, keepdim=True)
    others_BV = torch.ones_like(cost_BV).scatter(1, best_B1, 0)
    lost_BV = F.softplus(strength_BV - strength_BV.gather(1, best_B1)) * others_BV
    return lost_BV.sum(1) / max(cost_BV.shape[1] - 1, 1)


def variant_loss(model: MegaContext, tree: Tree, variants: Variants) -> Tensor:
    """[B] `bradley_terry` of the lens's logits at the end of each row's history."""
    n_B, shown_BVN, cost_BV = variants
    visible_BN = visible_blocks(n_B, shown_BVN.shape[2], model.config.block_size, model.config.protected)
    return sum(bradley_terry(x, visible_BN, shown_BVN, cost_BV) for x in cursor_logits(model, tree, n_B))


class Preference(Arm):
    @classmethod
    def check(cls, config: MCConfig) -> None:
        if config.variants < 2:
            raise UserError(
                f"--mc_teacher={config.teacher} prefers one of several variants; raise --mc_variants above "
                f"{config.variants}"
            )

    def watch(self, controller: MCController, seen: Seen) -> Variants:
        c, n, blocks = self.config, seen.n_R, seen.shown_VRN.shape[-1]
        visible = visible_blocks(n, blocks, c.block_size, c.protected)
        recency = controller.model.allocator.allocate(recency_scores(n, blocks), n).expanded[0] & visible
        shown = seen.shown_VRN.transpose(0, 1) & visible[:, None]
        return Variants(n, shown, variant_cost(seen.nll_VR.T, shown, recency))

    def lens_parts(self, model: MegaContext, lesson: Lesson, asked: Asked | None) -> list[Part]:
        if (variants := lesson.watched.get("preference")) is None:
            return []
        return [
            (
                "preference",
                self.config.teacher_weights()["preference"],
                variant_loss(model, lesson.tree, variants).mean(),
            )
        ]


ARM = Preference
