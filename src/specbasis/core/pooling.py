"""One vector for a text, from the states of its tokens."""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor


def mean_state(
    states: Float[Tensor, "texts tokens width"], mask: Shaped[Tensor, "texts tokens"]
) -> Float[Tensor, "texts width"]:
    """The mean of each text's states over its own tokens: what a sentence encoder gives.

    Source: Reimers & Gurevych 2019 (arXiv 1908.10084), §3.
    """
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
