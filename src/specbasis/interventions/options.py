"""What `edit` and `intervene` are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specbasis.architecture.selection import Selection
from specbasis.core.errors import InputError
from specbasis.core.grammar import numbers, words
from specbasis.core.options import ADVANCED, PYTHON, SELECTION, Options, option

SIDES = ("both", "left", "right")
"""The words for the sides that an edit replaces; `core.edits.SIDES` says what they mean."""

RANKS: tuple[int | str, ...] = (1, 5, 10, 30, 100, 200, "all")


def ranks(text: str, flag: str = "") -> int | str:
    """One set of ranks: a number as a number, everything else as `core.edits` reads it."""
    word = text.strip()
    return int(word) if word.removeprefix("-").isdecimal() else word


@dataclass(frozen=True)
class EditOptions(Selection):
    """One edit of many matrices; the kinds and sets of ranks are those of `specbasis.core.edits`."""

    kind: str = option("swap", "what is done to the ranks")
    ranks: int | str = option("all", "n leading ranks, -n trailing ones, k:m, or a list 0:30,100,-5:", parse=ranks)
    sides: str = option("both", "both, left or right", choices=SIDES)
    seed: int = option(0, "seed of the random kinds", panel=ADVANCED)
    factor: float = option(1.0, "factor of the kind rescale", panel=ADVANCED)
    groups: float = option(0.0, "move ranks together whose relative distance is below this", panel=ADVANCED)
    roles: tuple[str, ...] = option(
        ("ffn", "attention"), "only these roles, e.g. ffn,attention.query", panel=SELECTION
    )


@dataclass(frozen=True)
class GridOptions(Options):
    """The grid of edits that `intervene` judges; plain random vectors and zero are always among the kinds.

    ``roles`` are groups of matrices that are edited together, joined by +, and ``blocks`` groups of blocks; each of
    the one with each of the other. ``sources`` are labels of models, ``base`` among them.
    """

    kinds: tuple[str, ...] = option(("swap", "random_complement"), "kinds of edits, beside random and zero")
    ranks: tuple[int | str, ...] = option(
        RANKS,
        "sets of ranks: n leading, k:m, all; -n trailing ones, for zero alone",
        parse=lambda text, flag: tuple(ranks(word) for word in words(text)),
    )
    roles: tuple[str, ...] = option(
        ("ffn", "attention"), "groups edited together; + joins roles in one", panel=SELECTION
    )
    blocks: tuple[str, ...] = option(
        ("",),
        "groups of blocks, separated by ;, e.g. '0:6;6:12'; empty: all",
        panel=SELECTION,
        parse=lambda text, flag: tuple(part.strip() for part in text.split(";")),
    )
    sources: tuple[str, ...] | None = option(
        None, "take vectors from these only: base and labels; empty: all", panel=ADVANCED
    )
    seeds: int | Sequence[int] = option(
        3, "seeds of each random kind, e.g. 0,1,2; default: three", parse=lambda text, flag: numbers(text, flag)
    )
    sides: str = option("both", "both, left or right", choices=SIDES)
    groups: float = option(0.0, "move ranks together whose relative distance is below this", panel=ADVANCED)
    resamples: int = option(1000, "of the intervals and tests", panel=PYTHON)
    cache: str | Path | None = option(
        None, "folder in which decompositions are kept and found again", panel=ADVANCED
    )
    cache_size: str = option("20GB", "limit for the decompositions in the cache", panel=ADVANCED)
    workers: int = option(1, "processes side by side, each with its own model", panel=ADVANCED)

    @property
    def draws(self) -> tuple[int, ...]:
        """The seeds of the random kinds; a number n stands for 0 … n − 1."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.draws:
            raise InputError(f"got seeds = {self.seeds!r}; want at least one")
