"""What a finetune can be extracted as: what all forms share, and how much of each matrix fits into a size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

from torch import Tensor

from specbasis.checkpoint import Checkpoint, weights_sha256
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.writer import safetensors_header, stored_bytes, write_safetensors
from specbasis.core.errors import InputError
from specbasis.jobs.cache import Cache
from specbasis.jobs.progress import Progress, Report
from specbasis.treatment.budget import Curve, shared_out
from specbasis.treatment.options import ExtractOptions
from specbasis.treatment.updates import Update

Source = str | Path | Mapping[str, Tensor]
Choice = Sequence[int]
"""Of each matrix one of its options, in the order of `Form.matrices`; 0 stores nothing."""

ROUNDS = 12
"""How often a size is shared out anew, with what names and shapes turned out to take."""


class Form(ABC):
    """One way to store a finetune.

    Attributes:
        address: what the user calls the base.
        matrices: the changes of which something is chosen.
        carried: those that are stored as they are.
        left_out: those that are not stored, with the reason.
        lines: of each matrix what of it is in the folder; see `Extraction.matrices`.
        notes: sentences on what was chosen.
    """

    WEIGHTS: str
    """The file of the tensors."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        changes: Sequence[Update],
        options: ExtractOptions,
        progress: Report,
        address: Source,
    ) -> None:
        self.base, self.tuned, self.changes, self.options = base, tuned, changes, options
        self.progress, self.address = progress, address
        self.cache = Cache(Path(options.cache)) if options.cache else None
        self.base_sha256 = weights_sha256(base)
        self.matrices: list[Update] = []
        self.carried: list[Update] = []
        self.left_out: list[tuple[Update, str]] = []
        self.lines: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.sort([c for c in changes if c.reason or c.is_changed])
        self.choice = self.chosen()

    @abstractmethod
    def sort(self, changed: Sequence[Update]) -> None:
        """Put every change among the matrices, what is carried, or what is left out."""

    @abstractmethod
    def chosen(self) -> Choice:
        """How much of each matrix is stored."""

    @abstractmethod
    def entries(self, choice: Choice) -> dict[str, Entry]:
        """The tensors of the file by name; they are made when they are written."""

    @abstractmethod
    def texts(self, choice: Choice) -> dict[str, str]:
        """The other files by name."""

    def write(self, folder: Path) -> None:
        """The files, one matrix in memory at a time."""
        entries = self.entries(self.choice)
        with (folder / self.WEIGHTS).open("wb") as stream:
            tensors = ((name, entry.load()) for name, entry in entries.items())
            write_safetensors(stream, entries, tensors, self._metadata)
        for name, text in self.texts(self.choice).items():
            (folder / name).write_text(text, encoding="utf-8")
        order = {change.name: i for i, change in enumerate(self.matrices)}
        self.lines.sort(key=lambda line: order[line["name"]])

    # --- sizes ----------------------------------------------------------------------------------------------------

    def size(self, choice: Choice) -> int:
        """Bytes of all files."""
        entries = self.entries(choice)
        tensors = sum(stored_bytes(name, entry) for name, entry in entries.items())
        texts = sum(len(text.encode()) for text in self.texts(choice).values())
        return len(safetensors_header(entries, self._metadata)) + tensors + texts

    @property
    def _metadata(self) -> dict[str, str]:
        return {"base_sha256": self.base_sha256}

    def spread(self, curves: Sequence[Curve]) -> list[int]:
        """The best choice of the size, or for the share, that is asked for."""
        budget = self.options.budget
        if budget is None:
            return shared_out(curves, None, self.options.energy or 1.0)
        # What names and shapes take depends on the choice, and not in the order of sizes: near ones may take more.
        best, least, room, low, high = None, float("inf"), float(budget), 0.0, float(budget)
        for _ in range(ROUNDS):
            choice = shared_out(curves, room)
            taken, lost = (
                sum(float(numbers[option]) for numbers, option in zip(parts, choice, strict=True))
                for parts in ([c.bytes for c in curves], [c.lost for c in curves])
            )
            beside = self.size(choice) - taken
            low, high = (room, high) if taken + beside <= budget else (low, room)
            if low == room and any(choice) and lost < least:
                best, least = choice, lost
            if high - low < 1:
                break
            room = budget - beside if low < budget - beside < high else (low + high) / 2
        return best or self._smallest(curves, budget)

    def _smallest(self, curves: Sequence[Curve], budget: int) -> list[int]:
        """The choice that stores the least of anything.

        Raises:
            InputError: it is larger than the budget.
        """
        choice = [0] * len(curves)
        if curves:
            m = min(range(len(curves)), key=lambda m: float(curves[m].bytes[curves[m].least]))
            choice[m] = curves[m].least
        least, carried = (
            self.size(choice),
            sum(stored_bytes(c.name, self.tuned.entries[c.name]) for c in self.carried),
        )
        if least > budget:
            hint = ", or leave out what is no matrix (--no-carry)" if carried else ""
            raise InputError(
                f"got size = {self.options.size}; what is carried whole takes {carried:,} bytes, names, shapes and "
                f"the least part of a matrix the rest: want {least:,} bytes at least{hint}"
            )
        return choice

    # --- what the forms have in common ----------------------------------------------------------------------------

    def tell(self, change: Update, prefix: str = "") -> Update:
        """Tell which matrix is under way; returns it."""
        self.progress(Progress(self.matrices.index(change), len(self.matrices), f"{prefix}{change.name}"))
        return change

    def note(self, change: Update, **own: Any) -> None:
        """A line on a matrix."""
        self.lines.append(
            {
                "name": change.name,
                "role": change.role,
                "block": change.block,
                "shape": list(change.matrix_shape),
                "squares": change.squares[0],
                **own,
            }
        )


def made_together(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Entry]:
    """Entries of tensors that one computation gives: the first that is read makes all, and none is held longer.

    Args:
        shapes: name → format and shape.
        make: gives them by name.
    """
    held: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if not held:
            held.update(make())
        return held.pop(name)

    return {name: Entry(shape, dtype, partial(take, name)) for name, (dtype, shape) in shapes.items()}


def unusable(change: Update) -> str:
    """Why a change cannot be decomposed; empty where it can."""
    return change.reason or ("holds NaN or Inf" if isnan(change.squares[0]) else "")
