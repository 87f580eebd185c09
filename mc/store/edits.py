"""Changing what a history holds: tokens of a source are replaced, deleted or inserted, and
the nodes above them made again.

A source starts at a block boundary, so what stands around an edited one keeps its gists. What an edit costs:

    same length               the blocks that hold changed tokens, and their ancestors
    other length              the blocks from the edit to the end of the source, and their ancestors
    other number of blocks    besides, what follows moves by whole blocks: its LOD1 gists and lens keys are
                              kept, LOD2 and above made again

The result equals a history made of the edited text with the same source boundaries. The
store commits an edit as a whole.

Shapes: N tokens or nodes.
"""

import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from mc.store.catalog import Catalog, Edit, Source
from mc.store.disk.store import DiskStore
from mc.store.history import BATCH_BLOCKS, MAX_BLOCKS, History
from mc.store.ram import ERASED, KEPT, VOID, Store
from nanochat.common import UserError


@dataclass(frozen=True)
class EditReport:
    """What an edit cost."""

    source: int
    recomputed: dict[int, int]  # nodes made, by LOD
    moved: int  # blocks that moved and kept their gist and keys
    record_bytes: int  # of the records written: tokens, gists, keys
    seconds: float


@torch.no_grad()
def edit_source(history: History, catalog: Catalog, source: int, start: int, removed: int, ids_N: Tensor) -> EditReport:
    """Tokens [start, start + removed) of a source, counted from its first one, become ids (int64 [N]).

    Pruned blocks that the edit goes through have their detail again afterwards. UserError, before anything is changed,
    for a range outside the source, an id outside the vocabulary, an edit of nothing, or one that
    needs raw tokens that are gone.
    """
    begin = time.perf_counter()
    ids_N = ids_N.cpu().long()
    history.check_ids(ids_N)
    where = catalog.source(source)
    edit, padded = _plan(history, where, start, removed, ids_N)
    # before the store changes: where the process dies behind the commit, only this tells what moved, and how far
    catalog.begin_edit(edit)
    try:
        if removed == len(ids_N):
            written = _replace(history, where.start + start, ids_N)
        else:
            written = _rechunk(history, edit, padded, where.start + start, ids_N)
    except BaseException:
        if isinstance(history.store, DiskStore):  # a history in RAM keeps nothing to go back to
            history.store.roll_back()
        # behind the rollback: dying in between leaves the intent, and the store's version says that nothing came of it
        catalog.abandon_edit()
        raise
    history.store.commit()  # where this fails, opening the store again tells whether it is in, and the catalog follows
    report = EditReport(source, dict(written.nodes), written.moved, written.bytes, time.perf_counter() - begin)
    catalog.finish_edit(asdict(report))
    # blocks that the edit went through have their detail again
    if catalog.count("tombstones"):
        catalog.set_tombstones(pruned_blocks(history.store))
    return report


def pruned_blocks(store: Store) -> np.ndarray:
    """bool [blocks]: whether the raw tokens of each LOD1 block are given up or gone."""
    return ~store.has_detail(torch.arange(store.n_nodes(1))).numpy()


def _plan(history: History, where: Source, start: int, removed: int, ids_N: Tensor) -> tuple[Edit, bool]:
    """What to do, and whether void slots fill the source's last block."""
    K, n, source = history.block_size, history.n_tokens, where.id
    if not (0 <= start <= where.tokens and 0 <= removed <= where.tokens - start):
        raise UserError(f"tokens [{start}, {start + removed}) of source {source}, which has {where.tokens}: give a "
                        "range inside")
    if not removed and not len(ids_N):
        raise UserError("an edit that removes nothing and inserts nothing; give --remove or a text")
    tokens = where.tokens + len(ids_N) - removed
    if tokens == 0:
        raise UserError(f"the edit would leave nothing of source {source}: a source holds at least one token")
    if where.start + where.tokens > n:
        raise ValueError(
            f"source {source} ends at slot {where.start + where.tokens} of {n}: reconcile the catalog first")
    stop_block = where.blocks(K).stop
    touched = torch.arange((where.start + start) // K, -(-(where.start + start + removed) // K)
                           if removed == len(ids_N) else stop_block)
    # the block at the end that is not whole has no detail to lose
    touched = touched[touched < n // K]
    if (erased := touched[history.store.detail(touched) == ERASED]).numel():
        raise UserError(
            f"the raw tokens of {len(erased)} blocks that the edit goes through were pruned and compacted away "
            f"(the first is block {int(erased[0])}); ingest the source again instead"
        )
    shift = -(-tokens // K) - len(where.blocks(K))
    # The last source may still grow: then no void slots follow its tokens.
    padded = where.stop(K) <= n and (where.complete or where.stop(K) < n or where.tokens % K > 0)
    return Edit(source, start, removed, len(ids_N), stop_block, shift, history.store.text_version), padded


class _Written:
    """Counts what is written to a store."""

    def __init__(self, store: Store):
        self.format, self.nodes, self.moved, self.bytes = store.format, Counter(), 0, 0

    def tokens(self, count: int) -> None:
        self.bytes += 4 * count

    def made(self, lod: int, count: int) -> None:
        self.nodes[lod] += count
        self.records(lod, count)

    def records(self, lod: int, count: int) -> None:
        f = self.format
        scale = 4 if f.dtype == torch.int8 else 0
        vectors = [f.d_model, *[f.key_dim] * (f.n_keys if lod == 1 else 0)]
        self.bytes += count * sum(f.dtype.itemsize * width + scale for width in vectors)


def _replace(history: History, first_slot: int, ids_N: Tensor) -> _Written:
    """As many tokens as before: their blocks and the ancestors of these."""
    store, K, written = history.store, history.block_size, _Written(history.store)
    store.rewrite_tokens(first_slot, ids_N)
    written.tokens(len(ids_N))
    first, stop = first_slot // K, -(-(first_slot + len(ids_N)) // K)
    for lod in range(1, history.max_lod + 1):
        for begin in range(first, min(stop, store.n_nodes(lod)), MAX_BLOCKS):
            index_N = torch.arange(begin, min(begin + MAX_BLOCKS, stop, store.n_nodes(lod)))
            store.rewrite_nodes(lod, begin, *history.nodes(lod, index_N))
            written.made(lod, len(index_N))
            if lod == 1:
                # what was pruned is the old text: of the new one nothing was counted yet
                store.set_detail(index_N, KEPT)
        first, stop = first // K, -(-stop // K)
    return written


def _rechunk(history: History, edit: Edit, padded: bool, first_slot: int, ids_N: Tensor) -> _Written:
    """More or fewer tokens than before: the source from the edited block to its end, and
    what follows where that moves."""
    store, K, written = history.store, history.block_size, _Written(history.store)
    first, n = first_slot // K, store.n_tokens
    tail_N, at = store.tokens(torch.arange(first * K, min(edit.stop_block * K, n))), first_slot - first * K
    tail_N = torch.cat([tail_N[:at], ids_N, tail_N[at + edit.removed :]])
    tail_N = tail_N[tail_N != VOID]
    if padded:
        tail_N = torch.cat([tail_N, torch.full((-len(tail_N) % K,), VOID)])
        if not edit.shift:
            return _replace(history, first * K, tail_N)
    # what follows is read from the history as it was while it is written anew; a snapshot commits, so it comes first
    with closing(store.snapshot()) as old:
        store.truncate(0, first * K)
        store.append_tokens(tail_N)
        # nodes are appended in order: those of the edited source before the ones that move
        history.grow()
        for begin in range(edit.stop_block, n // K, BATCH_BLOCKS):
            block_N = torch.arange(begin, min(begin + BATCH_BLOCKS, n // K))
            store.append_tokens(old.tokens((block_N[:, None] * K + torch.arange(K)).flatten()))
            store.append_nodes(1, old.gists(1, block_N), old.keys(block_N))
            store.set_detail(block_N + edit.shift, old.detail(block_N))
            history.grow()
        store.append_tokens(old.tokens(torch.arange(min(max(edit.stop_block, n // K) * K, n), n)))
    written.moved = max(n // K - edit.stop_block, 0)
    written.tokens(store.n_tokens - first * K)
    written.records(1, written.moved)
    for lod in range(1, history.max_lod + 1):
        written.made(lod, store.n_nodes(lod) - first // K ** (lod - 1) - (written.moved if lod == 1 else 0))
    return written
