"""Cosines between the singular vectors of two matrices, also where those of one side are only implied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.blocks import EPS
from specbasis.core.residuals import certain, probes
from specbasis.core.svd import SVD, HalfSVD


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
    Z = probes(n, cross.device)
    deviation = Z @ cross - a.A.times(b.A.transposed(), Z)
    Sa, Sb = a.S / a.A.scale, b.S / b.A.scale
    rounding = certain(deviation.reshape(-1, 1), len(Z), n) + n * EPS * a.A.top * b.A.top
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
