"""Sampled nulls: whole decompositions of base plus random updates.

Taken with `null_samples=N` (`--null-samples`), for each null: gaussian, permuted, rotated, rounding.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from specbasis.core import draws
from specbasis.measures.measure import PAIR, SIDES, Values, measure
from specbasis.measures.triple import Triple


def _drawn(t: Triple, kind: str, side: str) -> Tensor | None:
    return t.sampled[kind][SIDES.index(side)] if kind in t.sampled else None


def sampled_alignment(t: Triple, kind: str, side: str) -> Values | None:
    """Mean {side} alignment over N decompositions of W plus a random update ({kind}); bound: 2 standard errors."""
    drawn = _drawn(t, kind, side)
    return None if drawn is None else Values(drawn.mean(dim=0), 2 * draws.standard_error(drawn))


def p_sampled(t: Triple, kind: str, side: str) -> Tensor | None:
    """Chance of so high a {side} alignment under these updates ({kind})."""
    drawn = _drawn(t, kind, side)
    return None if drawn is None else draws.p_sampled(t.observed(side), drawn)


for _kind in draws.KINDS:  # in the rows, what was sampled from one kind stands together
    of_kind = partial(
        measure,
        index="rank",
        vectors=PAIR,
        when="samples",
        shown="rows",
        variants={"kind": (_kind,), "side": SIDES},
    )
    of_kind(formula="mean of a")(sampled_alignment)
    of_kind(formula="(1 + #{drawn ≥ a})/(1 + N)", source="Phipson & Smyth 2010")(p_sampled)
