"""`--mc_allocator=stochastic:T`: a session goes by logits with Gumbel noise of temperature T, drawn anew at
every refocus, so that blocks are drawn without replacement in proportion to exp(logit / T).

Keyed by (seed, row, refocus, block): nothing else changes a draw. A session is row 0 of its own seed, so that the
sessions beside it do not matter: other draws, another seed.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mc.keyed_random import gumbel_at


@dataclass(frozen=True)
class Stochastic:
    temperature: float
    span: ClassVar[int] = 1

    SYNTAX: ClassVar[str] = "stochastic:TEMPERATURE, finite and above 0"

    @classmethod
    def parse(cls, values: str) -> "Stochastic":
        """ValueError for anything but a finite number above 0."""
        temperature = float(values)
        if not 0 < temperature < math.inf:
            raise ValueError
        return cls(temperature)

    def disturb(self, logits_BI: Tensor, index_BI: Tensor, rows_B: Tensor, seed: int, refocus: int) -> Tensor:
        """[B, I] logits of the blocks `index` with this refocus's noise."""
        return logits_BI + self.temperature * gumbel_at(rows_B, index_BI, seed, "refocus", refocus)


ARM = Stochastic
