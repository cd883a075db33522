"""Whether a matrix is another one quantised: do the entries of one lie where they round to those of the other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from specbasis.core.dtypes import roundoff

MISROUNDED = 1e-4
"""Share of the entries that a quantiser may put on a level that is not the nearest one."""

Cells = tuple[Tensor, Tensor, Tensor]
"""Lower and upper ends of the numbers that round to each entry, and how far these may be off."""


def quantisation(
    matrices: Mapping[str, Tensor], cells: Mapping[str, Cells], stored: Mapping[str, str]
) -> dict[str, float]:
    """What the cells of quantised matrices, base or tuned or both, say of the two.

    Figures:

    - ``rounding_noise_base``, ``rounding_noise_tuned``: √(Σ width²/12 / count) / root mean square of the entries,
      over the entries whose cell is finite;
    - ``beyond_rounding``: share of the entries that no number rounds to on both sides. A side that is not quantised
      is its entries, and what rounds to them in its own format;
    - ``p_quantised``: the chance of at least as many where one is the other quantised, and a quantiser misrounds
      `MISROUNDED` of the entries: near 0 where something was trained between the two.

    Args:
        matrices: "base" and "tuned", of one shape.
        cells: side → its cells, where it is quantised.
        stored: side → the format of its entries, which counts where it is not.
    """
    from scipy.stats import binom

    figures, ends = {}, {}
    for side, X in matrices.items():
        values = X.to(torch.float64)
        if side in cells:
            lower, upper, room = cells[side]
            ends[side] = lower - room, upper + room
            width = (upper - lower).to(torch.float64)
            width = width[width.isfinite()]
            size = float(values.square().mean())
            noise = math.sqrt(float(width.square().mean()) / 12 / size) if len(width) and size else math.nan
            figures[f"rounding_noise_{side}"] = noise
        else:
            room = values.abs() * max(roundoff(stored[side]), 2.0**-23)
            ends[side] = values - room, values + room
    beyond = (ends["base"][0] > ends["tuned"][1]) | (ends["base"][1] < ends["tuned"][0])
    count = int(beyond.sum())
    chance = float(binom.sf(count - 1, beyond.numel(), MISROUNDED))
    return {**figures, "beyond_rounding": count / beyond.numel(), "p_quantised": chance}
