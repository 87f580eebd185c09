"""Flags of every command: values at the edges of their types, spelled in every way; parsed, and checked as far as the
command goes before it works."""

import argparse
import importlib
import shutil
from pathlib import Path

import pytest
from fuzzing import command, fuzzed, image
from hypothesis import strategies as st
from test_fuzz_checkpoints import TRAIN

from nanochat.telemetry import meter
from nanochat.tokenizer import Tokenizer
from scripts import base_eval, base_train, chat_cli, tok_train
from scripts.eval import run_focus as eval_focus
from scripts.eval import task_files
from scripts.studies import run_classifier, run_importance
from scripts.studies import run_labels as label_utility
from scripts.studies import run_train_lensnet as train_lensnet

SCRIPTS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "scripts").glob("[!_]*.py"))
NUMBERS = st.one_of(st.integers(-2, 130).map(str),
                    st.sampled_from(["nan", "inf", "-inf", "1e309", "1e-320", "9" * 30, "9" * 5000, str(2**31),
                                     str(2**63), str(-(2**63)), "", " 1", "0x1", "1_0", "٣", "0.5", "-0", "1e3"]))
WORDS = st.one_of(st.text(max_size=6),
                  st.sampled_from(["", "-", "--", "/nowhere", ".", "..", "\ud800", "a/b", "x" * 300, ",", "1,",
                                   "gate:1", "gate:nan", "lens:1", "bundle:0", "bundle:2", "stochastic:-1",
                                   "threshold:1,2",
                                                         "random", "recall", "tasks:", "tasks:x=1", "tasks:passkey=0",
                                   "SL", "latest", "0", "8:1", "32:0", "a:b", "²"]))


def flags_of(parser: argparse.ArgumentParser) -> st.SearchStrategy:
    """One of a parser's flags with a value, spelled --a_b=v, --a_b v, --a-b v, or cut short."""
    actions = [a for a in parser._actions if a.option_strings and a.dest != "help"]

    def spelled(action: argparse.Action) -> st.SearchStrategy:
        values = NUMBERS if action.type in (int, float) else WORDS
        if action.choices:
            values = st.one_of(st.sampled_from([str(c) for c in action.choices]),
                               st.sampled_from([str(c) for c in action.choices]), values)
        name = action.option_strings[-1]
        forms = st.sampled_from(["{n}={v}", "{n}={v}", "{n}={v}", "{n} {v}", "{d} {v}", "{d}={v}", "{cut}={v}", "{n}"])
        return st.tuples(forms, values).map(lambda t: t[0].format(n=name, d=name.replace("_", "-"), cut=name[:-1],
                                                                  v=t[1]).split(" ", 1))

    return st.sampled_from(actions).flatmap(spelled)


def parsers_of(script: str) -> list[tuple[list[str], argparse.ArgumentParser]]:
    """(words before the flags, parser) of a command, each of its sub-commands apart."""
    parser = importlib.import_module(f"scripts.{script}").make_parser()
    subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [([name], sub) for a in subs for name, sub in a.choices.items()] or [([], parser)]


ALL = [(f"{script} {' '.join(words)}".strip(), words, parser, script) for script in SCRIPTS
       for words, parser in parsers_of(script)]


@fuzzed(st.sampled_from(ALL), st.data())
def test_every_parser(of, data):
    name, words, parser, script = of
    if not any(a.option_strings and a.dest != "help" for a in parser._actions):
        return
    flags = [part for flag in data.draw(st.lists(flags_of(parser), max_size=4)) for part in flag]
    parse = importlib.import_module(f"scripts.{script}").make_parser().parse_args
    command("flags, parsed", lambda: parse([*words, *flags]))


class Stop(SystemExit):
    """Where a command begins to work: its flags were good."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory with a checkpoint; commands stop where they would begin to compute."""
    folder = tmp_path_factory.mktemp("flags")

    def stop(*_, **__):
        raise Stop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setattr(meter, "peak_flops", lambda device: 1e9)
        Tokenizer([bytes([i]) for i in range(256)]).save()
        assert command("commands on checkpoints", base_train.main, *TRAIN)
        patch.setattr(base_eval, "evaluate", stop)
        patch.setattr(chat_cli, "converse", stop)
        patch.setattr(chat_cli, "chat_plain", stop)
        patch.setattr(eval_focus, "judge_setting", stop)
        patch.setattr(eval_focus, "judge_hops", stop)
        patch.setattr(run_importance, "importance", stop)
        patch.setattr(run_classifier, "train_classifier", stop)
        patch.setattr(label_utility, "measure", stop)
        patch.setattr(train_lensnet, "save_checkpoint", stop)
        patch.setattr(tok_train.Tokenizer, "train", stop)
        patch.setattr(task_files, "open_token_cache", stop)
        patch.setattr(meter, "open_recorder", stop)
        yield folder


HERE = "--checkpoint_dir={base}/checkpoints/t"
WHOLE = {  # what a command takes as it stands; flags that are drawn come behind, and win
    "base_train": [*TRAIN, "--model_tag=u"],
    "base_train dry": [*TRAIN, "--model_tag=u", "--dry_run=1"],
    "base_train vanilla": [*[flag for flag in TRAIN if not flag.startswith("--mc_")], "--model_tag=u"],
    "base_eval": [HERE, "--eval_tokens=128", "--micro_batch=2", "--device=cpu"],
    "chat_cli": [HERE, "--prompt=ab", "--max_tokens=2", "--device=cpu", "--mc_enabled=1"],
    "chat_cli vanilla": [HERE, "--prompt=ab", "--device=cpu"],
    "mc_eval focus": ["--recall_mc={base}/checkpoints/t", "--contexts=2"],
    "mc_study importance": [HERE, "--labels={base}/labels", "--device=cpu"],
    "mc_study classifier": [HERE, "--labels={base}/labels", "--device=cpu"],
    "mc_study labels": [HERE, "--out={base}/utilities", "--contexts=4", "--edits=2", "--device=cpu"],
    "mc_study train_lensnet": [HERE, "--out_tag=lens", "--steps=0", "--device=cpu"],
    "tok_train": ["--data=stdlib"],
    "make_data tasks": ["--out={base}/tasks", "--data=stdlib"],
}
# drawn too, for the parser alone
DEAR = {"depth", "aspect_ratio", "data", "log_dir", "mc_store", "out", "labels", "resume", "init_from", "run",
        "model_tag", "out_tag", "keep_drop"}


@fuzzed(st.sampled_from(sorted(WHOLE)), st.data(), cost=2)
def test_flags_of_commands(base, name, data):
    script, *rest = name.split()
    words = rest if script in ("mc_eval", "mc_study", "make_data") else []
    parser = next(p for _, w, p, s in ALL if s == script and w == words)
    drawn = data.draw(st.lists(flags_of(parser), min_size=1, max_size=2))
    flags = [part for flag in drawn if flag[0].lstrip("-").partition("=")[0].replace("-", "_") not in DEAR
             for part in flag]
    whole = [flag.format(base=base) for flag in WHOLE[name]]
    kept = image(base / "checkpoints")
    command("flags, commands", importlib.import_module(f"scripts.{script}").main, *words, *whole, *flags)
    assert image(base / "checkpoints") == kept
    for made in ("labels", "utilities", "tasks", "evals"):
        shutil.rmtree(base / made, ignore_errors=True)
