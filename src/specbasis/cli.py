"""The command line: verbs and flags. No science here."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

import specbasis
from specbasis.compare import Plan
from specbasis.errors import InputError
from specbasis.plan import human_bytes, rates
from specbasis.report.tables import by_reason, cells
from specbasis.summary import RoleSummary, named_parts

app = typer.Typer(
    help="What finetuning changes in the singular vectors and values of a model's weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

BASE = Annotated[str, typer.Argument(metavar="BASE", help="pretrained checkpoint: file, folder, pkg:PACKAGE/PATH")]
TUNED = Annotated[list[str], typer.Argument(metavar="TUNED...", help="one or several finetunes of it")]
OUT = Annotated[Path, typer.Option("--out", help="folder for rows, manifest, page; the same command continues it")]


@app.command()
def compare(
    base: BASE,
    tuned: TUNED,
    out: OUT,
    ranks: Annotated[int, typer.Option(help="leading ranks whose singular vectors are compared")] = 200,
    subspace: Annotated[int, typer.Option(help="leading ranks k at which principal angles are taken")] = 10,
    roles: Annotated[str, typer.Option(help="only these roles, e.g. ffn,attention.query")] = "",
    blocks: Annotated[str, typer.Option(help="only these blocks, e.g. 0,10-11")] = "",
    name: Annotated[str, typer.Option(help="only matrices whose name matches this pattern (* and ?)")] = "",
    common_rows: Annotated[bool, typer.Option(help="compare the common rows where a vocabulary grew")] = False,
    measures: Annotated[str, typer.Option(help="only these measures, e.g. 'alignment*,singular_value_*'")] = "",
    workers: Annotated[
        int | None, typer.Option(help="matrices at the same time; default: one for each core")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="what workers may take, e.g. 8GB; default: half of the free")
    ] = None,
    engine: Annotated[str, typer.Option(help="threads, processes, ray, or auto")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan; compute and write nothing")] = False,
    report: Annotated[bool, typer.Option(help="write the page and the figures")] = True,
) -> None:
    """Measure what finetuning changed in every weight matrix, and write rows, tables and a page."""
    from specbasis.compare import compare as run
    from specbasis.compare import plan

    what: dict[str, Any] = {
        "ranks": ranks,
        "subspace": subspace,
        "roles": _words(roles),
        "blocks": _numbers(blocks),
        "name": name,
        "common_rows": common_rows,
        "measures": _words(measures),
        "workers": workers,
        "memory": memory,
    }
    if dry_run:
        _print_plan(plan(base, tuned, out, **what))
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(
        *columns, TimeRemainingColumn(), console=_err, transient=True, disable=not _err.is_terminal
    ) as bar:
        task = bar.add_task("reading", total=None)
        comparison = run(
            base,
            tuned,
            out,
            **what,
            engine=engine,
            progress=lambda p: bar.update(task, completed=p.done, total=p.total, description=p.matrix[-60:]),
        )
    _print_comparison(comparison)
    if report:
        _write_report(comparison)
    if comparison.failed:
        raise typer.Exit(2)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that compare wrote")]) -> None:
    """Print the tables of a comparison again, and rebuild its page and figures from the rows alone."""
    comparison = specbasis.load(folder)
    _print_comparison(comparison)
    _write_report(comparison)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        _out.print(specbasis.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except InputError as error:
        _line(f"error: {error}", console=_err, style="red")
        sys.exit(2)
    except KeyboardInterrupt:
        _line("interrupted: what is done is kept, and the same command continues", console=_err)
        sys.exit(130)


def _print_comparison(comparison: specbasis.Comparison) -> None:
    for pair in comparison.pairs:
        about = comparison.manifest["pairs"][pair]
        _out.print(_summary_table(pair, comparison.summaries[pair]))
        for note in about["notes"]:
            _line(f"note: {note}")
        for reason, names in by_reason(about["skipped"]).items():
            _line(f"not compared: {len(names)}, {reason}: {named_parts(names, 2)}")
        _line(comparison.verdicts[pair].sentence, style="bold")
        _line("")
    for failure in comparison.failed:
        _line(f"error: {failure['error']}", console=_err, style="red")


def _print_plan(plan: Plan) -> None:
    """One line per shape, and what it comes to."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("out × in", "n", "Gflop each", "s each", "memory each"):
        table.add_column(heading, justify="right", no_wrap=True)
    shapes = Counter((task.shape, task.work) for task in plan.tasks)
    for (shape, work), count in shapes.items():
        seconds = f"{work.seconds(rates()):.2g}"
        size = "×".join(map(str, shape))
        table.add_row(size, str(count), f"{work.flops / 1e9:.3g}", seconds, human_bytes(work.bytes))
    _out.print(table)
    _line(
        f"{len(plan.tasks)} matrices, {plan.workers} at a time: about {plan.seconds:.3g} s where nothing else runs, "
        f"{human_bytes(plan.bytes)} beside the libraries (budget {human_bytes(plan.memory)})"
    )


def _summary_table(pair: str, lines: list[RoleSummary]) -> Table:
    """One line per role; narrow enough for 80 columns."""
    table = Table(
        title=pair, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    headings = ("role", "n", "top-10\nL     R", "top-30\nL     R", "chance\nL    R", "RSD", "‖Δ‖/‖W‖", "?")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "role" else "right", no_wrap=True)
    table.caption, table.caption_justify = "L left, R right; ?: unresolved ranks, left out of the means", "left"
    for line in lines:
        if line is lines[-1]:
            table.add_section()
        role, matrices, *sides, rsd, update, unresolved = cells(line)
        both = (f"{left} {right}" for left, right in zip(sides[::2], sides[1::2], strict=True))
        table.add_row(role, matrices, *both, rsd, update, unresolved)
    return table


def _line(text: str, *, console: Console = _out, style: str = "") -> None:
    """Print text as it is: no markup, no wrapping, so that it can be copied and searched."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _write_report(comparison: specbasis.Comparison) -> None:
    page = comparison.report()
    _line(f"page: {page}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    """Block numbers from a list with ranges: "0,10-11" is 0, 10, 11."""
    numbers: list[int] = []
    for word in _words(text):
        if not re.fullmatch(r"\d+(-\d+)?", word):
            raise InputError(f"--blocks got {word!r}; want numbers and ranges, such as 0,10-11")
        first, _, last = word.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
