"""Sampled nulls: whole decompositions of base plus random updates.

Taken with `null_samples=N` (`--null-samples`), for each null: gaussian, permuted, rotated, rounding.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from specbasis.core import nulls
from specbasis.measures.measure import PAIR, SIDES, Values, measure
from specbasis.measures.triple import Triple

of_samples = partial(measure, index="rank", vectors=PAIR, when="samples", shown="rows", side=SIDES)


def _drawn(t: Triple, kind: str, side: str) -> Tensor | None:
    return t.sampled[kind][SIDES.index(side)] if kind in t.sampled else None


def sampled_alignment(t: Triple, kind: str, side: str) -> Values | None:
    """Mean alignment over the samples; the bound is two standard errors."""
    drawn = _drawn(t, kind, side)
    return None if drawn is None else Values(drawn.mean(dim=0), 2 * nulls.standard_error(drawn))


def p_sampled(t: Triple, kind: str, side: str) -> Tensor | None:
    """Probability of an alignment at least as high under the samples."""
    drawn = _drawn(t, kind, side)
    return None if drawn is None else nulls.p_sampled(t.observed(side), drawn)


for _kind in nulls.KINDS:  # in the rows, what was sampled from one kind stands together
    of_samples(
        f"sampled_alignment_{_kind}_{{side}}",
        f"mean {{side}} alignment over N decompositions of W plus a random update: {_kind}",
        formula="mean; bound: 2 standard errors",
    )(partial(sampled_alignment, kind=_kind))
    of_samples(
        f"p_sampled_{_kind}_{{side}}",
        f"chance of so high a {{side}} alignment under these updates: {_kind}",
        formula="(1 + #{drawn ≥ observed})/(1 + N)",
        source="Phipson & Smyth 2010",
    )(partial(p_sampled, kind=_kind))
