"""Which tests run: the short suite without what is long, long files whose sources changed, all of them."""

import ast
import subprocess
import sys

import pytest
from changed import changed_since, sources
from import_graph import ROOT, tree_of

OBSERVABILITY, CORE = "tests/e2e/test_observability.py", "tests/core/test_gaussian_rope.py"
LONG, SHORT = "test_every_number_and_every_panel_is_in_the_store", "test_what_is_not_installed_is_said_in_a_line"


def git(folder, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_what_differs_from_some_commits_before(tmp_path):
    """On disk, in the index, and files that git does not know yet; no answer is none, not nothing."""
    assert changed_since(1, tmp_path) is None, "no repository"
    git(tmp_path, "init")
    for i in range(3):
        (tmp_path / f"{i}.py").write_text("x = 1\n")
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-m", str(i))
    assert changed_since(3, tmp_path) is None, "a history that is too short"
    assert changed_since(2, tmp_path) == {"1.py", "2.py"} and changed_since(0, tmp_path) == set()
    (tmp_path / "0.py").write_text("x = 2\n")
    (tmp_path / "new.py").write_text("")
    (tmp_path / "1.py").unlink()
    assert changed_since(1, tmp_path) == {"0.py", "1.py", "2.py", "new.py"}
    git(tmp_path, "clone", "--depth=2", f"file://{tmp_path}", str(tmp_path / "shallow"))
    assert changed_since(1, tmp_path / "shallow") == {"2.py"} and changed_since(2, tmp_path / "shallow") is None


def test_sources_of_a_test_are_what_it_may_run():
    found = sources(OBSERVABILITY)
    assert {OBSERVABILITY, "tests/e2e/conftest.py", "tests/e2e/e2e_commands.py", "tests/conftest.py", "pyproject.toml",
            "runs/observability/e2e.sh", "runs/observability/alerts.yaml",  # it names the folder
            "scripts/base_train.py", "mc/runtime.py",  # the folder's programs run them, by name
            "mc/arms/rank.py"} <= found, "an arm is imported by a name that is put together"  # fmt: skip
    assert "scripts/studies/run_ablate.py" in sources("tests/e2e/test_ablate.py"), "a command's subcommand"
    core = sources(CORE)
    assert {CORE, "mc/gaussian_rope.py"} <= core
    assert not [path for path in core if path.startswith(("scripts/", "mc/session/", "runs/"))]


@pytest.mark.parametrize("flags, runs", [([], False), (["--all"], True), (["--changed"], None)])
def test_long_tests_are_left_out_of_the_short_suite(flags, runs):
    """`--changed` as git says; in a copy without git all of them."""
    if runs is None:
        changed = changed_since(20)
        runs = changed is None or not changed.isdisjoint(sources(OBSERVABILITY))
    suite = ["-o", f"testpaths={OBSERVABILITY}"]  # no file is named: this is the suite
    command = [sys.executable, "-m", "pytest", "--collect-only", *flags]
    for given, wanted in ((suite, runs), ([OBSERVABILITY], True)):
        done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert f"{OBSERVABILITY}::{SHORT}" in done.stdout and (f"{OBSERVABILITY}::{LONG}" in done.stdout) == wanted


def marks(path) -> list[tuple[str, ast.expr]]:
    """(test, mark) of the long tests of a file."""
    return [(node.name, mark) for node in ast.walk(tree_of(path.relative_to(ROOT).as_posix()))
            if isinstance(node, ast.FunctionDef) for mark in node.decorator_list
            if ast.unparse(mark).startswith("pytest.mark.long")]


def test_what_a_long_test_guards_a_short_one_guards_too():
    """@pytest.mark.long("tests/folder/test_file.py::test_name"): there, and not long itself."""
    long = {p.relative_to(ROOT).as_posix(): found for p in (ROOT / "tests").rglob("test_*.py") if (found := marks(p))}
    assert long
    for path, tests in long.items():
        for name, mark in tests:
            assert isinstance(mark, ast.Call) and len(mark.args) == 1, f"{path}::{name}: which short test?"
            file, _, guard = ast.literal_eval(mark.args[0]).partition("::")
            names = {n.name for n in ast.walk(tree_of(file)) if isinstance(n, ast.FunctionDef)}
            assert guard in names and guard not in dict(long.get(file, [])), f"{path}::{name}: {file}::{guard}"
