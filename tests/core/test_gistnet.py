"""C3, C5: gists against a slow reference, masks, dependence on every entry, gradients, the
start from the mean, FLOPs."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mc.gistnet import GistNet, GistNetConfig
from nanochat.common import UserError

K, D = 8, 24
VARIANTS = [
    dict(variant="mean"),
    dict(variant="transformer"),
    dict(variant="transformer", n_layer=2),
    dict(variant="slots"),
]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(str(v) for v in o.values()))
gists = pytest.mark.parametrize("n_gists", [1, 2, 4])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(options: dict, n_gists: int = 1, moved: bool = True) -> GistNet:
    """A float64 GistNet; `moved`: with a head and level embeddings that are no longer zero."""
    torch.manual_seed(0)
    net = GistNet(GistNetConfig(d_model=D, block_size=K, width=16, n_head=2, max_lod=3, n_gists=n_gists,
                                **options)).double()
    for name, p in net.named_parameters():
        if moved and (name.endswith("level_LC") or name.endswith("head.weight")):
            torch.nn.init.normal_(p, std=0.3)
    return net


def blocks(n: int, seed: int = 1, size: int = K) -> torch.Tensor:
    x = torch.randn(n, size, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.square().mean(-1, keepdim=True).sqrt()


def rms_norm(v: torch.Tensor) -> torch.Tensor:
    return v / (v.square().mean() + torch.finfo(v.dtype).eps).sqrt()


def slow_layer(layer, rows: list, source: list) -> list:
    """One row, one head, one source entry at a time; the zero key adds exp(0) to each softmax's sum."""
    out, E = [], rows[0].numel() // layer.n_head
    keys, values = zip(*[(layer.key_value.weight @ rms_norm(s)).chunk(2) for s in source])
    for row in rows:
        q, read = layer.query.weight @ rms_norm(row), []
        for h in range(layer.n_head):
            part = slice(h * E, (h + 1) * E)
            weights = [torch.exp(q[part] @ k[part] / math.sqrt(E)) for k in keys]
            read.append(sum(w * v[part] for w, v in zip(weights, values)) / (1 + sum(weights)))
        row = row + layer.out.weight @ torch.cat(read)
        out.append(row + layer.down.weight @ (layer.up.weight @ rms_norm(row)).clamp(min=0) ** 2)
    return out


def slow_gists(net: GistNet, block: list[tuple[int, torch.Tensor]], lod: int) -> torch.Tensor:
    """The gists of one block given as its valid entries (position, vector), with no mask anywhere."""
    config, G = net.config, net.config.n_gists
    if not block:
        return torch.zeros(G, D, dtype=torch.float64)
    parts = [[i for i, (position, _) in enumerate(block) if position * G // config.entries(lod) == g]
             or range(len(block)) for g in range(G)]

    def average(vectors: list, part) -> torch.Tensor:
        return sum(vectors[i] for i in part) / len(part)

    out = [average([x for _, x in block], part) for part in parts]
    if config.variant != "mean":
        (summary,) = net.summaries
        body = summary.body
        h = [summary.embed.weight @ x + summary.position_KC[position] + summary.level_LC[lod - 1]
             for position, x in block]
        for layer in body.layers:
            h = slow_layer(layer, h, h)
        if config.variant == "slots":
            slots = slow_layer(body.gather_1, [*body.query_1_GC], h)
            s = slow_layer(body.gather_2, [*body.query_2_GC], slow_layer(body.give_back, h, slots))
        else:
            s = [average(h, part) for part in parts]
        out = [o + summary.head.weight @ rms_norm(v) for o, v in zip(out, s)]
    return torch.stack([rms_norm(o) for o in out])


@gists
@variants
def test_equals_slow_reference_under_any_mask(options, n_gists):
    """C3: a masked block gives what its valid entries alone give; what stands in the holes, even NaN, is never read."""
    for lod in (1, 3):
        net = make(options, n_gists)
        size = net.config.entries(lod)
        x, mask = blocks(6, size=size), torch.rand(6, size, generator=torch.Generator().manual_seed(2)) < 0.6
        mask[0], mask[1], mask[2] = True, False, torch.arange(size) < 3
        holed = x.masked_fill(~mask[..., None], torch.nan)
        got = net(holed, mask, lod)
        for n in range(6):
            want = slow_gists(net, [(k, x[n, k]) for k in range(size) if mask[n, k]], lod)
            torch.testing.assert_close(got[n], want, rtol=0, atol=1e-12)
        torch.testing.assert_close(net(x, None, lod), net(x, torch.ones_like(mask), lod), rtol=0, atol=1e-12)


@variants
def test_short_block_is_the_truncated_block(options):
    """C3: no padding needed at all: 3 of 8 entries with a mask, or 3 entries."""
    net, x = make(options), blocks(4)
    mask = (torch.arange(K) < 3).expand(4, K)
    torch.testing.assert_close(net(x, mask, 2), net(x[:, :3], None, 2), rtol=0, atol=1e-12)


@gists
@variants
def test_every_entry_changes_every_gist_it_may(options, n_gists):
    """Trap 7: nothing is causal, no query is a constant. A mean knows its own part alone."""
    net, x = make(options, n_gists), blocks(1)
    base = net(x, None, 1)
    for k in range(K):
        other = x.clone()
        other[0, k] = blocks(1, seed=7)[0, k]
        changed = (net(other, None, 1) - base).abs().amax(-1)[0]
        reached = changed if options["variant"] != "mean" else changed[k * n_gists // K]
        assert reached.min() > 1e-6, k


@gists
@variants
def test_gradient_reaches_every_parameter_and_entry(options, n_gists):
    net, x = make(options, n_gists), blocks(5, size=K * n_gists).requires_grad_()
    mask = torch.ones(5, K * n_gists, dtype=torch.bool)
    mask[3, 2:], mask[4] = False, False
    probe = torch.randn(5, n_gists, D, dtype=torch.float64)
    sizes = {lod: net.config.entries(lod) for lod in (1, 2, 3)}
    sum((net(x[:, :size], mask[:, :size], lod) * probe).sum() for lod, size in sizes.items()).backward()
    for name, p in net.named_parameters():
        row_grads = p.grad.abs().amax(-1)  # a ReLU unit may rest on so few blocks; a position, level or query may not
        assert (row_grads.min() if name.endswith("C") else row_grads.max()) > 0, name
    reached = x.grad.abs().amax(-1) > 0
    assert x.grad.isfinite().all() and torch.equal(reached, mask)


@gists
@variants
def test_starts_from_the_masked_mean(options, n_gists):
    """The baseline, exactly; and the head, still zero, gets a gradient, so that it leaves it."""
    net, x = make(options, n_gists, moved=False), blocks(4)
    mean = make(dict(variant="mean"), n_gists)
    mask = torch.rand(4, K, generator=torch.Generator().manual_seed(3)) < 0.5
    out = net(x, mask, 2)
    assert torch.equal(out, mean(x, mask, 2))
    rms = out.square().mean(-1)
    torch.testing.assert_close(rms, mask.any(1, keepdim=True).to(rms).expand_as(rms))
    if options["variant"] != "mean":
        (out * torch.randn_like(out)).sum().backward()
        assert net.summaries[min(1, len(net.summaries) - 1)].head.weight.grad.abs().max() > 0


@variants
def test_permuting_blocks_permutes_gists(options):
    """Trap 10."""
    net, x, order = make(options), blocks(5), torch.tensor([3, 0, 4, 1, 2])
    mask = torch.rand(5, K, generator=torch.Generator().manual_seed(3)) < 0.5
    torch.testing.assert_close(net(x[order], mask[order], 1), net(x, mask, 1)[order], rtol=0, atol=1e-12)


def test_levels_are_told_apart():
    net, x = make(dict(variant="slots")), blocks(2)
    assert all((net(x, None, a) - net(x, None, b)).abs().max() > 1e-3 for a, b in ((1, 2), (2, 3), (1, 3)))


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False)])
def test_low_precision_stays_near(dtype, autocast):
    net, x = make(dict(variant="slots")), blocks(3)
    want = net(x, None, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = net.to(dtype)(x.to(dtype), None, 1)
    assert got.dtype == dtype and (got.double() - want).abs().max() < (0.1 if autocast or dtype == torch.bfloat16
                                                                       else 1e-5)


@gists
@variants
def test_flops_are_those_of_the_shapes(options, n_gists):
    """Trap 12: against torch's own count of the products that really run (its SDPA, written out)."""
    net, per_token = make(options, n_gists), 0.0
    for lod in (1, 2, 3):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            net(blocks(4, size=net.config.entries(lod)), None, lod)
        per_token += counter.get_total_flops() / 4 / K**lod
    assert net.flops_per_token() == pytest.approx(per_token, rel=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        dict(variant="max"), dict(variant="binding"),
        dict(n_gists=3), dict(block_size=6, n_gists=4), dict(block_size=2, n_gists=2), dict(width=1024),
        dict(width=30, n_head=4),
        dict(max_lod=0), dict(block_size=1), dict(n_layer=0),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(bad):
    with pytest.raises(UserError, match="gist"):
        GistNetConfig(d_model=D, **bad)


def test_wrong_shapes_are_refused():
    net, x = make(dict(variant="slots")), blocks(2)
    for args in ((x, None, 0), (x, None, 4), (x[..., 1:], None, 1), (x.repeat(1, 2, 1), None, 1),
                 (x, torch.ones(2, K), 1)):
        with pytest.raises(ValueError, match="lod|expected"):
            net(*args)
