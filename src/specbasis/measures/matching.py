"""Matching: ranks that changed places with their neighbours, followed one to one.

Taken with `nulls=True` (`--nulls`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specbasis.core import groups
from specbasis.measures.measure import BOTH_SIDES, PAIR, SIDES, Values, measure, scalar
from specbasis.measures.triple import Triple

of_ranks = partial(
    measure, source="Kuhn 1955", index="rank", vectors=PAIR, nonzero=PAIR, turned=True, when="nulls", shown="rows"
)


def _matched(t: Triple) -> Tensor:
    """The rank of tuned that each rank of base is matched with."""
    return t.once("matched", lambda: groups.matching(t.matrix("left"), t.matrix("right")))


@of_ranks(formula="π(i)", unit="rank")
def matched_rank(t: Triple) -> Tensor:
    """Rank of tuned that is matched with this one of base, within 10 ranks, one to one."""
    return _matched(t).double()


@of_ranks(formula="|⟨uᵢ, ũ_π(i)⟩|, |⟨vᵢ, ṽ_π(i)⟩|", variants=BOTH_SIDES)
def matched_alignment(t: Triple, side: str) -> Tensor:
    """Alignment of the matched {side} vectors."""
    return t.matrix(side)[torch.arange(t.ranks), _matched(t)].abs().clamp(max=1.0)


@of_ranks(
    formula="mean |⟨uᵢ, ũ_π(i)⟩|",
    source="sampled; bound: 2 standard errors",
    index="",
    variants=BOTH_SIDES,
    nonzero=(),
)
def matched_chance(t: Triple, side: str) -> Values:
    """What matching finds in independent {side} directions."""
    mean, error = groups.matched_chance(t.ranks, *t.base.shape)[SIDES.index(side)]
    return scalar(mean, 2 * error)
