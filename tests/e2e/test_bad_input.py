"""A user's mistake: one clear line on stderr, exit code 2, no traceback, nothing written and nothing lost."""

import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from e2e_commands import MC, TINY, last_checkpoint, real, rows, same, tree

from mc.runtime import MCController
from nanochat.common import UserError
from nanochat.controller import NullController
from scripts import base_train

FLAGS = {
    "unknown flag": (["--learning_rate=3"], "unknown flags: --learning_rate=3"),
    "stray word": (["12"], "unknown flags: 12"),
    "unknown flag of mc": ([*MC, "--mc_bogus=1"], "unknown flags: --mc_bogus=1"),
    "not a number": (["--depth=deep"], "--depth: invalid int value: 'deep'"),
    "unknown value": (["--rows=shuffled"], "--rows: invalid choice: 'shuffled'"),
    "unknown value of mc": ([*MC, "--mc_gist=magic"], "--mc_gist: invalid choice: 'magic'"),
    "mc flag without mc": (["--mc_budget=64"], "--mc_budget=64: needs --mc_enabled=1"),
    "compiled with mc": ([*MC, "--compile=1"], "--compile=1"),
    "packed with mc": ([*MC, "--rows=packed"], "--rows=packed"),
    "packed without documents": (["--data=recall", "--rows=packed"], "--rows=packed has no effect with --data=recall"),
    "column of stdlib": (["--data=stdlib", "--text_column=body"],
                         "--text_column=body has no effect with --data=stdlib"),
    "column of facts": (["--data=needle", "--text_column=body"], "--text_column=body has no effect with --data=needle"),
    "recall blocks of text": (["--recall_blocks=8"], "--recall_blocks=8 has no effect"),
    "too few recall blocks": (["--data=recall", "--recall_blocks=1"], "--recall_blocks=1 must be at least 2"),
    "frozen without a start": ([*MC, "--freeze_base=1", "--mc_start=0"],
                               "needs --mc_enabled=1, --init_from=DIR and --mc_start=0"),
    "frozen with a rate": ([*MC, "--freeze_base=1", "--mc_start=0", "--init_from=x", "--matrix_lr=0.1"],
                           "--matrix_lr=0.1 has no effect with --freeze_base=1"),
    "windows with mc": ([*MC, "--window_pattern=SL", "--max_seq_len=1024", "--total_batch_size=2048"],
                        "--window_pattern=SL"),
    "batch not divisible": (["--total_batch_size=500"], "--total_batch_size=500 is not a multiple"),
    "odd head": (["--head_dim=15", "--smear=0", "--value_embeds=0"], "heads of even width"),
    "no head": (["--head_dim=0"], "--head_dim=0 must be at least 1"),
    "too narrow": (["--aspect_ratio=8", "--head_dim=8"], "width 16: smear and value embeddings read 24"),
    "never logged": (["--log_every=0"], "--log_every=0 must be at least 1"),
    "ratio": (["--warmdown_ratio=1.5"], "--warmdown_ratio=1.5 must be in [0, 1]"),
    "not finite": (["--matrix_lr=nan"], "--matrix_lr=nan must be at least 0"),
    "recent tokens do not fit the block size": ([*MC, "--mc_recent=9"],
                                                "--mc_recent=9 is not a multiple of the block size 8"),
    "budget too small for the tree": ([*MC, "--mc_budget=20"], "a budget of 20 entries is too small for 120 tokens"),
    "budget holds everything": ([*MC, "--mc_budget=121"], "holds the whole history of 120 tokens"),
    "shares": ([*MC, "--mc_cuts=lens:0.5"], "sum to 1"),
    "too wide": (["--aspect_ratio=100000000000"], "--aspect_ratio=100000000000 must be at most"),
    "rows too long": (["--max_seq_len=9223372036854775807"], "must be at most"),
    "data without a name": (["--data="], "--data='' names nothing"),
    "seed beyond 64 bits": (["--seed=99999999999999999999"], "does not fit 64 bits"),
    "vocabulary": (["--vocab_size=100"], "--vocab_size=100, but the tokenizer has"),
}


@pytest.fixture(scope="module")
def kept(reference, tmp_path_factory) -> Path:
    """A base directory with a finished run that nothing here may touch."""
    return Path(shutil.copytree(reference["mc"], tmp_path_factory.mktemp("bad") / "base"))


@pytest.fixture(params=[pytest.param(v, id=k) for k, v in FLAGS.items()])
def mistake(request):
    return request.param


def test_flags(mistake, kept, train):
    flags, message = mistake
    before = tree(kept)
    assert message in train(kept, *flags).error
    assert tree(kept) == before


def test_data_is_missing_or_empty(kept, train, tmp_path):
    before = tree(kept)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    for name in "ab":
        (tmp_path / "blank" / f"{name}.txt").write_text(" \n")
    for directory, message in {"nowhere": "no such directory",
                               "empty": "no .parquet .jsonl .jsonl.gz .jsonl.zst .txt .md .py files in it",
                               "blank": "is empty"}.items():
        error = train(kept, f"--data={tmp_path / directory}").error
        assert message in error and directory in error
    assert tree(kept) == before


def test_corrupt_parquet(kept, train, tmp_path):
    before = tree(kept)
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(2):
        pq.write_table(pa.table({"text": [f"{j} some words of text in shard {i} " * 200 for j in range(20)]}),
                       shards / f"{i}.parquet")
    damaged = shards / "0.parquet"
    whole = damaged.read_bytes()
    for content in (whole[: len(whole) // 2], b"", bytes(b ^ 255 for b in whole)):
        damaged.write_bytes(content)
        error = train(kept, f"--data={shards}").error
        assert "damaged parquet file" in error and str(damaged) in error
    damaged.write_bytes(whole)
    assert "no text column 'body'" in train(kept, f"--data={shards}", "--text_column=body").error
    assert tree(kept) == before


def test_too_little_data(kept, train):
    before = tree(kept)
    assert "evaluation asks for 10000000 tokens" in train(kept, "--eval_tokens=10000000").error
    assert "document has 32769 tokens" in train(kept, "--max_seq_len=32768", "--total_batch_size=0").error
    assert tree(kept) == before


def test_no_tokenizer(prepared, train, tmp_path):
    base = tmp_path / "base"
    assert "run: python -m scripts.tok_train" in train(base).error
    assert not base.exists()
    shutil.copytree(prepared / "base" / "tokenizer", base / "tokenizer")
    (base / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "damaged tokenizer" in train(base).error and list(tree(base)) == ["tokenizer/tokenizer.json"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def test_corrupt_newest_checkpoint(base, train, reference):
    """The older one is used, which is said; when none is intact nothing is trained over them."""
    train(base, "--stop_at=8", "--save_every=4").ok()
    directory = base / "checkpoints" / "t"
    truncate(directory / "model_000008.pt")
    resumed = train(base, "--resume=1").ok()
    assert "skipping the checkpoint of step 8" in resumed.err and "model_000008.pt has 1000 bytes" in resumed.err
    assert "at step 4 of 20" in resumed.out
    assert same(last_checkpoint(base), last_checkpoint(reference["vanilla"]))
    for path in directory.glob("model_*"):
        truncate(path)
    before = tree(base)
    done = train(base, "--resume=1")
    *warnings, error = done.err.strip().splitlines()
    assert done.code == 2 and "no intact checkpoint" in error and all(line.startswith("warning: skipping")
                                                                      for line in warnings)
    assert "Traceback" not in done.err and tree(base) == before


def test_a_finished_run_is_not_trained_over(kept, train):
    before = tree(kept)
    error = train(kept, "--num_iterations=2").error
    assert "--resume=1" in error and "--model_tag" in error and tree(kept) == before
    assert "at step 20 of 20" in train(kept, *MC, "--resume=1").ok().out
    assert [row["step"] for row in rows(kept)] == list(range(1, 21))


def test_diverged(base, train):
    """A loss that is not finite stops the run before its gradients reach the weights."""
    error = train(base, "--embedding_lr=1e38", "--unembedding_lr=1e38", "--warmup_steps=0").error
    assert "loss is not finite at step 1 " in error and "lower the learning rates" in error
    assert not (base / "checkpoints").exists()
    assert [row["train.nonfinite"] for row in rows(base)][-1] == 1, "an alert can see it"


@pytest.mark.parametrize("kind", ["first micro-step", "lens"])
def test_not_finite_anywhere_in_a_step(kind, base, prepared, monkeypatch):
    """Not the last micro-step's loss, or only the lens's: the run stops before that step is saved."""
    calls = []

    def spoiled(true):
        def call(*args):
            calls.append(args)
            result = true(*args)
            if len(calls) != 5:  # the first of the two of the third step
                return result
            return (torch.tensor(torch.nan), {}) if kind == "lens" else result._replace(loss=result.loss * torch.nan)

        return call

    if kind == "lens":
        monkeypatch.setattr(MCController, "after_backward", spoiled(MCController.after_backward))
    else:
        monkeypatch.setattr(NullController, "training_step", spoiled(NullController.training_step))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    flags = [*TINY, f"--data={prepared / 'texts'}", *(MC if kind == "lens" else []), "--save_every=3",
             "--log_every=20", "--stop_at=3"]
    monkeypatch.setattr(sys, "argv", ["base_train", *flags])
    with pytest.raises(UserError, match="loss is not finite at step 2 "):
        base_train.main()
    assert not (base / "checkpoints").exists()


def test_in_a_fresh_interpreter(kept, prepared):
    """The same through `python -m` and under torchrun, where the scripts are imported in other ways."""
    before = tree(kept)
    done = real(kept, "-m", "scripts.base_train", "--data=/nowhere", "--device=cpu", "--depth=1")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --data=/nowhere: no such directory") and done.stderr.count("\n") == 1
    assert tree(kept) == before


def test_without_megacontext(monkeypatch):
    """The package's absence is said; any other missing module is not taken for it."""
    monkeypatch.setattr(sys, "argv", ["base_train", "--mc_enabled=1"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mc", None)  # what an import then finds
        patch.delitem(sys.modules, "mc.config", raising=False)
        with pytest.raises(UserError, match="--mc_enabled=1 needs the package mc.*not installed"):
            base_train.main()

    def missing(name: str):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("nanochat.common.importlib.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        base_train.main()
