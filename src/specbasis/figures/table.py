"""One table value, and the four ways to show it: in a terminal, as Markdown, as CSV and as HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from specbasis.core.text import csv_text, printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# A notebook has its own colours, light or dark: everything here inherits them, and lines are translucent grey.
_LINE = "border-bottom:1px solid rgba(128,128,128,.45)"
_CELL = "padding:2px 9px;text-align:right;white-space:nowrap;background:none;font-variant-numeric:tabular-nums"
_WORDS = _CELL.replace("right", "left")


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A number of units in a format; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else format(value / unit, form)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading.
        form: format of its numbers, such as ``.3f``; as they are when empty.
        title: what it means; HTML shows it where a reader points at the heading.
        group: heading above neighbouring columns that have the same; a terminal joins their cells into one column.
        narrow: heading in a terminal, where that has to be shorter; of a group, that of its first column counts.
        words: whether it holds words, which stand on the left; numbers stand on the right.
    """

    name: str
    form: str = ""
    title: str = ""
    group: str = ""
    narrow: str = ""
    words: bool = False

    def text(self, value: Any) -> str:
        """A cell as text: numbers in the column's format, a dash for None and NaN, words as they are."""
        if isinstance(value, str):
            return value
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        return format(value, self.form) if self.form else str(value)


@dataclass(frozen=True)
class Table:
    """Columns and rows.

    Attributes:
        columns: what each place of a row is.
        rows: one value for each column: a number, a word, None, or markup (an object with ``__html__``).
        title: of the whole; a terminal shows it.
        total: whether the last row sums up the others, and is set apart from them.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    title: str = ""
    total: bool = False

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], form: str = "", *, total: bool = False) -> Table:
        """A table of records; a column for each key of any, which holds words where its first value is one.

        Args:
            records: rows by name of the column; what a record lacks is None.
            form: format of the numbers that are not whole.
            total: see `Table`.
        """
        names = dict.fromkeys(name for record in records for name in record)
        columns = []
        for name in names:
            first = next((record[name] for record in records if record.get(name) is not None), None)
            columns.append(Column(name, form if isinstance(first, float) else "", words=isinstance(first, str)))
        rows = tuple(tuple(record.get(name) for name in names) for record in records)
        return cls(tuple(columns), rows, total=total)

    def filled(self) -> Table:
        """The table without the columns that say nothing in any row."""
        kept = [i for i in range(len(self.columns)) if any(row[i] not in (None, "") for row in self.rows)]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[c.text(value) for c, value in zip(self.columns, row, strict=True)] for row in self.rows]

    def terminal(self) -> RichTable:
        """The table for a terminal; what does not fit is folded, never cut off."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        # A name is text and no markup of rich's, and must not steer the terminal.
        table = RichTable(
            title=Text(printable(self.title), "bold") if self.title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
            show_edge=False,
        )
        groups = list(self._groups())
        for columns in groups:
            heading = columns[0].narrow or columns[0].group or columns[0].name
            table.add_column(
                Text(printable(heading)), justify="left" if columns[0].words else "right", overflow="fold"
            )
        for i, row in enumerate(self.cells):
            if self.total and i == len(self.rows) - 1:
                table.add_section()
            cells = iter(row)
            table.add_row(*(Text(printable(" ".join(next(cells) for _ in columns))) for columns in groups))
        return table

    def markdown(self) -> str:
        """The table as Markdown, with the line that ends it; what would end a cell or its line is escaped."""
        rule = ["---" if i == 0 or column.words else "---:" for i, column in enumerate(self.columns)]
        lines = [[" ".join(filter(None, (c.group, c.name))) for c in self.columns], rule, *self.cells]
        # A backslash in front of a bar would take its escape away.
        pipes = ([re.sub(r"(\\*)\|", r"\1\1\|", text) for text in line] for line in lines)
        escaped = ([" ".join(text.split("\n")) for text in line] for line in pipes)
        return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

    def csv(self, form: str = "") -> str:
        """The values as CSV, empty where there is none; floating-point numbers in a format, or with all digits."""
        return csv_text((column.name for column in self.columns), self.rows, form)

    def html(self, *, inline: bool = False) -> str:
        """A table element of the class ``numbers``; with ``inline``, its style in each cell, for notebooks."""
        grouped = any(column.group for column in self.columns)
        head = "".join(self._heading(columns, grouped, inline) for columns in self._groups())
        second = "".join(
            f'<th scope="col"{_style(inline, _CELL, _LINE, "font-weight:400")}>{escape(column.name)}</th>'
            for column in self.columns
            if column.group
        )
        body = "".join(
            self._row(row, inline, total=self.total and i == len(self.rows) - 1) for i, row in enumerate(self.rows)
        )
        return (
            f'<table class="numbers"{_style(inline, "border-collapse:collapse;background:none;margin:0")}>'
            f"<thead><tr>{head}</tr>{f'<tr>{second}</tr>' if second else ''}</thead><tbody>{body}</tbody></table>"
        )

    def _groups(self) -> Iterator[list[Column]]:
        """Neighbouring columns of one group together, every other one for itself."""
        for group, members in groupby(self.columns, key=lambda column: column.group):
            columns = list(members)
            yield from [columns] if group else [[column] for column in columns]

    def _heading(self, columns: Sequence[Column], grouped: bool, inline: bool) -> str:
        """The cell of the first line of headings above one column or one group."""
        first = columns[0]
        span = f' colspan="{len(columns)}"' if first.group else ' rowspan="2"' if grouped else ""
        name = escape(first.group or first.name)
        name = f'<abbr title="{escape(first.title)}">{name}</abbr>' if first.title else name
        style = _style(inline, _WORDS if first.words else _CELL, "" if first.group else _LINE)
        scope = "colgroup" if first.group else "col"
        return f'<th scope="{scope}"{span}{_word(first)}{style}>{name}</th>'

    def _row(self, row: Sequence[Any], inline: bool, *, total: bool) -> str:
        """A line of the body; its first cell is its heading."""
        cells = []
        for i, (column, value) in enumerate(zip(self.columns, row, strict=True)):
            if hasattr(value, "__html__"):
                text = value.__html__()
            else:
                plain = escape(column.text(value))
                text = breakable(plain) if i == 0 or column.words else plain
            weight = f"font-weight:{600 if total else 400}"
            style = _style(inline, _WORDS if column.words else _CELL, weight)
            tag, scope = ("th", ' scope="row"') if i == 0 else ("td", _word(column))
            cells.append(f"<{tag}{scope}{style}>{text}</{tag}>")
        start = '<tr class="total">' if total else "<tr>"
        return f"{start}{''.join(cells)}</tr>"


def breakable(markup: str) -> str:
    """A path or name, escaped, that may be broken into lines behind its parts, and not inside of a word."""
    return re.sub(r"(?<=[/._+\[])(?=\S)", "<wbr>", markup)


def _word(column: Column) -> str:
    return ' class="word"' if column.words else ""


def _style(inline: bool, *rules: str) -> str:
    return f' style="{";".join(filter(None, rules))}"' if inline else ""
