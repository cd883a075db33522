"""`zoo`: the pairs of models that the paper compares."""

from __future__ import annotations

from typing import Annotated

import typer

from specbasis.cli.common import OUT, STDERR, STREAM, line, progress, words
from specbasis.cli.compare import print_comparison, write_report
from specbasis.core.errors import InputError
from specbasis.paper.zoo import run_zoo, zoo

zoo_app = typer.Typer(help="The pairs of models that the paper compares; without a verb it lists them.")


@zoo_app.callback(invoke_without_command=True)
def zoo_list(context: typer.Context) -> None:
    """List the pairs that the paper compares, with the accuracy that it prints; `zoo run` compares them."""
    if context.invoked_subcommand:
        return
    found = zoo()
    for pair in found.pairs:
        accuracy = "" if pair.accuracy is None else f", {pair.accuracy:g} %"
        sides = f"{pair.base} -> {pair.tuned}" if pair.obtainable else "nothing published"
        line(f"{pair.name} ({pair.table}, {pair.modality}, {pair.task}{accuracy}): {sides}")
        for note in pair.notes:
            line(f"  note: {note}")
    for note in found.notes:
        line(f"note: {note}")


@zoo_app.command("run")
def zoo_run(
    out: OUT,
    only: Annotated[str, typer.Option(help="names, tables or modalities, e.g. '*bert*,EEG'")] = "",
    ranks: Annotated[int, typer.Option(help="leading ranks whose singular vectors are compared")] = 200,
    stream: STREAM = False,
    report: Annotated[bool, typer.Option(help="write each pair's page and figures")] = True,
) -> None:
    """Compare the paper's pairs, each into its own folder; what cannot be had is reported and passed over."""
    missing = 0
    with progress() as told:
        for _, outcome in run_zoo(out, words(only), ranks=ranks, stream=stream, progress=told):
            if isinstance(outcome, InputError):
                missing += 1
                line(f"error: {outcome}", console=STDERR, style="red")
                continue
            print_comparison(outcome)
            if report:
                write_report(outcome)
    line(f"{missing} pairs could not be compared" if missing else "all pairs compared")
