"""The documents agree with the code: generated tables, the README's folders, flags, every link."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from nanochat.common import boolean
from scripts.make_docs import commands, flags_of, parser_of

ROOT = Path(__file__).resolve().parents[1]
VAULT = ROOT / "obsidian"
README = ROOT / "README.md"
CODE = ("nanochat", "mc", "scripts", "runs")  # the README's tree names every folder of .py and .sh files below these
PAGES = [README, *sorted(VAULT.rglob("*.md"))]
# of the log: what they say held at the commit they name
DATED = [p for p in PAGES if re.match(r"\d{4}-\d\d-\d\d ", p.name)]
CURRENT = [p for p in PAGES if p not in DATED]


def on(which: list[Path]):
    """For a test of single pages."""
    return pytest.mark.parametrize("page", which, ids=[str(p.relative_to(ROOT)) for p in which])


pages, current, dated = on(PAGES), on(CURRENT), on(DATED)


def test_generated_tables_are_current(tmp_path):
    done = subprocess.run([sys.executable, "-m", "scripts.make_docs", f"--out={tmp_path}"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("Flags.md", "Telemetry.md"):
        committed = VAULT / "ops" / name
        assert committed.read_text() == (tmp_path
                                         / name).read_text(), f"{committed} is out of date: run python -m scripts.make_docs"  # noqa: E501


@pytest.mark.parametrize("command", commands())
def test_every_flag_has_help(command):
    parser = parser_of(command)
    assert parser.description
    for _, actions in flags_of(parser):
        for action in actions:
            assert action.help and action.help.strip(), f"{command} {action.option_strings or action.dest}"


@pytest.mark.parametrize("command", commands())
def test_a_flag_of_0_and_1_is_a_switch(command):
    for _, actions in flags_of(parser_of(command)):
        for action in actions:
            name = f"{command} {action.option_strings or action.dest}"
            assert tuple(action.choices or ()) != (0, 1) and action.type is not bool, f"{name}: use add_switch"
            assert (action.type is boolean) == isinstance(action.default, bool), name


# ---------------------------------------------------------------------------------------------------------------------
# README


def tracked(*folders: str) -> set[str]:
    """Files of the repository below `folders`: tracked, or about to be."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
                            cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # a copy without its history
        return {str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()}
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def folder_tree(text: str) -> dict[str, str]:
    """folder -> description, from the README's tree, one folder a line."""
    block = re.search(r"^## Where things are\n.*?^```\n(.*?)^```", text, re.S | re.M).group(1)
    return {name: description.strip() for name, _, description in (line.partition(" ") for line in block.splitlines())}


def test_readme_names_every_folder_of_code():
    tree = folder_tree(README.read_text())
    code = {f"{Path(name).parent}/" for name in tracked(*CODE) if name.endswith((".py", ".sh"))}
    assert sorted(code - tree.keys()) == [], "folders that the README's tree lacks"
    assert [name for name in tree if not (ROOT / name).is_dir()] == []
    assert [name for name, description in tree.items() if len(description) < 5] == [], "without a description"


def test_readme_is_for_a_reader_in_a_hurry():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("script", ["quickstart", "test"])
def test_readme_names_the_two_commands(script):
    assert re.search(rf"^bash runs/{script}\.sh$", README.read_text(), re.M)
    assert (ROOT / "runs" / f"{script}.sh").is_file()


def test_flags_in_examples_exist():
    """Every `--flag` that the README or an undated page names belongs to a command, or to torchrun."""
    known = {name for c in commands() for _, actions in flags_of(parser_of(c)) for a in actions
             for name in a.option_strings}
    known |= {"--help", "--standalone", "--nproc_per_node", "--all", "--changed"}  # the last two are pytest's here
    for page in CURRENT:
        # `--mc_…` stands for all of them
        used = {flag.rstrip("_") for flag in re.findall(r"(?<![\w-])--[a-z]\w*", page.read_text())}
        assert sorted(used - known - {"--mc"}) == [], page


@dated
def test_dated_pages_name_their_commit(page):
    """A flag, file or command of such a page may be gone: whoever wants to run it again checks that commit out."""
    named = [word for word in re.findall(r"\b[0-9a-f]{7,40}\b", page.read_text()) if re.search("[a-f]", word)
             and re.search("[0-9]", word)]
    if (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT), "cat-file", "-e"]
        named = [word for word in named if subprocess.run([*git, f"{word}^{{commit}}"], capture_output=True).returncode
                 == 0]
    assert named, f"{page.name} names no commit of this repository"


# ---------------------------------------------------------------------------------------------------------------------
# Links


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """Headings as they appear in links: GitHub's slugs."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pages
def test_markdown_links_resolve(page):
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


@pages
def test_wiki_links_resolve(page):
    names = [p.stem for p in VAULT.rglob("*.md")]
    for target in re.findall(r"\[\[([^\]|#]+)[^\]]*\]\]", without_code(page.read_text())):
        assert names.count(target.strip()) == 1, f"{page.name}: [[{target}]] names {names.count(target.strip())} pages"


def test_every_page_is_reachable_from_home():
    seen, todo = set(), [VAULT / "Home.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        text = without_code(page.read_text())
        linked = [(page.parent / unquote(t.partition("#")[0])).resolve()
                  for t in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", text)]
        linked += [p for t in re.findall(r"\[\[([^\]|#]+)", text) for p in VAULT.rglob(f"{t.strip()}.md")]
        todo += [p for p in linked if p.suffix == ".md" and p.is_relative_to(VAULT)]
    assert sorted(str(p.relative_to(VAULT)) for p in set(VAULT.rglob("*.md")) - seen) == []


@current
def test_pages_name_files_that_exist(page):
    """Every repository path in code font, `mc/runtime.py` or `tests/nanochat/test_gpt.py`, is there."""
    for name in re.findall(r"`((?:nanochat|mc|scripts|runs|tests)/[\w/.]+\.(?:py|sh))`", page.read_text()):
        assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_pages_name_tests_that_exist():
    """Every test in code font is there."""
    tests = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py")),
                           re.M))
    for page in CURRENT:
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert named <= tests, f"{page.name}: {sorted(named - tests)}"
