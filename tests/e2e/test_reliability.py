"""Hours that are not lost: a run that is stopped, fails or is started twice at its end; outputs that cannot
be written; runs in folders."""

import contextlib
import json
import os
import signal
import sys

import pytest
import torch
from e2e_commands import KINDS, TINY, last_checkpoint, losses, rows, run, same, tree

from nanochat import resume
from nanochat.checkpoint import complete_steps, load_model_state
from nanochat.controller import NullController
from nanochat.outputs import holding
from scripts import base_train


@contextlib.contextmanager
def one_thread():
    """As the reference runs were made."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def here(base, prepared, monkeypatch):
    """here(*flags): the tiny training in this process, where a test can plant what happens."""

    def train(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["base_train", *TINY, f"--data={prepared / 'texts'}", *flags])
        with one_thread():
            base_train.main()

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return train


def sending(monkeypatch, owner, name: str, call: int) -> None:
    """SIGTERM arrives when a function is called the n-th time."""
    true, calls = getattr(owner, name), []

    def planted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*args, **kwargs)

    monkeypatch.setattr(owner, name, planted)


WHEN = {"in a step": (base_train, "lr_multiplier", 5, 6), "in a save": (resume, "save_checkpoint", 2, 7),
        "in an evaluation": (base_train, "evaluate", 1, 8)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", WHEN)
def test_sigterm_saves_and_the_resumed_run_is_the_uninterrupted_one(when, kind, here, base, train, reference,
                                                                    monkeypatch, capsys):
    owner, name, call, step = WHEN[when]
    with monkeypatch.context() as m:
        sending(m, owner, name, call)
        here(*KINDS[kind], "--save_every=3", "--eval_every=8")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["stopped"] and told["step"] == step == complete_steps(base / "checkpoints" / "t")[-1]
    done = train(base, *KINDS[kind], "--eval_every=8", "--resume=1").ok()
    assert f"at step {step} of 20" in done.out and losses(base) == losses(reference[kind])
    assert same(last_checkpoint(base), last_checkpoint(reference[kind]))


def test_a_stop_that_came_before_the_first_step_saves_one(here, base, monkeypatch, capsys):
    sending(monkeypatch, NullController, "training_step", 1)
    here()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 1 and complete_steps(base / "checkpoints"
                                                                                                / "t") == [1]


def test_interrupted_by_hand_is_saved_and_no_success(here, base, monkeypatch):
    true = base_train.lr_multiplier
    monkeypatch.setattr(base_train,
                        "lr_multiplier", lambda step, *args, **kwargs: (step == 2
                                                                        and os.kill(os.getpid(), signal.SIGINT),
                                                                        true(step, *args, **kwargs))[1])
    with pytest.raises(KeyboardInterrupt):
        here()
    assert complete_steps(base / "checkpoints" / "t") == [4]


@pytest.mark.parametrize("kind, what", [("vanilla", "evaluate"), ("mc", "scripts.eval.probe.probe_batch")])
def test_a_last_evaluation_that_fails_costs_the_evaluation_alone(kind, what, here, base, train, reference, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("planted")

    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="planted"):
        m.setattr(f"scripts.base_train.{what}" if "." not in what else what, failing)
        here(*KINDS[kind])
    assert same(last_checkpoint(base), last_checkpoint(reference[kind]))
    train(base, *KINDS[kind], "--resume=1").ok()
    if what == "evaluate":  # what was missing is made up for
        assert rows(base)[-1]["val.loss"] == rows(reference[kind])[-1]["val.loss"]
        assert load_model_state(base / "checkpoints" / "t")[1]["val"]["loss"] == rows(base)[-1]["val.loss"]


def test_two_runs_in_one_directory(base, train, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    with holding(base / "checkpoints" / "t"):
        for resume in (0, 1):
            assert "is being written by another run (process" in train(base, f"--resume={resume}", "--seed=7").error
        assert "is being written" in run(base, "mc_study", "train_lensnet", "--checkpoint_dir=x", "--steps=0",
                                         "--out_tag=t").error
    assert not list(base.rglob("checkpoints/t/*"))


def test_runs_in_folders_keep_their_logs_apart(base, train):
    for tag, seed in (("small/a", 1), ("large/a", 2)):
        train(base, f"--model_tag={tag}", f"--seed={seed}", "--stop_at=2").ok()
    first, second = (rows(base, tag) for tag in ("small/a", "large/a"))
    assert [len(first), len(second)] == [2, 2] and first[0]["train.loss"] != second[0]["train.loss"]
    assert len({(base / "runs" / tag / "run_id").read_text() for tag in ("small/a", "large/a")}) == 2
    assert "leads out of the folder" in train(base, "--model_tag=../../t").error


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


# what is refused with --out=X, X a file: before anything is loaded, so that what is missing besides is not noticed
IN_FOLDER = {
    "run_lm_eval": ["--checkpoint_dir=no", "--tasks=x", "--out={file}/o.json"],
    "run_lm_eval  into a folder": ["--checkpoint_dir=no", "--tasks=x", "--out={folder}"],
    "mc_eval compare": [*(f"--{task}_{kind}=no" for task in ("recall", "text") for kind in ("mc", "vanilla")),
                        "--out={file}"],
    "mc_eval focus": ["--recall_mc=no", "--out={file}"],
    "mc_eval text": ["--text_mc=no", "--out={file}/x"],
    "mc_eval stream": ["--checkpoint_dir=no", "--out={file}"],
    "make_data tasks": ["--tasks=mqar", "--out={file}/a/b"],
    "make_docs": ["--out={file}"],
    "mc_study labels": ["--checkpoint_dir=no", "--out={file}"],
    "mc_study importance": ["--checkpoint_dir=no", "--labels={file}"],
    "mc_study suite": ["quick", "--out={file}"],
    "make_data corpus": ["--prose={prose}", "--held_out=a.txt", "--out={file}"],
}


@pytest.mark.parametrize("case", IN_FOLDER)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(case, base, tmp_path):
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder", "prose": tmp_path / "prose"}
    places["folder"].mkdir()
    places["prose"].mkdir()
    for name in "ab":
        (places["prose"] / f"{name}.txt").write_text("prose")
    places["file"].write_text("kept")
    before = tree(base)
    error = run(base, *case.partition("  ")[0].split(), *(flag.format(**places) for flag in IN_FOLDER[case])).error
    assert str(places["folder" if "folder" in case else "file"]) in error
    assert places["file"].read_text() == "kept" and tree(base) == before


def test_a_base_directory_that_is_a_file(prepared, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "set NANOCHAT_BASE_DIR" in run(tmp_path, "tok_train", f"--data={prepared / 'texts'}",
                                          NANOCHAT_BASE_DIR=str(tmp_path / "file" / "x")).error
