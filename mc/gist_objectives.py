"""Losses on gists themselves, beside what the working context teaches them; and how far training cuts are compressed.

    contrast   of all nodes of a row and level, the gist names its own content, the mean of what it was made of: gists that are all
               alike, or that drop what tells blocks apart, pay (D5). Teaches GistNet and what gists are made of.
    horizon    of all nodes of a row and level, the base's hidden state at the end of node i names the gist of node i + 1, through
               a small head: gists hold what can be foreseen, and the base foresees it (D3). Teaches the head, base and GistNet.

Both are a cross-entropy over the nodes of a row, never over the vocabulary. Where the next node cannot be foreseen at all, nothing
gets the horizon loss below the logarithm of the nodes that the hidden state has not seen yet.

Shapes: B rows, T tokens, N nodes of a level, D width, G gists per node.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.focus_allocator import FocusConfig
from mc.mega_context import Tree, tiling
from nanochat.common import UserError

TEMPERATURE = 0.1  # of cosines, the usual value of contrastive losses
HORIZON_LODS = (1, 2)
BAND_EDGES = (5.0, 10.0, float("inf"))  # tokens per entry up to which a band goes


def naming(query_BND: Tensor, gist_BMD: Tensor, own_N: Tensor) -> Tensor:
    """[] nats: how well query i names gist own[i] among the row's M, cross-entropy of cosines / TEMPERATURE, mean over all queries."""
    cosine_BNM = F.normalize(query_BND, dim=-1) @ F.normalize(gist_BMD, dim=-1).mT
    return F.cross_entropy((cosine_BNM / TEMPERATURE).flatten(0, 1), own_N.repeat(len(query_BND)))


def nodes_of(tree: Tree, lod: int) -> Tensor:
    """[B, N, D] one vector per node: the mean of its gists."""
    return tree.levels[lod].unflatten(1, (-1, tree.n_gists)).mean(2)


def contrast_loss(tree: Tree) -> Tensor:
    """[] nats, mean over the levels with two nodes or more; 0 where there is none. What a gist is to name gets no gradient."""
    losses = []
    for lod in range(1, tree.shape.max_lod + 1):
        count = tree.shape.counts[lod]
        if count > 1:
            children = (tree.levels[0] if lod == 1 else nodes_of(tree, lod - 1))[:, :count * tree.shape.block_size].detach()
            content_BND = children.unflatten(1, (count, -1)).mean(2)
            losses.append(naming(nodes_of(tree, lod), content_BND, torch.arange(count, device=content_BND.device)))
    return torch.stack(losses).mean() if losses else tree.table_BND.new_zeros(())


class HorizonHead(torch.nn.Module):
    """Per level a matrix from hidden states to the gist of the node that follows."""

    def __init__(self, d_model: int, max_lod: int):
        super().__init__()
        self.levels = torch.nn.ModuleList(torch.nn.Linear(d_model, d_model, bias=False) for _ in HORIZON_LODS[:max_lod])

    def loss(self, hidden_BTD: Tensor, tree: Tree) -> Tensor:
        """[] nats, mean over LOD1 and LOD2 as far as a row has two nodes of them; 0 where it has not. hidden: of the LM pass."""
        losses = []
        for lod, head in zip(HORIZON_LODS, self.levels):
            count, width = tree.shape.counts[lod], tree.shape.block_size**lod
            if count > 1:
                ends_BND = hidden_BTD[:, width - 1:(count - 1) * width:width]
                losses.append(naming(head(ends_BND), nodes_of(tree, lod), torch.arange(1, count, device=ends_BND.device)))
        return torch.stack(losses).mean() if losses else hidden_BTD.new_zeros(())


def entries_shown(rank_BN: Tensor, n_B: Tensor, cfg: FocusConfig) -> Tensor:
    """[B, N + 1] int64: entries of the cut of n tokens that shows its m best blocks raw beside the tail, m = 0 … N.

    rank: place of each block, best 0, one of a kind; those in the tail are raw anyway. A node is opened with the best of its blocks.
    """
    before_B, first_BM = (n_B - cfg.recent).clamp_min(0), rank_BN
    added_BN = torch.zeros_like(F.pad(rank_BN, (1, 0)))
    for lod in range(1, cfg.max_lod + 1):
        if lod > 1:
            count = first_BM.shape[1] // cfg.block_size
            first_BM = first_BM[:, :count * cfg.block_size].unflatten(1, (count, cfg.block_size)).amin(-1)
        end_M = cfg.block_size**lod * torch.arange(1, first_BM.shape[1] + 1, device=n_B.device)
        added_BN.scatter_add_(1, first_BM + 1, cfg.price(lod) * (end_M <= before_B[:, None]))
    blocks_B = before_B // cfg.block_size * cfg.block_size
    return (tiling(blocks_B, cfg.block_size, cfg.max_lod, cfg.n_gists) + n_B - blocks_B)[:, None] + added_BN.cumsum(1)


def blocks_in_band(draw_B: Tensor, done: float, n_B: Tensor, rank_BN: Tensor, cfg: FocusConfig) -> Tensor:
    """[B] int64: how many blocks, best first, to show raw beside the tail, so that a cut of n tokens has the compression of its band.

    The compression is log-uniform within its band, and the band one of those that are open: each third of the training opens another,
    the mildest first. Of the cuts within the band that whose entries are nearest, or the nearest of all where the band lies between
    two. What the budget does not hold is cut to it, what is coarser than the coarsest cut to that: a budget that never gets
    below 5 tokens per entry has no cut in the first band (`check_bands`), a short history none in the last.
    draw: uniform in [0, 1). done: share of the training with working contexts that is over. rank: as `entries_shown` takes it.
    """
    entries_BN = entries_shown(rank_BN, n_B, cfg)
    bands = min(int(len(BAND_EDGES) * done) + 1, len(BAND_EDGES))
    place_B = draw_B.double() * bands
    edges = torch.tensor([0.0, *BAND_EDGES], dtype=torch.float64, device=draw_B.device)
    band_B = place_B.long()
    most_B, least_B = ((n_B / edges[i]).clamp_max(cfg.budget).maximum(entries_BN[:, 0]) for i in (band_B, band_B + 1))
    wanted_B = most_B * (least_B / most_B) ** (place_B - band_B)
    outside_BN = (entries_BN < least_B[:, None]) | (entries_BN > most_B[:, None])
    return ((entries_BN - wanted_B[:, None]).abs() + n_B[:, None] * outside_BN).argmin(1)


def check_bands(n_tokens: int, cfg: FocusConfig) -> None:
    """UserError for a budget that cannot reach the mildest band."""
    if cfg.budget * BAND_EDGES[0] < n_tokens:
        raise UserError(f"--mc_bands=1 begins with {BAND_EDGES[0]:g} tokens per entry, and --mc_budget={cfg.budget} of {n_tokens} tokens "
                        f"are {n_tokens / cfg.budget:.3g}; raise it to {math.ceil(n_tokens / BAND_EDGES[0])} or leave out --mc_bands")
