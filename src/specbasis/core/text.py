"""Text on its way to a terminal, a table or a spreadsheet: of files that others wrote, and of numbers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.ASCII)
_ABSOLUTE = re.compile(r"(?<![\w./\\:~…-])(?:[A-Za-z]:)?(?:[/\\][^/\\\s:;,'\"()]+){3,}")
_WHOLE = re.compile(r"(?:[A-Za-z]:)?[/\\]{1,2}(?:[^/\\:]+[/\\]){2,}[^/\\:]+")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters, but for ends of lines and tabs, are spelt out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def markdown(text: object) -> str:
    """Text of others as one line of Markdown without a meaning of its own, or a place of this machine."""
    line = " ".join(shareable(printable(str(text))).split())
    marked = re.sub(r"[\\`*_\[\]~$]", r"\\\g<0>", escape(line, quote=False))
    return re.sub(r"@(?=\w)|#(?=\d)", r"<span>\g<0></span>", marked).replace("|", "&#124;")


def number_of(n: int, noun: str) -> str:
    """A number of things: "1 matrix", "2 matrices", "3 models"."""
    plural = f"{noun[:-1]}ces" if noun.endswith("ix") else f"{noun}s"
    return f"{n} {noun if n == 1 else plural}"


def named_parts(names: Iterable[str], limit: int = 4) -> str:
    """A few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shareable(text: str) -> str:
    """Text without the places of this machine: of an absolute path its last two parts are left, behind ``…/``.

    What others can follow stays: relative paths, addresses (``hub:…``, ``https://…``), short paths.
    """
    pattern = _WHOLE if _WHOLE.fullmatch(text) else _ABSOLUTE
    return pattern.sub(lambda path: "…/" + "/".join(re.split(r"[/\\]", path[0])[-2:]), text)


def csv_text(names: Iterable[str], rows: Iterable[Sequence[Any]], form: str = "") -> str:
    """Rows under the names of their columns as CSV; see `cell` for what stands in it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([cell(value, form) for value in row] for row in rows)
    return text.getvalue()


def cell(value: Any, form: str = "") -> Any:
    """A value for a CSV file: a number in a format, or with all digits; words that no spreadsheet computes.

    An apostrophe goes before words that begin as a formula does, as OWASP advises against CSV injection.
    """
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) and not _NUMBER.fullmatch(value) else value
    return format(value, form) if isinstance(value, float) else value
