"""`--mc_lens=perceiver`: latents read everything, read each other, and are read by the blocks (`mc.arms.reader`).

Shapes: X cursors, S rows read, N of them blocks, C width, M latents or slots.
"""

import torch
import torch.nn as nn
from torch import Tensor

from mc.arms.reader import LATENTS, N_HEAD, WIDTH, Body, ReaderArm, scores, silent
from mc.gistnet import QUERY_STD, Layer, spread_rows


class Perceiver(Body):
    def __init__(self):
        super().__init__()
        self.latents_MC = nn.Parameter(QUERY_STD * torch.randn(LATENTS, WIDTH))
        self.gather, self.mix, self.give_back = (Layer(WIDTH, N_HEAD) for _ in range(3))
        self.score = silent(WIDTH, 1)

    def forward(self, h_XSC: Tensor, seen_XS: Tensor, count: int) -> Tensor:
        """As `Body.forward`."""
        latents_XMC = self.gather(spread_rows(self.latents_MC, h_XSC), h_XSC, seen_XS)
        latents_XMC = self.mix(latents_XMC, latents_XMC, None)
        return scores(self.score, self.give_back(h_XSC[:, :count], latents_XMC, None))

    def flops(self, rows: int, count: int) -> int:
        return (
            self.gather.flops(LATENTS, rows)
            + self.mix.flops(LATENTS, LATENTS)
            + self.give_back.flops(count, LATENTS)
            + 2 * count * WIDTH
        )


class PerceiverLens(ReaderArm):
    BODY = Perceiver


ARM = PerceiverLens
