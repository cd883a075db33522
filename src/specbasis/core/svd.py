"""Singular value decompositions with an error bound for every rank.

The default route is the float64 Gram matrix of the short side and a symmetric eigensolver. It is faster than a
float32 SVD and more accurate, but squaring the spectrum costs half the digits of small singular values. They are
won back by *deflation*: ranks below ``DEFLATE`` times the largest value of their level are re-decomposed at their
own scale, after one step of subspace refinement that cleans them of the ranks above. Singular values then differ
from those of gesdd in float64 by at most some hundred eps·σ₁ anywhere in the spectrum (tests/core/test_svd.py), and
each carries its measured bound, so no second driver is needed.

The matrix is read in column blocks: a bfloat16 matrix is never copied whole to float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.blocks import Blocks, orthonormal, reorthonormal, short_side
from specbasis.core.brief import brief
from specbasis.core.errors import InputError
from specbasis.core.gram import DEFLATE, explicit_vectors, implied_ranks, left_vectors
from specbasis.core.residuals import gaps, residuals, value_errors
from specbasis.core.spectrum import Density

ALGORITHM = "gram-deflated-2"
"""Name and version of the numerical route; results made by different routes are not bit-equal."""


FLOOR = 1e-6
"""Below this share of the largest singular value a vector that is taken through the other side has no digits."""


class _Ranked:
    """What every decomposition says about its ranks."""

    S: Tensor
    residual: Tensor
    gap: Tensor
    density: Density | None = None
    """What is known of the whole spectrum, where ``spectrum`` is only its head."""

    @property
    def relative_gap(self) -> Float[Tensor, " k"]:
        """Gap in units of the singular value: gap_i / σ_i, dimensionless, 0 where σ_i = 0."""
        return torch.where(self.S > 0, self.gap / self.S, 0.0)

    @property
    def bound(self) -> Float[Tensor, " k"]:
        """Bound on the sine of the angle between each computed singular pair and the exact one.

        sin θ_i ≤ residual_i / gap_i for the joint vector (u; v)/√2; ∞ where the gap is zero.

        Source: Davis & Kahan 1970, the sin θ theorem, applied to [[0, W], [Wᵀ, 0]].
        """
        return torch.where(self.gap > 0, self.residual / self.gap, math.inf)


@brief
@dataclass(frozen=True, eq=False)
class SVD(_Ranked):
    """The leading k singular triplets of a matrix W, in torch's order and meaning.

    W ≈ U diag(S) Vh, S descending; exact when k = min(out, in).

    Attributes:
        U: left singular vectors, (out, k), orthonormal columns.
        S: singular values, (k,), in the units of W.
        Vh: right singular vectors, (k, in), orthonormal rows.
        spectrum: all min(out, in) singular values; ``S`` is its head.
        spectrum_error: bound on the error of each of them: for the first k the measured residual (Kahan; over
            values too close to be told apart, the root of its sum of squares), for the rest an a priori bound
            n·eps·σ_top²/σ_i (n the short side, σ_top the largest value of its level).
        residual: max(‖W v_i − σ_i u_i‖, ‖Wᵀ u_i − σ_i v_i‖), (k,), measured, plus the rounding of measuring it.
        gap: distance from each singular value to the nearest other one of the whole spectrum, (k,), at least: the
            error of that other one is taken off, so that rounding never passes for a gap. Where W has a null space
            on either side (it is not square), zero counts as one more singular value.
    """

    U: Float[Tensor, "out k"]
    S: Float[Tensor, " k"]
    Vh: Float[Tensor, "k in"]
    spectrum: Float[Tensor, " short"]
    spectrum_error: Float[Tensor, " short"]
    residual: Float[Tensor, " k"]
    gap: Float[Tensor, " k"]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return len(self.U), self.Vh.shape[1]

    def vectors(self, side: str, k: int | None = None) -> Float[Tensor, "d k"]:
        """The leading k vectors of the left or right side as columns."""
        return self.U[:, :k] if side == "left" else self.Vh[:k].mT

    @property
    def wide(self) -> bool:
        """Whether the short side is the left one."""
        return self.shape[0] <= self.shape[1]

    def short_side(self) -> Float[Tensor, "short k"]:
        """The vectors of the short side as columns."""
        return self.U if self.wide else self.Vh.mT

    def long_side(self, start: int, stop: int | None = None) -> Float[Tensor, "long k"]:
        """Vectors of the long side of the ranks [start, stop) as columns."""
        return (self.Vh.mT if self.wide else self.U)[:, start:stop]

    def times(self, R: Float[Tensor, "long c"]) -> Float[Tensor, "short c"]:
        """The matrix of these triplets, short side first, times R."""
        return self.short_side() @ (self.S[:, None] * (self.long_side(0).mT @ R))

    def transposed_times(self, R: Float[Tensor, "short c"]) -> Float[Tensor, "long c"]:
        """The transpose of the matrix of these triplets, short side first, times R."""
        return self.long_side(0) @ (self.S[:, None] * (self.short_side().mT @ R))

    def matrix(self) -> Float[Tensor, "out in"]:
        """The matrix of these triplets: U diag(S) Vh. Costs 2·out·in·k flops."""
        return (self.U * self.S) @ self.Vh

    def truncate(self, k: int) -> SVD:
        """The leading k triplets: the best rank-k approximation (Eckart–Young)."""
        return self.interval(0, k)

    def interval(self, k: int, m: int) -> SVD:
        """The triplets of the ranks [k, m), 0-based, m excluded; the spectrum stays whole.

        Raises:
            InputError: unless 0 ≤ k < m ≤ number of ranks held.
        """
        if not 0 <= k < m <= len(self.S):
            raise InputError(f"interval [{k}, {m}) is not inside the {len(self.S)} ranks held; want 0 <= k < m")
        held = {name: getattr(self, name)[k:m] for name in ("S", "Vh", "residual", "gap")}
        return replace(self, U=self.U[:, k:m], **held)

    def core(self, X: Float[Tensor, "out in"]) -> Float[Tensor, "k k"]:
        """The coefficients of a matrix X in this basis: Uᵀ X V. Costs 2·k·out·in + 2·k²·in flops."""
        return (self.U.mT @ X.to(self.U.dtype)) @ self.Vh.mT


@brief
@dataclass(frozen=True, eq=False)
class HalfSVD(_Ranked):
    """The leading k singular triplets of a matrix W: vectors of its short side held, of its long side implied.

    With A = W, or Wᵀ where W is tall: A ≈ X diag(S) Yᵀ, and y_i = Aᵀ x_i / σ_i. A product of two implied vectors is
    taken through the short side (`cosines`), so that the leading ones never need to be formed.

    Attributes:
        A: the matrix, short side first, scaled; it stays in memory as long as this value.
        X: vectors of the short side, (short, k), orthonormal columns; signs as the eigensolver left them.
        S: singular values, (k,), in the units of W.
        head: how many leading ranks have an implied vector on the long side.
        tail: vectors of the long side of the ranks from ``head`` on, (long, k − head), orthonormal columns,
            orthogonal to the implied ones.
        spectrum, spectrum_error, residual, gap: as in `SVD`; the residual of an implied rank is
            ‖A Aᵀ x_i − σ_i² x_i‖ / σ_i.
        wide: whether the short side is the left one.
        rest: vectors of the short side of the ranks from k on, (short, n − k); no columns unless asked for.
        density: what is known of the whole spectrum, where ``spectrum`` is only its head.
    """

    A: Blocks
    X: Float[Tensor, "short k"]
    S: Float[Tensor, " k"]
    head: int
    tail: Float[Tensor, "long explicit"]
    spectrum: Float[Tensor, " known"]
    spectrum_error: Float[Tensor, " known"]
    residual: Float[Tensor, " k"]
    gap: Float[Tensor, " k"]
    wide: bool
    rest: Float[Tensor, "short beyond"]
    density: Density | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        n, m = self.A.shape
        return (n, m) if self.wide else (m, n)

    def vectors(self, side: str, k: int | None = None) -> Float[Tensor, "d k"]:
        """The leading k vectors of the left or right side as orthonormal columns, (out or in, k)."""
        if self.is_short(side):
            return self.X[:, :k]
        return reorthonormal(self.long_side(0, k)) if self.head else self.tail[:, :k]

    def is_short(self, side: str) -> bool:
        """Whether a side ("left" or "right") is the one whose vectors are held."""
        return (side == "left") == self.wide

    def long_side(self, start: int, stop: int | None = None) -> Float[Tensor, "long k"]:
        """Vectors of the long side of the ranks [start, stop); implied ones are orthonormal to about 1e-12."""
        stop = len(self.S) if stop is None else min(stop, len(self.S))
        explicit = self.tail[:, max(start - self.head, 0) : max(stop - self.head, 0)]
        if start >= min(self.head, stop):
            return explicit
        held = slice(start, min(stop, self.head))
        formed = self.A.transposed_times(self.X[:, held]) / (self.S[held] / self.A.scale)
        return torch.cat([formed, explicit], dim=1)

    def short_side(self) -> Float[Tensor, "short every"]:
        """Vectors of the short side of all ranks held, those beyond k included."""
        return torch.cat([self.X, self.rest], dim=1) if self.rest.shape[1] else self.X

    def times(self, R: Float[Tensor, "long c"]) -> Float[Tensor, "short c"]:
        """The matrix, short side first, times R."""
        return self.A.times(R) * self.A.scale if self.A.scale else R.new_zeros(self.A.shape[0], R.shape[1])

    def transposed_times(self, R: Float[Tensor, "short c"]) -> Float[Tensor, "long c"]:
        """The transpose of the matrix, short side first, times R."""
        return (
            self.A.transposed_times(R) * self.A.scale if self.A.scale else R.new_zeros(self.A.shape[1], R.shape[1])
        )

    def svd(self) -> SVD:
        """Both sides, under the sign rule of `decompose`."""
        return self._signed(0, len(self.S), self.vectors("right" if self.wide else "left"))

    def interval(self, k: int, m: int) -> SVD:
        """Both sides of the ranks [k, m) alone, under the sign rule of `decompose`; the spectrum stays whole.

        Only their vectors of the long side are formed; implied ones are orthonormal to about 1e-12.
        """
        return self._signed(k, m, self.long_side(k, m))

    def _signed(self, k: int, m: int, Y: Tensor) -> SVD:
        X = self.X[:, k:m]
        U, V = (X, Y) if self.wide else (Y, X)
        sign = signs(U)
        return SVD(
            U * sign,
            self.S[k:m],
            (V * sign).mT.contiguous(),
            self.spectrum,
            self.spectrum_error,
            self.residual[k:m],
            self.gap[k:m],
        )


def decompose(
    W: Float[Tensor, "out in"],
    ranks: int | None = None,
    *,
    minus: Float[Tensor, "out in"] | None = None,
    name: str = "matrix",
) -> SVD:
    """Singular value decomposition of a weight matrix in float64, with error bounds.

    W = U diag(S) Vh; the first ``ranks`` vectors (default all), every singular value.

    One joint sign rule: in each pair (u_i, v_i) the entry of u_i that is largest in magnitude (the first such) is
    positive. Zero singular values get orthonormal vectors too; the ``bound`` is infinite where there are several of
    them, or W is not square, and for equal singular values, whose vectors are arbitrary inside their subspace. (A
    single zero of a square matrix has defined lines u and v, but no joint sign.)

    No gradient flows through it: a parameter may be passed as it is.

    Cost for short side n, long side m, k ranks: n²m (Gram) + about 9n³ (eigensolver) + 2nmk + 3mk² flops; memory
    4n² + (n + m)k float64 beside W.

    Args:
        W: (out, in), any floating dtype, on any device.
        ranks: how many singular vectors to return; values are returned for all ranks.
        minus: decompose W − minus instead, subtracted in float64 block by block: exact for the common dtypes, and
            the difference is never formed whole.
        name: what to call the matrix in an error.

    Raises:
        InputError: W is not a floating matrix with at least one entry, or ranks is not in 1 … min(out, in).
        NonFiniteError: W holds NaN or Inf.

    Source: Golub & Van Loan 2013, §8.6; the deflation is this project's (docs/decisions.md).
    """
    short = short_side(W, name)
    k = short if ranks is None else ranks
    if not 1 <= k <= short:
        raise InputError(f"{name}: got ranks = {ranks} for a matrix {tuple(W.shape)}; want 1 … {short}")
    return half_svd(W, k, minus=minus, name=name, implied=False).svd()


@torch.no_grad()
def half_svd(
    W: Float[Tensor, "out in"],
    ranks: int,
    *,
    minus: Float[Tensor, "out in"] | None = None,
    name: str = "matrix",
    implied: bool | None = None,
    every: bool = False,
    device: torch.device | None = None,
) -> HalfSVD:
    """What `decompose` computes, with the vectors of the long side left implied where that saves work.

    Takes 0 ranks as well: then only singular values are computed, at about half the price.

    Args:
        W: (out, in), any floating dtype, on any device.
        ranks: how many singular vectors are wanted, 0 … min(out, in); values are computed for all ranks.
        minus: decompose W − minus instead.
        name: what to call the matrix in an error.
        implied: leave the long side of the ranks above ``IMPLIED`` implied; by default where more than half of all
            ranks are wanted, as a product n × n × m is then cheaper than forming the vectors of two matrices.
        every: keep the vectors of the short side of the ranks beyond ``ranks`` too: n² more numbers, no more work.
        device: where to compute; where W is, when None. W is moved block by block.

    Raises:
        InputError: W is not a floating matrix with entries, or ``minus`` has another shape.
        NonFiniteError: W holds NaN or Inf.
    """
    A = Blocks.of(W, minus, name, device)
    n, m = A.shape
    k = min(ranks, n)
    wide = W.shape[0] <= W.shape[1]
    if A.scale == 0:
        return _zeros(A, k, wide)
    X, spectrum, error = left_vectors(A, n if every and k else k)
    X, rest = X[:, :k], X[:, k:]
    if k and spectrum[k - 1] < DEFLATE**2 * spectrum[0]:
        # Refinement keeps columns orthogonal to first order in eps·σ_0/σ_i: not enough for ranks this deep.
        X = orthonormal(X)
    head = implied_ranks(spectrum[:k], n, m) if (2 * k > n if implied is None else implied) else 0
    return certified(A, X, spectrum, error, head, wide, rest, null_space=n != m)


def certified(
    A: Blocks,
    X: Tensor,
    spectrum: Tensor,
    error: Tensor,
    head: int,
    wide: bool,
    rest: Tensor,
    *,
    null_space: bool,
) -> HalfSVD:
    """The decomposition that some vectors of the short side give, with measured residuals, in the units of W.

    Args:
        A: the matrix.
        X: its leading vectors of the short side.
        spectrum: its singular values as far as they are known.
        error: bounds on their errors; those of the leading ranks are overwritten.
        head: how many leading ranks leave their vector of the long side implied.
        wide: whether the short side is the left one.
        rest: vectors of the short side of further ranks.
        null_space: whether zero counts as one more singular value in the gaps.
    """
    k = X.shape[1]
    S = spectrum[:k]
    tail, product = explicit_vectors(A, X, S, head)
    residual = residuals(A, X, S, head, tail, product)
    error[:k] = value_errors(S, residual)
    gap = gaps(spectrum, error, null_space=null_space)[:k]
    spectrum, error, residual, gap = (x * A.scale for x in (spectrum, error, residual, gap))
    return HalfSVD(A, X, S * A.scale, head, tail, spectrum, error, residual, gap, wide, rest)


def _zeros(A: Blocks, k: int, wide: bool) -> HalfSVD:
    """A matrix of zeros: nothing to compute, and any vectors will do."""
    n, m = A.shape
    X, Y = (torch.eye(d, k, dtype=torch.float64, device=A.device) for d in (n, m))
    every, held = X.new_zeros(n), X.new_zeros(k)
    return HalfSVD(A, X, held, 0, Y, every, every, held, held, wide, X[:, :0])


def inverse_values(S: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1/σ_i, and 0 below `FLOOR`: what turns products with a matrix into cosines with its vectors."""
    usable = S > FLOOR * S[0]
    return torch.where(usable, 1 / torch.where(usable, S, 1.0), 0.0)


def signs(U: Tensor) -> Tensor:
    """+1 or −1 for each column, making its entry of largest magnitude positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
