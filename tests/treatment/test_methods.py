"""PEFT's merging functions, and naive transcriptions of the papers' algorithms, are the oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specbasis.core.errors import InputError
from specbasis.treatment.methods import METHODS, Delta, merged
from specbasis.treatment.options import DEFAULTS, MergeOptions

SHAPES = ((12, 12), (40, 12), (12, 40), (21, 17))


def deltas(shape, n=3, seed=0, rank=None):
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(n)]
    return [
        torch.randn(shape[0], rank, generator=g, dtype=torch.float64)
        @ torch.randn(rank, shape[1], generator=g, dtype=torch.float64)
        for _ in range(n)
    ]


def merge(tensors, method, generator=None, is_matrix=True, **options):
    chosen = MergeOptions(method=method, **options)
    return merged([Delta(x) for x in tensors], chosen, generator or torch.Generator(), is_matrix=is_matrix)


def polar(X):
    P, _, Q = np.linalg.svd(X, full_matrices=False)
    return P @ Q


def naive_tsv_m(tensors):
    """arXiv 2412.00081, Algorithm 1: truncate each to 1/T of its rank, concatenate, whiten by the polar factor."""
    k = min(tensors[0].shape) // len(tensors)
    U, S, V = [], [], []
    for X in tensors:
        u, s, vh = np.linalg.svd(X, full_matrices=False)
        U, S, V = [*U, u[:, :k]], [*S, s[:k]], [*V, vh[:k].T]
    return polar(np.hstack(U)) @ np.diag(np.concatenate(S)) @ polar(np.hstack(V)).T


def naive_iso_c(tensors):
    """arXiv 2502.04959, Algorithm 1."""
    u, s, vh = np.linalg.svd(sum(tensors), full_matrices=False)
    return s.mean() * u @ vh


def naive_iso_cts(tensors, fraction):
    """arXiv 2502.04959, Algorithm 2, with the rounding that gives every task equally many directions."""
    r, n = min(tensors[0].shape), len(tensors)
    own = round((r - int(r * fraction)) / n)
    u, s, vh = np.linalg.svd(sum(tensors), full_matrices=False)
    k = r - own * n
    U, S, V = [u[:, :k]], [s[:k]], [vh[:k].T]
    for X in tensors:
        a, b, c = np.linalg.svd(X - u[:, :k] @ u[:, :k].T @ X, full_matrices=False)
        U, S, V = [*U, a[:, :own]], [*S, b[:own]], [*V, c[:own].T]
    return np.concatenate(S).mean() * polar(np.hstack(U)) @ polar(np.hstack(V)).T


def naive_knots(tensors, density):
    """arXiv 2410.19735: SVD of the updates side by side, TIES of S V_i entry by entry, and back."""
    n, width = len(tensors), tensors[0].shape[1]
    U, S, Vh = np.linalg.svd(np.hstack(tensors), full_matrices=False)
    parts = [np.diag(S) @ Vh[:, i * width : (i + 1) * width] for i in range(n)]
    trimmed = []
    for part in parts:
        least = np.sort(np.abs(part).ravel())[::-1][int(density * part.size) - 1]
        trimmed.append(np.where(np.abs(part) >= least, part, 0))
    elected = np.where(sum(trimmed) >= 0, 1, -1)
    together = np.zeros_like(parts[0])
    for i, j in np.ndindex(together.shape):
        agreeing = [t[i, j] for t in trimmed if t[i, j] * elected[i, j] > 0]
        together[i, j] = np.mean(agreeing) if agreeing else 0
    return U @ together


def naive_calibrated(merged, tensors, alpha):
    """arXiv 2602.05536, Algorithm 1, direction by direction."""
    U, S, Vh = np.linalg.svd(merged, full_matrices=False)
    for r in range(len(S)):
        whole = U[:, r] @ merged
        counts = [max(alpha, (whole @ (U[:, r] @ X)) / np.sum((U[:, r] @ X) ** 2)) for X in tensors]
        S[r] *= len(tensors) / sum(counts)
    return U @ np.diag(S) @ Vh


def assert_equal(got, wanted, tolerance=1e-9):
    wanted = torch.as_tensor(wanted)
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def test_there_is_a_function_for_every_method():
    assert METHODS.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.2, 0.53, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_entrywise_methods_are_those_of_peft(shape, density):
    utils = pytest.importorskip("peft.utils.merge_utils")
    tensors, ones = deltas(shape), torch.ones(3, dtype=torch.float64)
    assert_equal(merge(tensors, "ties", density=density), utils.ties(tensors, ones, density), 1e-12)
    magnitude = utils.magnitude_prune(tensors, 0.7 * ones, density)
    assert_equal(merge(tensors, "magnitude", density=density, scale=0.7), magnitude, 1e-12)
    assert_equal(merge(tensors, "task-arithmetic", scale=0.3), utils.task_arithmetic(tensors, 0.3 * ones), 1e-12)
    if density < 1:  # PEFT draws nothing at 1
        torch.manual_seed(5)
        dare = utils.dare_linear(tensors, 0.3 * ones, density)
        generator = torch.Generator().manual_seed(5)
        assert_equal(merge(tensors, "dare", generator, density=density, scale=0.3), dare, 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_spectral_methods_are_those_of_the_papers(shape, n):
    tensors = deltas(shape, n)
    arrays = [x.numpy() for x in tensors]
    assert_equal(merge(tensors, "tsv-m"), naive_tsv_m(arrays))
    assert_equal(merge(tensors, "iso-c", scale=1.3), 1.3 * naive_iso_c(arrays))
    for fraction in (0.5, 0.8, 1.0):
        assert_equal(merge(tensors, "iso-cts", common=fraction), naive_iso_cts(arrays, fraction))
    assert_equal(merge(tensors, "knots", density=0.3), naive_knots(arrays, 0.3))
    for alpha in (0.1, 1.0):
        wanted = naive_calibrated(0.4 * sum(arrays), arrays, alpha)
        assert_equal(merge(tensors, "task-arithmetic", calibrate=alpha), wanted)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dare"])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_order_of_the_finetunes_does_not_matter(method, rank):
    tensors = deltas((30, 20), rank=rank)
    assert_equal(merge(tensors[::-1], method), merge(tensors, method))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mean", {}),
        ("task-arithmetic", {"scale": 1.0}),
        ("magnitude", {"scale": 1.0, "density": 1.0}),
        ("ties", {"density": 1.0}),
        ("dare", {"scale": 1.0, "density": 1.0}),
        ("tsv-m", {}),
        ("knots", {"density": 1.0}),
        ("mean", {"calibrate": 1.0}),
    ],
)
@pytest.mark.parametrize("rank", [None, 3])
def test_one_finetune_alone_stays_as_it_is(method, options, rank):
    (tensor,) = deltas((30, 20), 1, rank=rank)
    assert_equal(merge([tensor], method, **options), tensor)


def test_equal_finetunes_have_the_mean_of_each():
    (tensor,) = deltas((30, 20), 1)
    for method in ("mean", "ties", "knots"):
        assert_equal(merge([tensor] * 3, method), merge([tensor], method))
    # TSV-M takes a third of the triplets of each: three times the same third, whose polar factor is a third of it.
    U, S, Vh = torch.linalg.svd(tensor, full_matrices=False)
    assert_equal(merge([tensor] * 3, "tsv-m"), (U[:, :6] * S[:6]) @ Vh[:6])


@pytest.mark.parametrize("method", METHODS)
def test_a_product_is_merged_as_what_it_makes(method):
    g = torch.Generator().manual_seed(1)
    shapes = ((30, 4), (4, 20))
    factors = [tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes) for _ in range(3)]
    options, seed = MergeOptions(method=method), torch.Generator
    products = merged([Delta(factors=pair) for pair in factors], options, seed().manual_seed(0))
    dense = merged([Delta(B @ A) for B, A in factors], options, seed().manual_seed(0))
    assert_equal(products, dense, 1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_a_finetune_that_left_a_matrix_alone_does_no_harm(method):
    tensors = [*deltas((30, 20), 2), torch.zeros(30, 20, dtype=torch.float64)]
    assert torch.isfinite(merge(tensors, method)).all()


def test_of_vectors_and_kernels_the_methods_that_decompose_take_the_mean():
    tensors = [torch.randn(7, dtype=torch.float64) for _ in range(3)]
    for method in ("tsv-m", "iso-c", "iso-cts", "knots"):
        assert_equal(merge(tensors, method, is_matrix=False, scale=0.5), 0.5 * torch.stack(tensors).mean(0), 1e-12)
    assert not torch.equal(merge(tensors, "ties", is_matrix=False), torch.stack(tensors).mean(0))


def test_calibration_divides_what_all_have_in_common_and_leaves_the_rest():
    U, V = (torch.linalg.qr(torch.randn(d, 3, dtype=torch.float64))[0] for d in (30, 20))
    shared, own = torch.outer(U[:, 0], V[:, 0]), [torch.outer(U[:, i], V[:, i]) for i in (1, 2)]
    tensors = [shared + own[0], shared + own[1]]
    summed = merge(tensors, "task-arithmetic", scale=1.0, calibrate=1.0)
    assert torch.allclose(summed, shared + own[0] + own[1], atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tyes"}, "did you mean ties"),
        ({"method": "mean", "density": 0.5}, "keeps every entry"),
        ({"method": "ties", "density": 0.0}, "got density = 0.0"),
        ({"method": "ties", "density": 1.5}, "got density = 1.5"),
        ({"method": "iso-cts", "common": 1.5}, "common = 1.5"),
        ({"scale": -1.0}, "got scale"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MergeOptions(**options)


@pytest.mark.parametrize("method", ["ties", "knots"])
@pytest.mark.parametrize("rank", [None, 3])
def test_a_finetune_that_left_a_matrix_alone_is_not_averaged_in(method, rank):
    for shape in SHAPES:
        (tensor,) = deltas(shape, 1, rank=rank)
        assert_equal(merge([torch.zeros_like(tensor), tensor], method, density=1.0), tensor)
