"""Products of low rank: never formed, and decomposed as if they were."""

import math

import mpmath
import numpy as np
import pytest
import torch

from specbasis import InputError, NonFiniteError, decompose, low_rank_svd
from tests.helpers.exact import sines
from tests.helpers.matrices import (
    gaussian,
    log_spectrum,
    off_orthonormal,
    with_spectrum,
)
from tests.helpers.tolerance import rounding


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [torch.ones(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.complex64)])
def test_a_product_needs_floating_factors(bad):
    with pytest.raises(InputError, match="delta: got"):
        low_rank_svd(bad, torch.ones(2, 3), name="delta")
    with pytest.raises(InputError, match="delta: got"):
        low_rank_svd(torch.ones(3, 4), bad, name="delta")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_a_product_of_short_floats_is_exact(dtype):
    B, A = gaussian(7, 3).to(dtype), gaussian(3, 5, 1).to(dtype)
    short, wide = low_rank_svd(B, A), low_rank_svd(B.double(), A.double())
    assert torch.equal(short.S, wide.S)
    assert torch.equal(short.U, wide.U)


@pytest.mark.parametrize(("out", "r", "into"), [(12, 3, 9), (9, 3, 9), (4, 6, 9), (9, 6, 4), (1, 1, 5), (5, 1, 1)])
def test_a_product_has_the_decomposition_of_its_dense_form(out, r, into):
    B, A = gaussian(out, r), gaussian(r, into, 1)
    d = low_rank_svd(B, A)
    k = min(out, r, into)
    assert d.U.shape == (out, k)
    assert d.Vh.shape == (k, into)
    dense = decompose(B @ A)
    rounded = rounding((out, r, into), float(B.norm() * A.norm()))
    assert ((d.S - dense.S[:k]).abs() <= d.spectrum_error[:k] + dense.spectrum_error[:k] + rounded).all()
    assert d.spectrum[k:].tolist() == [0.0] * (min(out, into) - k)
    assert float(dense.S[k:].sum()) <= rounded
    assert float((d.matrix() - B @ A).norm()) <= rounded
    assert d.gap.tolist() == pytest.approx(dense.gap[:k].tolist(), abs=2 * rounded)
    sine = (d.U - dense.U[:, :k] * (d.U * dense.U[:, :k]).sum(dim=0)).norm(dim=0)
    assert (sine <= math.sqrt(2) * (d.bound + dense.bound[:k] + rounded / d.gap)).all()


@pytest.mark.parametrize("smallest", [1e-2, 1e-6, 1e-12])
def test_the_bounds_of_a_product_hold_in_exact_arithmetic(smallest):
    B = with_spectrum(log_spectrum(smallest, 3), 6, 3, 1)
    A = with_spectrum([1.0, 0.7, 1e-3], 3, 5, 2)
    d = low_rank_svd(B, A)
    with mpmath.workdps(45):
        U, S, Vh = mpmath.svd_r(mpmath.matrix(B.tolist()) * mpmath.matrix(A.tolist()))
        errors = [float(abs(mpmath.mpf(float(s)) - e)) for s, e in zip(d.S, list(S)[:3], strict=True)]
    assert (np.array(errors) <= d.spectrum_error.numpy()[:3]).all()
    left, right = sines(d.U, U[:, :3]), sines(d.Vh.mT, Vh.T[:, :3])
    assert (np.hypot(left, right) <= np.sqrt(2) * d.bound.numpy()).all()


def test_a_product_is_never_formed():
    d = low_rank_svd(gaussian(40_000, 2), gaussian(2, 50_000, 1))  # dense: 16 GB in float64
    assert off_orthonormal(d.U) <= rounding(d.U.shape)
    assert float(d.bound.max()) < 1e-9


def test_an_update_that_has_not_moved_yet():
    d = low_rank_svd(torch.zeros(7, 2), gaussian(2, 5))
    assert (d.S == 0).all()
    assert (d.bound == math.inf).all()
    assert off_orthonormal(d.U) <= rounding(d.U.shape)
    assert off_orthonormal(d.Vh.mT) <= rounding(d.Vh.shape)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("B", "A"),
    [
        (torch.ones(4, 2), torch.ones(3, 5)),
        (torch.ones(4), torch.ones(4, 5)),
        (torch.ones(4, 0), torch.ones(0, 5)),
        (torch.ones(1, 4, 2), torch.ones(2, 5)),
    ],
)
def test_factors_that_do_not_fit_are_refused(B, A):
    with pytest.raises(InputError, match=r"^query\.lora: got shapes .*; want \(out, r\) and \(r, in\)"):
        low_rank_svd(B, A, name="query.lora")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_entry_in_a_factor_is_refused(value):
    B, A = gaussian(4, 2), gaussian(2, 5)
    with pytest.raises(NonFiniteError, match=r"^query\.lora: "):
        low_rank_svd(B * value, A, name="query.lora")
    with pytest.raises(NonFiniteError, match=r"^query\.lora: "):
        low_rank_svd(B, A * value, name="query.lora")
