"""What a treatment kept of a finetune: tables for terminal, Markdown and notebooks, and a figure by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import hypot, nan, prod
from pathlib import Path
from typing import Any

import numpy as np

from specbasis.architecture.key import ROLES
from specbasis.core.text import number_of
from specbasis.figures import kit
from specbasis.figures.kit import Axes, Figure
from specbasis.figures.table import Column, Table
from specbasis.treatment.extraction import Extraction
from specbasis.treatment.finetunes import MERGED
from specbasis.treatment.merge import Merging
from specbasis.treatment.repair import Repair

KEPT = "share of the squared update ‖delta‖² that is kept"
COLUMNS = (
    Column("role", title="what the matrices do in their block", words=True),
    Column("matrices", title="number of matrices", narrow="n"),
    Column("ranks", title="least and greatest rank", words=True),
    Column("bits", title="an entry of what the directions leave; of a delta alone", words=True),
    Column("MB", ".2f", "stored factors, millions of bytes"),
    Column("kept", ".3f", f"{KEPT}: the most that is possible at this rank", narrow="kept"),
    Column("chance", ".3f", "what subspaces of this rank in random directions hold on average"),
    Column("entries", ".3f", "what the largest entries hold, as many as fit into the same bytes with their places"),
    Column("signs", ".3f", "what the signs with one size a matrix hold (BitDelta), one bit an entry"),
)
"""The table of an extraction: a line for each role, the last one over all matrices."""


def extraction_table(extraction: Extraction, title: str = "") -> Table:
    """What is kept, by role; means are weighted with the size of the update."""
    lines = extraction.matrices
    roles = sorted({line["role"] for line in lines}, key=lambda role: (_place(role), role))
    rows = [_row(role or "other", [line for line in lines if line["role"] == role]) for role in roles]
    return Table(COLUMNS, (*rows, _row("all", lines)), title, total=True)


def _place(role: str) -> int:
    first = role.partition("+")[0]
    return ROLES.index(first) if first in ROLES else len(ROLES)


def _row(role: str, lines: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    shares = (_mean(lines, name) for name in ("share", "chance", "share_of_entries", "share_of_signs"))
    spans = (_span([line[name] for line in lines if name in line]) for name in ("rank", "bits"))
    return (role, len(lines), *spans, sum(line["bytes"] for line in lines) / 1e6, *shares)


def _span(numbers: Sequence[int]) -> str:
    ends = sorted({min(numbers), max(numbers)}) if numbers else []
    return " … ".join(map(str, ends))


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean weighted with the squared size of the update; None where a matrix has no such figure."""
    if not lines or any(line.get(name) is None for line in lines):
        return None
    weights = np.array([line["squares"] for line in lines])
    return float(np.average([line[name] for line in lines], weights=weights if weights.sum() else None))


def write_extraction_figure(extraction: Extraction, path: str | Path | None = None) -> list[Path]:
    """Share kept and rank of each matrix by block, a line for each role; as PNG and SVG (extra ``report``)."""
    return kit.write_figure(
        Path(path) if path else extraction.folder / "extract.png", lambda: _extraction_figure(extraction)
    )


def _extraction_figure(extraction: Extraction) -> Figure:
    figure, (kept, rank) = _by_block(extraction.matrices, {"share": KEPT, "rank": "rank of the factors"})
    kept.set(ylim=(-0.02, 1.03))
    rank.set(ylim=(0, None))
    return figure


def _by_block(lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> tuple[Figure, Sequence[Axes]]:
    """Two figures of each matrix by block, a line for each role."""
    lines = [line for line in lines if line["block"] is not None] or lines
    figure, axes = kit.panels(
        1, 2, (4.6, 2.9), f"{number_of(len(lines), 'matrix')} of the finetune", between=0.7, below=1.1
    )
    roles = sorted({line["role"] for line in lines}, key=lambda role: (_place(role), role))
    for (name, title), ax in zip(titles.items(), axes[0], strict=True):
        for i, role in enumerate(roles):
            own = [line for line in lines if line["role"] == role]
            blocks = [line["block"] if line["block"] is not None else 0 for line in own]
            ax.plot(blocks, [line[name] for line in own], "o-", ms=4, lw=1, color=kit.COLORS[i % len(kit.COLORS)])
        ax.set(xlabel="block", title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
    kit.legend_below(figure, axes[0][0].get_lines(), [role or "other" for role in roles], 4)
    return figure, axes[0]


# --- merge --------------------------------------------------------------------------------------------------------

PAIRS = (
    Column("role", title="what the matrices do in their block", words=True),
    Column("n", title="number of parameters"),
    Column("size", ".3f", "norm of the smallest finetune's update by that of the largest"),
    Column("cosine", "+.3f", "of the updates of two finetunes, mean over pairs; random ones: 0"),
    Column("conflicts", ".3f", "share of entries that two change in opposite directions; random: .5"),
)
DIRECTIONS = (
    Column("overlap", ".3f", "of the leading subspaces of two updates"),
    Column("chance", ".3f", "that of random updates"),
    Column("agree", ".3f", "share of leading directions in which the other acts alike; random: .025"),
    Column("fight", ".3f", "share of leading directions that the other undoes; random: .025"),
)
OUTCOME = (
    Column("norm", ".3f", "of the merged update, by the mean of the finetunes' norms"),
    Column("kept", "+.3f", "cosine of the merged update with a finetune's, mean over finetunes"),
)


def merging_table(merging: Merging) -> Table:
    """How the updates stand to each other, by role, the last line over all parameters."""
    lines = merging.record["parameters"]
    roles = sorted({line["role"] for line in lines}, key=lambda role: (_place(role), role))
    rows = [_standing(role, [line for line in lines if line["role"] == role]) for role in roles]
    columns = (*PAIRS, *(OUTCOME if merging.folder else DIRECTIONS))
    cells = (tuple(row[column.name] for column in columns) for row in (*rows, _standing("all", lines)))
    return Table(columns, tuple(cells), total=True)


def _standing(role: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over parameters and pairs: of cosines those of the whole vectors, of conflicts over all entries."""
    pairs = [
        (pair, prod(line["norms"][label] for label in pair["pair"]), prod(line["shape"]))
        for line in lines
        for pair in line["pairs"]
    ]
    among = [of_pair for of_pair in pairs if MERGED not in of_pair[0]["pair"]]
    norms = {label: hypot(*(line["norms"][label] for line in lines)) for label in lines[0]["norms"]}
    norm = norms.pop(MERGED, nan)
    return {
        "role": role or "other",
        "n": len(lines),
        "size": min(norms.values()) / max(norms.values()),
        "cosine": _weighted((pair["cosine"], size) for pair, size, _ in among),
        "conflicts": _weighted((pair["conflicts"], entries) for pair, _, entries in among),
        **{column.name: _weighted((pair.get(column.name), 1) for pair, *_ in among) for column in DIRECTIONS},
        "norm": norm * len(norms) / sum(norms.values()),
        "kept": _weighted((pair["cosine"], size) for pair, size, _ in pairs if MERGED in pair["pair"]),
    }


def _weighted(values: Iterable[tuple[float | None, float]]) -> float | None:
    """The weighted mean of those that there are."""
    there = [(value, weight) for value, weight in values if value is not None]
    total = sum(weight for _, weight in there)
    return sum(value * weight for value, weight in there) / total if total else None


def scores_table(merging: Merging) -> Table:
    """The metric of each task for each model, and the mean of their shares of what the task's own finetune has."""
    scores = merging.record["scores"]
    records = [
        {
            "model": model,
            **{f"{name} {task['metric']}": task["values"][model] for name, task in scores["tasks"].items()},
            "normalised": normalised,
        }
        for model, normalised in scores["normalised"].items()
    ]
    return Table.of(records, ".4f")


def write_merging_figure(merging: Merging, path: str | Path | None = None) -> list[Path]:
    """Cosine and conflicts of the updates by block, a line for each role; as PNG and SVG (extra ``report``)."""
    lines = [{**line, **_standing(line["role"], [line])} for line in merging.record["parameters"]]
    titles = {"cosine": "cosine of two updates", "conflicts": "share of entries that are in conflict"}
    return kit.write_figure(
        Path(path) if path else (merging.folder or Path()) / "merge.png", lambda: _by_block(lines, titles)[0]
    )


# --- repair -------------------------------------------------------------------------------------------------------

FRONTIER = (
    Column("way", title="how the finetune is brought nearer to its base", words=True),
    Column("amount", ".2f"),
    Column("blocks", words=True),
    Column("task", ".4f", "the metric of the task, on the half of the examples that reports"),
    Column("change", "+.4f", "against the finetune, on the same examples"),
    Column("recovered", ".4f", "the metric of what the base could do; of a loss its negative"),
    Column("back", "+.0%", "share of what was forgotten that came back; its interval is in the rows"),
    Column("", words=True),
)
"""The table of a repair: every point that was tried."""


def repair_table(repair: Repair) -> Table:
    """Every point, base and finetune first; a star at the one that is written."""
    rows = []
    for row in repair.rows:
        point, values = row.experiment, row.values
        star = "*" if point == repair.record["chosen"] else ""
        names = ("report.keep", "report.change", "report.recover", "report.back")
        rows.append((point["way"], point.get("amount"), point.get("blocks", ""), *map(values.get, names), star))
    return Table(FRONTIER, tuple(rows))


def write_repair_figure(repair: Repair, path: str | Path | None = None) -> list[Path]:
    """Task against what came back, one mark a point, a colour for each way; PNG and SVG (extra ``report``)."""
    return kit.write_figure(Path(path) if path else repair.folder / "repair.png", lambda: _frontier(repair))


def _frontier(repair: Repair) -> Figure:
    figure, axes = kit.panels(1, 1, (6, 3.6), "what came back, and what it costs the task", left=0.9, below=1.0)
    ax, marks = axes[0, 0], []
    points = [row for row in repair.rows if "amount" in row.experiment]
    ways = list(dict.fromkeys(row.experiment["way"] for row in points))
    for color, way in zip(kit.COLORS, ways, strict=False):
        own = [row.values for row in points if row.experiment["way"] == way]
        x, y = ([values[f"report.{name}"] for values in own] for name in ("back", "change"))
        spread = [
            [v[f"report.{name}{end}"] for v in own] for name in ("back", "change") for end in ("_low", "_high")
        ]
        bars = [np.abs(np.array([low, high]) - at) for at, low, high in ((x, *spread[:2]), (y, *spread[2:]))]
        marks.append(ax.errorbar(x, y, bars[1], bars[0], fmt="o", ms=4, lw=0.5, color=color))
    kit.reference(ax, 0.0)
    kit.reference(ax, -repair.record["tolerance"])
    ax.set(xlabel="share of what was forgotten that came back", ylabel="change of the task's metric")
    kit.legend_below(figure, marks, ways, 4)
    return figure
