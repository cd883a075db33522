"""The iterations: their certificates are true; without convergence the exact way is taken, or it is said."""

import math

import numpy as np
import pytest
import torch

from specbasis import NonFiniteError, decompose
from specbasis.core import krylov
from specbasis.core.krylov import QUICK, approximate_svd, quick_cost, quick_svd
from specbasis.core.spectrum import effective_rank, explained_variance
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


def sines(d, W, k):
    """Sines between the computed vectors and numpy's, the larger of both sides, and numpy's values."""
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    cosine = [np.abs((d.vectors(side).numpy() * X[:, :k]).sum(0)) for side, X in (("left", U), ("right", Vh.T))]
    return np.sqrt(1 - np.minimum(np.minimum(*cosine), 1) ** 2), S


def weights(shape, kind, seed=0):
    """Spectra that stand apart, that do not, that end early, and that reach to zero."""
    if kind == "bulk":
        return gaussian(*shape, seed)
    if kind == "few":
        return gaussian(shape[0], 9, seed) @ gaussian(9, shape[1], seed + 1)
    scale = {"spikes": 1.0, "tiny": 1e-30, "huge": 1e30}[kind]
    return scale * weight_like(*shape, seed=seed, outliers=12).double()


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [
        *(((600, 900), kind, torch.float64) for kind in ("spikes", "bulk", "few", "tiny", "huge")),
        *(((900, 600), "spikes", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        ((900, 600), "few", torch.float32),
        ((900, 600), "tiny", torch.bfloat16),
        ((650, 650), "bulk", torch.bfloat16),
        ((650, 650), "huge", torch.float32),
    ],
)
def test_a_quick_certificate_is_true_of_every_rank(shape, kind, dtype):
    W = weights(shape, kind).to(dtype)
    assert quick_cost(*sorted(shape), 16) is not None  # the iteration, not the exact way
    d = quick_svd(W, 16)
    off, S = sines(d, W, 16)
    resolved = (d.bound <= QUICK).numpy()
    assert (off <= math.sqrt(2) * d.bound.numpy() + 1e-7)[resolved].all()
    assert (np.abs(d.spectrum.numpy()[:16] - S[:16]) <= d.spectrum_error.numpy()[:16] * 1.0001 + 1e-13 * S[0]).all()
    if kind == "few":
        assert resolved.tolist() == [True] * 9 + [False] * 7
    elif kind != "bulk":
        assert resolved.sum() >= 9
    for side in ("left", "right"):
        X = d.vectors(side)
        torch.testing.assert_close(X.mT @ X, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_quick_decomposition_of_a_difference_starts_from_nothing_and_of_tuned_from_base(seed):
    W = weights((620, 900), "spikes", seed).float()
    T = (W + 0.02 * weights((620, 900), "spikes", seed + 50)).float()
    base = quick_svd(W, 16)
    tuned, delta = quick_svd(T, 16, start=base.X), quick_svd(T, 16, minus=W)
    for d, X in ((tuned, T), (delta, T.double() - W.double())):
        off, _ = sines(d, X, 16)
        resolved = (d.bound <= QUICK).numpy()
        assert resolved.sum() >= 10
        assert (off <= math.sqrt(2) * d.bound.numpy() + 1e-7)[resolved].all()


def test_equal_values_are_never_resolved():
    U, V = (torch.linalg.qr(gaussian(n, n, seed))[0] for n, seed in ((620, 1), (800, 2)))
    S = torch.cat(
        [torch.tensor([5.0, 4.0, 4.0, 4.0, 3.0], dtype=torch.float64), torch.linspace(1, 0, 615).double()]
    )
    d = quick_svd((U * S) @ V[:, :620].mT, 8)
    assert (d.bound <= QUICK).tolist()[:5] == [True, False, False, False, True]


def test_what_is_not_worth_an_iteration_is_taken_exactly_and_told_alike():
    W = gaussian(90, 120)
    assert quick_cost(90, 120, 16) is None
    d, exact = quick_svd(W, 16), decompose(W, 16)
    torch.testing.assert_close(d.S, exact.S, rtol=1e-12, atol=0)
    assert len(d.spectrum) == 17
    assert d.density.effective_rank(float(W.norm())) == (pytest.approx(effective_rank(exact.spectrum)), 0.0)
    assert quick_svd(torch.zeros(20, 30), 2).S.tolist() == [0, 0]
    with pytest.raises(NonFiniteError):
        quick_svd(torch.full((700, 800), math.nan), 2)


@pytest.mark.parametrize("kind", ["spikes", "bulk"])
@pytest.mark.parametrize("shape", [(600, 900), (650, 650), (1200, 600)])
def test_the_effective_rank_lies_in_its_interval(shape, kind, monkeypatch):
    W = weights(shape, kind, 7)
    d, whole = quick_svd(W, 16), half_svd(W, 16).spectrum
    value, error = d.density.effective_rank(float(W.norm()))
    assert abs(value - effective_rank(whole)) <= 2 * error  # four standard errors: one seed is one draw
    assert error <= 0.1 * value
    share = explained_variance(d.spectrum, float(W.norm()))[15]
    assert float(share) == pytest.approx(float(explained_variance(whole)[15]), rel=2e-2)
    monkeypatch.setattr(krylov, "STEPS", 1)
    assert quick_svd(W, 16).density.effective_rank(float(W.norm()))[1] == math.inf  # nothing tells its error
