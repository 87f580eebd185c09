"""`--mc_allocator=bundle:S`: one edit of a session shows up to S adjacent siblings, paid for by what lies around them
(`mc.session.refocus`)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Bundle:
    span: int

    SYNTAX: ClassVar[str] = "bundle:BLOCKS, two or more"

    @classmethod
    def parse(cls, values: str) -> "Bundle":
        """ValueError for anything but a whole number of two or more."""
        if (span := int(values)) < 2:
            raise ValueError
        return cls(span)

    def disturb(self, logits_BI: Tensor, index_BI: Tensor, rows_B: Tensor, seed: int, refocus: int) -> Tensor:
        return logits_BI


ARM = Bundle
