"""Every measure against its definition, transcribed naively from other people's decompositions, and its bounds."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from specbasis import decompose, low_rank_svd
from specbasis.core.spectrum import effective_rank, explained_variance, stable_rank
from specbasis.core.subspace import alignment, alignment_bound, subspace_bound
from specbasis.measures.measure import RESOLVED
from specbasis.measures.table import measure_all, module, table
from specbasis.measures.triple import Triple
from tests.helpers import naive
from tests.helpers.exact import exact_svd
from tests.helpers.matrices import (
    gaussian,
    hadamard,
    log_spectrum,
    orthonormal,
    rotated,
    weight_like,
    with_spectrum,
)
from tests.helpers.tolerance import rounding

# Those that two decompositions and the entries' sums are enough for.
KINDS = tuple(f"specbasis.measures.{kind}" for kind in ("alignment", "values", "update"))
MEASURES = [measure for measure in table() if module(measure).__name__ in KINDS]
NAMES = [measure.name for measure in MEASURES]


def triple(base, tuned, ranks=None, subspace=10):
    base, tuned = base.double(), tuned.double()
    return Triple(
        decompose(base, ranks),
        decompose(tuned, ranks),
        decompose(tuned - base, ranks),
        float((base * tuned).sum()),
        subspace,
    )


def frozen(W, ranks=None):
    d = decompose(W, ranks)
    return Triple(d, d, decompose(torch.zeros_like(W), ranks), float(W.double().square().sum()))


def measured(t):
    return {measure.name: values for measure, values in measure_all(t, MEASURES)}


@st.composite
def finetunes(draw):
    """A weight and what a finetune of any strength makes of it."""
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    base = gaussian(rows, columns, draw(st.integers(0, 499)))
    strength = draw(st.sampled_from([1e-6, 1e-2, 1.0, 100.0]))
    return base, base + strength * gaussian(rows, columns, draw(st.integers(500, 999)))


# --- the definitions ---------------------------------------------------------------------------------------------


def reference(base, tuned, subspace):
    """All figures of two matrices, from numpy's decompositions and naive transcriptions."""
    delta = tuned - base
    (Ub, Sb, Vb), (Ut, St, Vt), (Ud, Sd, Vd) = (np.linalg.svd(W, full_matrices=False) for W in (base, tuned, delta))
    Vb, Vt, Vd = Vb.T, Vt.T, Vd.T
    k = len(Sb)
    sizes = sorted({*(2**p for p in range(10) if 2**p <= k), k})
    few = min(k, subspace)
    out = {
        "alignment_left": naive.alignment(Ub, Ut),
        "alignment_right": naive.alignment(Vb, Vt),
        "update_alignment_left": naive.alignment(Ud, Ub),
        "update_alignment_right": naive.alignment(Vd, Vb),
        "subspace_overlap_left": [naive.overlap(Ub, Ut, size) for size in sizes],
        "subspace_overlap_right": [naive.overlap(Vb, Vt, size) for size in sizes],
        "principal_angle_left": np.arccos(np.linalg.svd(Ub[:, :few].T @ Ut[:, :few])[1].clip(0, 1)),
        "principal_angle_right": np.arccos(np.linalg.svd(Vb[:, :few].T @ Vt[:, :few])[1].clip(0, 1)),
        "singular_value_base": Sb,
        "singular_value_tuned": St,
        "singular_value_delta": Sd,
        "singular_value_change": naive.relative_change(Sb, St),
        "singular_value_ratio": naive.ratio(Sb, Sd),
        "explained_variance_base": naive.explained_variance(Sb, base),
        "explained_variance_tuned": naive.explained_variance(St, tuned),
        "explained_variance_delta": naive.explained_variance(Sd, delta),
        "rsd": naive.rsd(Sb, St),
        "mrc": naive.mrc(Sb, St),
        "max_rc": naive.max_rc(Sb, St),
        "t1_rc": naive.t1_rc(Sb, St),
        "tail_rc": naive.tail_rc(Sb, St),
        "effective_rank_base": naive.effective_rank(Sb),
        "effective_rank_tuned": naive.effective_rank(St),
        "effective_rank_delta": naive.effective_rank(Sd),
        "stable_rank_base": naive.stable_rank(base),
        "stable_rank_tuned": naive.stable_rank(tuned),
        "stable_rank_delta": naive.stable_rank(delta),
        "norm_base": np.linalg.norm(base),
        "norm_tuned": np.linalg.norm(tuned),
        "norm_delta": np.linalg.norm(delta),
        "relative_update": np.linalg.norm(delta) / np.linalg.norm(base),
        "weight_cosine": naive.weight_cosine(base, tuned),
    }
    for name, S in (("base", Sb), ("tuned", St)):
        null = base.shape[0] != base.shape[1]
        others = [[abs(s - o) for j, o in enumerate(S) if j != i] + [s] * (null or k == 1) for i, s in enumerate(S)]
        out[f"relative_gap_{name}"] = [min(o) / s for o, s in zip(others, S, strict=True)]
    for side, d in (("left", base.shape[0]), ("right", base.shape[1])):
        # |cos θ| of uniform vectors has the density sin^(d−2): a ratio of integrals, closed by the beta function.
        out[f"chance_alignment_{side}"] = float(2 / (d - 1) / mpmath.beta(0.5, (d - 1) / 2)) if d > 1 else 1.0
    return {name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in out.items()}, sizes


@pytest.mark.parametrize("shape", [(24, 24), (20, 33), (33, 20), (5, 12), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_every_figure_is_its_definition(shape, strength):
    base = weight_like(*shape, outliers=min(3, *shape)).double()
    tuned = base + strength * gaussian(*shape, 5) / sum(shape)
    t = triple(base, tuned, subspace=6)
    found = measured(t)
    expected, sizes = reference(base.numpy(), tuned.numpy(), 6)
    assert set(found) == set(expected) == set(NAMES)
    # Vectors and values are off by rounding over the smallest gap or value that a figure divides by.
    least = min(float(s.gap.min()) for s in (t.base, t.tuned, t.delta)) / max(float(t.tuned.S[0]), 1)
    tolerance = rounding(shape, 100, gap=least)
    for name, values in found.items():
        at = values.value.numpy()
        allowed = math.sqrt(tolerance) if name.startswith("principal_angle") else tolerance  # arccos near 1
        assert at == pytest.approx(expected[name], rel=tolerance, abs=allowed), name
        if name.startswith("subspace_overlap"):
            assert values.index == sizes


def test_fewer_ranks_give_the_head_of_the_vectors_and_all_values():
    base = weight_like(30, 40)
    tuned = base + 0.01 * weight_like(30, 40, seed=3)
    part, whole = measured(triple(base, tuned, 12)), measured(triple(base, tuned))
    for name in NAMES:
        a, b = part[name].value, whole[name].value
        if "overlap" in name:
            assert part[name].index == [1, 2, 4, 8, 12]
            shared = [i for i, size in enumerate(part[name].index) if size in whole[name].index]
            a, b = a[shared], b[[whole[name].index.index(part[name].index[i]) for i in shared]]
        if name.startswith(("alignment", "update", "relative_gap")):
            assert len(a) == 12
            b = b[:12]
        assert a.numpy() == pytest.approx(b.numpy(), abs=1e-9, rel=1e-9), name


def test_the_table_is_sound():
    assert len(set(NAMES)) == len(NAMES)
    t = triple(gaussian(6, 9), gaussian(6, 9, 1), subspace=4)
    for measure, values in measure_all(t, MEASURES):
        assert values.value.dtype == torch.float64
        assert values.value.ndim == 1
        assert measure.title
        assert measure.formula
        if values.bound is not None:
            assert values.bound.shape == values.value.shape, measure.name
            assert (values.bound >= 0).all(), measure.name
        lengths = {"rank": 6, "k": 4, "angle": 4, "": 1}
        assert len(values.value) == lengths[measure.index], measure.name
        assert (values.index is not None) == (measure.index == "k"), measure.name


# --- prescribed rotations ----------------------------------------------------------------------------------------


def test_prescribed_rotations_come_back_as_alignments_angles_and_overlaps():
    angles = torch.tensor([0.0, 0.1, 0.5, 1.0, 1.5, math.pi / 2], dtype=torch.float64)
    S = torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=torch.float64)
    U, V = orthonormal(20, 6, 1), orthonormal(15, 6, 2)
    base, tuned = (U * S) @ V.mT, (rotated(U, angles) * S) @ V.mT
    found = measured(triple(base, tuned, 6, subspace=6))
    tolerance = rounding((20, 15), 6, gap=1) / 1e-1
    cosines = angles.cos()
    assert found["alignment_left"].value.tolist() == pytest.approx(cosines.tolist(), abs=tolerance)
    assert found["alignment_right"].value.tolist() == pytest.approx([1.0] * 6, abs=tolerance)
    assert found["principal_angle_left"].value.tolist() == pytest.approx(angles.tolist(), abs=tolerance)
    assert found["principal_angle_right"].value.tolist() == pytest.approx([0.0] * 6, abs=tolerance)
    for values in (found["subspace_overlap_left"], found["subspace_overlap_right"]):
        assert values.index == [1, 2, 4, 6]
    expected = [float(cosines[:k].square().mean()) for k in (1, 2, 4, 6)]
    assert found["subspace_overlap_left"].value.tolist() == pytest.approx(expected, abs=tolerance)
    assert found["singular_value_change"].value[:6].tolist() == pytest.approx([0.0] * 6, abs=tolerance)
    for name in ("alignment_left", "alignment_right", "subspace_overlap_left", "principal_angle_left"):
        assert float(found[name].bound.max()) <= 50 * tolerance


def test_a_swap_of_two_ranks_is_seen_by_the_alignment_and_not_by_the_overlap():
    U, V = orthonormal(9, 3, 1), orthonormal(8, 3, 2)
    base, tuned = (U * torch.tensor([3.0, 2, 1])) @ V.mT, (U * torch.tensor([2.0, 3, 1])) @ V.mT
    found = measured(triple(base, tuned, 3))
    tolerance = rounding((9, 8), 3, gap=1) * 10
    assert found["alignment_left"].value.tolist() == pytest.approx([0, 0, 1], abs=tolerance)
    assert found["subspace_overlap_left"].value.tolist() == pytest.approx([0, 1, 1], abs=tolerance)


@given(finetunes())
def test_signs_change_nothing(pair):
    base, tuned = pair
    t, flipped = triple(base, tuned), triple(-base, -tuned)
    a, b = measured(t), measured(flipped)
    assert set(a) == set(b)
    for name, values in a.items():
        # Flipping a sign is exact, but may change how LAPACK's reflections round.
        tolerance = rounding(base.shape) if name.startswith("principal_angle") else 0
        assert float((values.value - b[name].value).abs().max()) <= tolerance, name


@given(finetunes(), st.sampled_from([0.5, 2.0, 1024.0]))
def test_only_figures_with_the_unit_of_a_weight_follow_its_scale(pair, scale):
    base, tuned = pair
    a, b = measured(triple(base, tuned)), measured(triple(base * scale, tuned * scale))
    units = {measure.name: measure.unit for measure in MEASURES}
    for name, values in a.items():
        factor = scale if units[name] == "weight" else 1.0
        assert (values.value * factor).numpy() == pytest.approx(b[name].value.numpy(), rel=1e-14), name


@given(finetunes())
def test_figures_stay_in_their_ranges(pair):
    t = triple(*pair)
    for name, values in measured(t).items():
        low, high = {"principal_angle": (0, math.pi / 2), "weight_cosine": (-1, 1)}.get(
            name.rsplit("_", 1)[0] if name.startswith("principal") else name, (0, math.inf)
        )
        if name.startswith(("alignment", "update_alignment", "subspace")):
            high = 1
        if name.startswith("chance"):
            high = 1 + rounding((1,))
        if name.startswith("explained"):
            high = 1
            assert float(values.value[-1]) == 1
        if name in ("singular_value_change", "t1_rc", "tail_rc"):
            low = -1
        assert not values.value.isnan().any(), name
        assert float(values.value.min()) >= low, name
        assert float(values.value.max()) <= high, name
    n = len(t.base.spectrum)
    for rank in (effective_rank, stable_rank):
        assert 1 - rounding((n,)) <= rank(t.base.spectrum) <= n + rounding((n,), n)


@given(finetunes(), st.integers(0, 99))
def test_orthogonal_changes_of_basis_change_nothing(pair, seed):
    """Q W R for both matrices: every figure is one of angles and values, so none moves by more than its error."""
    base, tuned = pair
    Q, R = orthonormal(base.shape[0], base.shape[0], seed), orthonormal(base.shape[1], base.shape[1], seed + 1)
    t, turned = triple(base, tuned), triple(Q @ base @ R, Q @ tuned @ R)
    a, b = measured(t), measured(turned)
    for name in ("alignment_left", "alignment_right", "subspace_overlap_left", "subspace_overlap_right"):
        # The products round once more, as much as a decomposition may.
        slack = [
            rounding(base.shape, 10 * float(s.S[0]), gap=max(float(s.gap.min()), 1e-300)) for s in (t.base, t.tuned)
        ]
        allowed = a[name].bound + b[name].bound + 10 * sum(slack)
        assert ((a[name].value - b[name].value).abs() <= allowed).all(), name


# --- equal singular values ---------------------------------------------------------------------------------------


def test_inside_equal_singular_values_the_alignment_is_unresolved_and_the_overlap_stands():
    """Two groups of four equal values; tuned turns the vectors inside of each group, so W does not change."""
    H = hadamard(8) / math.sqrt(8)
    S = torch.tensor([3.0] * 4 + [1.0] * 4, dtype=torch.float64)
    turn = torch.block_diag(orthonormal(4, 4, 1), orthonormal(4, 4, 2))
    U, V = H[:, :8], orthonormal(11, 8, 3)
    base = (U * S) @ V.mT
    tuned = ((U @ turn) * S) @ (V @ turn).mT + 1e-14 * gaussian(8, 11)
    t = triple(base, tuned)
    found = measured(t)
    for side in ("left", "right"):
        assert (found[f"alignment_{side}"].bound > RESOLVED).all()
        assert float(found[f"alignment_{side}"].value.min()) < 0.9  # what a reader would take for a change
        overlap = found[f"subspace_overlap_{side}"]
        at = dict(zip(overlap.index, zip(overlap.value.tolist(), overlap.bound.tolist(), strict=True), strict=True))
        for k in (4, 8):  # whole groups
            assert at[k][0] == pytest.approx(1, abs=1e-12)
            assert at[k][1] < RESOLVED
        for k in (1, 2):  # parts of one
            assert at[k][1] > RESOLVED


# --- bounds, against 45 digits -----------------------------------------------------------------------------------


def exact_figures(base, tuned, k):
    with mpmath.workdps(45):
        (Ub, Sb, Vb), (Ut, St, Vt) = exact_svd(base), exact_svd(tuned)
        delta = mpmath.matrix(tuned.tolist()) - mpmath.matrix(base.tolist())
        wide = delta.rows < delta.cols
        Sd = mpmath.svd_r(delta.T if wide else delta, compute_uv=False)
        out = {
            "singular_value_change": [(t - b) / b for b, t in zip(Sb, St, strict=True)],
            "singular_value_ratio": [d / b for b, d in zip(Sb, Sd, strict=True)],
        }
        for side, X, Y in (("left", Ub, Ut), ("right", Vb, Vt)):
            C = X[:, : len(Sb)].T * Y[:, : len(Sb)]
            n = len(Sb)
            sizes = sorted({*(2**p for p in range(10) if 2**p <= n), n})
            out[f"alignment_{side}"] = [abs(C[i, i]) for i in range(n)]
            out[f"subspace_overlap_{side}"] = [
                sum(C[i, j] ** 2 for i in range(size) for j in range(size)) / size for size in sizes
            ]
            cosines = mpmath.svd_r(C[:k, :k], compute_uv=False)
            out[f"principal_angle_{side}"] = [mpmath.acos(min(c, 1)) for c in cosines]
        return {name: np.array([float(v) for v in values]) for name, values in out.items()}


HARD = {
    "plain": gaussian(6, 5),
    "wide": gaussian(4, 7),
    "near-degenerate": with_spectrum([1, 0.5 + 1e-9, 0.5, 0.5 - 1e-11, 1e-3], 5, 6),
    "closer than rounding": with_spectrum([1, 2e-3 + 1e-15, 2e-3, 1e-4], 4, 6),
    "decades": with_spectrum(log_spectrum(1e-10, 5), 5, 5),
    "square and nearly singular": with_spectrum([1, 0.3, 1e-15], 3, 3),
}


@pytest.mark.parametrize("strength", [1e-10, 1e-3])
@pytest.mark.parametrize("base", HARD.values(), ids=HARD)
def test_no_figure_is_further_off_than_its_bound(base, strength):
    tuned = base + strength * gaussian(*base.shape, 9)
    k = 3
    found = measured(triple(base, tuned, subspace=k))
    for name, exact in exact_figures(base, tuned, k).items():
        values = found[name]
        rounded = rounding(base.shape, 1 + np.abs(exact).max())  # of forming the figure itself
        if name == "singular_value_ratio":  # tuned − base rounds once
            rounded += rounding(base.shape, float(tuned.norm() / max(decompose(base).S[-1], 1e-300)))
        assert (np.abs(values.value.numpy() - exact) <= values.bound.numpy() + rounded).all(), name


@pytest.mark.parametrize("strength", [1e-10, 1e-3])
def test_bounds_are_small_where_there_is_a_gap(strength):
    base = weight_like(64, 96)
    found = measured(triple(base, base + strength * gaussian(64, 96, 3)))
    for name in ("alignment_left", "alignment_right", "subspace_overlap_left", "principal_angle_right"):
        assert float(found[name].bound.max()) < RESOLVED


def test_the_bound_of_a_subspace_knows_what_lies_outside():
    """A product of rank 2 has all of its ranks listed, and yet its two vectors are not the whole space."""
    B, A = gaussian(6, 2), gaussian(2, 6, 1)
    product, whole = subspace_bound(low_rank_svd(B, A)), subspace_bound(decompose(gaussian(6, 6)))
    assert float(product[-1]) > 0
    assert float(whole[-1]) == 0
    assert float(subspace_bound(decompose(gaussian(6, 6), 5))[-1]) > 0
    assert float(subspace_bound(decompose(gaussian(4, 6)))[-1]) > 0


def test_the_bound_of_a_subspace_takes_no_rounding_for_a_gap():
    W = torch.kron(torch.eye(2), gaussian(3, 4).round())  # every singular value twice
    bound = subspace_bound(decompose(W))
    assert (bound[::2] > RESOLVED).all()
    assert (bound[1::2] < RESOLVED).all()
    assert (alignment_bound(decompose(W), decompose(W)) == 1).all()


# --- frozen, zero and deficient matrices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "W",
    [
        weight_like(20, 30),
        gaussian(7, 7).bfloat16(),
        hadamard(8),
        torch.eye(5),
        gaussian(5, 2) @ gaussian(2, 6, 1),
        gaussian(1, 4),
        gaussian(4, 1),
        gaussian(1, 1),
    ],
)
@pytest.mark.parametrize("ranks", [None, 1])
def test_a_frozen_matrix_is_exactly_unchanged(W, ranks):
    t = frozen(W, ranks)
    found = measured(t)
    assert t.identical
    ones = ("alignment_left", "alignment_right", "subspace_overlap_left", "subspace_overlap_right", "weight_cosine")
    zeros = ("principal_angle_left", "principal_angle_right", "singular_value_change", "singular_value_ratio")
    changes = ("rsd", "mrc", "max_rc", "t1_rc", "tail_rc", "relative_update", "norm_delta")
    for name in ones:
        assert (found[name].value == 1).all(), name
    for name in (*zeros, *changes, "singular_value_delta"):
        assert (found[name].value == 0).all(), name
    for name in (*ones[:4], *zeros[:3]):
        assert (found[name].bound == 0).all(), name
    # A zero update has no directions and no energy, and says so by leaving these out.
    assert set(NAMES) - set(found) == {
        "update_alignment_left",
        "update_alignment_right",
        "explained_variance_delta",
    }
    for side in ("base", "tuned"):
        assert torch.equal(found[f"singular_value_{side}"].value, t.base.spectrum)


@pytest.mark.parametrize("which", ["base", "tuned", "both"])
def test_directions_of_a_zero_matrix_are_left_out(which):
    zero, W = torch.zeros(4, 6), gaussian(4, 6)
    base, tuned = {"base": (zero, W), "tuned": (W, zero), "both": (zero, zero)}[which]
    found = measured(triple(base, tuned))
    for name in ("alignment_left", "alignment_right", "subspace_overlap_left", "principal_angle_right"):
        assert name not in found
    assert ("update_alignment_left" in found) == (which == "tuned")
    change = found["singular_value_change"].value
    assert (change == {"base": math.inf, "tuned": -1.0, "both": 0.0}[which]).all()


def test_a_zero_matrix_has_no_ranks():
    zero = torch.zeros(3, dtype=torch.float64)
    assert math.isnan(effective_rank(zero))
    assert math.isnan(stable_rank(zero))


def test_ranks_and_shares_in_closed_form():
    equal = torch.full((8,), 0.3, dtype=torch.float64)
    assert effective_rank(equal) == pytest.approx(8, rel=1e-14)
    assert stable_rank(equal) == pytest.approx(8, rel=1e-14)
    assert explained_variance(equal).tolist() == pytest.approx([(i + 1) / 8 for i in range(8)], rel=1e-14)
    one = torch.tensor([5.0, 0, 0], dtype=torch.float64)
    assert effective_rank(one) == stable_rank(one) == 1
    assert explained_variance(one).tolist() == [1, 1, 1]


def test_alignment_takes_the_ranks_both_have():
    X, Y = orthonormal(9, 5, 1), orthonormal(9, 3, 2)
    expected = np.array(naive.alignment(X.numpy(), Y.numpy()))
    assert alignment(X, Y).numpy() == pytest.approx(expected, abs=rounding(X.shape))
    assert alignment(Y, X).numpy() == pytest.approx(expected, abs=rounding(X.shape))


def test_a_rank_one_update_is_seen_where_it_was_made():
    """delta = c·u₂ v₂ᵀ of base: its first vectors are the third pair of base, and only that value moves."""
    base = with_spectrum([5.0, 4, 3, 2], 7, 6)
    d = decompose(base, 4)
    tuned = base + 0.25 * torch.outer(d.U[:, 2], d.Vh[2])
    t = triple(base, tuned, 4)
    found = measured(t)
    tolerance = rounding((7, 6), 5, gap=0.25) * 10
    assert found["alignment_left"].value.tolist() == pytest.approx([1.0] * 4, abs=tolerance)
    assert found["singular_value_change"].value[:4].tolist() == pytest.approx([0, 0, 0.25 / 3, 0], abs=tolerance)
    assert found["t1_rc"].value.tolist() == pytest.approx([0], abs=tolerance)
    assert found["singular_value_ratio"].value[:1].tolist() == pytest.approx([0.05], abs=tolerance)
    assert found["update_alignment_left"].value[:1].tolist() == pytest.approx([0], abs=tolerance)
    assert abs(float(t.delta.U[:, 0] @ d.U[:, 2])) == pytest.approx(1, abs=tolerance)
    assert found["relative_update"].value.tolist() == pytest.approx([0.25 / math.sqrt(54)], abs=tolerance)
