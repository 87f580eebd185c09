"""Networks that read the candidates of a refocus together, on top of the bilinear lens (`--mc_lens`).

The bilinear lens scores each block by itself. A reader sees what it has to choose from: the blocks with their bilinear logits and
gists, the nodes above them, and the last tokens, all in both directions. It adds to each block's logit:

    logit' = logit + reader(…),   the reader's last layer starting at zero: training starts exactly from the bilinear lens

    transformer  two layers of self-attention over everything
    perceiver    latents read everything, read each other, and are read by the blocks
    slots        slots compete for the rows (softmax over slots), a few rounds with shared weights; a block's score is how well it
                 agrees with what the slots that won it ask for

Rows are told apart by their LOD, span width, distance to the cursor and content alone: a permutation of the nodes permutes the scores.
All inputs are detached, the bilinear logits too: the bilinear part learns as it does alone.

It runs on few cursors (CURSORS a row in training, one per refocus in use) and on few blocks (RERANKED of a long history).

Shapes: B rows, Q cursors of a row, N blocks, E nodes (the blocks first), T tail tokens, D width of the base, C width inside, S rows read
(nodes, then tail tokens), M latents or slots, X = B · Q.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mc.gistnet import QUERY_STD, Layer, linear, spread
from nanochat.gpt import norm

READERS = ("transformer", "perceiver", "slots")
WIDTH, N_HEAD, N_LAYER = 64, 4, 2
LATENTS = 8  # of the perceiver, and slots
ROUNDS = 3  # of competition
CURSORS = 8  # positions of a row at which a reader is taught
RERANKED = 64  # blocks that the search of a long history proposes to a reader, at least
FACTS = 4  # numbers that describe a row


def silent(n_in: int, n_out: int) -> nn.Linear:
    """A matrix that starts at zero."""
    layer = linear(n_in, n_out)
    nn.init.zeros_(layer.weight)
    return layer


def scores(score: nn.Linear, h_XNC: Tensor) -> Tensor:
    """[X, N]. Scaled down: AdamW moves every entry of `score` by its rate at once, a logit by their sum."""
    return score(norm(h_XNC))[..., 0] / math.sqrt(WIDTH)


class Transformer(nn.Module):
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
        return sum(layer.flops(rows, rows) for layer in self.layers[:-1]) + self.layers[-1].flops(count, rows) + 2 * count * WIDTH


class Perceiver(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents_MC = nn.Parameter(QUERY_STD * torch.randn(LATENTS, WIDTH))
        self.gather, self.mix, self.give_back = (Layer(WIDTH, N_HEAD) for _ in range(3))
        self.score = silent(WIDTH, 1)

    def forward(self, h_XSC: Tensor, seen_XS: Tensor, count: int) -> Tensor:
        """As `Transformer.forward`."""
        latents_XMC = self.gather(spread(self.latents_MC, h_XSC), h_XSC, seen_XS)
        latents_XMC = self.mix(latents_XMC, latents_XMC, None)
        return scores(self.score, self.give_back(h_XSC[:, :count], latents_XMC, None))

    def flops(self, rows: int, count: int) -> int:
        return self.gather.flops(LATENTS, rows) + self.mix.flops(LATENTS, LATENTS) + self.give_back.flops(count, LATENTS) + 2 * count * WIDTH


class Slots(nn.Module):
    """Slot attention (Locatello et al., 2020), with learned first slots and an MLP in the place of its GRU."""

    def __init__(self):
        super().__init__()
        self.slots_MC = nn.Parameter(QUERY_STD * torch.randn(LATENTS, WIDTH))
        self.query, self.key, self.value = (linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)
        self.wanted = silent(WIDTH, WIDTH)

    def forward(self, h_XSC: Tensor, seen_XS: Tensor, count: int) -> Tensor:
        """As `Transformer.forward`."""
        h_XSC = norm(h_XSC)
        key_XCS, value_XSC = self.key(h_XSC).transpose(1, 2), self.value(h_XSC)
        slot_XMC = spread(self.slots_MC, h_XSC)
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


BODIES = dict(transformer=Transformer, perceiver=Perceiver, slots=Slots)


class Reader(nn.Module):
    """Reads the candidates of many cursors. kind: one of READERS; recent: the last tokens, whose blocks are shown anyway."""

    def __init__(self, kind: str, d_model: int, block_size: int, max_lod: int, recent: int):
        super().__init__()
        self.block_size, self.recent = block_size, recent
        self.gist, self.token, self.facts = linear(d_model, WIDTH), linear(2 * d_model, WIDTH), linear(FACTS, WIDTH)
        self.level_LC = nn.Parameter(QUERY_STD * torch.randn(max_lod + 1, WIDTH))
        self.body = BODIES[kind]()

    def forward(self, logits_BQN: Tensor, tail_BQTD: Tensor, cursor_BQ: Tensor, gists_BED: Tensor, lod_E: Tensor, index_E: Tensor) -> Tensor:
        """[B, Q, N] unbounded logits, like those it is given.

        logits_BQN: of the first N of the E nodes, blocks (LOD1). cursor_BQ: tokens of history. gists_BED, lod_E, index_E (int64): nodes
        in any order; those that the cursor has not passed are not read. tail_BQTD: embeddings of the last tokens before the cursor,
        zeros where there is none.
        """
        logits_BQN, tail_BQTD, gists_BED = logits_BQN.detach(), tail_BQTD.detach(), gists_BED.detach()
        N, T, dtype = logits_BQN.shape[-1], tail_BQTD.shape[2], logits_BQN.dtype
        width_E = self.block_size ** lod_E
        ahead_BQE = cursor_BQ[..., None] - (index_E + 1) * width_E  # tokens between a node and the cursor
        rated_BQN = ahead_BQE[..., :N] >= self.recent
        best_BQ1 = logits_BQN.masked_fill(~rated_BQN, -torch.inf).amax(-1, keepdim=True)
        gap_BQN = (best_BQ1 - logits_BQN).masked_fill(~rated_BQN, torch.inf)
        pad = (0, len(lod_E) - N)
        ratio_BQE = F.pad((-gap_BQN).exp(), pad)  # to the best block, in (0, 1]; 0 for rows that are not rated
        gap_BQE = F.pad(gap_BQN.masked_fill(~rated_BQN, 0).log1p(), pad)
        h_BQEC = self._row(ratio_BQE, gap_BQE, ahead_BQE, width_E.to(dtype), lod_E) + self.gist(gists_BED)[:, None]
        before_BQTD = F.pad(tail_BQTD, (0, 0, 1, 0))[:, :, :-1]
        age_T, one_T = torch.arange(T - 1, -1, -1, device=cursor_BQ.device), torch.ones(T, dtype=dtype, device=cursor_BQ.device)
        none_T = torch.zeros_like(one_T)
        h_BQTC = self._row(none_T, none_T, age_T, one_T, none_T.long()) + self.token(torch.cat([tail_BQTD, before_BQTD], -1))
        seen_BQS = torch.cat([ahead_BQE >= 0, tail_BQTD.any(-1)], -1)
        h_XSC, seen_XS = torch.cat([h_BQEC, h_BQTC], 2).flatten(0, 1), seen_BQS.flatten(0, 1)
        return logits_BQN + self.body(h_XSC, seen_XS, N).view_as(logits_BQN).to(dtype)

    def _row(self, ratio: Tensor, gap: Tensor, ahead: Tensor, width: Tensor, lod: Tensor) -> Tensor:
        """[…, C] of what is known of a row but its content."""
        distance = ahead.clamp_min(0).to(width.dtype).log1p() / 8
        facts = torch.stack(torch.broadcast_tensors(ratio, gap, distance, width.log() / 8), -1)
        return self.facts(facts) + self.level_LC.to(width.dtype)[lod]

    def flops(self, n_cursors: int, n_blocks: int, n_nodes: int, tail: int) -> int:
        """Forward FLOPs of one row with n_cursors, from shapes (a multiply-add is 2)."""
        D, rows = self.gist.in_features, n_nodes + tail
        once = n_nodes * D * WIDTH + tail * FACTS * WIDTH
        each = n_nodes * FACTS * WIDTH + tail * 2 * D * WIDTH
        return 2 * once + n_cursors * (2 * each + self.body.flops(rows, n_blocks))
