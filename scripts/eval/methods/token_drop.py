"""Systems that drop tokens one by one and read what is left as a prompt (LLMLingua's manner): the tokens that are worth most by some
score, and the recent ones.

Shapes: B rows, n tokens of history.
"""

import torch
from torch import Tensor

from nanochat.gpt import token_losses
from scripts.eval.methods.interface import Method, View, best, pack, pass_flops


class TokenDrop(Method):
    def scores(self, history_BN: Tensor) -> Tensor:
        """[B, n] what each token is worth."""
        raise NotImplementedError

    def show(self, history_BN: Tensor, rows_B: Tensor) -> View:
        n = history_BN.shape[1]
        recent = torch.arange(n, device=history_BN.device) >= n - self.recent
        return pack(best(self.scores(history_BN).masked_fill(recent, torch.inf), self.budget), self.budget, prompt=True)


class SurprisalDrop(TokenDrop):
    """Keeps what the base itself finds hard to predict (Selective Context, Li et al. 2023); it reads the whole history for that."""

    name = "drop_surprisal"

    def scores(self, history_BN: Tensor) -> Tensor:
        logits = self.gpt(history_BN[:, :-1], lift_windows=True)
        return torch.nn.functional.pad(token_losses(logits, history_BN[:, 1:]), (1, 0))

    def choosing_flops(self, n: int) -> float:
        return pass_flops(self.gpt, n, n)
