"""`card`: what is known of a model, in its README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import specbasis
from specbasis.cli.common import line, note
from specbasis.core.errors import InputError, want


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
    from specbasis.checkpoint.adapter_file import CONFIG
    from specbasis.checkpoint.card import CARD, RELATIONS, hub_name
    from specbasis.figures.treatment import opened

    if relation:
        want("relation", RELATIONS, relation)
    if base_model and not hub_name(base_model):
        raise InputError(f"--base-model got {base_model!r}; want org/name on the Hub")
    fields = {"base_model": hub_name(base_model) if base_model else "", "base_model_relation": relation}
    given = {name: value for name, value in fields.items() if value}
    place = readme or folder / CARD
    if (folder / CONFIG).is_file():
        from specbasis.adapter.card import write_card

        notes = write_card(folder, place, **given)
    elif (treated := opened(folder)) is not None:
        from specbasis.figures.documents import write_treated_card

        if treated.model is None:
            raise InputError(f"{folder}: the repair wrote no model ({treated.sentence}); so no card of it")
        place = readme or treated.model / CARD
        notes = write_treated_card(treated, place, **given)
    else:
        from specbasis.figures.documents import write_card as write_comparison

        notes = write_comparison(specbasis.load(folder), place, pair, **given)
    line(f"card: {place}")
    for text in notes:
        note(text)
