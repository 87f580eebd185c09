"""What a session shows now: a history with the cut of it that stands for all of it, chosen anew at each refocus.

A refocus scores blocks of the whole history by the last tokens (`mc.session.key_search`), prices them
(`mc.session.price`) and edits the cut on a few nodes (`mc.session.refocus`). Tokens that do not fill a block yet wait
in `pending`; those that came since the last refocus are shown raw.

Shapes: W entries of a cut, D width, N blocks.
"""

import time
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc.focus_allocator import utilization
from mc.lensnet import LOCAL_MEAN, RERANKED
from mc.session.key_search import KeySearch
from mc.session.price import next_shift, room
from mc.session.refocus import Edits, PathEdits
from mc.store.catalog import Catalog
from mc.store.history import History
from mc.store.ram import VOID, Store
from nanochat.common import UserError


class Shown(NamedTuple):
    """A line of `Session.explain`: one gist, the raw tokens of one block, or a span that is left out."""

    start: int
    tokens: int
    entries: int  # 0: left out
    lod: int | None  # None: left out
    score: float | None  # of the last refocus, relative to the price; None: not scored
    why: str


class Status(NamedTuple):
    history_tokens: int
    entries_by_lod: dict[int, int]
    refocused_at: int  # tokens of history at the last refocus
    last_edits: Edits
    omitted_tokens: int = 0  # of the history, in no entry


class FocusedHistory:
    """A history that grows, and what of it is shown: nothing here runs the base model or knows its cache.

    pool: the `SessionPool`, for its models, settings and timing.
    """

    recut: bool  # what is shown has changed by more than the tokens appended

    def __init__(self, pool: Any, store: Store, seed: int, catalog: Catalog | None):
        self.pool, self.seed, self.catalog = pool, seed, catalog
        self.history = History(pool.gpt, pool.mc, store)
        self.pending: list[int] = []

    def _restart(self, focus: PathEdits) -> None:
        self.search = KeySearch(self.pool.mc.lensnet, self.history.keys)
        self.search.grow(self.history.store.n_nodes(1))
        self.focus, self.scores, self.last_edits, self.price_shift = focus, {}, Edits(), 0.0
        self.cut_lod, self.cut_index, self.cut_tokens = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 0
        # a store may bring a history, whose end nobody has looked at
        self.asked = self.n_tokens > 0  # appended to since the last refocus
        self.refocus_seconds = 0.0  # since the last report of a refocus

    # -- the history ----------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        return self.history.n_tokens + len(self.pending)

    def end_source(self) -> None:
        """What is appended next is another document, and starts a block of its own."""
        self.flush()
        self.asked = self.recut = True  # void slots are not numbered under contiguous positions
        self.history.end_source()
        self.search.grow(self.history.store.n_nodes(1))

    def flush(self) -> None:
        """Store the generated tokens that still wait for their block to be complete."""
        self._store(torch.empty(0, dtype=torch.int64))

    def _store(self, ids_N: Tensor) -> None:
        """The tokens that wait, and these, into the history."""
        before, asked = self.history.n_tokens, self.asked or len(ids_N) > 0
        try:
            self.history.append(torch.cat([torch.tensor(self.pending, dtype=torch.int64), ids_N]))
        finally:
            # interrupted, what was stored waits no longer: no token is stored twice
            stored = self.history.n_tokens - before
            self.pending, self.asked = self.pending[stored:], asked if stored else self.asked
        self.search.grow(self.history.store.n_nodes(1))

    def ingest(self, tokens: list[int]) -> None:
        """Generated tokens: part of the history at once, stored when they complete a block."""
        self.pending += tokens
        # by the block, for every append to a store is a commit
        if self.n_tokens // self.history.block_size > self.history.n_tokens // self.history.block_size:
            with self.pool.timing("ingest"):
                self.flush()

    def _tail(self) -> Tensor:
        """[1, ≤ tail, D] embeddings of the last tokens, as the lens reads them."""
        # more than the lens sums up: the query of the tail's first token averages those before it
        count = self.pool.mc.lensnet.config.tail + LOCAL_MEAN
        stored = torch.arange(max(self.n_tokens - count, 0), self.history.n_tokens)
        ids = torch.cat([self.history.tokens(stored),
                         torch.tensor(self.pending, dtype=torch.int64)])[-count:].to(self.pool.device)
        return (self.pool.gpt.embed(ids.clamp_min(0)) * (ids != VOID)[:, None])[None]

    def _ids(self, lod: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Token ids of raw entries; VOID for gists, and where a source has ended."""
        ids, stored = np.full_like(lod, VOID), self.history.n_tokens
        early, late = (lod == 0) & (index < stored), (lod == 0) & (index >= stored)
        ids[early] = self.history.tokens(torch.from_numpy(index[early])).numpy()
        ids[late] = np.array(self.pending, dtype=np.int64)[index[late] - stored]
        return ids

    # -- choosing ----------------------------------------------------------------------

    def refocus(self) -> Edits:
        """Choose anew what is shown, by the last tokens. Costs only its scoring when nothing changes."""
        if not self.n_tokens:
            raise UserError("nothing to focus on: the session is empty")
        self.ingest([])  # both do nothing, unless an append was interrupted
        self.search.grow(self.history.store.n_nodes(1))
        timing, focus, c, begin = self.pool.timing, self.focus, self.pool.focus_config, time.perf_counter()
        with timing("lens"):
            blocks = self.history.store.n_nodes(1)
            # what may start expanded: without a score it would be the first to be collapsed
            fresh = range(max(blocks - c.budget // c.block_size - 1, 0), blocks)
            also = sorted({index for lod, index in focus.expanded if lod == 1} | set(fresh))
            index_N, logits_N = torch.empty(0, dtype=torch.int64), torch.empty(0)
            if blocks:
                reader, count = self.pool.mc.lensnet.reader, self.pool.config.candidates
                with torch.inference_mode():
                    index_N, logits_N = self.search.top(self._tail(), self.n_tokens, count if reader is None
                                                        else max(count, RERANKED), torch.tensor(also))
                    if reader is not None:
                        logits_N = self._reread(reader, index_N, logits_N)
        with timing("allocator"):
            # in this order: advance closes what is pruned, and the price is that of the room after it
            focus.pruned = set(index_N[~self.history.store.has_detail(index_N)].tolist()) if blocks else set()
            logits = dict(zip(index_N.tolist(), logits_N.tolist()))
            focus.advance(self.n_tokens, set(logits))
            self.scores = self._scores(logits)
            self.last_edits = edits = focus.refocus(self.scores)
            self.price_shift = float(next_shift(torch.tensor(self.price_shift, dtype=torch.float64),
                                                torch.tensor(self.utilization)))
            before, after = self._shown(), focus.cut()
            # or: a refocus before this one may have changed something that no pass has run yet
            self.recut |= not all(map(np.array_equal, before, after))
            (self.cut_lod, self.cut_index), self.cut_tokens = after, focus.n_tokens
            if self.catalog:
                self.catalog.count_access(torch.from_numpy(self.cut_lod), torch.from_numpy(self.cut_index))
        # last: after an append, a refocus that failed is still due
        self.asked = False
        self.refocus_seconds += time.perf_counter() - begin
        return edits

    def _reread(self, reader: torch.nn.Module, index_N: Tensor, logits_N: Tensor) -> Tensor:
        """[N] the logits of blocks after the lens's reader has seen them together, with the nodes above them."""
        store, c, device = self.history.store, self.pool.focus_config, self.pool.device
        nodes = {1: index_N}
        for lod in range(2, c.max_lod + 1):
            above = (index_N // c.block_size ** (lod - 1)).unique()
            # what is not complete has no gist yet
            nodes[lod] = above[above < store.n_nodes(lod)]
        lod_E = torch.cat([torch.full_like(index, lod) for lod, index in nodes.items()])
        index_E = torch.cat([*nodes.values()])
        tail_TD = self._tail()[0, -reader.recent:]
        cursor_BQ = torch.tensor([[self.n_tokens]], device=device)
        gists_ED = self.history.gists(lod_E, index_E).to(device)
        return reader(logits_N.to(device)[None, None], tail_TD[None, None], cursor_BQ, gists_ED[None],
                      lod_E.to(device), index_E.to(device))[0, 0].cpu()

    def _shown(self) -> tuple[np.ndarray, np.ndarray]:
        """(lod, index) of all that is shown: the cut, and the tokens since."""
        new = np.arange(self.cut_tokens, self.n_tokens)
        return np.concatenate([self.cut_lod, np.zeros_like(new)]), np.concatenate([self.cut_index, new])

    def _scores(self, logits: dict[int, float]) -> dict[int, float]:
        """Focus scores in [−1, 1]."""
        focus, n_B = self.focus, torch.tensor([self.focus.n_tokens])
        # the tail is shown at any price, a pruned block at none: neither may set it
        fixed = torch.tensor(sorted({*focus.tail_blocks(), *focus.pruned}), dtype=torch.int64)
        index_BI, logits_BI = torch.tensor([list(logits)], dtype=torch.int64), torch.tensor([list(logits.values())],
                                                                                            dtype=torch.float64)
        room_B = torch.tensor([focus.room]) if focus.omits else room(n_B, focus.cfg)
        scores_BI = self.pool.allocator.scores(
            logits_BI, index_BI, ~torch.isin(index_BI, fixed), room_B,
            torch.tensor([self.price_shift], dtype=torch.float64),
            rows_B=torch.zeros(1, dtype=torch.int64), seed=self.seed, refocus=focus.refocuses)
        return dict(zip(logits, scores_BI[0].tolist()))

    @property
    def utilization(self) -> float:
        """Of the cut that the last refocus left, see `mc.focus_allocator.utilization`; where spans are left out of
        blocks alone, gists filling up."""
        if self.focus.omits:
            return self.focus.utilization
        return float(utilization(torch.tensor([self.focus.entries]), torch.tensor([self.focus.n_tokens]),
                                 self.focus.cfg))

    @property
    def due(self) -> bool:
        """Whether a refocus comes before the next token."""
        return self.asked or self.n_tokens - self.cut_tokens >= self.pool.interval

    # -- what is shown ------------------------------------------------------------------

    def status(self) -> Status:
        return Status(self.n_tokens, dict(sorted(Counter(self._shown()[0].tolist()).items())), self.focus.n_tokens,
                      self.last_edits, self.omitted_tokens)

    @property
    def omitted_tokens(self) -> int:
        """Tokens of the history that no entry stands for since the last refocus: they are searched, and
        shown when they are asked for."""
        return self.cut_tokens - int((self.history.block_size ** self.cut_lod).sum())

    def explain(self) -> list[Shown]:
        """The history as a table: every gist, the raw tokens block by block, and the spans that are left
        out, each token in one line."""
        K, focus, lines, end = self.history.block_size, self.focus, [], 0
        for at, i in zip(*(x.tolist() for x in self._shown())):
            start, block = i * K ** at, i if at == 1 else i // K
            if start > end:
                lines.append(Shown(end, start - end, 0, None, None,
                                   "left out: no entry has room for it; searched at every refocus"))
            end = start + K ** at
            # a coarser gist stands for many blocks: the score of one would not be its own
            score = self.scores.get(block) if at < 2 else None
            if at == 0 and lines and lines[-1].lod == 0 and lines[-1].start // K == block:
                lines[-1] = lines[-1]._replace(tokens=lines[-1].tokens + 1, entries=lines[-1].entries + 1)
                continue
            if at == 0:
                recent = start + K > focus.n_tokens - focus.cfg.recent
                why = ("recent tokens" if recent else "detail the lens asks for" if score is not None
                       and score > 0 else "detail, until something else needs its place")
            elif at == 1 and block in focus.pruned:
                why = "gist: its tokens were pruned"
            else:
                why = f"gist of LOD{at}, which was not trained" if at in self.pool.untrained else "gist"
            lines.append(Shown(start, K ** at, 1, at, score, why))
        return lines
