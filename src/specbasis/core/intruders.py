"""Intruder dimensions: leading directions of a finetuned matrix that its base does not have."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from specbasis.core.svd import SVD, HalfSVD, inverse_values

INTRUDER_COSINE = 0.5
"""A tuned vector whose best cosine with all vectors of base is below this is an intruder."""

INTRUDER_RANKS = 10
"""Leading ranks of tuned among which intruders are counted."""


def best_cosine(base: Float[Tensor, "d n"], tuned: Float[Tensor, "d k"]) -> Float[Tensor, " k"]:
    """Best absolute cosine of each tuned vector with any vector of base, for orthonormal columns, 0 … 1."""
    return _best(tuned.to(base.dtype).mT @ base)


def intruders(
    base: Float[Tensor, "d n"], tuned: Float[Tensor, "d k"], threshold: float = INTRUDER_COSINE
) -> list[int]:
    """Ranks of the tuned singular vectors that are like no singular vector of base.

    The ranks j with max_i |⟨x_i, y_j⟩| < threshold, 0-based, for all n vectors of one side of base and the
    leading k of tuned. Costs 2·d·n·k flops.

    Source: Shuttleworth et al. 2024 (arXiv 2410.21228), for left vectors.
    """
    return (best_cosine(base, tuned) < threshold).nonzero().flatten().tolist()


def intruder_cosine(base: SVD | HalfSVD, tuned: SVD | HalfSVD, side: str, k: int) -> Float[Tensor, " k"]:
    """Best absolute cosine of each leading vector of tuned with any vector of base, 0 … 1.

    max_j |⟨u_j, ũ_i⟩| over all min(out, in) ranks j of base. An *intruder dimension* is one where it is small
    (`INTRUDER_COSINE`): a leading direction that base does not have. Costs 2n²k flops, 2nmk more on the long side.

    Args:
        base: with every vector of its short side.
        tuned: its leading k ranks.
        side: "left" or "right".
        k: number of leading ranks of tuned.

    Source: Shuttleworth et al. 2024, arXiv 2410.21228, §3; there left vectors only.
    """
    if (side == "left") == base.wide:
        cosines = tuned.short_side()[:, :k].mT @ base.short_side()
    else:
        cosines = (base.times(tuned.long_side(0, k)).mT @ base.short_side()) * inverse_values(base.spectrum)
    return _best(cosines)


def _best(cosines: Tensor) -> Tensor:
    best: Tensor = cosines.abs().amax(dim=1).clamp(max=1.0)
    return best
