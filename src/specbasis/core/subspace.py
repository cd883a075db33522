"""Angles between subspaces, and what chance gives for them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def subspace_overlap(U: Float[Tensor, "d k"], V: Float[Tensor, "d k"]) -> float:
    """Share of one subspace that lies in the other, for orthonormal columns.

    ‖Uᵀ V‖_F² / k, the mean squared cosine of the principal angles: 0 (orthogonal) … 1 (equal); invariant to
    rotations inside either subspace. Independent subspaces give k/d on average. Costs 2·d·k² flops.
    """
    return float((U.mT @ V).square().sum()) / U.shape[1]


def nested_overlap(C: Float[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Subspace overlap of the leading j vectors for every j = 1 … k, from C = Uᵀ V alone.

    ‖C[:j, :j]‖_F² / j. Costs O(k²).
    """
    sums = C.square().cumsum(0).cumsum(1).diagonal()
    return sums / torch.arange(1, len(C) + 1, dtype=C.dtype, device=C.device)


def principal_angles(U: Float[Tensor, "d k"], V: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
    """Principal angles between two subspaces with orthonormal columns, in radians, ascending, 0 … π/2.

    cos θ_j = σ_j(Uᵀ V); small angles from their sines, σ(V − U Uᵀ V), where the cosine has no digits left.

    Source: Björck & Golub 1973; Knyazev & Argentati 2002, Alg. 3.1.
    """
    C = U.mT @ V
    cosines = torch.linalg.svdvals(C).clamp(max=1.0)  # descending: angles ascend
    sines = torch.linalg.svdvals(V - U @ C).flip(0).clamp(max=1.0)
    return torch.where(cosines**2 < 0.5, torch.arccos(cosines), torch.arcsin(sines))


def chance_alignment(d: int) -> float:
    """Expected |cosine| of two independent uniform unit vectors in R^d.

    E|cos θ| = Γ(d/2) / (√π Γ((d+1)/2)) → √(2/(π d)); exact, as cos² θ ~ Beta(1/2, (d−1)/2).
    """
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
