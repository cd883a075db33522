"""The models that the paper compares, as data: pretrained and finetuned pairs with what the paper prints."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from specbasis.comparison.compare import compare
from specbasis.comparison.comparison import Comparison
from specbasis.core.errors import InputError


@dataclass(frozen=True)
class ZooPair:
    """A pretrained and a finetuned model that the paper compares.

    Attributes:
        name: short and unique: the finetuned model's name without its publisher, or the model's own name.
        base: the pretrained model in the syntax of sources; empty where nothing published is named.
        tuned: the finetuned model, likewise.
        task: what it was finetuned on.
        accuracy: in percent as the paper prints it, which is what the publisher reports; None where it prints none.
        table: where the paper lists it.
        modality: "vision", "language", "EEG" or "fMRI".
        notes: where the paper contradicts itself or a source, and what had to be chosen.
    """

    name: str
    base: str
    tuned: str
    task: str
    accuracy: float | None
    table: str
    modality: str
    notes: tuple[str, ...] = ()

    @property
    def obtainable(self) -> bool:
        """Whether both sides name something that can be fetched."""
        return bool(self.base and self.tuned)


@dataclass(frozen=True)
class Zoo:
    """All pairs, and what is to be said about the tables as a whole."""

    pairs: tuple[ZooPair, ...]
    notes: tuple[str, ...]


@cache
def zoo() -> Zoo:
    """The pairs of Tab. 2, Tab. 3 and App. A.2, in the paper's order.

    Source: Yu et al. 2026, Tab. 2, Tab. 3, App. A.2.
    """
    data = tomllib.loads(files("specbasis.paper").joinpath("zoo.toml").read_text(encoding="utf-8"))
    pairs = []
    for entry in data["pair"]:
        name = entry.get("name") or entry["tuned"].removeprefix("timm:").rpartition("/")[2]
        notes = tuple(entry.get("notes", ()))
        pairs.append(ZooPair(**{"accuracy": None, **entry, "name": name, "notes": notes}))
    return Zoo(tuple(pairs), tuple(data["notes"]))


def run_zoo(
    out: Path, only: Sequence[str] = (), **options: Any
) -> Iterator[tuple[ZooPair, Comparison | InputError]]:
    """Compare the zoo's pairs one after the other, each into its own folder below ``out``; resumable.

    Args:
        out: folder of results; a pair's rows, manifest and page go to ``out/NAME``.
        only: patterns of names, tables or modalities (``*`` and ``?``); all pairs when empty.
        options: as of `specbasis.comparison.compare`.

    Yields:
        Each pair with its comparison, or with the reason why it could not be had: one failure ends nothing.

    Raises:
        InputError: ``only`` names no pair.
    """
    chosen = [
        pair
        for pair in zoo().pairs
        for texts in [(pair.name, pair.table, pair.modality)]
        if any(fnmatch.fnmatch(text, pattern) for pattern in only or ("*",) for text in texts)
    ]
    if not chosen:
        raise InputError(f"no pair of the zoo matches {', '.join(only)}; `specbasis zoo` shows them all")
    for pair in chosen:
        if not pair.obtainable:
            yield pair, InputError(f"{pair.name}: nothing published to compare; {' '.join(pair.notes)}")
            continue
        try:
            yield pair, compare(pair.base, pair.tuned, out / pair.name, **options)
        except InputError as error:
            yield pair, error
