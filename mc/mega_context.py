"""The MegaContext tree: the whole history as a pyramid of gists.

LOD0 is the tokens' embeddings. Node (lod, index) covers tokens [index·K^lod, (index+1)·K^lod) and is made by GistNet
from its K children, never from the tokens again. It exists only when complete; what is left over stays LOD0. Its gist
is one vector, or G of them (the arm `several`): each is an entry of its own and stands for the g-th of G equal parts of
the node's span, from whose mean it starts, though it has read all of the block.

`TreeShape` is the arithmetic: integers only, so that a working context can be chosen and edited without touching a
vector. `build_tree` makes the tree of a batch with gradients, for training, and reads many nodes in
one call, `gather`. The tree of a
session grows on top of a store: `mc.store.history`.

Shapes: B rows, T tokens, D width, K block size, G gists per node, N nodes, W entries to read, L levels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

# a GistNet: (x_NKD, mask_NK, lod, and where LOD1 reads something else read_NKD) -> [N, G, D]
GistFn = Callable[..., Tensor]
Integers = TypeVar("Integers", int, Tensor)  # a Python int, or an integer tensor of any shape


def tiling(n_tokens: Integers, block_size: int, max_lod: int, n_gists: int = 1) -> Integers:
    """The least number of entries that tile n_tokens with nodes up to max_lod, each of n_gists < block_size entries
    above LOD0: with one, the digit sum of n_tokens in base block_size, everything above digit max_lod
    counted in nodes of that level."""
    nodes = n_tokens // block_size**max_lod if max_lod else 0
    for lod in range(1, max_lod):
        nodes = nodes + n_tokens // block_size**lod % block_size
    return nodes * n_gists + (n_tokens % block_size if max_lod else n_tokens)


@dataclass(frozen=True)
class TreeShape:
    """Which nodes a history of n_tokens has, and where they stand in the flat table [LOD0 | LOD1 | …].

    lod and index are Python ints or integer tensors that broadcast; results have the same kind. Raises ValueError for
    n_tokens < 0, block_size < 2 or max_lod < 0.
    """

    n_tokens: int
    block_size: int
    max_lod: int

    def __post_init__(self):
        if self.n_tokens < 0 or self.block_size < 2 or self.max_lod < 0:
            raise ValueError(f"{self}: needs n_tokens ≥ 0, block_size ≥ 2, max_lod ≥ 0")

    @property
    def counts(self) -> list[int]:
        """Complete nodes of each level, LOD0 first (max_lod + 1 of them)."""
        return [self.n_tokens // self.block_size**lod for lod in range(self.max_lod + 1)]

    @property
    def offsets(self) -> list[int]:
        """First row of each level in the flat table."""
        return [self.node_row(lod, 0) for lod in range(self.max_lod + 1)]

    @property
    def n_nodes(self) -> int:
        """Rows of the flat table."""
        return sum(self.counts)

    def exists(self, lod: Integers, index: Integers) -> bool | Tensor:
        """Whether the node is in the tree: a level it has, and complete."""
        clamped = lod.clamp(0, self.max_lod) if isinstance(lod, Tensor) else min(max(lod, 0), self.max_lod)
        start, length = self.span(clamped, index)
        return (lod == clamped) & (index >= 0) & (start + length <= self.n_tokens)

    def node_row(self, lod: Integers, index: Integers) -> Integers:
        """Row in the flat table of a node that exists. Comparisons instead of a look-up:
        nothing is copied to a device."""
        row = index
        for below, count in enumerate(self.counts[:-1]):
            row = row + (lod > below) * count
        return row

    def span(self, lod: Integers, index: Integers) -> tuple[Integers, Integers]:
        """First token and number of tokens."""
        length = self.block_size**lod
        return index * length, length


def _gists(gistnet: GistFn, children_BTD: Tensor, size: int, lod: int, n_gists: int,
           read_BTD: Tensor | None = None) -> Tensor:
    """The gists [B, c·G, D] of the c complete blocks of `size` vectors that stand at the start of children [B, T, D].

    Raises ValueError when GistNet does not give n_gists vectors per block.
    """
    B, T, D = children_BTD.shape
    count = T // size
    blocks, read = (x if x is None else x[:, : count * size].reshape(B * count, size, D)
                    for x in (children_BTD, read_BTD))
    gist_NGD = gistnet(blocks, None, lod) if read is None else gistnet(blocks, None, lod, read)
    if gist_NGD.shape != (B * count, n_gists, D):
        raise ValueError(f"gists {tuple(gist_NGD.shape)}: the tree holds {n_gists} per node; use a GistNet with "
                         f"n_gists={n_gists}")
    return gist_NGD.reshape(B, count * n_gists, D)


def _take(table_BND: Tensor, row_BW: Tensor) -> Tensor:
    """Rows of each table: [B, N, D], [B, W] -> [B, W, D]."""
    B, N, D = table_BND.shape
    first_B1 = torch.arange(B, device=row_BW.device)[:, None] * N
    return table_BND.reshape(B * N, D).index_select(0, (row_BW + first_B1).flatten()).view(*row_BW.shape, D)


@dataclass(frozen=True)
class Tree:
    """The tree of a batch of rows. `table_BND` holds [LOD0 | LOD1 | …], the n_gists vectors of a node side by side;
    rows of nodes that do not exist are zero."""

    table_BND: Tensor
    shape: TreeShape  # of the longest row
    lengths_B: Tensor | None = None  # tokens of each row; None: all of them
    n_gists: int = 1

    @property
    def levels(self) -> list[Tensor]:
        """Views [B, N_lod · (1 or G), D] into the table, LOD0 first."""
        tokens, *nodes = self.shape.counts
        return list(self.table_BND.split([tokens, *(count * self.n_gists for count in nodes)], 1))

    def with_table(self, table_BND: Tensor) -> "Tree":
        """The same nodes of other rows, or other vectors."""
        return replace(self, table_BND=table_BND)

    def exists(self, lod_BW: Tensor, index_BW: Tensor) -> Tensor:
        """Whether each node (integer tensors [B, W]) is complete in its own row: bool [B, W]."""
        exists_BW = self.shape.exists(lod_BW, index_BW)
        if self.lengths_B is None:
            return exists_BW
        start_BW, length_BW = self.shape.span(lod_BW.clamp(0, self.shape.max_lod), index_BW)
        return exists_BW & (start_BW + length_BW <= self.lengths_B[:, None])

    def gather(self, lod_BW: Tensor, index_BW: Tensor, valid_BW: Tensor) -> Tensor:
        """The vectors of entries, with gradients: one gather.

        lod_BW, index_BW: integers [B, W], above LOD0 index = node · n_gists + which of its gists; valid_BW: bool [B,
        W], False where an entry is padding.
        Returns [B, W, D]: zeros where not valid, NaN where a valid entry names a node that does not exist. The NaN
        reaches the loss, whose finite check stops the run, without this method waiting for the device.
        """
        gist_BW = torch.where(lod_BW > 0, index_BW % self.n_gists, 0)
        node_BW = torch.where(lod_BW > 0, index_BW // self.n_gists, index_BW)
        exists_BW = self.exists(lod_BW, node_BW)
        row_BW = self.shape.node_row(lod_BW, node_BW)
        row_BW = torch.where(lod_BW > 0, row_BW + (row_BW - self.shape.n_tokens) * (self.n_gists - 1) + gist_BW, row_BW)
        row_BW = torch.where(exists_BW & valid_BW, row_BW, 0)
        return _mark(_take(self.table_BND, row_BW), valid_BW, exists_BW)


def _mark(entries_BWD: Tensor, valid_BW: Tensor, exists_BW: Tensor) -> Tensor:
    """Zeros where not valid, NaN where valid and non-existent."""
    entries_BWD = entries_BWD.masked_fill((valid_BW & ~exists_BW)[..., None], torch.nan)
    return entries_BWD.masked_fill(~valid_BW[..., None], 0)


def build_tree(embeds_BTD: Tensor, gistnet: GistFn, block_size: int, max_lod: int, lengths_B: Tensor | None = None,
               n_gists: int = 1, read_BTD: Tensor | None = None) -> Tree:
    """The tree of a batch, with gradients to the embeddings and to GistNet.

    embeds_BTD: normed token embeddings [B, T, D], computed once by the caller; rows start at a block boundary.
    gistnet: called once per level that has a node, on all blocks of all rows.
    lengths_B: tokens of each row [B], integers ≤ T, None: T. A node that is not complete in its
    row is zero and does not exist;
        nothing of it, nor of the padding, gets a gradient.
    n_gists: vectors per node that GistNet makes. Above LOD1 it reads block_size · n_gists of them.
    read_BTD: what GistNet reads of each token at LOD1 in place of its embedding.
    Raises ValueError for a GistNet that makes another number.
    """
    shape = TreeShape(embeds_BTD.shape[1], block_size, max_lod)

    def keep(level_BND: Tensor, lod: int) -> Tensor:
        if lengths_B is None:
            return level_BND
        complete_B = lengths_B // block_size**lod * (n_gists if lod else 1)
        gone_BN = torch.arange(level_BND.shape[1], device=level_BND.device) >= complete_B[:, None]
        return level_BND.masked_fill(gone_BN[..., None], 0)

    levels = [keep(embeds_BTD, 0)]
    for lod, count in enumerate(shape.counts):
        if lod and count:
            size, read = block_size * (n_gists if lod > 1 else 1), read_BTD if lod == 1 else None
            levels.append(keep(_gists(gistnet, levels[-1], size, lod, n_gists, read), lod))
    return Tree(torch.cat(levels, 1), shape, lengths_B, n_gists)
