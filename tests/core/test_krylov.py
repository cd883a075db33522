"""The approximate way: its certificates are true, and where it does not converge the exact way is taken."""

import math

import numpy as np
import pytest
import torch

from specbasis import NonFiniteError, decompose
from specbasis.core.krylov import approximate_svd
from specbasis.core.svd import half_svd
from tests.helpers.matrices import (
    gaussian,
    weight_like,
)
from tests.helpers.tolerance import rounding


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (300, 300)])
@pytest.mark.parametrize("warm", [False, True])
def test_the_iteration_gives_the_leading_ranks_with_a_true_certificate(monkeypatch, shape, warm):
    W = weight_like(*shape).double()
    T = W + 0.1 * gaussian(*shape, 5) / math.sqrt(sum(shape))
    start = half_svd(W, 6).X if warm else None
    monkeypatch.setattr("specbasis.core.krylov.half_svd", lambda *a, **k: pytest.fail("fell back"))
    d = approximate_svd(T, 6, start=start)
    U, S, Vh = np.linalg.svd(T.numpy(), full_matrices=False)
    assert d.spectrum.numpy()[:6] == pytest.approx(S[:6], rel=1e-12)
    assert len(d.spectrum) == 7
    for side, X in (("left", U), ("right", Vh.T)):
        cosine = np.abs((d.vectors(side).numpy() * X[:, :6]).sum(0))
        assert (np.sqrt(1 - np.minimum(cosine, 1) ** 2) <= math.sqrt(2) * d.bound.numpy() + 1e-7).all()
        assert (1 - cosine <= 1e-9).all()
    assert (d.bound <= 1e-6).all()


def test_where_the_iteration_does_not_converge_the_exact_way_is_taken():
    W = gaussian(120, 150)  # no rank stands apart: as many steps as there are ranks
    d, exact = approximate_svd(W, 15), decompose(W, 15)
    torch.testing.assert_close(d.S, exact.S, rtol=1e-12, atol=0)
    assert torch.equal(d.spectrum, exact.spectrum[:16])
    assert torch.equal(d.bound, exact.bound)


def test_the_iteration_may_meet_a_matrix_of_small_rank_or_none():
    W = gaussian(90, 3, 1) @ gaussian(3, 120, 2)
    d = approximate_svd(W, 3)
    torch.testing.assert_close(d.svd().matrix(), W, rtol=0, atol=rounding((90, 120), float(d.S[0])))
    assert approximate_svd(torch.zeros(20, 30), 2).S.tolist() == [0, 0]
    with pytest.raises(NonFiniteError):
        approximate_svd(torch.full((20, 30), math.nan), 2)
