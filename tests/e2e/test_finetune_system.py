"""mc_study finetune, importance and classifier on a tiny checkpoint: what they leave behind, run again,
interrupted, and mistakes in one line."""

import json

import pytest
import torch
from e2e_commands import run, tree

from nanochat.tokenizer import Tokenizer
from scripts.eval.methods.registry import load_models, make_method
from scripts.eval.rows import make_batches

SHORT = ["--steps=2", "--rows=2", "--dev=1", "--budgets=40", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(reference):
    return reference["mc"], reference["mc"] / "checkpoints" / "t"


def last(done) -> dict:
    return json.loads(done.out.strip().splitlines()[-1])


def test_rows_of_text_are_judged_on_the_next_token(prepared, base, monkeypatch):
    """Trap 1, for what every fine-tuning reads."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    flags = dict(seed=0, text_column="text", needles=1, recall_blocks=2)
    made = make_batches(str(prepared / "texts"), "train", Tokenizer.load(), flags, history=64, horizon=8, block_size=8,
                        rows=2)(0)
    assert torch.equal(made.targets_BT[:, :-1], made.tokens_BT[:, 1:])


def test_labels_classifier_and_arm(trained, tmp_path):
    base, checkpoint = trained
    labels, out = tmp_path / "labels", tmp_path / "arm"
    label = [f"--checkpoint_dir={checkpoint}", f"--labels={labels}", "--rows=2", "--device=cpu"]
    assert last(run(base, "mc_study", "importance", *label, "--batches=2").ok())["made"] == 2
    assert last(run(base, "mc_study", "importance", *label,
                    "--batches=3").ok())["made"] == 1, "goes on where it stopped"
    assert "made otherwise: teacher" in run(base, "mc_study", "importance", *label, "--teacher=attention").error
    taught = last(run(base, "mc_study", "classifier", f"--checkpoint_dir={checkpoint}", f"--labels={labels}",
                      "--steps=2", "--device=cpu").ok())
    assert 0 <= taught["kept"] <= 1
    arm = ["--method=drop_learned", f"--checkpoint_dir={checkpoint}", f"--out={out}", *SHORT]
    assert "keep/drop classifier" in run(base, "mc_study", "finetune", *arm).error and not out.exists()
    found = last(run(base, "mc_study", "finetune", *arm, f"--classifier={taught['classifier']}").ok())
    assert list(found["dev_nll"]) == ["0.1", "0.3"] and str(found["lr_scale"]) in found["dev_nll"]
    models, meta = load_models(out)
    assert meta["finetuned"]["system"] == "drop_learned" and make_method("drop_learned", models, 40)
    before = tree(out)
    again = run(base, "mc_study", "finetune", *arm, f"--classifier={taught['classifier']}").ok()
    assert "there already" in again.out and last(again)["dev_nll"] == found["dev_nll"] and tree(out) == before
    assert "steps differ" in run(base, "mc_study", "finetune", *arm, "--steps=3",
                                 f"--classifier={taught['classifier']}").error
    assert tree(out) == before


def test_gists_arm_on_tasks(trained, tmp_path):
    base, checkpoint = trained
    out = tmp_path / "arm"
    into = [f"--checkpoint_dir={checkpoint}", f"--out={out}", *SHORT]
    refused = run(base, "mc_study", "finetune", "--method=gists_lens", *into, "--data=tasks:nothing").error
    assert "nothing" in refused and not out.exists()
    run(base, "mc_study", "finetune", "--method=mean_gists", *into, "--lr_scales=0.2").ok()
    models, meta = load_models(out)
    assert models.mc.config.gist == "mean" and meta["step"] == 22


@pytest.mark.parametrize("flags, said", [
    (["--method=rag"], "no system 'rag'"),
    (["--method=quest"], "fine-tune that one"),
    (["--method=bm25", "--steps=0"], "needs steps"),
    (["--method=bm25", "--budgets=a"], "--budgets=a"),
    (["--method=bm25", "--rows=0"], "--rows=0"),
    (["--method=bm25", "--budgets=9"], "a budget of 9 entries"),
])
def test_mistakes_in_one_line(trained, tmp_path, flags, said):
    base, checkpoint = trained
    assert said in run(base, "mc_study", "finetune", f"--checkpoint_dir={checkpoint}", f"--out={tmp_path / 'x'}",
                       *SHORT, *flags).error
    assert not (tmp_path / "x").exists()
