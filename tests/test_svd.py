"""The decomposition against gesdd, gesvd and 45-digit arithmetic, and what it promises about its own error."""

import math

import numpy as np
import pytest
import torch
from helpers.exact import exact_svd, sines, value_errors
from helpers.matrices import gaussian, hilbert, log_spectrum, off_orthonormal, with_spectrum
from helpers.tolerance import rounding

from specbasis import InputError, NonFiniteError, decompose, low_rank_svd
from specbasis.svd import DEFLATE

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("column", [0, -1])
def test_a_bad_entry_is_found_in_every_column_block(monkeypatch, value, transposed, column):
    monkeypatch.setattr("specbasis.svd._BLOCK_BYTES", 8 * 4 * 3)  # blocks of 3 columns
    W = gaussian(4, 20).float()
    W[1, column] = value
    with pytest.raises(NonFiniteError, match=r"layer\.7: 1 of 80 entries"):
        decompose(W.mT if transposed else W, name="layer.7")


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1e-200, 1e200, 1e308, 1.5e308])
def test_neither_huge_nor_tiny_entries_overflow(value):
    d = decompose(value * torch.eye(3, dtype=torch.float64)[:2])
    assert d.S.tolist() == [value, value]
    assert float((d.U @ d.U.mT - torch.eye(2)).abs().max()) <= 4 * EPS


def test_a_parameter_is_decomposed_outside_of_its_graph(recwarn):
    W = torch.nn.Parameter(gaussian(4, 5))
    d = decompose(W)
    product = low_rank_svd(torch.nn.Parameter(gaussian(6, 2)), torch.nn.Parameter(gaussian(2, 5)))
    for held in (d.U, d.S, d.Vh, d.residual, product.U, product.S, product.Vh):
        assert not held.requires_grad
    assert not recwarn.list
    assert W.requires_grad


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


# --- orthonormal vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smallest", [0.5, 0.1, 1.1e-3, 0.9e-3, 1e-5, 1e-9, 1e-13, 1e-17])
@pytest.mark.parametrize("shape", [(80, 120), (120, 80), (80, 80)])
def test_vectors_are_orthonormal_to_rounding_whatever_the_spectrum(smallest, shape):
    d = decompose(with_spectrum(log_spectrum(smallest, 80), *shape))
    assert off_orthonormal(d.U) <= rounding(shape)
    assert off_orthonormal(d.Vh.mT) <= rounding(shape)


@pytest.mark.parametrize("rank", [0, 1, 5, 29])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (30, 30)])
def test_rank_deficient_matrices_get_a_whole_orthonormal_basis(rank, shape):
    W = gaussian(shape[0], rank, 1) @ gaussian(rank, shape[1], 2)
    d = decompose(W)
    assert off_orthonormal(d.U) <= rounding(shape)
    assert off_orthonormal(d.Vh.mT) <= rounding(shape)
    assert float(d.S[rank:].max()) <= rounding(shape, float(d.S[0]))
    assert float((d.matrix() - W).norm()) <= rounding(shape, float(W.norm()))


# --- errors, against 45 digits -----------------------------------------------------------------------------------

NASTY = {
    "Hilbert": hilbert(10, 10),
    "Hilbert, wide": hilbert(7, 12),
    "Hilbert, tall": hilbert(12, 7),
    "twelve decades": with_spectrum(log_spectrum(1e-12, 8), 8, 8),
    "eighteen decades": with_spectrum(log_spectrum(1e-18, 8), 10, 8),
    "just above the deflation": with_spectrum(log_spectrum(1.1e-3, 8), 8, 9),
    "two clusters": with_spectrum([1, 1 - 1e-9, 1 - 2e-9, 1e-5, 1e-5 + 1e-12, 1e-5 - 1e-12], 6, 9),
    "a smallest value of rounding size": with_spectrum([3, 1, 1e-17], 3, 3),
    "one rank": with_spectrum([2.0], 5, 7),
    "large": 1e250 * gaussian(5, 6),
    "small": 1e-250 * gaussian(6, 5),
}


@pytest.mark.parametrize("W", NASTY.values(), ids=NASTY)
@pytest.mark.parametrize("ranks", [1, None])
def test_no_singular_value_is_further_off_than_its_error(W, ranks):
    d = decompose(W, ranks)
    S = exact_svd(W)[1]
    assert (value_errors(d, S) <= d.spectrum_error.numpy()).all()
    # ... and the error is no empty promise: at most what the method may cost.
    assert float(d.spectrum_error.max()) <= rounding(W.shape, float(S[0])) / DEFLATE


@pytest.mark.parametrize("distance", [1e-15, 1e-14, 1e-13])
@pytest.mark.parametrize("at", [1.5e-3, DEFLATE, 0.3])
@pytest.mark.parametrize("shape", [(4, 4), (4, 6)])
def test_the_error_holds_for_values_too_close_to_tell_apart(distance, at, shape):
    for seed in range(30):
        W = with_spectrum([1, 0.5, at + distance, at - distance], *shape, seed)
        d = decompose(W)
        assert (value_errors(d, exact_svd(W)[1]) <= d.spectrum_error.numpy()).all()


def assert_angles_are_bounded(W, d):
    U, _, V = exact_svd(W)
    bound = d.bound.numpy()
    left, right = sines(d.U, U[:, : len(bound)]), sines(d.Vh.mT, V[:, : len(bound)])
    assert (np.hypot(left, right) <= np.sqrt(2) * bound).all(), (left, right, bound)


@pytest.mark.parametrize("W", NASTY.values(), ids=NASTY)
def test_no_singular_vector_is_further_off_than_its_bound(W):
    assert_angles_are_bounded(W, decompose(W))


@pytest.mark.parametrize("distance", [1e-15, 1e-14, 1e-13, 1e-12])
@pytest.mark.parametrize("at", [1.5e-3, DEFLATE, 0.3])
@pytest.mark.parametrize("shape", [(4, 4), (4, 6)])
def test_the_bound_holds_where_the_gap_is_of_the_size_of_the_error(distance, at, shape):
    for seed in range(6):
        W = with_spectrum([1, 0.5, at + distance, at - distance], *shape, seed)
        assert_angles_are_bounded(W, decompose(W))
