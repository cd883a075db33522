"""The decomposition against gesdd, gesvd and 45-digit arithmetic, and what it promises about its own error."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, strategies as st

from specbasis import InputError, NonFiniteError, decompose, low_rank_svd
from specbasis.core.cosines import cosines
from specbasis.core.gram import DEFLATE, IMPLIED
from specbasis.core.residuals import PROBES
from specbasis.core.svd import half_svd
from tests.helpers.exact import exact_svd, sines, true_residuals, value_errors
from tests.helpers.matrices import (
    gaussian,
    hadamard,
    hilbert,
    log_spectrum,
    off_orthonormal,
    weight_like,
    with_spectrum,
)
from tests.helpers.tolerance import rounding

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("column", [0, -1])
def test_a_bad_entry_is_found_in_every_column_block(monkeypatch, value, transposed, column):
    monkeypatch.setattr("specbasis.core.blocks.BLOCK_BYTES", 8 * 4 * 3)  # blocks of 3 columns
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


@pytest.mark.parametrize("shape", [(120, 120), (60, 200), (200, 60)])
@pytest.mark.parametrize("kind", ["gaussian", "weight", 1e-1, 2e-3, 1e-6, 1e-14])
def test_residuals_bound_the_true_ones_of_larger_matrices(shape, kind):
    if kind == "gaussian":
        W = gaussian(*shape)
    elif kind == "weight":
        W = weight_like(*shape)
    else:
        W = with_spectrum(log_spectrum(kind, min(shape)), *shape)
    d = decompose(W)
    assert (true_residuals(W, d) <= d.residual.numpy()).all()
    assert float(d.residual.max()) <= rounding(shape, float(d.S[0])) / DEFLATE


# --- other people's decompositions -------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["gesdd", "gesvd"])
@pytest.mark.parametrize("shape", [(90, 90), (50, 130), (130, 50), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["gaussian", "weight", "decades"])
def test_agrees_with_lapack_within_its_bounds(shape, kind, driver):
    if kind == "decades":
        W = with_spectrum(log_spectrum(1e-9, min(shape)) if min(shape) > 1 else [1.0], *shape)
    else:
        W = weight_like(*shape, outliers=min(8, *shape)) if kind == "weight" else gaussian(*shape)
    U, S, Vh = (
        torch.from_numpy(a) for a in scipy.linalg.svd(W.double().numpy(), full_matrices=False, lapack_driver=driver)
    )
    d = decompose(W)
    theirs = rounding(shape, float(S[0]))
    assert ((d.S - S).abs() <= d.spectrum_error + theirs).all()
    # Theirs is off by rounding over the gap, ours by its bound.
    allowed = (math.sqrt(2) * (d.bound + theirs / d.gap)).clamp(max=1.0)
    for ours, their in ((d.U, U), (d.Vh.mT, Vh.mT)):
        sine = (ours - their * (ours * their).sum(dim=0)).norm(dim=0)
        assert (sine <= allowed).all()


def test_a_trained_looking_matrix_is_resolved_far_below_a_millionth():
    W = weight_like(256, 320)
    d = decompose(W)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert float(d.bound.max()) < 1e-9
    assert float(((d.U * U).sum(dim=0).abs() - 1).abs().max()) < 1e-12
    assert float(((d.Vh * Vh).sum(dim=1).abs() - 1).abs().max()) < 1e-12
    assert float((d.S / S - 1).abs().max()) < 1e-12


def approximate_svd_lowrank(W, q):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(W, q=q)
    return U, S, V.mT


def approximate_randomized(W, q):
    extmath = pytest.importorskip("sklearn.utils.extmath")
    return tuple(torch.from_numpy(a) for a in extmath.randomized_svd(W.numpy(), q, random_state=0))


@pytest.mark.parametrize("approximate", [approximate_svd_lowrank, approximate_randomized])
def test_the_cheap_setting_fails_where_the_default_does_not(approximate):
    """Randomised SVDs at library defaults get single vectors of a weight wrong, and do not say so."""
    W, q = weight_like(384, 512), 40
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    U, S, Vh = U[:, :q], S[:q], Vh[:q]
    cheap_U, cheap_S, cheap_Vh = approximate(W, q)
    wrong = 1 - (cheap_U.double() * U).sum(dim=0).abs()
    assert float(wrong.max()) > 0.5
    assert float((1 - (cheap_Vh.double() * Vh).sum(dim=1).abs()).max()) > 0.5
    assert float((1 - cheap_S.double() / S).max()) > 1e-2
    d = decompose(W, q)
    assert float((1 - (d.U * U).sum(dim=0).abs()).max()) < 1e-12
    assert float((1 - (d.Vh * Vh).sum(dim=1).abs()).max()) < 1e-12


# --- properties --------------------------------------------------------------------------------------------------

EXPONENTS = st.sampled_from([-200, -30, 0, 30, 200])


@st.composite
def matrices(draw, max_side=9):
    """Any small matrix: Gaussian, low rank, with repeated or zero rows, integers with many ties; any scale."""
    rows, columns, seed = draw(st.integers(1, max_side)), draw(st.integers(1, max_side)), draw(st.integers(0, 999))
    W = gaussian(rows, columns, seed)
    kind = draw(st.sampled_from(["gaussian", "low rank", "ties", "repeated rows", "zero rows", "decades"]))
    if kind == "low rank":
        W = W[:, :1] @ W[:1]
    elif kind == "ties":
        W = W.round()
    elif kind == "repeated rows":
        W = W[:1].expand(rows, columns)
    elif kind == "zero rows":
        W = W * (torch.arange(rows) % 2)[:, None]
    elif kind == "decades":
        W = W * log_spectrum(1e-9, columns)
    return W * 10.0 ** draw(EXPONENTS)


@given(matrices())
def test_triplets_are_orthonormal_ordered_and_whole(W):
    d = decompose(W)
    assert off_orthonormal(d.U) <= rounding(W.shape)
    assert off_orthonormal(d.Vh.mT) <= rounding(W.shape)
    assert (d.S >= 0).all()
    assert (d.S[:-1] >= d.S[1:]).all()
    assert torch.equal(d.S, d.spectrum)
    assert float((d.matrix() - W).abs().max()) <= rounding(W.shape, float(d.S[0])) / DEFLATE
    assert (d.residual >= 0).all()
    assert (d.gap >= 0).all()
    assert not d.bound.isnan().any()
    assert not d.relative_gap.isnan().any()


@given(matrices(), st.data())
def test_truncation_is_the_best_approximation_of_its_rank(W, data):
    """Eckart–Young: its distance is the tail of the spectrum, and no other matrix of that rank is nearer."""
    d = decompose(W)
    k = data.draw(st.integers(1, len(d.S)))
    unit = max(float(d.S[0]), 1e-300)  # squares of the smallest scales vanish
    distance = float(((d.truncate(k).matrix() - W) / unit).norm())
    tail = float((d.S[k:] / unit).norm())
    slack = rounding(W.shape) / DEFLATE
    assert abs(distance - tail) <= slack
    other = gaussian(W.shape[0], k, 5)
    nearest = other @ torch.linalg.lstsq(other, W / unit).solution  # best with the columns of `other`
    assert distance <= float((nearest - W / unit).norm()) + slack


@given(matrices(), st.integers(0, 99), st.sampled_from([1e-12, 1e-6, 1e-2, 1.0]))
def test_singular_values_move_no_more_than_the_matrix(W, seed, size):
    """Weyl: |σ_i(W + E) − σ_i(W)| ≤ ‖E‖₂."""
    E = gaussian(*W.shape, seed) * size * W.abs().max()
    a, b = decompose(W), decompose(W + E)
    norm = float(torch.linalg.matrix_norm(E, 2))
    rounded = rounding(W.shape, float(b.S[0]))  # of W + E and of the norm
    assert ((a.S - b.S).abs() <= norm + a.spectrum_error + b.spectrum_error + rounded).all()


@given(matrices())
def test_the_sign_rule(W):
    d = decompose(W)
    for u in d.U.mT:
        assert float(u[u.abs().argmax()]) > 0


@given(matrices())
def test_transposition_swaps_the_sides(W):
    a, b = decompose(W), decompose(W.mT)
    assert ((a.S - b.S).abs() <= a.spectrum_error + b.spectrum_error).all()
    allowed = math.sqrt(2) * (a.bound + b.bound)
    resolved = allowed < 0.1
    for X, Y in ((a.U, b.Vh.mT), (a.Vh.mT, b.U)):
        sine = (X - Y * (X * Y).sum(dim=0)).norm(dim=0)
        assert (sine <= math.pi / 2 * allowed + rounding(W.shape))[resolved].all()
    # The sign is one for the pair: u vᵀ is the same matrix both times, wherever u and v come from W (σ > 0).
    for i in torch.nonzero(resolved & (a.S > 1e-8 * a.S[0])).flatten():
        outer, transposed = torch.outer(a.U[:, i], a.Vh[i]), torch.outer(b.Vh[i], b.U[:, i])
        assert float((outer * transposed).sum()) > 0.9


@given(matrices())
def test_repeated_calls_agree_bit_for_bit_and_leave_the_matrix_alone(W):
    before = W.clone()
    a, b = decompose(W), decompose(W)
    for field in dataclasses.fields(a):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name))
    assert torch.equal(W, before)


@given(matrices(), st.integers(-40, 40))
def test_powers_of_two_pass_through_exactly(W, exponent):
    a, b = decompose(W), decompose(W * 2.0**exponent)
    assert torch.equal(a.U, b.U)
    assert torch.equal(a.Vh, b.Vh)
    assert torch.equal(a.S * 2.0**exponent, b.S)
    assert torch.equal(a.bound, b.bound)


@given(matrices(), st.data())
def test_fewer_ranks_are_the_head_of_all(W, data):
    k = data.draw(st.integers(1, min(W.shape)))
    part, whole = decompose(W, k), decompose(W)
    assert part.U.shape == (W.shape[0], k)
    assert part.Vh.shape == (k, W.shape[1])
    assert torch.equal(part.spectrum, whole.spectrum)
    assert torch.equal(part.S, whole.S[:k])
    both = part.bound + whole.bound[:k]
    sine = (part.Vh - whole.Vh[:k] * (part.Vh * whole.Vh[:k]).sum(dim=1, keepdim=True)).norm(dim=1)
    assert (sine <= (math.sqrt(2) * math.pi / 2 * both).clamp(min=rounding(W.shape))).all()


# --- what a matrix may look like ---------------------------------------------------------------------------------

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_every_float_type_is_read_exactly(dtype, shape):
    W = gaussian(*shape).to(dtype)
    a, b = decompose(W), decompose(W.double())
    assert a.U.dtype == a.S.dtype == a.Vh.dtype == torch.float64
    assert torch.equal(a.S, b.S)
    assert torch.equal(a.U, b.U)
    assert torch.equal(a.Vh, b.Vh)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_nan_is_found_in_eight_bits(dtype):
    W = gaussian(4, 6)
    W[2, 3] = math.nan
    with pytest.raises(NonFiniteError, match="1 of 24"):
        decompose(W.to(dtype))


VIEWS = {
    "transposed": lambda X: X.mT,
    "strided": lambda X: X[::2, ::3],
    "offset": lambda X: X[3:, 5:],
    "flipped": lambda X: X.flip(0),
    "expanded": lambda X: X[:1].expand(12, -1),
    "slice of three": lambda X: X.reshape(4, 6, -1)[:, 2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_view_is_as_good_as_its_copy(view, dtype):
    W = view(gaussian(24, 30).to(dtype))
    a, b = decompose(W), decompose(W.contiguous().clone())
    assert ((a.S - b.S).abs() <= a.spectrum_error + b.spectrum_error).all()
    assert float((a.matrix() - W.double()).norm()) <= rounding(W.shape, float(a.S[0])) / DEFLATE


@pytest.mark.parametrize("shape", [(40, 300_000), (300_000, 40)])
def test_a_short_float_matrix_is_never_copied_whole(shape, tmp_path, monkeypatch):
    """Peak of all that is allocated beside W: a few blocks, and vectors of the one rank asked for."""
    block = 2**22
    monkeypatch.setattr("specbasis.core.blocks.BLOCK_BYTES", block)
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
    with torch.profiler.profile(profile_memory=True) as profile:
        decompose(W, 1)
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = sorted(
        (e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"), key=lambda e: e["ts"]
    )
    sizes = [e["args"]["Bytes"] for e in events]
    assert max(sizes) > 0.9 * block, "the profiler saw no block: this test measures nothing"
    assert max(np.cumsum(sizes)) <= 4 * block + 4 * 8 * max(shape)  # 26 MB; W in float64 is 96 MB


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (1, 3), (3, 1), (1, 1)])
def test_the_zero_matrix(shape):
    d = decompose(torch.zeros(shape))
    assert off_orthonormal(d.U) <= rounding(shape)
    assert off_orthonormal(d.Vh.mT) <= rounding(shape)
    for zero in (d.S, d.spectrum, d.spectrum_error, d.residual, d.gap, d.relative_gap):
        assert (zero == 0).all()
    assert (d.bound == math.inf).all()


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (1, 1)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_one_row_or_column_in_closed_form(shape, sign):
    W = sign * gaussian(*shape).abs()
    d = decompose(W)
    norm = float(torch.linalg.vector_norm(W))
    assert d.S.tolist() == pytest.approx([norm], rel=rounding(shape))
    assert torch.allclose(d.matrix(), W, rtol=rounding(shape), atol=0)
    assert (d.U > 0).all()
    assert ((d.Vh > 0) == (sign > 0)).all()
    assert d.gap.tolist() == d.S.tolist()
    assert float(d.bound) <= rounding(shape)


@pytest.mark.parametrize("W", [hadamard(8), torch.eye(7), torch.kron(torch.eye(3), gaussian(2, 3).round())])
def test_equal_singular_values_are_unresolved_but_exact(W):
    d = decompose(W)
    assert float((d.matrix() - W).norm()) <= rounding(W.shape, float(d.S[0]))
    assert off_orthonormal(d.U) <= rounding(W.shape)
    assert (d.bound >= 1).all()
    S = torch.linalg.svdvals(W.double())
    assert ((d.S - S).abs() <= d.spectrum_error + rounding(W.shape, float(S[0]))).all()


def test_the_gap_counts_the_null_space_and_the_ranks_beyond():
    S = [4.0, 3.0, 1.0]
    for shape, expected in (((3, 3), [1, 1, 2]), ((3, 5), [1, 1, 1]), ((5, 3), [1, 1, 1])):
        d = decompose(with_spectrum(S, *shape))
        assert d.gap.tolist() == pytest.approx(expected, abs=4 * rounding(shape, 4))
        assert decompose(with_spectrum(S, *shape), 2).gap.tolist() == pytest.approx([1, 1], abs=1e-12)
        assert torch.equal(d.relative_gap, d.gap / d.S)


BAD = {
    "integers": (torch.ones(3, 4, dtype=torch.int64), "int64"),
    "booleans": (torch.ones(3, 4, dtype=torch.bool), "bool"),
    "complex": (torch.ones(3, 4, dtype=torch.complex64), "complex64"),
    "a vector": (torch.ones(3), r"\(3,\)"),
    "a scalar": (torch.tensor(1.0), r"\(\)"),
    "three dimensions": (torch.ones(2, 3, 4), r"\(2, 3, 4\)"),
    "no rows": (torch.ones(0, 4), r"\(0, 4\)"),
    "no columns": (torch.ones(4, 0), r"\(4, 0\)"),
}


@pytest.mark.usefixtures("unchecked")
def test_an_array_of_another_library_is_refused_in_one_line():
    for call in (lambda W: decompose(W, name="query"), lambda W: low_rank_svd(W, torch.eye(3), name="query")):
        with pytest.raises(InputError, match=r"^query: got ndarray; want a torch tensor, as torch.as_tensor makes"):
            call(np.eye(3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("W", "got"), BAD.values(), ids=BAD)
def test_what_is_no_matrix_is_refused_in_one_line(W, got):
    with pytest.raises(InputError, match=rf"^block\.3\.query: got .*{got}.*; want a floating-point matrix") as e:
        decompose(W, name="block.3.query")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("ranks", [0, -1, 5])
def test_ranks_that_do_not_exist_are_refused(ranks):
    with pytest.raises(InputError, match=rf"query: got ranks = {ranks} for a matrix \(4, 6\); want 1 … 4"):
        decompose(torch.ones(4, 6), ranks, name="query")


# --- the value type ----------------------------------------------------------------------------------------------


def test_intervals_and_cores():
    W = gaussian(8, 6)
    d = decompose(W)
    middle = d.interval(2, 5)
    assert torch.equal(middle.S, d.S[2:5])
    assert torch.equal(middle.bound, d.bound[2:5])
    assert torch.equal(middle.relative_gap, d.relative_gap[2:5])
    assert torch.equal(middle.spectrum, d.spectrum)
    slack = rounding(W.shape, float(d.S[0]))
    parts = d.truncate(2).matrix() + middle.matrix() + d.interval(5, 6).matrix()
    assert float((parts - W).abs().max()) <= slack
    assert float((d.core(W) - torch.diag(d.S)).abs().max()) <= slack
    X = gaussian(8, 6, 1)
    naive = [[float(d.U[:, i] @ X @ d.Vh[j]) for j in range(6)] for i in range(6)]
    assert torch.allclose(
        d.core(X), torch.tensor(naive, dtype=torch.float64), rtol=0, atol=rounding(X.shape, float(X.norm()))
    )
    assert d.core(X.bfloat16()).dtype == torch.float64


@pytest.mark.parametrize(("k", "m"), [(0, 0), (2, 1), (-1, 2), (0, 5), (4, 5)])
def test_an_interval_outside_of_the_ranks_is_refused(k, m):
    with pytest.raises(InputError, match=rf"interval \[{k}, {m}\) is not inside the 4 ranks"):
        decompose(gaussian(4, 6)).interval(k, m)


# --- differences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mine", "theirs"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_a_difference_is_subtracted_in_float64(mine, theirs, shape, monkeypatch):
    monkeypatch.setattr("specbasis.core.blocks.BLOCK_BYTES", 8 * 9 * 4)  # blocks of 4 columns
    W, base = gaussian(*shape).to(mine), gaussian(*shape, 1).to(theirs)
    a, b = decompose(W, minus=base), decompose(W.double() - base.double())
    for field in dataclasses.fields(a):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_a_difference_of_eight_bit_floats_is_exact():
    W, base = gaussian(5, 6).to(torch.float8_e4m3fn), gaussian(5, 6, 1).to(torch.float8_e5m2)
    assert torch.equal(decompose(W, minus=base).S, decompose(W.double() - base.double()).S)


def test_no_difference_is_the_zero_matrix():
    W = gaussian(5, 6)
    assert (decompose(W, minus=W).S == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_entry_in_what_is_subtracted_is_found(value):
    base = gaussian(5, 6)
    base[4, 5] = value
    with pytest.raises(NonFiniteError, match=r"query: 1 of 30 entries"):
        decompose(gaussian(5, 6), minus=base, name="query")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("base", [torch.ones(6, 5), torch.ones(5, 1), torch.ones(6)])
def test_what_cannot_be_subtracted_is_refused(base):
    with pytest.raises(InputError, match=r"^query: got "):
        decompose(torch.ones(5, 6), minus=base, name="query")


# --- one side held, the other implied ----------------------------------------------------------------------------

LEADING = torch.linspace(5, 0.05, 60)
SPECTRA = {
    "bulk": torch.linspace(2, 0.5, 64),
    "all above the share": log_spectrum(IMPLIED * 1.01, 64),
    "a short tail": torch.cat([LEADING, torch.tensor([1e-2, 1e-3, 1e-5, 1e-6])]),
    "a long tail": log_spectrum(1e-9, 64),
    "rank deficient": torch.cat([LEADING, torch.zeros(4)]),
}


@pytest.mark.parametrize("shape", [(64, 150), (150, 64), (64, 64)])
@pytest.mark.parametrize("S", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("ranks", [64, 40])
def test_cosines_through_the_short_side_are_those_of_the_vectors(shape, S, ranks):
    W = with_spectrum(S, *shape)
    T = W + 0.05 * float(S[-8]) * gaussian(*shape, 3) / math.sqrt(sum(shape))
    (a, b), (da, db) = ([f(X, ranks) for X in (W, T)] for f in (half_svd, decompose))
    numpys = [np.linalg.svd(X.numpy(), full_matrices=False) for X in (W, T)]
    for side in ("left", "right"):
        c = cosines(a, b, side)
        (Xa, Xb) = (torch.from_numpy(U if side == "left" else Vh.T)[:, :ranks] for U, _, Vh in numpys)
        exact = (Xa * Xb).sum(0).abs()
        resolved = (bound := math.pi / math.sqrt(2) * (a.bound + b.bound) + c.error) < 1e-6
        # numpy's own vectors are off by rounding over the gap as well.
        own = rounding(shape, float(S[0])) / torch.minimum(a.gap, b.gap)
        assert ((c.diagonal.abs() - exact).abs() <= bound + own)[resolved].all()
        assert ((c.diagonal.abs() - exact).abs()[resolved] <= 1e-9).all()
        whole = da.vectors(side).mT @ db.vectors(side)
        # Vectors of one Gram matrix twice: only the way to the product differs.
        error = torch.maximum(c.error[:, None], c.error[None, :]) + rounding(shape)
        assert ((c.matrix().abs() - whole.abs()).abs() <= error)[resolved][:, resolved].all()
        torch.testing.assert_close(c.matrix().diagonal(), c.diagonal, rtol=0, atol=rounding(shape))


def test_the_leading_ranks_are_implied_where_that_is_cheaper():
    W = with_spectrum(SPECTRA["a short tail"], 64, 150)
    assert half_svd(W, 64).head == 60
    assert half_svd(W, 32).head == 0  # half of the ranks or fewer: the vectors themselves are cheaper
    assert half_svd(with_spectrum(SPECTRA["a long tail"], 64, 150), 64).head == 0


@pytest.mark.parametrize("shape", [(64, 150), (150, 64), (64, 64)])
@pytest.mark.parametrize("S", SPECTRA.values(), ids=SPECTRA)
def test_implied_vectors_are_orthonormal_once_they_are_formed(shape, S):
    half = half_svd(with_spectrum(S, *shape), 64)
    for side in ("left", "right"):
        assert off_orthonormal(half.vectors(side)) <= rounding(shape)
    W = with_spectrum(S, *shape)
    assert float((half.svd().matrix() - W).norm()) <= rounding(shape, float(W.norm()))


@pytest.mark.parametrize("shape", [(10, 24), (24, 10), (16, 16)])
@pytest.mark.parametrize("smallest", [0.5, 1e-2, 2e-3, 1e-5])
def test_values_alone_are_the_same_values_and_as_sure(shape, smallest):
    W = with_spectrum(log_spectrum(smallest, min(shape)), *shape)
    values, S = half_svd(W, 0), exact_svd(W)[1]
    assert values.X.shape[1] == len(values.S) == len(values.gap) == 0
    assert (value_errors(values, S) <= values.spectrum_error.numpy()).all()
    assert float(values.spectrum_error.max()) <= rounding(W.shape, float(S[0])) / DEFLATE


@pytest.mark.parametrize("shape", [(200, 320), (320, 200), (200, 200)])
@pytest.mark.parametrize("implied", [False, True])
def test_residuals_measured_with_probes_bound_the_true_ones(shape, implied):
    """More rows than probes, so that every residual is a statement about chance, and none may be too small."""
    assert min(shape) > PROBES
    for seed in range(3):
        W = weight_like(*shape, seed=seed)
        half = half_svd(W, 200, implied=implied)
        assert bool(half.head) == implied
        true = true_residuals(W, half.svd())
        assert (half.residual.numpy() >= true).all()
        assert (half.residual <= 40 * rounding(shape, float(half.S[0])) * half.S[0] / half.S).all()


def test_a_matrix_of_zeros_takes_no_eigensolver(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)
    d = decompose(torch.zeros(4, 7), 3)
    assert d.S.tolist() == [0, 0, 0]
    assert off_orthonormal(d.U) == off_orthonormal(d.Vh.mT) == 0
    assert d.spectrum.tolist() == [0] * 4


@pytest.mark.parametrize("shape", [(64, 200), (200, 64)])
@pytest.mark.parametrize("kind", ["gaussian", "equal", "deep"])
def test_a_subset_of_eigenvectors_gives_the_same_ranks(monkeypatch, shape, kind):
    """One reduction, all values, few vectors; where values need deflation the whole solver is taken."""
    S = {"gaussian": None, "equal": torch.tensor([2.0] * 4 + [1.0] * 60), "deep": torch.logspace(0, -9, 64)}[kind]
    W = gaussian(*shape) if S is None else with_spectrum(S.double(), *shape)
    whole = decompose(W, 8)
    seen = []
    real = torch.linalg.eigh
    monkeypatch.setattr("specbasis.core.gram.SUBSET_SIDE", 32)
    monkeypatch.setattr("torch.linalg.eigh", lambda *a, **k: (seen.append(1), real(*a, **k))[1])
    subset = decompose(W, 8)
    assert bool(seen) == (kind == "deep")
    assert off_orthonormal(subset.U) <= 64 * EPS
    assert off_orthonormal(subset.Vh.mT) <= 64 * EPS
    assert bool(((subset.spectrum - whole.spectrum).abs() <= subset.spectrum_error + whole.spectrum_error).all())
    separate = torch.isfinite(subset.bound) & torch.isfinite(whole.bound)
    apart = (1 - (subset.U * whole.U).sum(dim=0).square()).clamp(min=0).sqrt()
    assert bool((apart <= 2 * (subset.bound + whole.bound) + 1e-7)[separate].all())
    residual = torch.linalg.norm(W @ subset.Vh.mT - subset.U * subset.S, dim=0)
    assert bool((residual <= subset.residual).all())
