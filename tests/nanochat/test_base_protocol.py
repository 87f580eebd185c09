"""One suite for every base (`nanochat.base.Base`): nanochat's GPT and the Llama family, in float64, with windows that
act on short rows unless a test says otherwise.

A further base is one more line in BASES.
"""

import dataclasses
import inspect
import math
from typing import get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_base_folder import tiny_llama
from tiny_gpt import random_tokens, tiny_gpt
from torch import Tensor

from nanochat.base import Base, BaseConfig
from nanochat.gpt import mean_loss, token_losses
from nanochat.kv_cache import KVCache

torch.set_num_threads(1)
EXACT = {"atol": 1e-10, "rtol": 0}
PLAIN = {"value_embeds": False, "smear": False, "resid_scalars": False, "backout": False, "key_shift": False}
ALL_ON = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True, "tied": True,
          "rope_divisors": (1.0, 1.0, 1.5, 3.0, 8.0, 8.0)}  # fmt: skip
BASES = {
    "gpt": lambda **c: tiny_gpt(**c),
    "gpt, plain": lambda **c: tiny_gpt(**PLAIN, **c),
    "llama": lambda **c: tiny_llama(**c),
    "llama, all on": lambda **c: tiny_llama(**ALL_ON, **c),
    "llama, windows": lambda **c: tiny_llama(**{"window": 2, "windowed": (True, False, True), **c}),
}
FROM_ANY_LAYER = [name for name in BASES if name != "gpt"]
bases = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
LONG = {"sequence_len": 64}  # no unwindowed layer has a window


def entries(model: Base, S: int, B: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Tokens with positions, links and a bias per key."""
    g = torch.Generator().manual_seed(seed)
    return {"idx": random_tokens(B, S, seed=seed),
            "positions": torch.randint(1, 9, (B, S), generator=g).cumsum(1).double() - 0.5,
            "linked": torch.rand(B, S, generator=g) < 0.6,
            "key_bias": torch.randn(B, S, generator=g, dtype=torch.float64)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What there is


@bases
def test_it_has_the_calls_of_the_protocol(make):
    model = make()
    for name, call in inspect.getmembers(Base, inspect.isfunction):
        if name.startswith("_"):
            continue
        wanted, found = (inspect.signature(x).parameters for x in (call, getattr(type(model), name)))
        assert list(wanted) == list(found), name
        assert [p.default for p in wanted.values()] == [p.default for p in found.values()], name
    for name, kind in get_type_hints(BaseConfig).items():
        assert isinstance(getattr(model.config, name), kind), name
    assert isinstance(model.config.head_dim, int) and isinstance(model.config.window_pattern, str)
    assert len(model.config.windows()) == model.config.n_layer == len(model.transformer.h)
    dataclasses.asdict(model.config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.n_layer = 1


@bases
def test_shapes_and_dtypes(make):
    model, idx = make(), random_tokens(2, 7)
    c = model.config
    assert model.transformer.wte.weight.shape[1] == model.lm_head.weight.shape[1] == c.n_embd
    assert model.lm_head.weight.shape[0] >= c.vocab_size <= model.transformer.wte.weight.shape[0]
    assert model.embed(idx).shape == model.hidden(idx).shape == (2, 7, c.n_embd)
    assert model.logits(model.hidden(idx)).shape == (2, 7, c.vocab_size)
    assert model.logits(model.hidden(idx)[0, 0]).shape == (c.vocab_size,)
    assert model.inverse_frequencies().shape == (c.head_dim // 2,)
    assert model.inverse_frequencies().dtype == torch.float64
    for positions, batch in ((torch.arange(7), 1), (torch.zeros(2, 7), 2)):
        assert all(x.shape == (batch, 7, 1, c.head_dim // 2) and x.dtype == torch.float64
                   for x in model.rotary(positions))
    half = make().bfloat16()
    assert half.embed(idx).dtype == half.hidden(idx).dtype == torch.bfloat16
    assert half.logits(half.hidden(idx)).dtype == half.rotary(torch.arange(3))[0].dtype == torch.float32
    assert model.num_parameters() == sum({p: p.numel() for p in model.parameters()}.values())


@bases
def test_flops_are_those_of_the_matrices_and_the_visible_keys(make):
    model, S = make(), 9
    c, head = model.config, model.lm_head.weight.numel()
    matrices = sum(m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)) - head
    visible = sum(sum(min(t, w) + 1 for t in range(S)) / S for w in c.windows())
    attention = 12 * c.n_head * c.head_dim * visible
    assert model.flops_per_token(S) == pytest.approx(6 * (matrices + head) + attention)
    assert model.flops_per_token(S, 3) == pytest.approx(6 * (matrices + head / 3) + attention)


# ---------------------------------------------------------------------------------------------------------------------
# Entries and positions


@bases
def test_entering_by_embedding_position_or_table_changes_no_bit(make):
    model, idx = make(), random_tokens(2, 9)
    plain = model.hidden(idx)
    assert torch.equal(model.hidden(idx, inputs_embeds=model.embed(idx)), plain)
    assert torch.equal(model.hidden(idx, positions=torch.arange(9).expand(2, 9)), plain)
    assert torch.equal(model.hidden(idx, rotary=model.rotary(torch.arange(9))), plain)
    assert not torch.allclose(model.hidden(idx, positions=2 * torch.arange(9)), plain, atol=1e-4)


@bases
def test_tokens_are_not_needed_beside_vectors_unless_there_are_value_embeddings(make):
    model, idx = make(), random_tokens(2, 9)
    x = model.embed(idx)
    if model.config.value_embeds:
        with pytest.raises(ValueError, match="value embeddings"):
            model.hidden(None, inputs_embeds=x)
    else:
        assert torch.equal(model.hidden(None, inputs_embeds=x), model.hidden(idx))
        assert torch.equal(model.hidden(torch.full_like(idx, -1), inputs_embeds=x), model.hidden(idx))
    with pytest.raises(ValueError, match="idx"):
        model.hidden(None)


@bases
def test_only_differences_of_positions_act(make):
    model, idx = make(**LONG), random_tokens(2, 9)
    for positions in (torch.arange(9), entries(model, 9)["positions"]):
        moved = model.hidden(idx, positions=positions + 1_000_003)
        torch.testing.assert_close(moved, model.hidden(idx, positions=positions), atol=1e-8, rtol=0)


@bases
def test_angles_are_exact_far_out(make):
    model = make()
    for at in (0, 31, 1_000_003, 10**7):
        cos, sin = model.rotary(torch.tensor([at]))
        for c, s, omega in zip(cos.flatten(), sin.flatten(), model.inverse_frequencies().tolist()):
            assert float(c) == pytest.approx(math.cos(at * omega), abs=1e-8)
            assert float(s) == pytest.approx(math.sin(at * omega), abs=1e-8)


@bases
def test_no_entry_sees_what_follows(make):
    model, idx = make(), random_tokens(1, 11)
    before = model.hidden(idx)
    for t in (0, 6, 10):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 7) % 50
        after = model.hidden(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], **EXACT)
        assert not torch.allclose(after[:, t], before[:, t], atol=1e-6)


@bases
def test_rows_are_apart(make):
    model = make()
    e = entries(model, 9, B=4)
    order = torch.tensor([2, 0, 3, 1])
    idx, positions, linked, bias = e.values()
    straight = model.hidden(idx, positions=positions, linked=linked, key_bias=bias)
    permuted = model.hidden(idx[order], positions=positions[order], linked=linked[order], key_bias=bias[order])
    torch.testing.assert_close(permuted, straight[order], **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: what is captured explains what ran


def slow_attention(q_BHSE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, bias_BGS: Tensor, window: float) -> Tensor:
    """[B, H, S, E] one query at a time."""
    B, H, S, E = q_BHSE.shape
    G, y = k_BGSE.shape[1], torch.zeros_like(q_BHSE)
    for b in range(B):
        for h in range(H):
            g = h * G // H
            for t in range(S):
                seen = [j for j in range(t + 1) if t - j <= window]
                logits = torch.stack([q_BHSE[b, h, t] @ k_BGSE[b, g, j] / math.sqrt(E) + bias_BGS[b, g, j]
                                      for j in seen])
                y[b, h, t] = logits.softmax(0) @ v_BGSE[b, g, seen]
    return y


@bases
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_captured_attention_is_what_ran(make, lifted, per_head):
    model, captured = make(), []
    idx, positions, linked, bias = entries(model, 9).values()
    if per_head:
        bias = torch.stack([bias, -bias], 1)
    how = dict(positions=positions, linked=linked, key_bias=bias, lift_windows=lifted)
    out = model.hidden(idx, capture=captured, **how)
    assert torch.equal(out, model.hidden(idx, **how)) and len(captured) == model.config.n_layer
    c = model.config
    for layer, window in zip(captured, c.windows()):
        reach = math.inf if lifted and window == c.sequence_len else window
        spread = bias if per_head else bias[:, None].expand(-1, c.n_kv_head, -1)
        assert layer.q.shape == (2, c.n_head, 9, c.head_dim) and layer.k.shape == (2, c.n_kv_head, 9, c.head_dim)
        torch.testing.assert_close(layer.y, slow_attention(layer.q, layer.k, layer.v, spread, reach), **EXACT)


@bases
def test_captured_keys_turn_with_the_position(make):
    """By the angle of the tables and no other: undone, they are those at position 0."""
    model, idx = make(), random_tokens(1, 5)
    shifted, still = [], []
    model.hidden(idx, positions=torch.arange(5) * 3 + 2, capture=shifted)
    model.hidden(idx, positions=torch.zeros(5), capture=still)
    E = model.config.head_dim
    angle = (torch.arange(5) * 3 + 2).double()[:, None] * model.inverse_frequencies()
    for kind in ("q", "k"):
        there, here = (torch.complex(*getattr(x[0], kind).split(E // 2, -1)) for x in (shifted, still))
        turns = [torch.exp(sign * 1j * angle) for sign in (1, -1)]  # families turn one way or the other
        assert any(torch.allclose(here * turn, there, atol=1e-10) for turn in turns)


@bases
def test_gradients_reach_vectors_and_bias_through_frozen_weights(make):
    model = make(**LONG).requires_grad_(False)
    idx, positions, linked, bias = entries(model, 9).values()
    x, captured = model.embed(idx).requires_grad_(), []
    model.loss(model.hidden(idx, inputs_embeds=x, key_bias=bias.requires_grad_(), capture=captured), idx).backward()
    assert x.grad.abs().sum(-1).min() > 0 and bias.grad[:, :-1].abs().min() > 0
    assert all(layer.y.grad_fn is not None and not layer.y.retains_grad for layer in captured)
    assert all(p.grad is None for p in model.parameters())


@bases
def test_keys_of_very_low_bias_are_not_there(make):
    model = make(**LONG)
    if model.config.smear or model.config.key_shift:
        pytest.skip("the entry after a hidden one still takes something from it")
    idx, positions, *_ = entries(model, 9).values()
    hidden = torch.zeros(2, 9, dtype=torch.float64)
    hidden[:, 3:5] = -1e6
    kept = [0, 1, 2, 5, 6, 7, 8]
    if any(w < 9 for w in model.config.windows()):
        pytest.skip("windows count entries that are hidden")
    fewer = model.hidden(idx[:, kept], positions=positions[:, kept])
    torch.testing.assert_close(model.hidden(idx, positions=positions, key_bias=hidden)[:, kept], fewer, **EXACT)


@bases
def test_select_says_per_layer_and_head_what_is_seen(make):
    model, idx, asked = make(**LONG), random_tokens(2, 9), []
    causal = torch.ones(9, 9, dtype=torch.bool).tril()

    def everything(layer: int, q: Tensor, k: Tensor) -> Tensor:
        asked.append((layer, tuple(q.shape), tuple(k.shape)))
        return causal.expand(2, 1, 9, 9)

    c = model.config
    torch.testing.assert_close(model.hidden(idx, select=everything), model.hidden(idx), **EXACT)
    assert asked == [(i, (2, c.n_head, 9, c.head_dim), (2, c.n_kv_head, 9, c.head_dim)) for i in range(c.n_layer)]

    def own_entry_only(layer: int, q: Tensor, k: Tensor) -> Tensor:
        return torch.eye(9, dtype=torch.bool).expand(2, c.n_head, 9, 9) if layer == 1 else causal.expand(2, 1, 9, 9)

    captured = []
    model.hidden(idx, select=own_entry_only, capture=captured)
    shared = captured[1].v.repeat_interleave(c.n_head // c.n_kv_head, 1)
    torch.testing.assert_close(captured[1].y, shared, **EXACT)
    assert not torch.allclose(captured[0].y, captured[0].v.repeat_interleave(c.n_head // c.n_kv_head, 1), atol=1e-3)


@bases
def test_lifted_windows_are_those_of_unwindowed_layers(make):
    model, unbounded, idx = make(), make(**LONG), random_tokens(1, 12)
    assert torch.equal(model.hidden(idx, lift_windows=True), unbounded.hidden(idx))
    assert not torch.allclose(model.hidden(idx), unbounded.hidden(idx), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@bases
def test_a_pass_over_the_first_layers_is_the_stream_there(make):
    model, idx = make(), random_tokens(2, 9)
    captured, whole = [], []
    model.hidden(idx, capture=whole)
    stream = model.hidden(idx, layers=range(2), capture=captured)
    assert len(captured) == 2 and all(torch.equal(a.y, b.y) for a, b in zip(captured, whole))
    assert torch.equal(model.hidden(idx, layers=range(3)), model.hidden(idx))
    normed = stream / (stream.square().mean(-1, keepdim=True) + torch.finfo(stream.dtype).eps).sqrt()
    middle = []
    model.hidden(idx, middle=middle)  # behind layer 3 // 2 = 1
    torch.testing.assert_close(middle[0], normed, **EXACT)


@pytest.mark.parametrize("name", FROM_ANY_LAYER)
@pytest.mark.parametrize("cached", [False, True])
def test_passes_over_ranges_of_layers_compose(name, cached):
    model, idx = BASES[name](), random_tokens(2, 9)
    positions, whole = entries(model, 9)["positions"], None
    whole = model.hidden(idx, positions=positions)
    for k in (1, 2):
        caches = [KVCache(model.config, 2, 9, dtype=torch.float64) if cached else None for _ in range(2)]
        stream = model.hidden(idx, positions=positions, layers=range(k), cache=caches[0])
        out = model.hidden(idx, inputs_embeds=stream, positions=positions, layers=range(k, 3), cache=caches[1])
        torch.testing.assert_close(out, whole, **EXACT)


@bases
def test_ranges_that_cannot_be_run(make):
    model, idx = make(), random_tokens(1, 3)
    for wrong in (range(0), range(4), range(0, 3, 2), range(2, 1), range(-1, 2)):
        with pytest.raises(ValueError, match="range"):
            model.hidden(idx, layers=wrong)
    with pytest.raises(ValueError, match="layer 1"):
        model.hidden(idx, layers=range(1, 3))  # of which stream?


def test_a_model_whose_layers_look_back_begins_at_the_first():
    model, idx = tiny_gpt(), random_tokens(1, 3)
    with pytest.raises(ValueError, match="residual scalars"):
        model.hidden(idx, inputs_embeds=model.embed(idx), layers=range(1, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Cache


def new_cache(model: Base, batch: int = 2, slots: int = 64) -> KVCache:
    return KVCache(model.config, batch, slots, dtype=torch.float64)


@st.composite
def plans(draw):
    """Row lengths, and chunks as (width, valid entries a row) that spend them."""
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    left, chunks = list(lengths), []
    while any(left):
        width = draw(st.integers(1, max(left)))
        counts = [draw(st.integers(0, min(width, n))) if draw(st.booleans()) else min(width, n) for n in left]
        if any(counts):
            chunks.append((width, counts))
            left = [n - c for n, c in zip(left, counts)]
    return lengths, chunks


@settings(max_examples=40, deadline=None)
@given(plans(), st.sampled_from(sorted(BASES)), st.sampled_from([3, 40]))
def test_any_chunking_of_rows_of_any_length_is_one_pass(plan, name, sequence_len):
    (lengths, chunks), model = plan, BASES[name](sequence_len=sequence_len)
    rows = [random_tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    cache = new_cache(model, len(rows), sum(width for width, _ in chunks))
    got, done = [[] for _ in rows], [0] * len(rows)
    for width, counts in chunks:
        piece = random_tokens(len(rows), width, seed=99)  # padding is random tokens: it must not matter
        for b, count in enumerate(counts):
            piece[b, :count] = rows[b][0, done[b]:done[b] + count]
        with torch.no_grad():
            hidden = model.hidden(piece, cache=cache, counts=torch.tensor(counts))
        for b, count in enumerate(counts):
            got[b].append(hidden[b, :count])
            done[b] += count
    assert cache.lengths.tolist() == lengths
    for b, row in enumerate(rows):
        torch.testing.assert_close(torch.cat(got[b]), model.hidden(row)[0].detach(), **EXACT)


@bases
@torch.no_grad()
def test_explicit_positions_and_lifted_windows_through_a_cache(make):
    model = make()
    idx, positions, linked, _ = entries(model, 12).values()
    cache, parts = new_cache(model), []
    for span in (slice(0, 5), slice(5, 6), slice(6, 12)):
        parts.append(model.hidden(idx[:, span], positions=positions[:, span], linked=linked[:, span], cache=cache,
                                  lift_windows=True))
    whole = model.hidden(idx, positions=positions, linked=linked, lift_windows=True)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    with pytest.raises(ValueError, match="bias"):
        model.hidden(idx, key_bias=torch.zeros(2, 12), cache=cache)
    with pytest.raises(ValueError, match="64 entries, 12 are used, 53 more"):
        model.hidden(random_tokens(2, 53), cache=cache)


@bases
@pytest.mark.parametrize("lengths", [torch.tensor([3, 7]), 5, 0])
@torch.no_grad()
def test_truncated_and_continued_is_never_having_read_the_rest(make, lengths):
    model, idx, more = make(), random_tokens(2, 10), random_tokens(2, 4, seed=8)
    cache = new_cache(model)
    model.hidden(idx, cache=cache)
    cache.truncate(lengths)
    got = model.hidden(more, cache=cache)
    for b, kept in enumerate(torch.as_tensor(lengths).expand(2).tolist()):
        whole = model.hidden(torch.cat([idx[b:b + 1, :kept], more[b:b + 1]], 1))
        torch.testing.assert_close(got[b], whole[0, kept:], **EXACT)


@bases
@torch.no_grad()
def test_a_splice_is_exact_up_to_its_end_and_keeps_what_followed(make):
    """Prompts [a b c] with b exchanged for d: what was computed of d stands behind a as if read there."""
    model, idx, fresh = make(), random_tokens(2, 10), random_tokens(2, 5, seed=4)
    cache, other, scratch = (new_cache(model) for _ in range(3))
    model.hidden(idx, cache=cache)
    before = cache.k.clone()
    model.hidden(torch.cat([idx[:, :3], fresh], 1), cache=other)
    cache.splice(3, 6, other, 3, 8)
    model.hidden(torch.cat([idx[:, :3], fresh, idx[:, 6:]], 1), cache=scratch)
    assert cache.lengths.tolist() == [12, 12]
    torch.testing.assert_close(cache.k[:, :, :8], scratch.k[:, :, :8], **EXACT)
    torch.testing.assert_close(cache.v[:, :, :8], scratch.v[:, :, :8], **EXACT)
    assert torch.equal(cache.k[:, :, 8:12], before[:, :, 6:10])
    cache.truncate(8)
    more = random_tokens(2, 3, seed=6)
    whole = model.hidden(torch.cat([idx[:, :3], fresh, more], 1))
    torch.testing.assert_close(model.hidden(more, cache=cache), whole[:, 8:], **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Loss


@bases
@pytest.mark.parametrize("num_targets", [3, 9, None])
def test_loss_is_that_of_the_logits(make, num_targets):
    model, idx = make(), random_tokens(3, 9)
    targets = torch.full((3, 9), -1)
    targets[0, [1, 4, 8]], targets[1, 0] = torch.tensor([5, 6, 0]), 7
    hidden = model.hidden(idx).detach()
    expected = mean_loss(token_losses(model.logits(hidden), targets), targets)
    torch.testing.assert_close(model.loss(hidden, targets, num_targets), expected)
    torch.testing.assert_close(model(idx, targets), expected)
