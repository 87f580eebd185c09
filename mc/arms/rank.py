"""`--mc_arms=rank`: a hinge, the dense teacher's best block leads the lens's best others by a margin.

Shapes: B rows, Q queries, N blocks.
"""

import torch
from torch import Tensor

from mc.arm import Arm, Part, Setting
from mc.config import MCConfig
from mc.lens_loss import Asked, Lesson
from mc.losses import row_mean
from mc.model import MegaContext
from nanochat.common import UserError

MARGIN = 1.0  # logits by which the best block is to lead
RIVALS = 8  # of the lens's best others that it is compared with


def rank_term(logits_BQN: Tensor, target_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """[B, Q] mean hinge of the target's best block against the lens's RIVALS best others; 0 where fewer than two are
    visible."""
    best_BQ1 = target_BQN.masked_fill(~visible_BQN, -torch.inf).argmax(-1, keepdim=True)
    rival_BQN = visible_BQN.scatter(-1, best_BQ1, False)
    top = logits_BQN.masked_fill(~rival_BQN, -torch.inf).topk(min(RIVALS, logits_BQN.shape[-1]), -1)
    counted = rival_BQN.gather(-1, top.indices)
    rivals = logits_BQN.gather(-1, top.indices)
    lost = (MARGIN - logits_BQN.gather(-1, best_BQ1) + rivals).clamp_min(0) * counted
    return lost.sum(-1) / counted.sum(-1).clamp_min(1)


class Rank(Arm):
    SETTINGS = {
        "lens_rank": Setting(
            0.5, "weight of the ranking term: the dense teacher's best block leads the lens's best others by a margin"
        )
    }
    every_query = True

    @classmethod
    def check(cls, config: MCConfig) -> None:
        if not (config.teacher_weights()["attention"] or config.teacher_weights()["gate"]):
            raise UserError(
                f"--mc_lens_rank={config.of('lens_rank')} ranks by a dense teacher, attention or gate, not "
                f"by --mc_teacher={config.teacher}"
            )

    def lens_parts(self, model: MegaContext, lesson: Lesson, asked: Asked) -> list[Part]:
        weights = self.config.teacher_weights()
        return [
            (
                "rank",
                self.config.of("lens_rank") * weights[kind],
                row_mean(rank_term(asked.last, target, asked.seen), weight).mean(),
            )
            for kind, (target, weight) in asked.taught.items()
        ]


ARM = Rank
