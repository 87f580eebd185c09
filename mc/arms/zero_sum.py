"""`--mc_arms=zero_sum`: the squared mean of the lens's logits over the visible blocks, so that the scores of a history
balance.

Shapes: B rows, Q queries, N blocks.
"""

from torch import Tensor

from mc.arm import Arm, Part, Setting
from mc.lens_loss import Asked, Lesson
from mc.losses import row_mean
from mc.model import MegaContext


def zero_sum_term(logits_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """[B, Q] squared mean logit over the visible blocks."""
    return ((logits_BQN * visible_BQN).sum(-1) / visible_BQN.sum(-1).clamp_min(1)).square()


class ZeroSum(Arm):
    SETTINGS = {
        "lens_zero_sum": Setting(0.01, "weight of the zero-sum term: squared mean logit over the visible blocks")
    }
    every_query = True

    def lens_parts(self, model: MegaContext, lesson: Lesson, asked: Asked) -> list[Part]:
        return [
            (
                "zero_sum",
                self.config.of("lens_zero_sum"),
                row_mean(zero_sum_term(asked.last, asked.seen), asked.seen.any(-1)).mean(),
            )
        ]


ARM = ZeroSum
