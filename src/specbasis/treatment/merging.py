"""What `merge` wrote: the folder of a model, and how the updates of its finetunes stand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbasis.treatment.extraction import read_record

if TYPE_CHECKING:
    from specbasis.figures.table import Table

RECORD = "specbasis_merge.json"
"""Beside the merged model: what it is made of, parameter by parameter."""


@dataclass(frozen=True, eq=False)
class Merging:
    """Finetunes merged, or mapped by `specbasis.interference`.

    Attributes:
        record: ``parameters``, one for each that any finetune changed, as `Finetunes.line` has them, with ``norm``
            and ``cosines`` of the merged update; ``left_out``; ``scores``, as `judged.judge_merged` has them.
        folder: the merged model's; None of a map.
    """

    record: dict[str, Any]
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Merging:
        """Read again what an earlier `merge` wrote.

        Raises:
            InputError: there is no such folder, or its record is not what was written.
        """
        return cls(read_record(Path(folder, RECORD)), Path(folder))

    @property
    def table(self) -> Table:
        """How the updates stand to each other, by role."""
        # A value knows no view: these are the only late imports of a room further down.
        from specbasis.figures.treatment import merging_table

        return merging_table(self)

    @property
    def scores(self) -> Table | None:
        """Every task's metric of single finetunes, their mean and the merged model; None where none was judged."""
        from specbasis.figures.treatment import scores_table

        return scores_table(self) if "scores" in self.record else None

    def report(self, path: str | Path | None = None) -> Path:
        """Draw cosines and conflicts by block; returns the picture's path, `merge.png` in the folder by default."""
        from specbasis.figures.treatment import write_merging_figure

        return write_merging_figure(self, path)[0]

    def _repr_html_(self) -> str:
        return "".join(table.html(inline=True) for table in (self.scores, self.table) if table)
