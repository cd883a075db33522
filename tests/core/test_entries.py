"""Figures of the entries, against naive transcriptions and their laws."""

import math

import numpy as np
import pytest
import torch

from specbasis.core.entries import LEAST_SIDE, read_entries
from specbasis.core.errors import NonFiniteError
from specbasis.core.rounding import rounding


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200])
def test_sums_of_any_size_are_those_of_numpy(scale: float) -> None:
    W, T = normal(70, 90).double(), normal(70, 90, seed=1).double()
    found = read_entries(W * scale, T * scale)
    wanted = {"base": W.norm(), "tuned": T.norm(), "delta": (T - W).norm()}
    for name, norm in wanted.items():
        assert found.norms[name] == pytest.approx(float(norm) * scale, rel=1e-12)
    cosine = float((W * T).sum() / W.norm() / T.norm())
    assert found.figures["weight_cosine"] == pytest.approx(cosine, rel=1e-10)


def test_the_correspondence_is_that_of_all_orders() -> None:
    """Against the deviations of a thousand orders of the rows and of the columns, as numpy draws them."""
    W, T = normal(80, 120).double() + 0.5, normal(80, 120, seed=1).double() + 0.5
    T = T + 0.2 * W
    rng = np.random.default_rng(0)

    def deviations(a: np.ndarray, b: np.ndarray) -> float:
        drawn = [float((a * b[rng.permutation(len(b))]).sum()) for _ in range(1000)]
        return (float((a * b).sum()) - np.mean(drawn)) / float(np.std(drawn))

    wanted = min(deviations(W.numpy(), T.numpy()), deviations(W.T.numpy(), T.T.numpy()))
    assert read_entries(W, T).figures["weight_cosine_z"] == pytest.approx(wanted, rel=0.25)


def test_the_correspondence_of_independent_matrices_is_standard_normal() -> None:
    """With heavy spectra and means in common, which make a plain cosine large."""
    heavy = torch.diag(torch.logspace(0, -2, 64))
    z = []
    for seed in range(200):
        W, T = (normal(96, 64, seed=2 * seed + i) @ heavy + torch.linspace(0, 1, 64) for i in (0, 1))
        z.append(read_entries(W, T).figures["weight_cosine_z"])
    assert max(z) < 5
    assert np.std(z) < 1.3
    assert read_entries(W, W + 1e-3 * T).figures["weight_cosine_z"] > 6


@pytest.mark.parametrize(("out", "width"), [(8, 8), (9, 400), (300, 12), (64, 64)])
def test_small_matrices_are_tested_exactly_and_a_copy_reaches_the_limit(out: int, width: int) -> None:
    W, T = normal(out, width).double() + 0.5, normal(out, width, seed=1).double() + 0.5

    def naive(a: np.ndarray, b: np.ndarray) -> float:
        """tr(M) √(n − 1) / ‖M‖ with M = C aᵀb C: of the columns."""
        C = np.eye(a.shape[1]) - 1 / a.shape[1]
        M = C @ a.T @ b @ C
        return float(np.trace(M) * math.sqrt(a.shape[1] - 1) / np.linalg.norm(M))

    T = T + W
    found = read_entries(W, T).figures
    wanted = min(naive(W.numpy(), T.numpy()), naive(W.T.numpy(), T.T.numpy()))
    assert found["weight_cosine_z"] == pytest.approx(wanted, rel=1e-9)
    assert found["weight_cosine_z"] < found["weight_cosine_z_limit"]
    copy = read_entries(W, 3 * W).figures
    assert copy["weight_cosine_z"] == pytest.approx(copy["weight_cosine_z_limit"], rel=1e-9)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24), ("float64", 53)])
def test_precision_is_that_of_the_coarsest_format_that_holds_all(dtype: str, bits: int) -> None:
    W = normal(64, 64).double() / 3
    W = (W + W.square() / 7) if dtype == "float64" else W
    T = W.to(getattr(torch, dtype))
    found = read_entries(W, T.double()).figures
    assert found["precision_tuned"] == bits
    assert found["equal_entries_rounded"] == 1
    assert found["equal_entries"] < 0.5 or dtype == "float64"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_a_grid_is_found_whatever_is_scaled_together(bits: int, group: int) -> None:
    W = normal(64, 128)
    groups = W.reshape(-1, group)
    step = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    found = read_entries(W, ((groups / step).round() * step).reshape(W.shape)).figures
    assert math.isnan(found["grid_levels_base"])
    assert found["grid_levels_tuned"] <= 2**bits
    assert found["equal_entries_grid"] > 0.9
    back = read_entries(((groups / step).round() * step).reshape(W.shape), W).figures
    assert back["equal_entries_grid"] > 0.9
    assert math.isnan(back["grid_levels_tuned"])
    moved = read_entries(W, W + 0.01 * normal(64, 128, seed=1)).figures
    assert math.isnan(moved["grid_levels_tuned"])


def test_zeros_and_equal_entries_are_counted() -> None:
    W = normal(64, 64)
    T = W.clone()
    T[:16] = 0
    found = read_entries(W, T).figures
    assert (found["equal_entries"], found["zero_entries_base"], found["zero_entries_tuned"]) == (0.75, 0, 0.25)


def test_what_is_small_has_no_correspondence_and_what_is_not_finite_is_refused() -> None:
    W = normal(LEAST_SIDE - 1, 100)
    assert math.isnan(read_entries(W, W).figures["weight_cosine_z"])
    W[0, 0] = math.inf
    for pair in ((W, W), (W.double(), W.double())):
        with pytest.raises(NonFiniteError, match="1 of 700 entries"):
            read_entries(*pair)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_8_bit_floats_are_compared_as_the_numbers_that_they_are(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 80, generator=generator) * 0.02
    coarse = W.to(getattr(torch, name))
    got, same = read_entries(W, coarse), read_entries(coarse, coarse)
    want = read_entries(W, coarse.float())
    assert got.norms == pytest.approx(want.norms, rel=1e-12)
    assert got.figures["zero_entries_tuned"] == want.figures["zero_entries_tuned"]
    assert (got.figures["precision_base"], got.figures["precision_tuned"]) == (24, 4 if "e4m3" in name else 3)
    assert got.figures["equal_entries_rounded"] == 1.0
    assert same.equal
    # The error of rounding is what rounding makes of the matrix, subnormal numbers included.
    error = rounding(coarse).variance[name] ** 0.5
    assert error == pytest.approx(float((coarse.float() - W).square().mean().sqrt()), rel=0.25)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_an_8_bit_float_that_is_no_number_is_refused(name: str) -> None:
    bad = torch.full((4, 4), math.nan).to(getattr(torch, name))
    with pytest.raises(NonFiniteError, match="16 of 16 entries are NaN or Inf"):
        read_entries(torch.ones(4, 4), bad)
