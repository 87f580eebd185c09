"""What of a session's working context is run through the base model, and what is kept of it in the cache.

Only entries that are not in the cache are run. Under the exact policy those are all from the first edit on, so that the
logits are those of a forward pass over the cut from scratch; under the approximate policy only the new entries.

Shapes: A sessions of a pass, S entries of a pass, D width.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
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


class Cached(NamedTuple):
    """Entries in the cache, in time order."""

    lod: np.ndarray
    index: np.ndarray
    slot: np.ndarray
    ids: np.ndarray


def _columns(entries: Iterable[tuple[int, ...]]) -> Cached:
    return Cached(*np.fromiter(chain.from_iterable(entries), np.int64).reshape(-1, 4).T.copy())


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
        # entries in the cache, as in `Cached`, by first token; these tokens in order; how many there are at each LOD
        self.entries: dict[int, tuple[int, int, int, int]] = {}
        self.starts: list[int] = []
        self.by_lod: Counter[int] = Counter()
        # flips: else the next pass would take every token from n_read on, all of the history, as new and raw
        self.free_slots, self.focus.flips = list(range(slots)), None
        self.pool.cache.clear(self.row, torch.arange(slots, device=self.pool.device))
        self.last_hidden_D: Tensor | None = None
        self.n_read = 0  # tokens that the cache has seen, as they are or in gists

    @property
    def cached(self) -> Cached:
        return _columns(self.entries[start] for start in self.starts)

    def put(self, entries: Iterable[tuple[int, int, int, int]]) -> None:
        """Into the cache, in time order."""
        for lod, index, slot, token in entries:
            start = index * self.history.block_size**lod
            self.entries[start] = lod, index, slot, token
            insort(self.starts, start)
            self.by_lod[lod] += 1

    def _take_out(self, starts: list[int]) -> None:
        gone = [self.entries.pop(start) for start in starts]
        for start, (lod, *_) in zip(starts, gone):
            del self.starts[bisect_left(self.starts, start)]
            self.by_lod[lod] -= 1
        slots = _columns(gone).slot
        self.free_slots.extend(slots.tolist())
        # what has a position is seen: it would be attended to until its slot is written again
        self.pool.cache.clear(self.row, torch.from_numpy(slots).to(self.pool.device))

    def refocus(self) -> Edits:
        """As `FocusedHistory.refocus`; every entry counts as kept until the next pass says otherwise."""
        try:
            edits = super().refocus()
        except BaseException:  # half an edit: the next one comes first, and is compared
            self.focus.flips, self.asked = None, self.n_tokens > 0
            raise
        self.kept, self.computed = len(self.starts), 0
        return edits

    def missing(self) -> Missing:
        """The entries that are shown and not in the cache, with slots for them; the slots of what
        is no longer shown are free.

        It touches what has changed and what is to be run, however many entries are shown: no array of all of them is
        made, and finding one's place among them is a bisection.
        """
        if not self.n_tokens:
            raise UserError("the session is empty: begin with at least one token")
        gone, come, recut = self._difference()
        first = self._first_to_run(gone, come)
        if gone:  # before slots are taken: an edit of a full row needs those of what it hides
            self._take_out(gone)
        # enough are free: a row holds budget + interval, and a refocus comes before more is read
        self.put((lod, index, self.free_slots.pop(), token) for lod, index, token in come.values())
        run = list(come) if first is None else self.starts[bisect_left(self.starts, first):]
        if (gone or come) and self.starts and run[-1:] != self.starts[-1:]:
            run.append(self.starts[-1])  # it sees all that is new
        if recut:
            self.kept, self.computed = len(self.starts) - len(run), len(run)
        self.n_read = self.n_tokens
        places = [bisect_left(self.starts, start) for start in run]
        lod, index, slot, ids = _columns(self.entries[start] for start in run)
        # of all that is shown: smear and key shift read the entry before, which may be one that is kept
        ahead = _columns(self.entries[self.starts[at - 1]] if at else (1, -1, -1, VOID) for at in places)
        linked, coarse = (lod == 0) & (ahead.lod == 0) & (index == ahead.index + 1), lod > 0
        gists = self.history.gists(torch.from_numpy(lod[coarse]),
                                   torch.from_numpy(index[coarse])) if coarse.any() else None
        return Missing(lod, index, ids, slot, ahead.slot, linked, gists, recut)

    def _difference(self) -> tuple[list[int], dict[int, tuple[int, int, int]], bool]:
        """First tokens of the entries in the cache that are shown no more; lod, index and token id, by first token and
        in time order, of those shown that are not in it; and whether that is more than the tokens appended."""
        K, change = self.history.block_size, self.focus.changes()
        recut = change is None or any(change.values())
        if change is None:
            change = Counter(zip(*(x.tolist() for x in self._shown())))
            change.subtract(entry[:2] for entry in self.entries.values())
        else:
            change.update((0, token) for token in range(self.n_read, self.n_tokens))
        come = {index * K**lod: (lod, index) for (lod, index), sign in change.items() if sign > 0}
        starts, ids = sorted(come), self._ids(*np.array([*come.values()], dtype=np.int64).reshape(-1, 2).T).tolist()
        token = dict(zip(come, ids))
        gone = [index * K**lod for (lod, index), sign in change.items()
                if sign < 0 and self.entries.get(index * K**lod, (None,))[0] == lod]  # void tokens never came
        return gone, {at: (*come[at], token[at]) for at in starts if come[at][0] or token[at] != VOID}, recut

    def _first_to_run(self, gone: list[int], come: dict[int, tuple[int, int, int]]) -> int | None:
        """The token from which on all that is shown is run; None: only what came."""
        if self.pool.config.kv_policy != "exact" or not (gone or come):
            return None
        if self.pool.mc.config.positions == "contiguous":  # the number of entries decides where each stands
            last = self.starts[-1] if self.starts else 0
            if gone or not self.starts or self.entries[last][0] or [*come] != [*range(last + 1, last + 1 + len(come))]:
                return 0
        # a key holds what stood before it: as from scratch only up to the first entry that is new or gone
        return min([*gone, *come])
