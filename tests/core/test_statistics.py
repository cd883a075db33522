"""Statistics against scipy's, exact enumeration and published figures."""

import math

import numpy as np
import pytest
from scipy import stats

from specbasis.core.statistics import (
    adjusted,
    bootstrap,
    cluster_bootstrap,
    correlation,
    correlation_test,
    detectable,
    exchange_test,
    finite_median,
    paired_t_test,
    percentile_interval,
    student_interval,
)

RANDOM = np.random.default_rng(0)
VALUES = RANDOM.normal(size=30)


@pytest.mark.parametrize("at_once", [1, 7, 500])
def test_the_bootstrap_draws_what_scipy_draws(at_once):
    draws = bootstrap(lambda at: VALUES[at].mean(-1), len(VALUES), 500, seed=3, at_once=at_once)
    other = stats.bootstrap((VALUES,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(3))
    np.testing.assert_allclose(draws, other.bootstrap_distribution)
    assert percentile_interval(draws) == pytest.approx(tuple(other.confidence_interval))


def test_clusters_of_one_are_examples_and_a_single_cluster_never_varies():
    alone = cluster_bootstrap(lambda at: VALUES[at].mean(), np.arange(len(VALUES)), 50)
    np.testing.assert_array_equal(alone, bootstrap(lambda at: VALUES[at].mean(-1), len(VALUES), 50))
    assert np.ptp(cluster_bootstrap(lambda at: VALUES[at].mean(), np.zeros(len(VALUES), int), 20)) == 0


def test_an_interval_leaves_out_what_could_not_be_computed():
    assert percentile_interval([np.nan, 1.0, 1.0]) == (1.0, 1.0)
    assert all(map(math.isnan, percentile_interval([np.nan, np.nan])))
    assert finite_median([math.nan, 1.0, math.inf, 3.0]) == 2.0
    assert math.isnan(finite_median([math.nan]))


def test_the_exchange_test_is_that_of_scipy():
    first, second = VALUES[:12, None], VALUES[12:24, None] + 0.8
    p = exchange_test(lambda values: values[..., 0].mean(-1), first, second, 4000)
    exact = stats.permutation_test(
        (second[:, 0] - first[:, 0],), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert p == pytest.approx(exact.pvalue, abs=0.03)


def test_the_paired_t_test_is_that_of_scipy_and_needs_a_spread():
    assert paired_t_test([0.1, 0.4, 0.2]) == pytest.approx(stats.ttest_rel([0.1, 0.4, 0.2], [0.0] * 3).pvalue)
    assert paired_t_test([0.1]) is paired_t_test([0.1, 0.1]) is None


@pytest.mark.parametrize(("method", "oracle"), [("spearman", stats.spearmanr), ("pearson", stats.pearsonr)])
def test_correlations_and_their_test_are_those_of_scipy(method, oracle):
    x = np.arange(7.0)
    y = np.array([0.0, 2.0, 1.0, 3.0, 3.0, 6.0, 4.0])
    assert correlation(x, y, method) == pytest.approx(oracle(x, y).statistic)
    exact = stats.permutation_test(
        (x,), lambda a: oracle(a, y).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert correlation_test(x, y, 4999, method) == pytest.approx(exact.pvalue, abs=0.01)
    constant = np.ones(7)
    assert math.isnan(correlation(x, constant, method))
    assert math.isnan(correlation_test(x, constant, 99, method))


@pytest.mark.parametrize("method", ["bh", "by"])
def test_a_family_leaves_out_tests_that_were_not_done(method):
    p = [0.01, math.nan, 0.04, 0.03]
    expected = stats.false_discovery_control([0.01, 0.04, 0.03], method=method)
    np.testing.assert_allclose(adjusted(p, method), [expected[0], math.nan, *expected[1:]])
    assert np.isnan(adjusted([math.nan], method)).all()


def test_intervals_are_students():
    values = [0.1, 0.4, 0.25]
    want = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert student_interval(values) == pytest.approx((np.mean(values), *want))
    assert math.isnan(student_interval([1.0])[1])


def test_power_is_that_of_the_exact_test() -> None:
    """The published sample size for |r| = 0.5 at 80 % and 5 % is 29 (Cohen 1988), by Fisher's transformation."""
    assert detectable(29) == pytest.approx(0.5, abs=0.01)
    assert math.isnan(detectable(3))
