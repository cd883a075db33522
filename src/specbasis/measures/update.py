"""Update: its size and direction as one vector, from sums over the entries."""

from __future__ import annotations

import torch

from specbasis.measures.measure import ALL, Values, measure, scalar
from specbasis.measures.triple import Triple


@measure(formula="‖·‖_F", unit="weight", shown="rows", variants={"which": ALL})
def norm(t: Triple, which: str) -> float:
    """Frobenius norm of {which}."""
    return t.norm(which)


@measure(formula="‖Δ‖_F/‖W‖_F", shown="matrices", heading="‖Δ‖/‖W‖")
def relative_update(t: Triple) -> Values:
    """Frobenius norm of the update over that of base; 0 for a frozen matrix."""
    if t.identical:
        return scalar(0.0)
    return scalar(torch.tensor(t.norm("delta"), dtype=torch.float64) / t.norm("base"))


@measure(formula="⟨W, W̃⟩_F/(‖W‖_F‖W̃‖_F)", shown="matrices", heading="cosine")
def weight_cosine(t: Triple) -> Values:
    """Cosine of base and tuned as vectors; of independent matrices: 0.

    For independent matrices with centred entries it is near 0, with standard deviation at most about 1/√n for
    effective sizes n of the leading ranks; a finetune keeps it near 1, and a frozen matrix at exactly 1.
    """
    if t.identical:
        return scalar(1.0)
    if "weight_cosine" in t.figures:
        return scalar(t.figures["weight_cosine"])
    norms = torch.tensor(t.norm("base"), dtype=torch.float64) * t.norm("tuned")
    return scalar((t.inner / norms).clamp(-1.0, 1.0))
