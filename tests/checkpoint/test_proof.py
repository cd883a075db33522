"""Reloading without the basis: equal, or refused with the reason."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st

from specbasis.checkpoint import proof as proofs
from specbasis.checkpoint.proof import COLUMNS, TOLERANCE, align, check_stored, prove, sketch, weight_digest
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, decompose
from tests.adapter.helpers import matrix


def trained(W: torch.Tensor, k: int = 0, m: int = 8):
    basis = decompose(W, ranks=m).interval(k, m)
    return basis, prove(basis, (k, m), W)


def reloaded(W: torch.Tensor, k: int = 0, m: int = 8) -> SVD:
    return decompose(W, ranks=m).interval(k, m)


def with_lapack(W: torch.Tensor, driver: str, k: int, m: int) -> SVD:
    """The same basis by another route: scipy's gesdd or gesvd, float64, with its own signs."""
    scipy_linalg = pytest.importorskip("scipy.linalg")
    U, S, Vh = (torch.from_numpy(a) for a in scipy_linalg.svd(W.double().numpy(), False, lapack_driver=driver))
    ours = decompose(W, ranks=m).interval(k, m)
    return dataclasses.replace(ours, U=U[:, k:m].contiguous(), S=S[k:m], Vh=Vh[k:m].contiguous())


@pytest.mark.parametrize("driver", ["gesdd", "gesvd"])
def test_another_driver_is_equal_signs_included(driver):
    W = matrix(30, 20).float()
    basis, proof = trained(W, 2, 9)
    found = align(proof, with_lapack(W, driver, 2, 9), W, "layer")
    assert torch.allclose(found.U, basis.U, atol=1e-9)
    assert torch.allclose(found.Vh, basis.Vh, atol=1e-9)


@given(seed=st.integers(0, 1000), flips=st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_signs_come_from_the_sketch(seed, flips):
    W = matrix(12, 17, seed=seed)
    basis, proof = trained(W)
    sign = torch.tensor([-1.0 if flips >> i & 1 else 1.0 for i in range(8)], dtype=torch.float64)
    flipped = dataclasses.replace(basis, U=basis.U * sign, Vh=basis.Vh * sign[:, None])
    found = align(proof, flipped, W, "layer")
    assert torch.equal(found.U, basis.U)
    assert torch.equal(found.Vh, basis.Vh)


def test_one_side_flipped_is_refused():
    W = matrix(12, 17)
    basis, proof = trained(W)
    wrong = dataclasses.replace(basis, U=basis.U * -1)
    with pytest.raises(InputError, match="8 of 8 singular vectors"):
        align(proof, wrong, W, "layer")


@pytest.mark.parametrize("threads", [1, 2])
def test_other_thread_counts_are_equal(threads):
    W = matrix(60, 50).float()
    basis, proof = trained(W)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = align(proof, reloaded(W), W, "layer")
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found.U, basis.U, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_back", [False, True])
def test_a_rounded_base_is_refused_and_named(dtype, cast_back):
    W = matrix(30, 20).float()
    _, proof = trained(W)
    rounded = W.to(dtype)
    rounded = rounded.float() if cast_back else rounded
    with pytest.raises(InputError, match=f"rounded to {str(dtype).removeprefix('torch.')}.*trained on float32"):
        align(proof, reloaded(rounded), rounded, "layer")


def test_the_same_rounded_base_in_another_dtype_is_equal():
    """Trained on a bfloat16 base, loaded on its exact float32 copy."""
    W = matrix(30, 20).to(torch.bfloat16)
    basis, proof = trained(W)
    found = align(proof, reloaded(W.float()), W.float(), "layer")
    assert torch.equal(found.U, basis.U)
    assert weight_digest(W) == weight_digest(W.float()) == weight_digest(W.double())


def test_another_revision_is_refused_and_named():
    W = matrix(30, 20).float()
    _, proof = trained(W)
    other = W + 1e-3 * torch.randn(30, 20)
    with pytest.raises(InputError, match=r"singular values changed by up to .* load the base"):
        align(proof, reloaded(other), other, "layer")


def test_a_scaled_base_keeps_its_vectors_and_is_refused_all_the_same():
    W = matrix(30, 20).float()
    _, proof = trained(W)
    with pytest.raises(InputError, match="singular values"):
        align(proof, reloaded(W * 1.01), W * 1.01, "layer")


def test_equal_values_are_refused_when_the_solver_rotates_them():
    spectrum = torch.cat([torch.full((4,), 2.0), torch.linspace(1.0, 0.1, 16)])
    W = matrix(30, 20, spectrum)
    basis, proof = trained(W)
    Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    U, Vh = basis.U.clone(), basis.Vh.clone()
    U[:, :4], Vh[:4] = U[:, :4] @ Q, Q.mT @ Vh[:4]  # an equally valid SVD of the same matrix
    assert torch.allclose((U * basis.S) @ Vh, basis.matrix())
    with pytest.raises(InputError, match=r"too close to fix single vectors.*save_basis=True"):
        align(proof, dataclasses.replace(basis, U=U, Vh=Vh), W, "layer")


@given(rank=st.integers(0, 7), exponent=st.floats(-4.5, 0), seed=st.integers(0, 50), side=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_vector_is_checked(rank, exponent, seed, side):
    """One vector turned by more than ten tolerances is found, whichever it is."""
    W = matrix(40, 30)
    basis, proof = trained(W)
    angle = 10.0**exponent
    U, Vh = basis.U.clone(), basis.Vh.clone()
    generator = torch.Generator().manual_seed(seed)
    target = U[:, rank] if side else Vh[rank]
    noise = torch.randn(len(target), generator=generator, dtype=torch.float64)
    noise -= target * (noise @ target)
    turned = target * torch.cos(torch.tensor(angle)) + noise / noise.norm() * torch.sin(torch.tensor(angle))
    if side:
        U[:, rank] = turned
    else:
        Vh[rank] = turned
    assert angle > 7 * TOLERANCE
    with pytest.raises(InputError, match="1 of 8 singular vectors"):
        align(proof, dataclasses.replace(basis, U=U, Vh=Vh), W, "layer")


def test_a_base_that_differs_elsewhere_is_accepted_with_a_warning():
    W = matrix(30, 20)
    full = decompose(W)
    basis, proof = trained(W)
    other = W + 0.01 * torch.outer(full.U[:, 15], full.Vh[15])
    with pytest.warns(UserWarning, match="not those that the adapter was trained on"):
        found = align(proof, reloaded(other), other, "layer")
    assert torch.allclose(found.U, basis.U, atol=1e-6)


def test_a_stored_basis_on_its_own_base_says_nothing():
    W = matrix(30, 20).float()
    basis, proof = trained(W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_stored(proof, basis.U.float(), basis.Vh.float(), W, "layer", singular=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stored_basis_on_a_rounded_base_warns(dtype):
    W = matrix(120, 80).float()
    basis, proof = trained(W)
    with pytest.warns(UserWarning, match="rounding of those that the adapter was trained on"):
        check_stored(proof, basis.U.float(), basis.Vh.float(), W.to(dtype), "layer", singular=True)


def test_a_rounded_base_is_one_warning_for_all_layers():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")  # as Python shows them to a user
        for layer in range(5):
            W = matrix(120, 80).float() + layer
            basis, proof = trained(W)
            check_stored(proof, basis.U.float(), basis.Vh.float(), W.bfloat16(), f"layer.{layer}", singular=True)
    assert len(told) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_basis_on_another_revision_is_refused(dtype):
    W = matrix(120, 80).float()
    basis, proof = trained(W)
    other = (W + 0.02 * W.std() * torch.randn(W.shape)).to(dtype)
    with pytest.raises(InputError, match="not those of this base"):
        check_stored(proof, basis.U.float(), basis.Vh.float(), other, "layer", singular=True)


def test_a_damaged_stored_basis_is_refused():
    W = matrix(30, 20).float()
    basis, proof = trained(W)
    U = basis.U.float().clone()
    U[3, 2] += 1e-3
    with pytest.raises(InputError, match="1 of 8 stored singular vectors differ from their sketch"):
        check_stored(proof, U, basis.Vh.float(), W, "layer", singular=True)


def test_shape_seed_and_absence_are_named():
    W = matrix(30, 20)
    basis, proof = trained(W)
    with pytest.raises(InputError, match="30 × 20 weight, this base has 20 × 30"):
        align(proof, basis, W.mT, "layer")
    origin = proof.origin.clone()
    origin[5] = 1
    with pytest.raises(InputError, match="made with seed 1"):
        align(dataclasses.replace(proof, origin=origin), basis, W, "layer")
    with pytest.raises(InputError, match="does not say which basis"):
        align(proofs.empty_proof(8), basis, W, "layer")


def test_the_sketch_is_the_same_everywhere():
    """Numbers of the file format: a change here makes every file of before unreadable."""
    G = sketch(torch.eye(3, dtype=torch.float64))
    assert G.shape == (3, COLUMNS)
    assert torch.allclose(G[0, :2], torch.tensor(FIRST, dtype=torch.float64), atol=1e-12)
    big = sketch(torch.eye(2000, dtype=torch.float64))
    assert abs(float(big.mean())) < 0.05
    assert abs(float(big.std()) - 1) < 0.05


FIRST = [1.2936324987288874, 0.7117265978696294]
