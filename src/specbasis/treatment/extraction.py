"""What `extract` wrote: the folder of an adapter, and the record of what of the finetune it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbasis.checkpoint.digest import proven
from specbasis.checkpoint.regular import read_json
from specbasis.core.errors import InputError

if TYPE_CHECKING:
    from specbasis.figures.table import Table

RECORD = "specbasis_extract.json"
"""Beside the adapter: what of the finetune it holds, matrix by matrix."""


@dataclass(frozen=True, eq=False)
class Extraction:
    """What `extract` wrote.

    Attributes:
        folder: the adapter's.
        record: what of the finetune it holds: ``matrices``, ``carried``, ``left_out``, ``notes``, ``total``,
            ``scores``.
    """

    folder: Path
    record: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Extraction:
        """Read again what an earlier `extract` wrote.

        Raises:
            InputError: there is no such folder, or its record is not what was written.
        """
        return cls(Path(folder), read_record(Path(folder, RECORD)))

    @property
    def matrices(self) -> list[dict[str, Any]]:
        """One line for each matrix.

        name, role, block, shape, rank, bytes; squares, ‖delta‖²; and shares of it: share, what is kept; chance,
        what random directions would hold; share_of_entries, what the largest entries hold in as many bytes;
        share_of_signs, what one bit an entry holds. The last two are None for an update that is not formed.
        """
        return list(self.record["matrices"])

    @property
    def table(self) -> Table:
        """What is kept, by role."""
        # A value knows no view: these are the only late imports of a room further down.
        from specbasis.figures.treatment import extraction_table

        return extraction_table(self)

    def report(self, path: str | Path | None = None) -> Path:
        """Draw what is kept by block; returns the picture's path, `extract.png` in the folder by default."""
        from specbasis.figures.treatment import write_extraction_figure

        return write_extraction_figure(self, path)[0]

    def _repr_html_(self) -> str:
        return self.table.html(inline=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record that a treatment wrote beside what it made.

    Raises:
        InputError: it is not there, or not what was written.
    """
    try:
        return proven(read_json(path))
    except (OSError, ValueError) as error:
        verb = path.stem.removeprefix("specbasis_")
        raise InputError(f"{path}: no record of {verb} ({error}); want a folder that it wrote") from error
