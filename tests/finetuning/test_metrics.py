"""Metrics against their definitions, written out, and against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from specbasis.core.statistics import pearson, spearman
from specbasis.finetuning.card import model_card
from specbasis.finetuning.metrics import METRICS, Metric, Predictions, accuracy, f1, matthews
from specbasis.finetuning.tasks import GLUE, Task
from specbasis.paper.differences import resampled

RNG = np.random.default_rng(0)
CLASSES = RNG.integers(0, 2, (5, 40, 2)).astype(float)
NUMBERS = RNG.normal(size=(5, 40, 2)).round(1)  # with ties


@pytest.mark.parametrize(
    ("statistic", "oracle", "values"),
    [
        (accuracy, lambda p, t: np.mean(p == t), CLASSES),
        (f1, lambda p, t: f1_score(t, p), CLASSES),
        (matthews, lambda p, t: matthews_corrcoef(t, p), CLASSES),
        (pearson, lambda p, t: stats.pearsonr(p, t).statistic, NUMBERS),
        (spearman, lambda p, t: stats.spearmanr(p, t).statistic, NUMBERS),
    ],
)
def test_statistics_take_many_resamples_at_once(statistic, oracle, values):
    expected = [oracle(each[:, 0], each[:, 1]) for each in values]
    np.testing.assert_allclose(statistic(values), expected, atol=1e-12)
    np.testing.assert_allclose(statistic(values[0]), expected[0], atol=1e-12)


def test_constant_predictions_have_no_correlation():
    constant = np.stack([np.ones(9), np.arange(9) % 2], axis=1)
    assert pearson(constant) == matthews(constant) == spearman(constant) == f1(constant * 0) == 0


def test_a_constant_whose_mean_is_rounded_has_no_correlation_either():
    constant = np.stack([np.full(3, 0.1), np.arange(3.0)], axis=1)
    assert constant[:, 0].mean() != 0.1
    assert pearson(constant) == 0


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


def test_a_metric_that_is_added_to_the_table_is_scored_resampled_and_shown(monkeypatch):
    def recall(values):
        positive = values[..., 1] == 1
        return ((values[..., 0] == 1) & positive).sum(-1) / positive.sum(-1)

    monkeypatch.setitem(METRICS, "recall", Metric("share of the positives", recall))
    task = Task("own", "Own", ("recall",), ("no", "yes"))
    labels = np.array([1.0, 1.0, 1.0, 0.0] * 10)
    predictions = Predictions(np.array([1.0, 0.0, 1.0, 1.0] * 10), labels)
    scores = predictions.scores(task)
    assert scores == {"recall": 20 / 30}
    assert task.score(scores) == 20 / 30
    assert resampled(task, predictions, resamples=8).shape == (8,)
    config = {
        "method": "lora", "base": "b", "seed": 1,
        "protocol": {
            "epochs": 1, "learning_rate": 0.1, "warmup": 0, "batch_size": 8, "max_length": 9, "weight_decay": 0,
            "precision": "float32",
        },
    }  # fmt: skip
    forgetting = {"definition": "", "reason": "it is a test"}
    parameters = {"adapter": 1, "head": 1, "total": 2}
    run = {"dev": scores, "parameters": parameters, "train_examples": 4, "forgetting": forgetting, "notes": []}
    card = model_card(config, run, task)
    assert "| set | share of the positives |" in card
    assert "| dev | 0.6667 |" in card
    hostile = Task("own", 'A: "b"\n# c', ("recall",), ("no", "yes"))
    config["base"] = "/home/someone/models/a: b\n- c #d"
    run["notes"] = ["two\nlines of /home/someone/data/file.csv"]
    card = model_card(config, run, hostile)
    yaml = pytest.importorskip("yaml")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "specbasis",
        "tags": ["specbasis", "lora"], "metrics": ["recall"],
    }  # fmt: skip
    assert body.count("\n# ") == 1
    assert "- two lines of …/data/file.csv\n" in body
