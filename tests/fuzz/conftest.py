"""Counts of the fuzzing: one line at the end of a session."""

from collections import Counter
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder for a module's inputs."""
    return tmp_path_factory.mktemp("fuzz")


def pytest_terminal_summary(terminalreporter) -> None:
    import fuzzing

    total = sum(fuzzing.COUNTS.values(), Counter())
    if total:
        kinds = "; ".join(f"{kind} {c['read']}+{c['refused']}" for kind, c in sorted(fuzzing.COUNTS.items()))
        terminalreporter.write_line(f"fuzzing: {total.total():,} inputs, {total['read']:,} read, {total['refused']:,} "
                                    f"refused ({kinds})")
