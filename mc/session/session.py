"""Inference over a history that never ends: constant time per token and constant device memory.

    pool = SessionPool(gpt, mc, SessionConfig(), trained_lods=[1, 2])
    session = pool.open()
    session.begin(tokens)                      # any length; append more at any time
    for token in session.generate(100): ...

The order is always: ingest (user's or generated tokens alike), refocus if due, decode. A refocus is due after a user's
append and before the first token that is generated then, so that the question is seen, and every `interval` tokens. It
scores blocks of the whole history by the last tokens (`mc.session.key_search`), edits the cut on a few nodes
(`mc.session.refocus`) and leaves the rest to the next
pass: only entries that are not in the cache are run. Under the exact policy those are all from the first edit on, so
that the logits are those of a forward pass over the cut from scratch; under the
approximate policy only the new entries.

No session ends because of its length: where the budget no longer tiles the history, spans of it are left out of the
working context (`mc.session.refocus`); `explain`, `status` and the metrics name them, the search covers them, and the
lens can have any of their blocks shown.

Entries before the continuation stay within the budget, and at most `interval` tokens are read between two refocuses: a
row of the cache holds budget + interval slots, whatever the length of the history. Tokens that do not fill
a block yet wait in `pending`.

Shapes: A sessions of a pass, S entries of a pass, W entries of a cut, D width, V vocabulary, N tokens or blocks.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mc.focus_allocator import FocusConfig, check_budget
from mc.gaussian_rope import entry_rotary
from mc.model import MegaContext, load_mega_context
from mc.session.config import SessionConfig
from mc.session.entries import FIELDS, CachedHistory, Missing, table_of
from mc.session.meter import SessionMeter, Timing
from mc.session.price import Allocator
from mc.session.refocus import PathEdits
from mc.session.slot_cache import NOWHERE, PagedCache, Placement
from mc.session.state import SessionState, check_fits, put_back, take_state
from mc.store.catalog import Catalog
from mc.store.history import check_sessions, store_format
from mc.store.ram import RamStore, Store
from nanochat.common import UserError
from nanochat.engine import check_sampling, sample
from nanochat.gpt import GPT
from nanochat.telemetry.recorder import Recorder


class SessionPool:
    """One model and the device memory of up to `max_sessions` sessions that share it.

    trained_lods: levels of gists that the model was trained on, as its checkpoint says. recorder: gets what
    `mc.session.meter` reports of every session. UserError for settings that cannot work.
    """

    def __init__(self, gpt: GPT, mc: MegaContext, config: SessionConfig = SessionConfig(), *,
                 trained_lods: Sequence[int], max_sessions: int = 1,
                 recorder: Recorder | None = None):
        check_sessions(mc)
        c = mc.config
        self.gpt, self.mc, self.config, self.max_sessions = gpt.eval(), mc.eval(), config, max_sessions
        self.device, self.dtype = gpt.lm_head.weight.device, gpt.lm_head.weight.dtype
        self.interval = config.interval or c.block_size
        self.untrained = [lod for lod in range(1, c.max_lod + 1) if lod not in trained_lods]
        # up to the first gap: a node that is opened shows the level below it
        max_lod = c.max_lod if config.untrained == "report" or not self.untrained else self.untrained[0] - 1
        if max_sessions < 1:
            raise UserError(f"max_sessions {max_sessions}: at least 1")
        if max_lod < 1:
            raise UserError("the model was trained on no level of gists; train it on longer rows, or show them all the "
                            "same with --mc_untrained=report")
        if config.kv_policy == "approximate" and c.positions == "contiguous":
            raise UserError(
                "--mc_kv_policy=approximate: with --mc_positions=contiguous an edit moves every entry; use exact")
        self.allocator = Allocator.parse(config.allocator)
        self.focus_config = FocusConfig(
            config.budget or c.budget, c.block_size, max_lod, recent=c.protected, tau_expand=config.tau_expand,
            tau_collapse=config.tau_collapse, margin=config.margin, max_edits=config.max_edits,
            cooldown=config.cooldown, span=self.allocator.span)
        check_budget(self.focus_config)
        slots = self.focus_config.budget + self.interval
        if min(gpt.config.windows()) < min(slots, gpt.config.sequence_len):
            raise UserError(f"window_pattern {gpt.config.window_pattern}: its short layers see "
                            f"{min(gpt.config.windows())} of {slots} entries; use a model with L only")
        self.cache = PagedCache(gpt.config, max_sessions, slots, self.device, self.dtype)
        self.sessions: dict[int, Session] = {}
        self.recorder = recorder
        self.timing = Timing()

    @property
    def fingerprint(self) -> str:
        """Of all weights and settings, base and MegaContext."""
        focus = list(asdict(self.focus_config).items())
        # a setting that is gone: states from when it was there still load
        focus.insert(3, ("soft_budget", self.focus_config.budget))
        digest = hashlib.sha256(repr((asdict(self.gpt.config), asdict(self.mc.config), dict(focus))).encode())
        for module in (self.gpt, self.mc):
            for name, tensor in sorted(module.state_dict().items()):
                # as bytes: numpy has no bfloat16
                digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def pass_bytes(self) -> int:
        """Bytes that the longest pass needs for its entries, from shapes: vectors, rotary tables, mask
        and integers of a full cache."""
        size, slots, g = torch.finfo(self.dtype).bits // 8, self.cache.slots, self.gpt.config
        return self.max_sessions * slots * (size * (g.n_embd + g.head_dim + slots) + 8 * len(FIELDS))

    def open(self, store: Store | None = None, *, seed: int = 0, catalog: Catalog | None = None) -> "Session":
        """A session on a store, with what it holds as history; default: an empty one in memory. seed: of its draws, of
        tokens and of the allocator's noise; sessions of one seed draw alike. catalog: counts
        at each refocus what is shown.

        UserError when all places are taken, or the store's history is not the model's.
        """
        row = next((row for row in range(self.max_sessions) if row not in self.sessions), None)
        if row is None:
            raise UserError(f"all {self.max_sessions} sessions of this pool are in use; close one, or make a pool with "
                            "a larger max_sessions")
        session = Session(self, row, store or RamStore(store_format(self.gpt, self.mc)), seed, catalog)
        self.sessions[row] = session
        return session

    def restore(self, state: SessionState, store: Store | None = None, *, catalog: Catalog | None = None) -> "Session":
        """The session that `state` was taken of, in a free place. store: its history, unless that was in memory.

        UserError for the state of another model, version or configuration, or a store that is
        not at the moment of the state.
        """
        check_fits(state, self, store)
        meta, tensors = state
        session = self.open(store, catalog=catalog)
        try:
            if store is None:
                session.history.fill(tensors["history"])
            put_back(session, session.generator, meta, tensors)
        except BaseException:
            # else its place would stay taken by a session that nobody holds
            session.close()
            raise
        return session

    # -- the base model ---------------------------------------------------------------------------------------------------  # noqa: E501

    @torch.inference_mode()
    def catch_up(self, sessions: Sequence["Session"]) -> list[Tensor]:
        """Run every entry that is shown and not in the cache. Hidden states [S, D] of
        those entries for each session."""
        self.check_open(sessions)
        # by row: where a pass runs all rows, the cache gives its buffers as they stand, without a copy
        order = sorted(range(len(sessions)), key=lambda i: sessions[i].row)
        begin = time.perf_counter()
        try:
            work = [sessions[i].missing() for i in order]
            counts = [len(w.lod) for w in work]
            hidden_ASD = torch.empty(len(order), 0, self.gpt.config.n_embd, device=self.device)
            if any(counts):
                with self.timing("refill" if any(w.recut for w in work) else "base"):
                    hidden_ASD = self._run([sessions[i] for i in order], work, max(counts))
        except BaseException:
            # `missing` has entered as cached what was never run, or only in part
            for session in sessions:
                session.forget_cache()
            raise
        out: list[Tensor] = [hidden_ASD] * len(sessions)
        for place, i in enumerate(order):
            out[i] = hidden_ASD[place, :counts[place]]
            if counts[place]:
                # a copy: a view would hold the hidden states of the whole pass
                sessions[i].last_hidden_D = out[i][-1].clone()
            # with nothing run, too: what follows is no part of this refocus
            sessions[i].report_refocus(time.perf_counter() - begin)
        return out

    def step(self, sessions: Sequence["Session"], temperature: float = 1.0, top_k: int | None = None,
             top_p: float = 1.0) -> list[int]:
        """One step of `generate`: the next token of each session, drawn by its own generator, and
        part of its history afterwards."""
        for session in sessions:
            if session.due:
                session.refocus()
        self.catch_up(sessions)
        with self.timing("base"), torch.inference_mode():
            logits_AV = self.gpt.logits(torch.stack([session.last_hidden_D for session in sessions]))
            if temperature == 0:
                tokens = logits_AV.argmax(-1).tolist()
            else:
                # one by one, each with its own generator: the sessions beside it do not matter
                tokens = [int(sample(logits_AV[i:i + 1], temperature, top_k, session.generator, top_p))
                          for i, session in enumerate(sessions)]
        for session, token in zip(sessions, tokens):
            session.ingest([token])
        return tokens

    def generate(self, sessions: Sequence["Session"], max_tokens: int, *, temperature: float = 1.0,
                 top_k: int | None = None,
                 top_p: float = 1.0, seed: int | None = None,
                 stop_ids: Sequence[int] = ()) -> Iterator[list[int | None]]:
        """Per step, each session's new token, None for those that have stopped; sampling as
        `nanochat.engine.Engine.generate`.

        seed: start every session's draws anew; None: go on with them. A session's tokens do not depend on those beside
        it. UserError, before anything runs, as the engine, and for an empty session.
        """
        # here, for the body of `_stream` begins only when the first token is asked for
        check_sampling(self.gpt.config.vocab_size, max_tokens, temperature, top_k, stop_ids, top_p)
        self.check_open(sessions)
        for session in sessions:
            if not session.n_tokens:
                raise UserError("the session is empty: begin with at least one token (bos, for text from nothing)")
        for session in sessions if seed is not None else ():
            session.generator.manual_seed(seed)
        return self._stream(list(sessions), max_tokens, temperature, top_k, top_p, frozenset(stop_ids))

    def check_open(self, sessions: Sequence["Session"]) -> None:
        if not sessions:
            raise UserError("no session was given to decode")
        if len({session.row for session in sessions}) != len(sessions) or any(self.sessions.get(s.row) is not s
                                                                              for s in sessions):
            raise UserError("a session takes part once, and only in its own pool until it is closed")

    def _stream(self, sessions: list["Session"], max_tokens: int, temperature: float, top_k: int | None, top_p: float,
                stop_ids: frozenset[int]) -> Iterator[list[int | None]]:
        running, began = list(range(len(sessions))), time.perf_counter()
        for left in range(max_tokens, 0, -1):
            begin = time.perf_counter()
            drawn = dict(zip(running, self.step([sessions[i] for i in running], temperature, top_k, top_p)))
            going_on = [i for i in running if drawn[i] not in stop_ids and left > 1]
            for i in running if self.recorder else ():
                sessions[i].meter.decoded(time.perf_counter() - begin)
                # before the token is given out: after the last one nobody needs to come back
                if i not in going_on:
                    sessions[i].meter.finished(began, sessions[i].n_tokens)
            yield [drawn.get(i) for i in range(len(sessions))]
            running = going_on
            if not running:
                return

    def _run(self, sessions: list["Session"], work: list["Missing"], S: int) -> Tensor:
        """Hidden states [A, S, D] of the entries to run, rows padded at their end, through the cache."""
        table = table_of(work, S, self.cache.spare)
        lod_AS, index_AS, ids_AS, slot_AS, before_AS, linked_AS = torch.from_numpy(table).to(self.device)
        rows_A = torch.tensor([s.row for s in sessions], device=self.device)
        c, gists = self.mc.config, [(row, w) for row, w in enumerate(work) if w.gists is not None]
        if not gists and c.positions != "contiguous":  # tokens only: as in the base
            centre_AS, bias_AS, embeds_ASD = index_AS.double(), torch.zeros_like(index_AS, dtype=self.dtype), None
            rotary = self.gpt.rotary(index_AS)
            # padding has no id; any will do, for nobody sees its slot
            ids_AS = ids_AS.clamp_min(0)
        else:
            length_AS = c.block_size ** lod_AS * (slot_AS != self.cache.spare)
            start_AS = index_AS * c.block_size ** lod_AS
            centre_AS = start_AS + (length_AS - 1).double() / 2
            bias_AS, embeds_ASD = self.mc.key_bias(lod_AS).to(self.dtype), self.gpt.embed(ids_AS.clamp_min(0))
            for row, w in gists:
                at = torch.from_numpy(np.flatnonzero(w.lod)).to(self.device)
                embeds_ASD[row, at] = w.gists.to(self.device)
            rotary = entry_rotary(self.gpt, start_AS, length_AS, scheme=c.positions, floor=c.damping_floor)
        centre_AS = torch.where(slot_AS == self.cache.spare, NOWHERE, centre_AS)
        self.cache.place(Placement(rows_A, slot_AS, before_AS, centre_AS, bias_AS))
        return self.gpt.hidden(ids_AS, inputs_embeds=embeds_ASD, rotary=rotary, linked=linked_AS.bool(),
                               cache=self.cache, lift_windows=True)


def open_pool(gpt: GPT, meta: dict, checkpoint_dir: Path | str, config: SessionConfig, max_sessions: int = 1,
              recorder: Recorder | None = None) -> SessionPool:
    """A pool for a model that `nanochat.loading` has loaded from checkpoint_dir; UserError
    when it has no MegaContext."""
    mc = load_mega_context(checkpoint_dir, meta["step"], meta, gpt.config.n_embd, gpt.lm_head.weight.device)
    return SessionPool(gpt, mc, config, trained_lods=meta["mc"]["trained_lods"], max_sessions=max_sessions,
                       recorder=recorder)


class Session(CachedHistory):
    """One history and its working context. Made by `SessionPool.open`; methods raise UserError
    and then have changed nothing."""

    def __init__(self, pool: SessionPool, row: int, store: Store, seed: int, catalog: Catalog | None):
        super().__init__(pool, row, store, seed, catalog)
        self.generator = torch.Generator(pool.device).manual_seed(seed)
        self._restart(PathEdits(pool.focus_config))
        self.meter = SessionMeter(pool.recorder, pool.focus_config.cooldown) if pool.recorder else None

    def begin(self, tokens: Sequence[int] | Tensor) -> None:
        """The start of an empty session's history."""
        if self.n_tokens:
            raise UserError(f"the session has begun, with {self.n_tokens} tokens; append to it")
        if not len(tokens):
            raise UserError("an empty history: begin with at least one token (bos, for text from nothing)")
        self.append(tokens)

    def append(self, tokens: Sequence[int] | Tensor) -> None:
        """The user's next tokens, any number: stored with every node they complete; nothing
        is run through the base yet."""
        ids_N = torch.as_tensor(tokens, dtype=torch.int64).cpu()
        if not len(ids_N):
            return
        begin = time.perf_counter()
        self._store(ids_N)
        if self.meter:
            self.meter.ingested(len(ids_N), time.perf_counter() - begin, self.n_tokens)

    def report_refocus(self, pass_seconds: float) -> None:
        """Tell the meter of a refocus whose pass, if it needed one, has just run."""
        if self.meter and self.refocus_seconds:
            lods = self.status().entries_by_lod
            raw = sum(lod == 1 for lod, _ in self.focus.expanded)
            self.meter.refocused(
                self.focus.refocuses, self.last_edits, seconds=self.refocus_seconds + pass_seconds,
                entries_by_lod=lods, omitted=self.omitted_tokens, swappable=raw + lods.get(1, 0),
                utilization=self.utilization, kv_kept=self.kept, kv_recomputed=self.computed,
                store_reads=self.history.reads)
            self.history.reads = 0
        self.refocus_seconds = 0.0

    def generate(self, max_tokens: int, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
                 seed: int | None = None, stop_ids: Sequence[int] = ()) -> Iterator[int]:
        """The next tokens, one by one, each part of the history when it is given out; as `SessionPool.generate`."""
        steps = self.pool.generate([self], max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                                   stop_ids=stop_ids)
        return (token for (token,) in steps)

    def logits(self) -> Tensor:
        """[V] of the next token, given all that has come; after a refocus if one is due."""
        if self.due:
            self.refocus()
        self.pool.catch_up([self])
        with torch.inference_mode():
            return self.pool.gpt.logits(self.last_hidden_D)

    def score(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """[N, V] logits at which each of these tokens would have been drawn, read as if they were generated: with a
        refocus first if the user has appended, and then every `interval` tokens. They are history afterwards."""
        left, parts = torch.as_tensor(tokens, dtype=torch.int64).cpu(), []
        self.history.check_ids(left)
        while len(left):
            parts.append(self.logits()[None])
            # what comes after the next refocus is read by another cut
            piece = left[:self.pool.interval - (self.n_tokens - self.cut_tokens)]
            left = left[len(piece):]
            self.ingest(piece.tolist())
            (hidden_SD,) = self.pool.catch_up([self])
            with torch.inference_mode():
                # the piece's own: more is run where void slots moved what stood before. The last one's are the next
                # piece's first: a refocus may come before them
                parts.append(self.pool.gpt.logits(hidden_SD[-len(piece):][:-1]))
        return torch.cat(parts) if parts else torch.empty(0, self.pool.gpt.config.vocab_size, device=self.pool.device)

    def close(self) -> None:
        """Give the place in the pool back. Does nothing the second time."""
        if self.pool.sessions.get(self.row) is self:
            self.forget_cache()
            del self.pool.sessions[self.row]

    def state(self) -> SessionState:
        """All that continues the session elsewhere. A history in memory is part of it; one on
        disk is named by its length."""
        return take_state(self, self.generator)
