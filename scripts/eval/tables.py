"""Tables of reports, in Markdown."""

import math
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines: the head, and a row each."""
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return [line(head), "|---" * len(head) + "|", *map(line, rows)]


def cell(mean: float | None, interval: Sequence[float] | None = None, form: str = ".3f") -> str:
    """A number and its interval, like "0.42 [0.40, 0.44]"; nothing where there is no number, the number alone
    where there is no interval."""
    if mean is None or math.isnan(mean):
        return ""
    if interval is None or math.isnan(interval[0]):
        return f"{mean:{form}}"
    return f"{mean:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
