"""`reproduce fig2 … tab4`: figures of the paper from the rows of comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from specbasis.cli.common import STDERR, line, progress
from specbasis.cli.population import modalities
from specbasis.cli.reproduce import reproduce_app
from specbasis.paper.figures import RECIPES, Recipe


def _verb(recipe: Recipe) -> Callable[..., None]:
    def verb(
        results: Annotated[
            list[str],
            typer.Argument(
                metavar="RESULTS...",
                help="folders that compare wrote, or finetunes to compare with --base first; MODALITY=…",
            ),
        ],
        out: Annotated[Path, typer.Option("--out", help="folder for picture, table and notes")],
        base: Annotated[str, typer.Option(help="compare this pretrained checkpoint with RESULTS first")] = "",
        scores: Annotated[
            Path | None, typer.Option(help="CSV with a column pair (or model) and one of scores")
        ] = None,
        column: Annotated[str, typer.Option(help="which column of --scores, where it has several")] = "",
    ) -> None:
        from specbasis.comparison.compare import compare
        from specbasis.comparison.population import read_scores
        from specbasis.paper.figures import reproduce

        paths, modality = modalities(results)
        found = read_scores(scores, column)[0] if scores else None
        if base:
            with progress() as told:
                compared = compare(base, paths, out / "comparison", nulls=True, progress=told)
            names = dict(zip(compared.manifest["pairs"], paths, strict=True))
            modality = {label: modality[path] for label, path in names.items() if path in modality}
            drawn = reproduce(recipe.name, [compared], out, modality=modality, scores=found)
        else:
            drawn = reproduce(recipe.name, paths, out, modality=modality, scores=found)
        for note in drawn.notes:
            line(f"note: {note}", console=STDERR)
        for file in drawn.files:
            line(str(file))

    verb.__doc__ = f"{recipe.source}: {recipe.title}, from the rows of comparisons."
    return verb


for _recipe in RECIPES:
    reproduce_app.command(_recipe.name)(_verb(_recipe))
