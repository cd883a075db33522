"""`reproduce list`, `all`, `claims`, `tab2`, `tab3` and `tab5`: what there is, and what the committed rows say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specbasis.cli.common import STDOUT, line
from specbasis.core.errors import InputError

if TYPE_CHECKING:
    from specbasis.figures.table import Table

RESULTS = Annotated[Path, typer.Option(help="folder of the committed rows, results/ of a checkout")]


def add_verbs(app: typer.Typer) -> None:
    """Give the verbs to the group of `reproduce`."""
    from specbasis.paper.contents import PRINTED

    app.command("list")(_list)
    app.command("all")(_all)
    app.command("claims")(_claims)
    for name, table in PRINTED.items():
        app.command(name, help=(table.__doc__ or "").strip())(_printing(table))


def _printing(table: Callable[[], Table]) -> Callable[[], None]:
    return lambda: STDOUT.print(table().terminal())


def _list(results: RESULTS = Path("results")) -> None:
    """Every figure and table of the paper: its state, cost and command."""
    from specbasis.paper.contents import entries

    for entry in entries():
        line(f"{entry.name} ({entry.help}): {entry.state(results)}" + (f"; {entry.cost}" if entry.cost else ""))
        if entry.command:
            line(f"  {entry.command}")


def _all(
    context: typer.Context,
    results: RESULTS = Path("results"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be written, and how the rest is run")
    ] = False,
) -> None:
    """Write again every figure, table and page whose rows are there; list the others with their commands."""
    from specbasis.paper.contents import entries

    group: Any = context.parent.command if context.parent else None
    for entry in entries():
        words = entry.again(_existing(results))
        line(f"{entry.name} ({entry.help}): {entry.state(results)}")
        if words:
            line(f"  specbasis reproduce {' '.join(words)}")
            if not dry_run:
                group.main(words, standalone_mode=False)
        elif entry.command:
            line(f"  {entry.command}   ({entry.cost})")


def _claims(
    results: RESULTS = Path("results"),
    out: Annotated[
        Path | None, typer.Option(help="the page; default: docs/findings/claims.md beside RESULTS")
    ] = None,
) -> None:
    """Every claim of the paper against the committed rows: number, interval and verdict, as one page."""
    from specbasis.checkpoint.atomic import write_whole
    from specbasis.paper.claims import markdown

    page = markdown(_existing(results))
    pages = results.parent / "docs" / "findings"
    path = out or (pages if pages.is_dir() else results) / "claims.md"
    write_whole(path, page)
    line(f"written: {path}")


def _existing(results: Path) -> Path:
    if not results.is_dir():
        raise InputError(f"{results}: no such folder; run it in a checkout of specbasis, or give --results DIR")
    return results
