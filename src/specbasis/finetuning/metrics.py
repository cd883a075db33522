"""GLUE's metrics of predictions against labels, in [-1, 1], and the predictions that they are taken of.

Each metric is written once, over the last two axes of an array (…, examples, 2) of predictions and labels: one dev
set, or thousands of resamples of it. scikit-learn and scipy score one set a call, which takes a hundred times as
long for resamples; they are what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specbasis.core.brief import brief
from specbasis.core.statistics import Array, Statistic, pearson, spearman
from specbasis.finetuning.tasks import Task


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


@brief
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

    def majority(self, task: Task) -> dict[str, float]:
        """The scores of predicting the most frequent label for every example: what a model must beat."""
        values, counts = np.unique(self.labels, return_counts=True)
        return Predictions(np.full(len(self.labels), values[counts.argmax()]), self.labels).scores(task)

    @property
    def is_constant(self) -> bool:
        """Whether every prediction is the same although the labels are not."""
        return len(set(self.predicted.tolist())) == 1 < len(set(self.labels.tolist()))

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
