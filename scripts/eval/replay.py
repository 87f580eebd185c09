"""The refocus of a session (`mc.session.refocus`) for many rows at once: what the probe replays histories with, and the
sessions' edits are tested against.

An edit is a *path edit*. Showing a block expands it and its closed ancestors, and includes the collapses that pay for
them; hiding a node collapses it and those ancestors that are left with nothing expanded and are dull too. With a span
above 1 showing is a *bundle*: one decision opens adjacent blocks and coarsens what lies around them.

A node's score is the best of its subtree, both ways: it is worth expanding if any block below it is, and siblings that
pull in different directions keep their parent expanded, since it can be collapsed only when nothing below it is
expanded, at the score of the best of them. Hence a node never sorts before an expanded descendant, and "collapse the
lowest that pay for it" is a prefix of one sorted list: no search, no loop.

Shapes: B rows, N nodes of all levels, N1 blocks (LOD1 nodes), L levels, S lengths of a
span in blocks. Counts are int64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.focus_allocator import FocusState, GreedyAllocator, NodeAxis, pick_best, utilization


class FocusReport(NamedTuple):
    """What one refocus did, per row. Expands and collapses count nodes; a path edit may hold several of both."""

    edits_B: Tensor  # path edits, at most max_edits
    expands_B: Tensor
    collapses_B: Tensor  # by the scores, payments included
    forced_B: Tensor  # by the hard budget
    swap_rate_B: Tensor  # float32, (expands + collapses) / blocks shown raw or as LOD1
    utilization_B: Tensor  # float32, see `utilization`


def span_paths(nodes: NodeAxis, span: int) -> Tensor:
    """[N1, S, L] what a span from a block on is made of, step by step: the block's own node and ancestors, then one
    sibling after the other; N (one past the end) where there is none."""
    n_blocks, none = len(nodes.path_NL), sum(nodes.sizes)
    block_N1 = torch.arange(n_blocks, device=nodes.lod_N.device)[:, None]
    step_S = torch.arange(span, device=nodes.lod_N.device)
    sibling_NS = (block_N1 % nodes.block_size + step_S < nodes.block_size) & (block_N1 + step_S < n_blocks)
    own_NS = torch.where(sibling_NS, block_N1 + step_S, none)
    above_NSL = torch.where(step_S[:, None] == 0, nodes.path_NL[:, None, 1:], none)
    return torch.cat([own_NS[..., None], above_NSL], -1)


def over_spans(path_NSL: Tensor, x_BN: Tensor) -> Tensor:
    """Sum over 1 … S siblings from each block on, and over the ancestors they share: [B, N1, S]."""
    return F.pad(x_BN, (0, 1))[:, path_NSL].sum(-1).cumsum(-1)


def within(nodes: NodeAxis, first_B1: Tensor, last_B1: Tensor) -> Tensor:
    """Nodes that cover nothing but blocks first … last, bool [B, N]."""
    return (nodes.first_N >= first_B1) & (nodes.first_N + nodes.blocks_N <= last_B1 + 1)


class _Order(NamedTuple):
    """Nodes from the lowest score up; at equal scores the nearest to the tail first, descendants before ancestors."""

    order_BN: Tensor
    price_BN: Tensor  # of the nodes, in this order

    @staticmethod
    def of(score_BN: Tensor, nodes: NodeAxis) -> "_Order":
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


class ReplayAllocator(GreedyAllocator):
    """Edits a state as its history grows. Keeps none of its own: `FocusState` goes in and comes out."""

    def advance(self, state: FocusState, n_tokens_B: Tensor) -> FocusState:
        """The history has grown to `n_tokens_B` (never shrinks). Nodes that became complete start expanded, which
        leaves the cut as it was plus the new tokens raw; once out of the protected tail they can be collapsed. The row
        may now exceed the hard budget: `refocus` before taking its cut."""
        nodes = self._nodes(state)
        before_BN, _ = self.exists_protected(nodes, state.n_tokens_B)
        exists_BN, _ = self.exists_protected(nodes, n_tokens_B)
        open_BN = torch.cat(state.expanded, 1) | exists_BN & ~before_BN
        return state._replace(expanded=open_BN.split(nodes.sizes, 1), n_tokens_B=n_tokens_B)

    def refocus(self, state: FocusState, scores_BN1: Tensor) -> tuple[FocusState, FocusReport]:
        """Change a little: at most `max_edits` path edits per row, by scores_BN1 in [-1, 1] relative to the price.

        First, over the hard budget, the lowest nodes are collapsed by force, ties nearest the tail; thresholds and
        cooldown do not count then, nor does this count as an edit. Then each edit is the best that can be had:
        - show the span of highest summed score, up to `span` adjacent closed siblings of
        mean score above +tau_expand, that
          fits the budget. Nodes that score lower than this mean by more than `margin` pay for what does not fit: those
          that lie within span - 1 blocks of it first, then the lowest;
        - else hide the lowest node below -tau_collapse.
        With a span of 1 that is the highest block, paid for by the lowest nodes. Nodes flipped by an edit are not
        flipped back within `cooldown` refocuses. At fixed scores the summed score of expanded nodes, taken from
        -tau_collapse, rises with each edit (a shared ancestor scores at least the mean), so that it settles and then
        changes nothing; where prices differ by level (several gists per node) many cheap nodes may pay
        for a dear one, and it may not.
        """
        cfg, n_blocks, n_tokens_B = self.cfg, scores_BN1.shape[1], state.n_tokens_B
        nodes = self._nodes(state)
        path_NSL = span_paths(nodes, cfg.span)
        exists_BN, protected_BN = self.exists_protected(nodes, n_tokens_B)
        start_BN, changed_BN = torch.cat(state.expanded, 1), torch.cat(state.changed_at, 1)
        now_B = state.refocus_B + 1

        score_BN1 = scores_BN1.masked_fill(~exists_BN[:, :n_blocks], -torch.inf)
        score_BN = F.pad(score_BN1, (0, sum(nodes.sizes[1:])), value=-torch.inf)
        score_BN = nodes.up(score_BN, torch.amax, torch.maximum)
        order = _Order.of(score_BN, nodes)
        sorted_BN, length_S = score_BN.gather(1, order.order_BN), torch.arange(1, cfg.span + 1, device=score_BN.device)

        over_B1 = -self.free(nodes, start_BN, n_tokens_B, cfg.budget)
        forced_BN = order.lowest(start_BN & ~protected_BN, over_B1)
        open_BN = start_BN & ~forced_BN
        expands_B, collapses_B, edits_B = (torch.zeros_like(n_tokens_B) for _ in range(3))
        for _ in range(cfg.max_edits if n_blocks else 0):
            cooling_BN = now_B[:, None] - changed_BN <= cfg.cooldown
            fixed_BN = nodes.up(open_BN & (protected_BN | cooling_BN), torch.any, torch.logical_or)
            movable_BN, closed_BN = open_BN & ~fixed_BN, exists_BN & ~open_BN

            # Show: a choice is a first block and a length, of closed blocks only.
            fresh_BN = closed_BN & (nodes.lod_N == 1)
            sum_BC = over_spans(path_NSL, score_BN.masked_fill(~fresh_BN, 0)).flatten(1)
            mean_BC = sum_BC / length_S.repeat(n_blocks)
            cost_BC = over_spans(path_NSL, closed_BN * nodes.price_N).flatten(1)
            price_BC = (cost_BC - self.free(nodes, open_BN, n_tokens_B, cfg.budget)).clamp(min=0)
            below_BC = torch.searchsorted(sorted_BN, mean_BC - cfg.margin)
            can_BC = (over_spans(path_NSL, fresh_BN.long()) == length_S).flatten(1) & (mean_BC > cfg.tau_expand)
            can_BC = can_BC & (over_spans(path_NSL, (closed_BN & cooling_BN).long()) == 0).flatten(1)
            can_BC = can_BC & (price_BC <= F.pad(order.running(movable_BN), (1, 0)).gather(1, below_BC))
            choice_B1, show_B1 = pick_best(sum_BC, cost_BC, can_BC), can_BC.any(1, keepdim=True)
            first_B1 = choice_B1 // cfg.span
            last_B1 = first_B1 + choice_B1 % cfg.span
            opening_BN = nodes.touching(first_B1, last_B1) & closed_BN & show_B1
            cheap_BN = movable_BN & (score_BN < mean_BC.gather(1, choice_B1) - cfg.margin) & show_B1
            near_BN = cheap_BN & within(nodes, first_B1 - cfg.span + 1, last_B1 + cfg.span - 1)
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
        shown_BN1 = nodes.over_path(closed_BN.long()) == closed_BN[:, :n_blocks]  # raw or LOD1: no ancestor is closed
        shown_B = (shown_BN1 & exists_BN[:, :n_blocks]).sum(1).clamp(min=1)
        entries_B = cfg.budget - self.free(nodes, open_BN, n_tokens_B, cfg.budget)[:, 0]
        swap_rate_B, used_B = (expands_B + collapses_B) / shown_B, utilization(entries_B, n_tokens_B, cfg)
        return state, FocusReport(edits_B, expands_B, collapses_B, forced_BN.sum(1), swap_rate_B, used_B)

    def _nodes(self, state: FocusState) -> NodeAxis:
        return NodeAxis.of(state.expanded[0].shape[1], self.cfg, state.n_tokens_B.device)
