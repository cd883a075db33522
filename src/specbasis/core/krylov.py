"""A few leading ranks of a large matrix by block Krylov iteration, each with its certificate."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.blocks import EPS, Blocks
from specbasis.core.residuals import gaps
from specbasis.core.svd import HalfSVD, certified, half_svd

CONVERGED = 1e-8
"""Bound residual/gap at which the iteration of `approximate_svd` stops."""


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
    A = Blocks.of(W, minus, name, device)
    k = min(ranks, A.shape[0] - 1)
    leading = _krylov(A, k, start) if A.scale and k else None
    if leading is None:
        exact = half_svd(W, k, minus=minus, name=name, device=device, implied=False)
        return replace(exact, spectrum=exact.spectrum[: k + 1], spectrum_error=exact.spectrum_error[: k + 1])
    X, spectrum, error = leading
    return certified(A, X, spectrum, error, 0, W.shape[0] <= W.shape[1], X[:, :0], null_space=True)


def _krylov(A: Blocks, k: int, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
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
        S = squares.clamp(min=EPS * float(squares[0])).sqrt()
        A.top = float(S[0])
        ritz = Q @ F
        residual = (GQ @ F - ritz * squares).norm(dim=0) / S
        gap = gaps(S, residual, null_space=True)
        rounding = n * EPS * A.top**2 / S
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
