"""Which tests run: the short suite, which `bash runs/test.sh` waits for, leaves out what is marked `long`.

    python -m pytest                       the short suite
    python -m pytest --all                 the long tests as well
    python -m pytest --changed             those long files as well whose sources differ from twenty commits before
    python -m pytest tests/core/test_x.py  all of that file: whoever names a file or a folder means it

The rule: a test is long when it takes more than twenty seconds of one core, what it shows cannot be shown by a smaller
model or fewer examples, and what it guards is guarded by a short test too, if less closely. The whole short suite takes
at most eight minutes on two cores; what would go beyond makes another test smaller first.
"""

import os
import signal
from functools import cache

import pytest
from changed import changed_since, sources
from import_graph import ROOT

AGO = 20  # commits

# A shell starts what it runs in the background with Ctrl-C ignored, nohup with SIGHUP ignored, and commands keep to
# that: the tests of signals need them as at a terminal.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# Two processes share two cores, and a test's threads must not depend on the machine: sums are as on every other.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the long tests as well")
    parser.addoption("--changed", action="store_true",
                     help=f"those long files as well whose sources differ from {AGO} commits before")


def pytest_configure(config: pytest.Config) -> None:
    config.whole_suite = config.args_source == pytest.Config.ArgsSource.TESTPATHS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the long tests of files that nobody asked for."""
    if not config.whole_suite or config.getoption("all"):
        return
    changed = changed_since(AGO) if config.getoption("changed") else set()

    @cache
    def wanted(file: str) -> bool:
        return changed is None or not changed.isdisjoint(sources(file))

    kept, left = [], []
    for item in items:
        file = item.path.relative_to(ROOT).as_posix()
        (left if item.get_closest_marker("long") and not wanted(file) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)
