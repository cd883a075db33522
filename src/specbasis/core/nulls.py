"""What chance and the size of an update alone would give: laws of alignment without a finetune's direction.

For a Gaussian update the law of the squared first-order rotation is a weighted sum of χ², known whatever the size;
expected alignments are taken pair of ranks by pair of ranks (`specbasis.core.perturbation`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.perturbation import Core, inverse_gap, pair_weights, response
from specbasis.core.saddlepoint import lumped, ratio_cdf


def p_independent(alignment: Float[Tensor, " k"], d: int, among: int = 1) -> Float[Tensor, " k"]:
    """Probability that independent unit vectors in R^d align at least so well.

    P(|cos θ| ≥ a) = 1 − I_{a²}(1/2, (d−1)/2), as cos² θ ~ Beta(1/2, (d−1)/2), exact. For the best of n directions,
    1 − (1 − p)^n: exact for independent ones; for orthonormal ones the truth lies between that and n·p.

    Args:
        alignment: absolute cosines.
        d: dimension of the space.
        among: n, of how many directions the best was taken.
    """
    from scipy.special import betainc

    a = alignment.cpu().numpy()
    if d == 1:
        return torch.ones_like(alignment)
    p = betainc((d - 1) / 2, 0.5, np.clip(1 - a * a, 0, 1))  # from 1 − a²: keeps the digits of a small p
    with np.errstate(divide="ignore"):  # p = 1: certain
        return torch.from_numpy(np.asarray(-np.expm1(among * np.log1p(-p))))


def chance_quantile(d: int, q: float, among: int = 1) -> float:
    """The alignment that the best of n independent directions in R^d stays below with probability q."""
    from scipy.special import betaincinv

    exceeded = -math.expm1(math.log(q) / among)  # by a single direction
    return math.sqrt(max(0.0, 1 - float(betaincinv((d - 1) / 2, 0.5, exceeded)))) if d > 1 else 1.0


def sensitivity(S: Float[Tensor, " n"], shape: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """Expected squared first-order rotation for each unit of (‖Δ‖_F/‖W‖_F)², (short, long), dimensionless.

    (‖W‖²/nm) Σ_{j≠i} (s_i² + s_j²)/(s_i² − s_j²)², and (m − n)/s_i² more in the sum on the long side. It is
    exact to first order for every update whose direction is independent of base: Gaussian, or any Δ rotated at
    random on both sides. It is a property of base alone.
    """
    n, m = shape
    variance = S.square().sum() / (n * m)
    short = pair_weights(S, k).sum(dim=1) * variance
    return short, short + variance * (m - n) / S[:k].square()


def null_alignment(
    S: Float[Tensor, " n"],
    shape: tuple[int, int],
    k: int,
    variance: float,
    mean: tuple[float, Float[Tensor, " n"], Float[Tensor, " n"]] | None = None,
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Root mean square alignment under an update of independent entries with this variance, (short, long).

    Each pair of ranks is a 2 × 2 Gaussian matrix beside its gap: with w_ij = E x_ij², r = 1/(2√w_ij), q = r²/4,
    E cos² θ_ij = ½ + ½ √(π/8) r e^{−q} (I₀(q) + I₁(q)), the mean cosine of a displaced Gaussian in the plane;
    their product over j, on the long side divided by 1 + (m − n)·variance/s_i², and never below chance, 1/d.
    Equal to 1 − Σ w_ij to first order; docs/findings/nulls.md has its distance from sampled updates of any size.

    Args:
        S: all singular values of base.
        shape: (short, long).
        k: number of leading ranks.
        variance: of an entry of the update; ‖Δ‖_F²/(n·m) for the observed size.
        mean: (μ, Xᵀ1, Yᵀ1) where the entries have a mean that is not zero, as after a permutation.
    """
    n, m = shape
    w = variance * pair_weights(S, k)
    beyond = variance * (m - n) / S[:k].square()
    if mean is None:
        short = long = w
    else:
        mu, p, q = mean
        a, b, inverse = S[:k, None], S[None, :], inverse_gap(S, k)
        into, out = p[None, :] * q[:k, None], p[:k, None] * q[None, :]
        short = w + (mu * (a * into + b * out) * inverse).square()
        long = w + (mu * (a * out + b * into) * inverse).square()
        left_over = (m - q.square().sum()).clamp(min=0)
        beyond = beyond + (mu * p[:k]).square() * left_over / S[:k].square()
    out_short = _mixed(short, symmetric=mean is None)
    out_long = out_short if short is long else _mixed(long, symmetric=False)
    return (
        out_short.exp().clamp(min=1 / n).sqrt(),
        (out_long - torch.log1p(beyond)).exp().clamp(min=1 / m).sqrt(),
    )


def _mixed(w: Tensor, *, symmetric: bool) -> Tensor:
    """Σ_j log E cos² θ_ij for coupling variances w, (k,).

    Args:
        w: (k, n).
        symmetric: w_ij = w_ji among the leading k: one triangle is computed.
    """
    k, n = w.shape
    if not symmetric:
        return _cosine(w.flatten()).reshape(k, n).log().sum(dim=1)
    i, j = torch.triu_indices(k, n, 1)
    factors = torch.ones(k, n, dtype=w.dtype)
    factors[i, j] = _cosine(w[i, j])
    inside = factors[:, :k]
    return (inside * inside.mT).log().sum(dim=1) + factors[:, k:].log().sum(dim=1)


def _cosine(w: Tensor) -> Tensor:
    """E cos² θ of a pair of ranks with coupling variance w: ½ + ½ √(π/8) r e^{−q} (I₀(q) + I₁(q)), r = 1/(2√w).

    Where w is small by the asymptotic series of the Bessel functions, 1 − w − 3w² − 30w³ − 525w⁴ − O(w⁵).
    """
    out = 1 - w * (1 + w * (3 + w * (30 + 525 * w)))
    large = (w > 1e-3).nonzero()[:, 0]
    r = 0.5 / w[large].sqrt()
    q = r * r / 4
    cosine = math.sqrt(math.pi / 8) * r * (torch.special.i0e(q) + torch.special.i1e(q))
    return out.index_copy_(0, large, (1 + cosine.clamp(max=1.0)) / 2)


def p_gaussian(
    c: Core, turned: tuple[Tensor, Tensor] | None = None
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Probability that a Gaussian update of the same Frobenius norm turns a rank at most so far, (short, long).

    P(‖du_i*‖² ≤ ‖du_i‖²), both first-order rotations. Small: the finetune left this rank more alone than its
    size explains; near 1: it turned it more. The law is that of Σ w_j z_j² / Σ z² over n·m normal variables,
    whatever the size of Δ; the tail is a saddlepoint approximation, within about 0.01 of the truth, and to about
    15 % where it is small. Uniform on [0, 1] under the null (tests/core/test_nulls.py).

    Source: Lugannani & Rice 1980; Kuonen 1999.
    """
    n, m = c.shape
    k = len(c.rows)
    short, long = (x.numpy() / c.norm**2 for x in turned or response(c))
    w = c.weights.numpy()
    w = np.where(np.isfinite(w), w, 0.0)
    weights, lump, count = (np.concatenate([x, x]) for x in lumped(w))
    beyond = np.tile((1 / c.S[:k].square()).numpy(), 2)
    degrees = np.repeat([0.0, float(m - n)], k)
    p = torch.from_numpy(
        ratio_cdf(weights, [(lump, count), (beyond, degrees)], np.concatenate([short, long]), n * m)
    )
    return p[:k], p[k:]


def size_share(alignment: Float[Tensor, " k"], null: Float[Tensor, " k"], d: int) -> Float[Tensor, " k"]:
    """Share of the observed stability that an update of this size without a direction would leave as well.

    (g² − 1/d)/(a² − 1/d), for the observed alignment a, the null's g and chance 1/d. 1: size alone explains the
    alignment; below 1: the rest, 1 − share, is owed to the direction of the update; above 1: its direction
    turned the rank more than noise would. NaN where there is no stability to explain (a² ≤ 1/d).

    Source: Yu et al. 2026, §4.2, names the two factors; the decomposition is this project's.
    """
    observed = alignment.square() - 1 / d
    return torch.where(observed > 0, (null.square() - 1 / d) / observed.clamp(min=1e-300), math.nan)
