"""Nulls against the laws they state: sampled decompositions, uniform p-values, intervals that cover."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from specbasis import decompose
from specbasis.core import draws, nulls, perturbation, rounding
from specbasis.core.errors import InputError
from specbasis.core.svd import half_svd
from tests.helpers.matrices import gaussian, orthonormal, with_spectrum

SPECTRUM = torch.cat([torch.linspace(4, 2, 6), torch.linspace(1.5, 0.3, 18)]).double()


def base_of(shape):
    return with_spectrum(SPECTRUM, *shape, seed=3)


def core_of(W, D, k):
    return perturbation.core(half_svd(W, k, every=True), half_svd(W + D, 0, minus=W), k, float(D.norm()))


def sides(W, pair):
    """(left, right) of (short, long)."""
    return pair if W.shape[0] <= W.shape[1] else pair[::-1]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("k", [4, 20])  # both ways of computing the core
def test_first_order_rotation_is_that_of_the_decompositions(shape, k):
    W, D = base_of(shape), 1e-5 * gaussian(*shape, 1)
    a, b = decompose(W), decompose(W + D)
    turned = sides(W, perturbation.response(core_of(W, D, k)))
    predicted = sides(W, perturbation.predicted_alignment(core_of(W, D, k)))
    for side, rotation, aligned in zip(("left", "right"), turned, predicted, strict=True):
        cosines = (a.vectors(side, k) * b.vectors(side, k)).sum(0)
        assert torch.allclose(1 - cosines.square(), rotation, rtol=1e-2, atol=1e-14)
        assert torch.allclose(cosines.abs(), aligned, rtol=0, atol=1e-2 * float(rotation.max()))


def test_two_ranks_are_predicted_exactly_whatever_the_update():
    for seed in range(20):
        W, D = torch.diag(torch.tensor([1.0, 0.8])).double(), 0.3 * gaussian(2, 2, seed)
        a, b = decompose(W), decompose(W + D)
        predicted = perturbation.predicted_alignment(core_of(W, D, 2))
        for side, aligned in zip(("left", "right"), predicted, strict=True):
            cosines = (a.vectors(side) * b.vectors(side)).sum(0).abs()
            assert torch.allclose(aligned, cosines, atol=1e-10)


def test_the_core_of_a_low_rank_update_and_of_a_rank_deficient_base():
    S = torch.cat([torch.linspace(3, 1, 6), torch.zeros(6)]).double()
    W, D = with_spectrum(S, 12, 30, seed=5), 1e-4 * gaussian(12, 2, 1) @ gaussian(2, 30, 2)
    a, b = decompose(W), decompose(W + D)
    turned = perturbation.response(core_of(W, D, 6))
    for side, rotation in zip(("left", "right"), turned, strict=True):
        cosines = (a.vectors(side, 6) * b.vectors(side, 6)).sum(0)
        assert torch.allclose(1 - cosines.square(), rotation, rtol=2e-2, atol=1e-12)


@pytest.mark.parametrize("size", [0.02, 0.15, 0.5])
def test_the_gaussian_null_is_that_of_sampled_updates_of_any_size(size):
    shape, k = (24, 40), 24
    W = base_of(shape)
    a = decompose(W)
    variance = size**2 * float(W.square().sum()) / W.numel()
    found = nulls.null_alignment(a.spectrum, shape, k, variance)
    draws = [decompose(W + math.sqrt(variance) * gaussian(*shape, seed)) for seed in range(60)]
    for side, expected in zip(("left", "right"), found, strict=True):
        sampled = torch.stack([(a.vectors(side) * b.vectors(side)).sum(0).square() for b in draws]).mean(0)
        # Means over bands of ranks: exact to first order, and within a tenth where ranks mix in groups.
        for band in (slice(0, 6), slice(6, 24)):
            assert abs(float((expected[band].square() - sampled[band]).mean())) < (0.02 if size < 0.1 else 0.1)


def test_a_rotated_update_has_the_gaussian_expectation_whatever_its_spectrum():
    shape, k = (24, 40), 6
    W = base_of(shape)
    D = 1e-4 * gaussian(24, 1, 1) @ gaussian(1, 40, 2)  # rank one: as far from Gaussian as can be
    g = torch.Generator().manual_seed(0)
    turned = [perturbation.response(core_of(W, draws.draw("rotated", W, W + D, g), k)) for _ in range(600)]
    expected = nulls.sensitivity(decompose(W).spectrum, shape, k)
    size = float(D.square().sum() / W.square().sum())
    for i in range(2):
        drawn = torch.stack([t[i] for t in turned])
        error = drawn.std(0) / math.sqrt(len(drawn))
        assert bool(((drawn.mean(0) - expected[i] * size).abs() < 4.5 * error).all())


def test_p_values_are_uniform_under_the_gaussian_null():
    shape, k = (24, 40), 8
    W = base_of(shape)
    base = half_svd(W, k, every=True)
    p = []
    for seed in range(1000):
        D = 0.3 * gaussian(
            *shape, seed
        )  # so large that first order is no angle any more: the law holds all the same
        found = nulls.p_gaussian(perturbation.core(base, half_svd(W + D, 0, minus=W), k, float(D.norm())))
        p.append(torch.stack(found))
    every = torch.stack(p)  # (draws, sides, ranks)
    for side in range(2):
        for rank in (0, 3, 7):
            assert kstest(every[:, side, rank].numpy(), "uniform").pvalue > 0.01


def test_p_values_see_an_update_along_the_vectors_and_one_that_turns_them():
    W = base_of((24, 40))
    a = decompose(W)
    along = core_of(W, 0.1 * (a.U * gaussian(1, 24, 1)[0]) @ a.Vh, 6)
    across = core_of(W, 0.1 * a.U @ (a.Vh.roll(1, 0) + a.Vh.roll(-1, 0)), 6)
    assert float(nulls.p_gaussian(along)[0].max()) < 1e-6
    assert float(nulls.p_gaussian(across)[0].median()) > 0.9


def test_independent_directions_and_the_best_of_many():
    d, n = 50, 20
    X = gaussian(d, 1500, 1)
    cosines = (X / X.norm(dim=0))[0].abs()
    assert kstest(nulls.p_independent(cosines, d).numpy(), "uniform").pvalue > 0.01
    assert torch.allclose(
        nulls.p_independent(cosines, d), torch.from_numpy(beta.sf(cosines.numpy() ** 2, 0.5, (d - 1) / 2))
    )
    every = gaussian(1500, n * d, 4).view(1500, n, d)  # other directions for each draw
    best = torch.einsum("bnd,db->bn", every / every.norm(dim=2, keepdim=True), X / X.norm(dim=0)).abs().amax(1)
    assert kstest(nulls.p_independent(best, d, among=n).numpy(), "uniform").pvalue > 0.01
    best = (orthonormal(d, n, 3).mT @ (X / X.norm(dim=0))).abs().amax(0)  # orthonormal: the tail is the same
    assert float((best < nulls.chance_quantile(d, 0.95, n)).double().mean()) == pytest.approx(0.95, abs=0.02)
    assert float(nulls.p_independent(torch.tensor([1.0 - 1e-12], dtype=torch.float64), 768)[0]) < 1e-300


@pytest.mark.parametrize("kind", draws.KINDS)
def test_sampled_p_values_are_uniform_on_their_steps(kind):
    W, T = base_of((24, 24)), (base_of((24, 24)) + 0.05 * gaussian(24, 24, 9)).to(torch.bfloat16)
    a, p = decompose(W), []
    g = torch.Generator().manual_seed(1)

    def aligned():
        update = draws.draw(kind, W, T, g)
        return (a.U[:, :3] * decompose(W + update, 3).U).sum(0).abs()

    for _ in range(40):
        drawn = torch.stack([aligned() for _ in range(4)])
        p.append(draws.p_sampled(aligned(), drawn))
    every = torch.stack(p)[:, 0].numpy()
    assert every.min() >= 0.2
    jittered = every - 0.2 * np.random.default_rng(0).random(len(every))  # steps of a fifth made continuous
    assert kstest(jittered, "uniform").pvalue > 0.01


@pytest.mark.parametrize("kind", ["gaussian", "permuted", "rotated"])
def test_a_drawn_update_has_the_size_and_what_its_kind_keeps(kind):
    W, T = gaussian(8, 12, 1), gaussian(8, 12, 2)
    D, delta = draws.draw(kind, W, T, torch.Generator().manual_seed(0)), T - W
    assert float(D.norm()) == pytest.approx(float(delta.norm()))
    if kind == "permuted":
        assert torch.equal(D.flatten().sort().values, delta.flatten().sort().values)
    if kind == "rotated":
        assert torch.allclose(decompose(D).S, decompose(delta).S)
    with pytest.raises(InputError, match="got null = 'x'"):
        draws.draw("x", W, T, torch.Generator())


def test_rounding_is_what_casting_does():
    W = gaussian(200, 300, 1)
    found = rounding.rounding(W.float())
    assert found.stored == "float32"
    for form in (torch.bfloat16, torch.float16):
        error = float((W.to(form).double() - W).square().mean())
        assert found.variance[str(form).removeprefix("torch.")] == pytest.approx(error, rel=0.02)
    scale = W.abs().amax(1, keepdim=True) / 127
    assert found.variance["int8"] == pytest.approx(
        float(((W / scale).round() * scale - W).square().mean()), rel=0.02
    )
    assert rounding.rounding(W.to(torch.bfloat16)).stored == "bfloat16"


@pytest.mark.parametrize(
    ("turn", "noise", "k"),
    [
        (0.0, "bfloat16", 16),
        (0.3, "gaussian", 16),
        (0.3, "bfloat16", 16),
        (0.3, "float16", 16),
        (0.3, "bfloat16", 10),
    ],
)
def test_intervals_cover_the_alignment_before_rounding(turn, noise, k):
    """Known rotation: base turned by a random rotation; 1 800 draws of noise times ranks and more."""
    n, m, draws = 16, 24, 180
    S = torch.linspace(4, 1, n).double()
    covered = {"left": [], "right": []}
    for seed in range(draws):
        U, V = orthonormal(n, n, 2 * seed), orthonormal(m, n, 2 * seed + 1)
        G = gaussian(n, n, seed)
        R = torch.matrix_exp(turn * (G - G.mT) / math.sqrt(n))
        Ut, Vt = U @ R, V @ R
        clean = (Ut * S) @ Vt.mT
        if noise == "gaussian":
            T = clean + 1e-3 * gaussian(n, m, seed + 5000)
            variance = partial(torch.full_like, fill_value=1e-6)
        else:
            T = clean.to(getattr(torch, noise))
            variance = partial(rounding.entry_variance, form=noise)
        t = decompose(T.double())
        X, Y = t.U[:, :k], t.Vh[:k].mT
        cosines = (U[:, :k].mT @ X, V[:, :k].mT @ Y)
        found = rounding.intervals(cosines, (X, Y), t.spectrum, T.double(), variance)
        for side, (low, high), B, C in zip(covered, found, (U, V), (Ut, Vt), strict=True):
            truth = (B * C).sum(0).abs().clamp(max=1.0)[:k]
            covered[side].append((low <= truth) & (truth <= high))
    for side, each in covered.items():
        share, leading = (float(torch.stack(each)[:, :j].double().mean()) for j in (k, 3))
        # Where nothing turned, truth is 1, the end of the scale: the interval covers more often there.
        assert 0.93 <= share <= (0.97 if turn else 1.0), (side, share)
        assert leading > 0.92, (side, leading)  # steps are coarsest where leading vectors are largest


def test_the_variance_of_each_entry_adds_up_to_that_of_the_matrix():
    W = gaussian(40, 30, 1).to(torch.float16)
    for form in ("bfloat16", "float16"):
        each = rounding.entry_variance(W, form)
        assert float(each.mean()) == pytest.approx(rounding.rounding(W, form).variance[form])


def test_the_share_of_size():
    a, g = torch.tensor([0.9, 0.9, 0.1]).double(), torch.tensor([0.9, 0.5, 0.1]).double()
    share = nulls.size_share(a, g, 100)
    assert float(share[0]) == pytest.approx(1)
    assert float(share[1]) == pytest.approx((0.25 - 0.01) / (0.81 - 0.01))
    assert math.isnan(float(nulls.size_share(torch.tensor([0.05]).double(), a[:1], 100)[0]))
