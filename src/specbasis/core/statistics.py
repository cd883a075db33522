"""The statistics of all rooms: means with their spread, intervals, paired tests, correlations, families of tests.

Resampling draws and exchanges *positions* of examples, many resamples at once, so that a statistic can be anything
that is computed from arrays of positions. scipy.stats is imported by the functions that need it: that alone takes
as long as a small comparison.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Positions = NDArray[np.int64]
Statistic = Callable[[Array], Array]
"""From (…, examples, columns) to (…): it is given many resamples at once."""

LEVEL = 0.05
"""Intervals hold with probability 1 − LEVEL; tests are held against LEVEL."""

POWER = 0.8
"""Share of the cases in which an effect of the size that `detectable` returns is seen."""


# --- means ------------------------------------------------------------------------------------------------------


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation of the sample (n − 1); None for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def finite_median(values: Iterable[float]) -> float:
    """Median of the values that are finite; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def student_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its interval by Student's t: m ± t₀.₉₇₅(n − 1)·s/√n; NaN ends for one value."""
    from scipy.special import stdtrit

    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, 1 - LEVEL / 2)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of a t-test that paired differences have mean 0; None for fewer than two, or all alike."""
    if len(differences) < 2 or len(set(differences)) == 1:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


# --- resampling -------------------------------------------------------------------------------------------------


def bootstrap(
    statistic: Callable[[Positions], float | Array], n: int, resamples: int, *, seed: int = 0, at_once: int = 1
) -> Array:
    """A statistic of n examples drawn with replacement, for each resample: (resamples, …).

    Two statistics with equal n and seed meet the same resamples, so their difference is paired. The draws are those
    of ``scipy.stats.bootstrap``, which keeps no values of several statistics side by side.

    Args:
        statistic: from positions of examples, (b, n), to a figure for each of the b resamples, (b, …).
        n: number of examples.
        resamples: how many are drawn.
        seed: of the draws.
        at_once: b, how many resamples the statistic is given together; no figure depends on it.

    Source: Efron & Tibshirani 1993, ch. 6.
    """
    random = np.random.default_rng(seed)
    sizes = _portions(resamples, at_once)
    return np.concatenate([np.asarray(statistic(random.integers(n, size=(size, n)))) for size in sizes])


def cluster_bootstrap(
    statistic: Callable[[Positions], float | Array], clusters: Positions, resamples: int, *, seed: int = 0
) -> Array:
    """A statistic of examples of which whole clusters are drawn with replacement: (resamples, …).

    Args:
        statistic: from the positions of the drawn examples to a figure.
        clusters: the cluster of each example, numbered from 0.
        resamples: how many are drawn.
        seed: of the draws.
    """
    members = [np.flatnonzero(clusters == c) for c in range(clusters.max() + 1)]

    def of_clusters(drawn: Positions) -> Array:
        return np.array([statistic(np.concatenate([members[c] for c in chosen])) for chosen in drawn])

    return bootstrap(of_clusters, len(members), resamples, seed=seed)


def percentile_interval(draws: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """The ends between which 1 − level of some resamples lie, NaN left out; NaN where all are.

    Source: Efron & Tibshirani 1993, §13.3.
    """
    values = np.asarray(draws, dtype=np.float64)
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanquantile(values, (level / 2, 1 - level / 2))
    return float(low), float(high)


def exchange_test(statistic: Statistic, first: Array, second: Array, resamples: int, *, seed: int = 0) -> float:
    """P of a paired randomisation test that it does not matter which of two treatments an example had, two-sided.

    p = (1 + #{|d*| ≥ |d|}) / (1 + resamples), where d = statistic(second) − statistic(first), and a starred d has
    first and second exchanged for each example with probability one half. ``scipy.stats.permutation_test`` gives
    the same in four to seven times the time, since it sorts to permute two values.

    Args:
        statistic: from (…, examples, columns) to (…): it is given many resamples at once.
        first: what it is computed of under one treatment, (examples, columns).
        second: the same under the other.
        resamples: how many exchanges are drawn.
        seed: of the draws.

    Source: Efron & Tibshirani 1993, §15.2.
    """
    random = np.random.default_rng(seed)
    observed = float(abs(statistic(second) - statistic(first)))
    reached = 0
    for size in _portions(resamples, fitting_cache(first)):
        exchanged = random.random((size, len(first), 1)) < 0.5
        moved = statistic(np.where(exchanged, first, second)) - statistic(np.where(exchanged, second, first))
        reached += int((np.abs(moved) >= observed - 1e-12).sum())  # what rounding makes of equals counts as equal
    return (1 + reached) / (1 + resamples)


def fitting_cache(values: NDArray[Any]) -> int:
    """How many resamples of some values fit a core's cache together."""
    return max(1, 2**15 // max(1, values.size))


def _portions(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


# --- correlations -----------------------------------------------------------------------------------------------


def pearson(values: NDArray[Any]) -> Array:
    """Correlation of two columns, (…, examples, 2) to (…); 0 where one of them is constant."""
    centred = values - values.mean(-2, keepdims=True)
    a, b = centred[..., 0], centred[..., 1]
    norms = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    # The mean of equal numbers is not always that number: a constant column need not have norm 0.
    varies = (np.ptp(values, axis=-2) > 0).all(-1) & (norms > 0)
    return np.asarray(np.divide((a * b).sum(-1), norms, out=np.zeros_like(norms), where=varies))


def spearman(values: NDArray[Any]) -> Array:
    """Rank correlation of two columns, (…, examples, 2) to (…), tied values at their mean rank; 0 as `pearson`.

    Whole numbers must be those of `dense_ranks`: their ranks are counted, where scipy's ``rankdata`` would sort.
    """
    codes = values.astype(np.int64) if np.issubdtype(values.dtype, np.integer) else dense_ranks(values)[0]
    return pearson(np.stack([_mean_ranks(codes[..., column]) for column in range(2)], axis=-1))


def dense_ranks(*samples: NDArray[Any]) -> list[Positions]:
    """Each column's values as whole numbers from 0 in the same order, the same ones in all samples."""
    flat = np.concatenate([sample.reshape(-1, sample.shape[-1]) for sample in samples])
    codes = np.stack([np.unique(column, return_inverse=True)[1] for column in flat.T], axis=1)
    ends = np.cumsum([sample.size // sample.shape[-1] for sample in samples])[:-1]
    return [part.reshape(sample.shape) for part, sample in zip(np.split(codes, ends), samples, strict=True)]


def _mean_ranks(codes: Positions) -> Array:
    """Ranks of dense ranks along the last axis, equal values at the mean of theirs."""
    flat = codes.reshape(-1, codes.shape[-1])
    kinds = int(flat.max()) + 1
    places = flat + kinds * np.arange(len(flat))[:, None]
    counts = np.bincount(places.ravel(), minlength=len(flat) * kinds).reshape(len(flat), kinds)
    ranks: Array = (counts.cumsum(1) - (counts - 1) / 2).ravel()[places]
    return ranks.reshape(codes.shape)


METHODS: Mapping[str, Statistic] = {"spearman": spearman, "pearson": pearson}
"""The correlations, by name."""


def correlation(x: Array, y: Array, method: str = "spearman") -> float:
    """Correlation of x and y by one of `METHODS`; NaN where either is constant or shorter than 2."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(METHODS[method](np.stack([x, y], axis=-1)))


def correlation_interval(
    x: Array, y: Array, clusters: Positions, resamples: int, method: str = "spearman"
) -> tuple[float, float]:
    """Interval of a correlation, by a bootstrap that draws whole clusters of examples."""
    draws = cluster_bootstrap(lambda at: correlation(x[at], y[at], method), clusters, resamples)
    return percentile_interval(draws)


def correlation_test(x: Array, y: Array, resamples: int, method: str = "spearman") -> float:
    """Permutation p of a correlation, two-sided; NaN where either is constant."""
    from scipy import stats

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    if method == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y)
    way = stats.PermutationMethod(n_resamples=resamples, rng=np.random.default_rng(0))
    return float(stats.pearsonr(x, y, method=way).pvalue)


def detectable(n: int, level: float = LEVEL, power: float = POWER) -> float:
    """The least |r| that n independent models show at this level with this power; NaN for n < 4.

    tanh((z_{1 − level/2} + z_power) / √(n − 3)), by Fisher's transformation, under which r is nearly normal.

    Source: Fisher 1921; Cohen 1988, ch. 3.
    """
    if n < 4:
        return math.nan
    z = statistics.NormalDist().inv_cdf(1 - level / 2) + statistics.NormalDist().inv_cdf(power)
    return math.tanh(z / math.sqrt(n - 3))


# --- families of tests ------------------------------------------------------------------------------------------


def adjusted(p: ArrayLike, method: str) -> Array:
    """p-values adjusted for the family that they are, those that are not finite left out of it.

    Args:
        p: one p-value for each test.
        method: "bh", Benjamini–Hochberg, or "by", Benjamini–Yekutieli, which holds for any dependence: of all
            rejections at most this share is false in the mean; "holm": any false rejection at all is this rare.

    Source: Benjamini & Hochberg 1995; Benjamini & Yekutieli 2001; Holm 1979.
    """
    whole = np.asarray(p, dtype=np.float64)
    finite = np.isfinite(whole)
    result = np.full(len(whole), np.nan)
    if method == "holm":
        order = np.argsort(whole[finite])
        steps = np.maximum.accumulate(whole[finite][order] * np.arange(len(order), 0, -1))
        result[np.flatnonzero(finite)[order]] = np.minimum(steps, 1)
    elif finite.any():
        from scipy.stats import false_discovery_control

        result[finite] = false_discovery_control(whole[finite], method=method)
    return result
