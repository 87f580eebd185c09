"""Where a history is kept: token ids (L0), gists (L1, L2, …) and lens keys (K1), as records in order.

A `Store` holds what was appended and gives records back by index, many in one call. It computes nothing:
`mc.store.history.History` makes the nodes. Appended records can be read at once by the writer; `commit` makes them
durable, and visible to others, together.

A token id of VOID marks a slot that holds nothing: the rest of a source's last block. Gists and keys are kept in
`StoreFormat.dtype` and given back in `StoreFormat.read_dtype`.

Edits replace records (`rewrite_tokens`, `rewrite_nodes`) or cut them off (`truncate`); like appends they become part of
the history at the next `commit`, all together. The raw tokens of a block can be given up while
its gists stay (`set_detail`).

Shapes: N records asked for, D width of the base, P lens keys per block, C width of a key.
"""

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

VOID = -1
KEPT, DROPPED, ERASED = 0, 1, 2  # what became of a block's raw tokens: there; given up but restorable; gone


@dataclass(frozen=True)
class StoreFormat:
    """What the records of a store are. Two stores of one format are interchangeable."""

    block_size: int
    d_model: int
    n_keys: int  # lens keys per block
    key_dim: int
    # of gists and keys: float32, bfloat16, float16, or int8 (one float32 scale per vector)
    dtype: torch.dtype = torch.float32
    model: str = ""  # fingerprint of the networks that made them (`mc.model.fingerprint`)

    @property
    def read_dtype(self) -> torch.dtype:
        """Of the gists and keys that a store gives back."""
        return torch.float32 if self.dtype == torch.int8 else self.dtype


class Store(Protocol):
    """Records of one history. Indices are int64 tensors [N] on the CPU, and must exist; results are on the CPU."""

    format: StoreFormat

    @property
    def version(self) -> int:
        """Grows with every commit that holds an edit."""
        ...

    @property
    def text_version(self) -> int:
        """The last version that rewrote or cut off tokens: what tells an edit from all else that makes a version."""
        ...

    @property
    def n_tokens(self) -> int:
        """Slots of LOD0, void ones included."""
        ...

    def n_nodes(self, lod: int) -> int:
        """Gists of a level ≥ 1; 0 for a level that has none yet."""
        ...

    def append_tokens(self, ids_N: Tensor) -> None:
        """int64 [N], VOID where a slot is empty."""
        ...

    def append_nodes(self, lod: int, gists_ND: Tensor, keys_NPC: Tensor | None = None) -> None:
        """The next gists of a level [N, D]; with their lens keys [N, P, C] where the level is 1."""
        ...

    def commit(self) -> None:
        """What has been appended so far belongs to the history from now on, whatever happens."""
        ...

    def roll_back(self) -> None:
        """Drop what was appended since the last commit."""
        ...

    def rewrite_tokens(self, start: int, ids_N: Tensor) -> None:
        """Replace tokens [start, start + N), which exist. The nodes above them are the caller's
        to rewrite, before the commit.

        ValueError where the raw tokens of a block are ERASED.
        """
        ...

    def rewrite_nodes(self, lod: int, start: int, gists_ND: Tensor, keys_NPC: Tensor | None = None) -> None:
        """Replace nodes [start, start + N) of a level, which exist; arguments as `append_nodes`."""
        ...

    def truncate(self, lod: int, n: int) -> None:
        """Keep the first n records of a level (0: tokens), and of every level above the nodes that they still complete.

        Keys go with their gists, and what became of the raw tokens of a block goes with the block.
        """
        ...

    def detail(self, index_N: Tensor) -> Tensor:
        """What became of the raw tokens of LOD1 blocks: uint8 [N], KEPT, DROPPED or ERASED. A
        block never pruned is KEPT."""
        ...

    def set_detail(self, index_N: Tensor, state: int | Tensor) -> None:
        """Change it, from the next commit on; state: one for all, or uint8 [N].

        `tokens` still gives those of a DROPPED block, for restoring it; who shows them asks `has_detail` first. Of an
        ERASED block it gives VOID, and ValueError is raised for making one anything else.
        """
        ...

    def has_detail(self, index_N: Tensor) -> Tensor:
        """bool [N]: whether the raw tokens of LOD1 blocks may be shown."""
        ...

    def close(self) -> None:
        """Commit, and let go of files and locks. The store is not used afterwards."""
        ...

    def snapshot(self) -> "Store":
        """Commit; then what the store holds, for reading: it stays so whatever is done to
        this store. Close it after use."""
        ...

    def tokens(self, index_N: Tensor) -> Tensor:
        """int64 [N]."""
        ...

    def gists(self, lod: int, index_N: Tensor) -> Tensor:
        """[N, D]."""
        ...

    def keys(self, index_N: Tensor) -> Tensor:
        """[N, P, C] of LOD1 nodes."""
        ...


def int8_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors as int8 [N, D] and the float32 scale [N, 1] of each: its largest magnitude ÷ 127."""
    x_ND = x_ND.float()
    scale_N1 = x_ND.abs().amax(-1, keepdim=True) / 127
    # a vector of zeros has the scale 0: divided by this instead it stays zeros, and is no NaN
    return (x_ND / scale_N1.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale_N1


class Detail:
    """What became of each block's raw tokens: a byte per block up to the last one ever pruned, KEPT beyond."""

    def __init__(self, state_N: Tensor | None = None):
        self.state_N = torch.zeros(0, dtype=torch.uint8) if state_N is None else state_N
        # kept, since every read of tokens asks
        self.any_erased = bool((self.state_N == ERASED).any())

    def at(self, index_N: Tensor) -> Tensor:
        known = index_N < len(self.state_N)
        # also for a state of no blocks, which has no last one to be clamped to
        if not known.any():
            return torch.zeros(index_N.shape, dtype=torch.uint8)
        return torch.where(known, self.state_N[index_N.clamp_max(len(self.state_N) - 1)], KEPT)

    def set(self, index_N: Tensor, state: int | Tensor) -> None:
        state_N = torch.as_tensor(state, dtype=torch.uint8).expand(index_N.shape)
        if ((self.at(index_N) == ERASED) & (state_N != ERASED)).any():
            raise ValueError("the raw tokens of an erased block cannot be restored")
        if not len(index_N):
            return
        grown = torch.zeros(max(len(self.state_N), int(index_N.max()) + 1), dtype=torch.uint8)
        grown[:len(self.state_N)] = self.state_N
        grown[index_N] = state_N
        self.state_N = grown  # a new tensor: whoever holds the old state keeps it
        self.any_erased = bool((grown == ERASED).any())

    def truncate(self, n_blocks: int) -> None:
        self.state_N = self.state_N[:n_blocks]


class _Records:
    """Records [N, …] that grow at the end, in a buffer that doubles: an append costs what it appends, amortized."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.buffer, self.n = torch.empty(0, *shape, dtype=dtype), 0

    def append(self, x_N: Tensor) -> None:
        end = self.n + len(x_N)
        self._check(x_N)
        if end > len(self.buffer):
            grown = self.buffer.new_empty(max(end, 2 * len(self.buffer)), *self.buffer.shape[1:])
            grown[:self.n] = self.buffer[:self.n]
            self.buffer = grown
        self.buffer[self.n:end] = x_N
        self.n = end

    def rewrite(self, start: int, x_N: Tensor) -> None:
        self._check(x_N)
        if not 0 <= start <= start + len(x_N) <= self.n:
            raise IndexError(f"records [{start}, {start + len(x_N)}) of {self.n}")
        self.buffer[start:start + len(x_N)] = x_N

    def truncate(self, n: int) -> None:
        self.n = min(self.n, n)

    def at(self, index_N: Tensor) -> Tensor:
        return self.buffer[:self.n][index_N]

    def _check(self, x_N: Tensor) -> None:
        if x_N.shape[1:] != self.buffer.shape[1:]:
            raise ValueError(f"records of shape {tuple(x_N.shape[1:])}, this level holds "
                             f"{tuple(self.buffer.shape[1:])}")


class RamStore:
    """A history in memory; gone with the process. What is changed is changed at once: `commit` only counts versions."""

    def __init__(self, format: StoreFormat):
        self.format = format
        self._tokens = _Records((), torch.int64)
        self._keys = _Records((format.n_keys, format.key_dim), format.read_dtype)
        self._levels: dict[int, _Records] = {}
        self._detail = Detail()
        self.version, self._edited, self._committed = 0, False, 0
        self.text_version, self._text_edited = 0, False

    @property
    def n_tokens(self) -> int:
        return self._tokens.n

    def n_nodes(self, lod: int) -> int:
        return self._levels[lod].n if lod in self._levels else 0

    def append_tokens(self, ids_N: Tensor) -> None:
        self._tokens.append(ids_N)

    def append_nodes(self, lod: int, gists_ND: Tensor, keys_NPC: Tensor | None = None) -> None:
        check_keys(lod, keys_NPC)
        level = self._levels.setdefault(lod, _Records((self.format.d_model,), self.format.read_dtype))
        if keys_NPC is not None:
            self._keys.append(self._stored(keys_NPC))
        level.append(self._stored(gists_ND))

    def commit(self) -> None:
        self.version += self._edited
        if self._text_edited:
            self.text_version = self.version
        self._edited, self._text_edited, self._committed = False, False, self.n_tokens

    def roll_back(self) -> None:
        self._cut(0, self._committed)

    def close(self) -> None:
        pass

    def snapshot(self) -> "RamStore":
        """A copy."""
        return copy.deepcopy(self)

    def rewrite_tokens(self, start: int, ids_N: Tensor) -> None:
        check_not_erased(self, start, len(ids_N))
        self._edited = self._text_edited = True
        self._tokens.rewrite(start, ids_N)

    def rewrite_nodes(self, lod: int, start: int, gists_ND: Tensor, keys_NPC: Tensor | None = None) -> None:
        check_keys(lod, keys_NPC)
        self._edited = True
        self._levels[lod].rewrite(start, self._stored(gists_ND))
        if keys_NPC is not None:
            self._keys.rewrite(start, self._stored(keys_NPC))

    def truncate(self, lod: int, n: int) -> None:
        self._edited = True
        self._text_edited |= lod == 0 and n < self.n_tokens
        self._cut(lod, n)

    def _cut(self, lod: int, n: int) -> None:
        if lod == 0:
            self._tokens.truncate(n)
            lod, n = 1, self.n_tokens // self.format.block_size
            self._detail.truncate(n)
        while lod in self._levels:
            self._levels[lod].truncate(n)
            if lod == 1:
                self._keys.truncate(n)
            lod, n = lod + 1, n // self.format.block_size

    def detail(self, index_N: Tensor) -> Tensor:
        return self._detail.at(index_N)

    def set_detail(self, index_N: Tensor, state: int | Tensor) -> None:
        self._edited = True
        self._detail.set(index_N, state)
        erased_N = index_N[self._detail.at(index_N) == ERASED]
        self._tokens.buffer[(erased_N[:, None] * self.format.block_size
                             + torch.arange(self.format.block_size)).flatten()] = VOID

    def has_detail(self, index_N: Tensor) -> Tensor:
        return self.detail(index_N) == KEPT

    def tokens(self, index_N: Tensor) -> Tensor:
        return self._tokens.at(index_N)

    def gists(self, lod: int, index_N: Tensor) -> Tensor:
        return self._levels[lod].at(index_N)

    def keys(self, index_N: Tensor) -> Tensor:
        return self._keys.at(index_N)

    def _stored(self, x: Tensor) -> Tensor:
        """Vectors as they come back: rounded to the format."""
        if self.format.dtype != torch.int8:
            return x.to(self.format.dtype)
        rows, scale = int8_rows(x)
        return rows * scale


def check_keys(lod: int, keys_NPC: Tensor | None) -> None:
    if (keys_NPC is not None) != (lod == 1):
        raise ValueError(f"LOD{lod}: blocks (LOD1) come with lens keys, other levels without")


def check_not_erased(store: Store, start: int, count: int) -> None:
    K = store.format.block_size
    if (store.detail(torch.arange(start // K, -(-(start + count) // K))) == ERASED).any():
        raise ValueError(f"tokens [{start}, {start + count}): the raw tokens of a block there are erased")
