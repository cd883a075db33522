"""`compare`, `report`, `inspect` and `spectra`: what finetuning changed, and how a model is understood."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import specbasis
from specbasis.cli.common import STDERR, STDOUT, document, line, note, progress
from specbasis.cli.flags import BASE, MODEL, STREAM
from specbasis.comparison.options import Options as CompareOptions
from specbasis.core.errors import InputError, MissingExtra
from specbasis.core.grammar import labelled
from specbasis.core.options import ADVANCED, Options, option

if TYPE_CHECKING:
    from specbasis.checkpoint import Checkpoint
    from specbasis.comparison.comparison import Comparison

ADAPTED = Annotated[str, typer.Option("--base", help="base of an adapter, if not the one that it names")]
KEPT = Annotated[Path | None, typer.Option("--out", help="folder of results; the same command continues it")]
TUNED = Annotated[list[str], typer.Argument(metavar="[NAME=]TUNED...", help="one or several finetunes of it")]


FORMATS = ("text", "json", "markdown", "sarif", "junit")


@dataclass(frozen=True)
class Output(Options):
    """How a comparison is told."""

    format: str = option("text", "text, or one document alone: json, markdown, sarif, junit", choices=FORMATS)
    json: bool = option(False, "short for --format json", panel=ADVANCED)
    fail_on: tuple[str, ...] = option((), "exit code 1 if one of these is found", metavar="FINDINGS")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json:
            if self.format not in ("text", "json"):
                raise InputError(f"got --json with --format {self.format}; want one of the two")
            object.__setattr__(self, "format", "json")
        if self.fail_on:
            from specbasis.comparison.findings import kinds

            kinds(list(self.fail_on))


@dataclass(frozen=True)
class OutputAndPage(Output):
    """How a comparison is told, and whether its page is written."""

    report: bool = option(True, "write the page")


def compare(
    base: BASE,
    tuned: TUNED,
    options: CompareOptions,
    output: OutputAndPage,
    out: KEPT = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan; compute and write nothing")] = False,
) -> None:
    """Measure what finetuning changed in every weight matrix; write rows, tables, findings and a page.

    Without --out what is found is printed, and nothing is kept.

    Exit codes: 0 done; 1 a finding that --fail-on names; 2 an input that cannot be used, or a matrix that failed.
    """
    if dry_run:
        from specbasis.cli.tables import print_plan
        from specbasis.comparison.compare import plan

        if output.format != "text":
            raise InputError(
                f"got --dry-run with --format {output.format}; a plan is printed as text: leave one out"
            )
        print_plan(plan(base, tuned, out, options))
        return
    _want_looked_for({measure.name for measure in options.taken}, output.fail_on)
    with progress() as tell:
        comparison = specbasis.compare(base, tuned, out, options, progress=tell)
    _tell(
        comparison,
        output,
        page=output.report and out is not None,
        given=[base, *(labelled(word)[1] for word in tuned)],
    )


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="a folder that compare, extract, repair or merge wrote")
    ],
    output: Output,
) -> None:
    """Print the results again, and rebuild the page and figures from the rows, or the record, alone."""
    try:
        comparison = specbasis.load(folder)
    except InputError:
        from specbasis.cli.treatment import report as report_treated

        if not report_treated(folder, output.format, output.fail_on):
            raise
    else:
        _tell(comparison, output, page=output.format == "text", figures=True)


def inspect(model: MODEL, base: ADAPTED = "", stream: STREAM = False) -> None:
    """Print what is recognised in a model: its stacks of blocks, roles, and parameters without a role."""
    from specbasis.cli.tables import print_model

    print_model(model, _opened(model, base, stream))


def spectra(
    model: MODEL,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write all numbers to this file")] = None,
    base: ADAPTED = "",
    stream: STREAM = False,
) -> None:
    """Print the power-law exponent, Marchenko-Pastur spikes and ranks of every weight matrix of one model."""
    from specbasis.checkpoint.atomic import write_whole
    from specbasis.cli.tables import print_columns
    from specbasis.comparison.spectra import spectra as spectra_of
    from specbasis.figures.table import Column, Table

    columns = {
        "matrix": Column("matrix", words=True),
        "alpha": Column("alpha", ".2f"),
        "distance": Column("D", ".3f"),
        "tail": Column("tail"),
        "spikes": Column("spikes"),
        "log_norm": Column("log norm", ".2f"),
        "stable_rank": Column("stable", ".1f"),
        "effective_rank": Column("effective", ".1f"),
    }
    records: list[dict[str, Any]] = [
        {"matrix": key.name, "role": key.role, "block": key.block, "out": out, "in": width, **asdict(spectrum)}
        for key, (out, width), spectrum in spectra_of(_opened(model, base, stream))
    ]
    print_columns(columns, records)
    line("alpha: exponent of the eigenvalues' tail; D: its distance; spikes: eigenvalues above Marchenko-Pastur")
    if csv_file is not None and records:
        write_whole(csv_file, Table.of(records).csv())
        line(f"figures: {csv_file}")


def _opened(model: str, base: str, stream: bool) -> Checkpoint:
    """A model, or an adapter on the base that is said, or else on the one that it names."""
    from specbasis.checkpoint import open_checkpoint, open_tuned

    if not base:
        return open_checkpoint(model, stream=stream)
    return open_tuned(model, open_checkpoint(base, stream=stream), stream=stream)


def list_measures() -> None:
    """What `--measures help` prints."""
    from specbasis.figures.table import Column, Table
    from specbasis.measures.table import registered

    columns = tuple(Column(name, words=True) for name in ("measure", "index", "unit", "what it is"))
    rows = tuple((m.name, m.index, m.unit, m.title) for m in registered())
    STDOUT.print(Table(columns, rows).terminal())


def list_findings() -> None:
    """What `--fail-on help` prints."""
    from specbasis.cli.tables import print_names
    from specbasis.comparison.findings import CHECKS

    print_names({check.kind: f"{check.about} ({check.severity})" for check in CHECKS})


def _tell(
    comparison: Comparison, output: Output, *, page: bool, figures: bool = False, given: Sequence[str] = ()
) -> None:
    """Print what was found and write the page; end with the exit code that it comes to."""
    from specbasis.cli.tables import print_comparison
    from specbasis.figures.documents import DOCUMENTS, failing
    from specbasis.treatment.advice import next_steps

    if output.format != "text":
        document(DOCUMENTS[output.format](comparison, given, output.fail_on))
    else:
        print_comparison(comparison)
        for label in comparison.pairs:
            for step in next_steps(comparison, label, given):
                line(step.reason if len(comparison.pairs) == 1 else f"{label}: {step.reason}")
                line(f"  {step.command}")
    if page:
        write_page(comparison, figures=figures, quiet=output.format != "text")
    hits = failing(comparison, output.fail_on)
    for label, finding in hits:
        line(f"failed on {label}: {finding.sentence}", console=STDERR, style="red")
    if comparison.failed:
        raise typer.Exit(2)
    try:
        for facts in comparison.facts.values():
            moved = any(m["relative_update"] > 0 for m in facts.matrices)
            if moved:  # else there is nothing to find
                _want_looked_for(facts.measures, output.fail_on)
    except InputError as error:
        if not hits:
            raise
        note(str(error), console=STDERR)
    if hits:
        raise typer.Exit(1)


def _want_looked_for(measures: Set[str], fail_on: Sequence[str]) -> None:
    """Refuse a gate that would pass whatever there is to find."""
    from specbasis.comparison.check import unlooked

    blind = [check for check in unlooked(measures) if check.kind in fail_on]
    if blind:
        lacking = ", ".join(name for name in blind[0].needs if name not in measures)
        raise InputError(
            f"--fail-on {blind[0].kind}: cannot be looked for without {lacking}, which --quick or --measures left "
            "out; measure it, or leave the finding out"
        )


def write_page(comparison: Comparison, *, figures: bool = False, quiet: bool = False) -> None:
    """Write the page, and say where; rows and tables are the job, so a missing extra is a note.

    The page shows all figures itself; as files they take longer than many a comparison, so `report` writes them.
    """
    console = STDERR if quiet else STDOUT
    try:
        line(f"page: {comparison.report(figures=figures)}", console=console)
        if figures:
            line(f"figures: {comparison.folder / 'figures'}", console=console)
    except MissingExtra as error:
        note(f"no page: {error}", console=STDERR)
