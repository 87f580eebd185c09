"""Schedules hold their promises in runs of every length, the shortest included."""

import pytest

from nanochat.schedule import batch_lr_scale, lr_multiplier, muon_momentum, phases, ramp, weight_decay_multiplier

LENGTHS = [1, 2, 3, 10, 60, 10_000]
SHAPES = [(0, 0.0, 0.0), (40, 0.5, 0.0), (40, 1.0, 0.1), (5, 0.2, 0.05), (10**6, 0.65, 0.0)]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("warmup, warmdown_ratio, final", SHAPES)
def test_lr_rises_stays_falls(n, warmup, warmdown_ratio, final):
    rates = [lr_multiplier(s, n, warmup_steps=warmup, warmdown_ratio=warmdown_ratio, final_lr_frac=final) for s in range(n)]
    up, down = phases(n, warmup, warmdown_ratio)
    assert up + down < n and up <= warmup and down <= round(warmdown_ratio * n)
    assert all(a < b for a, b in zip(rates[:up], rates[1 : up + 1]))
    assert set(rates[up : n - down]) == {1.0}
    assert all(a > b for a, b in zip(rates[n - down - 1 :], rates[n - down :]))
    assert all(0 < r <= 1 for r in rates) and all(r >= final for r in rates[up:])


def test_lr_at_full_length():
    at = [lr_multiplier(s, 10_000, warmup_steps=100, warmdown_ratio=0.2, final_lr_frac=0.1) for s in range(10_000)]
    assert at[0] == pytest.approx(1 / 101) and at[50] == pytest.approx(51 / 101) and at[100] == at[7_999] == 1
    assert at[9_000] == pytest.approx(0.55, abs=1e-3) and at[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("n, ratio", [(0, 0.5), (-1, 0.5), (10, 1.5), (10, -0.1)])
def test_impossible_run_is_refused(n, ratio):
    with pytest.raises(ValueError, match="num_iterations"):
        lr_multiplier(0, n, warmdown_ratio=ratio)


@pytest.mark.parametrize("n", LENGTHS)
def test_momentum_and_weight_decay(n):
    momentum = [muon_momentum(s, n) for s in range(n)]
    decay = [weight_decay_multiplier(s, n) for s in range(n)]
    assert all(0.85 <= m <= 0.95 for m in momentum) and momentum == sorted(momentum)
    assert momentum[-1] == pytest.approx(0.95)
    assert decay[0] == 1 and decay == sorted(decay, reverse=True) and decay[-1] > 0


def test_ramp():
    assert [ramp(s, 2, 3) for s in range(7)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [ramp(s, 2, 0) for s in range(4)] == [0, 0, 1, 1]


def test_small_batches_keep_a_usable_rate():
    assert batch_lr_scale(524_288) == 1 and batch_lr_scale(262_144) == pytest.approx(0.5**0.5)
    assert batch_lr_scale(2_048) == 0.5 and batch_lr_scale(1) == 0.5 and batch_lr_scale(2**30) == 2
