"""Networks that read the candidates of a refocus together, on top of the bilinear lens (`--mc_lens`).

The bilinear lens scores each block by itself. A reader sees what it has to choose from: the blocks with their bilinear
logits and gists, the nodes above them, and the last tokens, all in both directions. It adds to each block's logit:

    logit' = logit + reader(…),   the reader's last layer starting at zero: training starts
                                  exactly from the bilinear lens

Its body is an arm: `mc.arms.lens_transformer`, `lens_perceiver` or `lens_slots`.

Rows are told apart by their LOD, span width, distance to the cursor and content alone: a permutation of the nodes
permutes the scores. All inputs are detached, the bilinear logits too: the bilinear part learns as it does alone.

It runs on few cursors (CURSORS a row in training, one per refocus in use) and on few
blocks (RERANKED of a long history).

Shapes: B rows, Q cursors of a row, N blocks, E nodes (the blocks first), T tail tokens, D width of the base, C width
inside, S rows read (nodes, then tail tokens), M latents or slots, X = B · Q.
"""

import math
from abc import abstractmethod

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mc.arm import Arm
from mc.config import MCConfig
from mc.gistnet import QUERY_STD, linear
from nanochat.common import UserError
from nanochat.gpt import norm

WIDTH, N_HEAD = 64, 4
LATENTS = 8  # of the perceiver, and slots
FACTS = 4  # numbers that describe a row


def silent(n_in: int, n_out: int) -> nn.Linear:
    """A matrix that starts at zero."""
    layer = linear(n_in, n_out)
    nn.init.zeros_(layer.weight)
    return layer


def scores(score: nn.Linear, h_XNC: Tensor) -> Tensor:
    """[X, N]. Scaled down: AdamW moves every entry of `score` by its rate at once, a logit by their sum."""
    return score(norm(h_XNC))[..., 0] / math.sqrt(WIDTH)


class Body(nn.Module):
    """What reads the rows."""

    @abstractmethod
    def forward(self, h_XSC: Tensor, seen_XS: Tensor, count: int) -> Tensor:
        """h [X, S, C], seen bool [X, S] -> scores [X, count] of the first `count` rows."""

    @abstractmethod
    def flops(self, rows: int, count: int) -> int:
        """Forward FLOPs of reading `rows` and scoring `count` of them."""


class Reader(nn.Module):
    """Reads the candidates of many cursors. recent: the last tokens, whose blocks are shown anyway."""

    def __init__(self, body: type[Body], d_model: int, block_size: int, max_lod: int, recent: int):
        super().__init__()
        self.block_size, self.recent = block_size, recent
        self.gist, self.token, self.facts = linear(d_model, WIDTH), linear(2 * d_model, WIDTH), linear(FACTS, WIDTH)
        self.level_LC = nn.Parameter(QUERY_STD * torch.randn(max_lod + 1, WIDTH))
        self.body = body()

    def forward(self, logits_BQN: Tensor, tail_BQTD: Tensor, cursor_BQ: Tensor, gists_BED: Tensor, lod_E: Tensor,
                index_E: Tensor) -> Tensor:
        """[B, Q, N] unbounded logits, like those it is given.

        logits_BQN: of the first N of the E nodes, blocks (LOD1). cursor_BQ: tokens of history. gists_BED, lod_E,
        index_E (int64): nodes in any order; those that the cursor has not passed are not read. tail_BQTD: embeddings of
        the last tokens before the cursor, zeros where there is none.
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
        age_T, one_T = torch.arange(T - 1, -1, -1, device=cursor_BQ.device), torch.ones(T, dtype=dtype,
                                                                                        device=cursor_BQ.device)
        none_T = torch.zeros_like(one_T)
        h_BQTC = self._row(none_T, none_T, age_T, one_T,
                           none_T.long()) + self.token(torch.cat([tail_BQTD, before_BQTD], -1))
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


class ReaderArm(Arm):
    """A lens with a reader."""

    BODY: type[Body]

    @classmethod
    def check(cls, config: MCConfig) -> None:
        if config.gists_per_block > 1:
            raise UserError(f"--mc_lens={config.lens} reads one gist per node, and "
                            f"--mc_gists_per_block={config.gists_per_block}; use --mc_lens=bilinear")

    @classmethod
    def reader(cls, d_model: int, block_size: int, max_lod: int, recent: int) -> Reader:
        return Reader(cls.BODY, d_model, block_size, max_lod, recent)
