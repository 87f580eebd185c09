"""The rooms: imports run downwards, no circles, one name for one thing, a small core, settings that something varies.

What does not hold yet stands in a table of exceptions. An exception that is not needed any more fails: the tables only shrink.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from mc.arm import ADDED, KINDS
from mc.config import core_settings

ROOT = Path(__file__).resolve().parents[1]
FILES = {p.relative_to(ROOT).as_posix(): p for top in ("nanochat", "mc", "scripts") for p in sorted((ROOT / top).rglob("*.py"))}
CORE, SESSION, ARMS, OBSERVE = "mc", "mc/session", "mc/arms", "mc/observe"
ROOMS = ("nanochat", CORE, "mc/store", SESSION, "mc/serve", "scripts/eval", "scripts/bench", "scripts/studies", "scripts")  # from the lowest up
BESIDE = (ARMS, OBSERVE)  # on top of the core; what is above the core may use them

HOME = {  # files that still stand in another room than theirs
    **dict.fromkeys(("session", "key_search", "paged_cache", "path_edits", "focus_price", "session_meter"), SESSION),
    **dict.fromkeys(("evaluation", "diagnostics", "harness"), "scripts/eval"),
}

UPWARD: set = set()
CIRCLES: set = set()
DOUBLES = {
    "Arm", "Context", "Cost", "Edits", "Records", "Rows", "Setting", "Source", "by_distance", "cell", "choose", "describe",
    "draw_cut", "evaluate", "examples", "fingerprint", "fit", "from_flags", "gap_closed", "hit_at", "interval", "judge", "judged", "load",
    "make_arm", "markdown", "market_price", "measure", "place", "plot", "read", "report", "runs", "save_figure", "summary", "train",
    "utilities",
}
INTERFACE = {"main", "make_parser", "add_flags", "run"}  # what every command has
NOT_VARIED = {"damping_floor", "far_entries", "gist_width", "lens_key_dim", "positions"}
NOT_TRIED = {"several", "hidden", "gist_slots"}  # arms that only `mc_bench gists` has compared
CORE_LINES, SESSION_LINES = 1800, 2900
MAIN_LINES = 174  # the goal: 60


def room(path: str) -> str:
    """The room of a file, or where it is going."""
    parts = path.split("/")
    if parts[0] == "mc" and len(parts) == 2 and parts[1].removesuffix(".py") in HOME:
        return HOME[parts[1].removesuffix(".py")]
    if parts[0] == "nanochat":
        return "nanochat"
    return max((r for r in (*ROOMS, *BESIDE) if path.startswith(f"{r}/")), key=len)


def may_import(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if importer in BESIDE:
        return imported in ("nanochat", CORE)
    if imported in BESIDE:
        return ROOMS.index(importer) > ROOMS.index(CORE)
    return ROOMS.index(imported) < ROOMS.index(importer)


@cache
def tree_of(path: str) -> ast.Module:
    return ast.parse(FILES[path].read_text())


def file_of(module: str) -> str | None:
    name = module.replace(".", "/")
    return next((found for found in (f"{name}.py", f"{name}/__init__.py") if found in FILES), None)


@cache
def imports(path: str) -> frozenset[str]:
    """Files of this repository that a file imports anywhere: at its top, in a function, or by `import_optional` and `import_module`."""
    package, found = path.split("/")[:-1], set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_optional", "import_module"):
            words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found.add(".".join(words))
    return frozenset(f for f in map(file_of, found) if f and f != path and not f.endswith("__init__.py"))


@cache
def lines_of_code(path: str) -> int:
    """Without blank lines, comments and docstrings."""
    documented: set[int] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code: set[int] = set()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(FILES[path].read_text()).readline):
        if token.type not in silent:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documented)


def only_shrinks(found: set, allowed: set, what: str) -> None:
    assert not found - allowed, f"{what}: {sorted(map(str, found - allowed))}"
    assert not allowed - found, f"{what}: these exceptions are not needed any more, take them out: {sorted(map(str, allowed - found))}"


def test_every_file_that_waits_for_its_room_is_there():
    assert sorted(name for name in HOME if f"mc/{name}.py" not in FILES) == []


def test_imports_run_downwards():
    found = {(path, other) for path in FILES for other in imports(path) if not may_import(room(path), room(other))}
    only_shrinks(found, UPWARD, "imports that climb")


def circles() -> set[frozenset[str]]:
    """Strongly connected files (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(path: str) -> None:
        index[path] = low[path] = len(index)
        stack.append(path)
        for other in imports(path):
            if other not in index:
                visit(other)
            if other in stack:
                low[path] = min(low[path], low[other])
        if low[path] == index[path]:
            ring = stack[stack.index(path):]
            del stack[stack.index(path):]
            if len(ring) > 1:
                found.add(frozenset(ring))

    for path in FILES:
        if path not in index:
            visit(path)
    return found


def test_no_circle_of_imports():
    only_shrinks(circles(), CIRCLES, "files that import each other")


def test_one_name_one_thing():
    """Of public classes and functions; every command has its own `main`."""
    where = defaultdict(list)
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                where[node.name].append(path)
    only_shrinks({name for name, paths in where.items() if len(paths) > 1} - INTERFACE, DOUBLES, "names of several things")


def test_the_core_is_small():
    total = Counter()
    for path in FILES:
        total[room(path)] += lines_of_code(path)
    assert total[CORE] <= CORE_LINES, total[CORE]
    assert total[CORE] + total[SESSION] <= SESSION_LINES, (total[CORE], total[SESSION])


def test_the_training_script_is_an_essay():
    (main,) = (n for n in tree_of("scripts/base_train.py").body if isinstance(n, ast.FunctionDef) and n.name == "main")
    assert main.end_lineno - main.lineno + 1 <= MAIN_LINES


def test_every_setting_is_varied_by_a_recipe_or_a_study():
    """A setting that nothing sets is a constant with a flag; so is an arm that nothing names."""
    text = "".join(p.read_text() for p in (ROOT / "runs").rglob("*") if p.suffix in (".sh", ".yaml"))
    only_shrinks({f.name for f in core_settings()} - set(re.findall(r"\bmc_(\w+)", text)), NOT_VARIED, "settings that no recipe and no study sets")
    chosen = {kind: re.findall(rf"\bmc_{kind}(?:: |=)(\[[^]]*\]|\"[^\"]*\"|[\w:,]+)", text) for kind in ("arms", *KINDS)}
    tried: set[str] = set()
    for kind, values in chosen.items():
        words = {word for value in values for word in re.findall(r"[a-z_]+", value)}
        tried |= words & set(ADDED) if kind == "arms" else {module for value, module in KINDS[kind].items() if value in words}
    only_shrinks({*ADDED, *(module for values in KINDS.values() for module in values.values())} - tried, NOT_TRIED, "arms that no recipe and no study names")


def test_an_arm_is_imported_only_when_it_is_named():
    code = "import sys; from mc.runtime import MCController; from mc.config import from_dict; from_dict({}); print([m for m in sys.modules if m.startswith('mc.arms')]); " \
           "from_dict({'arms': 'rank', 'lens': 'perceiver'}); print(sorted(m.removeprefix('mc.arms.') for m in sys.modules if m.startswith('mc.arms.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['lens_perceiver', 'rank', 'reader']"]


def test_every_arm_is_registered_and_has_its_test():
    shared = {"reader", "naming", "utility_labels"}  # what several arms use, and labels on disk
    elsewhere = {"gist_slots": "test_gistnet", "several": "test_gistnet"} | dict.fromkeys(KINDS["lens"].values(), "arms/test_reader")  # side by side
    modules = {Path(path).stem for path in FILES if path.startswith(f"{ARMS}/")} - {"__init__"} - shared
    assert modules == {*ADDED, *(module for values in KINDS.values() for module in values.values())}
    tests = {name: ROOT / "tests" / f"{elsewhere.get(name, 'arms/test_' + name)}.py" for name in modules}
    assert sorted(name for name, path in tests.items() if not path.exists()) == []
