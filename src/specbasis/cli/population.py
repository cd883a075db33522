"""`population` and `lineage`: many comparisons at once, and which checkpoint comes from which."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from specbasis.cli.common import document, line
from specbasis.cli.flags import COLUMN, JSON, SCORES
from specbasis.core.grammar import intervals, labelled, words

RESULTS = Annotated[
    list[str],
    typer.Argument(metavar="RESULTS...", help="folders that compare wrote; MODALITY=DIR names what they read"),
]


def modalities(results: list[str]) -> tuple[list[str], dict[str, str]]:
    """Folders, and the modality of those that have one, from words such as vision=DIR."""
    named = [labelled(word) for word in results]
    return [path for _, path in named], {path: name for name, path in named if name}


def population(
    results: RESULTS,
    out: Annotated[Path | None, typer.Option("--out", help="folder for the tables as CSV and JSON")] = None,
    scores: SCORES = None,
    column: COLUMN = "",
    ranks: Annotated[str, typer.Option(help="ranges of ranks, e.g. 0:10,10:30")] = "0:10,10:30,30:100,100:200",
    roles: Annotated[str, typer.Option(help="correlate only matrices with these roles, e.g. ffn")] = "",
    json: JSON = False,
) -> None:
    """Summarise many comparisons, and correlate alignment, by depth and rank, with scores."""
    from specbasis.architecture.selection import check_roles
    from specbasis.cli.tables import print_population
    from specbasis.comparison.correlations import read_scores
    from specbasis.comparison.population import population as run
    from specbasis.jobs.folder import plain

    check_roles(words(roles))
    values, name = read_scores(scores, column) if scores else (None, "score")
    paths, modality = modalities(results)
    # Population counts ranks from 1 and includes both ends, as its tables do.
    ends = [(first + 1, stop) for first, stop in intervals(ranks, "--ranks", origin=1)]
    whole = run(paths, scores=values, score=name, modality=modality, ranks=ends, roles=words(roles))
    if out:
        whole.write(out)
    if json:
        content = {
            "models": whole.models,
            "parts": whole.parts,
            "correlations": [asdict(c) for c in whole.correlations],
            "power": whole.power,
            "unscored": whole.unscored,
        }
        document(plain(content))
        return
    print_population(whole)
    if out:
        line(f"tables: {out}")


def lineage(
    models: Annotated[
        list[str], typer.Argument(metavar="MODELS...", help="checkpoints, or one folder that holds several")
    ],
    align: Annotated[bool, typer.Option(help="take the alignment of leading vectors too")] = True,
    json: JSON = False,
) -> None:
    """Draw which checkpoint was trained from which, as far as their weights alone can tell."""
    from specbasis.figures.table import number
    from specbasis.lineage.tree import lineage as run

    forest = run(models[0] if len(models) == 1 else models, align=align)
    if json:
        document(forest.summary())
        return
    line(forest.as_text())
    for tree in forest.trees:
        for name, cosine in tree.angles.items():
            line(f"updates from {name}: median cosine {number(cosine, '.2f')} (independent: 0)")
    others = [k for k in forest.kinships if not k.related]
    if others:
        nearest = max(others, key=lambda k: k.cosine)
        line(
            f"control: {len(others)} unrelated pairs; the nearest, {nearest.first} and {nearest.second}: cosine "
            f"{nearest.cosine:.3f}, top-10 alignment {number(nearest.alignment, '.3f')} "
            f"(chance {number(nearest.chance, '.3f')})"
        )
