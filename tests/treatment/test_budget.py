"""Ranks under a budget: brute force is the oracle."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from specbasis.treatment.budget import ranks_for, ranks_within


def cases(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        matrices = rng.integers(1, 5)
        energies = [np.sort(rng.exponential(size=rng.integers(1, 5)) ** 3)[::-1] for _ in range(matrices)]
        costs = [int(cost) for cost in rng.choice([1, 2, 3, 7, 12, 19], matrices)]
        yield energies, costs, rng


def captured(energies, ranks):
    return sum(float(e[:rank].sum()) for e, rank in zip(energies, ranks, strict=True))


def price(costs, ranks):
    return sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))


def every_choice(energies):
    return product(*(range(len(e) + 1) for e in energies))


def test_no_other_choice_of_as_many_bytes_captures_more():
    for energies, costs, rng in cases(150):
        budget = int(rng.integers(0, 60))
        ranks = ranks_within(energies, costs, budget)
        assert price(costs, ranks) <= budget
        best = max(captured(energies, c) for c in every_choice(energies) if price(costs, c) <= budget)
        assert captured(energies, ranks) == pytest.approx(best, rel=1e-12, abs=0)


def test_a_share_is_reached_for_at_most_one_direction_more_than_the_least_bytes():
    for energies, costs, rng in cases(150):
        share = float(rng.uniform(0.05, 1.0))
        want = share * sum(float(e.sum()) for e in energies) * (1 - 1e-12)
        ranks = ranks_for(energies, costs, share)
        assert captured(energies, ranks) >= want * (1 - 1e-12)
        least = min(price(costs, c) for c in every_choice(energies) if captured(energies, c) >= want)
        assert price(costs, ranks) <= least + max(costs)


def test_everything_where_everything_fits_and_nothing_where_nothing_does():
    energies, costs = [np.array([4.0, 1.0]), np.array([3.0, 0.0])], [5, 6]
    assert ranks_within(energies, costs, 10**12) == [2, 1]  # a direction without energy is not stored
    assert ranks_for(energies, costs, 1.0) == [2, 1]
    assert ranks_within(energies, costs, 4) == [0, 0]
    assert ranks_within([], [], 10) == ranks_for([], [], 0.5) == []
    assert ranks_within([np.zeros(3)], [1], 9) == ranks_for([np.zeros(3)], [1], 1.0) == [0]


def test_equal_energies_of_a_real_size_are_shared_out_within_the_budget():
    energies, costs = [np.ones(1024)] * 60, [8192, 15104, 36096] * 20
    budget = 10**8
    ranks = ranks_within(energies, costs, budget)
    assert price(costs, ranks) <= budget
    assert sum(ranks) == budget // 8192  # the cheapest of what is worth the same
    assert all(rank == 0 for rank, cost in zip(ranks, costs, strict=True) if cost > 8192)
