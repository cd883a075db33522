"""How much of each matrix fits into a budget: brute force is the oracle."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from specbasis.treatment.budget import Curve, shared_out


def cases(count):
    """Curves of directions, half of them with the matrix itself as a last option, which breaks convexity."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        curves = []
        for _ in range(rng.integers(1, 5)):
            squares = np.sort(rng.exponential(size=rng.integers(1, 5)) ** 3)[::-1]
            cost = int(rng.choice([1, 2, 3, 7, 12, 19]))
            whole = cost * (len(squares) + 0.5) if rng.random() < 0.5 else None
            most = int(rng.integers(1, len(squares) + 1))
            curves.append(Curve.of_directions(squares, cost, most, whole))
        yield curves, rng


def lost(curves, choice):
    return sum(float(curve.lost[option]) for curve, option in zip(curves, choice, strict=True))


def price(curves, choice):
    return sum(float(curve.bytes[option]) for curve, option in zip(curves, choice, strict=True))


def every_choice(curves):
    return product(*(range(len(curve.lost)) for curve in curves))


def test_no_other_choice_of_as_many_bytes_loses_less():
    for curves, rng in cases(150):
        budget = int(rng.integers(0, 60))
        choice = shared_out(curves, budget)
        assert price(curves, choice) <= budget
        best = min(lost(curves, c) for c in every_choice(curves) if price(curves, c) <= budget)
        assert lost(curves, choice) == pytest.approx(best, rel=1e-12, abs=1e-9)


def test_a_share_is_reached_and_no_other_choice_of_its_bytes_keeps_more():
    for curves, rng in cases(150):
        total = sum(curve.total for curve in curves)
        most = 1 - min(lost(curves, c) for c in every_choice(curves)) / total
        share = most * float(rng.uniform(0.05, 1.0))
        choice = shared_out(curves, None, share)
        assert lost(curves, choice) <= (1 - share) * total * (1 + 1e-12)
        size = price(curves, choice)
        rivals = [lost(curves, c) for c in every_choice(curves) if price(curves, c) <= size]
        assert lost(curves, choice) <= min(rivals) * (1 + 1e-12) + 1e-9


def test_a_share_that_is_more_than_there_is_gets_all():
    curve = Curve.of_directions(np.array([4.0, 2.0, 1.0]), 5, most=2)
    assert shared_out([curve], None, 1.0) == [2]


def test_everything_where_everything_fits_and_nothing_where_nothing_does():
    curves = [Curve.of_directions(np.array(squares), cost) for squares, cost in (([4.0, 1.0], 5), ([3.0, 0.0], 6))]
    assert shared_out(curves, 10**12) == [2, 1]  # a direction without energy is not stored
    assert shared_out(curves, None, 1.0) == [2, 1]
    assert shared_out(curves, 4) == [0, 0]
    assert shared_out([], 10) == shared_out([], None, 0.5) == []
    none = Curve.of_directions(np.zeros(3), 1)
    assert shared_out([none], 9) == shared_out([none], None, 1.0) == [0]


def test_equal_energies_of_a_real_size_are_shared_out_within_the_budget():
    costs, budget = [8192, 15104, 36096] * 20, 10**8
    curves = [Curve.of_directions(np.ones(1024), cost) for cost in costs]
    choice = shared_out(curves, budget)
    assert price(curves, choice) <= budget
    assert sum(choice) == budget // 8192  # the cheapest of what is worth the same
    assert all(rank == 0 for rank, cost in zip(choice, costs, strict=True) if cost > 8192)


def test_of_a_real_size_less_than_one_direction_is_lost_against_the_bound():
    rng = np.random.default_rng(1)
    curves = [
        Curve.of_directions(np.sort(rng.exponential(size=384) ** 3)[::-1], cost)
        for cost in [3072, 7680, 123624] * 12
    ]
    for budget in (10**6, 5 * 10**6, 3 * 10**7):
        choice = shared_out(curves, budget)
        ratios = np.concatenate([-np.diff(c.lost) / c.bytes[1] for c in curves])
        costs = np.concatenate([np.diff(c.bytes) for c in curves])
        order = np.argsort(-ratios)
        filled = np.cumsum(costs[order])
        whole = int(np.searchsorted(filled, budget, side="right"))  # Dantzig's bound: the last one in part
        gained = (ratios * costs)[order]
        bound = gained[:whole].sum() + ratios[order[whole]] * (budget - filled[whole - 1])
        kept = sum(c.total for c in curves) - lost(curves, choice)
        assert price(curves, choice) <= budget
        assert bound - gained[whole] < kept <= bound * (1 + 1e-12)
