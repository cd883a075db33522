"""Storage: what rounding to a number format does, and which ranks it, or the update, mixes.

[nulls.md](nulls.md) has the groups of ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specbasis.core.groups import degenerate_groups, group_alignment, grouped
from specbasis.measures.measure import PAIR, SIDES, Values, measure
from specbasis.measures.triple import Triple


def _rounding_update(t: Triple, form: str = "") -> float:
    rounding, norm = t.rounding.get("tuned"), t.norm("tuned")
    if rounding is None or not norm:
        return math.nan
    variance = rounding.variance[form or rounding.stored]
    return math.sqrt(variance * t.base.shape[0] * t.base.shape[1]) / norm


@measure(
    "rounding_update",
    "expected size of rounding to the format in which tuned is stored",
    formula="√(Σ step²/12) / ‖W̃‖_F",
    reads=("rounding",),
    asked=True,
    shown="rows",
)
def rounding_update(t: Triple) -> float:
    """Norm of the expected rounding error over that of tuned; absent where the rounding is not known."""
    return _rounding_update(t)


@measure(
    "rounding_update_{form}",
    "the same, were it stored as {form} (int8: one scale a row)",
    formula="√(Σ step²/12) / ‖W̃‖_F",
    reads=("rounding",),
    asked=True,
    shown="rows",
    form=("bfloat16", "float16", "int8"),
)
def rounding_update_to(t: Triple, form: str) -> float:
    """Norm of the expected error of rounding to another format, over that of tuned."""
    return _rounding_update(t, form)


def _groups(t: Triple, by: str) -> Tensor | None:
    """The degenerate group of each leading rank of base, under the stored rounding or under the update."""

    def compute() -> Tensor | None:
        if by == "update":
            variance = t.variance
        elif "base" in t.rounding:
            variance = t.rounding["base"].variance[t.rounding["base"].stored]
        else:
            return None
        return degenerate_groups(t.base.spectrum, variance, len(t.base.S))

    return t.once(("groups", by), compute)


def _members(t: Triple, by: str) -> Values | None:
    """The first rank of the group of every rank that is in a group of two or more."""
    first = _groups(t, by)
    if first is None:
        return None
    members = grouped(first).nonzero()[:, 0]
    return Values(first[members].double(), index=members.tolist()) if len(members) else None


@measure(
    "degenerate_group_stored",
    "first rank of the group of base that rounding to its stored format mixes; only ranks in groups of two or more",
    formula="σᵢ − σᵢ₊₁ ≤ √2·noise",
    unit="rank",
    index="rank",
    vectors=("base",),
    reads=("rounding",),
    shown="rows",
)
def degenerate_group_stored(t: Triple) -> Values | None:
    """Groups of ranks whose vectors the stored file does not tell apart."""
    return _members(t, "stored")


@measure(
    "degenerate_group_update",
    "the same for noise of the update's size",
    formula="σᵢ − σᵢ₊₁ ≤ √2·noise",
    unit="rank",
    index="rank",
    vectors=("base",),
    shown="rows",
)
def degenerate_group_update(t: Triple) -> Values | None:
    """Groups of ranks whose vectors noise as large as the update mixes."""
    return None if t.unturned else _members(t, "update")


@measure(
    "group_alignment_{side}",
    "{side} alignment of each group of `degenerate_group_update` as a subspace",
    formula="√(‖U_GᵀŨ_G‖²_F/|G|)",
    index="first rank",
    vectors=PAIR,
    shown="rows",
    side=SIDES,
)
def alignment_of_groups(t: Triple, side: str) -> Values | None:
    """Root mean square cosine of the angles between a group's subspaces in base and in tuned, 0 … 1."""
    if t.unturned or t.is_zero("tuned"):
        return None
    first = _groups(t, "update")
    assert first is not None
    starts, alignments, _ = group_alignment(t.matrix(side), first[: t.ranks])
    return Values(torch.tensor(alignments, dtype=torch.float64), index=starts) if starts else None
