"""The gate gradient as the lens's teacher (`--mc_teacher=gate`): −∂L/∂g of a gate on each block, the first-order
utility of showing it (`mc.teachers.gate_utility`). It needs the gradients that the backward pass leaves, so the lens is
taught behind it."""

from collections.abc import Sequence

from torch import Tensor

from mc.arm import Arm
from mc.teachers import gate_utility, keep_gradients
from nanochat.gpt import Captured


class Gate(Arm):
    dense = waits = True

    def before_pass(self, embeds_BTD: Tensor) -> None:
        if not embeds_BTD.requires_grad:
            embeds_BTD.requires_grad_()  # the base is frozen, yet its backward pass is needed

    def after_pass(self, captured: Sequence[Captured]) -> None:
        keep_gradients(captured)

    def signal(
        self, captured: Sequence[Captured], rows: slice, queries: slice, n_blocks: int, block_size: int
    ) -> Tensor:
        return gate_utility(captured, rows, queries, n_blocks, block_size)


ARM = Gate
