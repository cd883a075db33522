"""How far off a decomposition is: residuals measured with random probes, errors of values, gaps."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from specbasis.core.blocks import EPS, Blocks

PROBES = 24
"""Random vectors that measure residuals. More: tighter and dearer."""

CERTAINTY = 4.0
"""A norm measured with probes is multiplied by this, so that it is a bound but for a chance of 3e-11."""


@lru_cache(maxsize=8)
def probes(n: int, device: torch.device) -> Tensor:
    """The same random vectors every time, (PROBES, n), or the identity where that is smaller."""
    if n <= PROBES:
        return torch.eye(n, dtype=torch.float64, device=device)
    return torch.randn(PROBES, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)


def residuals(A: Blocks, X: Tensor, S: Tensor, head: int, tail: Tensor, product: Tensor) -> Tensor:
    """Residual of each rank, measured with probes in place of whole products, plus the rounding of measuring it."""
    n = A.shape[0]
    Z = probes(n, A.device)
    ZX = Z @ X
    # (A Aᵀ x − σ² x) / σ. Half as much again, as an implied vector has length 1 only up to half of this.
    square = S[:0]
    if head:
        ZG = A.times(A.transposed(), Z)
        square = 1.5 * certain(ZG @ X[:, :head] - ZX[:, :head] * S[:head] ** 2, len(Z), n) / S[:head]
    explicit = S[head:]
    if len(explicit):
        left = certain(A.times(tail, Z) - ZX[:, head:] * explicit, len(Z), n)
        right = (product - tail * explicit).norm(dim=0)
        explicit = torch.maximum(left, right)
    return torch.cat([square, explicit]) + EPS * A.top


def certain(projected: Tensor, probes: int, n: int) -> Tensor:
    """Bound on the norms of the columns of R from Z R: exact where Z is the identity, else almost certain.

    For Gaussian Z the mean square of Z r is ‖r‖² times χ²/probes, which is below 1/CERTAINTY² once in 3·10¹⁰.
    """
    norms: Tensor = projected.norm(dim=0)
    return norms if n <= PROBES else norms * (CERTAINTY / math.sqrt(probes))


def value_errors(S: Tensor, residual: Tensor) -> Tensor:
    """Error bounds of descending singular values: the norm of the residuals over each cluster of overlapping ones.

    A residual alone says that some exact value is near, not which: of two close computed values both may be
    nearest to the same exact one. For a cluster with orthonormal vectors the exact values are as many.
    """
    if not len(S):
        return S
    apart = S[:-1] - S[1:] > residual[:-1] + residual[1:]
    cluster = torch.cat([apart.new_zeros(min(1, len(S))), apart]).cumsum(0)
    return torch.zeros_like(S).index_add_(0, cluster, residual.square()).sqrt()[cluster]


def gaps(spectrum: Tensor, error: Tensor, *, null_space: bool) -> Tensor:
    """Least distance from each value of a descending spectrum to the exact neighbours, zero included on request."""
    edge = spectrum.new_full((1,), math.inf)
    steps = spectrum[:-1] - spectrum[1:]
    gaps = torch.minimum(torch.cat([edge, steps - error[:-1]]), torch.cat([steps - error[1:], edge])).clamp(min=0)
    return torch.minimum(gaps, spectrum) if null_space or len(spectrum) == 1 else gaps
