"""The Llama family: logits are those of `transformers`, of tiny random models and of SmolLM2, and of slow code in
float64."""

import dataclasses
import json
import math

import pytest
import torch
from tiny_base_folder import TINY_LLAMA, tiny_llama
from tiny_gpt import random_tokens
from torch import Tensor

from nanochat.base_tokenizer import TokenizerFiles
from nanochat.common import UserError
from nanochat.llama import Llama, LlamaConfig, frequencies, rope_divisors
from nanochat.loading import load_base
from nanochat.pretrained import BaseFiles, build_llama, llama_config, named_folder

torch.set_num_threads(1)
CLOSE = {"atol": 1e-4, "rtol": 0}
SIZES = dict(vocab_size=160, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 10000.0}
THEIRS = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral, window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3, biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}  # fmt: skip


def theirs(name: str):
    """A tiny random model of `transformers`, with norms and biases that are not at their start."""
    transformers = pytest.importorskip("transformers", reason="parity needs the package transformers")
    kind, changed = THEIRS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changed})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.15 + (p.ndim == 1))
    return model


def ours(model) -> Llama:
    """The same, read from what `transformers` would write."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    files = BaseFiles(config, lambda: iter(model.state_dict().items()), TokenizerFiles("{}"), "here")
    return build_llama(files, torch.float32, "cpu")


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name):
    model, idx = theirs(name), random_tokens(2, 77, vocab=160)
    expected = model(idx).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours(model)(idx), expected, **CLOSE)


@torch.no_grad()
def test_configurations_of_earlier_versions():
    """`rope_scaling` beside `rope_theta`, and `type` for `rope_type`."""
    model, idx = theirs("llama3"), random_tokens(2, 77, vocab=160)
    config = json.loads(model.config.to_json_string(use_diff=False))
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling | {"type": scaling["rope_type"]}}
    files = BaseFiles(config, lambda: iter(model.state_dict().items()), TokenizerFiles("{}"), "here")
    torch.testing.assert_close(build_llama(files, torch.float32, "cpu")(idx), model(idx).logits, **CLOSE)


@torch.no_grad()
def test_bfloat16_is_as_near_as_that_of_transformers():
    model, idx = theirs("qwen3"), random_tokens(2, 77, vocab=160)
    exact, mine = model(idx).logits, ours(model).bfloat16()(idx)
    rounded = model.bfloat16()(idx).logits.float()
    assert mine.dtype == torch.float32
    assert (mine - exact).abs().mean() < 1.5 * (rounded - exact).abs().mean()


@torch.no_grad()
def test_smollm2_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="parity needs the package transformers")
    folder = named_folder("smollm2")
    if not (folder / "config.json").exists():
        pytest.skip("SmolLM2 is not in the base directory: python -m scripts.get_base")
    mine, tokenizer, _ = load_base("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.prompt_ids("What is the capital of France, and how many people live there in 2024?")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert ids == reference(reference.decode(ids), add_special_tokens=False).input_ids
    idx, close = torch.tensor([ids]), {"atol": 1e-4, "rtol": 1e-5}
    # in float32 each is 7e-5 from the logits of float64, which reach 38
    torch.testing.assert_close(mine(idx), model(idx).logits, **close)
    # their rotary tables stay float32
    torch.testing.assert_close(mine.double()(idx), model.double()(idx).logits.double(), atol=5e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Without transformers


def slow_logits(model: Llama, idx_S: Tensor) -> Tensor:
    """[S, V] one token, one head and one key at a time; rotation by complex multiplication."""
    c, S = model.config, len(idx_S)
    turn = model.inverse_frequencies()

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean() + c.norm_eps).sqrt()

    def turned(x_E: Tensor, position: int) -> Tensor:
        half = c.head_dim // 2
        z = torch.complex(x_E[:half], x_E[half:]) * torch.exp(1j * position * turn)
        return torch.cat([z.real, z.imag])

    def heads(linear, x: Tensor, norm=None) -> Tensor:
        out = linear.weight @ x + (0 if linear.bias is None else linear.bias)
        return torch.stack([normed(h, norm.weight) if norm is not None else h for h in out.view(-1, c.head_dim)])

    xs = [model.transformer.wte.weight[i] for i in idx_S]
    for block, window in zip(model.transformer.h, c.windows()):
        attn, mlp, out = block.self_attn, block.mlp, []
        read = [normed(x, block.input_layernorm.weight) for x in xs]
        q, k = ([heads(p, x, n if c.qk_norm else None) for x in read]
                for p, n in ((attn.q_proj, attn.q_norm), (attn.k_proj, attn.k_norm)))
        v = [heads(attn.v_proj, x) for x in read]
        for t in range(S):
            seen, y = range(max(0, t - window), t + 1), []
            for h in range(c.n_head):
                g = h // (c.n_head // c.n_kv_head)
                logits = torch.stack([turned(q[t][h], t) @ turned(k[j][g], j) / math.sqrt(c.head_dim) for j in seen])
                y.append(sum(w * v[j][g] for w, j in zip(logits.softmax(0), seen)))
            x = xs[t] + attn.o_proj(torch.cat(y))
            z = normed(x, block.post_attention_layernorm.weight)
            out.append(x + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(z)) * mlp.up_proj(z)))
        xs = out
    return torch.stack([model.lm_head.weight @ normed(x, model.transformer.norm.weight) for x in xs])


@pytest.mark.parametrize("changed", [{}, {"sequence_len": 40, "qk_norm": True, "qkv_bias": True, "tied": True},
                                     {"rope_divisors": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), "out_bias": True,
                                      "window": 2, "windowed": (True, False, True), "mlp_bias": True}])  # fmt: skip
@torch.no_grad()
def test_logits_against_slow_ones(changed):
    model, idx = tiny_llama(**changed), random_tokens(1, 9)
    torch.testing.assert_close(model(idx)[0], slow_logits(model, idx[0]), atol=1e-9, rtol=0)


SWITCHES = {"norm_eps": 0.5, "rope_base": 7.0, "rope_divisors": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), "tied": True,
            "qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True,
            "windowed": (True, False, False), "sequence_len": 3}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_every_switch_acts(name):
    model, other = tiny_llama(window=2), tiny_llama(window=2, **{name: SWITCHES[name]})
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in other.state_dict()}, strict=False)
    assert not torch.allclose(model(random_tokens(2, 9)), other(random_tokens(2, 9)), atol=1e-6)


def test_no_switch_is_untested():
    assert {f.name for f in dataclasses.fields(LlamaConfig)} == {*SWITCHES, *TINY_LLAMA, "window"}


def test_llama3_divisors_by_hand():
    """Whole turns in the 8,192 tokens of the original training decide: below 1 all of the factor, above 4 none."""
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
    divisors = rope_divisors(128, 500_000.0, scaling)
    for divisor, omega in zip(divisors, frequencies(128, 500_000.0).tolist()):
        turns = 8192 * omega / (2 * math.pi)
        if turns >= 4 or turns <= 1:
            assert divisor == pytest.approx(1.0 if turns >= 4 else 8.0)
        else:
            kept = (turns - 1) / 3
            assert 1 / divisor == pytest.approx((1 - kept) / 8 + kept)
    assert divisors[0] == 1 and divisors[-1] == 8 and any(1 < d < 8 for d in divisors)


@pytest.mark.parametrize("wrong", [{"n_kv_head": 3}, {"head_dim": 7}, {"n_layer": 0}, {"vocab_size": 1 << 40},
                                   {"norm_eps": 0.0}, {"rope_base": math.inf}, {"rope_divisors": (1.0,)},
                                   {"rope_divisors": (0.0,) * 6}, {"windowed": (True, False, True)},
                                   {"windowed": (True,), "window": 3}])  # fmt: skip
def test_impossible_configs(wrong):
    with pytest.raises(UserError):
        LlamaConfig(**{**TINY_LLAMA, **wrong})


def test_a_tied_head_is_one_parameter():
    tied, free = tiny_llama(tied=True), tiny_llama()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert free.num_parameters() - tied.num_parameters() == 50 * 32


def test_windows_of_configurations():
    window = {**SIZES, "sliding_window": 8}
    assert llama_config({**window, "model_type": "mistral"}, "x").windows() == [7, 7, 7]
    assert llama_config({**SIZES, "model_type": "mistral", "sliding_window": None}, "x").windows() == [256] * 3
    assert llama_config({**window, "model_type": "qwen2"}, "x").windows() == [256] * 3
    mixed = {**window, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention",
                                                                  "full_attention"]}
    assert llama_config({**mixed, "model_type": "qwen3"}, "x").windows() == [256, 7, 256]
