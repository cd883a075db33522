"""What chance, the size of the update, and rounding would give: laws of alignment without a finetune's direction.

Two theories carry this module. *Linear response*: to first order an update Δ turns the singular vector u_i by
Σ_{j≠i} x_ij u_j, x_ij = (s_i u_jᵀΔv_i + s_j u_iᵀΔv_j)/(s_i² − s_j²), plus what leaves the span; for a Gaussian
update the law of its squared length is a weighted sum of χ², known whatever the size. *Pairs of ranks*: beyond
first order each pair (i, j) is diagonalised exactly, as a 2 × 2 matrix, and the squared cosines of the pairs are
multiplied: small updates give first-order theory back, and near-degenerate ranks mix by half instead of without
limit.

Everything is written short side first: ``short`` are the vectors of the shorter side, ``long`` of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from specbasis.core.dtypes import FORMATS, UNSCALED, name_of
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, HalfSVD

KINDS = ("gaussian", "permuted", "rotated", "rounding")
"""Updates without a direction: see `draw`."""

_FLOOR = 1e-6
"""Below this share of the largest singular value the other side's vector has no digits; see `core`."""

_STEPS = 60
"""Steps of the root finder, at most; ten are usual."""

_CLOSE = 1e-7
"""Last relative step of the root finder: it converges quadratically, and the exponent is flat at the root."""

_SINGLES = 8
"""Weights of a sum of χ² that are kept one by one; the others are lumped by their mean and variance."""

_BLOCK = 2**21  # entries of one block of variances

Floats = NDArray[np.float64]


# --- independent directions --------------------------------------------------------------------------------------


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

    one = -math.expm1(math.log(q) / among)  # P that a single one exceeds it
    return math.sqrt(max(0.0, 1 - float(betaincinv((d - 1) / 2, 0.5, one)))) if d > 1 else 1.0


# --- the update in the basis of base -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Core:
    """An update Δ, seen from the singular vectors of base.

    Attributes:
        S: all singular values of base, (n,).
        rows: x_iᵀ Δ y_j, (k, n); x short side, y long side.
        columns: x_jᵀ Δ y_i, (k, n).
        outside: ‖(1 − Y Yᵀ) Δᵀ x_i‖², (k,): what leaves the span of the long side's vectors.
        shape: (short, long).
        norm: ‖Δ‖_F.
    """

    S: Float[Tensor, " n"]
    rows: Float[Tensor, "k n"]
    columns: Float[Tensor, "k n"]
    outside: Float[Tensor, " k"]
    shape: tuple[int, int]
    norm: float

    @cached_property
    def weights(self) -> Float[Tensor, "k n"]:
        """(s_i² + s_j²)/(s_i² − s_j²)²: how readily each pair of ranks mixes."""
        return _weights(self.S, len(self.rows))


def core(base: SVD | HalfSVD, delta: SVD | HalfSVD, k: int, norm: float) -> Core:
    """The coefficients of an update in the basis of base, for its leading k ranks against all ranks.

    Where y_j is the vector of a value below `_FLOOR` of the largest, x_iᵀΔy_j is left at 0 and its square goes to
    `Core.outside`, which has the same weight there up to (s_j/s_i)².

    Costs 2n²m + 4n³ flops for k above n/3, else 8nmk + 4n²k.

    Args:
        base: with every vector of the short side (``half_svd(…, every=True)``).
        delta: the update.
        k: number of leading ranks.
        norm: ‖Δ‖_F.
    """
    X, S = base.short_side(), base.spectrum
    n, m = len(X), max(base.shape)
    k = min(k, n)
    if X.shape[1] != n:
        raise InputError(f"got {X.shape[1]} of {n} vectors of base; want all of them: decompose with every=True")
    usable = S > _FLOOR * S[0]
    inverse = torch.where(usable, 1 / torch.where(usable, S, 1.0), 0.0)
    E = delta.transposed_times(X[:, :k])  # (m, k): Δᵀ x_i
    if 3 * k > n:
        cross = _cross(base, delta)  # Δ Aᵀ
        C = (X.mT @ (cross @ X)) * inverse  # x_iᵀ Δ y_j
        rows, columns = C[:k], C[:, :k].mT.contiguous()
    else:
        rows = (base.times(E).mT @ X) * inverse
        columns = (X.mT @ delta.times(base.long_side(0, k))).mT
    outside = (E.square().sum(dim=0) - rows.square().sum(dim=1)).clamp(min=0)
    return Core(S.cpu(), rows.cpu(), columns.cpu(), outside.cpu(), (n, m), norm)


def _cross(base: SVD | HalfSVD, delta: SVD | HalfSVD) -> Tensor:
    """Δ Aᵀ, (n, n)."""
    if isinstance(base, HalfSVD) and isinstance(delta, HalfSVD) and base.A.scale and delta.A.scale:
        return delta.A.times(base.A.transposed()) * (delta.A.scale * base.A.scale)
    return delta.times(base.long_side(0) * base.spectrum) @ base.short_side().mT


def mean_update(base: SVD | HalfSVD, mean: float) -> tuple[float, Tensor, Tensor]:
    """(mean entry of Δ, Xᵀ1, Yᵀ1): what of an update survives any permutation of its entries."""
    X, S = base.short_side(), base.spectrum
    one = X.new_ones(max(base.shape), 1)
    usable = S > _FLOOR * S[0]
    inverse = torch.where(usable, 1 / torch.where(usable, S, 1.0), 0.0)
    return mean, X.sum(dim=0).cpu(), ((X.mT @ base.times(one))[:, 0] * inverse).cpu()


def mean_entry(delta: SVD | HalfSVD) -> float:
    """Mean entry of Δ."""
    n, m = sorted(delta.shape)
    one = delta.spectrum.new_ones(m, 1)
    return float(delta.times(one).sum()) / (n * m)


def response(c: Core) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Squared first-order rotation of each leading rank by an update, (short, long), dimensionless.

    ‖du_i‖² = Σ_{j≠i} x_ij² (+ outside_i / s_i² on the long side). It has no upper limit: it is a response, not
    an angle.

    Source: Stewart 1991, "Perturbation theory for the singular value decomposition", §3.
    """
    k = len(c.rows)
    a, b = c.S[:k, None], c.S[None, :]
    inverse = _inverse_gap(c.S, k)
    short = ((a * c.columns + b * c.rows) * inverse).square().sum(dim=1)
    long = ((a * c.rows + b * c.columns) * inverse).square().sum(dim=1)
    return short, long + c.outside / c.S[:k].square()


def predicted_alignment(c: Core) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Alignment that perturbation theory expects of base and base + Δ, (short, long), 0 … 1.

    Π_{j≠i} cos θ_ij, θ_ij the angle that diagonalises ranks i and j of diag(S) + UᵀΔV as a 2 × 2 matrix, the larger
    value going to the smaller index; on the long side times 1/√(1 + outside_i / s_i²). To first order
    1 − ½‖du_i‖², exact for two ranks.
    """
    n, k = len(c.S), len(c.rows)
    on = torch.arange(k)
    # s_j + x_jᵀΔy_j is known for the leading k only: to this order the others' shift does not matter to them.
    shifted = c.S.clone()
    shifted[:k] += c.rows[on, on]
    a, b = shifted[:k, None], shifted[None, :]
    sign = (torch.arange(n)[None, :] > on[:, None]).double() * 2 - 1
    values, found = sign * ((a - b) * (a + b)), []
    for into, out in ((c.columns, c.rows), (c.rows, c.columns)):
        twice = 2 * (a * into + b * out)
        apart = values + sign * ((out - into) * (out + into))
        cosine = (apart / torch.hypot(twice, apart)).nan_to_num_(nan=1.0)  # 0/0: nothing turns them
        cosine[on, on] = 1.0
        # A product of factors from 0 to 1: what underflows is 0 to all digits of a cosine.
        found.append(((1 + cosine) / 2).prod(dim=1).sqrt())
    short, long = found
    return short, long * (-torch.log1p(c.outside / c.S[:k].square()) / 2).exp()


def _inverse_gap(S: Tensor, k: int) -> Tensor:
    """1/(s_i² − s_j²), (k, n); 0 on the diagonal and for equal values."""
    apart = (S[:k, None] - S[None, :]) * (S[:k, None] + S[None, :])
    return apart.reciprocal_().nan_to_num_(posinf=0.0, neginf=0.0)


# --- updates of the same size, without a direction ---------------------------------------------------------------


def sensitivity(S: Float[Tensor, " n"], shape: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """Expected squared first-order rotation for each unit of (‖Δ‖_F/‖W‖_F)², (short, long), dimensionless.

    (‖W‖²/nm) Σ_{j≠i} (s_i² + s_j²)/(s_i² − s_j²)², and (m − n)/s_i² more in the sum on the long side. It is
    exact to first order for every update whose direction is independent of base: Gaussian, or any Δ rotated at
    random on both sides. It is a property of base alone.
    """
    n, m = shape
    each = S.square().sum() / (n * m)
    short = _weights(S, k).sum(dim=1) * each
    return short, short + each * (m - n) / S[:k].square()


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
    w = variance * _weights(S, k)
    beyond = variance * (m - n) / S[:k].square()
    if mean is None:
        short = long = w
    else:
        mu, p, q = mean
        a, b, inverse = S[:k, None], S[None, :], _inverse_gap(S, k)
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


def _weights(S: Tensor, k: int) -> Tensor:
    """(s_i² + s_j²)/(s_i² − s_j²)², (k, n): ∞ for equal values, 0 on the diagonal."""
    a, b = S[:k, None], S[None, :]
    apart = (a - b) * (a + b)
    w = (a.square() + b.square()) / apart.square()
    w[torch.arange(k), torch.arange(k)] = 0
    return torch.nan_to_num(w, nan=math.inf, posinf=math.inf)  # 0/0: two zeros, which mix freely


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
    weights, lump, count = (np.concatenate([x, x]) for x in _lumped(w))
    beyond = np.tile((1 / c.S[:k].square()).numpy(), 2)
    degrees = np.repeat([0.0, float(m - n)], k)
    p = torch.from_numpy(
        _ratio_cdf(weights, [(lump, count), (beyond, degrees)], np.concatenate([short, long]), n * m)
    )
    return p[:k], p[k:]


def _lumped(w: Floats) -> tuple[Floats, Floats, Floats]:
    """The largest weights of each row, and one weight and number of degrees for the rest, with their mean and
    variance.
    """
    if w.shape[1] <= _SINGLES:
        return w, np.zeros(len(w)), np.zeros(len(w))
    ordered = -np.partition(-w, _SINGLES, axis=1)
    rest = ordered[:, _SINGLES:]
    total, square = rest.sum(axis=1), (rest**2).sum(axis=1)
    positive = square > 0
    divisor = np.where(positive, total, 1.0)
    lump = np.where(positive, square / divisor, 0.0)
    count = np.where(positive, total**2 / np.where(positive, square, 1.0), 0.0)
    return ordered[:, :_SINGLES], lump, count


def _ratio_cdf(weights: Floats, groups: list[tuple[Floats, Floats]], q: Floats, total: int) -> Floats:
    """P(Σ w_j z_j² ≤ q Σ z²) over `total` normal variables, row by row: single weights, then groups of equal ones.

    A saddlepoint approximation of P(Σ (w_j − q) z_j² ≤ 0).
    """
    from scipy.special import ndtr

    k = len(q)
    values = np.concatenate([weights, *[g[:, None] for g, _ in groups], np.zeros((k, 1))], axis=1)
    counts = np.concatenate([np.ones_like(weights), *[c[:, None] for _, c in groups], np.zeros((k, 1))], axis=1)
    counts[:, -1] = np.maximum(total - counts.sum(axis=1), 1e-3)
    values = np.where(counts > 0, values, 0.0)  # an empty group is no pole
    largest = values.max(axis=1)
    scale = np.where(largest > 0, largest, 1.0)
    lam = (values - q[:, None]) / scale[:, None]
    possible = (lam.min(axis=1) < 0) & (lam.max(axis=1) > 0)
    t = np.zeros(k)
    t[possible] = _saddlepoints(lam[possible].T.copy(), counts[possible].T.copy())
    weighted = counts * lam
    inner = np.maximum(1 - 2 * t[:, None] * lam, 1e-300)
    K = -0.5 * (counts * np.log(inner)).sum(axis=1)
    curvature = 2 * (counts * (lam / inner) ** 2).sum(axis=1)
    third, variance = 8 * (weighted * lam**2).sum(axis=1), 2 * (weighted * lam).sum(axis=1)
    r = np.sign(t) * np.sqrt(np.maximum(-2 * K, 0.0))
    v = t * np.sqrt(curvature)
    near = np.abs(r) < 1e-4  # the formula is 0/0 at the mean
    safe_r, safe_v = np.where(near, 1.0, r), np.where(near, 1.0, v)
    tail = ndtr(safe_r + np.log(np.maximum(safe_v / safe_r, 1e-300)) / safe_r)
    middle = 0.5 + third / (6 * np.sqrt(2 * np.pi) * np.maximum(variance, 1e-300) ** 1.5)
    p = np.clip(np.where(near, middle, tail), 0.0, 1.0)
    return np.where(possible, p, np.where(lam.max(axis=1) <= 0, 1.0, 0.0))


def _saddlepoints(lam: Floats, counts: Floats) -> Floats:
    """For each column the t between its two poles where K′(t) = 0, K(t) = −½ Σ c log(1 − 2 t λ); λ of both signs.

    Newton's method in 1/(distance to the pole ahead): K′ is concave in it, so no step goes past the root. A column
    that has converged is left alone.
    """
    t = np.zeros(lam.shape[1])
    below, above = (1 / (2 * ends) for ends in (lam.min(axis=0), lam.max(axis=0)))
    active = np.arange(len(t))
    for _ in range(_STEPS):
        at = t[active]
        ratio = lam / (1 - 2 * at * lam)
        weighted = counts * ratio
        slope, curvature = weighted.sum(axis=0), 2 * (weighted * ratio).sum(axis=0)
        ahead = np.where(slope < 0, above, below) - at
        step = ahead * np.abs(slope) / (curvature * np.abs(ahead) + np.abs(slope))
        t[active] += step
        going = np.abs(step) > _CLOSE * np.abs(t[active])
        if not going.any():
            break
        if not going.all():
            active, below, above = active[going], below[going], above[going]
            lam, counts = lam[:, going], counts[:, going]
    return t


def size_share(alignment: Float[Tensor, " k"], null: Float[Tensor, " k"], d: int) -> Float[Tensor, " k"]:
    """Share of the observed stability that an update of this size without a direction would leave as well.

    (g² − 1/d)/(a² − 1/d), for the observed alignment a, the null's g and chance 1/d. 1: size alone explains the
    alignment; below 1: the rest, 1 − share, is owed to the direction of the update; above 1: its direction
    turned the rank more than noise would. NaN where there is no stability to explain (a² ≤ 1/d).

    Source: Yu et al. 2026, §4.2, names the two factors; the decomposition is this project's.
    """
    observed = alignment.square() - 1 / d
    return torch.where(observed > 0, (null.square() - 1 / d) / observed.clamp(min=1e-300), math.nan)


# --- rounding of the storage format ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """What rounding alone does to a matrix.

    Attributes:
        stored: format in which it is stored.
        variance: format → mean squared error of an entry.
    """

    stored: str
    variance: dict[str, float]


def rounding(W: Float[Tensor, "out in"], *stored: str) -> Rounding:
    """Mean squared error of rounding the entries of a matrix to its own format, to bfloat16, float16 and int8.

    Σ step²/12 over entries / count: the error of rounding to nearest is uniform within half a step. A step is
    the distance of neighbouring numbers at the entry's size; for int8 it is max|row|/127, the symmetric scale of
    each row.

    Args:
        W: (out, in), any floating dtype; 8-bit floats count as the bfloat16 that they were scaled to.
        stored: the format that holds its entries, and further ones, of `dtypes.UNSCALED`; that of its dtype when
            none.
    """
    stored = tuple(form if form in UNSCALED else "bfloat16" for form in stored or (name_of(W.dtype),))
    square = halved = int8 = 0.0
    smallest = 2.0 ** FORMATS["float16"].exponent
    rows = max(1, 2**16 // W.shape[1])  # blocks that stay in a core's cache
    for start in range(0, len(W), rows):
        X = W[start : start + rows].detach().to(torch.float32).contiguous()
        # The power of two below each entry, from the bits of its float32: the step but for a factor.
        power = (X.view(torch.int32) & 0x7F800000).view(torch.float32).flatten()
        square += float(power @ power)
        power.clamp_(min=smallest)
        halved += float(power @ power)
        int8 += float((X.abs().amax(dim=1).double() / 127).square().sum()) * W.shape[1]
    sums = {form: halved if form == "float16" else square for form in UNSCALED}
    count = 12.0 * W.numel()
    wanted = dict.fromkeys((*stored, "bfloat16", "float16"))
    variance = {form: sums[form] * FORMATS[form].step ** 2 / count for form in wanted}
    return Rounding(stored[0], variance | {"int8": int8 / count})


Interval = tuple[Float[Tensor, " k"], Float[Tensor, " k"]]
"""Lower and upper ends."""


def entry_variance(W: Float[Tensor, "out in"], form: str) -> Float[Tensor, "out in"]:
    """Mean squared error of rounding each entry to a format, step²/12, float64; steps as in `rounding`."""
    X = W.detach().to(torch.float64).contiguous()
    # The exponent bits alone: the power of two below each entry.
    power = (X.view(torch.int64) & 0x7FF0000000000000).view(torch.float64).clamp_(min=2.0 ** FORMATS[form].exponent)
    return power.square_().mul_(FORMATS[form].step ** 2 / 12)


def intervals(
    cosines: tuple[Float[Tensor, "k k"], Float[Tensor, "k k"]],
    vectors: tuple[Float[Tensor, "short k"], Float[Tensor, "long k"]],
    S: Float[Tensor, " n"],
    W: Float[Tensor, "short long"],
    variance: Callable[[Tensor], Tensor],
) -> tuple[Interval, Interval]:
    """95 % intervals of the alignments, (short, long), that tuned had before independent noise N on its entries.

    To first order the alignment a_i = c_ii moves by Σ_j c_ij y_ij, y_ij = (s_i x_jᵀNy_i + s_j x_iᵀNy_j)/(s_i² −
    s_j²) on the short side. That is one linear form of N, p_iᵀNy_i + x_iᵀNq_i with p_i = Σ_j g_ij s_i x_j, q_i =
    Σ_j g_ij s_j y_j, g_ij = c_ij/(s_i² − s_j²), so its variance is Σ_ab V_ab (p_ia y_ib + x_ia q_ib)² whatever
    the variances V_ab of the entries are; on the long side s_i and s_j change places in p and q. Steps of floating
    point grow with the entries, and leading vectors have theirs where the entries are large: with the mean of V in
    place of V, intervals of leading ranks are too short.

    Beyond first order a shrinks by √(1 − Σ y_ij²): the interval is a·(1 + ½ Σ Var y_ij) ± 1.96 √(variance + ½ a² Σ
    (Var y_ij)²), in 0 … 1. What lies beyond the k ranks at hand counts with the part of x_i there, with the mean
    of V.

    Costs 8nmk flops for n × m matrices, in blocks of the long side.

    Args:
        cosines: ⟨x_i(base), x_j(tuned)⟩ and ⟨y_i(base), y_j(tuned)⟩.
        vectors: X and Y of tuned.
        S: all singular values of tuned.
        W: tuned, short side first.
        variance: entries of tuned → the variance of the noise in each, such as `entry_variance`.
    """
    X, Y = vectors
    (n, k), m = X.shape, len(Y)
    inverse = _inverse_gap(S, k)[:, :k]
    a, b = S[:k, None], S[None, :k]
    forms = []  # for each side p and q as columns
    for c, (into, out) in zip(cosines, ((a, b), (b, a)), strict=True):
        g = c * inverse
        forms.append((X @ (g * into).mT, Y @ (g * out).mT))
    x2, y2 = X.square(), Y.square()
    across = X.new_zeros(n, k)  # V Y²
    crossed = [X.new_zeros(n, k) for _ in forms]  # V (y ∘ q)
    spread = [X.new_zeros(k) for _ in forms]
    whole, every = X.new_zeros(k), 0.0  # Σ_b (V ᵀx²)_b: the variance of ‖Nᵀx_i‖
    step = max(1, _BLOCK // n)
    for start in range(0, m, step):
        rows = slice(start, start + step)
        V = variance(W[:, rows])
        every += float(V.sum())
        along = V.mT @ x2
        whole += along.sum(dim=0)
        across += V @ y2[rows]
        for i, (_, q) in enumerate(forms):
            spread[i] += (along * q[rows].square()).sum(dim=0)
            crossed[i] += V @ (Y[rows] * q[rows])
    within = x2.mT @ across  # Var x_iᵀNy_j
    mean = every / (n * m)
    far = mean * _weights(S, k)[:, k:].sum(dim=1)
    outside = (whole - within.sum(dim=1)).clamp(min=0) * ((m - n) / (m - k) if m > k else 0.0) / S[:k].square()
    found = []
    for i, (c, (p, _)) in enumerate(zip(cosines, forms, strict=True)):
        total = spread[i] + (p.square() * across).sum(dim=0) + 2 * (p * X * crossed[i]).sum(dim=0)
        first, second = (within.mT, within) if i == 0 else (within, within.mT)
        turns = ((a.square() * first + b.square() * second) * inverse.square()).clamp(max=1.0)
        beyond = far + outside if i else far
        dimension = (m if i else n) - k
        left_over = (1 - c.square().sum(dim=1)).clamp(min=0)
        total = total + (left_over * beyond / dimension if dimension else 0.0)
        aligned = c.diagonal().abs()
        middle = aligned * (1 + (turns.sum(dim=1) + beyond) / 2)
        half = 1.959964 * (total + aligned.square() * turns.square().sum(dim=1) / 2).sqrt()
        found.append(((middle - half).clamp(0, 1), (middle + half).clamp(0, 1)))
    return found[0], found[1]


# --- sampled updates ---------------------------------------------------------------------------------------------


def draw(kind: str, W: Float[Tensor, "out in"], T: Float[Tensor, "out in"], generator: torch.Generator) -> Tensor:
    """A random update of the same size as T − W, float64, (out, in).

    - gaussian: independent normal entries, scaled to the Frobenius norm of T − W;
    - permuted: the entries of T − W in random places;
    - rotated: Q₁ (T − W) Q₂ with uniformly random orthogonal Q₁ and Q₂: the spectrum stays;
    - rounding: errors of rounding T to the format in which it is stored, uniform within half a step.

    Raises:
        InputError: the kind is unknown.
    """
    shape = W.shape
    if kind == "rounding":
        stored = FORMATS[rounding(T).stored]
        step = 2.0 ** (torch.frexp(T.double()).exponent - 1).clamp(min=stored.exponent).double() * stored.step
        error: Tensor = step * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5)
        return error
    delta = T.double() - W.double()
    if kind == "gaussian":
        Z = torch.randn(shape, generator=generator, dtype=torch.float64)
        return Z.mul_(torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(Z))
    if kind == "permuted":
        return delta.flatten()[torch.randperm(delta.numel(), generator=generator)].reshape(shape)
    if kind == "rotated":
        return _haar(shape[0], generator) @ delta @ _haar(shape[1], generator)
    raise InputError(f"got null {kind!r}; want one of {', '.join(KINDS)}")


def _haar(d: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix (Mezzadri 2007)."""
    Q, R = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    rotation: Tensor = Q * R.diagonal().sign()
    return rotation


def p_sampled(observed: Float[Tensor, " k"], drawn: Float[Tensor, "draws k"]) -> Float[Tensor, " k"]:
    """Probability of an alignment at least as high under a sampled null, (1 + #{drawn ≥ observed})/(1 + draws).

    Never 0, and uniform on its steps where the observed one is a draw as well.

    Source: Phipson & Smyth 2010.
    """
    p: Tensor = (1 + (drawn >= observed).sum(dim=0).double()) / (1 + len(drawn))
    return p


def standard_error(drawn: Float[Tensor, "draws k"]) -> Float[Tensor, " k"]:
    """Monte-Carlo standard error of the mean over draws; ∞ for a single one."""
    spread = drawn.std(dim=0, correction=1) if len(drawn) > 1 else torch.full_like(drawn[0], math.inf)
    return spread.div_(math.sqrt(len(drawn)))
