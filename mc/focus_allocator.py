"""Which spans of the history deserve their detail: a knapsack on the tree, solved greedily and in batch.

A state says which nodes are expanded; the cut follows from it (`working_context.from_expanded`). Expanding a node adds
K - 1 entries (with G gists per node K - G at LOD1 and (K - 1) * G above), so entries = tiling(n) + what the expanded nodes
added: the whole budget is counting. Expanded nodes are closed upward (an expanded node's existing ancestors are expanded);
every edit keeps that.

An edit is a *path edit*. Showing a block expands it and its closed ancestors, and includes the collapses that pay for
them; hiding a node collapses it and those ancestors that are left with nothing expanded and are dull too. With a span
above 1 showing is a *bundle*: one decision opens adjacent blocks and coarsens what lies around them.

Only blocks (LOD1) have scores of their own. A node's score is the best of its subtree, both ways: it is worth
expanding if any block below it is, and siblings that pull in different directions keep their parent expanded, since
it can be collapsed only when nothing below it is expanded, at the score of the best of them. Hence a node never sorts
before an expanded descendant, and "collapse the lowest that pay for it" is a prefix of one sorted list: no search, no loop.

Nodes of all levels lie in one axis, level after level: [LOD1 | LOD2 | …]. Every operation acts on [B, N] at once;
the only Python loops are over levels and over the (static) number of edits.

Shapes: B rows, N nodes of all levels, N1 blocks (LOD1 nodes), L levels, S lengths of a span in blocks. Counts are int64.
"""

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.mega_context import tiling
from mc.working_context import Cut, from_expanded
from nanochat.common import UserError

NEVER = -(2**31)  # `changed_BN` of a node that no edit has flipped


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


def entries_needed(n_tokens: int, cfg: FocusConfig, deep_blocks: int = 1) -> tuple[int, int, int]:
    """Entries for the tiling, for `deep_blocks` blocks shown raw, and for the tail: the budget must hold their sum.

    The tail is what `recent` protects, rounded out to whole blocks. What lies before it takes tiling(before) entries,
    and a block shown raw what opening one node of each level that exists there adds.
    """
    k = cfg.block_size
    before = max(n_tokens - cfg.recent, 0) // k * k
    deep = sum(cfg.price(lod) for lod in range(1, cfg.max_lod + 1) if k**lod <= before)
    return tiling(before, k, cfg.max_lod, cfg.n_gists), deep * deep_blocks, n_tokens - before


def fits(n_tokens: int, cfg: FocusConfig) -> bool:
    """Whether the budget tiles every history of up to n_tokens with a block shown raw besides the tail: once false, always false.

    A tiling takes most entries where the lower digits of what lies before the tail are all block_size - 1.
    """
    head, widths = n_tokens - cfg.recent, [cfg.block_size**lod for lod in range(1, cfg.max_lod + 1)]
    worst = [n_tokens, *(head // width * width - 1 + cfg.recent for width in widths)]
    return all(sum(entries_needed(n, cfg)) <= cfg.budget for n in worst if n > 0)


def check_budget(cfg: FocusConfig) -> None:
    """Refuse (UserError, with the numbers) a budget that, whatever the length, cannot show the tail and one block raw and nothing else."""
    tail = cfg.recent + cfg.block_size - 1
    if cfg.budget < (need := tail + cfg.block_size):
        raise UserError(
            f"a budget of {cfg.budget} entries is too small for a session: a recent tail of up to {tail} tokens + one raw block of "
            f"{cfg.block_size} = {need}; raise --mc_budget to {need}"
        )


def check_feasible(n_tokens: int, cfg: FocusConfig, deep_blocks: int = 1) -> None:
    """Refuse (UserError, with the numbers) a budget that cannot show `deep_blocks` blocks raw besides the tail."""
    tiles, deep, tail = entries_needed(n_tokens, cfg, deep_blocks)
    if (need := tiles + deep + tail) > cfg.budget:
        raise UserError(
            f"a budget of {cfg.budget} entries is too small for {n_tokens} tokens: tiling {tiles} + "
            f"{deep_blocks} raw block(s) {deep} + recent tail {tail} = {need} (block size {cfg.block_size}, max_lod {cfg.max_lod}); "
            f"raise the budget to {need}, raise max_lod, or lower recent={cfg.recent}"
        )


class FocusState(NamedTuple):
    """Explicit, passed in and returned. One [B, N_l] per level l = 1 … L, N_l = N1 // K**(l-1).

    The history may grow to N1 blocks and an unfinished one; tokens beyond are shown raw.
    """

    expanded: tuple[Tensor, ...]  # bool, existing nodes only, closed upward
    changed_at: tuple[Tensor, ...]  # int64, the refocus whose edit flipped the node last, or NEVER
    refocus_B: Tensor  # int64, refocuses so far
    n_tokens_B: Tensor  # int64


class FocusReport(NamedTuple):
    """What one refocus did, per row. Expands and collapses count nodes; a path edit may hold several of both."""

    edits_B: Tensor  # path edits, at most max_edits
    expands_B: Tensor
    collapses_B: Tensor  # by the scores, payments included
    forced_B: Tensor  # by the hard budget
    swap_rate_B: Tensor  # float32, (expands + collapses) / blocks shown raw or as LOD1
    utilization_B: Tensor  # float32, see `utilization`


class _Nodes(NamedTuple):
    """Geometry of the node axis for N1 blocks; a function of shapes alone."""

    block_size: int
    sizes: list[int]  # nodes per level
    lod_N: Tensor
    first_N: Tensor  # first block
    blocks_N: Tensor  # number of blocks, K**(lod-1)
    path_NSL: Tensor  # [N1, S, L]: what a span from a block on is made of, step by step: the block's own node and ancestors, then
    # one sibling after the other; N (one past the end) where there is none
    price_N: Tensor  # entries that expanding it adds
    below_N: Tensor  # entries that expanding one node of each level below it adds

    @staticmethod
    def of(n_blocks: int, cfg: FocusConfig, device: torch.device) -> "_Nodes":
        block_N, step_S = torch.arange(n_blocks, device=device), torch.arange(cfg.span, device=device)
        widths = [cfg.block_size**level for level in range(cfg.max_lod)]
        sizes = [n_blocks // width for width in widths]
        sibling_NS = block_N[:, None] % cfg.block_size + step_S < cfg.block_size
        lods, firsts, blocks, path, prices, below = [], [], [], [], [], []
        for level, (width, size) in enumerate(zip(widths, sizes)):
            lods.append(torch.full((size,), level + 1, device=device))
            blocks.append(torch.full((size,), width, device=device))
            firsts.append(block_N[:size] * width)
            prices.append(torch.full((size,), cfg.price(level + 1), device=device))
            below.append(torch.full((size,), sum(map(cfg.price, range(1, level + 1))), device=device))
            node_NS = (block_N[:, None] + step_S) // width
            there_NS = (node_NS < size) & (sibling_NS if level == 0 else step_S == 0)
            path.append(torch.where(there_NS, sum(sizes[:level]) + node_NS, sum(sizes)))
        joined = map(torch.cat, (lods, firsts, blocks))
        return _Nodes(cfg.block_size, sizes, *joined, torch.stack(path, -1), *map(torch.cat, (prices, below)))

    def up(self, x_BN: Tensor, reduce: Callable, join: Callable) -> Tensor:
        """Every node's value joined with those of its whole subtree."""
        levels = list(x_BN.split(self.sizes, 1))
        for level, size in enumerate(self.sizes[1:], 1):
            children_BNK = levels[level - 1][:, : size * self.block_size].unflatten(1, (size, self.block_size))
            levels[level] = join(levels[level], reduce(children_BNK, -1))
        return torch.cat(levels, 1)

    def on_path(self, node_B1: Tensor) -> Tensor:
        """The node itself and its ancestors, bool [B, N]."""
        first_B1 = self.first_N[node_B1]
        return (self.lod_N >= self.lod_N[node_B1]) & self.touching(first_B1, first_B1)

    def within(self, first_B1: Tensor, last_B1: Tensor) -> Tensor:
        """Nodes that cover nothing but blocks first … last, bool [B, N]."""
        return (self.first_N >= first_B1) & (self.first_N + self.blocks_N <= last_B1 + 1)

    def touching(self, first_B1: Tensor, last_B1: Tensor) -> Tensor:
        """Nodes that cover any of the blocks first … last: these blocks and their ancestors, bool [B, N]."""
        return (self.first_N <= last_B1) & (first_B1 < self.first_N + self.blocks_N)

    def over_spans(self, x_BN: Tensor) -> Tensor:
        """Sum over 1 … S siblings from each block on, and over the ancestors they share: [B, N1, S]."""
        return F.pad(x_BN, (0, 1))[:, self.path_NSL].sum(-1).cumsum(-1)

    def path_count(self, mask_BN: Tensor) -> Tensor:
        """How many of each block's own node and ancestors are masked, int64 [B, N1]."""
        return self._over_path(mask_BN.long())

    def path_price(self, closed_BN: Tensor) -> Tensor:
        """Entries that showing each block adds, int64 [B, N1]."""
        return self._over_path(closed_BN * self.price_N)

    def _over_path(self, x_BN: Tensor) -> Tensor:
        return F.pad(x_BN, (0, 1))[:, self.path_NSL[:, 0]].sum(-1)


class _Order(NamedTuple):
    """Nodes from the lowest score up; at equal scores the nearest to the tail first, descendants before ancestors."""

    order_BN: Tensor
    price_BN: Tensor  # of the nodes, in this order

    @staticmethod
    def of(score_BN: Tensor, nodes: _Nodes) -> "_Order":
        late_N = (nodes.lod_N - nodes.first_N * (len(nodes.sizes) + 1)).argsort()
        order_BN = late_N[score_BN[:, late_N].argsort(dim=1, stable=True)]
        return _Order(order_BN, nodes.price_N[order_BN])

    def running(self, mask_BN: Tensor) -> Tensor:
        """Entries that collapsing the masked nodes up to each place of the order frees, int64 [B, N]."""
        return (mask_BN.gather(1, self.order_BN) * self.price_BN).cumsum(1)

    def lowest(self, mask_BN: Tensor, entries_B1: Tensor) -> Tensor:
        """The first masked nodes, as many as it takes to free `entries`, bool [B, N]."""
        before_BN = self.running(mask_BN) - self.price_BN
        return mask_BN & (torch.zeros_like(before_BN).scatter(1, self.order_BN, before_BN) < entries_B1)


def _pick(score_BC: Tensor, cost_BC: Tensor, can_BC: Tensor) -> Tensor:
    """The allowed choice of highest score; ties: the cheapest, then the last, which is the nearest to the tail. int64 [B, 1]."""
    best_B1 = score_BC.masked_fill(~can_BC, -torch.inf).amax(1, keepdim=True)
    choices = score_BC.shape[1]
    tie_BC = torch.arange(choices, device=score_BC.device) - cost_BC * choices
    return tie_BC.masked_fill(~can_BC | (score_BC != best_B1), NEVER).argmax(1, keepdim=True)


def utilization(entries_B: Tensor, n_tokens_B: Tensor, cfg: FocusConfig) -> Tensor:
    """Entries used / the largest count reachable within the budget (a full, calm context reads 1). float32 [B].

    Where prices differ by level (several gists per node, two levels or more) that count is taken from above: the largest that any
    mixture of the prices could reach.
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
        nodes = _Nodes.of(n_blocks, cfg, scores_BN1.device)
        exists_BN, open_BN = self._exists_protected(nodes, n_tokens_B)
        wanted_BN1 = exists_BN[:, :n_blocks] & (scores_BN1 > -torch.inf)
        for _ in range(min(max(cfg.budget - cfg.recent, 0) // cfg.price(1), sum(nodes.sizes))):
            free_B1 = self._free(nodes, open_BN, n_tokens_B, cfg.budget)
            cost_BN1 = nodes.path_price(exists_BN & ~open_BN)
            can_BN1 = wanted_BN1 & (cost_BN1 > 0)
            fits_BN1 = can_BN1 & (cost_BN1 <= free_B1)
            can_BN1 = torch.where(fits_BN1.any(1, keepdim=True), fits_BN1, can_BN1)
            block_B1 = _pick(scores_BN1, cost_BN1, can_BN1)
            top_BN = nodes.below_N >= cost_BN1.gather(1, block_B1) - free_B1  # a path's closed nodes are its lowest
            open_BN = open_BN | nodes.on_path(block_B1) & exists_BN & top_BN & can_BN1.any(1, keepdim=True)
        expanded = open_BN.split(nodes.sizes, 1)
        never = tuple(torch.full_like(x, NEVER, dtype=torch.int64) for x in expanded)
        return FocusState(expanded, never, torch.zeros_like(n_tokens_B), n_tokens_B)

    def advance(self, state: FocusState, n_tokens_B: Tensor) -> FocusState:
        """The history has grown to `n_tokens_B` (never shrinks). Nodes that became complete start expanded, which
        leaves the cut as it was plus the new tokens raw; once out of the protected tail they can be collapsed. The row
        may now exceed the hard budget: `refocus` before taking its cut."""
        nodes = self._nodes(state)
        before_BN, _ = self._exists_protected(nodes, state.n_tokens_B)
        exists_BN, _ = self._exists_protected(nodes, n_tokens_B)
        open_BN = torch.cat(state.expanded, 1) | exists_BN & ~before_BN
        return state._replace(expanded=open_BN.split(nodes.sizes, 1), n_tokens_B=n_tokens_B)

    def refocus(self, state: FocusState, scores_BN1: Tensor) -> tuple[FocusState, FocusReport]:
        """Change a little: at most `max_edits` path edits per row, by scores_BN1 in [-1, 1] relative to the price.

        First, over the hard budget, the lowest nodes are collapsed by force, ties nearest the tail; thresholds and
        cooldown do not count then, nor does this count as an edit. Then each edit is the best that can be had:
        - show the span of highest summed score, up to `span` adjacent closed siblings of mean score above +tau_expand, that
          fits the budget. Nodes that score lower than this mean by more than `margin` pay for what does not fit: those
          that lie within span - 1 blocks of it first, then the lowest;
        - else hide the lowest node below -tau_collapse.
        With a span of 1 that is the highest block, paid for by the lowest nodes. Nodes flipped by an edit are not flipped
        back within `cooldown` refocuses. At fixed scores the summed score of expanded nodes, taken from -tau_collapse,
        rises with each edit (a shared ancestor scores at least the mean), so that it settles and then changes nothing; where
        prices differ by level (several gists per node) many cheap nodes may pay for a dear one, and it may not.
        """
        cfg, n_blocks, n_tokens_B = self.cfg, scores_BN1.shape[1], state.n_tokens_B
        nodes = self._nodes(state)
        exists_BN, protected_BN = self._exists_protected(nodes, n_tokens_B)
        start_BN, changed_BN = torch.cat(state.expanded, 1), torch.cat(state.changed_at, 1)
        now_B = state.refocus_B + 1

        score_BN1 = scores_BN1.masked_fill(~exists_BN[:, :n_blocks], -torch.inf)
        score_BN = F.pad(score_BN1, (0, sum(nodes.sizes[1:])), value=-torch.inf)
        score_BN = nodes.up(score_BN, torch.amax, torch.maximum)
        order = _Order.of(score_BN, nodes)
        sorted_BN, length_S = score_BN.gather(1, order.order_BN), torch.arange(1, cfg.span + 1, device=score_BN.device)

        over_B1 = -self._free(nodes, start_BN, n_tokens_B, cfg.budget)
        forced_BN = order.lowest(start_BN & ~protected_BN, over_B1)
        open_BN = start_BN & ~forced_BN
        expands_B, collapses_B, edits_B = (torch.zeros_like(n_tokens_B) for _ in range(3))
        for _ in range(cfg.max_edits if n_blocks else 0):
            cooling_BN = now_B[:, None] - changed_BN <= cfg.cooldown
            fixed_BN = nodes.up(open_BN & (protected_BN | cooling_BN), torch.any, torch.logical_or)
            movable_BN, closed_BN = open_BN & ~fixed_BN, exists_BN & ~open_BN

            # Show: a choice is a first block and a length, of closed blocks only.
            fresh_BN = closed_BN & (nodes.lod_N == 1)
            sum_BC = nodes.over_spans(score_BN.masked_fill(~fresh_BN, 0)).flatten(1)
            mean_BC = sum_BC / length_S.repeat(n_blocks)
            cost_BC = nodes.over_spans(closed_BN * nodes.price_N).flatten(1)
            price_BC = (cost_BC - self._free(nodes, open_BN, n_tokens_B, cfg.budget)).clamp(min=0)
            below_BC = torch.searchsorted(sorted_BN, mean_BC - cfg.margin)
            can_BC = (nodes.over_spans(fresh_BN.long()) == length_S).flatten(1) & (mean_BC > cfg.tau_expand)
            can_BC = can_BC & (nodes.over_spans((closed_BN & cooling_BN).long()) == 0).flatten(1)
            can_BC = can_BC & (price_BC <= F.pad(order.running(movable_BN), (1, 0)).gather(1, below_BC))
            choice_B1, show_B1 = _pick(sum_BC, cost_BC, can_BC), can_BC.any(1, keepdim=True)
            first_B1 = choice_B1 // cfg.span
            last_B1 = first_B1 + choice_B1 % cfg.span
            opening_BN = nodes.touching(first_B1, last_B1) & closed_BN & show_B1
            cheap_BN = movable_BN & (score_BN < mean_BC.gather(1, choice_B1) - cfg.margin) & show_B1
            near_BN = cheap_BN & nodes.within(first_B1 - cfg.span + 1, last_B1 + cfg.span - 1)
            price_B1 = price_BC.gather(1, choice_B1)
            far_price_B1 = price_B1 - (near_BN * nodes.price_N).sum(1, keepdim=True)
            paying_BN = order.lowest(near_BN, price_B1) | order.lowest(cheap_BN & ~near_BN, far_price_B1)

            # Hide: the lowest node, and those ancestors in whose subtree the path alone is expanded.
            node_B1 = order.lowest(movable_BN, torch.ones_like(choice_B1)).long().argmax(1, keepdim=True)
            alone_BN = nodes.up(open_BN.long(), torch.sum, torch.add) == nodes.lod_N - nodes.lod_N[node_B1] + 1
            dull_BN = movable_BN & (score_BN < -cfg.tau_collapse)
            hiding_BN = dull_BN & nodes.on_path(node_B1) & alone_BN & ~show_B1

            closing_BN = paying_BN | hiding_BN
            open_BN = (open_BN | opening_BN) & ~closing_BN
            changed_BN = torch.where(opening_BN | closing_BN, now_B[:, None], changed_BN)
            expands_B, collapses_B = expands_B + opening_BN.sum(1), collapses_B + closing_BN.sum(1)
            edits_B = edits_B + (opening_BN | closing_BN).any(1)

        state = FocusState(open_BN.split(nodes.sizes, 1), changed_BN.split(nodes.sizes, 1), now_B, n_tokens_B)
        closed_BN = exists_BN & ~open_BN
        shown_BN1 = nodes.path_count(closed_BN) == closed_BN[:, :n_blocks]  # raw or LOD1: no ancestor is closed
        shown_B = (shown_BN1 & exists_BN[:, :n_blocks]).sum(1).clamp(min=1)
        entries_B = cfg.budget - self._free(nodes, open_BN, n_tokens_B, cfg.budget)[:, 0]
        swap_rate_B, used_B = (expands_B + collapses_B) / shown_B, utilization(entries_B, n_tokens_B, cfg)
        return state, FocusReport(edits_B, expands_B, collapses_B, forced_BN.sum(1), swap_rate_B, used_B)

    def cut(self, state: FocusState) -> tuple[Cut, Tensor]:
        """The state's cut within the hard budget, and fits_B (False, and the row empty, where it exceeds it)."""
        return from_expanded(state.expanded, state.n_tokens_B, self.cfg.block_size, self.cfg.budget, self.cfg.n_gists)

    def _nodes(self, state: FocusState) -> _Nodes:
        return _Nodes.of(state.expanded[0].shape[1], self.cfg, state.n_tokens_B.device)

    def _exists_protected(self, nodes: _Nodes, n_tokens_B: Tensor) -> tuple[Tensor, Tensor]:
        """Complete nodes, and those of them that reach into the last `recent` tokens; bool [B, N]."""
        end_N = (nodes.first_N + nodes.blocks_N) * self.cfg.block_size
        exists_BN = end_N <= n_tokens_B[:, None]
        return exists_BN, exists_BN & (end_N > n_tokens_B[:, None] - self.cfg.recent)

    def _free(self, nodes: _Nodes, open_BN: Tensor, n_tokens_B: Tensor, budget: int) -> Tensor:
        """How many of `budget` entries are left; negative when over it. int64 [B, 1]."""
        cfg = self.cfg
        least_B = tiling(n_tokens_B, cfg.block_size, cfg.max_lod, cfg.n_gists)
        return (budget - least_B - (open_BN * nodes.price_N).sum(1))[:, None]
