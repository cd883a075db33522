"""`reproduce`: the experiments of the paper, one verb each."""

from __future__ import annotations

import typer

reproduce_app = typer.Typer(help="The paper's experiments, figures and tables.", no_args_is_help=True)
