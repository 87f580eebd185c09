"""B4: BPE trained by rustbpe, served by tiktoken, kept as plain text; every user's mistake is one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from nanochat import tokenizer as module
from nanochat.common import UserError, whole_characters
from nanochat.tokenizer import Reserved, Tokenizer, cut

TEXTS = ["def f(x):\n    return x + 1\n\nclass A:\n    pass\n" * 20,
         "The quick brown fox jumps over 1234 lazy dogs. " * 30, Path(__file__).read_text()]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320, Reserved(keys=8, aliases=8, values=4))


@given(text=st.text())
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i < tokenizer.bos_id for i in ids)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_ids_are_laid_out_as_documented(tokenizer):
    assert tokenizer.bos_id == 320
    assert tokenizer.key_ids == range(321, 329)
    assert tokenizer.alias_ids == range(329, 337)
    assert tokenizer.value_ids == range(337, 341)
    assert tokenizer.vocab_size == 341
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (341,)
    assert (sizes[:320] > 0).all() and not sizes[320:].any()
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.key_ids[3]]) == "<|bos|><|key_3|>"


def test_special_names_in_text_are_text(tokenizer):
    assert max(tokenizer.encode("<|bos|><|key_0|>")) < tokenizer.bos_id


def test_batch_equals_one_by_one(tokenizer):
    texts = TEXTS + ["", "é漢字"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("character", " \t\u3000\xa0\v\na-\0")
@pytest.mark.parametrize("end", ["", "y"])
def test_runs_of_a_million(tokenizer, character, end):
    text = "x" + character * 1_000_000 + end
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_runs_beyond_any_engine(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIECE", 1 << 21)
    text = "x" + " " * 5_000_001 + "y\nz" + "\n" * 9 + "\u3000" * 1_200_000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [i for piece in cut(text[at : at + 999_999] for at in range(0, len(text), 999_999))
            for i in tokenizer.encode(piece)] == ids


RUNS = st.lists(st.one_of(st.sampled_from(["a", "1", ".", "\n", "\r\n", "<|bos|>", "<|key_1|>", "\x1c"]),
                          st.builds(str.__mul__, st.sampled_from([" ", "\t", "\u3000", "\x85", " \t"]),
                                    st.integers(1, 40)))).map("".join)


@given(text=RUNS, special=st.booleans(), size=st.integers(1, 9))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_long_runs_have_the_tokens_of_any_run(tokenizer, monkeypatch, text, special, size):
    """With bounds small enough to matter, the ids are those that tiktoken gives."""
    engine = tokenizer._encoding
    wanted = engine.encode(text, allowed_special="all") if special else engine.encode_ordinary(text)
    monkeypatch.setattr(module, "LONG_RUN", size)
    assert tokenizer.encode(text, special) == wanted


@given(text=RUNS, size=st.integers(2, 30), piece=st.integers(1, 40))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_cut_text_has_the_tokens_of_the_whole(tokenizer, monkeypatch, text, size, piece):
    """Also where a text has no place to cut, and however it comes."""
    monkeypatch.setattr(module, "MAX_PIECE", size)
    pieces = list(cut(text[at : at + piece] for at in range(0, len(text), piece)))
    assert "".join(pieces) == text and all(len(p) <= size + piece for p in pieces)
    assert [i for p in pieces for i in tokenizer.encode(p)] == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text, read", [("a\ud83db", "a\ufffdb"), ("\ude00\ud83d", "\ufffd\ufffd"),
                                        ("\ud83d\ude00", "\U0001f600"), ("\ufeffa\udcff", "\ufeffa\ufffd")])
def test_halves_of_surrogate_pairs(tokenizer, text, read):
    assert whole_characters(text) == read and whole_characters(read) is read
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text, special=True)) == read
    assert Tokenizer.train([text + "words of text " * 20], 258).vocab_size > 258


@pytest.mark.parametrize("character", " \u3000")
def test_training_on_a_long_run(character):
    text = ["ab" * 200 + character * 1_000_000 + "cd"]
    assert Tokenizer.train(text, 262).fingerprint == Tokenizer.train(text, 262).fingerprint


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.train(TEXTS, 300).fingerprint != tokenizer.fingerprint


def test_missing_tokenizer_names_the_command(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at .*scripts.tok_train"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "not json", "a list", "other format", "changed token", "bad base64",
                                    "no tokens"])
def test_damaged_tokenizer_is_refused(tokenizer, tmp_path, damage):
    path = tokenizer.save(tmp_path)
    text, payload = path.read_text(), json.loads(path.read_text())
    match damage:
        case "cut":
            text = text[: len(text) // 2]
        case "not json":
            text = "\x00" * 100
        case "a list":
            text = "[]"
        case "other format":
            text = json.dumps(payload | {"format": "else"})
        case "changed token":
            text = json.dumps(payload | {"tokens": payload["tokens"][:-1] + ["AAECAw=="]})
        case "bad base64":
            text = json.dumps(payload | {"tokens": payload["tokens"][:-1] + ["?"]})
        case "no tokens":
            text = json.dumps({key: value for key, value in payload.items() if key != "tokens"})
    path.write_text(text)
    with pytest.raises(UserError, match="damaged tokenizer .*scripts.tok_train"):
        Tokenizer.load(tmp_path)


def test_too_little_text_and_too_small_vocabulary():
    with pytest.raises(UserError, match="--vocab_size=2048"):
        Tokenizer.train(["abab"], 2048)
    with pytest.raises(UserError, match="at least 257"):
        Tokenizer.train(TEXTS, 256)


def test_commands(tmp_path):
    """tok_train and tok_eval as a user runs them: a JSON line last; exit code 2 and one line
    when there is no tokenizer."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        (data / f"{i}.txt").write_text(TEXTS[1] + TEXTS[0] + str(i))

    def run(*args):
        env = {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "PATH": "/usr/bin:/bin"}
        return subprocess.run([sys.executable, "-m", *args, f"--data={data}"], capture_output=True, text=True, env=env)

    missing = run("scripts.tok_eval")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "tok_train" in missing.stderr
    refused = run("scripts.tok_train", "--vocab_size=100")
    assert refused.returncode == 2 and "--vocab_size=100" in refused.stderr and not (tmp_path / "base").exists()
    trained = run("scripts.tok_train", "--vocab-size", "300", "--max_chars=5000")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout.splitlines()[-1])["vocab_size"] == 300 + 1 + 1056
    scored = json.loads(run("scripts.tok_eval").stdout.splitlines()[-1])
    assert scored["roundtrip"] and scored["bytes_per_token"]["text"] > 1.2
