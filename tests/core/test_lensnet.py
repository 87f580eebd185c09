"""LensNet: the same answer in training and in use, made of every input, and bending nothing but itself."""

import pytest
import torch
import torch.nn.functional as F

from mc.lensnet import LOCAL_MEAN, LensNet, LensNetConfig, focus_scores, trailing_sum
from nanochat.common import UserError
from nanochat.gpt import norm
from tiny_mc import K, randomize, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)
D, T, TAIL = 16, 48, 8


@pytest.fixture
def lens() -> LensNet:
    net = LensNet(LensNetConfig(D, block_size=K, n_keys=2, key_dim=8, query_width=12, tail=TAIL)).double()
    randomize(net)
    return net


@pytest.fixture
def x() -> torch.Tensor:
    return norm(torch.randn(3, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("length", [1, 3, 8, 50, 77])
def test_trailing_sum(length):
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    expected = torch.stack([x[:, max(t + 1 - length, 0):t + 1].sum(1) for t in range(50)], 1)
    torch.testing.assert_close(trailing_sum(x, length), expected)


def test_keys_are_unit_projections_of_each_parts_sums(lens, x):
    keys = lens.keys(x[:, :T - 1])  # the last block is incomplete
    assert keys.shape == (3, T // K - 1, 2, 8)
    block, part = x[1, 20:24], slice(2, 4)
    before = F.pad(block, (0, 0, 1, 0))[:-1]
    features = torch.cat([block[part].sum(0), before[part].sum(0)])
    torch.testing.assert_close(keys[1, 5, 1], F.normalize(lens.key.weight @ features, dim=0))


def test_keys_do_not_depend_on_neighbouring_blocks_but_on_every_token_of_their_own(lens, x):
    keys = lens.keys(x)
    for token in range(12, 16):
        other = x.clone()
        other[:, token] = other[:, token].flip(-1)
        changed = (lens.keys(other) != keys).flatten(2).any(-1)
        assert changed[:, 3].all() and changed.sum() == 3


def test_logits_at_a_position_are_focus_logits_of_the_context_that_ends_there(lens, x):
    keys = lens.keys(x)
    positions = slice(20, 47)
    own, logits = lens.logits(x, keys, positions)
    assert own.shape == logits.shape == (3, 27, T // K)
    for i, t in enumerate(range(20, 47)):
        tail = x[:, t + 1 - TAIL - LOCAL_MEAN:t + 1]
        torch.testing.assert_close(lens.focus_logits(tail, keys, torch.full((3,), t + 1)), logits[:, i], rtol=0,
                                   atol=1e-12)
        torch.testing.assert_close(lens.focus_logits(x[:, :t + 1], keys, torch.full((3,), t + 1)), logits[:, i],
                                   rtol=0, atol=1e-12)


def test_logits_near_the_rows_start_equal_the_whole_rows(lens, x):
    keys = lens.keys(x)
    _, early = lens.logits(x, keys, slice(2, 12))
    _, whole = lens.logits(x, keys, slice(0, T))
    torch.testing.assert_close(early, whole[:, 2:12], rtol=0, atol=1e-12)
    torch.testing.assert_close(lens.focus_logits(x[:, :6], keys, torch.full((3,), 6)), whole[:, 5], rtol=0, atol=1e-12)


def test_own_votes_see_one_token_and_the_sum_over_the_tail_weighs_them_by_trust(lens, x):
    keys = lens.keys(x)
    own, logits = lens.logits(x, keys, slice(30, 31))
    queries, trust = lens.queries(x)
    votes = lens.log_gain.exp() * torch.einsum("btc,bnpc->btnp", queries, keys).amax(-1)
    torch.testing.assert_close(own[:, 0], votes[:, 30])
    weight = lens.age.exp().flip(0)[:, None] * trust[:, 31 - TAIL:31]
    distance = logits[:, 0] - (weight * votes[:, 31 - TAIL:31]).sum(1)
    torch.testing.assert_close(distance, lens.distance(torch.tensor([31]), torch.arange(T // K)).expand(3, -1))


def test_distance_bias_falls_in_half_octaves_of_blocks(lens):
    with torch.no_grad():
        lens.distance_steps.copy_(torch.arange(32) > 0)
    # 1 block away, 2, …
    bucket = lens.distance(torch.tensor([200 * K + 3]), torch.arange(200))[0].flip(0).long().tolist()
    assert bucket[:9] == [0, 2, 3, 4, 4, 5, 5, 6, 6] and bucket[127] == 14 and bucket == sorted(bucket)


def test_beyond_the_distances_that_were_trained_the_last_bias_holds(lens):
    with torch.no_grad():
        lens.distance_steps.zero_()
    x = torch.randn(1, 16 * K, lens.config.d_model, dtype=lens.distance_steps.dtype)
    lens.logits(x, lens.keys(x), slice(15 * K, 16 * K))[1][..., 3].sum().backward()
    torch.optim.SGD(lens.parameters(), 1.0).step()
    near, far = lens.distance(torch.tensor([16 * K]),
                              torch.arange(16))[0].min(), lens.distance(torch.tensor([4096 * K]), torch.arange(100))[0]
    assert (lens.distance_steps != 0).any() and near < 0 and (far == near).all()


def test_checkpoints_that_hold_the_biases_themselves_are_read(lens):
    bias = torch.randn(32, dtype=lens.distance_steps.dtype)
    lens.load_state_dict({name: x for name, x in lens.state_dict().items()
                          if name != "distance_steps"} | {"distance_bias": bias})
    torch.testing.assert_close(lens.distance(torch.tensor([4096 * K]), torch.arange(4096))[0, [4095, 4094, 4092, 0]],
                               bias[[0, 2, 4, 24]])


def test_checkpoints_without_ages_weigh_every_token_of_the_tail_alike(lens):
    lens.load_state_dict({name: x for name, x in lens.state_dict().items() if name != "age"})
    assert lens.age.shape == (TAIL,) and not lens.age.any()


@pytest.mark.parametrize("token", range(32 - TAIL - LOCAL_MEAN, 32))
def test_every_token_of_the_tail_matters(lens, x, token):
    keys, n = lens.keys(x), torch.full((3,), 32)
    other = x.clone()
    other[:, token] = other[:, token].flip(-1)
    changed = lens.focus_logits(x[:, :32], keys, n) != lens.focus_logits(other[:, :32], keys, n)
    assert changed.all() == (token > 32 - TAIL - LOCAL_MEAN)


def test_every_block_has_its_own_logit(lens, x):
    keys, n = lens.keys(x), torch.full((3,), 40)
    before = lens.focus_logits(x[:, 20:40], keys, n)
    keys[:, 2] = -keys[:, 2].flip(-1)
    changed = before != lens.focus_logits(x[:, 20:40], keys, n)
    assert changed[:, 2].all() and changed.sum() == 3


def test_no_gradient_reaches_the_embeddings_and_every_parameter_gets_one(lens, x):
    x.requires_grad_()
    own, logits = lens.logits(x, lens.keys(x), slice(24, T))
    (own.square().sum() + logits.square().sum() + lens.focus_logits(x, lens.keys(x),
                                                                    torch.full((3,), T)).sum()).backward()
    assert x.grad is None
    assert all(p.grad is not None and p.grad.any() for p in lens.parameters())


def test_permuting_the_batch_permutes_the_logits(lens, x):
    order, n = torch.tensor([2, 0, 1]), torch.tensor([20, 33, 48])
    logits = lens.focus_logits(x, lens.keys(x), n)
    torch.testing.assert_close(lens.focus_logits(x[order], lens.keys(x[order]), n[order]), logits[order])
    assert not torch.allclose(logits[0], logits[1])


def test_focus_scores():
    scores = focus_scores(torch.tensor([[-9.0, 1.0, 2.0, 9.0]]), torch.tensor([[1.0]]), 2.0)
    torch.testing.assert_close(scores, torch.tensor([[-5.0, 0.0, 0.5, 4.0]]).tanh())


def test_keys_must_divide_the_block():
    with pytest.raises(UserError, match="3 lens keys"):
        LensNet(LensNetConfig(D, block_size=4, n_keys=3))


def test_the_lens_asks_from_the_last_tokens_before_each_rows_own_cursor():
    gpt = tiny_base()
    mc = tiny_mc(gpt).model
    embeds, n = gpt.embed(tiny_batch().inputs), torch.tensor([56, 40, 32, 60])
    logits = mc.lens_logits(embeds, n)
    for b in range(4):
        expected = mc.lensnet.focus_logits(embeds[b:b + 1, :n[b]], mc.lensnet.keys(embeds[b:b + 1]), n[b:b + 1])
        torch.testing.assert_close(logits[b:b + 1], expected)
        after = embeds.clone()
        after[b, n[b]:] = 0
        seen = n[b] // K
        torch.testing.assert_close(mc.lens_logits(after, n)[b, :seen], logits[b, :seen], rtol=0, atol=0)


def test_the_lens_has_not_read_the_answer():
    """Another full-context pass, the same scores: they are made of embeddings alone."""
    gpt, batch, n = tiny_base(), tiny_batch(), torch.full((4,), 56)
    mc = tiny_mc(gpt).model
    before = mc.lens_logits(gpt.embed(batch.inputs), n)
    full = gpt(batch.inputs)
    for block in gpt.transformer.h:
        randomize(block, seed=9)
    for table in gpt.value_embeds.values():
        randomize(table, seed=9)
    assert not torch.allclose(gpt(batch.inputs), full)
    assert torch.equal(mc.lens_logits(gpt.embed(batch.inputs), n), before)
