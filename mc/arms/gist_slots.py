"""`--mc_gist=slots`, K→1→K→1: the entries of a block read each other; query 1 reads them; they read it back; query 2
reads what they became.

Shapes: N blocks, K entries of a block, G gists of a block, C width inside.
"""

import torch
import torch.nn as nn
from torch import Tensor

from mc.arm import Arm
from mc.gistnet import QUERY_STD, GistNetConfig, Layer, spread_rows


class SlotPair(nn.Module):
    """K→1→K→1: what the first query gathered is given back to the entries before the second one reads them."""

    def __init__(self, config: GistNetConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config.width, config.n_head) for _ in range(config.n_layer))
        self.query_1_GC = nn.Parameter(QUERY_STD * torch.randn(config.n_gists, config.width))
        self.query_2_GC = nn.Parameter(QUERY_STD * torch.randn(config.n_gists, config.width))
        self.gather_1, self.give_back, self.gather_2 = (Layer(config.width, config.n_head) for _ in range(3))

    def forward(self, h_NKC: Tensor, mask_NK: Tensor | None, share_NGK: Tensor) -> Tensor:
        """As `mc.gistnet.Transformer.forward`; share is not used."""
        for layer in self.layers:
            h_NKC = layer(h_NKC, h_NKC, mask_NK)
        slot_NGC = self.gather_1(spread_rows(self.query_1_GC, h_NKC), h_NKC, mask_NK)
        h_NKC = self.give_back(h_NKC, slot_NGC, None)
        return self.gather_2(spread_rows(self.query_2_GC, h_NKC), h_NKC, mask_NK)

    def flops(self, K: int, G: int) -> int:
        return (
            sum(layer.flops(K, K) for layer in self.layers) + 2 * self.gather_1.flops(G, K) + self.give_back.flops(K, G)
        )


class GistSlots(Arm):
    BODY = SlotPair


ARM = GistSlots
