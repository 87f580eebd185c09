"""All gists and lens keys of a history made again with other networks: beside it, then switched to in one commit.

Until the switch the history is as it was. A run that was cut off goes on where it was. The old gists stay readable as
an older version of the store until it is compacted.

Shapes: none.
"""

import shutil
from collections.abc import Callable

import torch

from mc.store.catalog import Catalog
from mc.store.disk.store import DiskStore
from mc.store.history import BATCH_BLOCKS, History, store_format
from mc.store.networks import Networks
from mc.store.ram import ERASED
from nanochat.common import UserError


def regist(
    store: DiskStore,
    catalog: Catalog,
    networks: Networks,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Make every node again and switch to it. Returns how many tokens a run before this one had done already.

    dtype: of gists and keys, default as they are; progress: called with tokens done and in all. UserError where the
    history has the gists of these networks already, where raw tokens are gone that the new ones would be made of, or
    where the block size differs.
    """
    format = store_format(networks.gpt, networks.mc, dtype or store.format.dtype)
    name = f"regist.{format.model}.{str(format.dtype).removeprefix('torch.')}"
    if format == store.format:
        # of a run that was killed between its commit and its clean-up; what was begun for others stays
        for adopted in store.path.glob(f"{name}.v*"):
            shutil.rmtree(adopted)
        raise UserError(f"{store.path} has the gists of these networks already ({format.model}); name another "
                        "checkpoint")
    if format.block_size != store.format.block_size:
        raise UserError(
            f"the history has blocks of {store.format.block_size} tokens, these networks of {format.block_size}: "
            "ingest it anew"
        )
    if gone := int((store.detail(torch.arange(store.n_tokens // format.block_size)) == ERASED).sum()):
        raise UserError(f"{gone} blocks were pruned and compacted away: without their raw tokens there are no new "
                        "gists for them")
    beside = store.path / f"{name}.v{store.version}"
    for stale in store.path.glob("regist.*"):
        if stale != beside:  # for other networks, or of a text that was edited since
            shutil.rmtree(stale)
    # without one its making was cut short, and it holds nothing
    if (beside / "manifest").exists():
        new = DiskStore.open(beside)
    else:
        shutil.rmtree(beside, ignore_errors=True)
        new = DiskStore.create(beside, format, partition_bytes=store.partition_bytes)
    # closed, and so on the medium, before the store takes its files: `adopt` syncs their new names only
    with new:
        history, done = History(networks.gpt, networks.mc, new), new.n_tokens
        for start in range(done, store.n_tokens, BATCH_BLOCKS * format.block_size):
            history.fill(store.tokens(torch.arange(start,
                                                   min(start + BATCH_BLOCKS * format.block_size, store.n_tokens))))
            if progress:
                progress(new.n_tokens, store.n_tokens)
    # before the commit: a version too many is harmless, gists whose checkpoint nobody remembers are not
    catalog.add_version(format.model, networks.origin)
    store.adopt(new)
    store.commit()
    # its files live on under their names in the store
    shutil.rmtree(beside)
    return done
