"""The folder of a difference: a few singular directions of each matrix and what is left in a few bits an entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.checkpoint.delta import expanded, packed
from specbasis.core.statistics import Array
from specbasis.core.svd import SVD

DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 4: 0.01154}
"""Bits an entry → share of the square that the best uniform quantiser of normal numbers loses. Source: Max 1960."""

STEP = {1: 1.596, 2: 0.9957, 4: 0.3352}
"""Bits an entry → its step, in standard deviations."""

SCALE = 4
"""Bytes of a scale: float32, one a row of what is left and two a direction."""

FEW_ROWS = 0.5
"""Where fewer rows than this share changed, such as tokens that were seen, only they are stored."""


@dataclass(frozen=True, eq=False)
class Curve:
    """What a matrix costs and loses at each number of directions and of bits.

    Attributes:
        squares: of the singular values of its update, descending.
        shape: (rows that changed, in).
    """

    squares: Array
    shape: tuple[int, int]

    def bytes(self, bits: int) -> Array:
        """At 0, 1, … directions."""
        out, width = self.shape
        ranks = np.arange(len(self.squares) + 1)
        left = -(-out * width * bits // 8) + SCALE * out if bits else 0
        return np.asarray(ranks * (out + width + 2 * SCALE) + left, dtype=np.float64)

    def lost(self, bits: int) -> Array:
        """Of the square, predicted: the error of 8 bits a direction is left out, since what is left corrects it."""
        tail = self.squares.sum() - np.concatenate([[0.0], np.cumsum(self.squares)])
        return np.asarray(np.clip(tail, 0.0, None) * DISTORTION[bits])

    def best(self, price: float) -> tuple[int, int, float, float]:
        """Directions, bits, bytes and loss at which lost + price · bytes is least."""
        costs = {bits: self.lost(bits) + price * self.bytes(bits) for bits in DISTORTION}
        bits = min(costs, key=lambda b: costs[b].min())
        rank = int(costs[bits].argmin())
        return rank, bits, float(self.bytes(bits)[rank]), float(self.lost(bits)[rank])


def shared_out(curves: Sequence[Curve], budget: float | None, share: float) -> list[tuple[int, int]]:
    """Directions and bits of each matrix: one price of a byte for all of them, found by bisection.

    The choice is the best of its size: less lost at no more bytes would be less lost + price · bytes.

    Args:
        curves: of the matrices.
        budget: bytes; None to keep ``share`` instead.
        share: of the square of all updates.
    """
    total = sum(float(curve.squares.sum()) for curve in curves)
    low, high = -40.0, 10.0  # of log10(price / total)

    def chosen(exponent: float) -> list[tuple[int, int, float, float]]:
        return [curve.best(total * 10**exponent) for curve in curves]

    def is_enough(found: list[tuple[int, int, float, float]]) -> bool:
        if budget is not None:
            return sum(one[2] for one in found) <= budget
        return sum(one[3] for one in found) > (1 - share) * total

    for _ in range(80):  # until the ends are one price
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(chosen(middle)) else (middle, high)
    return [(rank, bits) for rank, bits, _, _ in chosen(high if budget is not None else low)]


def changed_rows(delta: Float[Tensor, "out in"]) -> Tensor | None:
    """The rows that are not zero, where they are few; None where all are stored."""
    rows = delta.any(dim=1).nonzero().flatten()
    return rows.int() if len(rows) < FEW_ROWS * len(delta) else None


def quantised(delta: Float[Tensor, "out in"], rows: Tensor | None, svd: SVD | None, bits: int) -> dict[str, Tensor]:
    """The parts of one matrix; see `specbasis.checkpoint.delta`.

    Args:
        delta: of the rows that are stored.
        rows: which they are; None for all.
        svd: the directions that are stored; None for none.
        bits: an entry of what is left, after the rounded directions are taken off.
    """
    parts: dict[str, Tensor] = {} if rows is None else {"rows": rows}
    left = delta.float()
    if svd is not None:
        root = svd.S.sqrt()
        for side, vectors in (("left", svd.U * root), ("right", svd.Vh.mT * root)):
            scale = (vectors.abs().amax(0) / 127).float()
            parts[f"{side}_scale"] = scale
            parts[side] = (vectors / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
        directions = {name: part for name, part in parts.items() if name != "rows"}
        left = left - expanded(directions, 0, (len(delta), delta.shape[1]))
    if bits:
        half = 2 ** (bits - 1)
        size = left.square().mean(1).sqrt() * STEP[bits]
        units = left / torch.where(size > 0, size, 1.0)[:, None]
        levels = (units.floor() + 0.5).clamp(0.5 - half, half - 0.5)
        # The best size for the levels that were chosen, by least squares.
        parts["scale"] = (left * levels).sum(1) / levels.square().sum(1)
        parts["codes"] = packed((levels + half - 0.5).to(torch.uint8), bits)
    return parts
