"""Angles between singular vectors and between subspaces, their bounds, and what chance gives for them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.svd import SVD, HalfSVD


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


def alignment(X: Float[Tensor, "d a"], Y: Float[Tensor, "d b"]) -> Float[Tensor, " k"]:
    """Absolute cosine of the vectors of equal rank index.

    a_i = |⟨x_i, y_i⟩|, 0 … 1, for the k = min(a, b) ranks that both have, no matching of ranks, invariant to signs.
    Costs 2·d·k flops.

    Source: Yu et al. 2026, §3.1.
    """
    k = min(X.shape[1], Y.shape[1])
    return (X[:, :k] * Y[:, :k]).sum(dim=0).abs().clamp(max=1.0)


def alignment_bound(a: SVD | HalfSVD, b: SVD | HalfSVD) -> Float[Tensor, " k"]:
    """Bound on the numerical error of the alignment of two computed vectors of equal rank.

    π/√2 · (bound_a + bound_b), at most 1: each computed vector is within the angle arcsin(√2·bound) of the exact
    one, arcsin x ≤ π/2·x, and a cosine moves by no more than the angles do.
    """
    k = min(len(a.S), len(b.S))
    return (math.pi / math.sqrt(2) * (a.bound[:k] + b.bound[:k])).clamp(max=1.0)


def subspace_bound(s: SVD | HalfSVD) -> Float[Tensor, " k"]:
    """Bound on ‖sin Θ‖_F between the computed leading j vectors of one side and the exact ones, j = 1 … k.

    √2 · √(Σ_{i<j} residual_i²) / (σ_{j−1} − σ_j), where σ past the end of the spectrum is 0 and the error of σ_j is
    taken off the gap; 0 for the whole space.

    Source: Wedin 1972.
    """
    k = len(s.S)
    after = torch.cat([s.spectrum + s.spectrum_error, s.spectrum.new_zeros(1)])[1 : k + 1]
    gap = s.S - after
    bound = torch.where(gap > 0, math.sqrt(2) * s.residual.square().cumsum(0).sqrt() / gap, math.inf)
    if k == s.shape[0] == s.shape[1]:
        bound[-1] = 0.0
    return bound
