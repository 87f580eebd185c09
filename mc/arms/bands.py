"""`--mc_arms=bands`: how far training cuts are compressed (D5): up to 5 tokens per entry, then up to 10 as well, then
any, a third of the training each.

Shapes: B rows, N blocks, M nodes of a level.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.arm import Arm
from mc.focus_allocator import FocusConfig
from mc.mega_context import tiling
from mc.runtime import MCController
from nanochat.common import UserError

BAND_EDGES = (5.0, 10.0, float("inf"))  # tokens per entry up to which a band goes


def entries_shown(rank_BN: Tensor, n_B: Tensor, cfg: FocusConfig) -> Tensor:
    """[B, N + 1] int64: entries of the cut of n tokens that shows its m best blocks raw beside the tail, m = 0 … N.

    rank: place of each block, best 0, one of a kind; those in the tail are raw anyway. A node is opened with the best
    of its blocks.
    """
    before_B, first_BM = (n_B - cfg.recent).clamp_min(0), rank_BN
    added_BN = torch.zeros_like(F.pad(rank_BN, (1, 0)))
    for lod in range(1, cfg.max_lod + 1):
        if lod > 1:
            count = first_BM.shape[1] // cfg.block_size
            first_BM = first_BM[:, : count * cfg.block_size].unflatten(1, (count, cfg.block_size)).amin(-1)
        end_M = cfg.block_size**lod * torch.arange(1, first_BM.shape[1] + 1, device=n_B.device)
        added_BN.scatter_add_(1, first_BM + 1, cfg.price(lod) * (end_M <= before_B[:, None]))
    blocks_B = before_B // cfg.block_size * cfg.block_size
    return (tiling(blocks_B, cfg.block_size, cfg.max_lod, cfg.n_gists) + n_B - blocks_B)[:, None] + added_BN.cumsum(1)


def blocks_in_band(draw_B: Tensor, done: float, n_B: Tensor, rank_BN: Tensor, cfg: FocusConfig) -> Tensor:
    """[B] int64: how many blocks, best first, to show raw beside the tail, so that a cut of n tokens has the
    compression of its band.

    The compression is log-uniform within its band, and the band one of those that are open: each third of the training
    opens another, the mildest first. Of the cuts within the band that whose entries are nearest, or the nearest of all
    where the band lies between two. What the budget does not hold is cut to it, what is coarser than the coarsest cut
    to that: a budget that never gets below 5 tokens per entry has no cut in the first band (`check_bands`), a short
    history none in the last.
    draw: uniform in [0, 1). done: share of the training with working contexts that is over. rank: as `entries_shown`
    takes it.
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
        raise UserError(
            f"--mc_arms=bands begins with {BAND_EDGES[0]:g} tokens per entry, and --mc_budget={cfg.budget} "
            f"of {n_tokens} tokens "
            f"are {n_tokens / cfg.budget:.3g}; raise it to {math.ceil(n_tokens / BAND_EDGES[0])} or leave "
            f"out the arm"
        )


class Bands(Arm):
    def begin(self, controller: MCController) -> None:
        check_bands(controller.history, controller.model.focus_config())

    def shown(self, draw_R: Tensor, done: float, n_R: Tensor, rank_RN: Tensor, focus: FocusConfig) -> Tensor:
        return blocks_in_band(draw_R, done, n_R, rank_RN, focus)


ARM = Bands
