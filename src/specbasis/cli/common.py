"""What the verbs share: output and progress."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from json import dumps
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleDimensions

from specbasis.core.text import printable

if TYPE_CHECKING:
    from specbasis.jobs.experiments import Row
    from specbasis.jobs.progress import Progress

PLAIN = {"×": "x", "–": "-", "…": "...", "‖": "|", "≥": ">=", "≤": "<=", "Δ": "d", "→": "->", "±": "+-",
         "·": ".", **{sign: str(i) for i, sign in enumerate("▁▂▃▄▅▆▇█", 1)}}  # fmt: skip
"""How the signs of tables and sentences are written where a terminal has none of them."""


UNKNOWN_WIDTH = 160
"""Columns of what is no terminal."""


class _Console(Console):
    """A console whose reader may go away: then it prints to nobody, and the work goes on."""

    @property
    def size(self) -> ConsoleDimensions:
        """As rich has it; where nobody says how wide a file or a pipe is, wide enough that no table wraps."""
        known = self.is_terminal or self._width is not None or "COLUMNS" in self._environ
        return super().size if known else ConsoleDimensions(UNKNOWN_WIDTH, 25)

    def on_broken_pipe(self) -> None:
        discard(self.file)


STDOUT = _Console()
STDERR = _Console(stderr=True)
ASIDE = _Console(stderr=True)
"""For progress; ``--quiet`` makes it quiet, and with it the notes."""


def prepare_streams() -> None:
    """Print to any terminal: what its encoding lacks is spelt in ASCII, and no character stops the program."""
    codecs.register_error("specbasis", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="specbasis")


def _spelt(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in lacking), error.end


def discard(stream: Any) -> None:
    """Let what is written to a stream go nowhere from now on, what it holds back too."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def line(text: str, *, console: Console = STDOUT, style: str = "") -> None:
    """Print text as it is: no markup, no wrapping, so that it can be copied and searched; it steers no terminal."""
    try:
        console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)
    except OSError:
        if not console.stderr:
            raise
        discard(console.file)  # nobody is left to be told


def note(text: str, *, console: Console = STDOUT) -> None:
    """Print what a reader of the results should know, unless ``--quiet`` is given."""
    if not ASIDE.quiet:
        line(f"note: {text}", console=console)


def document(content: Any) -> None:
    """Print one document and nothing else: a text, or content as JSON."""
    text = content if isinstance(content, str) else dumps(content, indent=1, ensure_ascii=False)
    if not isinstance(content, str) and (not STDOUT.encoding.startswith("utf") or printable(text) != text):
        text = dumps(content, indent=1)
    STDOUT.out(printable(text), highlight=False)


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left, where there is a terminal."""
    if not ASIDE.is_terminal or ASIDE.quiet:  # where older versions of rich would end it with an empty line
        yield lambda _: None
        return
    from rich.progress import BarColumn, Progress as Bar, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    percent = TextColumn("{task.percentage:>3.0f}%")
    with Bar(*columns, percent, TimeRemainingColumn(), console=ASIDE, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda p: bar.update(task, completed=p.done, total=p.total, description=p.name[-60:])


@contextmanager
def progress_by_run() -> Iterator[Callable[[Progress], None]]:
    """The bar, and a line for each run that ended, where there is no terminal."""
    with progress() as bar:

        def tell(now: Progress) -> None:
            bar(now)
            if not ASIDE.is_terminal:
                line(f"{now.done:g} of {now.total:g}: {now.name}", console=ASIDE)

        yield tell


def exit_on_failures(rows: Iterable[Row]) -> None:
    """Name the cells of a grid that failed, and end with exit code 2 where one did."""
    rows = list(rows)
    failed = [row for row in rows if row.error is not None]
    for row in failed[:10]:
        line(f"error: {' '.join(map(str, row.experiment.values()))}: {row.error}", console=STDERR, style="red")
    if failed:
        line(f"{len(failed)} of {len(rows)} cells failed; the same command tries them again", console=STDERR)
        raise typer.Exit(2)
