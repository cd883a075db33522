"""Figures 2A–C, 3, 6, 7, 8, 10, 11, 16, 18, 19, 20 and Tab. 4 of Yu et al. 2026, from the rows of comparisons.

Each is the function of its name in `alignment` or `spectra`, with `@recipe(...)` on it. Each figure
carries what chance, or a random update, would give, and an interval: over bases with all their finetunes, or over
the finetunes of few bases, where there are `ENOUGH`; else the quartiles over matrices. Beside the picture stands a
table of what is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from specbasis.checkpoint.atomic import write_whole
from specbasis.comparison.comparison import Comparison
from specbasis.comparison.population import Member, gather, population
from specbasis.core.errors import InputError, want
from specbasis.figures.data import read_pair
from specbasis.figures.kit import render
from specbasis.figures.table import Table
from specbasis.jobs.folder import plain
from specbasis.paper import alignment, nulls, spectra  # noqa: F401 - their figures are in `RECIPES`
from specbasis.paper.material import RECIPES, Material, Model, Recipe, Records
from specbasis.paper.zoo import zoo

__all__ = ["RECIPES", "Drawn", "reproduce"]


@dataclass(frozen=True)
class Drawn:
    """What a recipe made: its files, and what to know about them."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def reproduce(
    name: str,
    results: Sequence[str | Path | Comparison],
    out: str | Path,
    *,
    modality: Mapping[str, str] | None = None,
    scores: Mapping[str, float] | None = None,
    independent: bool = False,
) -> Drawn:
    """Draw one figure of the paper from the rows of some comparisons.

    All of them are about finetunes: a pair whose verdict is *independent* is left out, and a note says so.

    Args:
        name: of a recipe in `RECIPES`.
        results: results folders or comparisons, each with one or many pairs.
        out: folder for NAME.png, NAME.svg, NAME.csv (what is drawn) and NAME.json (sources and notes).
        modality: pair or folder → modality; pairs of the paper's zoo have theirs.
        scores: pair → score; those that the paper prints where its own pairs have none.
        independent: draw independent trainings among the finetunes.

    Raises:
        InputError: no such figure, no finetune, rows lack a measure that it reads, or a figure of scores got none.
    """
    want("figure", RECIPES, name)
    recipe = RECIPES[name]
    # A finetuned model of the paper, by each label that it may have, has a modality and perhaps a printed score.
    entries = {
        label: entry for entry in zoo().pairs for label in (entry.name, entry.tuned.rpartition("/")[2], entry.tuned)
    }
    members = [
        replace(m, modality=entries[m.pair].modality) if not m.modality and m.pair in entries else m
        for m in gather(results, modality or {})
    ]
    wanted = [m for m in members if m.modality in recipe.modality]
    members, notes = (wanted or members, []) if independent else _finetunes(wanted or members)
    if recipe.modality and not wanted:
        kinds = " or ".join(recipe.modality)
        notes.append(f"no model is said to be of {kinds} ({recipe.modality[0]}=DIR says it): all are drawn")
    scored = None
    if recipe.scored:
        printed = {m.name: entries[m.pair].accuracy for m in members if m.pair in entries}
        given = {n: s for n, s in printed.items() if s is not None}
        of_members = {m.name: scores[key] for m in members for key in (m.pair, m.name) if scores and key in scores}
        given |= of_members if notes else dict(scores or {})
        if not given and not scores:
            raise InputError(
                f"{name}: needs a score of each model; give --scores FILE, a CSV with columns pair and score"
            )
        scored = population(results, scores=given, score="score", modality={m.name: m.modality for m in members})
    groups: dict[str, list[Model]] = {}
    for m in members:
        groups.setdefault(m.modality, []).append(Model(m, read_pair(m.comparison, m.pair)))
    material = Material(groups, scored, notes)
    _require(recipe, material)
    return _write(recipe, material, Path(out))


def _finetunes(members: Sequence[Member]) -> tuple[list[Member], list[str]]:
    """The members that were finetuned from their base, as far as their rows tell, and a note of each other.

    Raises:
        InputError: there is none.
    """
    is_independent = [m.comparison.verdicts[m.pair].kind == "independent" for m in members]
    if members and all(is_independent):
        raise InputError(
            f"{members[0].name}: independent of its base, as every pair here, and the figure is about finetunes: "
            "give some, or draw these with --independent"
        )
    notes = [
        f"{m.name}: independent of its base, and not a finetune of it: left out (--independent draws it)"
        for m, independent in zip(members, is_independent, strict=True)
        if independent
    ]
    return [m for m, independent in zip(members, is_independent, strict=True) if not independent], notes


def _require(recipe: Recipe, material: Material) -> None:
    """Note which measures a model lacks that are optional, and refuse one that lacks others."""
    for model in material.models:
        absent = [m for m in recipe.measures if m.removesuffix("?") not in model.pair.series]
        missing = [m for m in absent if not m.endswith("?") and len(model.pair)]
        if missing and model.member.comparison.verdicts[model.member.pair].kind not in ("identical", "partial"):
            raise InputError(
                f"{recipe.name}: {model.name} has no rows of {', '.join(missing)}; {recipe.command} gives them"
            )
        optional = [m[:-1] for m in absent if m.endswith("?")]
        if optional:
            material.notes.append(
                f"{model.name}: no {optional[0].rsplit('_', 1)[0]}, so not drawn; {recipe.command} gives it"
            )


def _write(recipe: Recipe, material: Material, out: Path) -> Drawn:
    """Draw, and write picture or Markdown, table, and the sources with notes."""
    records: Records = []

    def make() -> object:
        with np.errstate(invalid="ignore"):
            figure, drawn = recipe.draw(material)
        records.extend(drawn)
        return figure

    files: dict[str, str | bytes] = {}
    if recipe.is_table:
        make()
        files[f"{recipe.name}.md"] = Table.of(records, ".4g").markdown()
    else:
        files.update(render(recipe.name, make))
    files[f"{recipe.name}.csv"] = Table.of(records).csv(".6g")
    notes = tuple(dict.fromkeys(material.notes))
    about = {
        "figure": recipe.name,
        "title": recipe.title,
        "source": recipe.source,
        "measures": recipe.measures,
        "notes": notes,
        "models": [
            {
                "pair": m.name,
                "modality": m.member.modality,
                "base": m.member.base,
                "tuned": m.member.comparison.manifest["pairs"][m.member.pair]["tuned"]["sha256"],
                "verdict": m.member.comparison.verdicts[m.member.pair].kind,
            }
            for m in material.models
        ],
    }
    files[f"{recipe.name}.json"] = json.dumps(plain(about), indent=1, ensure_ascii=False) + "\n"
    for name, content in files.items():
        write_whole(out / name, content)
    return Drawn(tuple(out / name for name in files), notes)
