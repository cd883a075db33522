"""Angles between subspaces, against scipy, closed forms and prescribed rotations."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, strategies as st

from specbasis.core.subspace import chance_alignment, nested_overlap, principal_angles, subspace_overlap
from tests.helpers.matrices import gaussian, orthonormal, rotated
from tests.helpers.tolerance import rounding

ANGLES = [0.0, 1e-14, 1e-9, 1e-4, 0.1, math.pi / 4, 1.2, math.pi / 2 - 1e-6, math.pi / 2]


@st.composite
def pairs(draw):
    """Two subspaces of equal dimension, independent or near each other."""
    k = draw(st.integers(1, 6))
    d = k + draw(st.integers(0, 10))
    U = orthonormal(d, k, draw(st.integers(0, 99)))
    if draw(st.booleans()):
        return U, orthonormal(d, k, draw(st.integers(100, 199)))
    noise = 10.0 ** draw(st.integers(-15, 0)) * gaussian(d, k, draw(st.integers(100, 199)))
    return U, torch.linalg.qr(U + noise)[0]


def test_prescribed_angles_come_back_to_the_last_digit():
    U = orthonormal(40, len(ANGLES), 3)
    angles = principal_angles(U, rotated(U, ANGLES))
    assert angles.numpy() == pytest.approx(np.array(ANGLES), abs=rounding(U.shape))


@given(pairs())
def test_principal_angles_agree_with_scipy(pair):
    U, V = pair
    theirs = scipy.linalg.subspace_angles(U.numpy(), V.numpy())[::-1]
    angles = principal_angles(U, V)
    # scipy takes some arc cosines near 1 and arc sines near 1, which costs it half of the digits there.
    assert angles.numpy() == pytest.approx(theirs, abs=math.sqrt(2 * rounding(U.shape)))
    assert angles.cos().numpy() == pytest.approx(np.linalg.svd(U.mT @ V)[1], abs=rounding(U.shape))
    assert (angles[1:] >= angles[:-1] - rounding(U.shape)).all()
    assert float(angles.min()) >= 0
    assert float(angles.max()) <= math.pi / 2
    assert principal_angles(V, U).numpy() == pytest.approx(angles.numpy(), abs=rounding(U.shape))


@given(pairs())
def test_the_overlap_is_the_mean_squared_cosine(pair):
    U, V = pair
    k = U.shape[1]
    naive = sum(float(U[:, i] @ V[:, j]) ** 2 for i in range(k) for j in range(k)) / k
    overlap = subspace_overlap(U, V)
    assert overlap == pytest.approx(naive, abs=rounding(U.shape))
    assert overlap == pytest.approx(float(principal_angles(U, V).cos().square().mean()), abs=rounding(U.shape))


@given(pairs(), st.integers(0, 99))
def test_rotations_inside_the_subspaces_change_nothing(pair, seed):
    U, V = pair
    k = U.shape[1]
    turned_U, turned_V = U @ orthonormal(k, k, seed), V @ orthonormal(k, k, seed + 1)
    assert subspace_overlap(turned_U, turned_V) == pytest.approx(subspace_overlap(U, V), abs=rounding(U.shape))
    assert principal_angles(turned_U, turned_V).numpy() == pytest.approx(
        principal_angles(U, V).numpy(), abs=2 * rounding(U.shape)
    )


@given(pairs())
def test_nested_overlaps_are_the_overlaps_of_the_leading_vectors(pair):
    U, V = pair
    naive = [subspace_overlap(U[:, :j], V[:, :j]) for j in range(1, U.shape[1] + 1)]
    assert nested_overlap(U.mT @ V).numpy() == pytest.approx(np.array(naive), abs=rounding(U.shape))


def test_equal_orthogonal_and_complete_subspaces():
    Q = orthonormal(12, 12)
    assert subspace_overlap(Q[:, :4], Q[:, :4]) == pytest.approx(1, abs=rounding(Q.shape))
    assert subspace_overlap(Q[:, :4], Q[:, 4:8]) == pytest.approx(0, abs=rounding(Q.shape) ** 2)
    assert subspace_overlap(Q, orthonormal(12, 12, 1)) == pytest.approx(1, abs=rounding(Q.shape))
    assert principal_angles(Q[:, :4], Q[:, 4:8]).tolist() == pytest.approx([math.pi / 2] * 4, abs=rounding(Q.shape))
    assert float(principal_angles(Q, orthonormal(12, 12, 1)).max()) <= rounding(Q.shape)


def test_planes_that_share_a_line_share_it_to_rounding():
    Q = orthonormal(3, 3, 4)
    angles = principal_angles(Q[:, :2], Q[:, 1:] @ orthonormal(2, 2, 5))
    assert angles.tolist() == pytest.approx([0, math.pi / 2], abs=rounding(Q.shape))


def test_independent_subspaces_overlap_by_their_share_of_dimensions():
    d, k, n = 40, 8, 200
    overlaps = [subspace_overlap(orthonormal(d, k, i), orthonormal(d, k, 1000 + i)) for i in range(n)]
    error = np.std(overlaps) / math.sqrt(n)
    assert np.mean(overlaps) == pytest.approx(k / d, abs=4 * error)


@pytest.mark.parametrize("d", [2, 3, 7, 64, 768, 50_000])
def test_the_chance_level_is_the_mean_of_its_distribution(d):
    """cos² ~ Beta(1/2, (d − 1)/2); the mean of its root, integrated as cos θ weighted by sin^(d−2) θ."""
    law = scipy.stats.beta(0.5, (d - 1) / 2)
    # x = t⁴ takes the singularity of the density at 0 away.
    top = min(1.0, 1600 / d) ** 0.25
    mean, error = scipy.integrate.quad(lambda t: t**2 * law.pdf(t**4) * 4 * t**3, 0, top, epsabs=1e-13, limit=200)
    assert chance_alignment(d) == pytest.approx(mean, abs=10 * error + 1e-9 * mean)


def test_the_chance_level_in_closed_form_and_in_the_limit():
    assert chance_alignment(1) == pytest.approx(1, rel=1e-15)
    assert chance_alignment(2) == pytest.approx(2 / math.pi, rel=1e-15)
    assert chance_alignment(3) == pytest.approx(0.5, rel=1e-15)
    for d in (1_000, 100_000):
        # Γ(d/2)/Γ((d+1)/2) = √(2/d) (1 + 1/(4d) + O(d⁻²)); lgamma itself is right to eps·d·log d.
        assert chance_alignment(d) == pytest.approx(
            math.sqrt(2 / (math.pi * d)) * (1 + 1 / (4 * d)), rel=1 / d**2 + 1e-15 * d * math.log(d)
        )


def test_the_chance_level_is_what_random_vectors_give():
    X, Y = gaussian(50, 20_000, 1), gaussian(50, 20_000, 2)
    cosines = ((X * Y).sum(dim=0) / (X.norm(dim=0) * Y.norm(dim=0))).abs()
    error = float(cosines.std()) / math.sqrt(cosines.numel())
    assert float(cosines.mean()) == pytest.approx(chance_alignment(50), abs=4 * error)
