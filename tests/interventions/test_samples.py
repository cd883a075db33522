"""Statistics, intervals and paired tests against other people's code and exact enumeration."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from specbasis import InputError
from specbasis.core.statistics import pearson, spearman
from specbasis.finetuning.metrics import f1, matthews
from specbasis.interventions.samples import Sample, as_samples, perplexity, summarise


def test_perplexity_is_of_all_tokens_together():
    rows = np.array([[2.0, 1.0], [4.0, 7.0]])
    assert perplexity(rows) == pytest.approx(np.exp(6 / 8))


def test_the_paired_test_is_the_exact_one_up_to_resampling():
    old = np.array([1, 1, 1, 0, 1, 1, 1, 0.0])
    new = np.array([0, 0, 1, 0, 0, 1, 0, 0.0])
    observed = abs(new.mean() - old.mean())
    signs = np.array(list(product([-1, 1], repeat=8)))
    exact = np.mean(np.abs((signs * (new - old)).mean(1)) >= observed - 1e-12)
    found = summarise({"m": Sample(old[:, None])}, {"m": Sample(new[:, None])}, resamples=20000)
    assert found["m.p"] == pytest.approx(exact, abs=0.01)
    assert (found["m"], found["m.change"], found["m.examples"]) == (new.mean(), new.mean() - old.mean(), 8)


def comparable(old, new, statistic):
    scale = {pearson: stats.zscore, spearman: stats.rankdata}.get(statistic, np.asarray)
    return scale(old[:, 0]), scale(new[:, 0])


@pytest.mark.parametrize("statistic", [pearson, spearman, matthews, f1])
def test_intervals_of_correlations_are_those_of_scipy_and_the_test_is_the_exact_one(statistic):
    random = np.random.default_rng(1)
    n = 60
    label = (
        random.integers(0, 2, n).astype(float) if statistic in (matthews, f1) else random.normal(size=n).round(1)
    )
    old, new = (
        np.stack([(label + scale * random.normal(size=n) > 0.5) if statistic in (matthews, f1)
                  else (label + scale * random.normal(size=n)).round(1), label], axis=1).astype(float)
        for scale in (0.3, 1.0)
    )  # fmt: skip
    found = summarise({"m": Sample(old, statistic)}, {"m": Sample(new, statistic)}, resamples=2000)

    def of(p, t, axis=-1):  # what scipy wants; the statistics themselves are compared above
        return statistic(np.stack(np.broadcast_arrays(p, t), axis=-1))

    other = stats.bootstrap(tuple(new.T), of, paired=True, n_resamples=2000, method="percentile", rng=3)
    spread = other.standard_error
    # Ends of two intervals from 2000 resamples: one standard error of a 2.5 % quantile is 0.06 spreads.
    assert found["m.low"] == pytest.approx(other.confidence_interval.low, abs=0.35 * spread)
    assert found["m.high"] == pytest.approx(other.confidence_interval.high, abs=0.35 * spread)
    assert found["m.change_high"] < 0
    exchanged = stats.permutation_test(
        comparable(old, new, statistic), lambda p, q, axis=-1: of(q, label) - of(p, label),
        permutation_type="samples", n_resamples=2000, rng=4,
    )  # fmt: skip
    assert found["m.p"] == pytest.approx(exchanged.pvalue, abs=0.03)


@pytest.mark.parametrize("statistic", [pearson, spearman])
def test_a_correlation_that_changes_is_seen_whatever_the_scale_of_the_predictions(statistic):
    random = np.random.default_rng(2)
    label = random.normal(size=80)
    old, new = label + 0.4 * random.normal(size=80), label + 0.8 * random.normal(size=80)
    found = [
        summarise(
            {"m": Sample(np.stack([old, label], 1), statistic)},
            {"m": Sample(np.stack([a * new + b, label], 1), statistic)},
        )
        for a, b in ((1.0, 0.0), (0.1, 7.0))
    ]
    assert found[0]["m.p"] == found[1]["m.p"] < 0.01
    assert found[0]["m.change_low"] == pytest.approx(found[1]["m.change_low"])


def test_intervals_cover_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(0.3, 1, (60, 1))
        found = summarise({"m": Sample(values - 0.3)}, {"m": Sample(values)}, resamples=300, seed=seed)
        covered += found["m.low"] <= 0.3 <= found["m.high"]
        # The change is the same for every example: paired intervals see that.
        assert found["m.change_high"] - found["m.change_low"] < 1e-9
    assert 0.88 <= covered / 200 <= 0.99


def test_no_change_has_no_evidence():
    sample = {"m": Sample(np.random.default_rng(0).normal(size=(40, 2)), pearson), "plain": 0.5}
    found = summarise(sample, sample, resamples=200)
    assert found["m.p"] == 1
    assert found["m.change"] == found["m.change_low"] == found["m.change_high"] == found["plain.change"] == 0
    assert "plain.p" not in found


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"m": float("nan")}, "metric 'm': 1 of 1 values of the evaluator are NaN or Inf"),
        ({"m": np.array([1.0, np.inf, 2.0])}, "1 of 3 values"),
        ({}, "want a mapping"),
        (0.5, "returned float; want a mapping"),
        ({"m": np.zeros((0, 2))}, "want one row an example"),
    ],
)
def test_what_an_evaluator_may_not_return(returned, message):
    with pytest.raises(InputError, match=message):
        as_samples(returned)


def test_other_metrics_or_examples_after_the_edit_are_told():
    one, two = Sample(np.ones((3, 1))), Sample(np.ones((4, 1)))
    with pytest.raises(InputError, match="4 examples after 3"):
        summarise({"m": one}, {"m": two})
    with pytest.raises(InputError, match="want equal names"):
        summarise({"m": one}, {"n": one})
