"""Whether a session's state is one that a session can have: every value by type and range, every tensor by shape, and that the cut, the cache
and the tokens that were read fit each other. A state comes from a file, and an index out of bounds would be found only later, in another place.

Shapes: N tokens of history, W entries of the cut, M entries in the cache.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mc.session.refocus import PathEdits
from mc.session.slot_cache import PagedCache
from mc.store.ram import VOID
from nanochat.common import UserError, one_line

COUNTS = ("n_stored", "store_version", "n_read", "cut_tokens", "kept", "computed")
FLAGS = ("asked", "recut")
DAMAGED = "the session state is damaged, or another program's: {}; open a new session on its history"


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
    require(isinstance(edits, dict) and set(edits) == {"paths", "opened", "closed", "collapsed"} and _is_count(edits["paths"]), "last_edits", edits)
    require(all(_rows_of(edits[name], _is_count, _is_count) for name in ("opened", "closed", "collapsed")), "last_edits", edits)
    require(isinstance(focus, dict) and all(_is_count(focus.get(name)) for name in ("n_tokens", "refocuses")), "focus", focus)
    for name, width in (("expanded", 2), ("changed", 3), ("pruned", 1)):
        require(_rows_of(focus.get(name), *[_is_count] * width), name, focus.get(name, "missing"))


def _is_count(x: object) -> bool:
    return type(x) is int and 0 <= x < 2**53


def _is_finite(x: object) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def _rows_of(rows: object, *columns) -> bool:
    """A list of rows, of plain values where there is one column."""
    if not isinstance(rows, list):
        return False
    if len(columns) == 1:
        return all(map(columns[0], rows))
    return all(isinstance(row, list | tuple) and len(row) == len(columns) and all(of(x) for of, x in zip(columns, row)) for row in rows)


def check_history(tokens_N: Tensor, n_stored: int, vocab: int) -> None:
    """The tokens of a history that is part of the state."""
    require(tokens_N.dtype == torch.int64 and tokens_N.shape == (n_stored,), "history", list(tokens_N.shape))
    require(not len(tokens_N) or (VOID <= int(tokens_N.min()) and int(tokens_N.max()) < vocab), "its history has token ids outside the vocabulary")


def check_focus(focus: PathEdits, meta: dict, n: int) -> None:
    """Nodes that exist, in a cut of the n tokens."""
    require(meta["cut_tokens"] == focus.n_tokens <= n and meta["n_read"] <= n, f"of {n} tokens it has read {meta['n_read']} and focused on {focus.n_tokens}")
    nodes = [*focus.expanded, *focus.changed]
    require(all(1 <= lod <= focus.cfg.max_lod and focus.exists((lod, index)) for lod, index in nodes), "a node that is not there")
    require(all(at <= focus.refocuses for at in focus.changed.values()), "an edit that is to come")
    require(all(block * focus.cfg.block_size < n for block in (*focus.pruned, *(block for block, _ in meta["scores"]))), "a block that is not there")


def check_entries(tensors: dict[str, Tensor], focus: PathEdits, cache: PagedCache, meta: dict, shown_ids) -> None:
    """The cut is the focus's, the cache holds what has been read of it, and a slot holds one entry. shown_ids: (lod, index) -> ids, VOID where
    a source has ended."""
    arrays = {name: _array(tensors, name) for name in ("cut_lod", "cut_index", "lod", "index", "slot")}
    cut = focus.cut()
    require(np.array_equal(arrays["cut_lod"], cut[0]) and np.array_equal(arrays["cut_index"], cut[1]), "its cut is not that of its focus")
    require(_in_order(*cut, focus.cfg.block_size), "its cut shows a token twice")
    lod, index, slot = arrays["lod"], arrays["index"], arrays["slot"]
    require(len(lod) == len(index) == len(slot) <= cache.spare, f"entries of the cache {len(lod)}, {len(index)}, {len(slot)}")
    require(len(np.unique(slot)) == len(slot) and (not len(slot) or 0 <= slot.min() <= slot.max() < cache.spare), "slots of the cache")
    fits = not len(lod) or (0 <= lod.min() <= lod.max() <= focus.cfg.max_lod and 0 <= index.min() <= index.max() < 2**53)
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
    require(x is not None and x.dtype == torch.int64 and x.ndim == 1, name, "missing" if x is None else f"{x.dtype} {list(x.shape)}")
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
        require(x is not None and x.shape == shape and x.is_floating_point(), name, "missing" if x is None else f"{x.dtype} {list(x.shape)}")
        require(bool(x.isfinite().all()), f"{name} is not finite")
    require("last_hidden" not in tensors or tensors["last_hidden"].shape == (width,), "last_hidden")
    try:
        torch.Generator(device).set_state(tensors["rng"])
    except (KeyError, RuntimeError, TypeError) as e:
        require(False, "state of the random numbers:", e)
