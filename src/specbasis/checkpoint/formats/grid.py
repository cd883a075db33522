"""Quantised weights as the numbers that they stand for, and which numbers round to each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specbasis.checkpoint.entry import Entry

HALF = 2.0**-11
"""Relative error of a scale in float16: quantisers round to levels that its rounding then moves."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A quantised matrix: values = shift + scale · (one of the levels).

    Attributes:
        values: float32, as the libraries of the format give them.
        scale: that broadcasts to the values.
        shift: likewise.
        levels: in rising order.
        slack: relative error of the scales, which were rounded after the weights had been.
    """

    values: Tensor
    scale: Tensor
    shift: Tensor | float
    levels: Tensor
    slack: Tensor | float = HALF

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
        return lower, upper, self.slack * (far + torch.as_tensor(self.shift).abs())


def grid_entry(shape: tuple[int, ...], stored: str, read: Callable[[], Grid]) -> Entry:
    """The entry of a quantised tensor."""
    return Entry(shape, "float32", lambda: read().values, stored=stored, cells=lambda: read().cells())


def integers(bits: int, low: int = 0) -> Tensor:
    """The levels of so many bits, from the lowest."""
    return torch.arange(low, low + 2**bits, dtype=torch.float32)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes in the last axis of 32-bit words, the lowest bits first; some cross into the next word.

    Source: the packing of AutoGPTQ, of compressed-tensors and of MLX.
    """
    words = words.view(torch.int32) if words.dtype != torch.int32 else words
    if 32 % bits == 0:
        codes: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 32, bits, dtype=torch.int32)).flatten(-2)
    else:
        start = torch.arange(words.shape[-1] * 32 // bits) * bits
        wide = words.to(torch.int64) & 0xFFFFFFFF
        wide = torch.cat([wide, wide.new_zeros(*wide.shape[:-1], 1)], -1)
        word, offset = start // 32, start % 32
        codes = (wide[..., word] >> offset) | (wide[..., word + 1] << (32 - offset))
    return (codes & ((1 << bits) - 1)).to(torch.uint8)


def rounding_share(entry: Entry) -> float:
    """Root mean square of rounding to a quantised tensor's numbers, as a share of theirs: √(Σ width²/12) / ‖W‖."""
    assert entry.cells is not None
    lower, upper, _ = entry.cells()
    width = (upper - lower).double()
    square = width[width.isfinite()].square().mean() / 12
    return float((square / entry.load().double().square().mean()).sqrt())
