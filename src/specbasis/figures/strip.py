"""How far each layer moved, for a terminal: a line of characters for each role, one for each block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from specbasis.architecture.key import ROLES
from specbasis.comparison.facts import Facts
from specbasis.core.text import printable

if TYPE_CHECKING:
    from rich.text import Text

STEPS = (
    (0.0, "·", "none", "bright_black"),
    (0.001, "▁", "to 0.1%", "blue"),
    (0.003, "▂", "0.3%", "bright_blue"),
    (0.01, "▃", "1%", "cyan"),
    (0.03, "▄", "3%", "green"),
    (0.1, "▅", "10%", "yellow"),
    (0.3, "▆", "30%", "bright_red"),
    (1.0, "▇", "100%", "red"),
    (math.inf, "█", "more", "magenta"),
)
"""‖Δ‖/‖W‖ up to which, character, words, and colour of rich's; a character tells as much as its colour."""

_NAME = 32


def layers(facts: Facts, width: int) -> Text | None:
    """The update of each block by role, and a legend; None for a model without blocks.

    Args:
        facts: of one pair.
        width: columns of the terminal. Where there are more blocks, neighbours share a character: the larger.

    Of several matrices in one place the largest counts. Roles of several stacks have a line for each.
    """
    from rich.text import Text

    largest: dict[tuple[str, str], dict[int | None, float]] = {}
    for m in facts.matrices:
        places = largest.setdefault((m["stack"], m["role"]), {})
        places[m["block"]] = max(m["relative_update"], places.get(m["block"], 0.0))
    last = max((block for places in largest.values() for block in places if block is not None), default=None)
    if last is None:
        return None
    stacks = list(dict.fromkeys(stack for stack, _ in largest))
    order = sorted(largest, key=lambda place: (stacks.index(place[0]), ROLES.index(place[1])))
    names = {
        place: printable(f"{place[0]} {place[1]}" if len(stacks) > 1 else place[1])[-_NAME:] for place in order
    }
    left = max(map(len, names.values())) + 2
    room = max(width - left - 6, 10)
    together, wide = -(-(last + 1) // room), 2 if 2 * (last + 1) <= room else 1
    text = Text()
    for place in order:
        text.append(names[place].ljust(left))
        for start in range(0, last + 1, together):
            _put(text, [largest[place].get(block) for block in range(start, start + together)], wide)
        text.append("  ")
        _put(text, [largest[place].get(None)], 2)
        text.append("\n")
    shared = f", {together} to a character" if together > 1 else ""
    text.append(f"‖Δ‖/‖W‖ of blocks 0 to {last}{shared}; apart from them, what is in no block\n")
    for _, sign, words, color in STEPS:
        text.append(sign, color)
        text.append(f" {words}  ")
    text.rstrip()
    return text


def _put(text: Text, sizes: list[float | None], wide: int) -> None:
    there = [size for size in sizes if size is not None]
    largest = max(there, default=None)
    if largest is None:
        text.append(" " * wide)
        return
    sign, color = next(((sign, color) for most, sign, _, color in STEPS if largest <= most), ("?", ""))
    text.append(sign * wide, color)
