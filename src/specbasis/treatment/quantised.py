"""The folder of a difference: a few singular directions of each matrix and what is left in a few bits an entry."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.checkpoint.delta import expanded, packed
from specbasis.core.statistics import Array
from specbasis.core.svd import SVD
from specbasis.treatment.budget import Curve, left_of

DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 4: 0.01154}
"""Bits an entry → share of the square that the best uniform quantiser of normal numbers loses. Source: Max 1960."""

STEP = {1: 1.596, 2: 0.9957, 4: 0.3352}
"""Bits an entry → its step, in standard deviations."""

SCALE = 4
"""Bytes of a scale: float32, one a row of what is left and two a direction."""

FEW_ROWS = 0.5
"""Where fewer rows than this share changed, such as tokens that were seen, only they are stored."""


def curve(squares: Array, shape: tuple[int, int]) -> Curve:
    """What a matrix costs and loses at each number of bits and directions; see `setting`.

    The loss is predicted: the error of 8 bits a direction is left out, since what is left corrects it.

    Args:
        squares: of the singular values of its update, descending.
        shape: (rows that changed, in).
    """
    out, width = shape
    directions, left = np.arange(len(squares) + 1) * (out + width + 2 * SCALE), left_of(squares)
    sizes = [directions + (-(-out * width * bits // 8) + SCALE * out if bits else 0) for bits in DISTORTION]
    return Curve(
        np.concatenate(sizes).astype(np.float64), np.concatenate([left * lost for lost in DISTORTION.values()])
    )


def setting(option: int, ranks: int) -> tuple[int, int]:
    """Directions and bits of an option of a `curve` of so many ranks."""
    return option % (ranks + 1), list(DISTORTION)[option // (ranks + 1)]


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
