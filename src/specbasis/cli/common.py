"""What the verbs share: output and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from json import dumps
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from specbasis.jobs.experiments import Row
    from specbasis.jobs.progress import Progress

STDOUT = Console()
STDERR = Console(stderr=True)


def line(text: str, *, console: Console = STDOUT, style: str = "") -> None:
    """Print text as it is: no markup, no wrapping, so that it can be copied and searched."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def document(content: Any) -> None:
    """Print one JSON document and nothing else."""
    print(dumps(content, indent=1, ensure_ascii=False))  # noqa: T201 - as it is, for other programs


@contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left, where there is a terminal."""
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    percent = TextColumn("{task.percentage:>3.0f}%")
    quiet = not STDERR.is_terminal
    with Bar(*columns, percent, TimeRemainingColumn(), console=STDERR, transient=True, disable=quiet) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda p: bar.update(task, completed=p.done, total=p.total, description=p.name[-60:])


@contextmanager
def progress_by_run() -> Iterator[Callable[[Progress], None]]:
    """The bar, and a line for each run that ended, where there is no terminal."""
    with progress() as bar:

        def tell(now: Progress) -> None:
            bar(now)
            if not STDERR.is_terminal:
                line(f"{now.done:g} of {now.total:g}: {now.name}", console=STDERR)

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
