"""A stored history far longer than a training row, shown in and around the row's own: far distances, upper levels and
distractors in distribution, at the price of some entries.

The row's past is cut in two at a block boundary: what lies before it is pushed back by the part of the stored history
that comes between, and the rest of the stored history stands in front of all. So a row's own blocks, shown raw or as
gists, are seen as far back as a session may have them, among entries such as a session shows there: the coarsest tiling
of the length, opened along two paths down to LOD1, one of them to where the row's own blocks lie.

Its LOD1 gists are those of other rows of the micro-batch, without gradient; each level above is made from random nodes
of the level below, which get no gradient either, while GistNet learns to make it. Never raw tokens: another row's facts
would contradict the row's own.

Draws are keyed by (seed, step, global row). Which rows are "other" is the micro-batch's: its size
matters, the number of ranks does not.

Shapes: B rows of the micro-batch, R rows that get a far history, T tokens, D width, F entries of it, P nodes of a pool.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mc.config import MCConfig
from mc.gistnet import GistNet
from mc.keyed_random import uniform
from mc.working_context import Cut, coarsest, expand, spans

LONGEST = 2**23  # tokens of a far history, unless a run asks for more
BLOCKS_OF_A_ROW = 8  # LOD1 nodes that each row lends to the others
NODES_OF_A_LEVEL = 4  # different nodes of each level above


class FarHistory(NamedTuple):
    """S tokens of stored history: [0, split) stands before the row, [split, S) right before
    the row's token `boundary`."""

    cut: Cut  # tiles [0, S) of each row
    vectors_BFD: Tensor
    split_B: Tensor
    boundary_B: Tensor


def place_far(start_BM: Tensor, far: FarHistory) -> tuple[Tensor, Tensor, Tensor]:
    """Where everything stands, in tokens of the row: the starts [B, M] of its own entries, starts and
    lengths [B, F] of the far ones.

    What begins before the boundary is pushed back as a whole, a gist that reaches over it too.
    """
    start_BF, length_BF = spans(far.cut)
    inside_BF = start_BF >= far.split_B[:, None]
    gap_B1 = (length_BF * inside_BF).sum(1, keepdim=True)
    boundary_B1 = far.boundary_B[:, None]
    start_BF = start_BF - length_BF.sum(1, keepdim=True) + torch.where(inside_BF, boundary_B1, 0)
    return start_BM - torch.where(start_BM < boundary_B1, gap_B1, 0), start_BF, length_BF


def most_entries(config: MCConfig) -> int:
    """The most that any drawn length takes before it is opened anywhere."""
    K, top = config.block_size, config.max_lod
    return config.far_tokens // K**top + sum(min(config.far_tokens // K**lod, K - 1) for lod in range(1, top))


def with_far_tokens(config: MCConfig, micro_batch: int) -> tuple[MCConfig, str | None]:
    """The config with --mc_far_tokens=-1 as the number that it means here, and where that is none the
    reason, as part of a sentence."""
    if config.far_tokens >= 0:
        return config, None
    K, top = config.block_size, config.max_lod
    most = config.far_entries - (K - 1) * (top - 1)  # nodes of the highest level
    obstacles = {"--device_batch_size=1: a far history is made of other rows": micro_batch < 2,
                 f"--mc_gists_per_block={config.gists_per_block}": config.gists_per_block > 1,
                 f"--mc_gist_source={config.gist_source}": config.gist_source != "embeddings",
                 f"--mc_far_entries={config.far_entries}": most < 1}
    why = next((obstacle for obstacle, holds in obstacles.items() if holds), None)
    if why:
        return replace(config, far_tokens=0, far_entries=MCConfig.far_entries), why
    return replace(config, far_tokens=min(min(8, most) * K**top, LONGEST)), None


def draw_far_cut(config: MCConfig, rows_B: Tensor, *key: int | str) -> tuple[Cut, Tensor]:
    """Which nodes are shown, and the token at which the row's own older part lies; lengths are
    log-uniform up to far_tokens."""
    K = config.block_size
    draw = uniform(rows_B, 3, *key, "far cut")
    blocks_B = _log_uniform(draw[:, 0], torch.full_like(rows_B, config.far_tokens // K))
    split_B = (blocks_B - _log_uniform(draw[:, 1], blocks_B)) * K
    cut = coarsest(blocks_B * K, K, config.max_lod, config.far_entries)
    for token_B in (split_B, (draw[:, 2].double() * blocks_B).long() * K):
        for lod in range(config.max_lod, 1, -1):
            start_BW, length_BW = spans(cut)
            on_path = (start_BW <= token_B[:, None]) & (token_B[:, None] < start_BW + length_BW) & (cut.lod_BW == lod)
            cut, _ = expand(cut, on_path)
    return cut, split_B


def _log_uniform(draw_B: Tensor, most_B: Tensor) -> Tensor:
    """int64 in [0, most], log(1 + x) uniform."""
    return (torch.exp2(draw_B.double() * torch.log2(most_B.double() + 2)).long() - 1).clamp(max=most_B)


def make_pools(gistnet: GistNet, embeds_BTD: Tensor, rows_B: Tensor, chosen: slice, max_lod: int,
               *key: int | str) -> list[Tensor]:
    """For each chosen row nodes [R, P, D] of LOD1 … LODmax_lod, made of the *other* rows of the micro-batch."""
    B, T, D = embeds_BTD.shape
    K = gistnet.config.block_size
    block_BP = (uniform(rows_B, BLOCKS_OF_A_ROW, *key, "far blocks") * (T // K)).long()
    blocks = embeds_BTD[:, :T // K * K].detach().unflatten(1, (T // K,
                                                               K)).gather(1, block_BP[..., None, None].expand(-1, -1,
                                                                                                              K, D))
    with torch.no_grad():
        lent_BPD = gistnet(blocks.flatten(0, 1), None, 1)[:, 0].unflatten(0, (B, BLOCKS_OF_A_ROW))
    others_RB = (torch.arange(B, device=rows_B.device)[chosen, None] + torch.arange(1, B, device=rows_B.device)) % B
    pools = [lent_BPD[others_RB].flatten(1, 2)]
    for lod in range(2, max_lod + 1):
        children = pools[-1].detach()
        pick = _pick(rows_B[chosen], NODES_OF_A_LEVEL * K, children.shape[1], *key, "far children", lod)
        made = gistnet(_rows_of(children, pick).unflatten(1, (NODES_OF_A_LEVEL, K)).flatten(0, 1), None, lod)[:, 0]
        pools.append(made.unflatten(0, (len(children), NODES_OF_A_LEVEL)))
    return pools


def _pick(rows_B: Tensor, count: int, among: int, *key: int | str) -> Tensor:
    return (uniform(rows_B, count, *key) * among).long()


def _rows_of(x_BPD: Tensor, index_BN: Tensor) -> Tensor:
    return x_BPD.gather(1, index_BN[..., None].expand(-1, -1, x_BPD.shape[-1]))


def draw_far_history(config: MCConfig, gistnet: GistNet, embeds_BTD: Tensor, rows_B: Tensor, chosen: slice, n_R: Tensor,
                     variants: int, *key: int | str) -> FarHistory:
    """One for each chosen row with n tokens of history, the same for each of its variants: row r
    of variant v stands at v·R + r.

    embeds, rows: of the whole micro-batch.
    """
    rows_R = rows_B[chosen]
    cut, split_R = draw_far_cut(config, rows_R, *key)
    pools = make_pools(gistnet, embeds_BTD, rows_B, chosen, config.max_lod, *key)
    draw_RF, lod_RF, lent = uniform(rows_R, config.far_entries, *key,
                                    "far nodes"), cut.lod_BW.clamp_min(1), pools[0].shape[1]
    first_RF = torch.where(lod_RF == 1, 0, lent + (lod_RF - 2) * NODES_OF_A_LEVEL)
    index_RF = first_RF + (draw_RF * torch.where(lod_RF == 1, lent, NODES_OF_A_LEVEL)).long()
    vectors = _rows_of(torch.cat(pools, 1), index_RF) * cut.valid_BW[..., None]
    share_R = uniform(rows_R, 1, *key, "far boundary")[:, 0]
    boundary_R = (share_R * (n_R - config.protected) / config.block_size).long() * config.block_size
    lod, index, valid, vectors, split, boundary = (
        x.repeat(variants, *[1] * (x.ndim - 1)) for x in (*cut[:3], vectors, split_R, boundary_R))
    return FarHistory(Cut(lod, index, valid, cut.block_size), vectors, split, boundary)
