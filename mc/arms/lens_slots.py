"""`--mc_lens=slots`: slots compete for the rows (softmax over slots), a few rounds with shared weights; a block's score
is how well it agrees with what the slots that won it ask for (`mc.arms.reader`).

Shapes: X cursors, S rows read, N of them blocks, C width, M latents or slots.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mc.arms.reader import LATENTS, WIDTH, Body, ReaderArm, silent
from mc.gistnet import QUERY_STD, linear, spread_rows
from nanochat.gpt import norm

ROUNDS = 3  # of competition


class SlotAttention(Body):
    """Slot attention (Locatello et al., 2020), with learned first slots and an MLP in the place of its GRU."""

    def __init__(self):
        super().__init__()
        self.slots_MC = nn.Parameter(QUERY_STD * torch.randn(LATENTS, WIDTH))
        self.query, self.key, self.value = (linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)
        self.wanted = silent(WIDTH, WIDTH)

    def forward(self, h_XSC: Tensor, seen_XS: Tensor, count: int) -> Tensor:
        """As `Body.forward`."""
        h_XSC = norm(h_XSC)
        key_XCS, value_XSC = self.key(h_XSC).transpose(1, 2), self.value(h_XSC)
        slot_XMC = spread_rows(self.slots_MC, h_XSC)
        for _ in range(ROUNDS):
            share_XMS = self._shares(slot_XMC, key_XCS) * seen_XS[:, None]
            read_XMC = share_XMS @ value_XSC / share_XMS.sum(-1, keepdim=True).clamp_min(1e-6)
            slot_XMC = slot_XMC + read_XMC
            slot_XMC = slot_XMC + self.down(F.relu(self.up(norm(slot_XMC))).square())
        share_XMN = self._shares(slot_XMC, key_XCS[..., :count])
        agrees_XMN = self.wanted(norm(slot_XMC)) @ h_XSC[:, :count].transpose(1, 2) / math.sqrt(WIDTH)
        return (share_XMN * agrees_XMN).sum(1)

    def _shares(self, slot_XMC: Tensor, key_XCS: Tensor) -> Tensor:
        """[X, M, S] of each row the shares that the slots win: they sum to 1 over the slots."""
        return (self.query(norm(slot_XMC)) @ key_XCS / math.sqrt(WIDTH)).softmax(1)

    def flops(self, rows: int, count: int) -> int:
        one_round = 2 * LATENTS * 5 * WIDTH**2 + 4 * LATENTS * rows * WIDTH
        return 4 * rows * WIDTH**2 + ROUNDS * one_round + 4 * LATENTS * (WIDTH**2 + count * WIDTH)


class SlotAttentionLens(ReaderArm):
    BODY = SlotAttention


ARM = SlotAttentionLens
