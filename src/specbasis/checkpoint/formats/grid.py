"""What the readers of quantised formats share: entries, levels, and codes out of words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.mapped import copied
from specbasis.core.quantised import Grid, Noise


@dataclass(frozen=True)
class Parts:
    """The tensors of one quantised matrix.

    Attributes:
        stem: what their names have in common.
        leaf: the rest of the name of the one that holds the codes.
        entries: the rest of a name → the tensor.
        settings: what config.json says of the quantisation.
    """

    stem: str
    leaf: str
    entries: Mapping[str, Entry]
    settings: Mapping[str, Any]

    @property
    def codes(self) -> Entry:
        """The tensor that holds the codes."""
        return self.entries[self.leaf]

    def shape(self, leaf: str, axes: int) -> tuple[int, ...]:
        """Shape of a tensor beside the codes.

        Raises:
            ValueError: it has another number of axes.
        """
        shape = self.entries[leaf].shape
        want(len(shape) == axes, f"{leaf} has shape {shape}")
        return shape

    @property
    def stacked(self) -> int:
        """How many matrices of one shape the tensors hold, along the first axis of each; 0 of one matrix."""
        firsts = {entry.shape[0] if len(entry.shape) > 2 else 0 for entry in self.entries.values()}
        return firsts.pop() if len(firsts) == 1 else 0

    def member(self, place: int) -> Parts:
        """The tensors of one matrix of a stack, which alone are copied from a mapped file."""

        def one(entry: Entry) -> Entry:
            return Entry(entry.shape[1:], entry.dtype, lambda: copied(entry.load()[place], self.stem))

        return replace(self, entries={leaf: one(entry) for leaf, entry in self.entries.items()})

    def read(self, leaf: str) -> Tensor:
        """A tensor beside the codes."""
        return self.entries[leaf].load()

    def maybe(self, leaf: str) -> Tensor | None:
        """The same, where there is one."""
        return self.read(leaf) if leaf in self.entries else None


def want(holds: bool, otherwise: str) -> None:
    """Refuse tensors that do not fit together."""
    if not holds:
        raise ValueError(otherwise)


Build = Callable[[Parts], tuple[tuple[int, ...], str, Callable[[], Grid]]]
"""From the parts of a matrix: its shape, what its format is called, and how it is read."""


@dataclass(frozen=True)
class Family:
    """A way to store a quantised matrix.

    Attributes:
        leaf: how the name of its codes ends.
        dtypes: in which these are stored.
        needs: ends of the names of the tensors beside them, behind the same stem.
        also: ends of those that may be there.
        name: what the matrix is called behind the stem.
        build: makes it.
        in_stacks: whether ``build`` takes the tensors of one of a stack of matrices, and those of all.
    """

    leaf: str
    dtypes: tuple[str, ...]
    needs: tuple[str, ...]
    also: tuple[str, ...]
    name: str
    build: Build
    in_stacks: bool = False


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
    grid, noise = entry.grid() if entry.member is None else entry.member(0), Noise()
    noise.add(grid.values, *grid.cells()[:2])
    return noise.share
