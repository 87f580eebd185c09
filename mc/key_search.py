"""The lens's search over the keys of a whole history: flat."""

from collections.abc import Callable

import torch
from torch import Tensor

from mc.lensnet import LensNet


class KeySearch:
    """Over the blocks that `grow` has announced, whose keys `read_keys` gives."""

    def __init__(self, lens: LensNet, read_keys: Callable[[Tensor], Tensor]):
        self.lens, self.read_keys, self.n_blocks = lens, read_keys, 0

    def grow(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks

    def top(self, tail_BTD: Tensor, cursor: int, m: int, also_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Block numbers [≤ m + I], int64, and their focus logits: the m best, and those asked for."""
        keys_NPC = self.read_keys(torch.arange(self.n_blocks)).to(tail_BTD.dtype)
        logits_N = self.lens.focus_logits(tail_BTD, keys_NPC[None], torch.tensor([cursor]))[0]
        best_I = logits_N.topk(min(m, self.n_blocks)).indices
        index_I = best_I if also_I is None else torch.unique(torch.cat([best_I, also_I]))
        return index_I, logits_N[index_I]
