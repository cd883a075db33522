"""Metrics against their definitions, written out."""

import numpy as np
import pytest

from specbasis.finetuning.metrics import Predictions
from specbasis.finetuning.tasks import GLUE


def test_classification_metrics_are_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200).astype(float)
    outputs = rng.normal(size=(200, 2)) + 0.7 * np.stack([1 - labels, labels], 1)
    guess = outputs.argmax(1)
    tp, tn = ((guess == 1) & (labels == 1)).sum(), ((guess == 0) & (labels == 0)).sum()
    fp, fn = ((guess == 1) & (labels == 0)).sum(), ((guess == 0) & (labels == 1)).sum()
    mrpc = Predictions.of(GLUE["mrpc"], outputs, labels).scores(GLUE["mrpc"])
    assert mrpc == pytest.approx({"accuracy": (tp + tn) / 200, "f1": 2 * tp / (2 * tp + fp + fn)})
    matthews = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert Predictions.of(GLUE["cola"], outputs, labels).scores(GLUE["cola"])["matthews"] == pytest.approx(matthews)


def test_correlations_are_their_definitions_and_their_mean_is_the_score():
    rng = np.random.default_rng(1)
    labels = rng.permutation(50).astype(float)
    outputs = (labels**3 + rng.normal(size=50)).reshape(-1, 1)
    found = Predictions.of(GLUE["stsb"], outputs, labels).scores(GLUE["stsb"])
    ranks = outputs[:, 0].argsort().argsort()
    assert found["pearson"] == pytest.approx(np.corrcoef(outputs[:, 0], labels)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(ranks, labels)[0, 1])
    assert GLUE["stsb"].score(found) == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_predictions_that_are_all_the_same_score_zero():
    labels = np.array([0.0, 1.0, 1.0])
    cola, stsb = GLUE["cola"], GLUE["stsb"]
    assert Predictions.of(cola, np.array([[0.0, 1.0]] * 3), labels).scores(cola) == {"matthews": 0.0}
    assert Predictions.of(stsb, np.ones((3, 1)), labels).scores(stsb) == {"pearson": 0.0, "spearman": 0.0}


def test_packed_predictions_come_back_with_the_same_scores():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 30).astype(float)
    said = Predictions.of(GLUE["cola"], rng.normal(size=(30, 2)), labels)
    packed = said.packed()
    assert all(isinstance(text, str) and len(text) == 30 for text in packed.values())
    assert Predictions.unpacked(packed).scores(GLUE["cola"]) == said.scores(GLUE["cola"])
    values = Predictions.of(GLUE["stsb"], rng.normal(size=(30, 1)), rng.uniform(0, 5, 30))
    back = Predictions.unpacked(values.packed())
    np.testing.assert_allclose(back.predicted, values.predicted, rtol=5e-5)
    np.testing.assert_allclose(back.labels, values.labels, rtol=5e-5)
