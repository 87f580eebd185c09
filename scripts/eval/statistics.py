"""Intervals and tests of what was measured.

A measure is x_SC: one number per seed and document. Intervals and p-values come from draws of how its mean would come
out with other seeds and other documents, the same draws for every arm and every measure, so that every comparison is
paired and any arithmetic on means (a gap closed, say) has its distribution too. Documents are drawn with replacement
(the bootstrap). Seeds are too few for that: three agree by chance in one case of four, and would then agree in every
draw. Their mean is spread as the t-distribution says instead. Both deviations are added, so what differs by seed and
document together counts twice: conservative. A measure that has one number per seed is tested by the paired t-test over
seeds, which is the same without documents. False positives, measured:
obsidian/log/2026-11-23 What three seeds can say.md.

Where seeds are few and say nothing of others (`bootstrap_interval`), contexts alone are drawn.

Shapes: S seeds, C documents, D draws of the bootstrap.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from nanochat.common import UserError

DRAWS = 4000
LEAST_GAP = 0.1  # nat: below it, the share of the gap that is closed means nothing


def seed_weights(seeds: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[D, S] weights of sum 1, negative ones among them: for any x_S, weights @ x is distributed as mean + t ·
    deviation / √S, t with S − 1 degrees of freedom.

    Beside 1/S a weight is a multivariate t in the S − 1 dimensions in which weights of sum 0 lie, and
    any projection of that is a t.
    """
    if seeds == 1:
        return np.ones((draws, 1))
    normal_DS = rng.standard_normal((draws, seeds))
    normal_DS -= normal_DS.mean(1, keepdims=True)
    chi_D1 = np.sqrt(rng.chisquare(seeds - 1, (draws, 1)) / (seeds - 1))
    return 1 / seeds + normal_DS / chi_D1 / math.sqrt(seeds * (seeds - 1))


class Bootstrap:
    """Draws of seeds and documents, the same for every measure of one shape."""

    def __init__(self, seeds: int, documents: int, draws: int = DRAWS):
        rng = np.random.default_rng(0)
        self.seeds_DS = seed_weights(seeds, draws, rng)
        self.documents_DC = rng.multinomial(documents, np.full(documents, 1 / documents), draws).astype(float)

    def means(self, x_SC: np.ndarray) -> np.ndarray:
        """[D] mean of each draw. NaN stands for a document that has no such value, and counts for nothing; a
        seed without any gives NaN."""
        there = ~np.isnan(x_SC)
        mean = lambda axis: np.where(there, x_SC, 0.0).sum(axis) / there.sum(axis)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_document_C, some_C = mean(0), there.any(0)
            documents_D = self.documents_DC @ np.where(some_C, of_document_C, 0.0) / (self.documents_DC @ some_C)
            return self.seeds_DS @ mean(1) + documents_D - mean(None)


bootstrap = lru_cache(maxsize=16)(Bootstrap)


def interval(draws_D: np.ndarray) -> tuple[float, float]:
    """95 %. NaN where a draw has no value."""
    return float(np.quantile(draws_D, 0.025)), float(np.quantile(draws_D, 0.975))


def bootstrap_p(difference_D: np.ndarray) -> float:
    """Two-sided: how often the sign of a difference turns, at least 2 / (D + 1). NaN where a draw has no value."""
    if np.isnan(difference_D).any():
        return math.nan
    least = min((difference_D <= 0).sum(), (difference_D >= 0).sum())
    return float(min(1.0, 2 * (least + 1) / (len(difference_D) + 1)))


def t_test(difference_S: np.ndarray) -> tuple[tuple[float, float], float]:
    """95 % interval of the mean, and the p-value of its being 0 (paired t-test, two-sided). One seed has neither:
    NaN. UserError without scipy."""
    if len(difference_S) < 2:
        return (math.nan, math.nan), math.nan
    if np.ptp(difference_S) == 0:
        return (float(difference_S[0]), float(difference_S[0])), 1.0 if difference_S[0] == 0 else 0.0
    found = _scipy("paired t-tests").ttest_1samp(difference_S, 0)
    low, high = found.confidence_interval(0.95)
    return (float(low), float(high)), float(found.pvalue)


def false_discovery(p: list[float]) -> list[float]:
    """q-values (Benjamini and Hochberg 1995): of the differences with q < 0.05 one in twenty is expected to be none.
    NaN is no test. UserError without scipy.

    Not Holm's correction, which wants that there be not a single one: of twenty systems, with three seeds, it asks for
    a difference twenty times its standard error.
    """
    p_N = np.asarray(p, dtype=float)
    tested = ~np.isnan(p_N)
    if tested.any():
        p_N[tested] = _scipy("false discovery rates").false_discovery_control(p_N[tested])
    return p_N.tolist()


def _scipy(what: str):
    try:
        import scipy.stats
    except ImportError:
        raise UserError(f"{what} need the package scipy: pip install 'megacontext[eval]'") from None
    return scipy.stats


def bootstrap_interval(statistic: Callable[[np.ndarray], float], count: int, draws: int = 2000,
                       seeds: int = 1) -> list[float]:
    """95 % interval of statistic(indices) over `count` values. Of several seeds, one behind the other, a context is
    drawn with all of its seeds: the interval is then of these models, not of others trained alike."""
    rng, contexts = np.random.default_rng(0), count // seeds
    values = [statistic((rng.integers(0, contexts, contexts) + contexts * np.arange(seeds)[:, None]).ravel())
              for _ in range(draws)]
    return list(interval(np.array(values)))


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    low, high = bootstrap_interval(lambda i: np.median(values[i]), len(values))
    return low, high


def share_of_gap(window: np.ndarray, own: np.ndarray, full: np.ndarray,
                 seeds: int = 1) -> tuple[float, list[float]] | None:
    """(window − own) / (window − full) on means over contexts, and its interval; None where the gap
    is too small to be measured."""
    if (window - full).mean() < LEAST_GAP:
        return None
    share = lambda i: float((window[i] - own[i]).mean() / max((window[i] - full[i]).mean(), 1e-9))
    return share(slice(None)), bootstrap_interval(share, len(window), seeds=seeds)
