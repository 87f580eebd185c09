"""`--mc_arms=illegal`: −log of the probability that is left for the visible blocks when protected ones, which are raw
anyway, compete too.

Shapes: B rows, Q queries, N blocks.
"""

import torch
from torch import Tensor

from mc.arm import Arm, Part, Setting
from mc.lens_loss import Asked, Lesson, visible_blocks
from mc.losses import row_mean
from mc.model import MegaContext


def illegal_term(logits_BQN: Tensor, visible_BQN: Tensor, illegal_BQN: Tensor) -> Tensor:
    """[B, Q] nats: −log of the visible blocks' share when illegal ones compete; 0 where none is visible."""
    every = logits_BQN.masked_fill(~(visible_BQN | illegal_BQN), -torch.inf)
    legal = logits_BQN.masked_fill(~visible_BQN, -torch.inf)
    some = visible_BQN.any(-1)
    lost = every.masked_fill(~some[..., None], 0).logsumexp(-1) - legal.masked_fill(~some[..., None], 0).logsumexp(-1)
    return lost * some


class Illegal(Arm):
    SETTINGS = {
        "lens_illegal": Setting(
            0.5, "weight of the illegality term: probability on protected blocks, which are raw anyway"
        )
    }
    every_query = protected_too = True

    def lens_parts(self, model: MegaContext, lesson: Lesson, asked: Asked) -> list[Part]:
        illegal = visible_blocks(asked.cursor_BQ, asked.seen.shape[-1], self.config.block_size, 0) & ~asked.seen
        return [
            (
                "illegal",
                self.config.of("lens_illegal"),
                row_mean(illegal_term(asked.last, asked.seen, illegal), asked.seen.any(-1)).mean(),
            )
        ]


ARM = Illegal
