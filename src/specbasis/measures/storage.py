"""Storage: what rounding to a number format does, and which ranks it, or the update, mixes.

[nulls.md](nulls.md) has the groups of ranks.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from specbasis.core import groups
from specbasis.measures.measure import BOTH_SIDES, PAIR, Values, measure
from specbasis.measures.triple import Triple

of_rounding = partial(measure, formula="√(Σ step²/12) / ‖W̃‖_F", reads=("rounding",), asked=True, shown="rows")
of_groups = partial(
    measure, formula="σᵢ − σᵢ₊₁ ≤ √2·noise", unit="rank", index="rank", vectors=("base",), shown="rows"
)


@of_rounding()
def rounding_update(t: Triple, form: str = "") -> float:
    """Expected size of rounding to the format in which tuned is stored; absent where that is not known."""
    rounding, norm = t.rounding.get("tuned"), t.norm("tuned")
    if rounding is None or not norm:
        return math.nan
    variance = rounding.variance[form or rounding.stored]
    return math.sqrt(variance * t.base.shape[0] * t.base.shape[1]) / norm


@of_rounding(name="rounding_update", variants={"form": ("bfloat16", "float16", "int8")})
def rounding_update_to(t: Triple, form: str) -> float:
    """The same, were it stored as {form} (int8: one scale a row)."""
    return rounding_update(t, form)


def _members(t: Triple, variance: float) -> Values | None:
    """The first rank of the group of every rank of base that is in a group of two or more."""
    first = groups.degenerate_groups(t.base.spectrum, variance, len(t.base.S))
    members = groups.grouped(first).nonzero()[:, 0]
    return Values(first[members].double(), index=members.tolist()) if len(members) else None


@of_groups(reads=("rounding",))
def degenerate_group_stored(t: Triple) -> Values | None:
    """First rank of the group of base that rounding to its stored format mixes; only ranks in groups of two or
    more.
    """
    rounding = t.rounding.get("base")
    return None if rounding is None else _members(t, rounding.variance[rounding.stored])


@of_groups(turned=True)
def degenerate_group_update(t: Triple) -> Values | None:
    """The same for noise of the update's size."""
    return _members(t, t.variance)


@measure(
    formula="√(‖U_GᵀŨ_G‖²_F/|G|)",
    index="first rank",
    vectors=PAIR,
    nonzero=PAIR,
    turned=True,
    shown="rows",
    variants=BOTH_SIDES,
)
def group_alignment(t: Triple, side: str) -> Values | None:
    """Alignment of each group of `degenerate_group_update` as a {side} subspace.

    Root mean square cosine of the angles between the group's subspaces in base and in tuned, 0 … 1.
    """
    first = groups.degenerate_groups(t.base.spectrum, t.variance, len(t.base.S))
    starts, alignments, _ = groups.group_alignment(t.matrix(side), first[: t.ranks])
    return Values(torch.tensor(alignments, dtype=torch.float64), index=starts) if starts else None
