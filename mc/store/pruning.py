"""Giving up the raw tokens of blocks that nobody needs in detail: only their gists stay.

Utility of a block's detail = how many working contexts showed it × how much it helped there (`Catalog.detail_utility`).
What is pruned is hidden from every session at once, and can be restored until `DiskStore.compact` gives the room back.

Shapes: N blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mc.store.catalog import Catalog
from mc.store.edits import pruned_blocks
from mc.store.ram import DROPPED, KEPT, Store
from nanochat.common import UserError


@dataclass(frozen=True)
class PruneReport:
    blocks: int  # changed
    slots: int  # they hold
    detailed: int  # blocks that have their detail afterwards
    erased: int  # blocks asked for whose raw tokens are gone for good


def least_useful(
    store: Store,
    catalog: Catalog,
    *,
    share: float | None = None,
    max_utility: float | None = None,
    keep_last: int = 0,
    source: int | None = None,
) -> np.ndarray:
    """Blocks to prune, int64 [N], of least utility first, and of equal ones the oldest.

    share: of all blocks, how many are to have no detail afterwards; max_utility: only blocks worth
    at most this [accesses × nats].
    keep_last: tokens at the end that stay; source: only blocks of this one. UserError unless
    share or max_utility is given.
    """
    if share is None and max_utility is None:
        raise UserError("prune how much? give --share (of all blocks) or --max_utility (accesses × nats)")
    if share is not None and not 0 <= share <= 1:
        raise UserError(f"--share={share}: between 0 and 1")
    if keep_last < 0:
        raise UserError(f"--keep_last={keep_last}: at least 0 tokens")
    n, K = store.n_nodes(1), store.format.block_size
    pruned, utility = pruned_blocks(store), catalog.detail_utility(n)
    may = ~pruned & (np.arange(n) < (store.n_tokens - keep_last) // K)
    if source is not None:
        blocks = catalog.source(source).blocks(K)
        may &= (np.arange(n) >= blocks.start) & (np.arange(n) < blocks.stop)
    if max_utility is not None:
        may &= utility <= max_utility
    order = np.flatnonzero(may)
    # most blocks were never shown and are worth the same 0: stable, or which of them go would be chance
    order = order[np.argsort(utility[order], kind="stable")]
    return order if share is None else order[: max(int(share * n) - int(pruned.sum()), 0)]


def prune(store: Store, catalog: Catalog, blocks_N: np.ndarray) -> PruneReport:
    """Give up the detail of blocks, with one commit."""
    return _set(store, catalog, blocks_N, DROPPED)


def restore(store: Store, catalog: Catalog, source: int | None = None) -> PruneReport:
    """Give all pruned blocks (of a source) their detail back, as far as it is still there."""
    blocks = np.flatnonzero(pruned_blocks(store))
    if source is not None:
        mine = catalog.source(source).blocks(store.format.block_size)
        blocks = blocks[(blocks >= mine.start) & (blocks < mine.stop)]
    return _set(store, catalog, blocks, KEPT)


def _set(store: Store, catalog: Catalog, blocks_N: np.ndarray, state: int) -> PruneReport:
    index_N = torch.from_numpy(blocks_N)
    # `set_detail` refuses all blocks where one of them is erased
    there_N = store.detail(index_N) <= DROPPED
    if there_N.any():
        store.set_detail(index_N[there_N], state)
        store.commit()
    # after the commit: where the process dies in between, the catalog takes them from the store (`Catalog.reconcile`)
    pruned = pruned_blocks(store)
    catalog.set_tombstones(pruned)
    changed = int(there_N.sum())
    return PruneReport(changed, changed * store.format.block_size, int((~pruned).sum()), len(index_N) - changed)
