"""label_utility and train_lensnet on a tiny checkpoint: labels that an interruption does not change, a lens that learns
from them, mistakes in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e_commands import MC, last_checkpoint, run, same, start

from mc.model import load_mega_context
from mc.arms.utility_labels import LabelFolder
from nanochat.loading import load_model

FLAGS = ["--contexts=24", "--edits=6", "--cursors=2", "--batch=4", "--device=cpu"]


@pytest.fixture(scope="module")
def labelled(reference, tmp_path_factory) -> Path:
    """A base directory with a checkpoint, `t`, and its labels, `labels`. Not to be changed."""
    base = Path(shutil.copytree(reference["mc"], tmp_path_factory.mktemp("labelled") / "base"))
    done = run(base, "mc_study", "labels", f"--checkpoint_dir={base}/checkpoints/t", f"--out={base}/labels",
               *FLAGS).ok()
    assert json.loads(done.out.splitlines()[-1])["contexts"] == 24
    return base


def arrays(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {p.name: dict(np.load(p, allow_pickle=False)) for p in sorted(folder.glob("*.npz"))}


def test_an_interrupted_labelling_goes_on(labelled, tmp_path):
    folder = Path(shutil.copytree(labelled / "labels", tmp_path / "labels"))
    whole = arrays(folder)
    for name in ("labels_00002.npz", "labels_00005.npz"):
        (folder / name).unlink()
    (folder / "labels_00002.tmp").write_bytes(b"half a file")
    kept = (folder / "labels_00000.npz").stat().st_mtime_ns
    done = run(labelled, "mc_study", "labels", f"--checkpoint_dir={labelled}/checkpoints/t", f"--out={folder}",
               *FLAGS).ok()
    assert "4 of 6 files done before" in done.out and (folder / "labels_00000.npz").stat().st_mtime_ns == kept
    again = arrays(folder)
    assert again.keys() == whole.keys() and len(whole) == 6
    for name, file in whole.items():
        assert all(np.array_equal(file[key], again[name][key]) for key in file), name
    more = run(labelled, "mc_study", "labels", f"--checkpoint_dir={labelled}/checkpoints/t", f"--out={folder}", *FLAGS,
               "--contexts=28").ok()
    assert "6 of 7 files done before" in more.out


def test_a_killed_labelling_leaves_whole_files(labelled, tmp_path):
    """Killed as soon as there is a file: what is there loads, and the rest comes out as if nothing had happened."""
    folder = tmp_path / "labels"
    flags = [f"--checkpoint_dir={labelled}/checkpoints/t", f"--out={folder}", *FLAGS]
    process = start(labelled, "mc_study", "labels", *flags)
    while not list(folder.glob("*.npz")) and process.process.is_alive():
        process.process.join(0.02)
    process.kill()
    LabelFolder(folder).read()
    run(labelled, "mc_study", "labels", *flags).ok()
    whole, again = arrays(labelled / "labels"), arrays(folder)
    assert whole.keys() == again.keys() and all(np.array_equal(whole[n][k], again[n][k]) for n in whole
                                                for k in whole[n])


def test_labels_are_of_legal_edits_of_the_rows_they_name(labelled):
    labels = LabelFolder(labelled / "labels").read()
    assert labels.row_C.tolist() == list(range(24)) and labels.block_CQE.shape == (24, 2, 6)
    assert (labels.n_CQ % 8 == 0).all() and labels.n_CQ.max() == 120 and len(labels.n_CQ.unique()) == 2
    assert labels.valid_CQE.float().mean() > 0.9 and labels.utility_CQE[labels.valid_CQE].abs().mean() > 0
    assert ((labels.block_CQE + 1) * 8
            <= labels.n_CQ[..., None] - 8)[labels.valid_CQE].all(), "protected blocks are not edited"


def test_a_lens_learns_from_labels_and_nothing_else_moves(labelled, tmp_path):
    base = Path(shutil.copytree(labelled, tmp_path / "base"))
    source, flags = base / "checkpoints" / "t", [f"--labels={base}/labels", "--out_tag=taught", "--steps=60",
                                                 "--log_every=20", "--device=cpu"]
    done = run(base, "mc_study", "train_lensnet", f"--checkpoint_dir={source}", *flags).ok()
    found = json.loads(done.out.splitlines()[-1])
    assert set(found) == {"checkpoint", "hit_at_1_before", "order_before", "hit_at_1_after", "order_after", "in_use"}
    check_in_use(found["in_use"], done.out)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in done.out.splitlines() if line.startswith("step ")]
    assert len(losses) == 3 and losses[-1] < losses[0]  # by 0.098 to 0.93 over ten seeds
    (gpt, meta), (old, old_meta) = load_model(base / "checkpoints" / "taught"), load_model(source)
    assert same(gpt.state_dict(), old.state_dict()) and meta["lens"]["steps"] == 60
    mc, before = (load_mega_context(d, m["step"], m, gpt.config.n_embd)
                  for d, m in ((base / "checkpoints" / "taught", meta), (source, old_meta)))
    changed = {name for name, x in mc.state_dict().items() if not torch.equal(x, before.state_dict()[name])}
    assert changed == {name for name in mc.state_dict() if name.startswith("lensnet.")}
    # the same new lens, untaught
    run(base, "mc_study", "train_lensnet", f"--checkpoint_dir={source}", "--steps=0", "--out_tag=new",
        "--device=cpu").ok()
    untaught, taught = (next(state for name, state in last_checkpoint(base, tag).items() if name.startswith("mc_"))
                        for tag in ("new", "taught"))
    assert changed == {name for name in taught if not torch.equal(taught[name], untaught[name])}
    # any other command takes it, base_train too; and its labels still fit, the base being the same
    run(base, "mc_study", "train_lensnet", f"--checkpoint_dir={base}/checkpoints/taught", f"--labels={base}/labels",
        "--out_tag=more", "--new_lens=0", "--steps=2", "--device=cpu").ok()
    again = run(base, "mc_study", "train_lensnet", f"--checkpoint_dir={source}", *flags[:1], "--out_tag=twice",
                *flags[2:]).ok()
    assert json.loads(again.out.splitlines()[-1]) | {"checkpoint": ""} == found | {"checkpoint": ""}
    assert same(last_checkpoint(base, "twice"), last_checkpoint(base, "taught"))


def check_in_use(report: dict, out: str) -> None:
    """What the lenses choose on held-out rows, as JSON and as a table."""
    assert set(report) == {"before", "after", "window", "random", "recency", "oracle"}
    for name, values in report.items():
        both = {"delta_nll", "regret", "accuracy"}
        assert set(values) == (both | {"delta_nll_edited", "swap_rate"} if name in ("before", "after") else both)
        assert all(low <= mean <= high for mean, low, high in values.values())
        apart = values["regret"][0] - values["delta_nll"][0]
        assert apart == pytest.approx(report["oracle"]["regret"][0] - report["oracle"]["delta_nll"][0])
        assert name == "window" or values["regret"][0] >= 0, "the oracle has tried it"
        mean, low, high = values["delta_nll"]
        word = f"lens, {name}" if name in ("before", "after") else name
        assert f"| {word} | {mean:.3f} [{low:.3f}, {high:.3f}] |" in out
    assert report["oracle"]["regret"][0] == 0 and report["before"]["swap_rate"][0] > 0


def test_a_new_lens_without_labels(labelled, tmp_path, train):
    base = Path(shutil.copytree(labelled, tmp_path / "base"))
    run(base, "mc_study", "train_lensnet", f"--checkpoint_dir={base}/checkpoints/t", "--steps=0", "--out_tag=new").ok()
    new, old = last_checkpoint(base, "new"), last_checkpoint(base)
    name = next(n for n in new if n.startswith("mc_"))
    assert same(new[name]["gist_bias"], old[name]["gist_bias"]) and not same(new[name]["lensnet.key.weight"],
                                                                             old[name]["lensnet.key.weight"])
    train(base, *MC, "--mc_start=0", "--num_iterations=2", f"--init_from={base}/checkpoints/new", "--freeze_base=1",
          "--model_tag=on").ok()


@pytest.mark.parametrize("command, flags, message", [
    ("labels", ["--contexts=0"], "--contexts=0 must be at least 1"),
    ("labels", ["--contexts=10"], "not a multiple of --batch=4"),
    ("labels", ["--edits=99"], "has 6 blocks to edit"),
    ("labels", ["--cursors=99"], "ends of history"),
    ("labels", ["--seed=1"], "holds other labels: seed 0 there, 1 here"),
    ("labels", ["--checkpoint_dir={base}/checkpoints/nowhere"], "no checkpoint directory"),
    ("labels", ["--checkpoint_dir={other}"], "holds other labels: model"),
    ("labels", ["--contexts=100000"], "rows of 128 tokens"),
    ("labels", ["--out={base}/tokenizer/tokenizer.json"], "cannot write"),
    ("train_lensnet", ["--labels={base}/nowhere"], "no labels in"),
    ("train_lensnet", ["--labels={damaged}"], "is damaged"),
    ("train_lensnet", ["--checkpoint_dir={other}"], "measured on another base"),
    ("train_lensnet", ["--out_tag=t"], "holds a checkpoint"),
    ("train_lensnet", ["--out_tag=../up"], "leads out of the folder of checkpoints"),
    ("train_lensnet", ["--near=1"], "--near=1 must be at least 2"),
    ("train_lensnet", ["--steps=0"], "--labels=DIR is what the lens learns from"),
    ("train_lensnet", ["--grow=2"], "must be in [0, 1]"),
    ("train_lensnet", ["--terms=rank:0.5,kl:1"], "--terms=rank:0.5,kl:1: kl is no NAME:WEIGHT"),
    ("train_lensnet", ["--terms=rank"], "rank is no NAME:WEIGHT"),
    ("train_lensnet", ["--terms=rank:-1"], "rank is no NAME:WEIGHT"),
    ("train_lensnet", ["--contexts=100000"], "contexts: 100000: the held-out split has"),
])  # fmt: skip
def test_mistakes_are_one_line(command, flags, message, labelled, other, damaged):
    given = {"labels": [f"--checkpoint_dir={labelled}/checkpoints/t", f"--out={labelled}/labels", *FLAGS],
             "train_lensnet": [f"--checkpoint_dir={labelled}/checkpoints/t", f"--labels={labelled}/labels",
                               "--out_tag=wrong", "--device=cpu"]}[command]
    result = run(labelled, "mc_study", command, *given,
                 *(f.format(base=labelled, other=other, damaged=damaged) for f in flags))
    assert message in result.error
    assert not (labelled / "checkpoints" / "wrong").exists()


@pytest.fixture(scope="module")
def other(labelled, tmp_path_factory) -> Path:
    """The checkpoint with one weight of its base changed, its record made to fit."""
    directory = Path(shutil.copytree(labelled / "checkpoints" / "t", tmp_path_factory.mktemp("other") / "t"))
    from nanochat.checkpoint import load_mc_state, load_model_state, save_checkpoint

    state, meta = load_model_state(directory)
    state["lm_head.weight"][0, 0] += 1
    save_checkpoint(directory, meta["step"], model=state, optimizer_shard={}, meta=meta,
                    mc=load_mc_state(directory, meta["step"]))
    return directory


@pytest.fixture(scope="module")
def damaged(labelled, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(labelled / "labels", tmp_path_factory.mktemp("damaged") / "labels"))
    path = folder / "labels_00001.npz"
    path.write_bytes(path.read_bytes()[:500])
    return folder
