"""How many of its singular values carry a matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(S: Float[Tensor, " n"]) -> float:
    """Effective rank: exp(H(p)), p = S / ΣS, natural logarithm; 1 … n, NaN for a zero matrix.

    Source: Roy & Vetterli 2007; Yu et al. 2026, Tab. 4.
    """
    p = S / S.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(S: Float[Tensor, " n"]) -> float:
    """Stable rank: ‖W‖_F² / σ_1², 1 … n, NaN for a zero matrix. Source: Rudelson & Vershynin 2007."""
    return float(S.square().sum() / S[0] ** 2)


def explained_variance(S: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Share of energy in the leading i + 1 ranks: cumulative ΣS² / ‖W‖_F². Source: Yu et al. 2026, App. H."""
    energy = S.square().cumsum(0)
    return energy / energy[-1]
