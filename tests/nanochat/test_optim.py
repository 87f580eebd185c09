"""MuonAdamW: the maths against references, and the same result however many ranks share it."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanochat import optim
from nanochat.common import UserError
from nanochat.optim import MuonAdamW, assert_finite, check_groups, global_grad_norm, gpt_param_groups, orthogonalize, relative_change  # noqa: E501

torch.set_num_threads(1)

# Odd row counts, a shape that occurs three times (not divisible by two ranks), tall, wide, and
# one of each kind of AdamW bucket.
MATRICES = [(33, 31), (33, 31), (33, 31), (1, 8), (8, 1), (64, 16), (16, 64)]
OTHERS = [(512, 160), (511, 160), (1,), (7,), (31, 3), ()]


def make_params(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype) * 0.1) for shape in MATRICES + OTHERS]


def make_optimizer(params) -> MuonAdamW:
    n = len(MATRICES)
    return MuonAdamW([
        {"name": "matrix", "kind": "muon", "params": params[:n], "lr": 0.02, "weight_decay": 0.1},
        {"name": "rest", "kind": "adamw", "params": params[n:], "lr": 0.01, "weight_decay": 0.01, "eps": 1e-8},
    ])  # fmt: skip


def set_grads(params, step: int, rank: int | None) -> None:
    """Gradients of one of two ranks, or (rank None) their mean. In step 1, rank 1 has none
    for the first of each kind."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        both = torch.randn((2, *p.shape), generator=generator, dtype=torch.float64)
        missing = step == 1 and i in (0, len(MATRICES), len(MATRICES) + 2)
        if missing:
            both[1] = 0
        p.grad = None if missing and rank == 1 else (both.mean(0) if rank is None else both[rank]).to(p.dtype)


def two_ranks(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    params = make_params()
    optimizer, norms, saved = make_optimizer(params), [], None
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
        set_grads(params, step, rank)
        norms.append(global_grad_norm(params, world_size=2))
        optimizer.step()
    resumed_params = [nn.Parameter(p) for p in saved[1]]
    resumed = make_optimizer(resumed_params)
    resumed.load_state_dict(saved[0])
    for step in (2, 3):
        set_grads(resumed_params, step, rank)
        resumed.step()
    same = all(torch.equal(a, b) for a, b in zip(params, resumed_params))
    held = sum(t.numel() for b in optimizer._buckets for t in b.state.values())
    result = {"params": [p.detach() for p in params], "norms": norms, "resumed_same": same, "state": saved[0],
              "held": held}
    torch.save(result, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo ranks ended with."""
    out = tmp_path_factory.mktemp("ranks")
    mp.spawn(two_ranks, args=(str(out),), nprocs=2)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_equal_one(ranks):
    params = make_params()
    optimizer = make_optimizer(params)
    for step in range(4):
        set_grads(params, step, None)
        torch.testing.assert_close(ranks[0]["norms"][step], global_grad_norm(params), rtol=1e-5, atol=0)
        optimizer.step()
    for mine, first, second in zip(params, ranks[0]["params"], ranks[1]["params"]):
        assert torch.equal(first, second)
        torch.testing.assert_close(mine.detach(), first, rtol=0, atol=1e-5)


def test_state_is_sharded(ranks):
    alone = sum(t.numel() for b in make_optimizer(make_params())._buckets for t in b.state.values())
    replicated = 2 * sum(torch.Size(s).numel() for s in OTHERS[1:])  # the first divides by two ranks and is large
    padding = 33 * 31 + 4 * (8 + 64 * 16) // 2
    assert all(r["held"] - replicated <= (alone - replicated) // 2 + padding + 2 for r in ranks)


def test_ranks_resume_bit_for_bit(ranks):
    assert all(r["resumed_same"] for r in ranks)


def test_other_world_size_is_refused(ranks):
    with pytest.raises(UserError, match="rank 1 of 2 cannot resume rank 0 of 1"):
        make_optimizer(make_params()).load_state_dict(ranks[1]["state"])


def test_one_rank_resumes_bit_for_bit(tmp_path):
    params = make_params()
    optimizer = make_optimizer(params)
    for step in range(4):
        set_grads(params, step, None)
        optimizer.param_groups[0]["momentum"] = 0.9 + 0.01 * step
        optimizer.step()
        if step == 1:
            torch.save((optimizer.state_dict(), [p.detach() for p in params]), tmp_path / "state.pt")
    state, values = torch.load(tmp_path / "state.pt", weights_only=True)
    again = [nn.Parameter(v) for v in values]
    resumed = make_optimizer(again)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["momentum"] == pytest.approx(0.91)
    for step in (2, 3):
        set_grads(again, step, None)
        resumed.param_groups[0]["momentum"] = 0.9 + 0.01 * step
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(params, again))


@pytest.mark.parametrize("change, message", [("name", "optimizer groups"), ("shape", "other shapes")])
def test_state_of_another_model_is_refused(change, message):
    optimizer = make_optimizer(make_params())
    state = optimizer.state_dict()
    if change == "name":
        state["groups"][0]["name"] = "lens"
    else:
        state["buckets"][0] = {"momentum": torch.zeros(2, 5, 5)}
    with pytest.raises(UserError, match=message):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("shape", [(3, 33, 31), (2, 1, 8), (1, 8, 1), (4, 32, 32), (2, 31, 128), (2, 128, 31)])
def test_orthogonalize_matches_svd(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    got = orthogonalize(x)
    # Projected on the true factors the result is diagonal, its diagonal the new singular values.
    core = u.mT @ got @ vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert (core - torch.diag_embed(values)).abs().max() < 1e-9
    kept = s > 1e-2 * s.norm(dim=-1, keepdim=True)
    assert ((values - 1).abs()[kept] < 0.15).all() and (values < 1.15).all()
    torch.testing.assert_close(orthogonalize(x.float()).double(), got, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 16, 64), (4, 64, 256)])
def test_both_iterations_agree_also_near_low_rank(shape):
    n, rows, cols = shape
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, rows, 2, generator=generator, dtype=torch.float64) @ torch.randn(n, 2, cols,
                                                                                        generator=generator,
                                                                                        dtype=torch.float64)
    x += 1e-4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x /= x.norm(dim=(-2, -1), keepdim=True) * optim.SAFETY
    torch.testing.assert_close(optim._iterate_gram(x), optim._iterate(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(optim._iterate_gram(x.float()).double(), optim._iterate(x), rtol=0, atol=1e-3)


def test_orthogonalize_keeps_zero():
    assert not orthogonalize(torch.zeros(2, 5, 3)).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-9, 1e9))
def test_orthogonalize_ignores_scale(rows, cols, scale):
    x = torch.randn(1, rows, cols, generator=torch.Generator().manual_seed(rows * 41 + cols), dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(x * scale), orthogonalize(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_matches_torch(decay):
    ours, theirs = make_params(), make_params()
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    optimizer = MuonAdamW([{"name": "all", "kind": "adamw", "params": ours, **options}])
    reference = torch.optim.AdamW(theirs, **options, fused=False, foreach=False)
    for step in (0, 2, 3, 4):
        set_grads(ours, step, None)
        set_grads(theirs, step, None)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_muon_matches_definition():
    p = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = MuonAdamW([{"name": "m", "kind": "muon", "params": [p], "lr": 0.1, "momentum": 0.9,
                            "weight_decay": 0.5}])
    value, momentum = p.detach().clone(), torch.zeros_like(p)
    for step in range(3):
        set_grads([p], step, None)
        momentum = 0.9 * momentum + 0.1 * p.grad
        update = orthogonalize((0.1 * p.grad + 0.9 * momentum)[None])[0]
        value = value - 0.1 * 0.5 * value * (update * value > 0) - 0.1 * (6 / 4) ** 0.5 * update
        optimizer.step()
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-12)


def test_never_used_parameter_stays():
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = MuonAdamW([
        {"name": "m", "kind": "muon", "params": params[:2], "lr": 0.1, "weight_decay": 0.1},
        {"name": "a", "kind": "adamw", "params": params[-3:], "lr": 0.1},
    ])  # fmt: skip
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before))


class TinyGPT(nn.Module):
    """The parameter names of a two-layer GPT, without its forward."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict({"attn": nn.ModuleDict({"c_q": nn.Linear(8, 8, bias=False)}),
                                       "mlp": nn.Linear(8, 32)})
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(16, 8), "h": nn.ModuleList([block(), block()])})
        self.value_embeds = nn.ModuleDict({"1": nn.Embedding(16, 8)})
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
        self.smear_gate = nn.Linear(24, 1, bias=False)
        self.transformer.h[0].attn.key_shift = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


LRS = {"matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.004, "scalar_lr": 0.5, "weight_decay": 0.1}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_gpt_groups_by_name(prefix):
    model = TinyGPT()
    named = [(prefix + name, p) for name, p in model.named_parameters()]
    groups = {g["name"]: g for g in gpt_param_groups(named, n_embd=192, **LRS)}
    sizes = {name: len(g["params"]) for name, g in groups.items()}
    assert sizes == {"embedding": 2, "unembedding": 1, "matrix": 4, "resid_lambdas": 1, "x0_lambdas": 1, "scalar": 4}
    assert [g["kind"] for g in groups.values()].count("muon") == 1 and groups["matrix"]["kind"] == "muon"
    assert groups["embedding"]["lr"] == pytest.approx(0.6) and groups["unembedding"]["lr"] == pytest.approx(0.008)
    assert groups["matrix"]["lr"] == 0.02 and groups["resid_lambdas"]["lr"] == pytest.approx(0.005)
    assert groups["x0_lambdas"]["betas"][0] == 0.96
    optimizer = MuonAdamW(groups.values())
    check_groups({"gpt": model}, optimizer.param_groups)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.6)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_forgotten_doubled_and_strange_parameters_are_named():
    model, lens = TinyGPT(), nn.Linear(3, 3)
    groups = gpt_param_groups(model.named_parameters(), n_embd=192, **LRS)
    with pytest.raises(AssertionError, match=r"lens.weight \(in 0 groups\), lens.bias \(in 0 groups\)"):
        check_groups({"gpt": model, "lens": lens}, groups)
    twice = groups + [{"name": "again", "kind": "adamw", "params": [model.lm_head.weight], "lr": 1.0}]
    with pytest.raises(AssertionError, match=r"gpt.lm_head.weight \(in 2 groups\)"):
        check_groups({"gpt": model}, twice)
    stranger = groups + [{"name": "lens", "kind": "adamw", "params": list(lens.parameters()), "lr": 1.0}]
    with pytest.raises(AssertionError, match="2 parameter"):
        check_groups({"gpt": model}, stranger)


def test_group_added_later_is_optimized():
    params = make_params()
    optimizer = make_optimizer(params[:-1])
    optimizer.add_param_group({"name": "late", "kind": "adamw", "params": [params[-1]], "lr": 0.1})
    before = params[-1].item()
    set_grads(params, 0, None)
    optimizer.step()
    assert params[-1].item() != before


@pytest.mark.parametrize("group", [{"kind": "sgd", "name": "x", "lr": 1.0}, {"kind": "adamw", "lr": 1.0},
                                   {"kind": "muon", "name": "x", "lr": 1.0}])
def test_wrong_group_is_refused(group):
    with pytest.raises(ValueError, match="kind|matrices"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], **group}])


def test_grad_norm_and_clipping():
    params = make_params()
    set_grads(params, 0, None)
    expected = torch.cat([p.grad.flatten() for p in params]).norm()
    torch.testing.assert_close(global_grad_norm(params, max_norm=0.5), expected)
    torch.testing.assert_close(global_grad_norm(params, max_norm=0.5), torch.tensor(0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(global_grad_norm(params, max_norm=2.0), torch.tensor(0.5), rtol=1e-4, atol=0)


def test_relative_change_is_of_all_parameters_together():
    params = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    before = [p.clone() for p in params]
    assert relative_change(params, before) == 0
    params[0][1] += 0.5
    torch.testing.assert_close(relative_change(params, before), torch.tensor(0.1))
    assert relative_change([torch.zeros(2)], [torch.zeros(2)]) == 0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf"), torch.tensor(float("nan"))])
def test_loss_must_be_finite(loss):
    assert_finite(torch.tensor(2.0), step=6)
    with pytest.raises(UserError, match="loss is not finite at step 7"):
        assert_finite(loss, step=7)


def test_shard_threshold_splits_the_test_shapes():
    assert 512 * 160 >= optim.SHARD_MIN and 31 * 3 < optim.SHARD_MIN
