"""LensNet: given the last tokens, which blocks of the history deserve their detail?

Keys, once per LOD1 node, when it is built: `n_keys` vectors a node, one per equal part of its block, each a linear
projection of the part's summed [embedding; previous embedding]. The sum comes first, so a key costs a token next to
nothing. Several keys and the maximum over them is what lets a lens find one pair among sixteen (one
key: 81 % hit@1, four: 99.5 %).

Queries, at every token of the tail, from embeddings alone: [embedding; previous; mean of the last few] through an MLP.
A lens that read the hidden states of the full-context pass would have read the answer. All inputs are detached:
the lens never bends the base.

    vote(t, node)   = gain · cosine(query_t, best key of the node)
    logit(t, node)  = Σ over the last `tail` tokens of trust · exp(age) · vote  +  bias(log₂ distance to the node)

trust is a learned number per token, so that a tail of many tokens adds up its evidence and function words stay silent;
age is one per place in the tail, so that what was asked a while ago does not outvote what is asked now.
`logits` does this at every position at once (training: hundreds of queries per context), `focus_logits` at the last one
(use). What a network other than "bilinear" adds to these logits, at few positions: `mc.arms.reader`.

Shapes: B rows, T tokens, N nodes, P keys per node, D width of the base, C key width.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mc.arm import KINDS, load
from nanochat.common import UserError
from nanochat.gpt import norm

LOCAL_MEAN = 8  # tokens that the third part of a query's input averages
DISTANCE_BUCKETS = 32
CURSORS = 8  # positions of a row at which a reader is taught
RERANKED = 64  # blocks that the search of a long history proposes to a reader, at least


@dataclass(frozen=True)
class LensNetConfig:
    d_model: int
    block_size: int = 32
    n_keys: int = 4
    key_dim: int = 128
    query_width: int = 256
    tail: int = 32  # tokens whose evidence adds up, and whose own blocks are shown anyway
    network: str = "bilinear"  # or what reads the blocks together, an arm
    max_lod: int = 2  # levels that it reads

    def __post_init__(self):
        if self.block_size % self.n_keys:
            raise UserError(f"a block of {self.block_size} does not divide into {self.n_keys} lens keys")
        if self.tail < 1 or self.key_dim < 1 or self.query_width < 1:
            raise UserError(f"lens tail {self.tail}, key_dim {self.key_dim} and query_width {self.query_width} must be "
                            "at least 1")


def previous(x_BTD: Tensor) -> Tensor:
    return F.pad(x_BTD, (0, 0, 1, 0))[:, :-1]


def trailing_sum(x_BTN: Tensor, length: int) -> Tensor:
    """Sum over the last `length` steps of dim 1, at every step."""
    total = F.pad(x_BTN, (0, 0, 1, 0)).cumsum(1)
    return total[:, 1:] - F.pad(total, (0, 0, length, 0))[:, 1:x_BTN.shape[1] + 1]


class LensNet(nn.Module):
    def __init__(self, config: LensNetConfig):
        super().__init__()
        self.config = config
        self.key = nn.Linear(2 * config.d_model, config.key_dim, bias=False)
        self.query = nn.Linear(config.d_model, config.key_dim, bias=False)
        self.query_mlp = nn.Sequential(nn.Linear(3 * config.d_model, config.query_width), nn.GELU(),
                                       nn.Linear(config.query_width, config.key_dim, bias=False))
        self.trust = nn.Linear(3 * config.d_model, 1)
        self.log_gain = nn.Parameter(torch.tensor(2.5))
        self.distance_steps = nn.Parameter(torch.zeros(DISTANCE_BUCKETS))
        self.age = nn.Parameter(torch.zeros(config.tail))  # log weight of the vote of the last token, the one before, …
        with torch.no_grad():  # tied start: before it has learned anything, the lens looks for what is alike
            self.key.weight[:, :config.d_model] = self.query.weight
            self.key.weight[:, config.d_model:] = 0
            nn.init.zeros_(self.query_mlp[2].weight)
        nn.init.zeros_(self.trust.weight)
        nn.init.constant_(self.trust.bias, -2.0)  # thirty tokens together start about as sure as four
        self.reader = None
        if config.network != "bilinear":
            self.reader = load(KINDS["lens"][config.network]).reader(config.d_model, config.block_size, config.max_lod,
                                                                     config.tail)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # earlier checkpoints hold the biases themselves
        if (bias := state_dict.pop(prefix + "distance_bias", None)) is not None:
            state_dict[prefix + "distance_steps"] = bias.diff(prepend=bias.new_zeros(1))
        state_dict.setdefault(prefix + "age", torch.zeros_like(self.age))  # … and no ages
        super()._load_from_state_dict(state_dict, prefix, *args)

    def age_weights(self, count: int) -> Tensor:
        """[count] weight of the votes of the last `count` ≤ tail tokens, the oldest first."""
        return self.age[:count].exp().flip(0)

    def tail_sums(self, x_BTN: Tensor) -> Tensor:
        """Sum over the last `tail` steps of dim 1 by their age, at every step."""
        T = x_BTN.shape[1]
        step = torch.arange(T, device=x_BTN.device)
        age_TT = step[:, None] - step
        inside_TT = (age_TT >= 0) & (age_TT < self.config.tail)
        weight_TT = self.age.exp()[age_TT.clamp(0, self.config.tail - 1)] * inside_TT
        return weight_TT.to(x_BTN.dtype) @ x_BTN

    def keys(self, embeds_BTD: Tensor) -> Tensor:
        """[B, N, P, C] unit keys of the N = T // block_size complete blocks. Independent of
        what stands around a block."""
        B, T, D = embeds_BTD.shape
        K, P = self.config.block_size, self.config.n_keys
        blocks = embeds_BTD.detach()[:, :T // K * K].reshape(B, -1, K, D)
        shifted = F.pad(blocks, (0, 0, 1, 0))[:, :, :-1]
        parts = torch.cat([x.unflatten(2, (P, K // P)).sum(3) for x in (blocks, shifted)], -1)
        return F.normalize(self.key(parts), dim=-1)

    def queries(self, embeds_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Unit queries [B, T, C] and trust [B, T, 1] ≥ 0 of every token."""
        x = embeds_BTD.detach()
        local = trailing_sum(x, LOCAL_MEAN) / LOCAL_MEAN
        features = torch.cat([x, previous(x), norm(local)], -1)
        return F.normalize(self.query(x) + self.query_mlp(features), dim=-1), F.softplus(self.trust(features))

    def votes(self, queries_BTC: Tensor, keys_BNPC: Tensor) -> Tensor:
        """[B, T, N]: each token's own vote, not yet weighed by its trust."""
        B, N, P, C = keys_BNPC.shape
        cosine = queries_BTC @ keys_BNPC.reshape(B, N * P, C).transpose(1, 2)
        return self.log_gain.exp() * cosine.unflatten(-1, (N, P)).amax(-1)

    def distance(self, cursor_T: Tensor, index_N: Tensor) -> Tensor:
        """[T, N] bias by how many blocks lie between a node and the cursor, in half octaves.

        A sum of learned steps: beyond the distances that training saw, the bias of the farthest of them holds.
        """
        blocks = cursor_T[:, None] // self.config.block_size - index_N
        bucket = (2 * torch.log2(blocks.clamp_min(1).float())).long().clamp_max(DISTANCE_BUCKETS - 1)
        return self.distance_steps.cumsum(0)[bucket]

    def logits(self, embeds_BTD: Tensor, keys_BNPC: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
        """[B, Q, N] twice at every position t of a range: the token's own vote, and the
        logits of its tail (t − tail, t].

        Which nodes are history at t the caller masks.
        """
        begin = max(positions.start - self.config.tail - LOCAL_MEAN, 0)
        queries, trust = self.queries(embeds_BTD[:, begin:positions.stop])
        votes = self.votes(queries, keys_BNPC)
        cursor = torch.arange(positions.start + 1, positions.stop + 1, device=votes.device)
        own, tail = (x[:, positions.start - begin:] for x in (votes, self.tail_sums(trust * votes)))
        return own, tail + self.distance(cursor, torch.arange(keys_BNPC.shape[1], device=cursor.device))

    def focus_logits(self, tail_BTD: Tensor, keys_BNPC: Tensor, cursor_B: Tensor) -> Tensor:
        """[B, N] unbounded logits for the context that ends at `cursor` [B] (tokens of history).

        tail_BTD: embeddings of the last tokens before the cursor, at least `tail` + LOCAL_MEAN of them where the
        history has as many, so that the result equals `logits` at that position.
        """
        queries, trust = self.queries(tail_BTD)
        votes = (trust * self.votes(queries, keys_BNPC))[:, -self.config.tail:]
        return self.age_weights(votes.shape[1]) @ votes + self.distance(cursor_B,
                                                                        torch.arange(keys_BNPC.shape[1],
                                                                                     device=cursor_B.device))


def focus_scores(logits_BN: Tensor, price_B1: Tensor, temperature: float = 1.0) -> Tensor:
    """Unbounded logits to focus scores in [−1, 1]: tanh((logit − λ)/τ), λ the price of an entry in the same unit."""
    return torch.tanh((logits_BN - price_B1) / temperature)
