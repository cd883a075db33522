"""`card`: what is known of a model, in its README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specbasis.cli.common import line, note


def card(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="a folder that compare, extract, repair or merge wrote, or an adapter's"
        ),
    ],
    readme: Annotated[Path | None, typer.Option("--readme", help="the card; default: README.md in DIR")] = None,
    pair: Annotated[str, typer.Option("--pair", help="which finetune, where DIR holds several")] = "",
    base_model: Annotated[str, typer.Option("--base-model", help="org/name of the base on the Hub")] = "",
    relation: Annotated[str, typer.Option("--relation", help="finetune, adapter, quantized or merge")] = "",
) -> None:
    """Write a section on what finetuning changed, how a model was made, or how an adapter loads, into its card.

    Run again, it replaces that section. The rest of the card stays; missing entries are added to its YAML.
    """
    from specbasis.figures.card import card as run

    written = run(folder, readme, pair=pair, base_model=base_model, relation=relation)
    line(f"card: {written.path}")
    for text in written.notes:
        note(text)
