"""`population` and `lineage`: many comparisons at once, and which checkpoint comes from which."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from specbasis.cli.common import STDERR, STDOUT, line, words
from specbasis.core.errors import InputError
from specbasis.figures.tables import number

RESULTS = Annotated[
    list[str],
    typer.Argument(metavar="RESULTS...", help="folders that compare wrote; MODALITY=DIR names what they read"),
]


def modalities(results: list[str]) -> tuple[list[str], dict[str, str]]:
    """Folders, and the modality of those that have one, from words such as vision=DIR."""
    named = [word.partition("=") if "=" in word and not Path(word).exists() else ("", "", word) for word in results]
    return [path for *_, path in named], {path: name for name, _, path in named if name}


def population(
    results: RESULTS,
    out: Annotated[Path | None, typer.Option("--out", help="folder for the tables as CSV and JSON")] = None,
    scores: Annotated[Path | None, typer.Option(help="CSV with a column pair (or model) and one of scores")] = None,
    column: Annotated[str, typer.Option(help="which column of --scores, where it has several")] = "",
    ranks: Annotated[str, typer.Option(help="ranges of ranks, from 1")] = "1-10,11-30,31-100,101-200",
    roles: Annotated[str, typer.Option(help="correlate only matrices with these roles, e.g. ffn")] = "",
    json: Annotated[bool, typer.Option("--json", help="print one JSON document, nothing else")] = False,
) -> None:
    """Summarise many comparisons, and correlate alignment, by depth and rank, with scores."""
    from dataclasses import asdict

    from specbasis.comparison.findings import as_json
    from specbasis.comparison.population import population as run
    from specbasis.comparison.population import read_scores

    found, name = read_scores(scores, column) if scores else (None, "score")
    paths, modality = modalities(results)
    whole = run(paths, scores=found, score=name, modality=modality, ranks=_ranges(ranks), roles=words(roles))
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
        print(dumps(as_json(content), indent=1, ensure_ascii=False))  # noqa: T201 - as it is, for other programs
        return
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("pair", "verdict", "top-10 L", "R", "chance", "‖Δ‖/‖W‖", "findings"):
        table.add_column(heading, justify="left" if heading in ("pair", "verdict", "findings") else "right")
    for m in whole.models:
        figures = (number(m[key], ".3f") for key in ("top10_left", "top10_right", "chance_left"))
        table.add_row(m["pair"], m["verdict"], *figures, number(m["relative_update"], ".2g"), m["findings"])
    STDOUT.print(table)
    if whole.correlations:
        for c in whole.correlations:
            place = " ".join(filter(None, (c.modality, c.depth, c.ranks)))
            line(
                f"{c.method} {place}: r {number(c.r, '.2f')} [{number(c.low, '.2f')}, {number(c.high, '.2f')}], "
                f"p {number(c.p, '.3g')}, BH {number(c.q_bh, '.3g')}, BY {number(c.q_by, '.3g')} "
                f"({c.models} models, {c.clusters} {c.unit}s, {c.family} tests)"
            )
        for entry in whole.power:
            line(
                f"power{' in ' + entry['modality'] if entry['modality'] else ''}: "
                f"{entry['clusters']} {entry['unit']}s show "
                f"|r| ≥ {number(entry['alone'], '.2f')} 4 times in 5 in one test, "
                f"≥ {number(entry['family'], '.2f')} among {entry['tests']} tests"
            )
    if whole.unscored:
        line(f"without a score: {', '.join(whole.unscored)}", console=STDERR)
    if out:
        line(f"tables: {out}")


def lineage(
    models: Annotated[
        list[str], typer.Argument(metavar="MODELS...", help="checkpoints, or one folder that holds several")
    ],
    align: Annotated[bool, typer.Option(help="take the alignment of leading vectors too")] = True,
    json: Annotated[bool, typer.Option("--json", help="print one JSON document, nothing else")] = False,
) -> None:
    """Draw which checkpoint was trained from which, as far as their weights alone can tell."""
    from specbasis.lineage.tree import lineage as run
    from specbasis.lineage.tree import members_of

    found = run(members_of(Path(models[0])) if len(models) == 1 else models, align=align)
    if json:
        print(dumps(found.summary(), indent=1, ensure_ascii=False))  # noqa: T201 - as it is, for other programs
        return
    line(found.as_text())
    for tree in found.trees:
        for name, cosine in tree.angles.items():
            line(f"updates from {name}: median cosine {number(cosine, '.2f')} (independent: 0)")
    others = [k for k in found.kinships if not k.related]
    if others:
        nearest = max(others, key=lambda k: k.cosine)
        line(
            f"control: {len(others)} unrelated pairs; the nearest, {nearest.first} and {nearest.second}: cosine "
            f"{nearest.cosine:.3f}, top-10 alignment {number(nearest.alignment, '.3f')} "
            f"(chance {number(nearest.chance, '.3f')})"
        )


def _ranges(text: str) -> list[tuple[int, int]]:
    """Ranges of ranks: "1-10,11-30"."""
    ranges = []
    for word in words(text):
        low, dash, high = word.partition("-")
        if not (low.isdigit() and (high.isdigit() or not dash)) or int(low) < 1 or int(high or low) < int(low):
            raise InputError(f"--ranks got {word!r}; want ascending ranges from 1, such as 1-10,11-30")
        ranges.append((int(low), int(high or low)))
    return ranges
