import dataclasses
import io
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from tiny_gpt import random_tokens, tiny_gpt

from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.loading import load_model, load_nanochat_dir, load_nanochat_tokenizer
from nanochat.tokenizer import Reserved, Tokenizer
from scripts import base_eval, chat_cli

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[1] / "fixtures" / "data" / "nanochat_golden_a.pt"


def byte_tokenizer(**reserved) -> Tokenizer:
    return Tokenizer([bytes([i]) for i in range(256)], reserved=Reserved(**{"keys": 0, "aliases": 0, "values": 0, **reserved}))


def saved(directory, model, step: int = 7, **meta) -> Path:
    meta = {"model_config": dataclasses.asdict(model.config), **meta}
    save_checkpoint(directory, step, model=model.state_dict(), optimizer_shard={}, meta=meta)
    return directory


def nanochat_dir(directory, steps=(5, 12)) -> dict:
    """A directory as the reference writes it: compiled names, bf16 tables."""
    golden = torch.load(GOLDEN, weights_only=True)
    for step in steps:
        tables = ("transformer.wte", "value_embeds")
        state = {"_orig_mod." + k: v.bfloat16() if k.startswith(tables) else v + (step == 5) for k, v in golden["state_dict"].items()}
        torch.save(state, directory / f"model_{step:06d}.pt")
        (directory / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": golden["config"]}))
    return golden


def test_what_was_saved_is_loaded(tmp_path):
    model, idx = tiny_gpt(dtype=torch.float32), random_tokens(2, 9)
    other = tiny_gpt(seed=3, dtype=torch.float32)
    saved(tmp_path, model, 7, note="x")
    saved(tmp_path, other, 8)
    loaded, meta = load_model(tmp_path, 7)
    assert torch.equal(loaded(idx), model(idx)) and meta["note"] == "x" and not loaded.training
    assert torch.equal(load_model(tmp_path)[0](idx), other(idx))


@pytest.mark.parametrize("meta, message", [
    ({"model_config": None}, "names no model_config"), ({"model_config": {"colour": 1}}, "colour"),
    ({"model_config": {"n_layer": 2}}, "do not fit")])
def test_checkpoints_that_do_not_fit(tmp_path, meta, message):
    with pytest.raises(UserError, match=message):
        load_model(saved(tmp_path, tiny_gpt(dtype=torch.float32), **meta))


def test_missing_checkpoints(tmp_path):
    for load in (load_model, load_nanochat_dir):
        for directory in (tmp_path, tmp_path / "none"):
            with pytest.raises(UserError, match=str(directory)):
                load(directory)


def test_reference_directory(tmp_path):
    golden = nanochat_dir(tmp_path)
    model = load_nanochat_dir(tmp_path)
    torch.testing.assert_close(model(golden["idx"]), golden["logits"], atol=0.3, rtol=0)  # bf16 tables
    assert torch.equal(load_nanochat_dir(tmp_path, "12")(golden["idx"]), model(golden["idx"]))
    assert not torch.allclose(load_nanochat_dir(tmp_path, 5)(golden["idx"]), model(golden["idx"]), atol=0.3)


def test_reference_directories_that_are_broken(tmp_path):
    nanochat_dir(tmp_path)
    with pytest.raises(UserError, match="no step 6 .* 5, 12"):
        load_nanochat_dir(tmp_path, 6)
    whole = (tmp_path / "model_000012.pt").read_bytes()
    evil = io.BytesIO()
    torch.save({"w": Path("/")}, evil)  # anything that is not a tensor would run code
    for content in (whole[:1000], b"", b"not a checkpoint", evil.getvalue()):
        (tmp_path / "model_000012.pt").write_bytes(content)
        with pytest.raises(UserError, match="no nanochat checkpoint"):
            load_nanochat_dir(tmp_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / "meta_000005.json").write_text(content)
        with pytest.raises(UserError, match="no nanochat checkpoint"):
            load_nanochat_dir(tmp_path, 5)
    (tmp_path / "meta_000005.json").unlink()
    with pytest.raises(UserError, match="cannot read .*meta_000005.json"):
        load_nanochat_dir(tmp_path, 5)


def test_reference_tokenizer(tmp_path):
    ours = byte_tokenizer(keys=8)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(ours._encoding))
    read = load_nanochat_tokenizer(tmp_path / "tokenizer.pkl")
    assert read.vocab_size == 265 and read.bos_id == 256 and read.encode("aé") == ours.encode("aé")
    for content in (b"", b"junk", pickle.dumps(3)):
        (tmp_path / "tokenizer.pkl").write_bytes(content)
        with pytest.raises(UserError, match="no pickled tokenizer"):
            load_nanochat_tokenizer(tmp_path / "tokenizer.pkl")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(main, *flags) -> stdout lines; a base directory with a byte tokenizer, a checkpoint in `ckpt`, text in `text`."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tokenizer = byte_tokenizer()
    tokenizer.save()
    saved(tmp_path / "ckpt", tiny_gpt(vocab_size=257, sequence_len=32, dtype=torch.float32), tokenizer=tokenizer.fingerprint)
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox " * 20)

    def call(main, *flags: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["script", "--device=cpu", *(f.replace("@", str(tmp_path) + "/") for f in flags)])
        main()
        return capsys.readouterr().out.splitlines()

    return call


def test_base_eval(run, tmp_path):
    flags = ("--checkpoint_dir=@ckpt", "--data=@text", "--micro_batch=2", "--eval_tokens=128")
    *_, line, last = run(base_eval.main, *flags)
    result = json.loads(last)
    assert result["step"] == 7 and result["rows"] == 4 and result["targets"] == 128 and result["row_tokens"] == 32
    assert f"loss {result['loss']:.4f} nats/token, {result['bpb']:.4f} bits/byte" in line
    assert result["bpb"] == pytest.approx(result["loss"] / 0.693147, rel=1e-4)  # one byte a token
    shorter = json.loads(run(base_eval.main, *flags, "--row_tokens=16", "--rows=packed")[-1])
    assert shorter["row_tokens"] == 16 and shorter["rows"] == 8
    random = json.loads(run(base_eval.main, *flags, "--data=random", "--seed=1")[-1])
    assert random["targets"] == 128 and random["bpb"] is None
    saved(tmp_path / "ckpt", tiny_gpt(vocab_size=257, sequence_len=32, dtype=torch.float32), 8, flags={"data": "random", "seed": 1})
    assert json.loads(run(base_eval.main, flags[0], *flags[2:])[-1]) == {**random, "step": 8}  # data as it was trained on
    with pytest.raises(UserError, match="fewer tokens"):
        run(base_eval.main, *flags, "--eval_tokens=100000000")


def test_base_eval_of_a_reference_checkpoint(run, tmp_path):
    reference = tmp_path / "reference"
    reference.mkdir()
    tokenizer = byte_tokenizer(keys=8)
    model = tiny_gpt(vocab_size=265, sequence_len=32, key_shift=False, dtype=torch.float32)
    torch.save(model.state_dict(), reference / "model_000003.pt")
    config = {k: v for k, v in dataclasses.asdict(model.config).items() if k.startswith("n_") or k in ("sequence_len", "vocab_size")}
    (reference / "meta_000003.json").write_text(json.dumps({"model_config": config}))
    (reference / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer._encoding))
    flags = ("--nanochat_checkpoint=@reference", "--data=@text", "--micro_batch=2", "--eval_tokens=128")
    assert json.loads(run(base_eval.main, *flags, "--nanochat_tokenizer=@reference/tokenizer.pkl")[-1])["targets"] == 128
    with pytest.raises(UserError, match="257 ids, the model 265"):
        run(base_eval.main, *flags)
    assert isinstance(load_nanochat_dir(reference), GPT)


@pytest.mark.parametrize("flags, message", [
    ((), "name one checkpoint"), (("--checkpoint_dir=@ckpt", "--nanochat_checkpoint=@ckpt"), "name one checkpoint"),
    (("--checkpoint_dir=@ckpt", "--nanochat_tokenizer=@x"), "goes with"), (("--checkpoint_dir=@ckpt", "--step=9"), "step 9"),
    (("--checkpoint_dir=@ckpt", "--micro_batch=0"), "micro_batch=0"), (("--nanochat_checkpoint=@ckpt", "--nanochat_tokenizer=@x"), "use --checkpoint_dir")])
def test_flags_that_do_not_go_together(run, flags, message):
    with pytest.raises(UserError, match=message):
        run(base_eval.main, *flags)


def test_another_tokenizer_of_the_same_size_is_refused(run):
    Tokenizer([bytes([i]) for i in reversed(range(256))], reserved=Reserved(0, 0, 0)).save()
    with pytest.raises(UserError, match="was trained with tokenizer"):
        run(chat_cli.main, "--checkpoint_dir=@ckpt", "--prompt=x")


def test_chat_cli(run, monkeypatch):
    flags = ("--checkpoint_dir=@ckpt", "--max_tokens=8")
    text = run(chat_cli.main, *flags, "--prompt=abc", "--seed=1")
    assert text[0].startswith("abc") and text == run(chat_cli.main, *flags, "--prompt=abc", "--seed=1")
    assert text != run(chat_cli.main, *flags, "--prompt=abc", "--seed=1", "--temperature=0")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert "three" not in (out := "\n".join(run(chat_cli.main, *flags))) and "one" in out and "two" in out


def test_chat_cli_says_when_the_window_is_exceeded(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--device=cpu", f"--checkpoint_dir={tmp_path}/ckpt", "--max_tokens=8", "--prompt=" + "a" * 40])
    chat_cli.main()
    assert "41 prompt tokens and 8 new ones exceed the model's window of 32" in capsys.readouterr().err
