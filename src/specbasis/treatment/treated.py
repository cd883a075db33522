"""What a treatment made: a folder, and beside what is in it the record of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.digest import proven, sealed
from specbasis.checkpoint.regular import read_json
from specbasis.core.brief import clipped
from specbasis.core.errors import InputError
from specbasis.jobs.folder import plain, write_json
from specbasis.jobs.provenance import provenances

if TYPE_CHECKING:
    from specbasis.figures.table import Table


@dataclass(frozen=True, eq=False)
class Treated:
    """What a treatment made.

    Attributes:
        folder: where it is; None where nothing was written.
        record: what it is and how it came about, as JSON has it.
    """

    folder: Path | None
    record: dict[str, Any]

    RECORD: ClassVar[str] = ""
    """Name of the record's file."""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read again what an earlier call wrote.

        Raises:
            InputError: there is no such folder, or its record is not what was written.
        """
        path = Path(folder, cls.RECORD)
        try:
            return cls(Path(folder), proven(read_json(path)))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: no record of {cls.__name__.lower()} ({error}); want a folder that it wrote"
            ) from error

    @property
    def model(self) -> Path | None:
        """The folder of what was made; None where nothing was."""
        return self.folder

    @property
    def sentence(self) -> str:
        """What came of it; empty where its table alone says so."""
        return str(self.record.get("sentence", ""))

    @property
    def table(self) -> Table:
        """What came of it, in numbers."""
        # A value knows no view: these are the only late imports of a room further down.
        from specbasis.figures.treatment import tables

        return tables(self)[0]

    @property
    def scores(self) -> Table | None:
        """The metrics of its tasks; None where none was judged."""
        from specbasis.figures.treatment import tables

        return next(iter(tables(self)[1:]), None)

    def __repr__(self) -> str:
        from specbasis.figures.treatment import view

        place = f" in {self.folder}" if self.folder else ""
        return clipped(f"{type(self).__name__}{place}: {'; '.join(filter(None, view(self).sentences(self)))}")

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page, by default `report.html` in the folder, and return its path.

        Raises:
            InputError: the libraries of the extra ``report`` are missing, or the path cannot be written.
        """
        from specbasis.figures.treatment import write_page

        return write_page(self, Path(path) if path else (self.folder or Path()) / "report.html")

    def _repr_html_(self) -> str:
        from specbasis.figures.treatment import view

        shown = view(self)
        words = [f"<p>{escape(text)}</p>" for text in shown.sentences(self) if text]
        return "".join([*words, *(table.html(inline=True) for table in shown.tables(self))])


def weights_of(models: Mapping[str, Checkpoint]) -> list[dict[str, Any]]:
    """What a record says of the weights that it rests on: name, source, sha256, and a repository's revision."""
    found = zip(models, provenances(models.values(), ()), strict=True)
    known = ("source", "sha256", "revision")
    return [{"name": name, **{key: of[key] for key in known if key in of}} for name, of in found]


def written_record(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a record with its seal; returns it as it is read again."""
    kept: dict[str, Any] = sealed(plain(record))
    write_json(path, kept)
    return kept
