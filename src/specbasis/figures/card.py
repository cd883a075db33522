"""The section of a model card, of whatever a folder holds: a comparison, a treatment, or an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specbasis.adapter.card import write_card as of_adapter
from specbasis.checkpoint.adapter_file import CONFIG
from specbasis.checkpoint.card import CARD, RELATIONS, hub_name
from specbasis.comparison.comparison import load
from specbasis.core.errors import InputError, want
from specbasis.figures.documents import write_card as of_comparison, write_treated_card
from specbasis.figures.treatment import opened


@dataclass(frozen=True)
class Card:
    """A card that was written.

    Attributes:
        path: the file.
        notes: what a reader should know of it.
    """

    path: Path
    notes: tuple[str, ...]


def card(
    folder: str | Path,
    readme: str | Path | None = None,
    *,
    pair: str = "",
    base_model: str = "",
    relation: str = "",
) -> Card:
    """Write a section on what finetuning changed, how a model was made, or how an adapter loads, into its card.

    Run again, it replaces that section. The rest of the card stays; missing entries are added to its YAML.

    Args:
        folder: that compare, extract, repair or merge wrote, or an adapter's.
        readme: the card; by default README.md in the folder, or beside the model that was made.
        pair: which finetune, where the folder holds several.
        base_model: org/name of the base on the Hub.
        relation: of the model to its base: finetune, adapter, quantized or merge.

    Raises:
        InputError: the folder holds none of these, or no such pair; a name is none; the card cannot be written.
    """
    if relation:
        want("relation", RELATIONS, relation)
    if base_model and not hub_name(base_model):
        raise InputError(f"got base_model = {base_model!r}; want org/name on the Hub")
    fields = {"base_model": hub_name(base_model) if base_model else "", "base_model_relation": relation}
    given = {name: value for name, value in fields.items() if value}
    folder = Path(folder)
    place = Path(readme) if readme else folder / CARD
    if (folder / CONFIG).is_file():
        return Card(place, tuple(of_adapter(folder, place, **given)))
    if (treated := opened(folder)) is None:
        return Card(place, tuple(of_comparison(load(folder), place, pair, **given)))
    if treated.model is None:
        raise InputError(f"{folder}: holds no model, so there is no card of it: {treated.sentence}")
    place = Path(readme) if readme else treated.model / CARD
    return Card(place, tuple(write_treated_card(treated, place, **given)))
