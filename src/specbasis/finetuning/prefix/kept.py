"""The values of an example that a suffix reads from below its cut, and how a model computes them."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specbasis.finetuning.prefix.probe import hooked
from specbasis.finetuning.prefix.standin import Dim, Site

Positions = Literal["all", "first"]

_WRAPPERS = re.compile(r"base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")


@dataclass(frozen=True)
class Kept:
    """One value of an example that the suffix reads.

    Attributes:
        sites: the outputs whose sum it is; several where the suffix reads nothing but their sum.
        shape: its dimensions in a batch.
        dtype: in which the model computes it.
        positions: which positions of the sequence the suffix reads; the others are not kept.
    """

    sites: tuple[Site, ...]
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    positions: Positions = "all"

    @property
    def by_token(self) -> bool:
        """Whether it has a row for each token."""
        return self.shape[1:2] == ("tokens",)

    @property
    def packed(self) -> bool:
        """Whether what is kept grows with the number of tokens."""
        return self.by_token and self.positions == "all"

    @property
    def dims(self) -> tuple[int, ...]:
        """Fixed dimensions: of one token, or of an example if it has no row for each token."""
        return tuple(n for n in self.shape[1:] if not isinstance(n, str))

    @property
    def width(self) -> int:
        """Numbers for one token if it is packed, else for one example."""
        return math.prod(self.dims)

    def size(self, tokens: int) -> int:
        """Numbers for an example of so many tokens."""
        return self.width * (tokens if self.packed else 1)

    def chosen(self, mask: Tensor | None) -> Tensor | None:
        """The positions that are kept among those that are no padding, (examples, tokens); None: it has none."""
        if not self.by_token or mask is None:
            return None
        return mask if self.positions == "all" else mask & (mask.cumsum(1) == 1)

    def total(self, outputs: Mapping[Site, Tensor]) -> Tensor:
        """Its value, from the outputs of which it is the sum."""
        return functools.reduce(torch.add, [outputs[site] for site in self.sites])

    def __str__(self) -> str:
        names = " + ".join(plain_name(site.module) for site in self.sites)
        where = f" at the {self.positions} position" if self.by_token and not self.packed else ""
        return f"{names}{where} ({self.width} numbers for each {'token' if self.packed else 'example'})"


def plain_name(name: str) -> str:
    """A module's name without what PEFT's wrappers put in it."""
    return _WRAPPERS.sub("", name)


class _EnoughError(Exception):
    """Everything that is to be kept has been computed."""


def capture(model: nn.Module, batch: Mapping[str, Any], kept: Sequence[Kept]) -> list[Tensor]:
    """The values to keep of a batch, from a forward pass that ends at the last of them."""
    sites = {site for value in kept for site in value.sites}
    numbers: Counter[str] = Counter()
    outputs: dict[Site, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            number, numbers[name] = numbers[name], numbers[name] + 1
            for index, leaf in enumerate(pytree.tree_leaves(output)):
                if Site(name, number, index) in sites:
                    outputs[Site(name, number, index)] = leaf.clone()  # the model may change it in place later
            if len(outputs) == len(sites):
                raise _EnoughError

        return hook

    names = {site.module for site in sites}
    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with hooked(*handles), suppress(_EnoughError):
        model(**batch)
    return [value.total(outputs) for value in kept]
