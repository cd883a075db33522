"""Quantised matrices: what rounds to their entries, and whether one is another matrix quantised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specbasis.core.dtypes import roundoff

MISROUNDED = 1e-4
"""Share of the entries that a quantiser may put on a level that is not the nearest one."""

HALF = 2.0**-11
"""Relative error of a scale in float16: quantisers round to levels that its rounding then moves."""

_BLOCK = 2**20  # entries of one block of rows


@dataclass(frozen=True, eq=False)
class Grid:
    """A quantised matrix: values = shift + scale · (one of the levels).

    Attributes:
        values: float32, as the libraries of the format give them.
        scale: that broadcasts to the values.
        shift: likewise.
        levels: in rising order.
        slack: relative error of the scales, which were rounded after the weights had been; broadcasts likewise.
    """

    values: Tensor
    scale: Tensor
    shift: Tensor
    levels: Tensor
    slack: Tensor

    def part(self, cut: Callable[[Tensor], Tensor]) -> Grid:
        """The grid of a part of the matrix that does not mix its entries."""
        names = ("values", "scale", "shift", "slack")
        return replace(self, **{name: cut(getattr(self, name).expand_as(self.values)) for name in names})

    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lower and upper ends of what rounds to each value, infinite at outermost levels and without a scale, and
        how far the rounding of the scales may have moved them.
        """
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        infinity = middles.new_tensor([torch.inf])
        nearest = torch.bucketize(((self.values - self.shift) / self.scale).contiguous(), middles)
        halves = ((-infinity, middles), (middles, infinity))
        ends = [self.shift + self.scale * torch.cat(parts)[nearest] for parts in halves]
        far = torch.maximum(*((end - self.shift).abs().nan_to_num_(0.0, 0.0, 0.0) for end in ends))
        lower = torch.minimum(*ends).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
        upper = torch.maximum(*ends).nan_to_num_(torch.inf, torch.inf, -torch.inf)
        return lower, upper, self.slack * (far + self.shift.abs())


def quantisation(
    matrices: Mapping[str, Tensor], grids: Mapping[str, Grid], stored: Mapping[str, str]
) -> dict[str, float]:
    """What the levels of quantised matrices, base or tuned or both, say of the two.

    Figures:

    - ``rounding_noise_base``, ``rounding_noise_tuned``: √(Σ width²/12 / count) / root mean square of the entries,
      over the entries whose cell, what rounds to them, is finite;
    - ``beyond_rounding``: share of the entries that no number rounds to on both sides. A side that is not quantised
      is its entries, and what rounds to them in its own format;
    - ``p_quantised``: the chance of at least as many where one is the other quantised, and a quantiser misrounds
      `MISROUNDED` of the entries: near 0 where something was trained between the two.

    Args:
        matrices: "base" and "tuned", of one shape.
        grids: side → its grid, where it is quantised.
        stored: side → the format of its entries, which counts where it is not.
    """
    from scipy.stats import binom

    out, width = matrices["base"].shape
    beyond, noises = 0, {side: Noise() for side in grids}
    step = max(1, _BLOCK // width)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        ends = []
        for side, X in matrices.items():
            values = X[rows].to(torch.float64)
            if side in grids:
                lower, upper, room = grids[side].part(lambda Y, rows=rows: Y[rows]).cells()
                noises[side].add(values, lower, upper)
            else:
                room = values.abs() * max(roundoff(stored[side]), 2.0**-23)
                lower, upper = values, values
            ends.append((lower - room, upper + room))
        beyond += int(((ends[0][0] > ends[1][1]) | (ends[0][1] < ends[1][0])).sum())
    chance = float(binom.sf(beyond - 1, out * width, MISROUNDED))
    figures = {f"rounding_noise_{side}": noise.share for side, noise in noises.items()}
    return {**figures, "beyond_rounding": beyond / (out * width), "p_quantised": chance}


class Noise:
    """Root mean square of rounding to the entries of a quantised matrix, as a share of theirs, block by block."""

    def __init__(self) -> None:
        self._widths, self._finite, self._squares, self._count = 0.0, 0, 0.0, 0

    def add(self, values: Tensor, lower: Tensor, upper: Tensor) -> None:
        """Count a block."""
        width = (upper - lower).to(torch.float64)
        width = width[width.isfinite()]
        self._widths += float(width.square().sum())
        self._finite += len(width)
        self._squares += float(values.to(torch.float64).square().sum())
        self._count += values.numel()

    @property
    def share(self) -> float:
        """The share; NaN where no entry has a finite cell, or all are 0."""
        if not (self._finite and self._squares):
            return math.nan
        return math.sqrt(self._widths / self._finite / 12 / (self._squares / self._count))
