"""Intruders: leading directions of tuned that base does not have; n = min(out, in)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specbasis.core import nulls
from specbasis.core.intruders import INTRUDER_COSINE, INTRUDER_RANKS, intruder_cosine
from specbasis.measures.measure import PAIR, SIDES, measure
from specbasis.measures.triple import Triple

of_intruders = partial(measure, source="Shuttleworth et al. 2024", shown="rows", side=SIDES)


def _best(t: Triple, side: str) -> Tensor:
    def compute() -> Tensor:
        k = len(t.tuned.S)
        if t.identical:
            return torch.ones(k, dtype=torch.float64)
        assert t.every is not None
        return intruder_cosine(t.every, t.tuned, side, k).cpu()  # type: ignore[arg-type]

    return t.once(("intruders", side), compute)


@of_intruders(
    "intruder_cosine_{side}",
    "best {side} alignment of each tuned vector with any of the n vectors of base; its rank is that of tuned",
    formula="maxⱼ |⟨ũᵢ, uⱼ⟩|, maxⱼ |⟨ṽᵢ, vⱼ⟩|",
    index="rank",
    vectors=PAIR,
    reads=("every",),
)
def best_cosine(t: Triple, side: str) -> Tensor | None:
    """Best alignment of each leading vector of tuned with any vector of base, 0 … 1."""
    return None if t.is_zero("base") or t.is_zero("tuned") else _best(t, side)


@of_intruders(
    "intruders_{side}",
    f"how many of the leading {INTRUDER_RANKS} {{side}} tuned vectors have a best cosine below {INTRUDER_COSINE}",
    formula=f"#{{i ≤ {INTRUDER_RANKS}: maxⱼ |⟨ũᵢ, uⱼ⟩| < {INTRUDER_COSINE}}}",
    unit="ranks",
    vectors=PAIR,
    reads=("every",),
)
def intruders(t: Triple, side: str) -> float | None:
    """Number of intruder dimensions among the leading ranks."""
    if t.is_zero("base") or t.is_zero("tuned"):
        return None
    return float((_best(t, side)[:INTRUDER_RANKS] < INTRUDER_COSINE).sum())


@of_intruders(
    "chance_intruder_cosine_{side}",
    "what the best of n independent {side} directions stays below in 95 %",
    formula="quantile of the best of n = min(out, in) cosines",
    source="Beta law, Šidák",
)
def chance(t: Triple, side: str) -> float:
    """What an intruder's best cosine must be held against."""
    return nulls.chance_quantile(t.dimension(side), 0.95, among=min(t.base.shape))
