"""`compare`, `report`, `inspect` and `spectra`: what finetuning changed, and how a model is understood."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import specbasis
from specbasis.cli.common import STDERR, STDOUT, document, line, plain_table, progress
from specbasis.cli.flags import BASE, MODEL, OUT, STREAM
from specbasis.comparison.options import Options as CompareOptions
from specbasis.core.errors import InputError, MissingExtra
from specbasis.core.options import Options, option

if TYPE_CHECKING:
    from specbasis.comparison.comparison import Comparison

TUNED = Annotated[list[str], typer.Argument(metavar="TUNED...", help="one or several finetunes of it")]


@dataclass(frozen=True)
class Output(Options):
    """How a comparison is told."""

    json: bool = option(False, "print verdicts, findings and summaries as one JSON document, nothing else")
    fail_on: tuple[str, ...] = option((), "exit code 1 where one of these is found", metavar="FINDINGS")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fail_on:
            from specbasis.comparison.findings import kinds

            kinds(list(self.fail_on))


@dataclass(frozen=True)
class OutputAndPage(Output):
    """How a comparison is told, and whether its page is written."""

    report: bool = option(True, "write the page and the figures")


def compare(
    base: BASE,
    tuned: TUNED,
    out: OUT,
    options: CompareOptions,
    output: OutputAndPage,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan; compute and write nothing")] = False,
) -> None:
    """Measure what finetuning changed in every weight matrix; write rows, tables, findings and a page.

    Exit codes: 0 done; 1 a finding that --fail-on names; 2 an input that cannot be used, or a matrix that failed.
    """
    if dry_run:
        from specbasis.cli.tables import print_plan
        from specbasis.comparison.compare import plan

        print_plan(plan(base, tuned, out, options))
        return
    with progress() as tell:
        comparison = specbasis.compare(base, tuned, out, options, progress=tell)
    _tell(comparison, output, page=output.report)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that compare wrote")], output: Output
) -> None:
    """Print tables and findings of a comparison again, and rebuild its page and figures from the rows alone."""
    _tell(specbasis.load(folder), output, page=not output.json)


def inspect(model: MODEL, stream: STREAM = False) -> None:
    """Print how a model is understood: its stacks of blocks, the role of every matrix, and what has none."""
    from specbasis.cli.tables import print_model

    print_model(model, specbasis.open_checkpoint(model, stream=stream))


def spectra(
    model: MODEL,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write every figure to this file")] = None,
    stream: STREAM = False,
) -> None:
    """Print the power-law exponent, Marchenko-Pastur spikes and ranks of every weight matrix of one model."""
    from specbasis.comparison.spectra import spectra as spectra_of

    headings = ("matrix", "alpha", "D", "tail", "spikes", "log norm", "stable", "effective")
    table = plain_table(headings, ("matrix",), overflow="fold")
    rows: list[dict[str, Any]] = []
    for key, (out, into), s in spectra_of(specbasis.open_checkpoint(model, stream=stream)):
        rows.append({"matrix": key.name, "role": key.role, "block": key.block, "out": out, "in": into, **asdict(s)})
        ranks = f"{s.stable_rank:.1f}", f"{s.effective_rank:.1f}"
        table.add_row(
            key.name, f"{s.alpha:.2f}", f"{s.distance:.3f}", str(s.tail), str(s.spikes), f"{s.log_norm:.2f}", *ranks
        )
    STDOUT.print(table)
    line("alpha: exponent of the eigenvalues' tail; D: its distance; spikes: eigenvalues above Marchenko-Pastur")
    if csv_file is not None and rows:
        _write_csv(csv_file, rows)
        line(f"figures: {csv_file}")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv

    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file") from error


def list_measures() -> None:
    """What `--measures help` prints."""
    from specbasis.measures.table import registered

    headings = ("measure", "index", "unit", "what it is")
    table = plain_table(headings, headings, overflow="fold")
    for measure in registered():
        table.add_row(measure.name, measure.index, measure.unit, measure.title)
    STDOUT.print(table)


def list_findings() -> None:
    """What `--fail-on help` prints."""
    from specbasis.comparison.findings import CHECKS

    for check in CHECKS:
        line(check.kind)


def _tell(comparison: Comparison, output: Output, *, page: bool) -> None:
    """Print what was found and write the page; end with the exit code that it comes to."""
    from specbasis.cli.tables import print_comparison

    if output.json:
        document(comparison.summary())
    else:
        print_comparison(comparison)
    if page:
        write_page(comparison, quiet=output.json)
    hits = [
        f"{label}: {finding.sentence}"
        for label, findings in comparison.findings.items()
        for finding in findings
        if finding.kind in output.fail_on
    ]
    for hit in hits:
        line(f"failed on {hit}", console=STDERR, style="red")
    if comparison.failed:
        raise typer.Exit(2)
    if hits:
        raise typer.Exit(1)


def write_page(comparison: Comparison, *, quiet: bool = False) -> None:
    """Write the page and the figures, and say where; rows and tables are the job, so a missing extra is a note."""
    try:
        line(f"page: {comparison.report()}", console=STDERR if quiet else STDOUT)
    except MissingExtra as error:
        line(f"note: no page: {error}", console=STDERR)
