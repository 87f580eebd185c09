"""KV of working contexts that are edited: entries in slots of any order.

A slot is a page of one entry: an entry keeps its slot while it is shown, and an edit writes only the slots of its new
entries; no tensor is ever concatenated or moved. Each slot knows the global position of its entry's centre, which
decides causality, for the entries of a cut do not overlap, and the logit bias of its entry. Rows are sessions; a pass
may run some of them, and what pads its shorter rows goes to a spare slot that nobody sees.

Shapes: B rows, M slots, A rows of a pass, S entries of a pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.kv_cache import KVCache

NOWHERE = 2.0 ** 53  # position of an empty slot: behind every entry


class Placement(NamedTuple):
    """The entries of the next pass. Padding: the spare slot, before −1, centre NOWHERE."""

    rows_A: Tensor  # int64, ascending
    slot_AS: Tensor
    before_AS: Tensor  # slot of the entry before, −1 where none
    centre_AS: Tensor  # float64, in tokens
    bias_AS: Tensor


class PagedCache(KVCache):
    """`slots` entries for each of `batch` sessions."""

    def __init__(self, config, batch: int, slots: int, device=None, dtype=torch.float32):
        super().__init__(config, batch, slots + 1, device, dtype)
        self.spare = slots
        # float64: from 2^24 on float32 does not tell neighbouring tokens apart
        self.centre_BM = torch.full((batch, slots + 1), NOWHERE, device=device, dtype=torch.float64)
        self.bias_BM = torch.zeros(batch, slots + 1, device=device, dtype=dtype)
        self.batch = batch

    def nbytes(self) -> int:
        return super().nbytes() + self.centre_BM.nbytes + self.bias_BM.nbytes

    def place(self, placement: Placement) -> None:
        """Announce the entries of the next pass; from then on they are visible."""
        self.placement, self.rows = placement, placement.rows_A
        self.put(self.centre_BM, placement.slot_AS, placement.centre_AS)
        self.put(self.bias_BM, placement.slot_AS, placement.bias_AS)

    def clear(self, row: int, slots_N: Tensor) -> None:
        """Forget the entries in some slots of a row."""
        # their keys may stay: nobody sees what has no position
        self.centre_BM[row, slots_N] = NOWHERE

    def slots_for(self, count: int) -> tuple[Tensor, Tensor]:
        return self.placement.slot_AS, self.placement.before_AS

    def visible(self, buffer_BM: Tensor, count: int = 0) -> Tensor:
        """[A, M, …]; a copy only where the pass runs some of the rows."""
        return buffer_BM if len(self.rows) == self.batch else buffer_BM[self.rows]

    def mask(self, slots_AS: Tensor, reach: float) -> Tensor:
        """Float [A, 1, S, M] to add to the logits: the key's bias, −inf for keys that stand after the entry. No window
        is applied, `mc.session` refuses models whose windows are shorter than a working context."""
        behind = (self.visible(self.centre_BM)[:, None] - self.placement.centre_AS[..., None])[:, None]
        # padding stands NOWHERE too and so sees every slot: a row of −inf alone would be NaN
        return torch.where(behind <= 0, self.visible(self.bias_BM)[:, None, None], -torch.inf)

    def advance(self, written: int, counts_B: Tensor | None = None) -> None:
        """Nothing to count: `place` has said where everything stands."""
