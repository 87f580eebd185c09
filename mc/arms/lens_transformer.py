"""`--mc_lens=transformer`: two layers of self-attention over everything (`mc.arms.reader`).

Shapes: X cursors, S rows read, N of them blocks, C width, M latents or slots.
"""

import torch.nn as nn
from torch import Tensor

from mc.arms.reader import N_HEAD, WIDTH, Body, ReaderArm, scores, silent
from mc.gistnet import Layer

N_LAYER = 2


class SelfAttention(Body):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(WIDTH, N_HEAD) for _ in range(N_LAYER))
        self.score = silent(WIDTH, 1)

    def forward(self, h_XSC: Tensor, seen_XS: Tensor, count: int) -> Tensor:
        """h [X, S, C], seen bool [X, S] -> scores [X, count] of the first `count` rows."""
        for layer in self.layers[:-1]:
            h_XSC = layer(h_XSC, h_XSC, seen_XS)
        return scores(self.score, self.layers[-1](h_XSC[:, :count], h_XSC, seen_XS))

    def flops(self, rows: int, count: int) -> int:
        return (
            sum(layer.flops(rows, rows) for layer in self.layers[:-1])
            + self.layers[-1].flops(count, rows)
            + 2 * count * WIDTH
        )


class SelfAttentionLens(ReaderArm):
    BODY = SelfAttention


ARM = SelfAttentionLens
