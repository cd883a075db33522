"""How far work is: one value for all verbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a caller is told as work goes on: how much of it is done (in any unit), and what was done last."""

    done: float
    total: float
    name: str


Report = Callable[[Progress], None]
"""What is called as work goes on."""


def silent(_: Progress) -> None:
    """Tell nobody."""
