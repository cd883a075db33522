"""Metrics of predictions against labels, in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from specbasis.finetune.tasks import Task

Array = npt.NDArray[np.float64]


def scores(task: Task, outputs: Array, labels: Array) -> dict[str, float]:
    """The task's official metrics.

    Args:
        task: what is scored.
        outputs: logits [example, class], or predictions [example] or [example, 1] for regression.
        labels: index of the class, or the value, of each example.

    Returns:
        A value in [-1, 1] for each of ``task.metrics``; a correlation of constant predictions is 0, as scikit-learn
        has it for Matthews'.
    """
    predictions = outputs.reshape(len(labels)) if task.regression else outputs.argmax(-1)
    return {name: METRICS[name](predictions, labels) for name in task.metrics}


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
