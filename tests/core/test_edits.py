"""Edits of one matrix against a naive transcription of the paper's replacement and masking."""

import pytest
import torch
from hypothesis import given, strategies as st

from specbasis import InputError, decompose
from specbasis.core.columns import random_orthonormal
from specbasis.core.edits import (
    KINDS,
    Edit,
    keep,
    mask,
    noise_like,
    randomise,
    replace,
    replace_values,
    rescale,
    truncate,
    whole_groups,
)
from specbasis.core.ranks import rank_set
from tests.helpers.matrices import gaussian, off_orthonormal, orthonormal, rotated, weight_like, with_spectrum
from tests.helpers.tolerance import rounding

SHAPES = [(24, 16), (16, 24), (20, 20)]


def pair(out, into, seed=0, dtype=torch.float32):
    W = weight_like(out, into, seed, outliers=3).to(dtype)
    T = (W + 0.1 * W.std() * gaussian(out, into, seed + 9).to(dtype)).to(dtype)
    return W, T


def naive_replace(T, base, tuned, ranks, sides="both"):
    """Yu et al. 2026, App. G: U S Vh with some columns of U and rows of Vh from base, signs made to agree."""
    U, Vh = tuned.U.clone(), tuned.Vh.clone()
    for i in ranks:
        u, v = base.U[:, i], base.Vh[i]
        agree_u, agree_v = float(u @ tuned.U[:, i]), float(v @ tuned.Vh[i])
        agree = {"both": agree_u + agree_v, "left": agree_u, "right": agree_v}[sides]
        sign = -1 if agree < 0 else 1
        if sides != "right":
            U[:, i] = sign * u
        if sides != "left":
            Vh[i] = sign * v
    return U @ torch.diag(tuned.S) @ Vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("ranks", [1, 5, "all", "3:9", [0, 7, 11]])
def test_replacement_is_the_naive_transcription(shape, sides, ranks):
    W, T = pair(*shape)
    base, tuned = decompose(W), decompose(T)
    chosen = rank_set(ranks, len(tuned.S)).tolist()
    expected = naive_replace(T, base, tuned, chosen, sides)
    found = replace(T, tuned, base, ranks, sides=sides)
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(shape, float(tuned.S[0])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_edits_that_change_nothing_return_the_stored_bits(dtype):
    _, T = pair(20, 14, dtype=dtype)
    T[3, 4] = -0.0
    s = decompose(T)
    unchanged = [
        replace(T, s, s, "all"),
        replace(T, s, s, 5, sides="left"),
        replace(T, s, s, "all", groups=0.5),
        replace(T, s, s, []),
        mask(T, s, []),
        keep(T, s, "all"),
        truncate(T, s, len(s.S)),
        rescale(T, s, 6, 1.0),
        replace_values(T, s, s, "all"),
        randomise(T, s, []),
        noise_like(T, T),
    ]
    for found in unchanged:
        assert torch.equal(found.to(dtype).view(torch.uint8), T.view(torch.uint8))
        assert found.data_ptr() != T.data_ptr()


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**30), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_mask_and_its_complement_are_the_matrix_bit_for_bit(out, into, seed, dtype):
    W = gaussian(out, into, seed).to(dtype)
    s = decompose(W)
    chosen = [i for i in range(len(s.S)) if (seed >> (i % 30)) & 1]
    rest = [i for i in range(len(s.S)) if i not in chosen]
    assert torch.equal(mask(W, s, chosen) + mask(W, s, rest), W.double())
    assert torch.equal(keep(W, s, chosen), mask(W, s, rest))
    part = (s.U[:, chosen] * s.S[chosen]) @ s.Vh[chosen]
    torch.testing.assert_close(keep(W, s, chosen), part, rtol=0, atol=rounding(W.shape, float(s.S[0])))


def test_masking_everything_is_zero_and_truncation_is_the_best_approximation():
    W = weight_like(18, 30)
    s = decompose(W)
    assert not mask(W, s, "all").any()
    for k in (1, 9, 17):
        error = float((truncate(W, s, k) - W.double()).norm()) ** 2
        assert error == pytest.approx(float(s.S[k:].square().sum()), rel=1e-9)
    assert torch.equal(mask(W, s, -4), truncate(W, s, 14))


def test_signs_of_what_is_put_in_do_not_matter():
    W, T = pair(16, 12)
    base, tuned = decompose(W), decompose(T)
    flips = torch.tensor([1.0, -1.0]).double().repeat(6)
    flipped = type(base)(**{**vars(base), "U": base.U * flips, "Vh": base.Vh * flips[:, None]})
    for sides in ("both", "left", "right"):
        assert torch.equal(replace(T, tuned, base, 8, sides=sides), replace(T, tuned, flipped, 8, sides=sides))


def test_one_side_is_signed_by_its_own_agreement():
    # u' = −u, v' = v: the joint sign is undecided, the left one alone is not.
    W = with_spectrum([3.0, 2.0, 1.0], 8, 6)
    s = decompose(W)
    U = s.U.clone()
    U[:, 0] *= -1
    odd = type(s)(**{**vars(s), "U": U})
    torch.testing.assert_close(replace(W, s, odd, 1, sides="left"), W, rtol=0, atol=rounding(W.shape, 3.0))
    torch.testing.assert_close(replace(W, s, odd, 1, sides="right"), W, rtol=0, atol=rounding(W.shape, 3.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_random_vectors_in_the_complement_keep_an_svd_and_plain_ones_do_not(shape):
    _, T = pair(*shape)
    s = decompose(T)
    kept = randomise(T, s, 5, seed=3, complement=True)
    torch.testing.assert_close(decompose(kept).S, s.S, rtol=0, atol=rounding(shape, float(s.S[0])))
    plain = decompose(randomise(T, s, 5, seed=3))
    assert float((plain.S - s.S).abs().max()) > 0.01 * float(s.S[0])
    # What goes in has the old singular values and is orthonormal in both cases.
    for found in (kept, randomise(T, s, 5, seed=3)):
        part = decompose(found - keep(T, s, f"5:{len(s.S)}"))
        torch.testing.assert_close(part.S[:5], s.S[:5], rtol=0, atol=rounding(shape, float(s.S[0])))
    assert torch.equal(kept, randomise(T, s, 5, seed=3, complement=True))
    assert not torch.equal(kept, randomise(T, s, 5, seed=4, complement=True))


@pytest.mark.parametrize(("d", "r"), [(5, 5), (7, 3), (3, 1)])
def test_random_vectors_are_uniformly_distributed(d, r):
    # Under Haar's measure on O(d): mean 0, every entry's square 1/d, the trace's square 1 for a whole matrix.
    n, random = 1500, torch.Generator().manual_seed(0)
    drawn = torch.stack([random_orthonormal(d, r, random) for _ in range(n)])
    gram = drawn.mT @ drawn
    torch.testing.assert_close(gram, torch.eye(r).double().expand_as(gram), rtol=0, atol=1e-13)
    assert float(drawn.mean(0).abs().max()) < 5 / (d * n) ** 0.5
    assert float((drawn.square().mean(0) * d - 1).abs().max()) < 5 * (2 / n) ** 0.5
    if d == r:
        trace = drawn.diagonal(dim1=1, dim2=2).sum(1)
        assert abs(float(trace.square().mean()) - 1) < 5 * (2 / n) ** 0.5
        assert abs(float(trace.mean())) < 5 / n**0.5


@pytest.mark.parametrize("count", [11, 16])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_where_half_of_the_ranks_are_the_same_either_way_is_right(count, sides):
    # Some of the ranks that are replaced are replaced by themselves: the matrix is corrected or multiplied out.
    W, T = pair(24, 16)
    base, tuned = decompose(W), decompose(T)
    for same in (3, 12, 16):
        mixed = type(base)(**{**vars(base), "U": torch.cat([-tuned.U[:, :same], base.U[:, same:]], 1),
                              "Vh": torch.cat([-tuned.Vh[:same], base.Vh[same:]])})  # fmt: skip
        expected = naive_replace(T, mixed, tuned, range(count), sides)
        found = replace(T, tuned, mixed, count, sides=sides)
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding(T.shape, float(tuned.S[0])))
        if same >= count:
            assert torch.equal(found, T.double())


def test_in_the_complement_one_vector_of_a_short_side_can_only_change_its_sign():
    W = weight_like(12, 30)
    s = decompose(W)
    one = randomise(W, s, 1, seed=5, complement=True, sides="left")
    distance = float((one - W.double()).norm()) / float(s.S[0])
    assert min(distance, abs(distance - 2)) < 1e-9


def test_near_degenerate_ranks_move_together():
    # Base holds the same matrix, its equal pair turned by half a right angle: no change of the matrix at all.
    S = [4.0, 2.0, 2.0 * (1 - 1e-9), 1.0]
    U, V = orthonormal(10, 4, 1), orthonormal(8, 4, 2)
    turn = torch.eye(4).double()
    turn[1:3, 1:3] = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double() / 2**0.5
    W = (U * torch.tensor(S).double()) @ V.mT
    T = ((U @ turn) * torch.tensor(S).double()) @ (V @ turn).mT
    base, tuned = decompose(W, 4), decompose(T, 4)
    assert whole_groups(torch.tensor([1]), 1e-6, tuned.S).tolist() == [1, 2]
    for sides in ("both", "left", "right"):
        moved = replace(T, tuned, base, [1], sides=sides, groups=1e-6)
        assert float((moved - T).norm()) < 1e-7
    assert float((replace(T, tuned, base, [1], sides="left") - T).norm()) > 0.1


def test_rescaled_and_exchanged_values():
    W, T = pair(14, 10)
    base, tuned = decompose(W), decompose(T)
    scaled = tuned.S.clone()
    scaled[2:6] *= 0.5
    atol = rounding(T.shape, float(tuned.S[0]))
    torch.testing.assert_close(rescale(T, tuned, "2:6", 0.5), (tuned.U * scaled) @ tuned.Vh, rtol=0, atol=atol)
    torch.testing.assert_close(
        replace_values(T, tuned, base, "all"), (tuned.U * base.S) @ tuned.Vh, rtol=0, atol=atol
    )
    assert torch.equal(rescale(T, tuned, 3, 0.0).float(), mask(T, tuned, 3).float())


def test_noise_is_as_large_as_the_edit():
    W, T = pair(14, 10)
    base, tuned = decompose(W), decompose(T)
    swapped = replace(T, tuned, base, 4)
    noisy = Edit("noise", 4, seed=1).apply(T, tuned, base, name="m")
    assert float((noisy - T).norm()) == pytest.approx(float((swapped - T).norm()))
    assert abs(float(((noisy - T) * (swapped - T)).sum())) < 0.5 * float((swapped - T).norm()) ** 2


def test_a_rotated_base_is_swapped_in():
    # Angles that were put there: what a swap of all ranks leaves is the tuned values on the base's vectors.
    U, V = orthonormal(30, 5, 1), orthonormal(30, 5, 2)
    S = torch.linspace(3, 1, 5).double()
    T = (rotated(U, [0.3] * 5) * S) @ rotated(V, [0.2] * 5).mT
    tuned, base = decompose(T), decompose((U * S) @ V.mT)
    found = replace(T, tuned, base, 5)
    torch.testing.assert_close(found, (U * S) @ V.mT, rtol=0, atol=1e-12)
    assert off_orthonormal(decompose(found, 5).U) < 1e-12


def test_every_kind_is_data_and_draws_by_matrix():
    W, T = pair(14, 10)
    base, tuned = decompose(W), decompose(T)
    for kind in KINDS:
        edit = Edit(kind, 3, factor=0.5)
        found = edit.apply(T, tuned, base, name="a")
        assert torch.equal(found, edit.apply(T, tuned, base, name="a"))
        assert torch.isfinite(found).all()
        assert torch.equal(found, edit.apply(T, tuned, base, name="b")) != edit.is_random


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Edit("turn"), "want one of swap"),
        (lambda: Edit("swap", "5:5"), "k:m with k < m"),
        (lambda: Edit("swap", "many"), "want n"),
        (lambda: Edit("swap", sides="up"), "want one of both"),
        (lambda: rank_set([-1], 4), "want ranks from 0"),
        (lambda: rank_set([9], 4), "the ranks 0 … 3"),
        (lambda: Edit("swap", 2).apply(torch.eye(3), decompose(torch.eye(3))), "takes from another model"),
        (lambda: replace(torch.eye(3), decompose(torch.eye(3)), decompose(torch.ones(3, 4)), 1), "equal shapes"),
        (lambda: truncate(torch.eye(3), decompose(torch.eye(3)), 4), "want 0 … 3"),
    ],
)
def test_bad_input_is_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_added_kind_of_edit_is_an_edit_like_any_other(monkeypatch):
    from specbasis.core.edits import Kind

    monkeypatch.setitem(KINDS, "half", Kind(lambda e, W, *_: W.double() / 2, "half of the matrix"))
    W = gaussian(4, 3)
    assert torch.equal(Edit("half").apply(W, decompose(W)), W.double() / 2)
    assert not Edit("half").needs_other
