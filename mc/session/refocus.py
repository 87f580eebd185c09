"""The focus of one session: `GreedyAllocator.refocus`, kept to the few nodes that matter, so that its
cost does not grow with history.

A cut within the budget has at most (W − tiling) / (K − 1) expanded nodes, whatever the length of the history, and only
blocks that the search names can be shown next. So the state is a small set, and a refocus handles tens of nodes on the
host, where the lens keys are searched too. Blocks without a score count as −1: they are never shown, and
are the first to be collapsed.

Edits, thresholds, payment, ties, cooldown and forced collapses are those of
`mc.focus_allocator`, and tested against it.

A history may be too long for all that: where the coarsest tiling, a block shown raw in it and the tail exceed the
budget, spans are left out (`omits`). Then only blocks are opened, each at its own K entries: what lies around it has no
claim to entries. Those that blocks and tail leave over are filled with the coarsest gists of the rest, the newest
first, so that as few tokens as possible are left out; the others stand in no entry. They stay in the history, are
searched at every refocus like all others, and any block of them can be shown. From the first length on that does not
fit all do so, also those whose tiling happens to be small again.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from mc.focus_allocator import FocusConfig, fits
from mc.mega_context import tiling

Node = tuple[int, int]  # (lod, index)
UNSCORED = -1.0


@dataclass
class Edits:
    """What one refocus did: path edits, the nodes that they opened and closed, and apart those that
    the budget collapsed by force."""

    paths: int = 0
    opened: list[Node] = field(default_factory=list)
    closed: list[Node] = field(default_factory=list)
    collapsed: list[Node] = field(default_factory=list)

    @property
    def expands(self) -> int:
        return len(self.opened)

    @property
    def collapses(self) -> int:
        return len(self.closed)

    @property
    def forced(self) -> int:
        return len(self.collapsed)


@dataclass
class PathEdits:
    """Which nodes of a growing history are expanded. `changed`: the refocus whose edit flipped a
    node last, while it cools down."""

    cfg: FocusConfig
    n_tokens: int = 0
    refocuses: int = 0
    expanded: set[Node] = field(default_factory=set)
    changed: dict[Node, int] = field(default_factory=dict)
    pruned: set[int] = field(default_factory=set)  # blocks among those listed that have no detail

    def __post_init__(self):
        self._keep_blocks()

    @property
    def omits(self) -> bool:
        """Whether spans are left out; then only blocks are listed in `expanded`, and what lies above them follows."""
        return not fits(self.n_tokens, self.cfg)

    def _keep_blocks(self) -> None:
        if self.omits:
            # every node listed counts as a raw block from here on
            self.expanded = {node for node in self.expanded if node[0] == 1}

    # -- geometry ---------------------------------------------------------------------------------------------------------  # noqa: E501

    def exists(self, node: Node) -> bool:
        lod, index = node
        return lod <= self.cfg.max_lod and (index + 1) * self.cfg.block_size ** lod <= self.n_tokens

    def protected(self, node: Node) -> bool:
        """Whether an existing node reaches into the last `recent` tokens."""
        return (node[1] + 1) * self.cfg.block_size ** node[0] > self.n_tokens - self.cfg.recent

    def path(self, block: int) -> list[Node]:
        """The existing nodes that are to be expanded for a block to be shown raw, lowest first."""
        nodes = [(lod, block // self.cfg.block_size ** (lod - 1)) for lod in range(1, self.levels + 1)]
        return [node for node in nodes if self.exists(node)]

    @property
    def levels(self) -> int:
        return 1 if self.omits else self.cfg.max_lod

    @property
    def most_blocks(self) -> int:
        """Blocks that the budget shows raw where spans are left out, those of the tail included."""
        c, pruned = self.cfg, len(self.pruned.intersection(self.tail_blocks()))
        return (c.budget - self.n_tokens % c.block_size - pruned) // c.block_size

    @property
    def room(self) -> int:
        """Blocks that can be shown beside those of the tail, where spans are left out."""
        return max(self.most_blocks - len(set(self.tail_blocks()) - self.pruned), 1)

    @property
    def utilization(self) -> float:
        """Raw entries / the most of them that the budget and the history have room for, where spans are left out."""
        c = self.cfg
        return self.entries / max(min(self.n_tokens, self.n_tokens % c.block_size + c.block_size * self.most_blocks), 1)

    def free(self, budget: int) -> int:
        """How many more nodes may be expanded within `budget` entries; negative when over it."""
        c = self.cfg
        if self.omits:
            return self.most_blocks - len(self.expanded)
        return (budget - tiling(self.n_tokens, c.block_size, c.max_lod)) // (c.block_size - 1) - len(self.expanded)

    @property
    def entries(self) -> int:
        """Of the cut; where spans are left out, those of raw tokens."""
        c = self.cfg
        if self.omits:
            return self.n_tokens % c.block_size + c.block_size * len(self.expanded)
        return tiling(self.n_tokens, c.block_size, c.max_lod) + (c.block_size - 1) * len(self.expanded)

    def tail_blocks(self) -> range:
        """Complete blocks that reach into the protected tail."""
        K, end = self.cfg.block_size, self.n_tokens // self.cfg.block_size
        return range(min(max(self.n_tokens - self.cfg.recent, 0) // K, end), end)

    # -- what happens -----------------------------------------------------------------------------------------------------  # noqa: E501

    def advance(self, n_tokens: int, listed: set[int]) -> None:
        """The history has grown to n_tokens. listed: the blocks that will have a score.

        Nodes that became complete start expanded, which leaves the cut as it was plus the new tokens raw. When more
        blocks are new than the budget can show, those start collapsed that neither are protected nor
        contain a block that is listed or
        expanded: they would be the first to be collapsed by force. Of the protected tail all is expanded that
        has its detail.
        """
        c, before = self.cfg, self.n_tokens
        self.n_tokens = n_tokens
        K = c.block_size
        self._keep_blocks()
        if n_tokens // K - before // K <= c.budget // K:
            new = [(lod, i) for lod in range(1, self.levels + 1)
                   for i in range(before // K ** lod, n_tokens // K ** lod)]
        else:
            blocks = listed | {self._first_block(node) for node in self.expanded}
            # of new nodes only: one that was there and hidden stays so
            new = [node for block in blocks for node in self.path(block) if (node[1] + 1) * K ** node[0] > before]
        # of the tail old ones, too: detail that was pruned may have been given back
        self.expanded.update(new, *map(self.path, self.tail_blocks()))
        # last, for new and old alike: tokens that were pruned must not be shown
        self.expanded.difference_update((1, block) for block in self.pruned)

    def _first_block(self, node: Node) -> int:
        return node[1] * self.cfg.block_size ** (node[0] - 1)

    def refocus(self, scores: dict[int, float]) -> Edits:
        """One refocus by the scores in [−1, 1] of blocks relative to the price, as `GreedyAllocator.refocus`."""
        c, edits = self.cfg, Edits()
        self.refocuses += 1
        # what has cooled down is forgotten: the state stays small however long the session
        self.changed = {node: at for node, at in self.changed.items() if self.refocuses - at <= c.cooldown}
        scores = {block: score for block, score in scores.items() if block not in self.pruned
                  and self.exists((1, block))}
        best: dict[Node, float] = {}
        for block, score in scores.items():
            for node in self.path(block):
                best[node] = max(score, best.get(node, UNSCORED))

        def order(node: Node) -> tuple[float, int]:
            # of equals what begins last, then the lowest, comes first: a node comes after all that it holds, whose best
            # is no higher than its own, so taking from the front leaves the others closed upward
            return best.get(node, UNSCORED), node[0] - self._first_block(node) * (c.max_lod + 1)

        # before any edit, and whatever cools down: the budget is hard
        if (over := -self.free(c.budget)) > 0:
            edits.collapsed = sorted((node for node in self.expanded if not self.protected(node)), key=order)[:over]
            self.expanded.difference_update(edits.collapsed)
        for _ in range(c.max_edits):
            # one by one: each changes what the next can spend and may flip
            opening, closing = self._next_edit(scores, best, order)
            if not opening and not closing:
                break
            self.expanded = (self.expanded | set(opening)) - set(closing)
            self.changed |= dict.fromkeys([*opening, *closing], self.refocuses)
            edits.paths += 1
            edits.opened += opening
            edits.closed += closing
        return edits

    def _next_edit(self, scores: dict[int, float], best: dict[Node, float], order) -> tuple[list[Node], list[Node]]:
        """Nodes to open and nodes to close: the best show, else the best hide, else nothing."""
        c = self.cfg
        fixed = {node for node in self.expanded if self.protected(node) or node in self.changed}
        # what stays open needs all above it open
        fixed |= {above for node in fixed for above in self.path(self._first_block(node)) if above[0] > node[0]}
        movable = sorted(self.expanded - fixed, key=order)
        free = self.free(c.budget)

        shows = []
        for block in scores:
            opening, total = [node for node in self.path(block) if node not in self.expanded], 0.0
            # siblings only: then the path to the first of them serves them all
            for last in range(block, min(block + c.span, (block // c.block_size + 1) * c.block_size)):
                if (1, last) in self.expanded or last in self.pruned or not self.exists((1, last)):
                    break
                opening, total = [*opening, (1, last)] if last > block else opening, total + scores.get(last, UNSCORED)
                bar, price = total / (last - block + 1), max(len(opening) - free, 0)
                # the first of movable may pay: no node above these blocks is among them, its best is bar at least
                cheap = bisect_left(movable, bar - c.margin, key=lambda node: best.get(node, UNSCORED))
                if bar > c.tau_expand and cheap >= price and not any(node in self.changed for node in opening):
                    shows.append((total, -len(opening), block, last, opening, movable[:cheap], price))
        if shows:
            _, _, first, last, opening, cheap, price = max(shows, key=lambda show: show[:4])
            near = range(first - c.span + 1, last + c.span)
            # a stable sort, and what a near node holds is near: still no node before one that it holds
            return opening, sorted(cheap, key=lambda node: not self._covers_only(node, near))[:price]
        if not movable or best.get(movable[0], UNSCORED) >= -c.tau_collapse:
            return [], []
        lowest = movable[0]
        hiding = [lowest]
        for above in self.path(self._first_block(lowest))[lowest[0]:]:
            below = sum(self._inside(node, above) for node in self.expanded)
            # below: a node closes only when nothing but what is hidden here was open inside it
            if above in fixed or best.get(above, UNSCORED) >= -c.tau_collapse or below != above[0] - lowest[0] + 1:
                break
            hiding.append(above)
        return [], hiding

    def _covers_only(self, node: Node, blocks: range) -> bool:
        first = self._first_block(node)
        return first in blocks and first + self.cfg.block_size ** (node[0] - 1) - 1 in blocks

    def _inside(self, node: Node, above: Node) -> bool:
        return node[0] <= above[0] and node[1] // self.cfg.block_size ** (above[0] - node[0]) == above[1]

    # -- what it shows ----------------------------------------------------------------------------------------------------  # noqa: E501

    def cut(self) -> tuple[np.ndarray, np.ndarray]:
        """(lod, index) int64 [W] of the entries in time order: they tile [0, n_tokens), or
        what of it is not left out."""
        if self.omits:
            return self._cut_with_gaps()
        c, lods, indices = self.cfg, [], []
        K, nodes = c.block_size, np.arange(self.n_tokens // c.block_size ** c.max_lod)
        for lod in range(c.max_lod, 0, -1):
            open_nodes = np.array(sorted(index for at, index in self.expanded if at == lod), dtype=np.int64)
            shown = np.setdiff1d(nodes, open_nodes, assume_unique=True)
            lods.append(np.full(len(shown), lod))
            indices.append(shown)
            children = (open_nodes[:, None] * K + np.arange(K)).ravel()
            # and those whose own parent is not complete
            nodes = np.concatenate([children,
                                    np.arange(self.n_tokens // K ** lod * K, self.n_tokens // K ** (lod - 1))])
        lod = np.concatenate([*lods, np.zeros(len(nodes), dtype=np.int64)])
        index = np.concatenate([*indices, nodes])
        order = np.argsort(index * K ** lod, kind="stable")
        return lod[order], index[order]

    def _cut_with_gaps(self) -> tuple[np.ndarray, np.ndarray]:
        c, n = self.cfg, self.n_tokens
        K, end, shown = c.block_size, n // c.block_size, {block for _, block in self.expanded}
        raw = [(0, token) for block in sorted(shown) for token in range(block * K, (block + 1) * K)]
        raw += [(0, token) for token in range(end * K, n)]
        # pruned: their gists come before all others
        tail = [(1, block) for block in self.tail_blocks() if block not in shown]
        left = c.budget - len(raw) - len(tail)
        # lazily: a tiling grows with the history, what is taken of it does not
        gists = islice(self._around(shown | set(self.tail_blocks())), left)
        nodes = sorted([*raw, *tail, *gists], key=lambda node: node[1] * K ** node[0])
        lod, index = np.array(nodes, dtype=np.int64).reshape(-1, 2).T
        return lod.copy(), index.copy()

    def _around(self, opened: set[int]) -> Iterator[Node]:
        """The largest nodes that hold none of these blocks, and with them tile all complete blocks: the
        coarsest first, then the newest."""
        c, K, blocks, above = self.cfg, self.cfg.block_size, self.n_tokens // self.cfg.block_size, []
        for lod in range(c.max_lod, 0, -1):
            size = K ** (lod - 1)
            held = {block // size for block in opened}
            if lod == c.max_lod:
                candidates: Iterable[int] = range(blocks // size - 1, -1, -1)
            else:
                rest = range(blocks // (size * K) * K, blocks // size)
                candidates = sorted({child for node in above for child in range(node * K, (node + 1) * K)} | set(rest),
                                    reverse=True)
            yield from ((lod, index) for index in candidates if index not in held)
            above = [node for node in held if (node + 1) * size <= blocks]
