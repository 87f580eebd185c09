"""A session's state: all of it that a pool does not know, as values and tensors; to a file,
from one, and back into a session.

A state comes from a file, and an index out of bounds would be found only later, in another place. So every value is
checked by type and range, every tensor by shape, and that the cut, the cache and the tokens that were read fit each
other, before anything is changed.

Shapes: N tokens of history, W entries of the cut, M entries in the cache.
"""

import json
import math
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mc.session.entries import CachedHistory, _Cached
from mc.session.refocus import Edits, PathEdits
from mc.session.slot_cache import PagedCache
from mc.store.ram import VOID, RamStore, Store
from nanochat.common import UserError, one_line, parse_json
from nanochat.outputs import replacing

STATE_VERSION = 2
COUNTS = ("n_stored", "store_version", "n_read", "cut_tokens", "kept", "computed")
FLAGS = ("asked", "recut")
DAMAGED = "the session state is damaged, or another program's: {}; open a new session on its history"


class SessionState(NamedTuple):
    """All of a session that a pool does not know: plain values, and tensors by name. The history
    itself only if it is in memory."""

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
            # of one element, `contiguous` leaves any stride
            whole = t.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
            crc = zlib.crc32(whole.view(torch.uint8).numpy(),
                             zlib.crc32(repr((name, t.dtype, tuple(t.shape))).encode(), crc))
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


def take_state(session: CachedHistory, generator: torch.Generator) -> SessionState:
    """All that continues the session elsewhere. A history in memory is part of it; one on
    disk is named by its length."""
    cache, slot = session.pool.cache, torch.from_numpy(session.cached.slot).to(session.pool.device)
    tensors = {"cut_lod": torch.from_numpy(session.cut_lod), "cut_index": torch.from_numpy(session.cut_index),
               "slot": torch.from_numpy(session.cached.slot),
               "lod": torch.from_numpy(session.cached.lod), "index": torch.from_numpy(session.cached.index),
               "rng": generator.get_state(),
               "k": cache.k[:, session.row, slot], "v": cache.v[:, session.row, slot]}
    if cache.k_unshifted is not None:
        tensors["k_unshifted"] = cache.k_unshifted[:, session.row, slot]
    if cache.x_unsmeared is not None:
        tensors["x_unsmeared"] = cache.x_unsmeared[session.row, slot]
    tensors["centre"], tensors["bias"] = cache.centre_BM[session.row, slot], cache.bias_BM[session.row, slot]
    if session.last_hidden_D is not None:
        tensors["last_hidden"] = session.last_hidden_D
    if isinstance(session.history.store, RamStore):
        tensors["history"] = session.history.store.tokens(torch.arange(session.history.n_tokens))
    focus = session.focus
    meta = {"version": STATE_VERSION, "model": session.pool.fingerprint, "config": asdict(session.pool.config),
            "n_stored": session.history.n_tokens,
            "store_version": session.history.store.version, "pending": list(session.pending), "asked": session.asked,
            "recut": session.recut, "n_read": session.n_read, "cut_tokens": session.cut_tokens, "kept": session.kept,
            "computed": session.computed, "seed": session.seed, "price_shift": session.price_shift,
            "scores": list(session.scores.items()), "last_edits": asdict(session.last_edits),
            "focus": {"n_tokens": focus.n_tokens, "refocuses": focus.refocuses, "expanded": sorted(focus.expanded),
                      "changed": sorted([*node, at] for node, at in focus.changed.items()),
                      "pruned": sorted(focus.pruned)}}
    return SessionState(meta, {name: t.detach().cpu().clone() for name, t in tensors.items()})


def put_back(session: CachedHistory, generator: torch.Generator, meta: dict, tensors: dict[str, Tensor]) -> None:
    """Continue where a state was taken, whose values `check_fits` has checked by themselves. UserError where they do
    not fit the history and each other, before the cache is touched."""
    focus, cache = meta["focus"], session.pool.cache
    session.pending = list(meta["pending"])
    session.history.check_ids(torch.tensor(session.pending, dtype=torch.int64))
    edits = PathEdits(session.pool.focus_config, focus["n_tokens"], focus["refocuses"],
                      {tuple(node) for node in focus["expanded"]},
                      {(lod, index): at for lod, index, at in focus["changed"]}, set(focus["pruned"]))
    check_focus(edits, meta, session.n_tokens)
    check_entries(tensors, edits, cache, meta, session._ids)
    check_cache(tensors, cache, session.pool.gpt.config.n_embd, session.pool.device)
    slot = tensors["slot"]
    session._restart(edits)
    session.scores, session.last_edits = {block: score
                                          for block, score in meta["scores"]}, Edits(**{name: value if name == "paths"
                                                                                        else [tuple(node)
                                                                                              for node in value]
                                                                                        for name, value in meta["last_edits"].items()})  # noqa: E501
    for name in ("asked", "recut", "n_read", "cut_tokens", "kept", "computed", "seed", "price_shift"):
        setattr(session, name, meta[name])
    session.cut_lod, session.cut_index = tensors["cut_lod"].numpy(), tensors["cut_index"].numpy()
    session.cached = _Cached(tensors["lod"].numpy(), tensors["index"].numpy(), slot.numpy())
    # in any order: what an entry sees goes by positions, not by slots
    session.free_slots = sorted(set(range(cache.spare)) - set(slot.tolist()))
    for name in ("k", "v", "k_unshifted"):
        if name in tensors:
            getattr(cache, name)[:, session.row, slot] = tensors[name].to(cache.k)
    for buffer, name in ((cache.x_unsmeared, "x_unsmeared"), (cache.centre_BM, "centre"), (cache.bias_BM, "bias")):
        if name in tensors:
            buffer[session.row, slot] = tensors[name].to(buffer)
    session.last_hidden_D = tensors["last_hidden"].to(session.pool.device) if "last_hidden" in tensors else None
    generator.set_state(tensors["rng"])


# ----------------------------------------------------------------------------------------------------
# Checks


def check_fits(state: SessionState, pool: Any, store: Store | None) -> None:
    """UserError for the state of another model, version or configuration than the pool's, or a
    store that is not at its moment."""
    meta, tensors = state
    if not isinstance(meta, dict) or meta.get("version") != STATE_VERSION:
        raise UserError("a session state of version "
                        f"{one_line(meta.get('version') if isinstance(meta, dict) else meta)}; this program reads "
                        f"version {STATE_VERSION}")
    check_meta(meta, tensors)
    if meta.get("model") != pool.fingerprint:
        raise UserError(f"the session state was taken with model {meta.get('model')}, this is {pool.fingerprint}; load "
                        "that checkpoint")
    gone = {"price": "adaptive"} | meta["config"]
    if gone["price"] != "adaptive" or str(gone.get("allocator")).startswith("threshold"):
        raise UserError("the session state was taken with --mc_price=market or --mc_allocator=threshold, which this "
                        "version does not have; "
                        "open a new session on its history")
    if different := [name for name, value in asdict(pool.config).items() if meta["config"].get(name) != value]:
        raise UserError("the session state was taken with other settings: "
                        + ", ".join(f"--mc_{name}={meta['config'].get(name)}" for name in different))
    if (store is None) != ("history" in tensors):
        raise UserError("the session state " + ("holds its history: give no store" if store
                                                else "has its history on disk: give its store"))
    if store is not None and store.n_tokens != meta["n_stored"]:
        raise UserError(f"the session state ends at {meta['n_stored']} stored tokens, the store at {store.n_tokens}: "
                        "they are not of one moment")
    if store is not None and store.version != meta["store_version"]:
        raise UserError(f"the history was edited since the session state was taken (version {meta['store_version']}, "
                        f"now {store.version}): open a new session on it")
    if store is None:
        check_history(tensors["history"], meta["n_stored"], pool.gpt.config.vocab_size)


def require(holds: bool, what: str, value: object = None) -> None:
    if not holds:
        raise UserError(DAMAGED.format(what if value is None else f"{what} {one_line(value)}"))


def check_meta(meta: object, tensors: object) -> None:
    """Types and least values of all that needs neither history nor model. UserError for anything else."""
    require(isinstance(meta, dict) and all(isinstance(x, Tensor) for x in tensors.values()), "no values by name")
    require(isinstance(meta.get("config"), dict), "config", meta.get("config"))
    for name in COUNTS:
        require(_is_count(meta.get(name)), name, meta.get(name, "missing"))
    for name in FLAGS:
        require(type(meta.get(name)) is bool, name, meta.get(name, "missing"))
    require(type(meta.get("seed")) is int and abs(meta["seed"]) < 2**63, "seed", meta.get("seed", "missing"))
    require(_is_finite(meta.get("price_shift")), "price_shift", meta.get("price_shift", "missing"))
    require(_rows_of(meta.get("pending"), _is_count), "pending", meta.get("pending", "missing"))
    require(_rows_of(meta.get("scores"), _is_count, _is_finite), "scores", meta.get("scores", "missing"))
    edits, focus = meta.get("last_edits"), meta.get("focus")
    require(isinstance(edits, dict) and set(edits) == {"paths", "opened", "closed", "collapsed"}
            and _is_count(edits["paths"]), "last_edits", edits)
    require(all(_rows_of(edits[name], _is_count, _is_count) for name in ("opened", "closed", "collapsed")),
            "last_edits", edits)
    require(isinstance(focus, dict) and all(_is_count(focus.get(name)) for name in ("n_tokens", "refocuses")), "focus",
            focus)
    for name, width in (("expanded", 2), ("changed", 3), ("pruned", 1)):
        require(_rows_of(focus.get(name), *[_is_count] * width), name, focus.get(name, "missing"))


def _is_count(x: object) -> bool:
    # type: True is an int, too. 2^53: positions are float64
    return type(x) is int and 0 <= x < 2**53


def _is_finite(x: object) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def _rows_of(rows: object, *columns) -> bool:
    """A list of rows, of plain values where there is one column."""
    if not isinstance(rows, list):
        return False
    if len(columns) == 1:
        return all(map(columns[0], rows))
    return all(isinstance(row, list | tuple) and len(row) == len(columns) and all(of(x) for of, x in zip(columns, row))
               for row in rows)


def check_history(tokens_N: Tensor, n_stored: int, vocab: int) -> None:
    """The tokens of a history that is part of the state."""
    require(tokens_N.dtype == torch.int64 and tokens_N.shape == (n_stored,), "history", list(tokens_N.shape))
    require(not len(tokens_N) or (VOID <= int(tokens_N.min()) and int(tokens_N.max()) < vocab),
            "its history has token ids outside the vocabulary")


def check_focus(focus: PathEdits, meta: dict, n: int) -> None:
    """Nodes that exist, in a cut of the n tokens that the budget holds."""
    require(meta["cut_tokens"] == focus.n_tokens <= n and meta["n_read"] <= n,
            f"of {n} tokens it has read {meta['n_read']} and focused on {focus.n_tokens}")
    nodes = [*focus.expanded, *focus.changed]
    require(all(1 <= lod <= focus.cfg.max_lod and focus.exists((lod, index)) for lod, index in nodes),
            "a node that is not there")
    require(all(at <= focus.refocuses for at in focus.changed.values()), "an edit that is to come")
    require(all(block * focus.cfg.block_size < n
                for block in (*focus.pruned, *(block for block, _ in meta["scores"]))), "a block that is not there")
    gists = set(focus.tail_blocks()) - {block for _, block in focus.expanded} if focus.omits else ()
    require(focus.entries + len(gists) <= focus.cfg.budget, "more is expanded than the budget holds")


def check_entries(tensors: dict[str, Tensor], focus: PathEdits, cache: PagedCache, meta: dict, shown_ids) -> None:
    """The cut is the focus's, the cache holds what has been read of it, and a slot holds one entry. shown_ids: (lod,
    index) -> ids, VOID where a source has ended."""
    arrays = {name: _array(tensors, name) for name in ("cut_lod", "cut_index", "lod", "index", "slot")}
    cut = focus.cut()
    require(np.array_equal(arrays["cut_lod"], cut[0]) and np.array_equal(arrays["cut_index"], cut[1]),
            "its cut is not that of its focus")
    require(_in_order(*cut, focus.cfg.block_size), "its cut shows a token twice")
    lod, index, slot = arrays["lod"], arrays["index"], arrays["slot"]
    require(len(lod) == len(index) == len(slot) <= cache.spare,
            f"entries of the cache {len(lod)}, {len(index)}, {len(slot)}")
    require(len(np.unique(slot)) == len(slot) and (not len(slot) or 0 <= slot.min() <= slot.max() < cache.spare),
            "slots of the cache")
    fits = not len(lod) or (0 <= lod.min() <= lod.max() <= focus.cfg.max_lod
                            and 0 <= index.min() <= index.max() < 2**53)
    require(fits and _in_order(lod, index, focus.cfg.block_size), "entries of the cache")
    ends = (index + 1) * focus.cfg.block_size**lod
    require(not len(lod) or ends[-1] <= meta["n_read"], "entries that were not read")
    if not meta["recut"]:  # then the next pass runs what has come since, and nothing else
        n = meta["n_stored"] + len(meta["pending"])
        new, since = np.arange(meta["n_read"], n), np.arange(meta["cut_tokens"], n)
        mine = np.concatenate([lod, np.zeros_like(new)]), np.concatenate([index, new])
        shown = np.concatenate([cut[0], np.zeros_like(since)]), np.concatenate([cut[1], since])
        mine, shown = (_without_void(*entries, shown_ids) for entries in (mine, shown))
        require(all(map(np.array_equal, mine, shown)), "its cache does not hold what is shown")


def _without_void(lod: np.ndarray, index: np.ndarray, shown_ids) -> tuple[np.ndarray, np.ndarray]:
    there = (lod > 0) | (shown_ids(lod, index) != VOID)
    return lod[there], index[there]


def _array(tensors: dict[str, Tensor], name: str) -> np.ndarray:
    x = tensors.get(name)
    require(x is not None and x.dtype == torch.int64 and x.ndim == 1, name,
            "missing" if x is None else f"{x.dtype} {list(x.shape)}")
    return x.numpy()


def _in_order(lod: np.ndarray, index: np.ndarray, K: int) -> bool:
    """Whether each entry begins where the one before has ended, or behind."""
    start, end = index * K**lod, (index + 1) * K**lod
    return bool((start[1:] >= end[:-1]).all())


def check_cache(tensors: dict[str, Tensor], cache: PagedCache, width: int, device: torch.device) -> None:
    """Shapes of what is kept of each entry, and finite numbers; the generator's state."""
    M = len(tensors["slot"])
    layers, _, _, *heads = cache.k.shape
    shapes = {"k": (layers, M, *heads), "v": (layers, M, *heads), "centre": (M,), "bias": (M,)}
    if cache.k_unshifted is not None:
        shapes["k_unshifted"] = shapes["k"]
    if cache.x_unsmeared is not None:
        shapes["x_unsmeared"] = (M, width)
    if M:
        shapes["last_hidden"] = (width,)
    for name, shape in shapes.items():
        x = tensors.get(name)
        require(x is not None and x.shape == shape and x.is_floating_point(), name,
                "missing" if x is None else f"{x.dtype} {list(x.shape)}")
        require(bool(x.isfinite().all()), f"{name} is not finite")
    require("last_hidden" not in tensors or tensors["last_hidden"].shape == (width,), "last_hidden")
    try:
        torch.Generator(device).set_state(tensors["rng"])
    except (KeyError, RuntimeError, TypeError) as e:
        require(False, "state of the random numbers:", e)
