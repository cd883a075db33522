"""Attention heads: one figure for each head's slice of a query, key, value or output matrix.

Heads are known from the base's config.json, or from `heads=`; a query, key or value matrix is cut by rows, an
output matrix by columns; [nulls.md](nulls.md) has more.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from specbasis.measures.measure import BOTH_SIDES, measure
from specbasis.measures.triple import Triple

of_heads = partial(measure, index="head", reads=("heads",), asked=True, shown="ranks")


def _figure(t: Triple, name: str) -> Tensor | None:
    """One of `HeadFigures`; undefined where the matrix has no heads, or the figure no digits."""
    figures: Tensor | None = None if t.heads is None else getattr(t.heads, name)
    return None if figures is None or bool(figures.isnan().all()) else figures


@of_heads(formula="mean over i ≤ 10 of |⟨uᵢ, ũᵢ⟩|, |⟨vᵢ, ṽᵢ⟩|", variants=BOTH_SIDES)
def head_alignment(t: Triple, side: str) -> Tensor | None:
    """Mean alignment of the leading 10 {side} vectors of a head's slice."""
    return _figure(t, f"alignment_{side}")


@of_heads(formula="‖Δₕ‖²_F/‖Δ‖²_F")
def head_update_share(t: Triple) -> Tensor | None:
    """Share of the update's energy in a head; sums to 1 over the heads."""
    return _figure(t, "update_share")


@of_heads(formula="‖Δₕ‖_F/‖Wₕ‖_F")
def head_relative_update(t: Triple) -> Tensor | None:
    """Size of the update of a head, over the head's."""
    return _figure(t, "relative_update")


@of_heads(formula="√(1 − ‖Q̃ᵀQ‖²_F/head_dim)")
def head_rotation(t: Triple) -> Tensor | None:
    """Root mean square sine between the subspaces of the residual stream that a head reads from, or writes to."""
    return _figure(t, "rotation")
