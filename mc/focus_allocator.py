"""Which spans of the history deserve their detail: a knapsack on the tree, solved greedily and in batch.

A state says which nodes are expanded; the cut follows from it (`working_context.from_expanded`). Expanding a node adds
K - 1 entries (with G gists per node K - G at LOD1 and (K - 1) * G above), so entries =
tiling(n) + what the expanded nodes
added: the whole budget is counting. Expanded nodes are closed upward (an expanded node's existing ancestors are
expanded); every edit keeps that.

A cut is allocated afresh here, as training does for every row; a session edits its own a little at a time
(`mc.session.refocus`), and so does the replay of a probe. What an entry costs, what is left of the budget, what the
budget holds and which of several blocks is shown next (`FocusConfig`, `fits`, `pick_best`) are one and the same.
Showing a block expands it and its closed ancestors. Only blocks (LOD1) have scores of their own.

Nodes of all levels lie in one axis, level after level: [LOD1 | LOD2 | …]. Every operation acts on [B, N] at once;
the only Python loops are over levels and over the (static) number of blocks that fit.

Shapes: B rows, N nodes of all levels, N1 blocks (LOD1 nodes), L levels. Counts are int64.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.mega_context import Integers, tiling
from mc.working_context import Cut, from_expanded
from nanochat.common import UserError

@dataclass(frozen=True)
class FocusConfig:
    """What the allocator may spend and how fast it may change its mind. Raises UserError on impossible values."""

    budget: int  # W, entries, hard: more are collapsed by force
    block_size: int = 32  # K
    max_lod: int = 1  # L
    recent: int | None = None  # R, last tokens always shown as LOD0. None: min(128, budget / 4)
    tau_expand: float = 0.20  # a block is shown above +tau_expand …
    tau_collapse: float = 0.20  # … and a node hidden below -tau_collapse
    margin: float = 0.20  # what pays for a block scores lower than it by more than this
    max_edits: int = 4  # N_diff, path edits per refocus
    cooldown: int = 2  # refocuses during which an edit is not reversed
    n_gists: int = 1  # G, entries of a node above LOD0
    span: int = 1  # S, adjacent blocks that one edit may show

    def __post_init__(self):
        if self.recent is None:
            object.__setattr__(self, "recent", min(128, self.budget // 4))
        least = dict(budget=1, block_size=2, max_lod=1, recent=0, max_edits=0, cooldown=0, n_gists=1, span=1)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"focus {name}={getattr(self, name)} must be at least {low}")
        for name in ("tau_expand", "tau_collapse", "margin"):
            if not 0 <= getattr(self, name) <= 2:
                raise UserError(f"focus {name}={getattr(self, name)} must lie in [0, 2], scores being in [-1, 1]")
        if self.n_gists >= self.block_size:
            raise UserError(f"focus n_gists={self.n_gists} must be less than block_size={self.block_size}")

    def price(self, lod: int) -> int:
        """Entries that expanding a node of this level adds."""
        return self.block_size * (self.n_gists if lod > 1 else 1) - self.n_gists

    def left(self, n_tokens: Integers, paid: Integers) -> Integers:
        """Entries of the budget that are left beside the tiling and the price of what is expanded; negative when over
        it."""
        return self.budget - tiling(n_tokens, self.block_size, self.max_lod, self.n_gists) - paid


def entries_needed(n_tokens: int, cfg: FocusConfig, deep_blocks: int = 1) -> tuple[int, int, int]:
    """Entries for the tiling, for `deep_blocks` blocks shown raw, and for the tail: the budget must hold their sum.

    The tail is what `recent` protects, rounded out to whole blocks. What lies before it takes tiling(before) entries,
    and a block shown raw what opening one node of each level that exists there adds.
    """
    k = cfg.block_size
    before = max(n_tokens - cfg.recent, 0) // k * k
    deep = sum(cfg.price(lod) for lod in range(1, cfg.max_lod + 1) if k**lod <= before)
    return tiling(before, k, cfg.max_lod, cfg.n_gists), deep * deep_blocks, n_tokens - before


@lru_cache
def fits(n_tokens: int, cfg: FocusConfig) -> bool:
    """Whether the budget tiles every history of up to n_tokens with a block shown raw besides the
    tail: once false, always false.

    A tiling takes most entries where the lower digits of what lies before the tail are all block_size - 1.
    """
    head, widths = n_tokens - cfg.recent, [cfg.block_size**lod for lod in range(1, cfg.max_lod + 1)]
    worst = [n_tokens, *(head // width * width - 1 + cfg.recent for width in widths)]
    return all(sum(entries_needed(n, cfg)) <= cfg.budget for n in worst if n > 0)


def check_budget(cfg: FocusConfig) -> None:
    """Refuse (UserError, with the numbers) a budget that, whatever the length, cannot show the tail and one
    block raw and nothing else."""
    tail = cfg.recent + cfg.block_size - 1
    if cfg.budget < (need := tail + cfg.block_size):
        raise UserError(
            f"a budget of {cfg.budget} entries is too small for a session: a recent tail of up to {tail} tokens + one "
            "raw block of "
            f"{cfg.block_size} = {need}; raise --mc_budget to {need}"
        )


def check_feasible(n_tokens: int, cfg: FocusConfig, deep_blocks: int = 1) -> None:
    """Refuse (UserError, with the numbers) a budget that cannot show `deep_blocks` blocks raw besides the tail."""
    tiles, deep, tail = entries_needed(n_tokens, cfg, deep_blocks)
    if (need := tiles + deep + tail) > cfg.budget:
        raise UserError(
            f"a budget of {cfg.budget} entries is too small for {n_tokens} tokens: tiling {tiles} + "
            f"{deep_blocks} raw block(s) {deep} + recent tail {tail} = {need} (block size {cfg.block_size}, max_lod "
            f"{cfg.max_lod}); "
            f"raise the budget to {need}, raise max_lod, or lower recent={cfg.recent}"
        )


class FocusState(NamedTuple):
    """Explicit: what a cut follows from. One [B, N_l] per level l = 1 … L, N_l = N1 // K**(l-1)."""

    expanded: tuple[Tensor, ...]  # bool, existing nodes only, closed upward
    n_tokens_B: Tensor  # int64


class NodeAxis(NamedTuple):
    """Geometry of the node axis for N1 blocks; a function of shapes alone."""

    block_size: int
    sizes: list[int]  # nodes per level
    lod_N: Tensor
    first_N: Tensor  # first block
    blocks_N: Tensor  # number of blocks, K**(lod-1)
    path_NL: Tensor  # [N1, L]: each block's own node and ancestors; N (one past the end) where there is none
    price_N: Tensor  # entries that expanding it adds
    below_N: Tensor  # entries that expanding one node of each level below it adds

    @staticmethod
    def of(n_blocks: int, cfg: FocusConfig, device: torch.device) -> "NodeAxis":
        block_N = torch.arange(n_blocks, device=device)
        widths = [cfg.block_size**level for level in range(cfg.max_lod)]
        sizes = [n_blocks // width for width in widths]
        lods, firsts, blocks, path, prices, below = [], [], [], [], [], []
        for level, (width, size) in enumerate(zip(widths, sizes)):
            lods.append(torch.full((size,), level + 1, device=device))
            blocks.append(torch.full((size,), width, device=device))
            firsts.append(block_N[:size] * width)
            prices.append(torch.full((size,), cfg.price(level + 1), device=device))
            below.append(torch.full((size,), sum(map(cfg.price, range(1, level + 1))), device=device))
            node_N = block_N // width
            path.append(torch.where(node_N < size, sum(sizes[:level]) + node_N, sum(sizes)))
        joined = map(torch.cat, (lods, firsts, blocks))
        return NodeAxis(cfg.block_size, sizes, *joined, torch.stack(path, -1), *map(torch.cat, (prices, below)))

    def on_path(self, node_B1: Tensor) -> Tensor:
        """The node itself and its ancestors, bool [B, N]."""
        first_B1 = self.first_N[node_B1]
        holds_BN = (self.first_N <= first_B1) & (first_B1 < self.first_N + self.blocks_N)
        return (self.lod_N >= self.lod_N[node_B1]) & holds_BN

    def path_price(self, closed_BN: Tensor) -> Tensor:
        """Entries that showing each block adds, int64 [B, N1]."""
        return F.pad(closed_BN * self.price_N, (0, 1))[:, self.path_NL].sum(-1)


def pick_best(score_BC: Tensor, cost_BC: Tensor, can_BC: Tensor) -> Tensor:
    """The allowed choice of highest score; ties: the cheapest in entries, then the last, which is the
    nearest to the tail. int64 [B, 1]. Where none is allowed, any."""
    best_B1 = score_BC.masked_fill(~can_BC, -torch.inf).amax(1, keepdim=True)
    choices = score_BC.shape[1]
    tie_BC = torch.arange(choices, device=score_BC.device) - cost_BC * choices
    return tie_BC.masked_fill(~can_BC | (score_BC != best_B1), -(2**62)).argmax(1, keepdim=True)


def utilization(entries_B: Tensor, n_tokens_B: Tensor, cfg: FocusConfig) -> Tensor:
    """Entries used / the largest count reachable within the budget (a full, calm context reads 1). float32 [B].

    Where prices differ by level (several gists per node, two levels or more) that count is taken from above: the
    largest that any mixture of the prices could reach.
    """
    least_B = tiling(n_tokens_B, cfg.block_size, cfg.max_lod, cfg.n_gists)
    step = math.gcd(*(cfg.price(lod) for lod in range(1, cfg.max_lod + 1)))
    most_B = least_B + (cfg.budget - least_B) // step * step
    return entries_B / torch.minimum(most_B, n_tokens_B).clamp(min=1)


class GreedyAllocator:
    """Greedy by score (or by utility per cost), batched. Keeps no state: `FocusState` goes in and comes out.

    Feasibility is the caller's duty, once, with `check_feasible`: nothing here syncs with the device to raise.
    """

    def __init__(self, cfg: FocusConfig):
        self.cfg = cfg

    def allocate(self, scores_BN1: Tensor, n_tokens_B: Tensor) -> FocusState:
        """Afresh from the coarsest cut: show blocks, best first, while the budget has room.

        scores_BN1: float, one per block; blocks beyond `n_tokens_B // K` are ignored, -inf (or NaN) is never shown.
        Scores are only compared, so that unbounded logits and any sign will do; cost (entries that showing it
        adds) decides what fits, and ties (then the tail's nearest). Where no path
        fits any more, the best block's is opened from the top as far as it does: the budget is used up while blocks
        are left to show. Recent tokens are protected throughout.
        """
        cfg, n_blocks = self.cfg, scores_BN1.shape[1]
        nodes = NodeAxis.of(n_blocks, cfg, scores_BN1.device)
        exists_BN, open_BN = self.exists_protected(nodes, n_tokens_B)
        wanted_BN1 = exists_BN[:, :n_blocks] & (scores_BN1 > -torch.inf)
        for _ in range(min(max(cfg.budget - cfg.recent, 0) // cfg.price(1), sum(nodes.sizes))):
            free_B1 = cfg.left(n_tokens_B, (open_BN * nodes.price_N).sum(1))[:, None]
            cost_BN1 = nodes.path_price(exists_BN & ~open_BN)
            can_BN1 = wanted_BN1 & (cost_BN1 > 0)
            fits_BN1 = can_BN1 & (cost_BN1 <= free_B1)
            can_BN1 = torch.where(fits_BN1.any(1, keepdim=True), fits_BN1, can_BN1)
            block_B1 = pick_best(scores_BN1, cost_BN1, can_BN1)
            top_BN = nodes.below_N >= cost_BN1.gather(1, block_B1) - free_B1  # a path's closed nodes are its lowest
            open_BN = open_BN | nodes.on_path(block_B1) & exists_BN & top_BN & can_BN1.any(1, keepdim=True)
        return FocusState(open_BN.split(nodes.sizes, 1), n_tokens_B)

    def cut(self, state: FocusState) -> tuple[Cut, Tensor]:
        """The state's cut within the hard budget, and fits_B (False, and the row empty, where it exceeds it)."""
        return from_expanded(state.expanded, state.n_tokens_B, self.cfg.block_size, self.cfg.budget, self.cfg.n_gists)

    def exists_protected(self, nodes: NodeAxis, n_tokens_B: Tensor) -> tuple[Tensor, Tensor]:
        """Complete nodes, and those of them that reach into the last `recent` tokens; bool [B, N]."""
        end_N = (nodes.first_N + nodes.blocks_N) * self.cfg.block_size
        exists_BN = end_N <= n_tokens_B[:, None]
        return exists_BN, exists_BN & (end_N > n_tokens_B[:, None] - self.cfg.recent)
