"""Every figure and table of the paper, with its state; and the tables that only print."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from specbasis.figures.table import Column, Table
from specbasis.paper.zoo import zoo


@dataclass(frozen=True)
class Entry:
    """One figure, table or page.

    Attributes:
        name: its verb.
        source: where in the paper.
        title: what it shows.
        rows: file below the results folder that it is made of, once it has run; empty where it needs none.
        command: that makes it from nothing.
        cost: of that.
        needs: what is not here and not published; empty where anybody can run it.
        redraw: words of the verb that writes it again from the committed rows; empty where that needs more.
        family: of verbs that differ in their name alone; empty where the verb is made elsewhere.
    """

    name: str
    source: str
    title: str
    rows: str = ""
    command: str = ""
    cost: str = ""
    needs: str = ""
    redraw: str = ""
    family: str = ""

    @property
    def help(self) -> str:
        """One line for ``--help``."""
        return f"{self.source}: {self.title}"

    def state(self, results: Path) -> str:
        """What is there of it below a results folder."""
        if self.needs:
            return f"needs {self.needs}"
        if not self.rows:
            return "prints" if self.command else "shows no data"
        return "done, rows committed" if (results / self.rows).is_file() else "can be run"

    def again(self, results: Path) -> list[str]:
        """The words that write it again; none where its rows are not there."""
        if self.rows and not (results / self.rows).is_file():
            return []
        return [word.format(results=results) for word in self.redraw.split()]


@cache
def entries() -> tuple[Entry, ...]:
    """All of them, in the paper's order."""
    data = tomllib.loads(files("specbasis.paper").joinpath("contents.toml").read_text(encoding="utf-8"))
    return tuple(Entry(**entry) for entry in data["entry"])


def _models(table: str) -> Table:
    columns = (Column("pretrained", words=True), Column("finetuned", words=True), Column("accuracy (%)", ".2f"))
    pairs = [pair for pair in zoo().pairs if pair.table == table]
    return Table(columns, tuple((pair.base, pair.tuned, pair.accuracy) for pair in pairs), f"{table}, as printed")


def tab2() -> Table:
    """Tab. 2: vision models, and their accuracy on ImageNet-1K as the paper prints it."""
    return _models("Tab. 2")


def tab3() -> Table:
    """Tab. 3: language models, and their accuracy on MNLI as the paper prints it."""
    return _models("Tab. 3")


def tab5() -> Table:
    """Tab. 5: epochs and learning rates of the spectral adapter in Tab. 1, as `reproduce table1` trains it."""
    from specbasis.finetuning.methods import TABLE_5
    from specbasis.finetuning.tasks import GLUE

    columns = (Column("task", words=True), Column("epochs"), Column("learning rate", "g"))
    return Table(columns, tuple((GLUE[task].title, *of) for task, of in TABLE_5.items()), "Tab. 5")


PRINTED: Mapping[str, Callable[[], Table]] = {"tab2": tab2, "tab3": tab3, "tab5": tab5}
"""The tables that print what this package holds."""
