"""Tables of texts with labels: the rows of a file, and examples from rows.

A format is a function from a path to numbered rows, entered in `READERS`. Cells stay as they are written, and every
refusal names its line. `datasets`' readers were tried in place of these: they move the columns of a row with a cell
too many, fill up a row that was cut off, turn the texts "NA" and "null" into nothing and the class 007 into 7.0,
all without a word.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specbasis.checkpoint.entry import first_line
from specbasis.checkpoint.regular import parse_json, regular
from specbasis.core.errors import InputError
from specbasis.finetuning.tasks import Split

Row = Mapping[str, Any]
Rows = Iterator[tuple[int, Row]]
"""Rows with the numbers of their lines."""


def read_table(path: Path, columns: Sequence[str]) -> Rows:
    """Rows of a table, by the suffix of its name.

    Args:
        path: of the file.
        columns: that must be there.

    Raises:
        InputError: a format that is not known, an empty or damaged file, a column that is not there.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{path}: got a {suffix or 'file without a suffix'}; want {' '.join(READERS)}")
    rows = READERS[suffix](path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: holds no rows")
    _want_columns(first[1], columns, str(path))
    yield first
    yield from rows


def column_names(path: Path) -> list[str]:
    """The columns of a table's first row; none where it has no rows."""
    return list(next(READERS[path.suffix.lower()](path), (0, {}))[1])


def _want_columns(columns: Iterable[str], wanted: Sequence[str], where: str) -> None:
    names = list(columns)
    if names in ([], [""]):
        raise InputError(f"{where}: is empty")
    missing = [column for column in wanted if column not in names]
    if missing:
        raise InputError(f"{where}: no column {missing[0]!r}; it has {', '.join(map(_short, names[:12]))}")


# --- formats ------------------------------------------------------------------------------------------------------


def lines(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, ended by a line feed alone: texts hold other separators of Unicode.

    Args:
        path: of the file.
        notes: where it is said that the last line has no end, as in a file that was cut off.
    """
    try:
        with regular(path).open(encoding="utf-8-sig", newline="\n") as file:
            empty, line = True, "\n"
            for number, line in enumerate(file, 1):
                text = line.rstrip("\r\n")
                if text:
                    empty = False
                    yield number, text
        if notes is not None and not line.endswith("\n"):
            notes.append(f"{path.name}: its last line has no end; if the file is cut off, get it again")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not readable text: {error}") from error
    if empty:
        raise InputError(f"{path}: is empty")


def tab_rows(
    path: Path,
    *,
    header: Sequence[str] = (),
    columns: Sequence[str] = (),
    drops_short: bool = False,
    notes: list[str] | None = None,
) -> Rows:
    """Rows of a file with tabs; quotes are text, since those of GLUE's files do not balance.

    Args:
        path: of the file.
        header: names of the columns; by default the first line holds them.
        columns: that must be there.
        drops_short: pass over rows with missing columns that other rows follow.
        notes: where it is said what was dropped, and whether the last line has an end.
    """
    fields = ((number, line.split("\t")) for number, line in lines(path, notes))
    names = header or next(fields)[1]
    _want_columns(names, columns, str(path))
    dropped: list[int] = []
    last = 0
    for last, values in fields:
        if drops_short and len(values) < len(names):
            dropped.append(last)
        else:
            yield last, _row(path, last, names, values)
    if dropped and dropped[-1] == last:
        raise InputError(f"{path}, line {last}: the last line lacks columns; is the file truncated? get it again")
    if dropped and notes is not None:
        notes.append(
            f"{path.name}: {len(dropped)} rows with missing columns dropped, which occur in the official file"
        )


def _csv_rows(path: Path) -> Rows:
    try:
        with regular(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            for values in reader:
                if values:
                    yield reader.line_num, _row(path, reader.line_num, names, values)
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not a readable CSV: {error}") from error


def _row(path: Path, number: int, names: Sequence[str], values: Sequence[str]) -> Row:
    if len(values) != len(names):
        hint = "is the file truncated? get it again"
        if path.suffix.lower() == ".csv":
            hint = "is the file truncated, or a text with commas not quoted?"
        raise InputError(f"{path}, line {number}: {len(values)} columns, want {len(names)}; {hint}")
    return dict(zip(names, values, strict=True))


def _json_rows(path: Path) -> Rows:
    """Objects in a list, alone or the only list of an object; or an object a line."""
    numbered = list(lines(path))
    try:
        value = parse_json("\n".join(line for _, line in numbered))
    except ValueError:
        for number, line in numbered:
            try:
                row = parse_json(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON: {error}; is the file truncated?") from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, line {number}: got a {type(row).__name__}; want an object a line"
                ) from None
            yield number, row
        return
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise InputError(f"{path}: want a list of objects, one an example")
    yield from enumerate(value, 1)


def _parquet_rows(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(regular(path)).to_pylist()
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # names of columns may be no text
        raise InputError(f"{path}: not a readable Parquet file: {first_line(error)}") from error
    yield from enumerate(rows, 1)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _csv_rows,
    ".tsv": tab_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
"""A format by the suffix of a file's name."""


# --- rows into examples -------------------------------------------------------------------------------------------


def examples(
    rows: Iterable[tuple[int, Row]],
    where: str,
    texts: Sequence[str],
    label: str,
    names: Sequence[Any],
) -> Split:
    """The examples of a table.

    Args:
        rows: of the table.
        where: what messages call the table.
        texts: columns of the one or two texts.
        label: column of the label.
        names: of the classes, by their index; empty where the label is a number to be met.

    Raises:
        InputError: a cell holds no text, class or number; the table holds no row.
    """
    split, classes = Split([], []), {name: index for index, name in enumerate(names)}
    for number, row in rows:
        place = f"{where}, line {number}"
        split.inputs.append(tuple(_text(row.get(column), column, place) for column in texts))
        value = row.get(label)
        split.labels.append(_class(value, classes, label, place) if classes else _number(value, label, place))
        split.rows.append(number)
    if not split.labels:
        raise InputError(f"{where}: holds no examples")
    return split


def class_names(rows: Iterable[tuple[int, Row]], where: str, label: str) -> tuple[str, ...]:
    """Names of the classes in a column, numbers in numerical order.

    Raises:
        InputError: a cell without a name, or too few or too many classes.
    """
    names = set()
    for number, row in rows:
        value = row.get(label)
        if not _is_plain(value) or value == "":
            raise InputError(
                f"{where}, line {number}: {label} is {_shown(value)}; want the name of a class; leave rows without "
                "a label out"
            )
        names.add(_as_text(value))
    if len(names) > 1000:
        raise InputError(f"{where}: {label} has {len(names)} different values; want classes, or say --regression")
    if len(names) < 2:
        raise InputError(f"{where}: {label} has one value only ({', '.join(names)}); want at least two classes")
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(sorted(names))


def _text(value: Any, column: str, place: str) -> str:
    if not _is_plain(value):
        raise InputError(f"{place}: {column} is {_shown(value)}; want a text")
    text = _as_text(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{place}: {column} holds half a character of UTF-16; want whole ones")
    return text


def _class(value: Any, classes: Mapping[Any, int], label: str, place: str) -> float:
    index = classes.get(value if type(value) is int and value in classes else _as_text(value))
    if index is None:
        some = ", ".join(map(str, list(classes)[:12])) + (" …" if len(classes) > 12 else "")
        raise InputError(f"{place}: {label} is {_shown(value)}; want one of {some}")
    return float(index)


def _number(value: Any, label: str, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{place}: {label} is {_shown(value)}; want a number")
    return number


def _is_plain(value: Any) -> bool:
    """Whether a cell holds one value: no list, no object, no bytes, and no NaN, which stands for nothing."""
    return value is not None and not isinstance(value, list | dict | bytes) and value == value


def _as_text(value: Any) -> str:
    """Text of a cell; 3.0 is 3, so that a table of numbers names its classes the same in every format."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _shown(value: Any) -> str:
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}…"
