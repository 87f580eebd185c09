"""`--mc_arms=kl`: KL from the lens's own earlier distribution, that of an exponential mean of its weights, which is
saved with the rest.

Shapes: B rows, Q queries, N blocks.
"""

import copy

import torch
from torch import Tensor

from mc.arm import Arm, Part, Setting
from mc.lens_loss import Asked, Lesson
from mc.losses import row_mean
from mc.model import MegaContext

EARLIER = 0.9  # share of itself that the earlier lens keeps at a step: it is about ten steps old


def policy_term(logits_BQN: Tensor, earlier_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """[B, Q] nats: KL(earlier ‖ now) of the distributions over the visible blocks; 0 where none is visible."""
    now, earlier = (
        x.masked_fill(~visible_BQN, -torch.inf).log_softmax(-1).masked_fill(~visible_BQN, 0)
        for x in (logits_BQN, earlier_BQN)
    )
    return (earlier.exp() * visible_BQN * (earlier - now)).sum(-1)


class EarlierPolicy(Arm):
    SETTINGS = {
        "lens_kl": Setting(
            0.5, "weight of the KL from the lens's earlier distribution, that of an exponential mean of its weights"
        )
    }
    every_query = True

    def build(self, model: MegaContext, d_model: int) -> None:
        model.earlier_lens = copy.deepcopy(model.lensnet).requires_grad_(False)

    @torch.no_grad()
    def before_step(self, model: MegaContext) -> None:
        for mean, now in zip(model.earlier_lens.parameters(), model.lensnet.parameters()):
            mean.lerp_(now, 1 - EARLIER)

    def lens_parts(self, model: MegaContext, lesson: Lesson, asked: Asked) -> list[Part]:
        with torch.no_grad():
            earlier = asked.again(model.earlier_lens)
        return [
            (
                "kl",
                self.config.of("lens_kl"),
                row_mean(policy_term(asked.last, earlier, asked.seen), asked.seen.any(-1)).mean(),
            )
        ]


ARM = EarlierPolicy
