"""What the readers of quantised formats share: entries, levels, and codes out of words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specbasis.checkpoint.entry import Entry
from specbasis.core.quantised import Grid, Noise


def grid_entry(shape: tuple[int, ...], stored: str, read: Callable[[], Grid]) -> Entry:
    """The entry of a quantised tensor."""
    return Entry(shape, "float32", lambda: read().values, stored=stored, grid=read)


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
    """Size of rounding to a quantised tensor's numbers, as a share of theirs."""
    assert entry.grid is not None
    grid, noise = entry.grid(), Noise()
    noise.add(grid.values, *grid.cells()[:2])
    return noise.share
