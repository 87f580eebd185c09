"""The working context as a cut through the tree: integers only, edited in batch.

A node `(lod, index)` covers tokens `[index * K**lod, (index + 1) * K**lod)`, K being the block size, and exists once
it is complete. A cut is, per row, a list of nodes in time order whose spans tile `[0, n)` exactly; rows may differ in
n. Everything else (embeddings, positions, variants) is derived from these integers, so an edit costs a few tensor
operations of static shape, whatever the batch: no loop over rows or entries, no device sync.

All edits share one primitive, `_emit`: say how many entries each source yields, and the output slots find their
source in the running sum of these counts.

A node above LOD0 is one entry, or `n_gists` of them: its vectors, side by side. A cut lists nodes; its capacity counts
entries, and `by_entry` is where the nodes become entries.

Shapes: B rows, W slots (the capacity), L levels of gists, N_l nodes at level l, N1 = N_1 blocks, S sources of an
edit. Integers are int64. "Empty row": no valid entry.
"""

from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Cut(NamedTuple):
    """Nodes in time order, left-packed; padding (valid False, lod 0, index 0) only at the end of a row."""

    lod_BW: Tensor  # int64
    index_BW: Tensor  # int64, index of the node within its level
    valid_BW: Tensor  # bool
    block_size: int
    n_gists: int = 1  # entries of a node above LOD0


def _emit(count_BS: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source s yields count[s] consecutive entries; find each slot's source.

    Returns source_BW, offset_BW (which of its source's entries a slot is), valid_BW and fits_B. A row whose counts
    sum to more than the capacity has fits False and no valid slot.
    """
    end_BS = count_BS.cumsum(1)
    slot_BW = torch.arange(capacity, device=count_BS.device).expand(count_BS.shape[0], capacity).contiguous()
    source_BW = torch.searchsorted(end_BS, slot_BW, right=True).clamp(max=count_BS.shape[1] - 1)
    offset_BW = slot_BW - (end_BS - count_BS).gather(1, source_BW)
    fits_B = end_BS[:, -1] <= capacity
    return source_BW, offset_BW, (slot_BW < end_BS[:, -1:]) & fits_B[:, None], fits_B


def _cut(lod_BW: Tensor, index_BW: Tensor, valid_BW: Tensor, block_size: int, n_gists: int = 1) -> Cut:
    return Cut(lod_BW.masked_fill(~valid_BW, 0), index_BW.masked_fill(~valid_BW, 0), valid_BW, block_size, n_gists)


# ---------------------------------------------------------------------------------------------------------------------
# What a cut says


def spans(cut: Cut) -> tuple[Tensor, Tensor]:
    """First token and number of tokens of every entry: start_BW, length_BW int64, both 0 at padding."""
    length_BW = cut.block_size**cut.lod_BW
    return cut.index_BW * length_BW, length_BW * cut.valid_BW


def _per_node(lod: Tensor, n_gists: int) -> Tensor:
    return torch.where(lod > 0, n_gists, 1)


def entries_used(cut: Cut) -> Tensor:
    """Number of entries per row, int64 [B]."""
    return (cut.valid_BW * _per_node(cut.lod_BW, cut.n_gists)).sum(1)


def width(lod: Tensor, block_size: int, n_gists: int) -> Tensor:
    """Tokens that an entry stands for: its equal part of its node's span."""
    return block_size**lod // _per_node(lod, n_gists)


def by_entry(cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """The entries in time order: lod_BW, index_BW, valid_BW. Above LOD0 index = node · n_gists + which of its gists, so
    that entry (lod, index) stands for the tokens from index · width(lod). The capacity holds them,
    or the row comes back empty."""
    if cut.n_gists == 1:
        return cut.lod_BW, cut.index_BW, cut.valid_BW
    source_BW, gist_BW, valid_BW, _ = _emit(cut.valid_BW * _per_node(cut.lod_BW, cut.n_gists), cut.lod_BW.shape[1])
    lod_BW, index_BW = (x.gather(1, source_BW) for x in (cut.lod_BW, cut.index_BW))
    index_BW = index_BW * _per_node(lod_BW, cut.n_gists) + gist_BW
    return lod_BW.masked_fill(~valid_BW, 0), index_BW.masked_fill(~valid_BW, 0), valid_BW


# ---------------------------------------------------------------------------------------------------------------------
# Whole cuts


def coarsest(n_tokens: int | Tensor, block_size: int, max_lod: int, capacity: int) -> Cut:
    """The least tiling of `[0, n)`: all complete nodes of `max_lod`, then what is left at each lower level, tail LOD0.

    n_tokens: int (one row) or int64 [B]. A row that needs more than `capacity` entries comes back empty.
    """
    n_B = n_tokens if isinstance(n_tokens, Tensor) else torch.tensor([n_tokens])
    lods = range(max_lod, -1, -1)
    parents = [0 * n_B if lod == max_lod else n_B // block_size ** (lod + 1) for lod in lods]
    first_BS = block_size * torch.stack(parents, 1)
    last_BS = torch.stack([n_B // block_size**lod for lod in lods], 1)
    source_BW, offset_BW, valid_BW, _ = _emit(last_BS - first_BS, capacity)
    return _cut(max_lod - source_BW, first_BS.gather(1, source_BW) + offset_BW, valid_BW, block_size)


def from_expanded(
    expanded: Sequence[Tensor], n_tokens_B: Tensor, block_size: int, capacity: int, n_gists: int = 1
) -> tuple[Cut, Tensor]:
    """The cut of a tree some of whose nodes are expanded. Returns the cut and fits_B (bool).

    expanded: one bool [B, N_l] per level l = 1 … L, with N_l = N1 // K**(l-1). A node is shown iff all its existing
    ancestors are expanded and it is not; a node that does not exist (incomplete, above L, or beyond the N1 blocks)
    counts as expanded; tokens are never expanded. A row that needs more than `capacity` entries is empty, fits False.
    n_gists: entries of a node.

    Works on blocks, not tokens: slot j stands for block j, the slot after the last one for whatever follows.
    """
    n_blocks = expanded[0].shape[1]
    block_S = torch.arange(n_blocks + 1, device=n_tokens_B.device)
    # Tokens that start in each slot, were all of them shown raw; then, from the top, each shown node takes its blocks.
    count_BS = (n_tokens_B[:, None] - block_S * block_size).clamp(min=0)
    count_BS = torch.where(block_S < n_blocks, count_BS.clamp(max=block_size), count_BS)
    lod_BS = torch.zeros_like(count_BS)
    hidden_BS = torch.zeros_like(count_BS, dtype=torch.bool)
    for lod in range(len(expanded), 0, -1):
        blocks, n_nodes = block_size ** (lod - 1), expanded[lod - 1].shape[1]
        assert n_nodes == n_blocks // blocks, "levels of `expanded` disagree on the number of blocks"
        exists_BN = block_size**lod * torch.arange(1, n_nodes + 1, device=n_tokens_B.device) <= n_tokens_B[:, None]
        closed_BN = exists_BN & ~expanded[lod - 1]
        closed_BS = F.pad(closed_BN, (0, 1))[:, block_S // blocks] & ~hidden_BS
        lod_BS = torch.where(closed_BS, lod, lod_BS)
        count_BS = torch.where(closed_BS, (block_S % blocks == 0).long(), count_BS)
        hidden_BS = hidden_BS | closed_BS
    source_BW, offset_BW, valid_BW, _ = _emit(count_BS, capacity)
    fits_B = (count_BS * _per_node(lod_BS, n_gists)).sum(1) <= capacity
    lod_BW = lod_BS.gather(1, source_BW)
    token_BW = source_BW * block_size + offset_BW
    return _cut(lod_BW, token_BW // block_size**lod_BW, valid_BW & fits_B[:, None], block_size, n_gists), fits_B


# ---------------------------------------------------------------------------------------------------------------------
# Edits


def expand(cut: Cut, mask_BW: Tensor) -> tuple[Cut, Tensor]:
    """Replace each masked entry by its K children, in place. A token has none: it stays.

    Returns the cut and applied_B (bool): False where the result would exceed the capacity W; such a row is unchanged.
    """
    k, capacity = cut.block_size, cut.lod_BW.shape[1]
    mask_BW = mask_BW & cut.valid_BW & (cut.lod_BW > 0)
    more_BW = k * _per_node(cut.lod_BW - 1, cut.n_gists) - cut.n_gists
    applied_B = entries_used(cut) + (more_BW * mask_BW).sum(1) <= capacity
    mask_BW = mask_BW & applied_B[:, None]
    source_BW, offset_BW, valid_BW, _ = _emit(torch.where(mask_BW, k, cut.valid_BW.long()), capacity)
    lod_BW, index_BW, mask_BW = (x.gather(1, source_BW) for x in (cut.lod_BW, cut.index_BW, mask_BW))
    index_BW = torch.where(mask_BW, index_BW * k + offset_BW, index_BW)
    return _cut(lod_BW - mask_BW.long(), index_BW, valid_BW, k, cut.n_gists), applied_B


# ---------------------------------------------------------------------------------------------------------------------
# The invariants


def check(cut: Cut, n_tokens_B: Tensor, capacity: int, max_lod: int | None = None, gaps: bool = False) -> None:
    """Assert every invariant of a cut, entry by entry. For tests and debugging: slow, syncs with the device.

    Budget (entries <= capacity), padding, level consistency (0 <= lod <= max_lod, complete nodes only), monotone
    time, contiguity and coverage of `[0, n)`. Block alignment needs no test of its own: a node's span is aligned by
    construction, so a misaligned entry shows as a gap or an overlap. gaps: spans may be left out
    between entries and before the first.
    """
    assert cut.lod_BW.shape == cut.index_BW.shape == cut.valid_BW.shape, "shapes of lod, index and valid differ"
    assert cut.lod_BW.dtype == cut.index_BW.dtype == torch.int64 and cut.valid_BW.dtype == torch.bool, "dtypes"
    rows = zip(cut.lod_BW.tolist(), cut.index_BW.tolist(), cut.valid_BW.tolist(), n_tokens_B.tolist(), strict=True)
    for b, (lods, indices, valid, n) in enumerate(rows):
        used = sum(valid)
        entries = sum(cut.n_gists if lod else 1 for lod in lods[:used])
        assert entries <= capacity, f"row {b}: {entries} entries exceed the budget of {capacity}"
        assert all(valid[:used]), f"row {b}: padding before an entry"
        assert not any(lods[used:]) and not any(indices[used:]), f"row {b}: padding is not (0, 0)"
        time = 0
        for w, (lod, index) in enumerate(zip(lods[:used], indices[:used])):
            assert lod >= 0 and (max_lod is None or lod <= max_lod), f"row {b}, entry {w}: no level {lod}"
            start, end = index * cut.block_size**lod, (index + 1) * cut.block_size**lod
            assert start == time or gaps and start > time, f"row {b}, entry {w}: ({lod}, {index}) starts at {start}, not at {time}"  # noqa: E501
            assert end <= n, f"row {b}, entry {w}: ({lod}, {index}) ends at {end}, beyond {n} tokens"
            time = end
        assert time == n, f"row {b}: covers {time} of {n} tokens"
