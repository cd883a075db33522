"""The list of figures of a comparison: each is a function with `@figure(...)` on it, named like its file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specbasis.figures.data import Pair
from specbasis.figures.kit import Figure, render

Draw = Callable[[Any], Figure]


@dataclass(frozen=True)
class Drawing:
    """A figure of a comparison.

    Attributes:
        draw: makes it of one pair, or of all pairs.
        page: the page's figure of the same; empty where it has none.
        has: whether a pair has rows to draw it of.
        over_pairs: whether one figure shows all pairs.
        on_request: whether it shows what is measured on request only; the page then leaves it out without a word.
    """

    draw: Draw
    page: str
    has: Callable[[Pair], bool]
    over_pairs: bool
    on_request: bool


DRAWINGS: dict[str, Drawing] = {}
"""File name → figure."""

PAGE_ONLY = {"single": ("alignment_",), "angles": ("subspace_overlap_",)}
"""The page's figures of one matrix that a reader chooses, and the measures that they need."""


def figure(
    *needs: str,
    page: str = "",
    has: Callable[[Pair], bool] | None = None,
    over_pairs: bool = False,
    on_request: bool = False,
) -> Callable[[Draw], Draw]:
    """Make a function a figure of every comparison that has rows for it.

    Args:
        needs: beginnings of the names of measures; it is drawn where a pair has rows of each.
        page: see `Drawing`.
        has: another condition in their place.
        over_pairs: see `Drawing`.
        on_request: see `Drawing`.
    """

    def register(draw: Draw) -> Draw:
        condition = has or (lambda pair: _measured(pair, needs))
        DRAWINGS[draw.__name__] = Drawing(draw, page, condition, over_pairs, on_request)
        return draw

    return register


def draw(pairs: Sequence[Pair]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of every figure that the pairs have rows for, each as PNG and as SVG."""
    for name, drawing in DRAWINGS.items():
        drawn = [pair for pair in pairs if drawing.has(pair)]
        if drawing.over_pairs and drawn:
            yield from render(name, lambda make=drawing.draw: make(pairs))
        for pair in () if drawing.over_pairs else drawn:
            yield from render(name + _tail(pairs, pair), lambda make=drawing.draw, pair=pair: make(pair))


def missing(pairs: Sequence[Pair]) -> list[str]:
    """The page's figures for which no pair has rows, but for those of measures on request."""
    absent = [d.page for d in DRAWINGS.values() if d.page and not d.on_request and not any(map(d.has, pairs))]
    return absent + [name for name, needs in PAGE_ONLY.items() if not any(_measured(p, needs) for p in pairs)]


def requested(pairs: Sequence[Pair]) -> set[str]:
    """The page's figures of measures on request for which some pair has rows."""
    return {d.page for d in DRAWINGS.values() if d.on_request and any(map(d.has, pairs))}


def _measured(pair: Pair, needs: Sequence[str]) -> bool:
    return all(any(name.startswith(start) for name in pair.series) for start in needs)


def _tail(pairs: Sequence[Pair], pair: Pair) -> str:
    """What tells the files of one pair from those of others."""
    if len(pairs) == 1:
        return ""
    return f"-{pairs.index(pair) + 1}-{re.sub(r'[^A-Za-z0-9._-]+', '_', pair.label)[-40:]}"
