"""The focus of one history, edited a little at a time: of a session, and of each row that a probe replays.

An edit is a *path edit*. Showing a block expands it and its closed ancestors, and includes the collapses that pay for
them; hiding a node collapses it and those ancestors that are left with nothing expanded and are dull too. With a span
above 1 showing is a *bundle*: one decision opens adjacent blocks and coarsens what lies around them.

A node's score is the best of its subtree, both ways: it is worth expanding if any block below it is, and siblings that
pull in different directions keep their parent expanded, since it can be collapsed only when nothing below it is
expanded, at the score of the best of them. Hence a node never sorts before an expanded descendant, and "collapse the
lowest that pay for it" is a prefix of one sorted list.

A cut within the budget has at most (W − tiling) / (K − 1) expanded nodes, whatever the length of the history, and only
blocks that the search names can be shown next. So the state is a small set, and a refocus handles tens of nodes on the
host, where the lens keys are searched too. Blocks without a score count as −1: they are never shown, and
are the first to be collapsed.

What is best, prices, ties and the budget are those of `mc.focus_allocator`: a cut that is edited until nothing more
fits is the one that training would allocate.

A history may be too long for all that: where the coarsest tiling, a block shown raw in it and the tail exceed the
budget, spans are left out (`omits`). Then only blocks are opened, each at its own K entries: what lies around it has no
claim to entries. Those that blocks and tail leave over are filled with the coarsest gists of the rest, the newest
first, so that as few tokens as possible are left out; the others stand in no entry. They stay in the history, are
searched at every refocus like all others, and any block of them can be shown. From the first length on that does not
fit all do so, also those whose tiling happens to be small again.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice

import numpy as np
import torch

from mc.focus_allocator import FocusConfig, fits, pick_best, utilization

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
    # nodes that were opened or closed since `changes` was asked, twice being not at all; None: there is no saying
    flips: set[Node] | None = None

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
        """See `mc.focus_allocator.utilization`; where spans are left out of blocks alone, gists filling up: raw entries
        / the most of them that the budget and the history have room for."""
        c, n = self.cfg, self.n_tokens
        if self.omits:
            return self.entries / max(min(n, n % c.block_size + c.block_size * self.most_blocks), 1)
        return float(utilization(torch.tensor([self.entries]), torch.tensor([n]), c))

    def price(self, nodes: Iterable[Node]) -> int:
        """Entries that expanding them adds."""
        return sum(self.cfg.block_size if self.omits else self.cfg.price(lod) for lod, _ in nodes)

    @property
    def free(self) -> int:
        """Entries of the budget that are left; negative when over it."""
        c = self.cfg
        if self.omits:
            return c.block_size * (self.most_blocks - len(self.expanded))
        return c.left(self.n_tokens, self.price(self.expanded))

    @property
    def entries(self) -> int:
        """Of the cut; where spans are left out, those of raw tokens."""
        if self.omits:
            return self.n_tokens % self.cfg.block_size + self.price(self.expanded)
        return self.cfg.budget - self.free

    def _first(self, nodes: list[Node], entries: int) -> list[Node]:
        """As many of them as it takes to free so many entries."""
        return [node for node, freed in zip(nodes, self._running(nodes)) if freed < entries]

    def _running(self, nodes: list[Node]) -> list[int]:
        """Entries that collapsing the first 0, 1, … of them frees."""
        return [*accumulate(map(self.price, zip(nodes)), initial=0)]

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
        few = n_tokens // K - before // K <= c.budget // K
        self.flips = self.flips if few and not self.omits else None
        if few:
            new = [(lod, i) for lod in range(1, self.levels + 1)
                   for i in range(before // K ** lod, n_tokens // K ** lod)]
        else:
            blocks = listed | {self._first_block(node) for node in self.expanded}
            # of new nodes only: one that was there and hidden stays so
            new = [node for block in blocks for node in self.path(block) if (node[1] + 1) * K ** node[0] > before]
        self.expanded.update(new)
        # of the tail old ones, too: detail that was pruned may have been given back
        self._flip(opened={node for block in self.tail_blocks() for node in self.path(block)} - self.expanded)
        # last, for new and old alike: tokens that were pruned must not be shown
        self._flip(closed={(1, block) for block in self.pruned} & self.expanded)

    def _flip(self, opened: Iterable[Node] = (), closed: Iterable[Node] = ()) -> None:
        """opened: closed nodes; closed: open ones."""
        self.expanded.update(opened)
        self.expanded.difference_update(closed)
        if self.flips is not None:
            self.flips.symmetric_difference_update([*opened, *closed])

    def changes(self) -> Counter[Node] | None:
        """How the cut differs from what it was when this was asked last, new tokens aside: 1 for an entry that came,
        −1 for one that went. None: it has to be compared. K + 1 steps for each node that was flipped.

        A cut is, as a signed sum over nodes, all tokens raw, and for each closed node its own entry less its children.
        """
        flips, self.flips, K = self.flips, set(), self.cfg.block_size
        if flips is None:
            return None
        change: Counter[Node] = Counter()
        for lod, index in flips:
            sign = 1 if (lod, index) in self.expanded else -1
            change[lod, index] -= sign
            for child in range(index * K, (index + 1) * K):
                change[lod - 1, child] += sign
        return change

    def _first_block(self, node: Node) -> int:
        return node[1] * self.cfg.block_size ** (node[0] - 1)

    def refocus(self, scores: dict[int, float]) -> Edits:
        """Change a little: at most `max_edits` path edits, by the scores in [−1, 1] of blocks relative to the price.

        First, over the hard budget, the lowest nodes are collapsed by force, ties nearest the tail; thresholds and
        cooldown do not count then, nor does this count as an edit. Then each edit is the best that can be had:
        - show the span of highest summed score, up to `span` adjacent closed siblings of mean score above +tau_expand,
          that fits the budget. Nodes that score lower than this mean by more than `margin` pay for what does not fit:
          those that lie within span − 1 blocks of it first, then the lowest;
        - else hide the lowest node below −tau_collapse.
        With a span of 1 that is the highest block, paid for by the lowest nodes. Nodes flipped by an edit are not
        flipped back within `cooldown` refocuses. At fixed scores the summed score of expanded nodes, taken from
        −tau_collapse, rises with each edit (a shared ancestor scores at least the mean), so that it settles and then
        changes nothing; where prices differ by level (several gists per node) many cheap nodes may pay for a dear
        one, and it may not.
        """
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
        if self.free < 0:
            lowest = sorted((node for node in self.expanded if not self.protected(node)), key=order)
            edits.collapsed = self._first(lowest, -self.free)
            self._flip(closed=edits.collapsed)
        for _ in range(c.max_edits):
            # one by one: each changes what the next can spend and may flip
            opening, closing = self._next_edit(scores, best, order)
            if not opening and not closing:
                break
            self._flip(opening, closing)
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
        free, freed = self.free, self._running(movable)

        shows = []
        for block in sorted(scores):
            opening, total = [node for node in self.path(block) if node not in self.expanded], 0.0
            # siblings only: then the path to the first of them serves them all
            for last in range(block, min(block + c.span, (block // c.block_size + 1) * c.block_size)):
                if (1, last) in self.expanded or last in self.pruned or not self.exists((1, last)):
                    break
                opening, total = [*opening, (1, last)] if last > block else opening, total + scores.get(last, UNSCORED)
                bar, cost = total / (last - block + 1), self.price(opening)
                # the first of movable may pay: no node above these blocks is among them, its best is bar at least
                cheap = bisect_left(movable, bar - c.margin, key=lambda node: best.get(node, UNSCORED))
                if bar > c.tau_expand and freed[cheap] >= cost - free and not any(x in self.changed for x in opening):
                    shows.append((total, cost, block, last, opening, movable[:cheap]))
        if shows:
            total, cost = torch.tensor([show[:2] for show in shows], dtype=torch.float64).T[:, None]
            _, cost, first, last, opening, cheap = shows[int(pick_best(total, cost.long(), total == total))]
            near = range(first - c.span + 1, last + c.span)
            # a stable sort, and what a near node holds is near: still no node before one that it holds
            return opening, self._first(sorted(cheap, key=lambda node: not self._covers_only(node, near)), cost - free)
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
        K = self.cfg.block_size
        shown = self._shown_with_gaps() if self.omits else self._tiles()
        nodes = sorted(shown, key=lambda node: node[1] * K ** node[0])
        return tuple(np.array(nodes, dtype=np.int64).reshape(-1, 2).T.copy())

    def _tiles(self) -> set[Node]:
        """The nodes that have no parent, and the children of those that are expanded, as far as they are not."""
        K, top, n = self.cfg.block_size, self.cfg.max_lod, self.n_tokens
        loose = {(lod, index) for lod in range(top + 1)
                 for index in range(n // K ** (lod + 1) * K if lod < top else 0, n // K**lod)}
        children = ((lod - 1, index) for lod, node in self.expanded for index in range(node * K, (node + 1) * K))
        return loose.union(children) - self.expanded

    def _shown_with_gaps(self) -> Iterator[Node]:
        K, n, shown = self.cfg.block_size, self.n_tokens, {block for _, block in self.expanded}
        raw = [(0, token) for block in shown for token in range(block * K, (block + 1) * K)]
        raw += [(0, token) for token in range(n // K * K, n)]
        # pruned: their gists come before all others
        tail = [(1, block) for block in self.tail_blocks() if block not in shown]
        # lazily: a tiling grows with the history, what is taken of it does not
        gists = self._around(shown | set(self.tail_blocks()))
        yield from (*raw, *tail, *islice(gists, self.cfg.budget - len(raw) - len(tail)))

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
