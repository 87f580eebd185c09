"""What of a session's working context is run through the base model, and what is kept of it in the cache.

Only entries that are not in the cache are run. Under the exact policy those are all from the first edit on, so that the
logits are those of a forward pass over the cut from scratch; under the approximate policy only the new entries.

Shapes: A sessions of a pass, S entries of a pass, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc.session.focus import FocusedHistory
from mc.session.refocus import Edits, PathEdits
from mc.store.catalog import Catalog
from mc.store.ram import VOID, Store
from nanochat.common import UserError

# of entries to be run, with what pads them
FIELDS = {"lod": 0, "index": 0, "ids": VOID, "slot": -1, "before": -1, "linked": 0}
FIELD_SLOT = list(FIELDS).index("slot")


class Missing(NamedTuple):
    """Entries of one session that are to be run, in time order."""

    lod: np.ndarray
    index: np.ndarray
    ids: np.ndarray  # token ids, VOID for gists
    slot: np.ndarray
    before: np.ndarray  # slot of the entry before, −1 at the first
    linked: np.ndarray  # raw, and the next token after the one before
    gists: Tensor | None  # [G, D] vectors of those with lod > 0, if there are any
    recut: bool


@dataclass
class _Cached:
    """Entries in the cache, in time order."""

    lod: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    index: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    slot: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def table_of(work: Sequence[Missing], S: int, spare: int) -> np.ndarray:
    """int64 [fields, A, S] of the entries to run, rows padded at their end; what has no slot goes to the spare one."""
    table = np.empty((len(FIELDS), len(work), S), dtype=np.int64)
    table[:] = np.array([*FIELDS.values()])[:, None, None]
    for row, w in enumerate(work):
        table[:, row, :len(w.lod)] = [getattr(w, name) for name in FIELDS]
    table[FIELD_SLOT][table[FIELD_SLOT] < 0] = spare
    return table


class CachedHistory(FocusedHistory):
    """A focused history, and which of its entries stand in which slots of row `row` of the pool's cache."""

    def __init__(self, pool: Any, row: int, store: Store, seed: int, catalog: Catalog | None):
        super().__init__(pool, store, seed, catalog)
        self.row = row

    def _restart(self, focus: PathEdits) -> None:
        super()._restart(focus)
        self.forget_cache()
        self.kept = self.computed = 0  # entries whose KV the last refocus left as they were, and that were run for it

    def forget_cache(self) -> None:
        """Everything shown will be run again."""
        slots = self.pool.cache.spare
        # recut: else the next pass would take every token from n_read on, all of the history, as new and raw
        self.cached, self.free_slots, self.recut = _Cached(), list(range(slots)), True
        self.pool.cache.clear(self.row, torch.arange(slots, device=self.pool.device))
        self.last_hidden_D: Tensor | None = None
        self.n_read = 0  # tokens that the cache has seen, as they are or in gists

    def refocus(self) -> Edits:
        """As `FocusedHistory.refocus`; every entry counts as kept until the next pass says otherwise."""
        edits = super().refocus()
        self.kept, self.computed = len(self.cached.lod), 0
        return edits

    def missing(self) -> Missing:
        """The entries that are shown and not in the cache, with slots for them; the slots of what
        is no longer shown are free."""
        if not self.n_tokens:
            raise UserError("the session is empty: begin with at least one token")
        read, cached, recut = self.n_read, self.cached, self.recut
        if recut:
            lod, index = self._shown()
            ids = self._ids(lod, index)
            # a cut tiles the history with its void slots; they hold no token and get no entry
            shown = (lod > 0) | (ids != VOID)
            lod, index, ids = lod[shown], index[shown], ids[shown]
            slot = self._slots_kept(lod, index)
            run = slot < 0
            gone = np.setdiff1d(cached.slot, slot)
            # what has a position is seen: it would be attended to until its slot is written again
            self.pool.cache.clear(self.row, torch.from_numpy(gone).to(self.pool.device))
            # before slots are taken: an edit of a full row needs those of what it hides
            self.free_slots.extend(gone.tolist())
            self.kept, self.computed = len(run) - int(run.sum()), int(run.sum())
        else:
            new = np.arange(read, self.n_tokens)
            new_ids = self._ids(np.zeros_like(new), new)
            new, new_ids = new[new_ids != VOID], new_ids[new_ids != VOID]
            lod, index = np.concatenate([cached.lod, np.zeros_like(new)]), np.concatenate([cached.index, new])
            ids = np.concatenate([np.full_like(cached.lod, VOID), new_ids])
            slot = np.concatenate([cached.slot, np.full_like(new, -1)])
            run = slot < 0
        # enough are free: a row holds budget + interval, and a refocus comes before more is read
        slot[run] = [self.free_slots.pop() for _ in range(run.sum())]
        # of all that is shown: smear and key shift read the entry before, which may be one that is kept
        before, lod_before, index_before = (np.concatenate([[-1], x[:-1]]) for x in (slot, lod, index))
        linked = (lod == 0) & (lod_before == 0) & (index == index_before + 1)
        self.cached, self.n_read = _Cached(lod, index, slot), self.n_tokens
        # void slots end it: contiguous positions move
        self.recut = bool((index[-1] + 1) * self.history.block_size ** lod[-1] < self.n_tokens)
        coarse = run & (lod > 0)
        gists = self.history.gists(torch.from_numpy(lod[coarse]),
                                   torch.from_numpy(index[coarse])) if coarse.any() else None
        return Missing(lod[run], index[run], ids[run], slot[run], before[run], linked[run], gists, recut)

    def _slots_kept(self, lod: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The slot of each entry whose KV in the cache stays; −1 for those to be run."""
        K, cached = self.history.block_size, self.cached
        if not len(cached.lod):
            return np.full_like(lod, -1)
        # entries do not overlap: of the cached ones at most one begins where this one does
        place = np.searchsorted(cached.index * K ** cached.lod, index * K ** lod).clip(max=len(cached.lod) - 1)
        same = (cached.lod[place] == lod) & (cached.index[place] == index)
        if self.pool.config.kv_policy == "exact":
            # a key holds what stood before it: as from scratch only up to the first entry that is new or gone
            same &= np.minimum.accumulate(same & (place == np.arange(len(lod))))
            ahead = slice(len(cached.lod) - 1, None)
            if self.pool.mc.config.positions == "contiguous" and not (same[:len(cached.lod)].all()
                                                                      and not lod[ahead].any()
                                                                      and (np.diff(index[ahead]) == 1).all()):
                same[:] = False  # the number of entries decides where each stands
        same[-1] &= same.all()  # the last entry sees all that is new
        return np.where(same, cached.slot[place], -1)
