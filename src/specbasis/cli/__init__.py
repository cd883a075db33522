"""The command line: verbs and flags. No science here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import specbasis
from specbasis.cli import compare as comparing
from specbasis.cli import figures as _figures  # noqa: F401 - adds its verbs to reproduce
from specbasis.cli import finetune as finetuning
from specbasis.cli import intervene as intervening
from specbasis.cli import pretrain as pretraining
from specbasis.cli.adapter import adapter_app
from specbasis.cli.common import STDERR, STDOUT, line
from specbasis.cli.population import lineage, population
from specbasis.cli.reproduce import reproduce_app
from specbasis.cli.spectra import spectra
from specbasis.cli.zoo import zoo_app
from specbasis.core.errors import InputError

app = typer.Typer(
    help="What finetuning changes in the singular vectors and values of a model's weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
VERBS = (
    *(comparing.compare, comparing.report, comparing.inspect, spectra),
    *(intervening.edit, intervening.intervene),
    finetuning.finetune,
    *(population, lineage),
    *(pretraining.pretrain, pretraining.track),
)
for verb in VERBS:
    app.command()(verb)
app.add_typer(zoo_app, name="zoo")
app.add_typer(adapter_app, name="adapter")
app.add_typer(reproduce_app, name="reproduce")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        STDOUT.print(specbasis.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except InputError as error:
        line(f"error: {error}", console=STDERR, style="red")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            line("interrupted: what is done is kept, and the same command continues", console=STDERR)
        raise
