"""Scores of examples, what they add up to, and how sure one can be of it and of its change.

A score is a *statistic* of the examples: their mean, a correlation, a perplexity. Intervals come from resampling
examples, tests from swapping, for single examples, what the two models said: both hold for any statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.statistics import (
    Array,
    Positions,
    Statistic,
    bootstrap,
    dense_ranks,
    exchange_test,
    fitting_cache,
    pearson,
    percentile_interval,
    spearman,
)


def mean(values: Array) -> Array:
    """Mean of the first column."""
    return np.asarray(values[..., 0].mean(-1))


def ratio(values: Array) -> Array:
    """Sum of the first column over that of the second: a loss per token, from losses and numbers of tokens."""
    return np.asarray(values[..., 0].sum(-1) / values[..., 1].sum(-1))


def perplexity(values: Array) -> Array:
    """The exponential of `ratio`."""
    return np.asarray(np.exp(ratio(values)))


@dataclass(frozen=True, eq=False)
class Sample:
    """What a model scored on each example.

    Attributes:
        values: (examples, columns).
        statistic: what they add up to.
        higher_is_better: False for losses.
        chance: what a model gets that knows nothing; None where that is not known.
    """

    values: Array
    statistic: Statistic = field(default=mean)
    higher_is_better: bool = True
    chance: float | None = None

    @property
    def value(self) -> float:
        """The statistic of all examples."""
        return float(self.statistic(self.values))


Evaluator = Callable[[Any], Mapping[str, "float | Sample | Tensor | Array"]]
"""From a model to its metrics: numbers, one score for each example (whose mean is the metric), or samples."""


def as_samples(metrics: Mapping[str, float | Sample | Tensor | Array]) -> dict[str, Sample | float]:
    """What an evaluator returned, checked.

    Raises:
        InputError: it is empty or no mapping, or a value is not finite: the metric's name is in the message.
    """
    if not isinstance(metrics, Mapping) or not metrics:
        raise InputError(f"the evaluator returned {type(metrics).__name__}; want a mapping from metrics to values")
    return {name: _as_sample(name, value) for name, value in metrics.items()}


def _as_sample(name: str, value: float | Sample | Tensor | Array) -> Sample | float:
    if isinstance(value, Sample):
        sample = value
    else:
        numbers = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
        if numbers.ndim == 0:
            _finite(name, numbers)
            return float(numbers)
        sample = Sample(numbers.reshape(len(numbers), -1) if numbers.size else numbers)
    if sample.values.ndim != 2 or not len(sample.values):
        raise InputError(f"metric {name!r}: got scores of shape {sample.values.shape}; want one row an example")
    _finite(name, sample.values)
    _finite(name, np.asarray(sample.value))
    return sample


def _finite(name: str, numbers: Array) -> None:
    bad = int((~np.isfinite(numbers)).sum())
    if bad:
        raise NonFiniteError(f"metric {name!r}: {bad} of {numbers.size} values of the evaluator are NaN or Inf")


def summarise(
    before: Mapping[str, Sample | float],
    after: Mapping[str, Sample | float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float | int]:
    """Each metric after an edit, its change, 95 % intervals of both, and a test of the change.

    For a metric m: ``m``, ``m.low``, ``m.high``, ``m.change`` (after − before), ``m.change_low``,
    ``m.change_high``, ``m.p``, ``m.examples``; only the value and the change where there are no examples.

    Intervals: percentile bootstrap over examples, the same resamples before and after, so that the change is
    paired. Test: two-sided paired randomisation; p = (1 + #{|change*| ≥ |change|}) / (1 + resamples), where a
    starred change has before and after exchanged for each example with probability one half. For a correlation,
    predictions are standardised (Spearman: ranked) for each model before: it does not see their scale.

    Raises:
        InputError: before and after have other metrics or numbers of examples.

    Source: Efron & Tibshirani 1993, §13.3 (percentile interval), §15.2 (permutation test).
    """
    if set(before) != set(after):
        raise InputError(f"the evaluator returned {', '.join(after)} after {', '.join(before)}; want equal names")
    summary: dict[str, float | int] = {}
    for name, new in after.items():
        old = before[name]
        if isinstance(new, float) or isinstance(old, float):
            values = [x if isinstance(x, float) else x.value for x in (old, new)]
            summary |= {name: values[1], f"{name}.change": values[1] - values[0]}
            continue
        if old.values.shape != new.values.shape:
            raise InputError(f"metric {name!r}: {len(new.values)} examples after {len(old.values)}; want the same")
        summary |= {f"{name}{key}": value for key, value in _paired(old, new, resamples, seed).items()}
    return summary


def _on_one_scale(values: Array, scale: Callable[[Array], Array]) -> Array:
    """Predictions (first column) that two models made on scales of their own, made comparable.

    A correlation does not see the scale, but a test that exchanges single predictions between the models would.
    """
    return np.stack([scale(values[:, 0]), values[:, 1]], axis=1)


def _standardised(x: Array) -> Array:
    spread = x.std()
    return np.asarray((x - x.mean()) / (spread if spread > 0 else 1.0))


def _paired(old: Sample, new: Sample, resamples: int, seed: int) -> dict[str, float | int]:
    a: npt.NDArray[Any] = old.values
    b: npt.NDArray[Any] = new.values
    statistic = new.statistic
    n, value, change = len(a), new.value, new.value - old.value
    from scipy.stats import rankdata  # of more than a second, which commands without scores need not spend

    if statistic is spearman:  # ranked once: resamples are then counted, not sorted
        a, b = dense_ranks(*(_on_one_scale(x, rankdata) for x in (a, b)))
    elif statistic is pearson:
        a, b = (_on_one_scale(x, _standardised) for x in (a, b))

    def resampled(drawn: Positions) -> Array:
        after = statistic(b[drawn])
        return np.stack([after, after - statistic(a[drawn])], axis=-1)

    low, high, change_low, change_high = value, value, change, change
    if resamples:
        draws = bootstrap(resampled, n, resamples, seed=seed, at_once=fitting_cache(a))
        (low, high), (change_low, change_high) = (percentile_interval(column) for column in draws.T)
    return {
        "": value,
        ".low": low,
        ".high": high,
        ".change": change,
        ".change_low": change_low,
        ".change_high": change_high,
        ".p": exchange_test(statistic, a, b, resamples, seed=seed),
        ".examples": n,
    }
