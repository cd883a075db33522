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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.errors import InputError, NonFiniteError

ALGORITHM = "gram-deflated-2"
"""Name and version of the numerical route; results made by different routes are not bit-equal."""

DEFLATE = 1e-3
"""Ranks below this share of their level's largest value are decomposed again at their own scale.

A symmetric eigensolver on the Gram matrix leaves a relative error of about eps / DEFLATE² = 2e-10 in the smallest
value that it keeps. Larger: more levels, more time. Smaller: fewer right digits in small singular values.
"""

IMPLIED = 3e-3
"""Ranks above this share of the largest value may leave their vectors of the long side implied.

A cosine taken through the short side has a rounding error of about eps / IMPLIED² = 3e-11. Larger: more vectors are
formed. Smaller: fewer right digits.
"""

PROBES = 24
"""Random vectors that measure residuals. More: tighter and dearer."""

CERTAINTY = 4.0
"""A norm measured with probes is multiplied by this, so that it is a bound but for a chance of 3e-11."""

CONVERGED = 1e-8
"""Bound residual/gap at which the iteration of `approximate_svd` stops."""

SUBSET_SIDE = 1024
"""Short sides from this on take a subset of eigenvectors where few ranks are wanted."""

SUBSET_SHARE = 8
"""A subset of eigenvectors is taken for at most one in so many ranks. Larger shares gain little."""

_EPS = torch.finfo(torch.float64).eps
_BLOCK_BYTES = 32 * 2**20  # one float64 block of columns


class _Ranked:
    """What every decomposition says about its ranks."""

    S: Tensor
    residual: Tensor
    gap: Tensor

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
    """

    A: _Blocks
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

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        n, m = self.A.shape
        return (n, m) if self.wide else (m, n)

    def vectors(self, side: str, k: int | None = None) -> Float[Tensor, "d k"]:
        """The leading k vectors of the left or right side as orthonormal columns, (out or in, k)."""
        if self.is_short(side):
            return self.X[:, :k]
        return _reorthonormal(self.long_side(0, k)) if self.head else self.tail[:, :k]

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
        sign = _signs(U)
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
    short = _short_side(W, name)
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
    n = _short_side(W, name)
    if minus is not None and (minus.shape != W.shape or not minus.is_floating_point()):
        raise InputError(
            f"{name}: got {tuple(W.shape)} minus {minus.dtype} {tuple(minus.shape)}; want floats of one shape"
        )
    k = min(ranks, n)
    wide = W.shape[0] <= W.shape[1]
    A = _Blocks([X if wide else X.mT for X in (W, minus) if X is not None], name, device or W.device)
    if A.scale == 0:
        return _zeros(A, k, wide)
    X, spectrum, error = _left_vectors(A, n if every and k else k)
    X, rest = X[:, :k], X[:, k:]
    if k and spectrum[k - 1] < DEFLATE**2 * spectrum[0]:
        # Refinement keeps columns orthogonal to first order in eps·σ_0/σ_i: not enough for ranks this deep.
        X = _orthonormal(X)
    S = spectrum[:k]
    head = _implied(S, n, A.shape[1]) if (2 * k > n if implied is None else implied) else 0
    tail, product = _explicit(A, X, S, head)
    residual = _residuals(A, X, S, head, tail, product)
    error[:k] = _value_errors(S, residual)
    gap = _gaps(spectrum, error, null_space=W.shape[0] != W.shape[1])[:k]
    spectrum, error, residual, gap = (x * A.scale for x in (spectrum, error, residual, gap))
    return HalfSVD(A, X, S * A.scale, head, tail, spectrum, error, residual, gap, wide, rest)


@torch.no_grad()
def approximate_svd(
    W: Float[Tensor, "out in"],
    ranks: int,
    *,
    minus: Float[Tensor, "out in"] | None = None,
    start: Float[Tensor, "short b"] | None = None,
    name: str = "matrix",
    device: torch.device | None = None,
) -> HalfSVD:
    """The leading k singular triplets of a large matrix by block Krylov iteration, each with its certificate.

    A basis Q of the span of X₀, (A Aᵀ) X₀, (A Aᵀ)² X₀, … with full reorthogonalisation, and the Ritz vectors of
    A Aᵀ in it. It stops when the bound residual/gap of every rank is below ``CONVERGED``, or its residual rounding,
    and falls back to `half_svd` where that would have been cheaper. Only the leading k + 1 values are known, and
    ``spectrum`` holds only those. Residuals are measured as everywhere; the gaps are those of the Ritz values, so a
    value that the iteration has not seen, however unlikely from a random start, would not be noticed.

    Costs 4nmb flops a step, b ≈ 1.25 k columns; memory 16·n·b·steps bytes. Pays where k is a few per cent of the
    short side and the values there stand apart.

    Args:
        W: (out, in), any floating dtype.
        ranks: how many, 1 … min(out, in) − 1.
        minus: decompose W − minus instead.
        start: vectors of the short side to start from, such as those of the base; random ones are added.
        name: what to call the matrix in an error.
        device: where to compute.

    Raises: as `half_svd`.

    Source: Musco & Musco 2015, Alg. 2; the stopping rule and the fallback are this project's.
    """
    n = _short_side(W, name)
    k = min(ranks, n - 1)
    wide = W.shape[0] <= W.shape[1]
    A = _Blocks([X if wide else X.mT for X in (W, minus) if X is not None], name, device or W.device)
    found = _krylov(A, k, start) if A.scale and k else None
    if found is None:
        exact = half_svd(W, k, minus=minus, name=name, device=device, implied=False)
        return replace(exact, spectrum=exact.spectrum[: k + 1], spectrum_error=exact.spectrum_error[: k + 1])
    X, spectrum, error = found
    S = spectrum[:k]
    tail, product = _explicit(A, X, S, 0)
    residual = _residuals(A, X, S, 0, tail, product)
    error[:k] = _value_errors(S, residual)
    gap = _gaps(spectrum, error, null_space=True)[:k]
    spectrum, error, residual, gap = (x * A.scale for x in (spectrum, error, residual, gap))
    return HalfSVD(A, X, S * A.scale, 0, tail, spectrum, error, residual, gap, wide, X[:, :0])


def _krylov(A: _Blocks, k: int, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading k vectors of the short side, k + 1 values and their errors; None where exact work is cheaper."""
    n, m = A.shape
    width = min(n, k + max(8, k // 4))
    X = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(A.device)
    if start is not None:
        X[:, : start.shape[1]] = start[:, :width].to(X)
    X = torch.linalg.qr(X)[0]
    Q, GQ, spent = X[:, :0], X[:, :0], 0.0
    while True:
        Y = A.coupling(X)
        Q, GQ = torch.cat([Q, X], dim=1), torch.cat([GQ, Y], dim=1)
        d = Q.shape[1]
        H = Q.mT @ GQ
        squares, F = torch.linalg.eigh((H + H.mT) / 2)
        squares, F = squares.flip(0)[: k + 1], F.flip(1)[:, : k + 1]
        S = squares.clamp(min=_EPS * float(squares[0])).sqrt()
        A.top = float(S[0])
        ritz = Q @ F
        residual = (GQ @ F - ritz * squares).norm(dim=0) / S
        gap = _gaps(S, residual, null_space=True)
        rounding = n * _EPS * A.top**2 / S
        if bool(((residual <= CONVERGED * gap) | (residual <= rounding))[:k].all()):
            return ritz[:, :k].clone(), S, residual + rounding
        # Products with A, orthogonalisation, Ritz vectors; against the Gram matrix and the eigensolver.
        spent += 4.0 * n * m * width + 14.0 * n * d * width + 11.0 * d**3
        if spent > 1.125 * n * n * m + 11.0 * n**3 or d + width > n:
            return None
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            Y = Y - Q @ (Q.mT @ Y)
            Y = torch.linalg.qr(Y)[0]
        X = Y


def _zeros(A: _Blocks, k: int, wide: bool) -> HalfSVD:
    """A matrix of zeros: nothing to compute, and any vectors will do."""
    n, m = A.shape
    X, Y = (torch.eye(d, k, dtype=torch.float64, device=A.device) for d in (n, m))
    every, held = X.new_zeros(n), X.new_zeros(k)
    return HalfSVD(A, X, held, 0, Y, every, every, held, held, wide, X[:, :0])


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines ⟨x_i, y_j⟩ between the vectors of one side of two decompositions.

    Attributes:
        diagonal: of equal rank index, (k,).
        error: bound on what the way of computing them adds to the error of the vectors, (k,): of ⟨x_i, y_j⟩ for all
            i, j up to the index.
        matrix: computes all of them, (k, k), in 2dk² flops or less.
    """

    diagonal: Float[Tensor, " k"]
    error: Float[Tensor, " k"]
    matrix: Callable[[], Tensor]

    @property
    def alignment(self) -> Float[Tensor, " k"]:
        """|⟨x_i, y_i⟩|, 0 … 1."""
        return self.diagonal.abs().clamp(max=1.0)


@torch.no_grad()
def cosines(a: SVD | HalfSVD, b: SVD | HalfSVD, side: str) -> Cosines:
    """Cosines between the left, or the right, vectors of two matrices of equal shape.

    On a side that both hold: XᵀX̃. On a side that both leave implied, through the short side,
    ⟨y_i, ỹ_j⟩ = x_iᵀ (A Ãᵀ) x̃_j / (σ_i σ̃_j), whose rounding is measured with probes; the ranks that either holds
    explicitly are multiplied as they are. Costs 2n²m + 2n²k flops where implied, 2dk where not.
    """
    k = min(len(a.S), len(b.S))
    if isinstance(a, HalfSVD) and isinstance(b, HalfSVD) and not a.is_short(side):
        j = min(a.head, b.head, k)
        if 2 * j > k:
            return _cosines_through(a, b, j, k)
    X, Y = a.vectors(side, k), b.vectors(side, k)
    return Cosines((X * Y).sum(dim=0), X.new_zeros(k), lambda: X.mT @ Y)


def _cosines_through(a: HalfSVD, b: HalfSVD, j: int, k: int) -> Cosines:
    """Cosines of the long side: of the leading j ranks through the short side, of the others from their vectors."""
    cross = a.A.times(b.A.transposed())
    n = len(cross)
    Z = _probes(n, cross.device)
    deviation = Z @ cross - a.A.times(b.A.transposed(), Z)
    Sa, Sb = a.S / a.A.scale, b.S / b.A.scale
    rounding = _certain(deviation.reshape(-1, 1), len(Z), n) + n * _EPS * a.A.top * b.A.top
    M = (cross @ b.X[:, :j]) / Sb[:j]  # A ỹ_i of the leading ranks
    Ya, Yb = a.long_side(j, k), b.long_side(j, k)
    diagonal = torch.cat([(a.X[:, :j] * M).sum(dim=0) / Sa[:j], (Ya * Yb).sum(dim=0)])
    error = torch.cat([rounding / (Sa[:j] * Sb[:j]), Ya.new_full((k - j,), 0.0)])
    normal = a.residual[:k] / a.S[:k] + b.residual[:k] / b.S[:k]  # implied vectors have length 1 up to this
    normal[j:] = 0

    def matrix() -> Tensor:
        head = torch.cat([M, a.A.times(Yb)], dim=1)  # A ỹ_i
        foot = torch.cat([(b.A.times(Ya).mT @ b.X[:, :j]) / Sb[:j], Ya.mT @ Yb], dim=1)
        return torch.cat([(a.X[:, :j].mT @ head) / Sa[:j, None], foot])

    return Cosines(diagonal, (error + normal).cummax(dim=0).values, matrix)


@torch.no_grad()
def low_rank_svd(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], *, name: str = "B @ A") -> SVD:
    """Singular value decomposition of a product without forming it, such as a LoRA update.

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, with the QR decompositions B = Q_B R_B and Aᵀ = Q_A R_A; only the small core is
    decomposed. Costs O((out + in) r²) instead of O(out·in·min(out, in)).

    Returns min(r, out, in) triplets. The singular values beyond are exactly zero: ``spectrum`` lists them.

    Raises:
        InputError: the inner sizes differ, or an operand is not a floating matrix with entries.
        NonFiniteError: an operand holds NaN or Inf.
    """
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or not B.numel() or not A.numel():
        raise InputError(f"{name}: got shapes {tuple(B.shape)} and {tuple(A.shape)}; want (out, r) and (r, in)")
    if not (B.is_floating_point() and A.is_floating_point()):
        raise InputError(f"{name}: got {B.dtype} and {A.dtype}; want floating-point matrices (out, r) and (r, in)")
    B, A = B.double(), A.double()
    if not bool(torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise NonFiniteError(f"{name}: an operand holds NaN or Inf, so the product has no SVD")
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.mT)
    core = decompose(RB @ RA.mT, name=name)
    U = QB @ core.U
    V = QA @ core.Vh.mT
    # The residual of the core plus the rounding of the two QR decompositions (backward stable: r·eps·‖B‖‖A‖).
    rounding = B.shape[1] * _EPS * float(torch.linalg.norm(RB, 2) * torch.linalg.norm(RA, 2))
    sign = _signs(U)
    beyond = core.S.new_zeros(min(len(U), len(V)) - len(core.S))
    spectrum, error = torch.cat([core.S, beyond]), torch.cat([core.spectrum_error + rounding, beyond])
    return SVD(
        (U * sign).contiguous(),
        core.S,
        (V * sign).mT.contiguous(),
        spectrum=spectrum,
        spectrum_error=error,
        residual=core.residual + rounding,
        gap=_gaps(spectrum, error, null_space=len(U) != len(V))[: len(core.S)],
    )


@torch.no_grad()
def stacked_svd(
    A: Float[Tensor, "b n m"],
) -> tuple[Float[Tensor, "b n n"], Float[Tensor, "b n"], Float[Tensor, "b m n"]]:
    """Singular triplets of a stack of small matrices, such as the heads of a layer: X, S, Y with A ≈ X diag(S) Yᵀ.

    By float64 Gram matrices, without deflation: vectors of values below about 1e-4 of the largest lose digits,
    and those of values below 1e-7 are completed to orthonormal columns. Costs 2n²m + 2n²m flops each, and an
    eigensolver of n³.
    """
    n, m = A.shape[1:]
    if n > m:
        Y, S, X = stacked_svd(A.mT)
        return X, S, Y
    A = A.double()
    squares, X = torch.linalg.eigh(A @ A.mT)
    S, X = squares.flip(-1).clamp(min=0).sqrt(), X.flip(-1)
    Y = (A.mT @ X) / torch.where(S > 0, S, 1.0)[:, None, :]
    if bool((S <= 1e-7 * S[:, :1]).any()):
        Q, R = torch.linalg.qr(Y)
        Y = Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :]
    return X, S, Y


def _short_side(W: Tensor, name: str) -> int:
    if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point():
        raise InputError(
            f"{name}: got {W.dtype} of shape {tuple(W.shape)}; want a floating-point matrix (out, in) with entries"
        )
    return min(W.shape)


class _Blocks:
    """A matrix, or the difference of two, in float64 blocks of columns, scaled to a largest entry near 1.

    The short side comes first. The scale is a power of two, so that scaling is exact and squares neither overflow
    nor vanish. A matrix of one block is converted once and kept.
    """

    def __init__(self, operands: list[Tensor], name: str, device: torch.device) -> None:
        # Exact, and torch has no arithmetic in 8-bit floats.
        self.operands = [X if X.element_size() > 1 else X.to(torch.bfloat16) for X in operands]
        self.shape, self.device = operands[0].shape, device
        self.width = max(1, _BLOCK_BYTES // (8 * self.shape[0]))
        self.top = 0.0  # the largest singular value, once it is known
        # torch's maximum keeps a NaN, Python's loses one that does not come first.
        # A transposed block would be copied.
        ends = [torch.stack((b.mT if b.stride(0) == 1 else b).aminmax()).abs().max() for b in self._entries()]
        largest = float(torch.stack(ends).max())
        if not math.isfinite(largest):
            bad = sum(int((~torch.isfinite(block)).sum()) for block in self._entries())
            raise NonFiniteError(
                f"{name}: {bad} of {operands[0].numel()} entries are NaN or Inf: no SVD; repair or leave it out"
            )
        self._kept: list[Tensor] | None = None
        exponent = math.frexp(largest)[1]
        # 2¹⁰²⁴ is not a float. A matrix of zeros has the scale 0.
        self.scale = 2.0 ** min(max(exponent, -1000), 1000) if largest else 0.0
        if not largest:
            return
        self._kept = list(self) if self.shape[1] <= self.width else None

    def _entries(self) -> Iterator[Tensor]:
        """The entries in blocks, as stored where that says the same."""
        whole = (self.operands[0][:, start : start + self.width] for start in range(0, self.shape[1], self.width))
        return whole if len(self.operands) == 1 else self._columns()

    def _columns(self) -> Iterator[Tensor]:
        for start in range(0, self.shape[1], self.width):
            first, *rest = (self._moved(X[:, start : start + self.width]) for X in self.operands)
            yield first.sub_(rest[0]) if rest else first

    def _moved(self, block: Tensor) -> Tensor:
        """A copy of a block on the device, in float64; moved as stored, the fewest bytes, through pinned memory."""
        if block.device != self.device and self.device.type == "cuda":
            block = block.contiguous().pin_memory().to(self.device, non_blocking=True)
        return block.to(self.device).to(torch.float64, copy=True)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._kept if self._kept is not None else (b.div_(self.scale) for b in self._columns())

    def gram(self, basis: Tensor | None) -> Tensor:
        """Upper triangle of (basisᵀ A)(basisᵀ A)ᵀ; the basis is the identity when None."""
        n = self.shape[0] if basis is None else basis.shape[1]
        G = torch.zeros(n, n, dtype=torch.float64, device=self.device)
        for block in self:
            _add_gram(G, block if basis is None else basis.mT @ block)
        return G

    def times(self, right: Tensor | Iterable[Tensor], left: Tensor | None = None) -> Tensor:
        """A R, or L A R, for R whole or in blocks of rows as wide as this matrix's blocks of columns."""
        rows = torch.split(right, self.width) if isinstance(right, Tensor) else right
        out: Tensor | None = None
        for block, part in zip(self, rows, strict=True):
            mine = block if left is None else left @ block
            out = mine @ part if out is None else out.addmm_(mine, part)
        if out is None:
            raise AssertionError("a matrix has at least one block")
        return out

    def transposed(self) -> Iterator[Tensor]:
        """Aᵀ in blocks of rows."""
        return (block.mT for block in self)

    def transposed_times(self, X: Tensor) -> Tensor:
        """Aᵀ X."""
        return torch.cat([block.mT @ X for block in self])

    def coupling(self, X: Tensor) -> Tensor:
        """A (Aᵀ X), block by block: accurate relative to ‖A‖·‖Aᵀ X‖, which the Gram matrix is not."""
        out = torch.zeros_like(X)
        for block in self:
            out.addmm_(block, block.mT @ X)
        return out


def _add_gram(G: Tensor, Y: Tensor) -> None:
    """G + Y Yᵀ in place, upper triangle only: by panels, 9/16 of the flops of the full product."""
    n = len(G)
    columns = max(128, -(-n // 8))
    for c in range(0, n, columns):
        G[: c + columns, c : c + columns].addmm_(Y[: c + columns], Y[c : c + columns].mT)


@lru_cache(maxsize=8)
def _probes(n: int, device: torch.device) -> Tensor:
    """The same random vectors every time, (PROBES, n), or the identity where that is smaller."""
    if n <= PROBES:
        return torch.eye(n, dtype=torch.float64, device=device)
    return torch.randn(PROBES, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)


def _left_vectors(A: _Blocks, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading k left singular vectors of a matrix whose short side comes first, all its values, their errors.

    The errors are a priori ones.
    """
    n, m = A.shape
    if k == 0 and n < m:  # square matrices have small values almost always, and those need vectors
        S = torch.linalg.eigvalsh(A.gram(None), UPLO="U").flip(0).clamp(min=0).sqrt()
        A.top = float(S[0])
        if S[-1] > max(DEFLATE, m * _EPS) * A.top:
            return S.new_zeros(n, 0), S, n * _EPS * (A.top**2 / S + A.top)
    if n >= SUBSET_SIDE and k and SUBSET_SHARE * k <= n < m and A.device.type == "cpu":
        squares, X = _leading_eigenvectors(A.gram(None), k)
        S = squares.clamp(min=0).sqrt()
        A.top = float(S[0])
        if S[-1] > max(DEFLATE, m * _EPS) * A.top:  # none of the values needs deflation
            return X, S, n * _EPS * (A.top**2 / S + A.top)
    vectors, values, errors = [], [], []
    basis: Tensor | None = None
    floor = 0.0
    while True:
        squares, E = torch.linalg.eigh(A.gram(basis), UPLO="U")
        S = squares.flip(0).clamp(min=0).sqrt()
        U = E.flip(1) if basis is None else basis @ E.flip(1)
        top = float(S[0])
        A.top = max(A.top, top)
        floor = floor or m * _EPS * top
        kept = len(S) if top <= floor else int((S >= max(DEFLATE * top, floor)).sum())
        head, tail = U[:, :kept], U[:, kept:]
        if tail.shape[1]:
            # One step of subspace refinement: rotate the tail out of the head by the first-order angle.
            angle = (head.mT @ A.coupling(tail)) / (S[:kept, None] ** 2)
            tail = torch.addmm(tail, head, angle, alpha=-1)
            head.addmm_(U[:, kept:], angle.mT)
        vectors.append(head)
        values.append(S[:kept])
        errors.append(n * _EPS * (top**2 / S[:kept].clamp(min=_EPS * (top or 1.0)) + floor / (m * _EPS)))
        if not tail.shape[1]:
            break
        basis = tail
    if len(values) == 1:
        return vectors[0][:, :k].clone(), values[0], errors[0]  # what is not wanted is freed
    # A level ends where the next begins up to rounding, so the order can break there by less than the error.
    spectrum, order = torch.sort(torch.cat(values), descending=True, stable=True)
    X = torch.cat(vectors, dim=1)
    moved = order[:k] != torch.arange(k, device=order.device)
    if bool(moved.any()):  # few are: the others stay where they are
        X[:, :k][:, moved] = X[:, order[:k][moved]]
    return X[:, :k], spectrum, torch.cat(errors)[order]


def _leading_eigenvectors(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric matrix (its upper triangle; overwritten), descending, and k eigenvectors.

    One reduction to tridiagonal form serves both; the vectors are taken by MRRR, whose orthogonality is then made
    that of rounding.
    """
    import numpy as np
    from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack

    n = len(G)
    lower = G.numpy().T  # column-major, as LAPACK has it: nothing is copied
    size, _ = lapack.dsytrd_lwork(n, lower=1)
    reflectors, diagonal, beside, tau, _ = lapack.dsytrd(lower, lower=1, lwork=int(size), overwrite_a=1)
    squares = eigvalsh_tridiagonal(diagonal, beside, lapack_driver="sterf")
    _, Z = eigh_tridiagonal(diagonal, beside, select="i", select_range=(n - k, n - 1), lapack_driver="stemr")
    X = torch.from_numpy(np.ascontiguousarray(Z[:, ::-1]))
    Q = torch.from_numpy(reflectors[1:, :-1])
    X[1:] = torch.ormqr(Q, torch.from_numpy(tau), X[1:].clone())
    return torch.from_numpy(squares).flip(0), _reorthonormal(X)


def _implied(S: Tensor, n: int, m: int) -> int:
    """How many leading ranks may stay implied: those above `IMPLIED`, if the others are few and none is zero."""
    head = int((S >= IMPLIED * S[0]).sum())
    return head if 4 * (len(S) - head) <= len(S) and S[-1] > m * _EPS * S[0] else 0


def _explicit(A: _Blocks, X: Tensor, S: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors of the long side from rank ``head`` on, orthogonal to the implied ones before; and the
    product Aᵀ X that they are made from, which `_residuals` reads too.
    """
    if head == X.shape[1]:
        return X.new_zeros(A.shape[1], 0), X.new_zeros(A.shape[1], 0)
    product = Z = A.transposed_times(X[:, head:])
    if not head:
        deep = len(S) > 0 and bool(S[-1] <= DEFLATE * S[0])
        return _orthonormal(Z) if deep else _reorthonormal(Z / S), product
    if Z.shape[1]:
        for _ in range(
            2
        ):  # Y Yᵀ Z = Aᵀ X S⁻² Xᵀ A Z for the implied Y; twice is enough to be orthogonal to rounding
            Z = Z - A.transposed_times(X[:, :head] @ ((X[:, :head].mT @ A.times(Z)) / S[:head, None] ** 2))
    return _orthonormal(Z), product


def _residuals(A: _Blocks, X: Tensor, S: Tensor, head: int, tail: Tensor, product: Tensor) -> Tensor:
    """Residual of each rank, measured with probes in place of whole products, plus the rounding of measuring it."""
    n = A.shape[0]
    Z = _probes(n, A.device)
    ZX = Z @ X
    # (A Aᵀ x − σ² x) / σ. Half as much again, as an implied vector has length 1 only up to half of this.
    square = S[:0]
    if head:
        ZG = A.times(A.transposed(), Z)
        square = 1.5 * _certain(ZG @ X[:, :head] - ZX[:, :head] * S[:head] ** 2, len(Z), n) / S[:head]
    explicit = S[head:]
    if len(explicit):
        left = _certain(A.times(tail, Z) - ZX[:, head:] * explicit, len(Z), n)
        right = (product - tail * explicit).norm(dim=0)
        explicit = torch.maximum(left, right)
    return torch.cat([square, explicit]) + _EPS * A.top


def _certain(projected: Tensor, probes: int, n: int) -> Tensor:
    """Bound on the norms of the columns of R from Z R: exact where Z is the identity, else almost certain.

    For Gaussian Z the mean square of Z r is ‖r‖² times χ²/probes, which is below 1/CERTAINTY² once in 3·10¹⁰.
    """
    norms: Tensor = projected.norm(dim=0)
    return norms if n <= PROBES else norms * (CERTAINTY / math.sqrt(probes))


def _orthonormal(Z: Tensor) -> Tensor:
    """Columns of Z made orthonormal in order, directions kept; zero columns become an orthonormal completion."""
    norms = Z.norm(dim=0)
    Q, R = torch.linalg.qr(Z / torch.where(norms > 0, norms, 1.0))
    signed: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return signed


def _reorthonormal(Y: Tensor) -> Tensor:
    """Nearly orthonormal columns (to about eps / DEFLATE²) made so to rounding, in order; cheaper than a QR."""
    G = Y.new_zeros(Y.shape[1], Y.shape[1])
    _add_gram(G, Y.mT)
    R = torch.linalg.cholesky(G, upper=True)
    Q: Tensor = torch.linalg.solve_triangular(R, Y, upper=True, left=False)
    return Q


def _value_errors(S: Tensor, residual: Tensor) -> Tensor:
    """Error bounds of descending singular values: the norm of the residuals over each cluster of overlapping ones.

    A residual alone says that some exact value is near, not which: of two close computed values both may be
    nearest to the same exact one. For a cluster with orthonormal vectors the exact values are as many.
    """
    if not len(S):
        return S
    apart = S[:-1] - S[1:] > residual[:-1] + residual[1:]
    cluster = torch.cat([apart.new_zeros(min(1, len(S))), apart]).cumsum(0)
    return torch.zeros_like(S).index_add_(0, cluster, residual.square()).sqrt()[cluster]


def _gaps(spectrum: Tensor, error: Tensor, *, null_space: bool) -> Tensor:
    """Least distance from each value of a descending spectrum to the exact neighbours, zero included on request."""
    edge = spectrum.new_full((1,), math.inf)
    steps = spectrum[:-1] - spectrum[1:]
    gaps = torch.minimum(torch.cat([edge, steps - error[:-1]]), torch.cat([steps - error[1:], edge])).clamp(min=0)
    return torch.minimum(gaps, spectrum) if null_space or len(spectrum) == 1 else gaps


def _signs(U: Tensor) -> Tensor:
    """+1 or −1 for each column, making its entry of largest magnitude positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
