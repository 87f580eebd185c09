"""What a training loop asks of MegaContext, and the answers where there is none: the loop needs no `if`.

`mc.runtime.MCController` answers the same calls.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.gpt import GPT
from nanochat.telemetry.tracing import Reading, Trace

Metrics = dict[str, Tensor | Reading]


class StepResult(NamedTuple):
    """What one micro-batch produced. With MegaContext the entries of each row's primary variant (C15)."""

    loss: Tensor
    metrics: Metrics
    primary: object | None = None


class NullController:
    """Plain training: the next-token loss, and nothing beside it."""

    modules: dict[str, torch.nn.Module] = {}  # by name, for what has to hold of every parameter

    def training_step(self, model: GPT, batch, step: int, trace: Trace | None = None) -> StepResult:
        """One micro-batch. batch: inputs, targets [B, T] int64 (−1 ignored), num_targets."""
        loss = model.loss(model.hidden(batch.inputs), batch.targets, batch.num_targets)
        return StepResult(loss, {"train.loss": loss.detach()})

    def after_backward(self, accumulation: int = 1, trace: Trace | None = None) -> tuple[Tensor | float, Metrics]:
        """What is learned from the gradients of the pass whose backward has just run: its
        loss, 0 for none, and metrics."""
        return 0.0, {}

    def active(self, step: int) -> bool:
        return False

    def param_groups(self, lr_scale: float = 1.0) -> list[dict]:
        return []

    def networks(self) -> dict[str, list[torch.nn.Parameter]]:
        return {}

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: dict[str, Tensor] | None) -> None:
        pass

    def meta(self) -> None:
        return None

    def settings(self, meta: dict | None = None) -> dict:
        """All settings of this run, or of the one that a checkpoint's part `meta` describes."""
        return {}

    def flops_per_token(self, model: GPT) -> float:
        return 0.0

    def share_active(self) -> float:
        """Share of the run's steps that have working contexts."""
        return 0.0

    def activation_bytes(self, model: GPT, micro_batch: int) -> int:
        return 0
