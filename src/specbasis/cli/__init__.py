"""The command line: verbs and flags. No science here, and no large library before a verb needs it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import specbasis
from specbasis.cli.adapter import adapter_app
from specbasis.cli.common import STDERR, STDOUT, line
from specbasis.cli.compare import compare, inspect, list_findings, list_measures, report, spectra
from specbasis.cli.finetune import finetune, list_methods
from specbasis.cli.flags import flags
from specbasis.cli.intervene import edit, intervene, list_kinds
from specbasis.cli.population import lineage, population
from specbasis.cli.reproduce import pretrain, reproduce_app
from specbasis.cli.reproduce.zoo import zoo_app
from specbasis.cli.track import track
from specbasis.core.errors import InputError
from specbasis.core.extras import missing

VERBS = (
    flags(compare, measures=list_measures, fail_on=list_findings),
    flags(report, fail_on=list_findings),
    inspect,
    spectra,
    flags(edit, kind=list_kinds),
    flags(intervene, kinds=list_kinds),
    flags(finetune, method=list_methods),
    population,
    lineage,
    flags(pretrain),
    flags(track),
)
GROUPS = {"zoo": zoo_app, "adapter": adapter_app, "reproduce": reproduce_app}

app = typer.Typer(
    help="What finetuning changes in the singular vectors and values of a model's weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command()(verb)
for name, group in GROUPS.items():
    app.add_typer(group, name=name)

_USAGE: type[Exception] = typer.BadParameter.__bases__[0]
"""What typer raises for a command line that it cannot read: an unknown flag or verb, a missing argument."""


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        STDOUT.print(specbasis.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and exit code 2, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        code = 2
        line(f"error: {error}", console=STDERR, style="red")
    except ImportError as error:
        known = missing(error)
        if known is None:
            raise
        code = 2
        line(f"error: {known}", console=STDERR, style="red")
    except (_USAGE, typer.Abort) as error:
        code = getattr(error, "exit_code", 2)
        if hasattr(error, "format_message"):
            line(f"error: {error.format_message()}", console=STDERR, style="red")
    if code == 130:  # what typer makes of Ctrl-C
        line("interrupted: what is done is kept, and the same command continues", console=STDERR)
    sys.exit(code if isinstance(code, int) else 0)
