"""Alignment: by what angle the singular vectors of equal rank, and the subspaces of leading ones, turned."""

from __future__ import annotations

import math
from functools import partial

import torch

from specbasis.core.subspace import (
    alignment_bound,
    chance_alignment as mean_cosine,
    nested_overlap,
    principal_angles,
    subspace_bound,
)
from specbasis.measures.measure import BOTH_SIDES, PAIR, PAPER, Values, measure
from specbasis.measures.triple import Triple

of_vectors = partial(measure, variants=BOTH_SIDES, vectors=PAIR, nonzero=PAIR, shown="ranks")


def _aligned(t: Triple, first: str, second: str, side: str) -> Values:
    """Alignment of the vectors of two of the three decompositions, with its bound and the ranks that are tied."""
    a, b = getattr(t, first), getattr(t, second)
    if a is b:  # the same matrix: exactly 1, whatever the gaps
        return Values(torch.ones_like(a.S), torch.zeros_like(a.S))
    c = t.cosines(first, second, side)
    k = len(c.diagonal)
    ties = [tied[:k] for tied in (t.tied(first), t.tied(second)) if tied is not None]
    bound = (alignment_bound(a, b) + c.error).clamp(max=1.0)
    return Values(c.alignment, bound, tied=torch.stack(ties).any(dim=0) if ties else None)


@of_vectors(formula="|⟨uᵢ, ũᵢ⟩|, |⟨vᵢ, ṽᵢ⟩|", index="rank", source=PAPER + "§3.1", reads=("rounding",))
def alignment(t: Triple, side: str) -> Values:
    """Alignment of the {side} vectors of equal rank of base and tuned.

    0 … 1; see `specbasis.core.subspace.alignment`.
    """
    return _aligned(t, "base", "tuned", side)


@of_vectors(
    formula="|⟨uᵢ(Δ), uᵢ⟩|, |⟨vᵢ(Δ), vᵢ⟩|",
    index="rank",
    source=PAPER + "Eq. 2",
    vectors=("delta", "base"),
    nonzero=("delta", "base"),
    reads=("rounding",),
)
def update_alignment(t: Triple, side: str) -> Values:
    """Alignment of the {side} vectors of equal rank of the update and base; absent where Δ = 0."""
    return _aligned(t, "delta", "base", side)


@of_vectors(formula="‖UₖᵀŨₖ‖²_F / k, ‖VₖᵀṼₖ‖²_F / k", index="k", source="Björck & Golub 1973")
def subspace_overlap(t: Triple, side: str) -> Values:
    """Overlap of the leading k {side} vectors: mean squared cosine of the angles between the subspaces.

    0 … 1, at powers of two and at all ranks.
    """
    k = t.ranks
    sizes = sorted({min(2**p, k) for p in range(k.bit_length() + 1)})
    if t.identical:
        return Values(torch.ones(len(sizes)).double(), torch.zeros(len(sizes)).double(), index=sizes)
    at = torch.tensor(sizes) - 1
    overlap = nested_overlap(t.matrix(side))
    first, second = (subspace_bound(getattr(t, which))[:k] for which in PAIR)
    bound = (first + second).cpu()
    error = t.cosines("base", "tuned", side).error.cpu()
    counts = torch.tensor(sizes, dtype=overlap.dtype)
    return Values(
        overlap.cpu()[at].clamp(max=1.0),
        (2 * bound[at] / counts.sqrt() + 2 * error[at]).clamp(max=1.0),
        index=sizes,
    )


@of_vectors(formula="arccos σⱼ(UₖᵀŨₖ), arccos σⱼ(VₖᵀṼₖ)", unit="rad", index="angle", source="Björck & Golub 1973")
def principal_angle(t: Triple, side: str) -> Values:
    """Angles between the subspaces of the leading {side} vectors.

    0 … π/2, ascending; of `Triple.subspace` vectors each.
    """
    k = min(t.subspace, t.ranks)
    X, Y = (s.vectors(side, k) for s in (t.base, t.tuned))
    if t.identical:
        return Values(X.new_zeros(k), X.new_zeros(k))
    first, second = (subspace_bound(getattr(t, which))[k - 1] for which in PAIR)
    bound = float(first + second)
    angles = principal_angles(X, Y)
    return Values(angles, angles.new_full((k,), min(math.pi / 2 * bound, math.pi / 2)))


@measure(formula="E|cos θ| in R^out, R^in", source="Beta law", variants=BOTH_SIDES, shown="rows")
def chance_alignment(t: Triple, side: str) -> float:
    """Alignment of independent directions, {side}."""
    return mean_cosine(t.dimension(side))
