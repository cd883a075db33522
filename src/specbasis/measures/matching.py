"""Matching: ranks that changed places with their neighbours, followed one to one.

Taken with `nulls=True` (`--nulls`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specbasis.core import groups
from specbasis.measures.measure import PAIR, SIDES, Values, measure, scalar
from specbasis.measures.triple import Triple

of_matching = partial(measure, vectors=PAIR, when="nulls", shown="rows")


def _matched(t: Triple) -> Tensor | None:
    """The rank of tuned that each rank of base is matched with; None where nothing turned."""
    if t.unturned or t.is_zero("tuned"):
        return None
    return t.once("matched", lambda: groups.matching(t.matrix("left"), t.matrix("right")))


@of_matching(
    "matched_rank",
    f"rank of tuned that is matched with this one of base, within {groups.BAND} ranks, one to one",
    formula="π(i)",
    unit="rank",
    index="rank",
    source="Kuhn 1955",
)
def matched_rank(t: Triple) -> Tensor | None:
    """See `specbasis.core.groups.matching`."""
    matched = _matched(t)
    return None if matched is None else matched.double()


@of_matching(
    "matched_alignment_{side}",
    "{side} alignment of the matched ranks",
    formula="|⟨uᵢ, ũ_π(i)⟩|, |⟨vᵢ, ṽ_π(i)⟩|",
    index="rank",
    source="Kuhn 1955",
    side=SIDES,
)
def matched_alignment(t: Triple, side: str) -> Tensor | None:
    """Alignment of each rank of base with the rank of tuned that it is matched with, 0 … 1."""
    matched = _matched(t)
    return None if matched is None else t.matrix(side)[torch.arange(t.ranks), matched].abs().clamp(max=1.0)


@of_matching(
    "matched_chance_{side}",
    "what matching finds in independent {side} directions",
    formula="mean |⟨uᵢ, ũ_π(i)⟩|",
    source="sampled; bound: 2 standard errors",
    side=SIDES,
)
def matched_chance(t: Triple, side: str) -> Values | None:
    """What the alignment of matched ranks must be held against."""
    if t.unturned:
        return None
    mean, error = groups.matched_chance(t.ranks, *t.base.shape)[SIDES.index(side)]
    return scalar(mean, 2 * error)
