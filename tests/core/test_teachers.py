"""Teachers read off the full-context pass: the gate gradient against autograd through an explicit gate,
attention mass against a softmax."""

import math

import pytest
import torch

import nanochat.gpt
from mc.teachers import attention_mass, beyond_average, gate_utility, keep_gradients, over_horizon
from nanochat.gpt import Captured, token_losses
from tiny_mc import K, T, tiny_base, tiny_batch

torch.set_num_threads(1)
ROWS, QUERIES, BLOCKS = slice(None, None, 2), slice(30, 50), 7


def gated_attend(gates: list[torch.Tensor]):
    """An attention that adds layer l's gates [B, Q, N] to the logits of QUERIES on the keys of each block."""
    layers = iter(gates)

    def attend(q, k, v, mask, key_bias):
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        S = q.shape[2]
        gate = torch.zeros(q.shape[0], S, S, dtype=q.dtype)
        gate[:, QUERIES, :BLOCKS * K] = next(layers).repeat_interleave(K, 2)
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + gate[:, None]
        return logits.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v

    return attend


@pytest.fixture
def batch():
    return tiny_batch()


def captured_after_backward(gpt, batch) -> list[Captured]:
    captured: list[Captured] = []
    hidden = gpt.hidden(batch.inputs, capture=captured)
    keep_gradients(captured)
    gpt.loss(hidden, batch.targets).backward()
    return captured


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_gate_utility_is_the_gradient_of_an_explicit_gate(n_kv_head, batch, monkeypatch):
    gpt = tiny_base(n_kv_head=n_kv_head)
    captured = captured_after_backward(gpt, batch)
    gates = [torch.zeros(4, 20, BLOCKS, dtype=torch.float64, requires_grad=True) for _ in captured]
    monkeypatch.setattr(nanochat.gpt, "attend", gated_attend(gates))
    loss = gpt.loss(gpt.hidden(batch.inputs), batch.targets)
    utility = [-g[ROWS] for g in torch.autograd.grad(loss, gates)]
    assert min(u.abs().max() for u in utility) > 1e-4
    for layer, expected in zip(captured, utility):
        torch.testing.assert_close(gate_utility([layer], ROWS, QUERIES, BLOCKS, K), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gate_utility(captured, ROWS, QUERIES, BLOCKS, K), sum(utility), rtol=0, atol=1e-10)


def test_opening_a_block_changes_the_loss_by_its_utility(batch, monkeypatch):
    gpt = tiny_base()
    utility = gate_utility(captured_after_backward(gpt, batch), slice(None), QUERIES, BLOCKS, K)
    best = utility.sum((0, 1)).argmax()

    @torch.no_grad()
    def loss(opened: float) -> float:
        gate = torch.zeros(4, 20, BLOCKS, dtype=torch.float64)
        gate[..., best] = opened
        monkeypatch.setattr(nanochat.gpt, "attend", gated_attend([gate] * 3))
        return gpt.loss(gpt.hidden(batch.inputs), batch.targets).item()

    gain = (loss(-1e-4) - loss(1e-4)) / 2e-4
    assert gain == pytest.approx(utility[..., best].sum().item(), rel=1e-5) and gain > 0


def planted(useful: int) -> Captured:
    """One layer whose loss falls with the attention that the last 4 of 24 queries pay to one block."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 24, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    v = torch.zeros_like(k)
    v[:, :, useful * K:(useful + 1) * K, 0] = 1
    weights = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1),
                                                                   -torch.inf).softmax(-1)
    y = (weights @ v).requires_grad_()
    (-y[:, :, 20:, 0].sum()).backward()
    return Captured(q, k, v, y)


@pytest.mark.parametrize("useful", [0, 2, 4])
def test_utility_is_positive_for_the_block_that_lowers_the_loss(useful):
    utility = gate_utility([planted(useful)], slice(None), slice(20, 24), 5, K)[0]
    assert (utility[:, useful] > 0).all()
    assert (utility[:, [b for b in range(5) if b != useful]] < 0).all()
    assert not gate_utility([planted(useful)], slice(None), slice(16, 20), 4, K).any()  # these queries do not care


def test_utilities_of_everything_a_query_sees_sum_to_zero(batch):
    captured = captured_after_backward(tiny_base(), batch)
    queries = slice(T - 1, T)  # sees all 16 blocks and nothing else
    torch.testing.assert_close(gate_utility(captured, slice(None), queries, T // K, K).sum(-1),
                               torch.zeros(4, 1, dtype=torch.float64))


def test_gate_utility_needs_the_backward_pass(batch):
    gpt, captured = tiny_base(), []
    gpt.hidden(batch.inputs, capture=captured)
    with pytest.raises(RuntimeError, match="then backward, first"):
        gate_utility(captured, ROWS, QUERIES, BLOCKS, K)


@pytest.mark.parametrize("n_kv_head", [1, 4])
def test_attention_mass_is_the_softmax_per_block(n_kv_head, batch):
    captured = captured_after_backward(tiny_base(n_kv_head=n_kv_head), batch)
    expected = torch.zeros(2, 20, BLOCKS, dtype=torch.float64)
    for q, k, _, _ in captured:
        for h in range(4):
            for b, row in enumerate((0, 2)):
                for i, t in enumerate(range(30, 50)):
                    weights = (k[row, h * n_kv_head // 4, :t + 1] @ q[row, h,
                                                                      t] / math.sqrt(q.shape[-1])).softmax(0).detach()
                    weights[0] = 0
                    expected[b, i] += weights[:BLOCKS * K].view(BLOCKS, K).sum(1) / 12
    torch.testing.assert_close(attention_mass(captured, ROWS, QUERIES, BLOCKS, K), expected, rtol=0, atol=1e-12)


def test_beyond_average_counts_the_visible_blocks_only():
    signal = torch.tensor([[[1.0, 2.0, 6.0, 100.0], [1.0, 2.0, 6.0, 100.0]]])
    visible = torch.tensor([[[True, True, True, False], [False] * 4]])
    torch.testing.assert_close(beyond_average(signal, visible)[0, 0, :3], torch.tensor([-2.0, -1.0, 3.0]))
    assert beyond_average(signal, visible).isfinite().all()


def test_teachers_take_whatever_precisions_autocast_left(batch):
    """CUDA's autocast normalizes in float32 and attends in bfloat16: q, k and y differ in dtype."""
    gpt = tiny_base(dtype=torch.float32)
    exact = captured_after_backward(gpt, batch)
    mixed = []
    for q, k, v, y in exact:
        half = y.detach().bfloat16().requires_grad_()
        half.grad = y.grad.bfloat16()
        mixed.append(Captured(q.float(), k.float(), v.bfloat16(), half))
    torch.testing.assert_close(attention_mass(mixed, ROWS, QUERIES, BLOCKS, K),
                               attention_mass(exact, ROWS, QUERIES, BLOCKS, K))
    utility, expected = (gate_utility(x, ROWS, QUERIES, BLOCKS, K) for x in (mixed, exact))
    assert utility.dtype == torch.float32 and (utility - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("horizon", [1, 4, 20])
def test_over_horizon(horizon):
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    expected = torch.stack([x[:, t:t + horizon].sum(1) for t in range(20 - horizon + 1)], 1)
    torch.testing.assert_close(over_horizon(x, horizon), expected)


def test_over_horizon_of_half_precision_does_not_drown_in_its_running_sum():
    x = torch.rand(1, 600, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(over_horizon(x, 8), over_horizon(x.float(), 8), rtol=1e-2, atol=0, check_dtype=False)


def test_teachers_keep_no_graph_and_leave_the_pass_unchanged(batch):
    gpt = tiny_base()
    captured: list[Captured] = []
    hidden = gpt.hidden(batch.inputs, capture=captured)
    assert torch.equal(hidden, gpt.hidden(batch.inputs))
    keep_gradients(captured)
    token_losses(gpt.logits(hidden), batch.targets).sum().backward()
    assert not gate_utility(captured, ROWS, QUERIES, BLOCKS, K).requires_grad
    assert not attention_mass(captured, ROWS, QUERIES, BLOCKS, K).requires_grad
