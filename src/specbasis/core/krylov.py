"""A few leading ranks of a large matrix by block Krylov iteration, each with its certificate.

Both ways keep a basis Q of the span of X₀, (A Aᵀ) X₀, (A Aᵀ)² X₀, … with full reorthogonalisation in float64, and
take the Ritz vectors of A Aᵀ in it. `approximate_svd` iterates in float64 until every rank is known to 1e-8;
`quick_svd` takes a few steps with products in float32, and says of every rank how far it came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.blocks import EPS, Blocks, orthonormal, subtract
from specbasis.core.residuals import gaps, value_errors
from specbasis.core.spectrum import Density
from specbasis.core.svd import FLOOR, HalfSVD, certified, half_svd

CONVERGED = 1e-8
"""Bound residual/gap at which the iteration of `approximate_svd` stops."""

QUICK = 1e-2
"""Bound residual/gap up to which a rank of `quick_svd` counts as resolved."""

STEPS = 8
"""Products with A Aᵀ that `quick_svd` takes at most. More: more ranks certified where they hardly stand apart."""

PROBES = 16
"""Random columns, at least, of a start of `quick_svd`: they find what a given start does not span, and estimate
sums over the whole spectrum."""

ORDINARY_SINGLE = 60
"""Exponents of a largest entry whose products are in float32's range before they are scaled."""

WIDTH = 64
"""Columns of a block of float32 that is made float64: it stays in a core's cache."""


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

    It stops when the bound residual/gap of every rank is below ``CONVERGED``, or its residual rounding, and falls
    back to `half_svd` where that would have been cheaper. Only the leading k + 1 values are known, and ``spectrum``
    holds only those. Residuals are measured as everywhere; the gaps are those of the Ritz values, so a value that
    the iteration has not seen, however unlikely from a random start, would not be noticed.

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
    A = Blocks.of(W, minus, name, device)
    n, m = A.shape
    k = min(ranks, n - 1)
    width = min(n, k + max(8, k // 4))

    def enough(ritz: _Ritz) -> bool:
        gap = gaps(ritz.S, ritz.residual, null_space=True)
        return bool(((ritz.residual <= CONVERGED * gap) | (ritz.residual <= rounding(ritz.S)))[:k].all())

    def affordable(d: int) -> bool:
        # Products with A, orthogonalisation, Ritz vectors, of all steps so far.
        spent = 4.0 * n * m * d + 7.0 * n * d * (d + width) + 11.0 * (d * (d + width)) ** 2 / (4 * width)
        return spent <= _exact(n, m) and d + width <= n

    def rounding(S: Tensor) -> Tensor:
        return n * EPS * float(S[0]) ** 2 / S

    ritz = None
    if A.scale and k:
        ritz = _krylov(A.coupling, _start(A, width, start)[0], k + 1, enough, affordable)
    if ritz is None or not enough(ritz):
        exact = half_svd(W, k, minus=minus, name=name, device=device, implied=False)
        return replace(exact, spectrum=exact.spectrum[: k + 1], spectrum_error=exact.spectrum_error[: k + 1])
    A.top = float(ritz.S[0])
    X = ritz.X[:, :k].clone()
    error = ritz.residual + rounding(ritz.S)
    return certified(A, X, ritz.S, error, 0, W.shape[0] <= W.shape[1], X[:, :0], null_space=True)


@torch.no_grad()
def quick_svd(
    W: Float[Tensor, "out in"],
    ranks: int,
    *,
    minus: Float[Tensor, "out in"] | None = None,
    start: Float[Tensor, "short b"] | None = None,
    name: str = "matrix",
    device: torch.device | None = None,
) -> HalfSVD:
    """The leading k singular triplets in a few block Krylov steps, as far as these go, each with its certificate.

    Products in float32, then one Rayleigh–Ritz step in float64 over the leading Ritz vectors X: with Y = AᵀX and
    G = XᵀA Y = F diag(σ²) Fᵀ the triplets are (X F, σ, Y F/σ). Of these Aᵀx = σ y holds exactly, and the residual
    is ‖A y − σ x‖, measured in float64 on the matrix itself; where a difference was rounded to float32, 2⁻²⁴‖A‖ is
    added. The gaps are those of the Ritz values, the next of which after k counts with its own residual: a value
    that the iteration has not seen, however unlikely from a random start, would not be noticed. A rank whose bound
    exceeds ``QUICK`` is not resolved; none is guessed. ``spectrum`` holds the leading k + 1 values, ``density``
    what the random columns say of all of them. Where the exact way is cheaper it is taken, with the same fields.

    Costs 4nmb flops a step in float32, at most `STEPS` steps of b = 2k columns, at least 2·`PROBES`, and about two
    more for the step in float64; memory 4nm bytes for the copy in float32, and 16·n·b·steps.

    Args, Raises: as `approximate_svd`.

    Source: Musco & Musco 2015, Alg. 2; the certificate in mixed precision is this project's.
    """
    A = Blocks.of(W, minus, name, device)
    n, m = A.shape
    k, wide = min(ranks, n), W.shape[0] <= W.shape[1]
    width = _width(k)
    if not A.scale or quick_cost(n, m, k) is None:
        return _leading(half_svd(W, k, minus=minus, name=name, device=device, implied=False), k)
    single, unit, error = _single(A)

    def product(X: Tensor) -> Tensor:
        return (single @ (single.mT @ X.to(torch.float32)).mul_(unit)).mul_(unit).to(torch.float64)

    def enough(ritz: _Ritz) -> bool:
        gap = gaps(ritz.S[: k + 1], ritz.residual[: k + 1], null_space=True)
        # Half: the residual of products in float32 is not the one that is certified.
        return bool((ritz.residual[:k] <= QUICK / 2 * gap[:k]).all())

    first, random = _start(A, width, None if start is None else start[:, : width - PROBES])
    ritz = _krylov(product, first, k + PROBES // 2, enough, lambda d: d < STEPS * width)
    X, Y, S, residual = _polished(single, unit, ritz.X)
    density = ritz.density(S[:k], A.scale, random, width)
    residual = residual + error + EPS * S[0]
    A.top = float(S[0])
    errors = value_errors(S, residual)[: k + 1]
    gap = gaps(S[: k + 1], errors, null_space=True)[:k]
    S, residual, gap, errors = (x * A.scale for x in (S, residual, gap, errors))
    X, Y = X[:, :k].clone(), Y[:, :k].clone()
    return HalfSVD(A, X, S[:k], 0, Y, S[: k + 1], errors, residual[:k], gap, wide, X[:, :0], density)


def quick_cost(n: int, m: int, k: int) -> tuple[float, int] | None:
    """What `quick_svd` costs for k ranks of a matrix with sides n ≤ m; None: the exact way.

    Flops in float64, and bytes: the copy in float32, the basis with its image, vectors of both sides of a triple.
    """
    width = _width(k)
    d = STEPS * width
    # Products in float32 and in float64, orthogonalisation, Ritz vectors; twice, as small products are slower.
    flops = 2.0 * n * m * (d + 4 * width) + 7.0 * n * d**2 + 3.0 * d**4 / width
    if d > n or 2 * flops > _exact(n, m):
        return None
    return flops, 4 * n * m + 16 * n * d + 8 * 3 * (n + m) * k


def _width(k: int) -> int:
    return 2 * max(k, PROBES)


def _exact(n: int, m: int) -> float:
    """Cost of the exact way: the Gram matrix, and the eigensolver."""
    return 1.125 * n * n * m + 11.0 * n**3


def _leading(exact: HalfSVD, k: int) -> HalfSVD:
    """An exact decomposition, of which no more is told than of a quick one."""
    whole = exact.spectrum
    return replace(
        exact,
        spectrum=whole[: k + 1],
        spectrum_error=exact.spectrum_error[: k + 1],
        density=Density(whole),
    )


@dataclass(frozen=True, eq=False)
class _Ritz:
    """What a Krylov basis Q says of A Aᵀ: leading Ritz vectors X, with their values and residuals.

    Attributes:
        Q: the basis, (n, d).
        H: Qᵀ A Aᵀ Q, (d, d).
        X: leading Ritz vectors, (n, k).
        S: roots of their values, (k,).
        residual: ‖A Aᵀ x − σ² x‖ / σ, (k,).
    """

    Q: Tensor
    H: Tensor
    X: Tensor
    S: Tensor
    residual: Tensor

    def density(self, head: Tensor, scale: float, Z: Tensor, width: int) -> Density:
        """The whole spectrum, by Gaussian columns Z of the first block: of all blocks, and of all but the last."""
        k, d = len(head), len(self.H)
        nodes, weights = [], []
        for columns in (d, d - width) if d > width else (d,):
            S, F = _values(self.H[:columns, :columns])
            nodes.append(S[k:] * scale)
            weights.append((F[:, k:].mT @ (self.Q[:, :columns].mT @ Z)).square())
        return Density(head * scale, len(self.Q) - k, tuple(nodes), tuple(weights))


def _values(H: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of the eigenvalues of a positive matrix, descending, and its eigenvectors."""
    squares, F = torch.linalg.eigh((H + H.mT) / 2)
    squares, F = squares.flip(0), F.flip(1)
    return squares.clamp(min=EPS * float(squares[0])).sqrt(), F


def _start(A: Blocks, width: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """An orthonormal first block, and the Gaussian columns that it spans beside those that are given."""
    n = A.shape[0]
    random = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(A.device)
    given = random[:, :0] if start is None else start[:, :width].to(random)
    random = random[:, given.shape[1] :]
    return torch.linalg.qr(torch.cat([given, random], dim=1))[0], random


def _krylov(
    product: Callable[[Tensor], Tensor],
    X: Tensor,
    k: int,
    enough: Callable[[_Ritz], bool],
    affordable: Callable[[int], bool],
) -> _Ritz:
    """Leading k Ritz pairs of A Aᵀ, once they are good enough, or d columns are all that is affordable."""
    Q, GQ = X[:, :0], X[:, :0]
    while True:
        Y = product(X)
        Q, GQ = torch.cat([Q, X], dim=1), torch.cat([GQ, Y], dim=1)
        H = Q.mT @ GQ
        S, F = (x[..., :k] for x in _values(H))
        leading = Q @ F
        ritz = _Ritz(Q, H, leading, S, (GQ @ F - leading * S**2).norm(dim=0) / S)
        if enough(ritz) or not affordable(Q.shape[1]):
            return ritz
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            Y = Y - Q @ (Q.mT @ Y)
            Y = torch.linalg.qr(Y)[0]
        X = Y


def _single(A: Blocks) -> tuple[Tensor, float, float]:
    """The matrix in float32 on its device, the power of two that scales it, and a bound on what it was rounded by.

    Of ordinary size it is as stored, without a copy where that is float32. The bound is on the norm, scaled.
    """
    ordinary = 2.0**-ORDINARY_SINGLE < A.scale < 2.0**ORDINARY_SINGLE
    if not ordinary or any(X.element_size() > 4 for X in A.operands):
        single, unit, exact = torch.cat([block.to(torch.float32) for block in A], dim=1), 1.0, False
    else:
        first, *rest = A.operands
        single, unit, exact = first.to(A.device, torch.float32, copy=bool(rest)), 1 / A.scale, not rest
        for X in rest:
            subtract(single, X)
    error = 0.0 if exact else 2.0**-24 * unit * float(torch.linalg.vector_norm(single, dtype=torch.float64))
    return single, unit, error


def _polished(A: Tensor, unit: float, X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Rayleigh–Ritz step in float64: vectors of both sides, values, and ‖A y − σ x‖; Aᵀ x = σ y to rounding."""
    Y, Z = [], torch.zeros_like(X)
    for start in range(0, A.shape[1], WIDTH):
        block = A[:, start : start + WIDTH].to(torch.float64).mul_(unit)
        Y.append(block.mT @ X)
        Z.addmm_(block, Y[-1])
    H = X.mT @ Z
    S, F = _values(H)
    X, long = X @ F, torch.cat(Y) @ F / S
    residual = (Z @ F - X * S**2).norm(dim=0) / S
    # Below FLOOR a vector that is taken through the other side has no digits: any will do, and none is resolved.
    deep = S < FLOOR * S[0]
    return X, orthonormal(long) if bool(deep.any()) else long, S, torch.where(deep, residual + S, residual)
