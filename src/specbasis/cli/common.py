"""What the verbs share: output, progress, and the words that flags take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from specbasis.core.errors import InputError
from specbasis.jobs.progress import Progress

STDOUT = Console()
STDERR = Console(stderr=True)

OUT = Annotated[Path, typer.Option("--out", help="folder for rows, manifest, page; the same command continues it")]
STREAM = Annotated[bool, typer.Option("--stream", help="from the Hub read only the bytes that are wanted")]


def line(text: str, *, console: Console = STDOUT, style: str = "") -> None:
    """Print text as it is: no markup, no wrapping, so that it can be copied and searched."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left, where there is a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    percent = TextColumn("{task.percentage:>3.0f}%")
    quiet = not STDERR.is_terminal
    with Bar(*columns, percent, TimeRemainingColumn(), console=STDERR, transient=True, disable=quiet) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda p: bar.update(task, completed=p.done, total=p.total, description=p.name[-60:])


def words(text: str) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, flag: str = "--blocks") -> list[int]:
    """Numbers from a list with ranges, of blocks or what the flag names: "0,10-11" is 0, 10, 11."""
    numbers: list[int] = []
    for word in words(text):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", word, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise InputError(f"{flag} got {word!r}; want numbers and ascending ranges, such as 0,10-11")
        numbers += range(first, last + 1)
    return numbers
