"""`zoo`: the pairs of models that the paper compares."""

from __future__ import annotations

from typing import Annotated

import typer

from specbasis.cli.common import STDERR, line, progress
from specbasis.cli.compare import write_page
from specbasis.cli.flags import OUT, REPORT, STREAM
from specbasis.core.errors import InputError
from specbasis.core.grammar import words
from specbasis.core.text import number_of

zoo_app = typer.Typer(help="The pairs of models that the paper compares; without a verb it lists them.")


@zoo_app.callback(invoke_without_command=True)
def zoo_list(context: typer.Context) -> None:
    """List the pairs that the paper compares, with the accuracy that it prints; `zoo run` compares them."""
    from specbasis.paper.zoo import zoo

    if context.invoked_subcommand:
        return
    known = zoo()
    for pair in known.pairs:
        accuracy = "" if pair.accuracy is None else f", {pair.accuracy:g} %"
        sides = f"{pair.base} -> {pair.tuned}" if pair.obtainable else "nothing published"
        line(f"{pair.name} ({pair.table}, {pair.modality}, {pair.task}{accuracy}): {sides}")
        for note in pair.notes:
            line(f"  note: {note}")
    for note in known.notes:
        line(f"note: {note}")


@zoo_app.command("run")
def zoo_run(
    out: OUT,
    only: Annotated[str, typer.Option(help="names, tables or modalities, e.g. '*bert*,EEG'")] = "",
    ranks: Annotated[int, typer.Option(help="leading ranks whose singular vectors are compared")] = 200,
    stream: STREAM = False,
    report: REPORT = True,
) -> None:
    """Compare the paper's pairs, each into its own folder; those that cannot be had are reported and skipped."""
    from specbasis.cli.tables import print_comparison
    from specbasis.paper.zoo import run_zoo

    missing = 0
    with progress() as tell:
        for _, outcome in run_zoo(out, words(only), ranks=ranks, stream=stream, progress=tell):
            if isinstance(outcome, InputError):
                missing += 1
                line(f"error: {outcome}", console=STDERR, style="red")
                continue
            print_comparison(outcome)
            if report:
                write_page(outcome)
    line(f"{number_of(missing, 'pair')} could not be compared" if missing else "all pairs compared")
