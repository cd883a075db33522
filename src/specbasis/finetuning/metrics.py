"""Metrics of predictions against labels, in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from specbasis.finetuning.tasks import Task

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said of each example, beside what is so; both in the order of the examples.

    Attributes:
        predicted: index of the class, or the value.
        labels: likewise.
    """

    predicted: Array
    labels: Array

    @classmethod
    def of(cls, task: Task, outputs: Array, labels: Array) -> Predictions:
        """From logits [example, class], or values [example] or [example, 1] for regression."""
        found = outputs.reshape(len(labels)) if task.regression else outputs.argmax(-1)
        return cls(np.asarray(found, dtype=np.float64), np.asarray(labels, dtype=np.float64))

    def take(self, order: Sequence[int]) -> Predictions:
        """Those of some examples, in this order."""
        return Predictions(self.predicted[order], self.labels[order])

    def scores(self, task: Task) -> dict[str, float]:
        """The task's official metrics, each in [-1, 1].

        A correlation of constant predictions is 0, as scikit-learn has it for Matthews'.
        """
        return {name: METRICS[name](self.predicted, self.labels) for name in task.metrics}

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


def _accuracy(predictions: Array, labels: Array) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def _matthews(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: Array, labels: Array) -> float:
    from scipy.stats import pearsonr

    return (
        0.0 if np.ptp(predictions) == 0 or np.ptp(labels) == 0 else float(pearsonr(predictions, labels).statistic)
    )


def _spearman(predictions: Array, labels: Array) -> float:
    from scipy.stats import spearmanr

    return (
        0.0 if np.ptp(predictions) == 0 or np.ptp(labels) == 0 else float(spearmanr(predictions, labels).statistic)
    )


METRICS: Mapping[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
