"""An update in the basis of base, and how far perturbation theory says that it turns each rank.

*Linear response*: to first order an update Δ turns the singular vector u_i by Σ_{j≠i} x_ij u_j,
x_ij = (s_i u_jᵀΔv_i + s_j u_iᵀΔv_j)/(s_i² − s_j²), plus what leaves the span. *Pairs of ranks*: beyond first order
each pair (i, j) is diagonalised exactly, as a 2 × 2 matrix, and the cosines of the pairs are multiplied: small
updates give first-order theory back, and near-degenerate ranks mix by half instead of without limit.

Everything is written short side first: ``short`` are the vectors of the shorter side, ``long`` of the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, HalfSVD, inverse_values


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
        return pair_weights(self.S, len(self.rows))


def core(base: SVD | HalfSVD, delta: SVD | HalfSVD, k: int, norm: float) -> Core:
    """The coefficients of an update in the basis of base, for its leading k ranks against all ranks.

    Where y_j is the vector of a value below `svd.FLOOR` of the largest, x_iᵀΔy_j is left at 0 and its square goes
    to `Core.outside`, which has the same weight there up to (s_j/s_i)².

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
    inverse = inverse_values(S)
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
    ones = X.new_ones(max(base.shape), 1)
    inverse = inverse_values(S)
    return mean, X.sum(dim=0).cpu(), ((X.mT @ base.times(ones))[:, 0] * inverse).cpu()


def mean_entry(delta: SVD | HalfSVD) -> float:
    """Mean entry of Δ."""
    n, m = sorted(delta.shape)
    ones = delta.spectrum.new_ones(m, 1)
    return float(delta.times(ones).sum()) / (n * m)


def response(c: Core) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Squared first-order rotation of each leading rank by an update, (short, long), dimensionless.

    ‖du_i‖² = Σ_{j≠i} x_ij² (+ outside_i / s_i² on the long side). It has no upper limit: it is a response, not
    an angle.

    Source: Stewart 1991, "Perturbation theory for the singular value decomposition", §3.
    """
    k = len(c.rows)
    a, b = c.S[:k, None], c.S[None, :]
    inverse = inverse_gap(c.S, k)
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
    values, sides = sign * ((a - b) * (a + b)), []
    for into, out in ((c.columns, c.rows), (c.rows, c.columns)):
        twice = 2 * (a * into + b * out)
        apart = values + sign * ((out - into) * (out + into))
        cosine = (apart / torch.hypot(twice, apart)).nan_to_num_(nan=1.0)  # 0/0: nothing turns them
        cosine[on, on] = 1.0
        # A product of factors from 0 to 1: what underflows is 0 to all digits of a cosine.
        sides.append(((1 + cosine) / 2).prod(dim=1).sqrt())
    short, long = sides
    return short, long * (-torch.log1p(c.outside / c.S[:k].square()) / 2).exp()


def inverse_gap(S: Tensor, k: int) -> Tensor:
    """1/(s_i² − s_j²), (k, n); 0 on the diagonal and for equal values."""
    apart = (S[:k, None] - S[None, :]) * (S[:k, None] + S[None, :])
    return apart.reciprocal_().nan_to_num_(posinf=0.0, neginf=0.0)


def pair_weights(S: Tensor, k: int) -> Tensor:
    """(s_i² + s_j²)/(s_i² − s_j²)², (k, n): ∞ for equal values, 0 on the diagonal."""
    a, b = S[:k, None], S[None, :]
    apart = (a - b) * (a + b)
    w = (a.square() + b.square()) / apart.square()
    w[torch.arange(k), torch.arange(k)] = 0
    return torch.nan_to_num(w, nan=math.inf, posinf=math.inf)  # 0/0: two zeros, which mix freely
