"""Alignment: by what angle the singular vectors of equal rank, and the subspaces of leading ones, turned."""

from __future__ import annotations

import math
from functools import partial

import torch

from specbasis.core.subspace import (
    alignment_bound,
    chance_alignment,
    nested_overlap,
    principal_angles,
    subspace_bound,
)
from specbasis.measures.measure import PAIR, PAPER, SIDES, Values, measure
from specbasis.measures.triple import Triple

of_vectors = partial(measure, side=SIDES, vectors=PAIR, shown="ranks")


def aligned(t: Triple, first: str, second: str, side: str) -> Values | None:
    """Alignment of the vectors of two of the three decompositions, with its bound and the ranks that are tied."""
    if t.is_zero(first) or t.is_zero(second):
        return None
    a, b = getattr(t, first), getattr(t, second)
    if a is b:  # the same matrix: exactly 1, whatever the gaps
        return Values(torch.ones_like(a.S), torch.zeros_like(a.S))
    c = t.cosines(first, second, side)
    k = len(c.diagonal)
    ties = [tied[:k] for tied in (t.tied(first), t.tied(second)) if tied is not None]
    bound = (alignment_bound(a, b) + c.error).clamp(max=1.0)
    return Values(c.alignment, bound, tied=torch.stack(ties).any(dim=0) if ties else None)


@of_vectors(
    "alignment_{side}",
    "{side} alignment of base and tuned",
    formula="|⟨uᵢ, ũᵢ⟩|, |⟨vᵢ, ṽᵢ⟩|",
    index="rank",
    source=PAPER + "§3.1",
    reads=("rounding",),
)
def alignment(t: Triple, side: str) -> Values | None:
    """|⟨x_i, x̃_i⟩| of the vectors of equal rank index, 0 … 1; see `specbasis.core.subspace.alignment`."""
    return aligned(t, "base", "tuned", side)


@of_vectors(
    "update_alignment_{side}",
    "{side} alignment of the update and base; absent where Δ = 0",
    formula="|⟨uᵢ(Δ), uᵢ⟩|, |⟨vᵢ(Δ), vᵢ⟩|",
    index="rank",
    source=PAPER + "Eq. 2",
    vectors=("delta", "base"),
    reads=("rounding",),
)
def update_alignment(t: Triple, side: str) -> Values | None:
    """|⟨x_i(Δ), x_i⟩|: whether the update follows the directions of base, 0 … 1."""
    return aligned(t, "delta", "base", side)


@of_vectors(
    "subspace_overlap_{side}",
    "{side} overlap of the leading k ranks",
    formula="‖UₖᵀŨₖ‖²_F / k, ‖VₖᵀṼₖ‖²_F / k",
    index="k",
    source="Björck & Golub 1973",
)
def subspace_overlap(t: Triple, side: str) -> Values | None:
    """Mean squared cosine of the principal angles of the leading k ranks, 0 … 1, at powers of two and all ranks."""
    if t.is_zero("base") or t.is_zero("tuned"):
        return None
    k = t.ranks
    sizes = sorted({min(2**p, k) for p in range(k.bit_length() + 1)})
    if t.identical:
        return Values(torch.ones(len(sizes)).double(), torch.zeros(len(sizes)).double(), index=sizes)
    at = torch.tensor(sizes) - 1
    overlap = nested_overlap(t.matrix(side))
    first, second = (subspace_bound(getattr(t, which))[:k] for which in PAIR)
    bound = first + second
    counts = torch.tensor(sizes, dtype=overlap.dtype)
    error = t.cosines("base", "tuned", side).error.cpu()
    return Values(
        overlap.cpu()[at].clamp(max=1.0),
        (2 * bound.cpu()[at] / counts.sqrt() + 2 * error[at]).clamp(max=1.0),
        index=sizes,
    )


@of_vectors(
    "principal_angle_{side}",
    "{side} angles between the leading subspaces",
    formula="arccos σⱼ(UₖᵀŨₖ), arccos σⱼ(VₖᵀṼₖ)",
    unit="rad",
    index="angle",
    source="Björck & Golub 1973",
)
def principal_angle(t: Triple, side: str) -> Values | None:
    """Principal angles between the leading `Triple.subspace` vectors of base and of tuned, 0 … π/2, ascending."""
    if t.is_zero("base") or t.is_zero("tuned"):
        return None
    k = min(t.subspace, t.ranks)
    X, Y = (s.vectors(side, k) for s in (t.base, t.tuned))
    if t.identical:
        return Values(X.new_zeros(k), X.new_zeros(k))
    first, second = (subspace_bound(getattr(t, which))[k - 1] for which in PAIR)
    bound = float(first + second)
    angles = principal_angles(X, Y)
    return Values(angles, angles.new_full((k,), min(math.pi / 2 * bound, math.pi / 2)))


@measure(
    "chance_alignment_{side}",
    "{side} alignment of independent directions",
    formula="E|cos θ| in R^out, R^in",
    source="Beta law",
    shown="rows",
    side=SIDES,
)
def chance(t: Triple, side: str) -> float:
    """Mean alignment of independent uniform unit vectors of this length."""
    return chance_alignment(t.dimension(side))
