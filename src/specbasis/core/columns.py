"""Columns of a basis: some of them, random ones, and random ones that are orthogonal to the others."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def columns(X: Tensor, ranks: Tensor) -> Tensor:
    """Some columns: a view where they follow one another, since gathering them costs more than using them."""
    if len(ranks) and int(ranks[-1] - ranks[0]) + 1 == len(ranks):
        return X[:, int(ranks[0]) : int(ranks[-1]) + 1]
    return X[:, ranks]


def random_orthonormal(d: int, r: int, generator: torch.Generator) -> Tensor:
    """(d, r), uniformly distributed orthonormal columns.

    The Q of a Gaussian matrix, whose Householder vectors are themselves Gaussian: they are drawn, and nothing is
    factored (Stewart 1980, SIAM J. Numer. Anal. 17, 403).
    """
    Z = gaussian(d, r, generator)
    first, norm = Z.diagonal(), Z.tril().square_().sum(0).sqrt_()
    beta = torch.where(first < 0, norm, -norm)
    Z, tau = Z / (first - beta), (beta - first) / beta
    Q: Tensor = torch.linalg.householder_product(Z, tau)
    return Q.mul_(beta.sign())


def random_complement(basis: Tensor, ranks: Tensor, generator: torch.Generator) -> Tensor:
    """(d, r), such columns, one for each of some ranks of a basis (d, k), orthogonal to its other ranks."""
    if len(basis) == basis.shape[1]:  # the complement is what these ranks span
        return columns(basis, ranks) @ random_orthonormal(len(ranks), len(ranks), generator).to(basis.device)
    Z = gaussian(len(basis), len(ranks), generator).to(basis.device)
    for _ in range(2):  # twice is enough to be orthogonal to rounding
        inside = basis.mT @ Z
        inside[ranks] = 0
        Z.addmm_(basis, inside, alpha=-1)
    Q, R = torch.linalg.qr(Z)
    vectors: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)  # the sign that makes the distribution uniform
    return vectors


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Independent normal numbers, drawn in float32, which is five times faster than in float64 and as random."""
    return torch.randn(rows, columns, generator=generator).to(torch.float64)


def generator_of(seed: int | str) -> torch.Generator:
    """A generator of random numbers from a seed; text is hashed."""
    number = seed if isinstance(seed, int) else int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(number)
