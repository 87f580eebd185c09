"""Where a history is kept: token ids (L0), gists (L1, L2, …) and lens keys (K1), as records in order.

A `Store` holds what was appended and gives records back by index, many in one call. It computes nothing: `mc.history.History`
makes the nodes. Appended records can be read at once by the writer; `commit` makes them durable, and visible to others, together.

A token id of VOID marks a slot that holds nothing: the rest of a source's last block. Records are in `StoreFormat.dtype`.

Shapes: N records asked for, D width of the base, P lens keys per block, C width of a key.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

VOID = -1


@dataclass(frozen=True)
class StoreFormat:
    """What the records of a store are. Two stores of one format are interchangeable."""

    block_size: int
    d_model: int
    n_keys: int  # lens keys per block
    key_dim: int
    dtype: torch.dtype = torch.float32  # of gists and keys
    model: str = ""  # fingerprint of the networks that made them (`mc.model.fingerprint`)


class Store(Protocol):
    """Records of one history. Indices are int64 tensors [N] on the CPU, and must exist; results are on the CPU."""

    format: StoreFormat

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

    def tokens(self, index_N: Tensor) -> Tensor:
        """int64 [N]."""
        ...

    def gists(self, lod: int, index_N: Tensor) -> Tensor:
        """[N, D]."""
        ...

    def keys(self, index_N: Tensor) -> Tensor:
        """[N, P, C] of LOD1 nodes."""
        ...


class _Records:
    """Records [N, …] that grow at the end, in a buffer that doubles: an append costs what it appends, amortized."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.buffer, self.n = torch.empty(0, *shape, dtype=dtype), 0

    def append(self, x_N: Tensor) -> None:
        end = self.n + len(x_N)
        if x_N.shape[1:] != self.buffer.shape[1:]:
            raise ValueError(f"records of shape {tuple(x_N.shape[1:])}, this level holds {tuple(self.buffer.shape[1:])}")
        if end > len(self.buffer):
            grown = self.buffer.new_empty(max(end, 2 * len(self.buffer)), *self.buffer.shape[1:])
            grown[:self.n] = self.buffer[:self.n]
            self.buffer = grown
        self.buffer[self.n:end] = x_N
        self.n = end

    def at(self, index_N: Tensor) -> Tensor:
        return self.buffer[:self.n][index_N]


class RamStore:
    """A history in memory; gone with the process. `commit` does nothing."""

    def __init__(self, format: StoreFormat):
        self.format = format
        self._tokens = _Records((), torch.int64)
        self._keys = _Records((format.n_keys, format.key_dim), format.dtype)
        self._levels: dict[int, _Records] = {}

    @property
    def n_tokens(self) -> int:
        return self._tokens.n

    def n_nodes(self, lod: int) -> int:
        return self._levels[lod].n if lod in self._levels else 0

    def append_tokens(self, ids_N: Tensor) -> None:
        self._tokens.append(ids_N)

    def append_nodes(self, lod: int, gists_ND: Tensor, keys_NPC: Tensor | None = None) -> None:
        if (keys_NPC is not None) != (lod == 1):
            raise ValueError(f"LOD{lod}: blocks (LOD1) come with lens keys, other levels without")
        if keys_NPC is not None:
            self._keys.append(keys_NPC)
        self._levels.setdefault(lod, _Records((self.format.d_model,), self.format.dtype)).append(gists_ND)

    def commit(self) -> None:
        pass

    def tokens(self, index_N: Tensor) -> Tensor:
        return self._tokens.at(index_N)

    def gists(self, lod: int, index_N: Tensor) -> Tensor:
        return self._levels[lod].at(index_N)

    def keys(self, index_N: Tensor) -> Tensor:
        return self._keys.at(index_N)
