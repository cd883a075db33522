"""Intruders: leading directions of tuned that base does not have; n = min(out, in)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specbasis.core import intruders as core
from specbasis.core.intruders import INTRUDER_COSINE, INTRUDER_RANKS
from specbasis.core.nulls import chance_quantile
from specbasis.measures.measure import BOTH_SIDES, PAIR, measure
from specbasis.measures.triple import Triple

of_sides = partial(measure, shown="rows", variants=BOTH_SIDES)
of_intruders = partial(of_sides, source="Shuttleworth et al. 2024", vectors=PAIR, nonzero=PAIR, reads=("every",))


@of_intruders(formula="maxⱼ |⟨ũᵢ, uⱼ⟩|, maxⱼ |⟨ṽᵢ, vⱼ⟩|", index="rank")
def intruder_cosine(t: Triple, side: str) -> Tensor:
    """Best {side} alignment of each tuned vector with any of the n vectors of base; its rank is that of tuned."""

    def compute() -> Tensor:
        k = len(t.tuned.S)
        if t.identical:
            return torch.ones(k, dtype=torch.float64)
        assert t.every is not None
        return core.intruder_cosine(t.every, t.tuned, side, k).cpu()  # type: ignore[arg-type]

    return t.once(("intruders", side), compute)


@of_intruders(formula=f"#{{i ≤ {INTRUDER_RANKS}: maxⱼ |⟨ũᵢ, uⱼ⟩| < {INTRUDER_COSINE}}}", unit="ranks")
def intruders(t: Triple, side: str) -> float:
    """How many of the leading 10 {side} tuned vectors have a best cosine below 0.5."""
    return float((intruder_cosine(t, side)[:INTRUDER_RANKS] < INTRUDER_COSINE).sum())


@of_sides(formula="quantile of the best of n cosines", source="Beta law, Šidák")
def chance_intruder_cosine(t: Triple, side: str) -> float:
    """What the best of n independent {side} directions stays below in 95 %."""
    return chance_quantile(t.dimension(side), 0.95, among=min(t.base.shape))
