"""MC losses. Shapes: B rows, P positions read, V vocabulary, Q queries, N blocks.

Means are taken per row first, so that they are the same however rows are spread over ranks and micro-steps.
"""

import torch
from torch import Tensor


def row_mean(x_BP: Tensor, weight_BP: Tensor) -> Tensor:
    """[B] weighted mean over each row; 0 for a row without weight."""
    x_BP = x_BP.to(torch.promote_types(x_BP.dtype, torch.float32))
    weight_BP = weight_BP.to(x_BP.dtype)
    return (x_BP * weight_BP).sum(1) / weight_BP.sum(1).clamp_min(1e-9)


def distillation(student_BPV: Tensor, teacher_BPV: Tensor) -> Tensor:
    """[B, P] nats: KL(teacher ‖ student), the full-context distribution against that of the working context (D2)."""
    teacher = teacher_BPV.detach().log_softmax(-1)
    return (teacher.exp() * (teacher - student_BPV.log_softmax(-1))).sum(-1)


def lens_targets(per_block_BQN: Tensor, visible_BQN: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher signal to (distribution over the visible blocks, weight of the query).

    What hurts is no reason to look: negative utilities count as zero. The weight is how much
    there is to win at that query.
    """
    useful = per_block_BQN.clamp_min(0) * visible_BQN
    weight = useful.sum(-1)
    return useful / weight.clamp_min(1e-12).unsqueeze(-1), weight


def lens_loss(logits_BQN: Tensor, target_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """[B, Q] nats: cross-entropy of the lens's distribution over the visible blocks; 0 where none is visible."""
    masked = logits_BQN.masked_fill(~visible_BQN, -torch.inf)
    log_p = masked.log_softmax(-1).masked_fill(~visible_BQN, 0)
    return -(target_BQN * log_p).sum(-1)
