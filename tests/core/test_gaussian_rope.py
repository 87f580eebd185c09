"""Positions of entries: raw tokens exactly as in the base, gists at their centre and damped as the
expectation over their span."""

import math

import numpy as np
import pytest
import torch

from mc.gaussian_rope import SCHEMES, damping, entry_rotary
from nanochat.gpt import GPT
from tiny_gpt import tiny_gpt

torch.set_num_threads(1)


def base(dtype=torch.float64, **config) -> GPT:
    return tiny_gpt(dtype=dtype, **{"sequence_len": 128, **config})


def complex_rotary(gpt: GPT, start: list, length: list, **kwargs) -> torch.Tensor:
    """[W, F] cos + i·sin of one row of entries."""
    cos, sin = entry_rotary(gpt, torch.tensor([start]), torch.tensor([length]), **kwargs)
    return torch.complex(cos, sin)[0, :, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rope_fraction", [1.0, 0.5])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_raw_entries_turn_exactly_as_in_the_base(scheme, rope_fraction, dtype):
    gpt = base(dtype, rope_fraction=rope_fraction)
    positions = torch.stack([torch.arange(77) + 12_345_678, torch.arange(77)])
    rotary = entry_rotary(gpt, positions, torch.ones_like(positions), scheme=scheme)
    for got, expected in zip(rotary, gpt.rotary(positions)):
        assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("start, length", [(0, 1), (8, 8), (96, 32), (4096, 1024), (0, 32**3)])
def test_centre_and_variance_are_those_of_the_covered_tokens(start, length):
    gpt = base()
    tokens = np.arange(start, start + length, dtype=np.float64)
    centre = complex_rotary(gpt, [start], [length], scheme="centre")[0]
    expected = torch.polar(torch.ones(4, dtype=torch.float64), tokens.mean() * gpt.inverse_frequencies())
    torch.testing.assert_close(centre, expected, rtol=0, atol=1e-12)
    frequencies = torch.tensor([1e-4 / length, 1 / length], dtype=torch.float64)
    variance = -2 * damping(torch.tensor([[length]]), frequencies, 0.0)[0, 0].log() / frequencies**2
    assert variance[1].item() == pytest.approx(tokens.var(), rel=1e-9)


@pytest.mark.parametrize("start, length", [(40, 8), (1024, 32), (3 * 32**2, 32**2)])
def test_damped_rotation_is_its_expectation_over_a_gaussian(start, length):
    gpt = base()
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)  # trapezoids: exact to rounding for a Gaussian
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    p = start + (length - 1) / 2 + math.sqrt((length**2 - 1) / 12) * z
    expected = torch.stack([(density * torch.polar(torch.ones_like(p), w * p)).sum()
                            for w in gpt.inverse_frequencies()])
    torch.testing.assert_close(complex_rotary(gpt, [start], [length], floor=0.0)[0], expected, rtol=0, atol=1e-10)


def test_damped_rotation_is_near_the_mean_over_the_span_while_that_is_short_beside_the_wavelength():
    gpt = base(rope_base=1e4)
    frequencies = gpt.inverse_frequencies()
    for length in (2, 4, 8, 32, 256):
        turn = frequencies * length
        tokens = torch.arange(length, dtype=torch.float64) + 640
        expected = torch.polar(torch.ones(length, 1, dtype=torch.float64), tokens[:, None] * frequencies).mean(0)
        error = (complex_rotary(gpt, [640], [length], floor=0.0)[0] - expected).abs()
        assert (error <= turn**4 / 2000 + 1e-12)[turn < 2].all()  # the fourth cumulant is all that differs


def test_floor_is_the_share_that_every_frequency_keeps():
    gpt = base()
    undamped, full, floored = (complex_rotary(gpt, [0, 32], [32, 32**4], floor=f) for f in (1.0, 0.0, 0.1))
    torch.testing.assert_close(undamped, complex_rotary(gpt, [0, 32], [32, 32**4], scheme="centre"))
    torch.testing.assert_close(floored, 0.1 * undamped + 0.9 * full)
    assert floored[1].abs().min() >= 0.1 - 1e-12 and full[1].abs().max() < 0.99
    assert full[1, :2].abs().max() < 1e-12  # what the floor is for


def test_contiguous_entries_are_numbered_to_the_last_ones_position():
    gpt = base()
    start, length = torch.tensor([[0, 16, 20, 21, 22, 0], [0, 16, 32, 48, 0, 0]]), torch.tensor([[16, 4, 1, 1, 1, 0],
                                                                                                 [16, 16, 16, 1, 0, 0]])
    got = entry_rotary(gpt, start, length, scheme="contiguous")
    expected = gpt.rotary(torch.tensor([[18, 19, 20, 21, 22, 23], [45, 46, 47, 48, 49, 50]]))
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def captured_keys(gpt: GPT, x: torch.Tensor, start: list, length: list, **kwargs) -> torch.Tensor:
    """[S, F] rotated keys of the first layer's first head, pairs as complex numbers."""
    captured = []
    rotary = entry_rotary(gpt, torch.tensor([start]), torch.tensor([length]), **kwargs)
    gpt.hidden(torch.full((1, len(start)), -1), inputs_embeds=x, rotary=rotary,
               linked=torch.zeros(1, len(start), dtype=torch.bool), capture=captured)
    a, b = captured[0].k[0, 0].chunk(2, -1)
    return torch.complex(a, b)


@torch.no_grad()
def test_damping_survives_qk_norm():
    gpt = base()
    x = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start, length = [0, 1024, 1056], [1024, 32, 1]
    damped, undamped = (captured_keys(gpt, x, start, length, scheme=s) for s in ("gaussian", "centre"))
    expected = damping(torch.tensor([length]), gpt.inverse_frequencies(), 0.1)[0]
    assert expected[0, 0] < 0.2 and (expected[2] == 1).all()
    torch.testing.assert_close(damped.abs() / undamped.abs(), expected, rtol=1e-10, atol=0)


@torch.no_grad()
def test_a_lod4_key_still_tells_contents_and_places_apart():
    gpt = base()
    x = torch.randn(1, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    length = [32**4] * 2
    one, two = captured_keys(gpt, x, [0, 32**4], length)
    same, elsewhere = captured_keys(gpt, x[:, :1].expand(-1, 2, -1), [0, 32**4], length)
    norm = captured_keys(gpt, x, [0, 32**4], length, scheme="centre").abs().square().sum(-1).sqrt()[0]
    for key in (one, two):
        assert key.abs().square().sum().sqrt() >= 0.1 * norm
    assert (one - two).abs().max() > 0.05 * norm and (same - elsewhere).abs().max() > 0.05 * norm


def test_angles_are_exact_at_ten_million_tokens():
    gpt = base(n_embd=64, n_head=1, n_kv_head=1)
    start = [10_000_000, 10_000_001, 9_999_968]
    got = complex_rotary(gpt, start, [1, 1, 32], scheme="centre")
    centre = np.array([10_000_000, 10_000_001, 9_999_983.5], dtype=np.longdouble)
    angle = centre[:, None] * gpt.inverse_frequencies().numpy().astype(np.longdouble)
    expected = torch.complex(torch.from_numpy(np.cos(angle).astype(np.float64)),
                             torch.from_numpy(np.sin(angle).astype(np.float64)))
    assert (got - expected).abs().max() < 1e-9
