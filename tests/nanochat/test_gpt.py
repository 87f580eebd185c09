import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_gpt import TINY, random_tokens, tiny_gpt
from torch import Tensor

from nanochat.common import UserError
from nanochat.gpt import GPT, ForwardContext, GPTConfig, attend, config_from_dict, mean_loss, token_losses

torch.set_num_threads(1)
DATA = Path(__file__).parents[1] / "fixtures" / "data"


@pytest.fixture(params="ab")
def golden(request):
    return torch.load(DATA / f"nanochat_golden_{request.param}.pt", weights_only=True)


def test_golden_logits_and_loss(golden):
    model = GPT.from_nanochat(golden["config"], golden["state_dict"])
    idx = golden["idx"]
    torch.testing.assert_close(model(idx), golden["logits"], atol=1e-4, rtol=0)
    assert abs(model(idx[:, :-1], idx[:, 1:]).item() - golden["loss"]) < 1e-4


def test_golden_as_compiled_training_on_a_gpu_saves_it(golden):
    """`_orig_mod.` names and bf16 tables; only the rounding of the tables moves the logits."""
    tables = ("transformer.wte.weight", "value_embeds.")
    rounded = {k: v.bfloat16() if k.startswith(tables) else v for k, v in golden["state_dict"].items()}
    model = GPT.from_nanochat(golden["config"], {"_orig_mod." + k: v for k, v in rounded.items()})
    same = GPT.from_nanochat(golden["config"], {k: v.float() for k, v in rounded.items()})
    assert torch.equal(model(golden["idx"]), same(golden["idx"])) and {p.dtype
                                                                       for p in model.parameters()} == {torch.float32}


def test_what_a_reference_checkpoint_lacks(golden):
    config, state, idx = dict(golden["config"]), dict(golden["state_dict"]), golden["idx"]
    del config["window_pattern"]
    for name in ("resid_lambdas", "x0_lambdas"):
        del state[name]
    config_L = {**config, "window_pattern": "L"}
    neutral = {**state, "resid_lambdas": torch.ones(config["n_layer"]), "x0_lambdas": torch.zeros(config["n_layer"])}
    model = GPT.from_nanochat(config, state)
    assert torch.equal(model(idx), GPT.from_nanochat(config_L, neutral)(idx))
    assert not torch.allclose(model(idx), golden["logits"], atol=1e-3)

    for feature, gone in (("smear", "smear_"), ("backout", "backout_"), ("value_embeds", "value_embeds.")):
        fewer = {k: v for k, v in neutral.items() if not k.startswith(gone)
                 and not (gone == "value_embeds." and "ve_gate" in k)}
        assert not getattr(GPT.from_nanochat(config, fewer).config, feature)
    zeroed = {**neutral, "smear_lambda": torch.zeros(1), "backout_lambda": torch.zeros(1)}
    off = {k: v for k, v in neutral.items() if not k.startswith(("smear_", "backout_"))}
    torch.testing.assert_close(GPT.from_nanochat(config, off)(idx), GPT.from_nanochat(config, zeroed)(idx), atol=1e-5,
                               rtol=0)


def test_reference_checkpoints_that_do_not_fit(golden):
    config, state = golden["config"], golden["state_dict"]
    for wrong in ({**state, "lm_head.weight": state["lm_head.weight"][:-1]}, {**state, "lm_head.bias": torch.zeros(3)},
                  {k: v for k, v in state.items() if k != "transformer.h.0.attn.c_q.weight"}):
        with pytest.raises(UserError, match="lm_head|c_q"):
            GPT.from_nanochat(config, wrong)
    with pytest.raises(UserError, match="n_head"):
        GPT.from_nanochat({k: v for k, v in config.items() if k != "n_head"}, state)


SWITCHES = {"sequence_len": 2, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_kv_head": 4, "n_embd": 48,
            "window_pattern": "SL",
            "value_embeds": False, "smear": False, "resid_scalars": False, "backout": False, "key_shift": False,
            "rope_fraction": 0.5,
            "rope_base": 100.0, "softcap": 3.0}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_acts(name):
    model, other = tiny_gpt(), tiny_gpt(**{name: SWITCHES[name]})
    own = model.state_dict()
    other.load_state_dict({k: v for k, v in own.items() if k in other.state_dict()
                           and v.shape == other.state_dict()[k].shape}, strict=False)
    a, b = (m(random_tokens(2, 9, vocab=40)) for m in (model, other))
    assert a.shape != b.shape or not torch.allclose(a, b, atol=1e-6)


def test_tied_start_and_that_no_switch_is_untested():
    tied, free = (GPT(GPTConfig(**{**TINY, "n_kv_head": 4, "tie_qk": t})).transformer.h[1].attn for t in (True, False))
    assert torch.equal(tied.c_q.weight, tied.c_k.weight) and not torch.equal(free.c_q.weight, free.c_k.weight)
    assert {f.name for f in dataclasses.fields(GPTConfig)} == {*SWITCHES, "tie_qk"}


@pytest.mark.parametrize("wrong", [
    {"n_embd": 33}, {"n_embd": 12}, {"n_kv_head": 3}, {"window_pattern": "LX"}, {"window_pattern": ""},
    {"rope_fraction": 1.5}, {"tie_qk": True},
    {"n_layer": 0}, {"sequence_len": 0}, {"vocab_size": 0}, {"n_embd": 16, "value_embeds": False},
    {"n_embd": 8, "smear": False},
    {"softcap": 0.0}, {"rope_base": 0.0}, {"n_kv_head": 0}])
def test_impossible_configs(wrong):
    with pytest.raises(UserError):
        GPTConfig(**{**TINY, **wrong})


def test_config_from_dict():
    config = GPTConfig(**TINY)
    assert config_from_dict(dataclasses.asdict(config)) == config
    with pytest.raises(UserError, match="colour"):
        config_from_dict({"colour": 1})


def test_windows():
    assert GPTConfig(sequence_len=2048, n_layer=6, window_pattern="SSL").windows() == [512, 512, 2048, 512, 512, 2048]
    assert GPTConfig(sequence_len=2048, n_layer=4, window_pattern="SSL").windows() == [512, 512, 2048, 2048]
    assert GPTConfig(sequence_len=640, n_layer=3, window_pattern="S").windows() == [256, 256, 640]


BOOLS = ("key_shift", "smear", "value_embeds", "backout", "resid_scalars")


@pytest.mark.parametrize("window_pattern, sequence_len, rope", [("L", 5, 1.0), ("SL", 3, 0.5), ("L", 64, 0.0)])
@pytest.mark.parametrize("on", list(itertools.product((False, True), repeat=len(BOOLS))))
def test_no_entry_sees_what_follows(on, window_pattern, sequence_len, rope):
    model = tiny_gpt(window_pattern=window_pattern, sequence_len=sequence_len, rope_fraction=rope,
                     **dict(zip(BOOLS, on)))
    idx = random_tokens(1, 11)
    before = model(idx)
    for t in (0, 6, 10):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 7) % 50
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-12, rtol=0)
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-6)


def slow_attention(attn, x_BSD: Tensor, ve_BSG: Tensor | None, positions_BS: Tensor, window: int, linked: Tensor,
                   key_bias: Tensor,
                   frequencies: Tensor) -> Tensor:
    """Attention one query and one key at a time, rotating by complex multiplication, normed after
    the rotation as nanochat does."""
    B, S, D = x_BSD.shape
    E, H, G = attn.head_dim, attn.n_head, attn.n_kv_head

    def turned(vector_E: Tensor, position: Tensor) -> Tensor:
        z = torch.complex(vector_E[:E // 2], vector_E[E // 2:]) * torch.exp(-1j * position * frequencies)
        out = torch.cat([z.real, z.imag])
        return 1.2 * out / (out.square().mean() + torch.finfo(out.dtype).eps).sqrt()

    out = torch.zeros(B, S, D, dtype=x_BSD.dtype)
    for b in range(B):
        q, k, v = ([(w.weight @ x).view(-1, E) for x in x_BSD[b]] for w in (attn.c_q, attn.c_k, attn.c_v))
        if ve_BSG is not None:
            v = [v[t] + 3 * torch.sigmoid(attn.ve_gate.weight @ x_BSD[b, t, :12])[:, None] * ve_BSG[b, t].view(G, E)
                 for t in range(S)]
        a = attn.key_shift[:, None]
        k = [(1 - a) * k[t] + a * k[t - 1] if t > 0 and linked[b, t] else k[t] for t in range(S)]
        for t in range(S):
            heads = []
            for h in range(H):
                g = h // (H // G)
                query, seen = turned(q[t][h], positions_BS[b, t]), range(max(0, t - window), t + 1)
                weights = torch.stack([query @ turned(k[j][g], positions_BS[b, j]) / math.sqrt(E) + key_bias[b, j]
                                       for j in seen]).softmax(0)
                heads.append(sum(w * v[j][g] for w, j in zip(weights, seen)))
            out[b, t] = attn.c_proj.weight @ torch.cat(heads)
    return out


@pytest.mark.parametrize("window, rope", [(2, 1.0), (40, 0.5)])
def test_attention_against_a_slow_one(window, rope):
    model = tiny_gpt(sequence_len=window, rope_fraction=rope)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, 32, generator=g, dtype=torch.float64)
    ve = torch.randn(2, 7, 16, generator=g, dtype=torch.float64)
    positions = torch.stack([torch.arange(7) + 3, torch.tensor([0, 1, 2.5, 10, 11, 12, 40])]).double()
    linked = torch.rand(2, 7, generator=g) < 0.6
    bias = torch.randn(2, 7, generator=g, dtype=torch.float64)
    ctx = ForwardContext(*model.rotary(positions), linked, bias, model._masks(7, None, None, False, "cpu"), None, None,
                         None)
    fast = model.transformer.h[0].attn(x, ve, window, ctx)
    slow = slow_attention(model.transformer.h[0].attn, x, ve, positions, window, linked, bias,
                          model.inverse_frequencies())
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_key_bias_is_an_additive_mask(masked, per_head):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    bias = torch.randn((2, 2, 9) if per_head else (2, 9), generator=g, dtype=torch.float64).requires_grad_()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    seen = (distance >= 0) & (distance <= (3 if masked else 9))
    spread = bias.repeat_interleave(2, 1) if per_head else bias[:, None]  # [B, H or 1, S]
    explicit = spread[:, :, None, :] + torch.zeros(9, 9, dtype=torch.float64).masked_fill(~seen, -math.inf)
    results = []
    for y in (attend(q, k, v, seen if masked else None, bias),
              F.scaled_dot_product_attention(q, k, v, attn_mask=explicit, enable_gqa=True)):
        results.append((y, *torch.autograd.grad(y.sin().sum(), bias, retain_graph=True)))
    for ours, explicit in zip(*results):
        torch.testing.assert_close(ours, explicit, atol=1e-12, rtol=0)


def test_entering_by_embedding_or_position_changes_no_bit():
    model, idx = tiny_gpt(dtype=torch.float32), random_tokens(2, 9)
    plain = model(idx)
    assert torch.equal(model(idx, inputs_embeds=model.embed(idx)), plain)
    assert torch.equal(model(idx, positions=torch.arange(9)), plain)
    assert torch.equal(model(idx, positions=torch.arange(9).expand(2, 9)), plain)
    assert torch.equal(model(idx, rotary=model.rotary(torch.arange(9))), plain)
    assert not torch.allclose(model(idx, positions=2 * torch.arange(9)), plain, atol=1e-4)


def test_only_distances_between_positions_matter():
    model, idx = tiny_gpt(), random_tokens(2, 9)
    torch.testing.assert_close(model(idx, positions=torch.arange(9) + 1_000_003), model(idx), atol=1e-9, rtol=0)


def test_permuting_rows_permutes_results():
    model, idx = tiny_gpt(), random_tokens(4, 9)
    g = torch.Generator().manual_seed(5)
    positions = torch.randint(1, 9, (4, 9), generator=g).cumsum(1)
    linked, bias = torch.rand(4, 9, generator=g) < 0.5, torch.randn(4, 9, generator=g, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    straight = model(idx, positions=positions, linked=linked, key_bias=bias)
    permuted = model(idx[order], positions=positions[order], linked=linked[order], key_bias=bias[order])
    torch.testing.assert_close(permuted, straight[order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("on", [{"smear": True, "key_shift": False}, {"smear": False, "key_shift": True}])
def test_smear_and_shift_stop_where_entries_are_not_linked(on):
    """The entry before the boundary is hidden from attention, so only smear or key shift could carry it over."""
    model, idx = tiny_gpt(value_embeds=False, **on), random_tokens(2, 9)
    x = model.embed(idx)
    hidden_key = torch.zeros(2, 9, dtype=torch.float64)
    hidden_key[:, 3] = -1e5
    perturbed = x.clone()
    perturbed[:, 3] += 1
    for boundary in (True, False):
        linked = torch.ones(2, 9, dtype=torch.bool)
        linked[:, 4] = not boundary
        a, b = (model.hidden(None, inputs_embeds=e, linked=linked, key_bias=hidden_key)[:, 4:] for e in (x, perturbed))
        assert torch.equal(a, b) == boundary


def test_entries_that_are_not_tokens_have_no_value_embedding():
    model, idx = tiny_gpt(), random_tokens(1, 6)
    x = model.embed(idx)
    marked = idx.clone()
    marked[0, 2] = -1
    before = model(marked, inputs_embeds=x)
    with torch.no_grad():
        for table in model.value_embeds.values():
            table.weight[0] += 5  # -1 is looked up as 0 and must be masked
    idx_has_no_zero = (idx != 0).all()
    assert idx_has_no_zero and torch.equal(model(marked, inputs_embeds=x), before)
    with pytest.raises(ValueError, match="value embeddings"):
        model(None, inputs_embeds=x)


def test_lifted_windows():
    model, idx = tiny_gpt(), random_tokens(1, 12)
    unbounded = tiny_gpt(sequence_len=100)
    assert torch.equal(model(idx, lift_windows=True), unbounded(idx)) and not torch.allclose(model(idx),
                                                                                             unbounded(idx), atol=1e-6)


def test_capture_is_what_ran():
    model, idx, captured = tiny_gpt(), random_tokens(2, 5), []
    plain = model(idx)
    loss = model(idx, idx, capture=captured)
    assert len(captured) == 3
    for c in captured:
        torch.testing.assert_close(attend(c.q, c.k, c.v, None, None), c.y, atol=0, rtol=0)
    loss.backward()
    assert all(c.y.grad_fn is not None and not c.y.retains_grad
               for c in captured), "of the pass itself, whose gradients nobody keeps"
    assert torch.equal(model(idx), plain)


def test_loss_starts_at_ln_v():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, "vocab_size": 500}))
    idx = random_tokens(4, 33, vocab=500)
    assert abs(model(idx[:, :-1], idx[:, 1:]).item() - math.log(500)) < 0.05


def test_losses_ignore_minus_one_and_weigh_rows_alike():
    logits, targets = torch.randn(2, 3, 7), torch.tensor([[1, -1, -1], [2, 3, 4]])
    losses = token_losses(logits, targets)
    expected = -logits.log_softmax(-1)
    assert losses[0, 1] == 0 and torch.isclose(losses[1, 2], expected[1, 2, 4])
    assert torch.isclose(mean_loss(losses, targets), (losses[0, 0] + losses[1].mean()) / 2)


@pytest.mark.parametrize("num_targets", [3, 5, 9, None])
def test_head_on_targets_only_is_the_same_loss(num_targets):
    model, idx = tiny_gpt(), random_tokens(3, 9)
    targets = torch.full((3, 9), -1)
    targets[0, [1, 4, 8]], targets[1, 0] = torch.tensor([5, 6, 0]), 7
    hidden = model.hidden(idx).detach()
    torch.testing.assert_close(model.loss(hidden, targets, num_targets),
                               mean_loss(token_losses(model.logits(hidden), targets), targets))


def test_flops_against_a_hand_count():
    model = GPT(GPTConfig(**{**TINY, "n_layer": 2, "sequence_len": 3}))  # S window 128, L window 3
    # blocks, one value gate, smear gate, head
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 2 * 4 * 32 * 32) + 12 * 2 + 24 + 32 * 64
    visible = 2 * (1 + 2 + 3 + 4 + 4) / 5  # keys per query in a row of 5, both layers L
    assert model.flops_per_token(5) == pytest.approx(6 * matrices + 12 * 32 * visible)
