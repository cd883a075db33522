"""Matrices whose singular values, vectors and angles are known because they were put there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=rng(seed), dtype=torch.float64)


def orthonormal(d: int, k: int, seed: int = 0) -> Tensor:
    """(d, k), orthonormal columns, uniformly distributed."""
    Q, R = torch.linalg.qr(gaussian(d, k, seed))
    return Q * R.diagonal().sign()


def with_spectrum(S: Sequence[float] | Tensor, out: int, into: int, seed: int = 0) -> Tensor:
    """U diag(S) Vh with random U and V. What is stored is rounded: its singular values are S to about eps·S[0]."""
    S = torch.as_tensor(S, dtype=torch.float64)
    return (orthonormal(out, len(S), 2 * seed) * S) @ orthonormal(into, len(S), 2 * seed + 1).mT


def log_spectrum(smallest: float, n: int) -> Tensor:
    """n values from 1 to ``smallest``, evenly spread in the logarithm."""
    return torch.logspace(0, math.log10(smallest), n, dtype=torch.float64)


def weight_like(out: int, into: int, seed: int = 0, outliers: int = 8) -> Tensor:
    """A bulk of independent entries with a few larger directions: how trained weight matrices look. float32."""
    spikes = with_spectrum(torch.linspace(2.5, 1.2, outliers), out, into, seed)
    bulk = gaussian(out, into, seed + 1000) / (math.sqrt(out) + math.sqrt(into))
    return (bulk + spikes).float()


def rotated(U: Tensor, angles: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """Columns of U, each turned by its own angle into its own direction outside of their span.

    The cosine of column i with its image is cos(angles[i]), with the image of any other column 0, so the angles
    are the principal angles between the two spans. Needs 2k ≤ d.
    """
    d, k = U.shape
    noise = gaussian(d, k, seed + 77)
    for _ in range(2):  # twice is enough to be orthogonal to rounding
        noise = noise - U @ (U.mT @ noise)
    outside = torch.linalg.qr(noise)[0]
    angles = torch.as_tensor(angles, dtype=torch.float64)
    return U * angles.cos() + outside * angles.sin()


def hilbert(rows: int, columns: int) -> Tensor:
    """Entries 1/(i + j + 1): singular values fall by a factor of about 30 each."""
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return 1 / (i + j + 1).double()


def hadamard(n: int) -> Tensor:
    """n × n of ±1, n a power of two: all singular values exactly √n."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)], 0)
    return H


def off_orthonormal(X: Tensor) -> float:
    """Largest entry of XᵀX − 1."""
    return float((X.mT @ X - torch.eye(X.shape[1], dtype=X.dtype)).abs().max())
