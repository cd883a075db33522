"""Singular value decompositions with an error bound for every rank.

The default route is the float64 Gram matrix of the short side and a symmetric eigensolver. It is faster than a
float32 SVD and more accurate, but squaring the spectrum costs half the digits of small singular values. They are
won back by *deflation*: ranks below ``DEFLATE`` times the largest value of their level are re-decomposed at their
own scale, after one step of subspace refinement that cleans them of the ranks above. Singular values then differ from
those of gesdd in float64 by at most some hundred eps·σ₁ anywhere in the spectrum (tests/test_svd.py), and every one
carries its measured bound, so no second driver is needed.

The matrix is read in column blocks: a bfloat16 matrix is never copied whole to float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.errors import InputError, NonFiniteError

ALGORITHM = "gram-deflated-1"
"""Name and version of the numerical route; results made by different routes are not bit-equal."""

DEFLATE = 1e-3
"""Ranks below this share of their level's largest value are decomposed again at their own scale.

A symmetric eigensolver on the Gram matrix leaves a relative error of about eps / DEFLATE² = 2e-10 in the smallest
value that it keeps. Larger: more levels, more time. Smaller: fewer right digits in small singular values.
"""

_EPS = torch.finfo(torch.float64).eps
_BLOCK_BYTES = 32 * 2**20  # one float64 block of columns


@dataclass(frozen=True, eq=False)
class SVD:
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


@torch.no_grad()
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

    Cost for short side n, long side m, k ranks: n²m (Gram) + about 9n³ (eigensolver) + 4nmk flops; memory n² and
    (n + m)k float64 beside W.

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
    if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point():
        raise InputError(
            f"{name}: got {W.dtype} of shape {tuple(W.shape)}; want a floating-point matrix (out, in) with entries"
        )
    short = min(W.shape)
    k = short if ranks is None else ranks
    if not 1 <= k <= short:
        raise InputError(f"{name}: got ranks = {ranks} for a matrix {tuple(W.shape)}; want 1 … {short}")

    wide = W.shape[0] <= W.shape[1]
    if minus is not None and (minus.shape != W.shape or not minus.is_floating_point()):
        raise InputError(
            f"{name}: got {tuple(W.shape)} minus {minus.dtype} {tuple(minus.shape)}; want floats of one shape"
        )
    operands = [X if wide else X.mT for X in (W, minus) if X is not None]
    A = _Blocks(operands, name)  # short side first
    X, spectrum, error = _left_vectors(A)
    X = X[:, :k]
    if spectrum[k - 1] < DEFLATE**2 * spectrum[0]:
        # Refinement keeps columns orthogonal to first order in eps·σ_0/σ_i: not enough for ranks this deep.
        X = _orthonormal(X)
    Z = A.transposed_times(X)
    S = spectrum[:k]
    Y = _orthonormal(Z) if S[-1] <= DEFLATE * S[0] else _reorthonormal(Z / S)
    residual = (
        torch.maximum(
            (A.times(Y) - X * S).norm(dim=0),
            (Z - Y * S).norm(dim=0),
        )
        + _EPS * spectrum[0]
    )
    error[:k] = _value_errors(S, residual)

    U, V = (X, Y) if wide else (Y, X)
    sign = _signs(U)
    scale = A.scale
    return SVD(
        (U * sign).contiguous(),
        S * scale,
        (V * sign).mT.contiguous(),
        spectrum=spectrum * scale,
        spectrum_error=error * scale,
        residual=residual * scale,
        gap=_gaps(spectrum, error, null_space=W.shape[0] != W.shape[1])[:k] * scale,
    )


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


class _Blocks:
    """A matrix, or the difference of two, in float64 blocks of columns, scaled to a largest entry near 1.

    The short side comes first. The scale is a power of two, so that scaling is exact and squares neither overflow
    nor vanish.
    """

    def __init__(self, operands: list[Tensor], name: str) -> None:
        # Exact, and torch has no arithmetic in 8-bit floats.
        self.operands = [X if X.element_size() > 1 else X.to(torch.bfloat16) for X in operands]
        self.shape, self.device = operands[0].shape, operands[0].device
        self.width = max(1, _BLOCK_BYTES // (8 * self.shape[0]))
        # torch's maximum keeps a NaN, Python's loses one that does not come first.
        largest = float(torch.stack([block.abs().max() for block in self._columns()]).max())
        if not math.isfinite(largest):
            bad = sum(int((~torch.isfinite(block)).sum()) for block in self._columns())
            raise NonFiniteError(
                f"{name}: {bad} of {operands[0].numel()} entries are NaN or Inf: no SVD; repair or leave it out"
            )
        exponent = math.frexp(largest)[1]
        self.scale = 2.0 ** min(max(exponent, -1000), 1000)  # 2¹⁰²⁴ is not a float

    def _columns(self) -> Iterator[Tensor]:
        for start in range(0, self.shape[1], self.width):
            first, *rest = (X[:, start : start + self.width].to(torch.float64) for X in self.operands)
            yield first - rest[0] if rest else first

    def __iter__(self) -> Iterator[Tensor]:
        for block in self._columns():
            yield block / self.scale

    def gram(self, basis: Tensor | None) -> Tensor:
        """Lower triangle of (basisᵀ A)(basisᵀ A)ᵀ; the basis is the identity when None."""
        n = self.shape[0] if basis is None else basis.shape[1]
        G = torch.zeros(n, n, dtype=torch.float64, device=self.device)
        rows = max(128, -(-n // 8))  # row panels: 9/16 of the flops of the full product
        for block in self:
            Y = block if basis is None else basis.mT @ block
            for r in range(0, n, rows):
                G[r : r + rows, : r + rows].addmm_(Y[r : r + rows], Y[: r + rows].mT)
        return G

    def times(self, X: Tensor) -> Tensor:
        """A X."""
        out = torch.zeros(self.shape[0], X.shape[1], dtype=torch.float64, device=self.device)
        for block, rows in zip(self, torch.split(X, self.width), strict=True):
            out.addmm_(block, rows)
        return out

    def transposed_times(self, X: Tensor) -> Tensor:
        """Aᵀ X."""
        return torch.cat([block.mT @ X for block in self])

    def coupling(self, X: Tensor) -> Tensor:
        """A (Aᵀ X), block by block: accurate relative to ‖A‖·‖Aᵀ X‖, which the Gram matrix is not."""
        out = torch.zeros_like(X)
        for block in self:
            out.addmm_(block, block.mT @ X)
        return out


def _left_vectors(A: _Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """All left singular vectors of a matrix whose short side comes first, its values, and their a priori errors."""
    n, m = A.shape
    vectors, values, errors = [], [], []
    basis: Tensor | None = None
    floor = 0.0
    while True:
        squares, E = torch.linalg.eigh(A.gram(basis), UPLO="L")
        S = squares.flip(0).clamp(min=0).sqrt()
        U = E.flip(1) if basis is None else basis @ E.flip(1)
        top = float(S[0])
        floor = floor or m * _EPS * top
        kept = len(S) if top <= floor else int((S >= max(DEFLATE * top, floor)).sum())
        head, tail = U[:, :kept], U[:, kept:]
        if tail.shape[1]:
            # One step of subspace refinement: rotate the tail out of the head by the first-order angle.
            angle = (head.mT @ A.coupling(tail)) / (S[:kept, None] ** 2)
            head, tail = head + tail @ angle.mT, tail - head @ angle
        vectors.append(head)
        values.append(S[:kept])
        errors.append(n * _EPS * (top**2 / S[:kept].clamp(min=_EPS * (top or 1.0)) + floor / (m * _EPS)))
        if not tail.shape[1]:
            break
        basis = tail
    # A level ends where the next begins up to rounding, so the order can break there by less than the error.
    spectrum, order = torch.sort(torch.cat(values), descending=True, stable=True)
    return torch.cat(vectors, dim=1)[:, order], spectrum, torch.cat(errors)[order]


def _orthonormal(Z: Tensor) -> Tensor:
    """Columns of Z made orthonormal in order, directions kept; zero columns become an orthonormal completion."""
    norms = Z.norm(dim=0)
    Q, R = torch.linalg.qr(Z / torch.where(norms > 0, norms, 1.0))
    signed: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return signed


def _reorthonormal(Y: Tensor) -> Tensor:
    """Nearly orthonormal columns (to about eps / DEFLATE²) made so to rounding, in order; cheaper than a QR."""
    R = torch.linalg.cholesky(Y.mT @ Y, upper=True)
    Q: Tensor = torch.linalg.solve_triangular(R, Y, upper=True, left=False)
    return Q


def _value_errors(S: Tensor, residual: Tensor) -> Tensor:
    """Error bounds of descending singular values: the norm of the residuals over each cluster of overlapping ones.

    A residual alone says that some exact value is near, not which: of two close computed values both may be
    nearest to the same exact one. For a cluster with orthonormal vectors the exact values are as many.
    """
    apart = S[:-1] - S[1:] > residual[:-1] + residual[1:]
    cluster = torch.cat([apart.new_zeros(1), apart]).cumsum(0)
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
