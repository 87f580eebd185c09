"""KV cache with a length per row, truncation and splice.

Shapes: L layers, B rows, M slots, G kv heads, E head width, D model width. Besides keys and values it keeps, per slot,
what the *next* entry needs: the embedding before smear, and the key before key shift. So a prompt may be fed in chunks
of any size, and a cache may be cut anywhere and continued exactly.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of what has been read so far. `lengths` [B] int64 counts each row's valid slots."""

    def __init__(self, config, batch: int, slots: int, device=None, dtype=torch.float32):
        shape = (config.n_layer, batch, slots, config.n_kv_head, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.k_unshifted = torch.zeros_like(self.k) if config.key_shift else None
        self.x_unsmeared = torch.zeros(batch, slots, config.n_embd, device=device,
                                       dtype=dtype) if config.smear else None
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch, device=device)
        self.ragged = False  # whether rows may differ in length
        self.used = 0  # host-side upper bound of lengths: how many slots attention must look at

    @property
    def slots(self) -> int:
        return self.k.shape[2]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.k_unshifted, self.x_unsmeared) if t is not None)

    def slots_for(self, count: int) -> tuple[Tensor, Tensor]:
        """[B, count] slots that the next `count` entries of each row go to, and of the
        entries before them (−1: none)."""
        if self.used + count > self.slots:
            raise ValueError(f"KV cache holds {self.slots} entries, {self.used} are used, {count} more do not fit")
        slots = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        return slots, slots - 1

    def put(self, buffer_BM: Tensor, slots_BS: Tensor, new_BS: Tensor) -> None:
        buffer_BM[self.rows[:, None], slots_BS] = new_BS.to(buffer_BM.dtype)

    def at(self, buffer_BM: Tensor, slots_BS: Tensor) -> Tensor:
        """[B, S, …] what stands in these slots."""
        return buffer_BM[self.rows[:, None], slots_BS]

    def visible(self, buffer_BM: Tensor, count: int) -> Tensor:
        """[B, used + count, …]: all that a pass of `count` entries may look at."""
        return buffer_BM[:, :self.used + count]

    def mask(self, slots_BS: Tensor, reach: float) -> Tensor | None:
        """bool [B, 1, S, used + S]: which keys each entry sees; None where plain causal serves: one entry that sees
        them all, or the first entries of every row."""
        count = slots_BS.shape[1]
        if not self.ragged and (count == 1 or not self.used) and self.used + count - 1 <= reach:
            return None
        distance = slots_BS[:, None, :, None] - torch.arange(self.used + count, device=slots_BS.device)
        return (distance >= 0) & (distance <= reach)

    def advance(self, written: int, counts_B: Tensor | None = None) -> None:
        """`written` entries were put in every row, of which the first `counts_B` (default: all) are valid."""
        self.lengths = self.lengths + (written if counts_B is None else counts_B)
        self.ragged |= counts_B is not None
        self.used += written

    def truncate(self, lengths_B: Tensor | int) -> None:
        """Forget all but the first `lengths_B` entries of each row. Never lengthens."""
        self.lengths = torch.minimum(self.lengths,
                                     torch.as_tensor(lengths_B, device=self.lengths.device).expand_as(self.lengths))
        self.used = int(self.lengths.max()) if self.lengths.numel() else 0
        self.ragged |= isinstance(lengths_B, Tensor)

    def splice(self, start: int, stop: int, other: "KVCache", other_start: int, other_stop: int) -> None:
        """Replace entries [start, stop) of every row by entries [other_start, other_stop) of
        `other` (same model, same batch).

        What follows is shifted, its keys and values kept as they are. Rows must all be at least `stop` long; ValueError
        when the result would not fit, or the ranges do not exist.
        """
        grow = (other_stop - other_start) - (stop - start)
        if not (0 <= start <= stop <= int(self.lengths.min())
                and 0 <= other_start <= other_stop <= int(other.lengths.min())):
            raise ValueError(f"splice [{start}, {stop}) <- [{other_start}, {other_stop}): no such entries")
        if self.used + grow > self.slots:
            raise ValueError(f"KV cache holds {self.slots} entries, the splice needs {self.used + grow}")
        for name in ("k", "v", "k_unshifted", "x_unsmeared"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                dim = mine.ndim - 2 if name == "x_unsmeared" else 2
                pieces = (mine.narrow(dim, 0, start), theirs.narrow(dim, other_start, other_stop - other_start),
                          mine.narrow(dim, stop, self.used - stop))
                joined = torch.cat(pieces, dim)
                mine.narrow(dim, 0, joined.shape[dim]).copy_(joined)
        self.lengths = self.lengths + grow
        self.used += grow
