"""GLUE's metrics of predictions against labels, in [-1, 1], and the predictions that they are taken of.

Each metric is written once, over the last two axes of an array (…, examples, 2) of predictions and labels: one dev
set, or thousands of resamples of it. scikit-learn and scipy score one set a call, which takes a hundred times as
long for resamples; they are what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specbasis.finetuning.tasks import Task

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From (…, examples, columns) to (…): it is given many resamples at once."""


def accuracy(values: Array) -> Array:
    """Share of the examples whose two columns, prediction and label, are equal."""
    return np.asarray((values[..., 0] == values[..., 1]).mean(-1))


def f1(values: Array) -> Array:
    """F1 of the class 1, from prediction and label; 0 where neither ever is."""
    p, t = values[..., 0] == 1, values[..., 1] == 1
    total = p.sum(-1) + t.sum(-1)
    return np.asarray(np.divide(2 * (p & t).sum(-1), total, out=np.zeros(total.shape), where=total > 0))


def matthews(values: Array) -> Array:
    """Matthews' correlation of prediction and label; for two classes the correlation of the two columns."""
    return pearson(values)


def pearson(values: Array) -> Array:
    """Correlation of the two columns, prediction and label; 0 where one is constant, as Matthews' is."""
    centred = values - values.mean(-2, keepdims=True)
    a, b = centred[..., 0], centred[..., 1]
    norms = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    # The mean of equal numbers is not always that number: a constant column need not have norm 0.
    varies = (np.ptp(values, axis=-2) > 0).all(-1) & (norms > 0)
    return np.asarray(np.divide((a * b).sum(-1), norms, out=np.zeros_like(norms), where=varies))


def spearman(values: Array) -> Array:
    """Rank correlation of the two columns, tied values at their mean rank."""
    codes = values.astype(np.int64) if np.issubdtype(values.dtype, np.integer) else dense_ranks(values)[0]
    return pearson(np.stack([_mean_ranks(codes[..., column]) for column in range(2)], axis=-1))


def dense_ranks(*samples: Array) -> list[npt.NDArray[np.int64]]:
    """Each column's values as whole numbers from 0 in the same order, the same ones in all samples.

    `spearman` takes them as ranks: resamples of ranked values are counted, and nothing is sorted.
    """
    flat = np.concatenate([sample.reshape(-1, sample.shape[-1]) for sample in samples])
    codes = np.stack([np.unique(column, return_inverse=True)[1] for column in flat.T], axis=1)
    ends = np.cumsum([sample.size // sample.shape[-1] for sample in samples])[:-1]
    return [part.reshape(sample.shape) for part, sample in zip(np.split(codes, ends), samples, strict=True)]


def _mean_ranks(codes: npt.NDArray[np.int64]) -> Array:
    """Ranks along the last axis, equal values at the mean of theirs. Dense ranks are counted: nothing is sorted."""
    flat = codes.reshape(-1, codes.shape[-1])
    kinds = int(flat.max()) + 1
    places = flat + kinds * np.arange(len(flat))[:, None]
    counts = np.bincount(places.ravel(), minlength=len(flat) * kinds).reshape(len(flat), kinds)
    ranks: Array = (counts.cumsum(1) - (counts - 1) / 2).ravel()[places]
    return ranks.reshape(codes.shape)


@dataclass(frozen=True)
class Metric:
    """A metric of a task.

    Attributes:
        title: as figures and model cards write it.
        statistic: the metric, of predictions and labels.
    """

    title: str
    statistic: Statistic


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", accuracy),
    "f1": Metric("F1", f1),
    "matthews": Metric("Matthews' correlation", matthews),
    "pearson": Metric("Pearson's r", pearson),
    "spearman": Metric("Spearman's ρ", spearman),
}
"""By the names that tasks have for them. A metric that is added here can be named by any `Task`."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicted for each example, beside the labels; both in the order of the examples.

    Attributes:
        predicted: index of the class, or the value.
        labels: likewise.
    """

    predicted: Array
    labels: Array

    @classmethod
    def of(cls, task: Task, outputs: Array, labels: Array) -> Predictions:
        """From logits [example, class], or values [example] or [example, 1] for regression."""
        predicted = outputs.reshape(len(labels)) if task.regression else outputs.argmax(-1)
        return cls(np.asarray(predicted, dtype=np.float64), np.asarray(labels, dtype=np.float64))

    @property
    def columns(self) -> Array:
        """Predictions and labels side by side (examples, 2), as metrics take them."""
        return np.stack([self.predicted, self.labels], axis=1)

    def take(self, order: Sequence[int]) -> Predictions:
        """Those of some examples, in this order."""
        return Predictions(self.predicted[order], self.labels[order])

    def scores(self, task: Task) -> dict[str, float]:
        """The task's official metrics; a correlation of constant predictions is 0."""
        return {name: float(METRICS[name].statistic(self.columns)) for name in task.metrics}

    def packed(self) -> dict[str, str | list[float]]:
        """For a row of JSON: a digit an example, or for values a list of numbers (five digits)."""
        return {"predicted": _packed(self.predicted), "labels": _packed(self.labels)}

    @classmethod
    def unpacked(cls, row: Mapping[str, Any]) -> Predictions:
        """The inverse of `packed`."""
        return cls(*(np.array([float(value) for value in row[name]]) for name in ("predicted", "labels")))


def _packed(values: Array) -> str | list[float]:
    if set(values.tolist()) <= set(range(10)):
        return "".join(f"{value:.0f}" for value in values)
    return [float(f"{value:.5g}") for value in values]
