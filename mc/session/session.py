"""Inference over a history that never ends: constant time per token and constant device memory.

    pool = SessionPool(gpt, mc, SessionConfig(), trained_lods=[1, 2])
    session = pool.open()
    session.begin(tokens)                      # any length; append more at any time
    for token in session.generate(100): ...

The order is always: ingest (user's or generated tokens alike), refocus if due, decode. A refocus is due after a user's append and
before the first token that is generated then, so that the question is seen, and every `interval` tokens. It scores blocks of the
whole history by the last tokens (`mc.session.key_search`), edits the cut on a few nodes (`mc.session.refocus`) and leaves the rest to the next
pass: only entries that are not in the cache are run. Under the exact policy those are all from the first edit on, so that the
logits are those of a forward pass over the cut from scratch; under the approximate policy only the new entries.

No session ends because of its length: where the budget no longer tiles the history, spans of it are left out of the working context
(`mc.session.refocus`); `explain`, `status` and the metrics name them, the search covers them, and the lens can have any of their blocks shown.

Entries before the continuation stay within the budget, and at most `interval` tokens are read between two refocuses: a row of the
cache holds budget + interval slots, whatever the length of the history. Tokens that do not fill a block yet wait in `pending`.

Shapes: A sessions of a pass, S entries of a pass, W entries of a cut, D width, V vocabulary, N tokens or blocks.
"""

import argparse
import hashlib
import json
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mc.config import setting
from mc.focus_allocator import FocusConfig, check_budget, utilization
from mc.gaussian_rope import entry_rotary
from mc.lensnet import LOCAL_MEAN, RERANKED
from mc.model import MegaContext, load_mega_context
from mc.session.key_search import KeySearch
from mc.session.meter import SessionMeter
from mc.session.price import Allocator, next_shift, room
from mc.session.refocus import Edits, PathEdits
from mc.session.slot_cache import NOWHERE, PagedCache, Placement
from mc.session.state import check_cache, check_entries, check_focus, check_history, check_meta
from mc.store.catalog import Catalog
from mc.store.history import History, check_sessions, store_format
from mc.store.ram import VOID, RamStore, Store
from nanochat.common import UserError, one_line, parse_json
from nanochat.engine import check_sampling, sample
from nanochat.gpt import GPT
from nanochat.outputs import replacing
from nanochat.telemetry.recorder import Recorder

STATE_VERSION = 2


@dataclass(frozen=True)
class SessionConfig:
    """Settings of inference; the commands that hold a session have them as flags `--mc_…`."""

    budget: int = setting(0, "W: entries of the working context, tokens since the last refocus apart; 0: as trained")
    interval: int = setting(0, "tokens between two refocuses; 0: the block size")
    kv_policy: str = setting("exact", "after an edit: run everything behind it again, or (approximate) the new entries only", ("exact", "approximate"))
    untrained: str = setting("refuse", "levels of gists that were not trained: refuse to show them, leaving out what only they could show, or show and report them", ("refuse", "report"))
    candidates: int = setting(32, "blocks that the search of the history proposes at a refocus")
    allocator: str = setting("greedy", "how detail is chosen: greedy; bundle:BLOCKS, one edit shows up to so many adjacent blocks; stochastic:TEMPERATURE, with noise; threshold:a,b,c, a learned price")
    price: str = setting("adaptive", "price of an entry: what just fits the budget, or (adaptive) falling from there until the budget is used", ("market", "adaptive"))
    max_edits: int = setting(4, "path edits per refocus")
    cooldown: int = setting(2, "refocuses during which an edit is not reversed")
    tau_expand: float = setting(0.2, "a block is shown above this score")
    tau_collapse: float = setting(0.2, "a node is hidden below minus this score")
    margin: float = setting(0.2, "what pays for a block scores lower than it by more than this")

    def __post_init__(self):
        for f in fields(self):
            if (choices := f.metadata["choices"]) and getattr(self, f.name) not in choices:
                raise UserError(f"--mc_{f.name}={getattr(self, f.name)}: use one of {', '.join(choices)}")
        for name, least in dict(budget=0, interval=0, candidates=1).items():
            if getattr(self, name) < least:
                raise UserError(f"--mc_{name}={getattr(self, name)} must be at least {least}")
        Allocator.parse(self.allocator)


def add_flags(parser: argparse.ArgumentParser, **defaults) -> None:
    """Flags `--mc_…` of all settings; `defaults` where a command has others."""
    group = parser.add_argument_group("the session")
    for f in fields(SessionConfig):
        group.add_argument(f"--mc_{f.name}", type=type(f.default), default=defaults.get(f.name, f.default), choices=f.metadata["choices"], help=f.metadata["help"])


def from_flags(args: argparse.Namespace, **changes) -> SessionConfig:
    return SessionConfig(**{f.name: getattr(args, f"mc_{f.name}") for f in fields(SessionConfig)} | changes)


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


class SessionState(NamedTuple):
    """All of a session that a pool does not know: plain values, and tensors by name. The history itself only if it is in memory."""

    meta: dict
    tensors: dict[str, Tensor]

    def save(self, path: Path | str) -> None:
        """Write as safetensors, in place of what is there, whole or not at all. UserError where that fails."""
        with replacing(path, SafetensorError) as part:
            about = {"session": json.dumps(self.meta), "crc": self.checksum()}
            save_file({name: t.contiguous() for name, t in self.tensors.items()}, part, about)

    def checksum(self) -> str:
        """CRC-32 of values and tensors: a flipped bit in a key or value of the cache has no other sign."""
        crc = zlib.crc32(json.dumps(self.meta).encode())
        for name, t in sorted(self.tensors.items()):
            whole = t.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()  # of one element, `contiguous` leaves any stride
            crc = zlib.crc32(whole.view(torch.uint8).numpy(), zlib.crc32(repr((name, t.dtype, tuple(t.shape))).encode(), crc))
        return f"{crc:08x}"

    @staticmethod
    def load(path: Path | str) -> "SessionState":
        """UserError for a file that is not there or is no session's state."""
        try:
            with safe_open(path, "pt") as f:
                about = f.metadata() or {}
                state = SessionState(parse_json(about["session"]), {name: f.get_tensor(name) for name in f.keys()})
            if about.get("crc", state.checksum()) != state.checksum():  # states of earlier versions have none
                raise ValueError("it does not match its checksum")
            return state
        except OSError as e:
            raise UserError(f"cannot read the session state {path}: {e.strerror or e}") from None
        except (SafetensorError, KeyError, ValueError) as e:
            raise UserError(f"{path} holds no session state ({type(e).__name__}: {e})") from None


FIELDS = {"lod": 0, "index": 0, "ids": VOID, "slot": -1, "before": -1, "linked": 0}  # of entries to be run, with what pads them
FIELD_SLOT = list(FIELDS).index("slot")


class Timing:
    """Seconds by part. `synchronize`: wait for the device at each end, so that times belong to their part (benchmarks only)."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self.synchronize = False

    @contextmanager
    def __call__(self, part: str):
        start = self._now()
        yield
        self.seconds[part] += self._now() - start

    def _now(self) -> float:
        if self.synchronize and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class SessionPool:
    """One model and the device memory of up to `max_sessions` sessions that share it.

    trained_lods: levels of gists that the model was trained on, as its checkpoint says. recorder: gets what `mc.session.meter`
    reports of every session. UserError for settings that cannot work.
    """

    def __init__(self, gpt: GPT, mc: MegaContext, config: SessionConfig = SessionConfig(), *, trained_lods: Sequence[int], max_sessions: int = 1,
                 recorder: Recorder | None = None):
        check_sessions(mc)
        c = mc.config
        self.gpt, self.mc, self.config, self.max_sessions = gpt.eval(), mc.eval(), config, max_sessions
        self.device, self.dtype = gpt.lm_head.weight.device, gpt.lm_head.weight.dtype
        self.interval = config.interval or c.block_size
        self.untrained = [lod for lod in range(1, c.max_lod + 1) if lod not in trained_lods]
        max_lod = c.max_lod if config.untrained == "report" or not self.untrained else self.untrained[0] - 1
        if max_sessions < 1:
            raise UserError(f"max_sessions {max_sessions}: at least 1")
        if max_lod < 1:
            raise UserError("the model was trained on no level of gists; train it on longer rows, or show them all the same with --mc_untrained=report")
        if config.kv_policy == "approximate" and c.positions == "contiguous":
            raise UserError("--mc_kv_policy=approximate: with --mc_positions=contiguous an edit moves every entry; use exact")
        self.allocator = Allocator.parse(config.allocator)
        self.focus_config = FocusConfig(
            config.budget or c.budget, c.block_size, max_lod, recent=c.protected, tau_expand=config.tau_expand,
            tau_collapse=config.tau_collapse, margin=config.margin, max_edits=config.max_edits, cooldown=config.cooldown, span=self.allocator.span)
        check_budget(self.focus_config)
        slots = self.focus_config.budget + self.interval
        if min(gpt.config.windows()) < min(slots, gpt.config.sequence_len):
            raise UserError(f"window_pattern {gpt.config.window_pattern}: its short layers see {min(gpt.config.windows())} of {slots} entries; use a model with L only")
        self.cache = PagedCache(gpt.config, max_sessions, slots, self.device, self.dtype)
        self.sessions: dict[int, Session] = {}
        self.recorder = recorder
        self.timing = Timing()

    @property
    def fingerprint(self) -> str:
        """Of all weights and settings, base and MegaContext."""
        digest = hashlib.sha256(repr((asdict(self.gpt.config), asdict(self.mc.config), asdict(self.focus_config))).encode())
        for module in (self.gpt, self.mc):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def pass_bytes(self) -> int:
        """Bytes that the longest pass needs for its entries, from shapes: vectors, rotary tables, mask and integers of a full cache."""
        size, slots, g = torch.finfo(self.dtype).bits // 8, self.cache.slots, self.gpt.config
        return self.max_sessions * slots * (size * (g.n_embd + g.head_dim + slots) + 8 * len(FIELDS))

    def open(self, store: Store | None = None, *, seed: int = 0, catalog: Catalog | None = None) -> "Session":
        """A session on a store, with what it holds as history; default: an empty one in memory. seed: of its draws, of tokens and of the
        allocator's noise; sessions of one seed draw alike. catalog: counts at each refocus what is shown.

        UserError when all places are taken, or the store's history is not the model's.
        """
        row = next((row for row in range(self.max_sessions) if row not in self.sessions), None)
        if row is None:
            raise UserError(f"all {self.max_sessions} sessions of this pool are in use; close one, or make a pool with a larger max_sessions")
        session = Session(self, row, store or RamStore(store_format(self.gpt, self.mc)), seed, catalog)
        self.sessions[row] = session
        return session

    def restore(self, state: SessionState, store: Store | None = None, *, catalog: Catalog | None = None) -> "Session":
        """The session that `state` was taken of, in a free place. store: its history, unless that was in memory.

        UserError for the state of another model, version or configuration, or a store that is not at the moment of the state.
        """
        meta, tensors = state
        if not isinstance(meta, dict) or meta.get("version") != STATE_VERSION:
            raise UserError(f"a session state of version {one_line(meta.get('version') if isinstance(meta, dict) else meta)}; this program reads version {STATE_VERSION}")
        check_meta(meta, tensors)
        if meta.get("model") != self.fingerprint:
            raise UserError(f"the session state was taken with model {meta.get('model')}, this is {self.fingerprint}; load that checkpoint")
        if different := [name for name, value in asdict(self.config).items() if meta["config"].get(name) != value]:
            raise UserError("the session state was taken with other settings: " + ", ".join(f"--mc_{name}={meta['config'].get(name)}" for name in different))
        if (store is None) != ("history" in tensors):
            raise UserError("the session state " + ("holds its history: give no store" if store else "has its history on disk: give its store"))
        if store is not None and store.n_tokens != meta["n_stored"]:
            raise UserError(f"the session state ends at {meta['n_stored']} stored tokens, the store at {store.n_tokens}: they are not of one moment")
        if store is not None and store.version != meta["store_version"]:
            raise UserError(f"the history was edited since the session state was taken (version {meta['store_version']}, now {store.version}): open a new session on it")
        if store is None:
            check_history(tensors["history"], meta["n_stored"], self.gpt.config.vocab_size)
        session = self.open(store, catalog=catalog)
        try:
            session.check_length(meta["n_stored"] + len(meta["pending"]))
            if store is None:
                session.history.fill(tensors["history"])
            session.resume(meta, tensors)
        except BaseException:
            session.close()
            raise
        return session

    # -- the base model ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def catch_up(self, sessions: Sequence["Session"]) -> list[Tensor]:
        """Run every entry that is shown and not in the cache. Hidden states [S, D] of those entries for each session."""
        self.check_open(sessions)
        order = sorted(range(len(sessions)), key=lambda i: sessions[i].row)
        begin = time.perf_counter()
        try:
            work = [sessions[i].missing() for i in order]
            counts = [len(w.lod) for w in work]
            if not any(counts):
                return [torch.empty(0, self.gpt.config.n_embd, device=self.device)] * len(sessions)
            with self.timing("refill" if any(w.recut for w in work) else "base"):
                hidden_ASD = self._run([sessions[i] for i in order], work, max(counts))
        except BaseException:
            for session in sessions:
                session.forget_cache()
            raise
        out: list[Tensor] = [hidden_ASD] * len(sessions)
        for place, i in enumerate(order):
            out[i] = hidden_ASD[place, :counts[place]]
            if counts[place]:
                sessions[i].last_hidden_D = out[i][-1].clone()
            sessions[i].report_refocus(time.perf_counter() - begin)
        return out

    def step(self, sessions: Sequence["Session"], temperature: float = 1.0, top_k: int | None = None,
             top_p: float = 1.0) -> list[int]:
        """One step of `generate`: the next token of each session, drawn by its own generator, and part of its history afterwards."""
        for session in sessions:
            if session.due:
                session.refocus()
        self.catch_up(sessions)
        with self.timing("base"), torch.inference_mode():
            logits_AV = self.gpt.logits(torch.stack([session.last_hidden_D for session in sessions]))
            if temperature == 0:
                tokens = logits_AV.argmax(-1).tolist()
            else:
                tokens = [int(sample(logits_AV[i:i + 1], temperature, top_k, session.generator, top_p))
                          for i, session in enumerate(sessions)]
        for session, token in zip(sessions, tokens):
            session.ingest([token])
        return tokens

    def generate(self, sessions: Sequence["Session"], max_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float = 1.0, seed: int | None = None,
                 stop_ids: Sequence[int] = ()) -> Iterator[list[int | None]]:
        """Per step, each session's new token, None for those that have stopped; sampling as `nanochat.engine.Engine.generate`.

        seed: start every session's draws anew; None: go on with them. A session's tokens do not depend on those beside it.
        UserError, before anything runs, as the engine, and for an empty session.
        """
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
        if len({session.row for session in sessions}) != len(sessions) or any(self.sessions.get(s.row) is not s for s in sessions):
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
                if i not in going_on:
                    sessions[i].meter.finished(began, sessions[i].n_tokens)
            yield [drawn.get(i) for i in range(len(sessions))]
            running = going_on
            if not running:
                return

    def _run(self, sessions: list["Session"], work: list["Missing"], S: int) -> Tensor:
        """Hidden states [A, S, D] of the entries to run, rows padded at their end, through the cache."""
        table = np.empty((len(FIELDS), len(work), S), dtype=np.int64)
        table[:] = np.array([*FIELDS.values()])[:, None, None]
        for row, w in enumerate(work):
            table[:, row, :len(w.lod)] = [getattr(w, name) for name in FIELDS]
        table[FIELD_SLOT][table[FIELD_SLOT] < 0] = self.cache.spare
        lod_AS, index_AS, ids_AS, slot_AS, before_AS, linked_AS = torch.from_numpy(table).to(self.device)
        rows_A = torch.tensor([s.row for s in sessions], device=self.device)
        c, gists = self.mc.config, [(row, w) for row, w in enumerate(work) if w.gists is not None]
        if not gists and c.positions != "contiguous":  # tokens only: as in the base
            centre_AS, bias_AS, embeds_ASD = index_AS.double(), torch.zeros_like(index_AS, dtype=self.dtype), None
            rotary = self.gpt.rotary(index_AS)
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
        return self.gpt.hidden(ids_AS, inputs_embeds=embeds_ASD, rotary=rotary, linked=linked_AS.bool(), cache=self.cache, lift_windows=True)


def open_pool(gpt: GPT, meta: dict, checkpoint_dir: Path | str, config: SessionConfig, max_sessions: int = 1,
              recorder: Recorder | None = None) -> SessionPool:
    """A pool for a model that `nanochat.loading` has loaded from checkpoint_dir; UserError when it has no MegaContext."""
    mc = load_mega_context(checkpoint_dir, meta["step"], meta, gpt.config.n_embd, gpt.lm_head.weight.device)
    return SessionPool(gpt, mc, config, trained_lods=meta["mc"]["trained_lods"], max_sessions=max_sessions, recorder=recorder)


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


class Session:
    """One history and its working context. Made by `SessionPool.open`; methods raise UserError and then have changed nothing."""

    def __init__(self, pool: SessionPool, row: int, store: Store, seed: int, catalog: Catalog | None):
        self.pool, self.row, self.seed, self.catalog = pool, row, seed, catalog
        self.history = History(pool.gpt, pool.mc, store)
        self.pending: list[int] = []
        self.generator = torch.Generator(pool.device).manual_seed(seed)
        self._restart(PathEdits(pool.focus_config))
        self.meter = SessionMeter(pool.recorder, pool.focus_config.cooldown) if pool.recorder else None

    def _restart(self, focus: PathEdits) -> None:
        self.search = KeySearch(self.pool.mc.lensnet, self.history.store.keys)
        self.search.grow(self.history.store.n_nodes(1))
        self.focus, self.scores, self.last_edits, self.price_shift = focus, {}, Edits(), 0.0
        self.cut_lod, self.cut_index, self.cut_tokens = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), 0
        self.asked = self.n_tokens > 0  # appended to since the last refocus
        self.forget_cache()
        self.kept = self.computed = 0  # entries whose KV the last refocus left as they were, and that were run for it
        self.store_reads, self.refocus_seconds = 0, 0.0  # records read, and time spent, since the last report of a refocus

    def forget_cache(self) -> None:
        """Everything shown will be run again."""
        slots = self.pool.cache.spare
        self.cached, self.free_slots, self.recut = _Cached(), list(range(slots)), True
        self.pool.cache.clear(self.row, torch.arange(slots, device=self.pool.device))
        self.last_hidden_D: Tensor | None = None
        self.n_read = 0  # tokens that the cache has seen, as they are or in gists

    # -- history ----------------------------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        return self.history.n_tokens + len(self.pending)

    def begin(self, tokens: Sequence[int] | Tensor) -> None:
        """The start of an empty session's history."""
        if self.n_tokens:
            raise UserError(f"the session has begun, with {self.n_tokens} tokens; append to it")
        if not len(tokens):
            raise UserError("an empty history: begin with at least one token (bos, for text from nothing)")
        self.append(tokens)

    def append(self, tokens: Sequence[int] | Tensor) -> None:
        """The user's next tokens, any number: stored with every node they complete; nothing is run through the base yet."""
        ids_N = torch.as_tensor(tokens, dtype=torch.int64).cpu()
        if not len(ids_N):
            return
        begin = time.perf_counter()
        self._store(ids_N)
        if self.meter:
            self.meter.ingested(len(ids_N), time.perf_counter() - begin, self.n_tokens)

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
        """The tokens that wait, and these, into the history. Interrupted, what was stored waits no longer: no token is stored twice."""
        before, asked = self.history.n_tokens, self.asked or len(ids_N) > 0
        try:
            self.history.append(torch.cat([torch.tensor(self.pending, dtype=torch.int64), ids_N]))
        finally:
            stored = self.history.n_tokens - before
            self.pending, self.asked = self.pending[stored:], asked if stored else self.asked
        self.search.grow(self.history.store.n_nodes(1))

    def resume(self, meta: dict, tensors: dict[str, Tensor]) -> None:
        """Continue where a state was taken, whose values `SessionPool.restore` has checked by themselves. UserError where they do not fit the
        history and each other, before the cache is touched."""
        focus, cache = meta["focus"], self.pool.cache
        self.pending = list(meta["pending"])
        self.history.check_ids(torch.tensor(self.pending, dtype=torch.int64))
        edits = PathEdits(self.pool.focus_config, focus["n_tokens"], focus["refocuses"], {tuple(node) for node in focus["expanded"]},
                          {(lod, index): at for lod, index, at in focus["changed"]}, set(focus["pruned"]))
        check_focus(edits, meta, self.n_tokens)
        check_entries(tensors, edits, cache, meta, self._ids)
        check_cache(tensors, cache, self.pool.gpt.config.n_embd, self.pool.device)
        slot = tensors["slot"]
        self._restart(edits)
        self.scores, self.last_edits = {block: score for block, score in meta["scores"]}, Edits(**{name: value if name == "paths" else [tuple(node) for node in value] for name, value in meta["last_edits"].items()})
        for name in ("asked", "recut", "n_read", "cut_tokens", "kept", "computed", "seed", "price_shift"):
            setattr(self, name, meta[name])
        self.cut_lod, self.cut_index = tensors["cut_lod"].numpy(), tensors["cut_index"].numpy()
        self.cached = _Cached(tensors["lod"].numpy(), tensors["index"].numpy(), slot.numpy())
        self.free_slots = sorted(set(range(cache.spare)) - set(slot.tolist()))
        for name in ("k", "v", "k_unshifted"):
            if name in tensors:
                getattr(cache, name)[:, self.row, slot] = tensors[name].to(cache.k)
        for buffer, name in ((cache.x_unsmeared, "x_unsmeared"), (cache.centre_BM, "centre"), (cache.bias_BM, "bias")):
            if name in tensors:
                buffer[self.row, slot] = tensors[name].to(buffer)
        self.last_hidden_D = tensors["last_hidden"].to(self.pool.device) if "last_hidden" in tensors else None
        self.generator.set_state(tensors["rng"])

    def _tail(self) -> Tensor:
        """[1, ≤ tail, D] embeddings of the last tokens, as the lens reads them."""
        count = self.pool.mc.lensnet.config.tail + LOCAL_MEAN
        stored = torch.arange(max(self.n_tokens - count, 0), self.history.n_tokens)
        ids = torch.cat([self.history.store.tokens(stored), torch.tensor(self.pending, dtype=torch.int64)])[-count:].to(self.pool.device)
        return (self.pool.gpt.embed(ids.clamp_min(0)) * (ids != VOID)[:, None])[None]

    # -- focus ------------------------------------------------------------------------------------------------------------

    def refocus(self) -> Edits:
        """Choose anew what is shown, by the last tokens. Costs only its scoring when nothing changes."""
        if not self.n_tokens:
            raise UserError("nothing to focus on: the session is empty")
        self.ingest([])  # both do nothing, unless an append was interrupted
        self.search.grow(self.history.store.n_nodes(1))
        timing, focus, c, begin = self.pool.timing, self.focus, self.pool.focus_config, time.perf_counter()
        with timing("lens"):
            blocks = self.history.store.n_nodes(1)
            fresh = range(max(blocks - c.budget // c.block_size - 1, 0), blocks)
            also = sorted({index for lod, index in focus.expanded if lod == 1} | set(fresh))
            index_N, logits_N = torch.empty(0, dtype=torch.int64), torch.empty(0)
            if blocks:
                reader, count = self.pool.mc.lensnet.reader, self.pool.config.candidates
                with torch.inference_mode():
                    index_N, logits_N = self.search.top(self._tail(), self.n_tokens, count if reader is None else max(count, RERANKED), torch.tensor(also))
                    if reader is not None:
                        logits_N = self._reread(reader, index_N, logits_N)
        with timing("allocator"):
            focus.pruned = set(index_N[~self.history.store.has_detail(index_N)].tolist()) if blocks else set()
            logits = dict(zip(index_N.tolist(), logits_N.tolist()))
            focus.advance(self.n_tokens, set(logits))
            self.scores = self._scores(logits)
            self.last_edits = edits = focus.refocus(self.scores)
            if self.pool.config.price == "adaptive":
                self.price_shift = float(next_shift(torch.tensor(self.price_shift, dtype=torch.float64), torch.tensor(self.utilization)))
            before, after = self._shown(), focus.cut()
            self.recut |= not all(map(np.array_equal, before, after))
            (self.cut_lod, self.cut_index), self.cut_tokens = after, focus.n_tokens
            if self.catalog:
                self.catalog.count_access(torch.from_numpy(self.cut_lod), torch.from_numpy(self.cut_index))
        self.asked = False
        self.kept, self.computed = len(self.cached.lod), 0
        self.store_reads += self.search.n_exact
        self.refocus_seconds += time.perf_counter() - begin
        return edits

    def report_refocus(self, pass_seconds: float) -> None:
        """Tell the meter of a refocus whose pass has just run."""
        if self.meter and self.refocus_seconds:
            lods = self.status().entries_by_lod
            raw = sum(lod == 1 for lod, _ in self.focus.expanded)
            self.meter.refocused(
                self.focus.refocuses, self.last_edits, seconds=self.refocus_seconds + pass_seconds, entries_by_lod=lods, omitted=self.omitted_tokens, swappable=raw + lods.get(1, 0),
                utilization=self.utilization, kv_kept=self.kept, kv_recomputed=self.computed, store_reads=self.store_reads)
            self.store_reads = 0
        self.refocus_seconds = 0.0

    def _reread(self, reader: torch.nn.Module, index_N: Tensor, logits_N: Tensor) -> Tensor:
        """[N] the logits of blocks after the lens's reader has seen them together, with the nodes above them."""
        store, c, device = self.history.store, self.pool.focus_config, self.pool.device
        nodes = {1: index_N}
        for lod in range(2, c.max_lod + 1):
            above = (index_N // c.block_size ** (lod - 1)).unique()
            nodes[lod] = above[above < store.n_nodes(lod)]
        lod_E = torch.cat([torch.full_like(index, lod) for lod, index in nodes.items()])
        index_E = torch.cat([*nodes.values()])
        tail_TD = self._tail()[0, -reader.recent:]
        cursor_BQ = torch.tensor([[self.n_tokens]], device=device)
        gists_ED = self.history.gists(lod_E, index_E).to(device)
        return reader(logits_N.to(device)[None, None], tail_TD[None, None], cursor_BQ, gists_ED[None], lod_E.to(device), index_E.to(device))[0, 0].cpu()

    def _shown(self) -> tuple[np.ndarray, np.ndarray]:
        """(lod, index) of all that is shown: the cut, and the tokens since."""
        new = np.arange(self.cut_tokens, self.n_tokens)
        return np.concatenate([self.cut_lod, np.zeros_like(new)]), np.concatenate([self.cut_index, new])

    def _scores(self, logits: dict[int, float]) -> dict[int, float]:
        """Focus scores in [−1, 1]."""
        focus, n_B = self.focus, torch.tensor([self.focus.n_tokens])
        fixed = torch.tensor(sorted({*focus.tail_blocks(), *focus.pruned}), dtype=torch.int64)
        index_BI, logits_BI = torch.tensor([list(logits)], dtype=torch.int64), torch.tensor([list(logits.values())], dtype=torch.float64)
        room_B = torch.tensor([focus.room]) if focus.omits else room(n_B, focus.cfg)
        scores_BI = self.pool.allocator.scores(
            logits_BI, index_BI, ~torch.isin(index_BI, fixed), room_B, torch.tensor([self.price_shift], dtype=torch.float64),
            rows_B=torch.zeros(1, dtype=torch.int64), seed=self.seed, refocus=focus.refocuses)
        return dict(zip(logits, scores_BI[0].tolist()))

    @property
    def utilization(self) -> float:
        """Of the cut that the last refocus left, see `mc.focus_allocator.utilization`; where spans are left out of blocks alone, gists filling up."""
        if self.focus.omits:
            return self.focus.utilization
        return float(utilization(torch.tensor([self.focus.entries]), torch.tensor([self.focus.n_tokens]), self.focus.cfg))

    @property
    def due(self) -> bool:
        """Whether a refocus comes before the next token."""
        return self.asked or self.n_tokens - self.cut_tokens >= self.pool.interval

    def missing(self) -> Missing:
        """The entries that are shown and not in the cache, with slots for them; the slots of what is no longer shown are free."""
        if not self.n_tokens:
            raise UserError("the session is empty: begin with at least one token")
        read, cached, recut = self.n_read, self.cached, self.recut
        if recut:
            lod, index = self._shown()
            ids = self._ids(lod, index)
            shown = (lod > 0) | (ids != VOID)
            lod, index, ids = lod[shown], index[shown], ids[shown]
            slot = self._slots_kept(lod, index)
            run = slot < 0
            gone = np.setdiff1d(cached.slot, slot)
            self.pool.cache.clear(self.row, torch.from_numpy(gone).to(self.pool.device))
            self.free_slots.extend(gone.tolist())
            self.store_reads += len(run)
            self.kept, self.computed = len(run) - int(run.sum()), int(run.sum())
        else:
            new = np.arange(read, self.n_tokens)
            new_ids = self._ids(np.zeros_like(new), new)
            new, new_ids = new[new_ids != VOID], new_ids[new_ids != VOID]
            lod, index = np.concatenate([cached.lod, np.zeros_like(new)]), np.concatenate([cached.index, new])
            ids = np.concatenate([np.full_like(cached.lod, VOID), new_ids])
            slot = np.concatenate([cached.slot, np.full_like(new, -1)])
            run = slot < 0
        slot[run] = [self.free_slots.pop() for _ in range(run.sum())]
        before, lod_before, index_before = (np.concatenate([[-1], x[:-1]]) for x in (slot, lod, index))
        linked = (lod == 0) & (lod_before == 0) & (index == index_before + 1)
        self.cached, self.n_read = _Cached(lod, index, slot), self.n_tokens
        self.recut = bool((index[-1] + 1) * self.history.block_size ** lod[-1] < self.n_tokens)  # void slots end it: contiguous positions move
        coarse = run & (lod > 0)
        gists = self.history.gists(torch.from_numpy(lod[coarse]), torch.from_numpy(index[coarse])) if coarse.any() else None
        return Missing(lod[run], index[run], ids[run], slot[run], before[run], linked[run], gists, recut)

    def _slots_kept(self, lod: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The slot of each entry whose KV in the cache stays; −1 for those to be run."""
        K, cached = self.history.block_size, self.cached
        if not len(cached.lod):
            return np.full_like(lod, -1)
        place = np.searchsorted(cached.index * K ** cached.lod, index * K ** lod).clip(max=len(cached.lod) - 1)
        same = (cached.lod[place] == lod) & (cached.index[place] == index)
        if self.pool.config.kv_policy == "exact":
            same &= np.minimum.accumulate(same & (place == np.arange(len(lod))))
            ahead = slice(len(cached.lod) - 1, None)
            if self.pool.mc.config.positions == "contiguous" and not (same[:len(cached.lod)].all() and not lod[ahead].any() and (np.diff(index[ahead]) == 1).all()):
                same[:] = False  # the number of entries decides where each stands
        same[-1] &= same.all()  # the last entry sees all that is new
        return np.where(same, cached.slot[place], -1)

    def _ids(self, lod: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Token ids of raw entries; VOID for gists, and where a source has ended."""
        ids, stored = np.full_like(lod, VOID), self.history.n_tokens
        early, late = (lod == 0) & (index < stored), (lod == 0) & (index >= stored)
        ids[early] = self.history.store.tokens(torch.from_numpy(index[early])).numpy()
        ids[late] = np.array(self.pending, dtype=np.int64)[index[late] - stored]
        return ids

    # -- decoding ---------------------------------------------------------------------------------------------------------

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
        """[N, V] logits at which each of these tokens would have been drawn, read as if they were generated: with a refocus
        first if the user has appended, and then every `interval` tokens. They are history afterwards."""
        left, parts = torch.as_tensor(tokens, dtype=torch.int64).cpu(), []
        self.history.check_ids(left)
        while len(left):
            parts.append(self.logits()[None])
            piece = left[:self.pool.interval - (self.n_tokens - self.cut_tokens)]
            left = left[len(piece):]
            self.ingest(piece.tolist())
            (hidden_SD,) = self.pool.catch_up([self])
            with torch.inference_mode():
                parts.append(self.pool.gpt.logits(hidden_SD[:-1]))
        return torch.cat(parts) if parts else torch.empty(0, self.pool.gpt.config.vocab_size, device=self.pool.device)

    def ingest(self, tokens: list[int]) -> None:
        """Generated tokens: part of the history at once, stored when they complete a block."""
        self.pending += tokens
        if self.n_tokens // self.history.block_size > self.history.n_tokens // self.history.block_size:
            with self.pool.timing("ingest"):
                self.flush()

    # -- what it is ---------------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        return Status(self.n_tokens, dict(sorted(Counter(self._shown()[0].tolist()).items())), self.focus.n_tokens, self.last_edits, self.omitted_tokens)

    @property
    def omitted_tokens(self) -> int:
        """Tokens of the history that no entry stands for since the last refocus: they are searched, and shown when they are asked for."""
        return self.cut_tokens - int((self.history.block_size ** self.cut_lod).sum())

    def explain(self) -> list[Shown]:
        """The history as a table: every gist, the raw tokens block by block, and the spans that are left out, each token in one line."""
        K, focus, lines, end = self.history.block_size, self.focus, [], 0
        for at, i in zip(*(x.tolist() for x in self._shown())):
            start, block = i * K ** at, i if at == 1 else i // K
            if start > end:
                lines.append(Shown(end, start - end, 0, None, None, "left out: no entry has room for it; searched at every refocus"))
            end = start + K ** at
            score = self.scores.get(block) if at < 2 else None
            if at == 0 and lines and lines[-1].lod == 0 and lines[-1].start // K == block:
                lines[-1] = lines[-1]._replace(tokens=lines[-1].tokens + 1, entries=lines[-1].entries + 1)
                continue
            if at == 0:
                recent = start + K > focus.n_tokens - focus.cfg.recent
                why = "recent tokens" if recent else "detail the lens asks for" if score is not None and score > 0 else "detail, until something else needs its place"
            elif at == 1 and block in focus.pruned:
                why = "gist: its tokens were pruned"
            else:
                why = f"gist of LOD{at}, which was not trained" if at in self.pool.untrained else "gist"
            lines.append(Shown(start, K ** at, 1, at, score, why))
        return lines

    def close(self) -> None:
        """Give the place in the pool back. Does nothing the second time."""
        if self.pool.sessions.get(self.row) is self:
            self.forget_cache()
            del self.pool.sessions[self.row]

    def state(self) -> SessionState:
        """All that continues the session elsewhere. A history in memory is part of it; one on disk is named by its length."""
        cache, slot = self.pool.cache, torch.from_numpy(self.cached.slot).to(self.pool.device)
        tensors = {"cut_lod": torch.from_numpy(self.cut_lod), "cut_index": torch.from_numpy(self.cut_index), "slot": torch.from_numpy(self.cached.slot),
                   "lod": torch.from_numpy(self.cached.lod), "index": torch.from_numpy(self.cached.index), "rng": self.generator.get_state(),
                   "k": cache.k[:, self.row, slot], "v": cache.v[:, self.row, slot]}
        if cache.k_unshifted is not None:
            tensors["k_unshifted"] = cache.k_unshifted[:, self.row, slot]
        if cache.x_unsmeared is not None:
            tensors["x_unsmeared"] = cache.x_unsmeared[self.row, slot]
        tensors["centre"], tensors["bias"] = cache.centre_BM[self.row, slot], cache.bias_BM[self.row, slot]
        if self.last_hidden_D is not None:
            tensors["last_hidden"] = self.last_hidden_D
        if isinstance(self.history.store, RamStore):
            tensors["history"] = self.history.store.tokens(torch.arange(self.history.n_tokens))
        focus = self.focus
        meta = {"version": STATE_VERSION, "model": self.pool.fingerprint, "config": asdict(self.pool.config), "n_stored": self.history.n_tokens,
                "store_version": self.history.store.version, "pending": list(self.pending), "asked": self.asked, "recut": self.recut, "n_read": self.n_read, "cut_tokens": self.cut_tokens, "kept": self.kept, "computed": self.computed, "seed": self.seed, "price_shift": self.price_shift,
                "scores": list(self.scores.items()), "last_edits": asdict(self.last_edits),
                "focus": {"n_tokens": focus.n_tokens, "refocuses": focus.refocuses, "expanded": sorted(focus.expanded),
                          "changed": sorted([*node, at] for node, at in focus.changed.items()), "pruned": sorted(focus.pruned)}}
        return SessionState(meta, {name: t.detach().cpu().clone() for name, t in tensors.items()})
