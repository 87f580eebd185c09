"""The best that an allocator could do when utilities add up, by exact dynamic programming on the tree;
and how far greedy is from it.

The best summed utility of the blocks shown raw below a node, for each number of expanded nodes: of a block 0 or its
own; of a node above, nothing while it is closed, else its children's combined, with one node for itself. Ancestors are
shared by what is below them, as in a cut.

A reference: row by row and node by node, O(N · C²) for N nodes of which the budget
expands C. Shapes: B rows, N1 blocks.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor

from mc.focus_allocator import FocusConfig, FocusState, GreedyAllocator
from mc.mega_context import tiling
from nanochat.common import FlagParser
from scripts.bench.base import print_json
from scripts.eval.subcommands import check_least

Node = tuple[int, int]  # (lod, index)


class _Row:
    """One row's tree. `best(node)[c]`: most utility below it with c expanded nodes, −inf where that cannot be."""

    def __init__(self, utility_N: np.ndarray, n_tokens: int, cfg: FocusConfig, nodes: int):
        self.utility, self.n, self.cfg, self.nodes = utility_N, n_tokens, cfg, nodes
        self.known: dict[Node, np.ndarray] = {}

    def below(self, node: Node) -> list[Node]:
        (lod, index), k = node, self.cfg.block_size
        return [(lod - 1, i) for i in range(index * k, (index + 1) * k)] if lod > 1 else []

    def roots(self) -> list[Node]:
        """Existing nodes without an existing parent."""
        k, top = self.cfg.block_size, self.cfg.max_lod
        return [(lod, i) for lod in range(top, 0, -1)
                for i in range(0 if lod == top else self.n // k ** (lod + 1) * k, self.n // k**lod)]

    def best(self, node: Node) -> np.ndarray:
        if node not in self.known:
            lod, index = node
            protected = (index + 1) * self.cfg.block_size**lod > self.n - self.cfg.recent
            open_C = self.combine(self.below(node))[0] if lod > 1 else self.utility[index : index + 1]
            self.known[node] = np.concatenate([[-np.inf if protected else 0.0], open_C])[: self.nodes + 1]
        return self.known[node]

    def combine(self, nodes: list[Node]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Best of several subtrees together, and per subtree how many nodes it has in each of these solutions."""
        total, shares = np.zeros(1), []
        for mine in map(self.best, nodes):
            both = np.full((len(mine), min(len(total) + len(mine) - 1, self.nodes + 1)), -np.inf)
            for c, gain in enumerate(mine):
                both[c, c : c + len(total)] = total[: both.shape[1] - c] + gain
            shares.append(both.argmax(0))
            total = both.max(0)
        return total, shares

    def solve(self, nodes: list[Node], count: int) -> list[Node]:
        """The expanded nodes of the best solution below `nodes` with `count` of them."""
        _, shares = self.combine(nodes)
        expanded = []
        for node, share in zip(reversed(nodes), reversed(shares)):
            mine = int(share[count])
            count -= mine
            if mine:
                expanded += [node, *self.solve(self.below(node), mine - 1)]
        return expanded


def optimum(utility_BN1: Tensor, n_tokens_B: Tensor, cfg: FocusConfig) -> FocusState:
    """The state of largest summed utility of raw blocks within the budget; blocks that reach into the
    protected tail are raw in any.

    utility_BN1: finite, any unit, may be negative. ValueError where the budget does not hold the tiling and the tail,
    and for several gists per node, whose prices differ by level.
    """
    if cfg.n_gists > 1:
        raise ValueError(f"n_gists={cfg.n_gists}: the reference counts nodes of one price")
    k, n_blocks = cfg.block_size, utility_BN1.shape[1]
    expanded = [torch.zeros(len(utility_BN1), n_blocks // k**level, dtype=torch.bool) for level in range(cfg.max_lod)]
    for b, n in enumerate(n_tokens_B.tolist()):
        nodes = (cfg.budget - tiling(n, k, cfg.max_lod)) // (k - 1)
        row = _Row(utility_BN1[b].double().numpy(), n, cfg, nodes) if nodes >= 0 else None
        total = row.combine(row.roots())[0] if row else np.array([-np.inf])
        if total.max() == -np.inf:
            raise ValueError(f"a budget of {cfg.budget} entries does not hold {n} tokens with {cfg.recent} of "
                             "them raw")
        for lod, index in row.solve(row.roots(), int(total.argmax())):
            expanded[lod - 1][b, index] = True
    return FocusState(tuple(expanded), n_tokens_B)


def value(utility_BN1: Tensor, state: FocusState) -> Tensor:
    """[B] summed utility of the raw blocks."""
    return (utility_BN1 * state.expanded[0]).sum(1)


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("--trials", type=int, default=32, help="random instances per row of the table")
    parser.add_seed("the utilities")


INSTANCES = {  # tokens, block size, max_lod, and how many nodes the budget expands
    "flat": (1024, 32, 1, 4), "two levels": (1024, 8, 2, 16), "two levels, tight": (1024, 8, 2, 6),
    "four levels": (1024, 4, 4, 24),
    "long, two levels": (4096, 32, 2, 8),
}
UTILITIES = {  # of blocks, from standard draws
    "exponential": lambda u: -u.log(), "even": lambda u: u, "heavy": lambda u: u ** -0.8,
    "clustered": lambda u: -u.log() * _bumps(u)}


def _bumps(u_BN: Tensor) -> Tensor:
    """Neighbours alike: runs of 8 blocks share a factor."""
    return (-u_BN[:, ::8].log()).repeat_interleave(8, 1)[:, : u_BN.shape[1]]


def run(args: argparse.Namespace) -> None:
    check_least(args, trials=1)
    rows = []
    print("| instance | utilities | by score: mean, least | optimum [ms a row] "
          "|\n|---|---|---|---|")
    for name, (n, k, max_lod, nodes) in INSTANCES.items():
        cfg = FocusConfig(tiling(n, k, max_lod) + (k - 1) * nodes, k, max_lod, recent=0)
        greedy, n_B = GreedyAllocator(cfg), torch.full((args.trials,), n)
        for kind, draw in UTILITIES.items():
            gen = torch.Generator().manual_seed(args.seed)
            utility_BN1 = draw(torch.rand(args.trials, n // k, generator=gen).clamp_min(1e-6).double())
            begin = time.perf_counter()
            best_B = value(utility_BN1, optimum(utility_BN1, n_B, cfg))
            ms = (time.perf_counter() - begin) / args.trials * 1e3
            share = {"by score": value(utility_BN1, greedy.allocate(utility_BN1, n_B)) / best_B}
            rows.append({"instance": name, "utilities": kind, "ms": ms} | {rule: [float(x.mean()), float(x.min())]
                                                                           for rule, x in share.items()})
            cells = " | ".join(f"{x.mean():.3f}, {x.min():.3f}" for x in share.values())
            print(f"| {name}: n {n}, K {k}, {max_lod} levels, {nodes} nodes | {kind} | {cells} | {ms:.1f} |",
                  flush=True)
    least = {rule: min(r[rule][0] for r in rows) for rule in ("by score",)}
    print_json({"trials": args.trials, "seed": args.seed, "least_mean_share": least, "rows": rows})
