"""The edits of a session (`mc.session.refocus`) on the rows of a batch: what the probe replays histories with.

Shapes: B rows, N1 blocks (LOD1 nodes), N_l nodes at level l = 1 … L. Counts are int64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mc.focus_allocator import FocusState, GreedyAllocator
from mc.session.refocus import Edits, Node, PathEdits

NEVER = -(2**31)  # `changed_at` of a node that no edit has flipped


class ReplayState(NamedTuple):
    """Passed in and returned. One [B, N_l] per level. The history may grow to N1 blocks and an unfinished one."""

    expanded: tuple[Tensor, ...]  # bool, existing nodes only
    n_tokens_B: Tensor  # int64
    changed_at: tuple[Tensor, ...]  # int64, the refocus whose edit flipped the node last, or NEVER
    refocus_B: Tensor  # int64, refocuses so far


def started(state: FocusState) -> ReplayState:
    """Before the first refocus."""
    never = tuple(torch.full_like(x, NEVER, dtype=torch.int64) for x in state.expanded)
    return ReplayState(*state, never, torch.zeros_like(state.n_tokens_B))


class FocusReport(NamedTuple):
    """What one refocus did, per row. Expands and collapses count nodes; a path edit may hold several of both."""

    edits_B: Tensor  # path edits, at most max_edits
    expands_B: Tensor
    collapses_B: Tensor  # by the scores, payments included
    forced_B: Tensor  # by the hard budget
    swap_rate_B: Tensor  # float32, (expands + collapses) / blocks shown raw or as LOD1
    utilization_B: Tensor  # float32, see `utilization`


class _Row(PathEdits):
    """A history that the budget tiles at every length it is replayed at, which is the caller's duty: nothing is left
    out."""

    omits = False


class ReplayAllocator(GreedyAllocator):
    """Edits a state as its histories grow, row by row as a session edits its own. Keeps none: a state goes in and
    comes out."""

    def allocate(self, scores_BN1: Tensor, n_tokens_B: Tensor) -> ReplayState:
        return started(super().allocate(scores_BN1, n_tokens_B))

    def advance(self, state: ReplayState, n_tokens_B: Tensor) -> ReplayState:
        """The histories have grown to `n_tokens_B` (never shrink). Nodes that became complete start expanded; a row may
        now exceed the hard budget: `refocus` before taking its cut."""
        rows, every = self._rows(state), set(range(state.expanded[0].shape[1]))
        for row, n in zip(rows, n_tokens_B.tolist(), strict=True):
            row.advance(n, every)
        expanded = _as_tensors(state.expanded, [row.expanded for row in rows])
        return state._replace(expanded=expanded, n_tokens_B=n_tokens_B)

    def refocus(self, state: ReplayState, scores_BN1: Tensor) -> tuple[ReplayState, FocusReport]:
        """`PathEdits.refocus` by scores_BN1 in [−1, 1] relative to the price, and what it did."""
        rows = self._rows(state)
        edits = [row.refocus(dict(enumerate(scores))) for row, scores in zip(rows, scores_BN1.tolist(), strict=True)]
        flipped = _as_tensors(state.expanded, [{*e.opened, *e.closed} for e in edits])
        now_B = state.refocus_B + 1
        changed = tuple(torch.where(mine, now_B[:, None], at) for mine, at in zip(flipped, state.changed_at))
        expanded = _as_tensors(state.expanded, [row.expanded for row in rows])
        return ReplayState(expanded, state.n_tokens_B, changed, now_B), self._report(rows, edits, now_B.device)

    def _report(self, rows: list[PathEdits], edits: list[Edits], device: torch.device) -> FocusReport:
        """Shown raw or as LOD1 are the blocks without an existing parent, and those whose parent is expanded."""
        K = self.cfg.block_size
        parents = [row.n_tokens // K**2 if self.cfg.max_lod > 1 else 0 for row in rows]
        shown = [row.n_tokens // K - K * (count - sum(lod == 2 for lod, _ in row.expanded))
                 for row, count in zip(rows, parents)]
        counts_EB = torch.tensor([[e.paths, e.expands, e.collapses, e.forced] for e in edits], device=device).T
        swap_rate_B = (counts_EB[1] + counts_EB[2]) / torch.tensor(shown, device=device).clamp(min=1)
        return FocusReport(*counts_EB, swap_rate_B, torch.tensor([row.utilization for row in rows], device=device))

    def _rows(self, state: ReplayState) -> list[PathEdits]:
        rows = zip(_as_nodes(state.expanded), _as_nodes([at > NEVER for at in state.changed_at]),
                   state.n_tokens_B.tolist(), state.refocus_B.tolist())
        changed_at = [x.tolist() for x in state.changed_at]
        return [_Row(self.cfg, n, at, nodes, {(lod, i): changed_at[lod - 1][b][i] for lod, i in changed})
                for b, (nodes, changed, n, at) in enumerate(rows)]


def _as_nodes(levels: tuple[Tensor, ...]) -> list[set[Node]]:
    """Of bool [B, N_l] per level, the nodes of each row."""
    rows: list[set[Node]] = [set() for _ in range(len(levels[0]))]
    for lod, x in enumerate(levels, 1):
        for b, index in x.nonzero().tolist():
            rows[b].add((lod, index))
    return rows


def _as_tensors(like: tuple[Tensor, ...], rows: list[set[Node]]) -> tuple[Tensor, ...]:
    """The nodes of each row as bool [B, N_l] per level, of the shapes and on the device of `like`."""
    out = [torch.zeros(x.shape, dtype=torch.bool) for x in like]
    for b, nodes in enumerate(rows):
        for lod, index in nodes:
            out[lod - 1][b, index] = True
    return tuple(mine.to(x.device) for mine, x in zip(out, like))
