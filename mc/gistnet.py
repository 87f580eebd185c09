"""GistNet: a block of K entries becomes G vectors in the embedding space of the base model.

    gist = norm(mean(block) + head(summary(block)))

The mean is over the valid entries and the head starts at zero, so training starts exactly from the masked mean, the
baseline. Only the summary differs between variants, and each is put together from one `Layer`
(a sequence that reads another):

    mean         no summary, no parameters
    transformer  the entries read each other; then the mean over them
    slots        an arm, `mc.arms.gist_slots`

Nothing is causal. The network is narrow (`width`), because it runs on every token: at width 64, beside a base layer of
width 128 at 1,088 tokens, `transformer` costs 14 % of that layer per token, `slots` 27 % (`GistNet.flops_per_token`;
measured times agree).

Every attention has one more key and value, both zero (`add_zero_attn` of nn.MultiheadAttention; Miller, "Attention is
off by one", 2023). With it an entry may read nothing, which makes reading a single slot a gate, sigmoid(q·k), instead
of a constant; and a block without any valid entry is no special case.

Shapes: N blocks, K entries of a block, D width of the base, C width inside, H heads, E head width, G gists of a block,
L levels, Q reading rows, M rows read.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mc.arm import KINDS, load
from nanochat.common import UserError
from nanochat.gpt import norm

VARIANTS, GISTS = ("mean", "transformer", *KINDS["gist"]), (1, 2, 4)
MLP_RATIO = 2  # hidden width of an MLP / C
MAX_WIDTH = 512
POSITION_STD = 0.5  # of the position embedding, beside entries of rms 1
# at 1, half of its reader's ReLU units never switch at the start; 0.1, 0.4 and 1 learn alike (toy, 3 seeds)
QUERY_STD = 0.4


@dataclass(frozen=True)
class GistNetConfig:
    """What a GistNet is. A value that would have no effect is refused with a UserError, as is one that cannot work."""

    d_model: int
    block_size: int = 32
    max_lod: int = 2  # gists are made for LOD1 … LOD max_lod
    variant: str = "transformer"
    width: int = 64
    n_head: int = 2
    n_layer: int = 1  # layers in which the entries read each other
    n_gists: int = 1

    def __post_init__(self):
        for name, choices in (("variant", VARIANTS), ("n_gists", GISTS)):
            if getattr(self, name) not in choices:
                raise UserError(f"gistnet {name} {getattr(self, name)!r}: use one of {', '.join(map(str, choices))}")
        if self.block_size < 2 or self.max_lod < 1 or self.n_layer < 1:
            given = f"{self.block_size}, {self.max_lod}, {self.n_layer}"
            raise UserError(f"gistnet needs block_size ≥ 2, max_lod ≥ 1 and n_layer ≥ 1; got {given}")
        if self.block_size % self.n_gists or self.block_size == self.n_gists:
            raise UserError(f"a block of {self.block_size} does not divide into {self.n_gists} gists of several "
                            "entries each")
        if not 0 < self.width <= MAX_WIDTH or self.n_head < 1 or self.width % self.n_head:
            raise UserError(
                f"gistnet width {self.width} must be at most {MAX_WIDTH} and divide into its {self.n_head} heads")

    def entries(self, lod: int) -> int:
        """Entries of a block at this level: tokens, or the gists of its nodes."""
        return self.block_size * (self.n_gists if lod > 1 else 1)


def linear(n_in: int, n_out: int) -> nn.Linear:
    """A matrix without bias that keeps an rms of 1."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=n_in**-0.5)
    return layer


class Layer(nn.Module):
    """Rows read rows: pre-norm attention, then a ReLU² MLP, both residual. A sequence that
    reads itself is self-attention."""

    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.query, self.key_value, self.out = linear(width, width), linear(width, 2 * width), linear(width, width)
        self.up, self.down = linear(width, MLP_RATIO * width), linear(MLP_RATIO * width, width)

    def forward(self, x_NQC: Tensor, source_NMC: Tensor, mask_NM: Tensor | None) -> Tensor:
        """x [N, Q, C] reads source [N, M, C] where mask (bool; None: everywhere) -> [N, Q, C]."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

        q_NHQE = heads(self.query(norm(x_NQC)))
        # the zero key
        k_NHME, v_NHME = (F.pad(heads(y), (0, 0, 0, 1)) for y in self.key_value(norm(source_NMC)).chunk(2, -1))
        mask_N11M = None if mask_NM is None else F.pad(mask_NM, (0, 1), value=True)[:, None, None]
        read_NHQE = F.scaled_dot_product_attention(q_NHQE, k_NHME, v_NHME, attn_mask=mask_N11M)
        x_NQC = x_NQC + self.out(read_NHQE.transpose(1, 2).flatten(2))
        return x_NQC + self.down(F.relu(self.up(norm(x_NQC))).square())

    def flops(self, n_rows: int, n_source: int) -> int:
        """Forward FLOPs of n_rows rows reading n_source."""
        width = self.query.in_features
        weights = n_rows * 2 * (1 + MLP_RATIO) * width**2 + n_source * 2 * width**2
        return 2 * weights + 4 * n_rows * (n_source + 1) * width


class Transformer(nn.Module):
    """n_layer layers of self-attention, then the mean."""

    def __init__(self, config: GistNetConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config.width, config.n_head) for _ in range(config.n_layer))

    def forward(self, h_NKC: Tensor, mask_NK: Tensor | None, share_NGK: Tensor) -> Tensor:
        """h [N, K, C], mask [N, K] bool or None, share [N or 1, G, K] the weights of a mean -> summary [N, G, C]."""
        for layer in self.layers:
            h_NKC = layer(h_NKC, h_NKC, mask_NK)
        return share_NGK.to(h_NKC.dtype) @ h_NKC

    def flops(self, K: int, G: int) -> int:
        return sum(layer.flops(K, K) for layer in self.layers) + 2 * G * K * self.layers[0].query.in_features


def spread_rows(query_GC: Tensor, like_NKC: Tensor) -> Tensor:
    """The same learned rows for each block: [G, C] -> [N, G, C]."""
    return query_GC.to(like_NKC.dtype).expand(len(like_NKC), -1, -1)


class Summary(nn.Module):
    """What a gist has beyond the mean: into the narrow width, summarize, and back out through
    a head that starts at zero."""

    def __init__(self, config: GistNetConfig):
        super().__init__()
        self.embed = linear(config.d_model, config.width)
        self.position_KC = nn.Parameter(POSITION_STD * torch.randn(config.entries(config.max_lod), config.width))
        self.level_LC = nn.Parameter(torch.zeros(config.max_lod, config.width))
        body = Transformer if config.variant == "transformer" else load(KINDS["gist"][config.variant]).BODY
        self.body = body(config)
        self.head = linear(config.width, config.d_model)
        nn.init.zeros_(self.head.weight)

    def forward(self, x_NKD: Tensor, mask_NK: Tensor | None, share_NGK: Tensor, level: int) -> Tensor:
        """x [N, K, D], mask [N, K] or None, share [N or 1, G, K], level from 0 -> [N, G, D], not normed."""
        h_NKC = self.embed(x_NKD)
        h_NKC = h_NKC + (self.position_KC[: x_NKD.shape[1]] + self.level_LC[level]).to(h_NKC.dtype)
        return self.head(norm(self.body(h_NKC, mask_NK, share_NGK)))

    def flops(self, K: int, G: int) -> int:
        return 2 * (K * self.embed.weight.numel() + G * self.head.weight.numel()) + self.body.flops(K, G)


class GistNet(nn.Module):
    """Blocks in, gists out, at every level of the tree. See the module's docstring for the variants."""

    def __init__(self, config: GistNetConfig):
        super().__init__()
        self.config = config
        # a list, for the names in checkpoints
        self.summaries = nn.ModuleList([] if config.variant == "mean" else [Summary(config)])

    def forward(self, x_NKD: Tensor, mask_NK: Tensor | None, lod: int, read_NKD: Tensor | None = None) -> Tensor:
        """The gists of N blocks.

        x_NKD: float, entries of rms 1 (normed token embeddings, or gists of the level below); K ≤ config.entries(lod).
        mask_NK: bool, True where an entry is valid; None: everywhere. What stands in an invalid entry, even NaN, has no
            effect and gets no gradient: a block with holes at its end gives what the shorter block gives.
        lod: level of the gists to make, 1 … max_lod.
        read_NKD: of rms 1, what the summary reads in place of x, whose mean the gists start from all the same; None: x.
        Returns [N, G, D], dtype of x, of rms 1; zeros for a block without a valid entry. With G > 1 gists, gist g
        starts from the mean of the g-th of G equal parts of the block, or of the whole block where that part holds
        nothing valid. Raises ValueError when a shape or lod does not fit the config.
        """
        config = self.config
        if not 1 <= lod <= config.max_lod:
            raise ValueError(f"lod {lod}: this GistNet makes LOD1 … LOD{config.max_lod}")
        if x_NKD.ndim != 3 or not 0 < x_NKD.shape[1] <= config.entries(lod) or x_NKD.shape[2] != config.d_model:
            raise ValueError(f"blocks {tuple(x_NKD.shape)}: expected [N, at most {config.entries(lod)}, "
                             f"{config.d_model}]")
        if mask_NK is not None:
            if mask_NK.shape != x_NKD.shape[:2] or mask_NK.dtype != torch.bool:
                raise ValueError(f"mask {tuple(mask_NK.shape)} {mask_NK.dtype}: expected bool {tuple(x_NKD.shape[:2])}")
            x_NKD = x_NKD.masked_fill(~mask_NK[..., None], 0)
            read_NKD = None if read_NKD is None else read_NKD.masked_fill(~mask_NK[..., None], 0)
        share_NGK = self._shares(mask_NK, x_NKD, config.entries(lod))
        gist_NGD = share_NGK @ x_NKD
        for summary in self.summaries:
            gist_NGD = gist_NGD + summary(x_NKD if read_NKD is None else read_NKD, mask_NK, share_NGK, lod - 1)
        gist_NGD = norm(gist_NGD).to(x_NKD.dtype)
        return gist_NGD if mask_NK is None else gist_NGD * mask_NK.any(1)[:, None, None]

    def _shares(self, mask_NK: Tensor | None, x_NKD: Tensor, size: int) -> Tensor:
        """Weights of the mean of each part of a block of `size`: [N or 1, G, K], rows summing to 1
        (0 where nothing is valid)."""
        K, G = x_NKD.shape[1], self.config.n_gists
        valid_NK = mask_NK if mask_NK is not None else torch.ones(1, K, dtype=torch.bool, device=x_NKD.device)
        part_K = torch.arange(K, device=x_NKD.device) // (size // G)
        mine_NGK = valid_NK[:, None] & (part_K == torch.arange(G, device=x_NKD.device)[:, None])
        mine_NGK = torch.where(mine_NGK.any(-1, keepdim=True), mine_NGK, valid_NK[:, None]).to(x_NKD.dtype)
        return mine_NGK / mine_NGK.sum(-1, keepdim=True).clamp(min=1)

    def flops_per_token(self) -> float:
        """Forward FLOPs per token of history, all levels together, counted from shapes (a multiply-add is 2).

        Level l has one block per K^l tokens. Backward costs twice as much again.
        """
        c = self.config

        def block(size: int) -> int:
            return 2 * c.n_gists * size * c.d_model + (self.summaries[0].flops(size, c.n_gists) if len(self.summaries)
                                                       else 0)

        return sum(block(c.entries(lod)) / c.block_size**lod for lod in range(1, c.max_lod + 1))
