"""Draws that depend on a key alone: uniform, independent between rows, steps and purposes,
and of whatever else is drawn."""

import math

import pytest
import torch

from mc.keyed_random import gumbel, uniform

torch.set_num_threads(1)
EULER = 0.5772156649


def ks(x: torch.Tensor) -> float:
    """Kolmogorov–Smirnov distance to the uniform distribution, in units of 1/√n (1.63: one draw in a hundred)."""
    x = x.flatten().double().sort().values
    n = len(x)
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    return max((x - grid[:-1]).max().item(), (grid[1:] - x).max().item()) * math.sqrt(n)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """In units of 1/√n."""
    return torch.corrcoef(torch.stack([x.flatten().double(), y.flatten().double()]))[0, 1].item() * math.sqrt(x.numel())


@pytest.mark.parametrize("rows, count", [(torch.arange(20_000), 1), (torch.tensor([7]), 20_000),
                                         (torch.arange(200) * 2**40, 100), (-torch.arange(200), 100)])
def test_draws_are_uniform(rows, count):
    x = uniform(rows, count, 0, "test", 3)
    assert x.shape == (len(rows), count) and x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1
    assert ks(x) < 1.63


def test_draws_of_one_row_over_steps_and_seeds_are_uniform():
    row = torch.tensor([3])
    assert ks(torch.cat([uniform(row, 1, 0, "policy", step) for step in range(4000)])) < 1.63
    assert ks(torch.cat([uniform(row, 1, seed, "policy", 0) for seed in range(4000)])) < 1.63


def test_neighbours_are_uncorrelated():
    x = uniform(torch.arange(500), 100, 0, "test")
    later = uniform(torch.arange(500), 100, 0, "test", 1)
    for other in (x.roll(1, 0), x.roll(1, 1), x.roll((1, 1), (0, 1)), x.roll((1, -1), (0, 1)), later):
        assert abs(correlation(x, other)) < 3.5


def test_rows_do_not_walk_through_each_others_draws():
    x = uniform(torch.arange(1000), 8, 0, "test")
    assert len(x.unique()) > 8000 - 20  # two of 8,000 draws of 24 bits coincide by chance


def test_a_rows_draws_do_not_depend_on_the_batch_or_the_count():
    rows = torch.tensor([5, 0, 123_456_789_012, 7])
    x = uniform(rows, 9, 0, "test")
    for i in range(4):
        assert torch.equal(uniform(rows[i:i + 1], 9, 0, "test")[0], x[i])
    assert torch.equal(uniform(rows.flip(0), 9, 0, "test"), x.flip(0))
    assert torch.equal(uniform(rows, 4, 0, "test"), x[:, :4])


def test_every_part_of_the_key_matters():
    rows, key = torch.tensor([0, 1]), (0, "split", 0)
    x = uniform(rows, 50, *key)
    for other in ((1, "split", 0), (0, "policy", 0), (0, "split", 1), (0, "split"), (0, 0, "split")):
        assert not torch.isclose(uniform(rows, 50, *other), x).all(1).any()
    assert not torch.equal(x[0], x[1])
    assert torch.equal(uniform(rows, 50, *key), x)


def test_the_generator_of_torch_is_left_alone():
    before = torch.get_rng_state()
    gumbel(torch.arange(3), 5, 0, "test")
    assert torch.equal(torch.get_rng_state(), before)


def test_gumbel_noise_has_the_gumbel_distribution():
    x = gumbel(torch.arange(200), 100, 0, "test")
    assert x.isfinite().all() and ks(torch.exp(-torch.exp(-x))) < 1.63
    assert x.mean().item() == pytest.approx(EULER, abs=0.03) and x.var().item() == pytest.approx(math.pi**2 / 6,
                                                                                                 rel=0.05)
