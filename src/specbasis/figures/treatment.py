"""What a treatment kept of a finetune: tables, sentences and a figure, for terminal, notebooks and the page."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import hypot, nan, prod
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specbasis.architecture.key import ROLES
from specbasis.checkpoint.atomic import write_whole
from specbasis.core.extras import require
from specbasis.core.text import named_parts, number_of
from specbasis.figures import kit
from specbasis.figures.kit import Axes, Figure
from specbasis.figures.table import Column, Table
from specbasis.treatment.extract import Extraction
from specbasis.treatment.finetunes import MERGED
from specbasis.treatment.forgetting import Forgetting
from specbasis.treatment.merge import Merging
from specbasis.treatment.repair import Repair
from specbasis.treatment.treated import Treated


class View(NamedTuple):
    """How what a treatment made is shown: the verb of the command, which its picture is called, and what makes the
    tables, the lines on single matrices, the sentences below them, and the picture; None where there is nothing to
    draw.
    """

    verb: str
    tables: Callable[[Any], tuple[Table, ...]]
    lines: Callable[[Any], list[dict[str, Any]]] = lambda treated: []
    sentences: Callable[[Any], list[str]] = lambda treated: [treated.sentence]
    figure: Callable[[Any], Figure | None] = lambda treated: None


def view(treated: Treated) -> View:
    """The one for what this is."""
    return VIEWS[type(treated)]


def opened(folder: Path) -> Treated | None:
    """What an earlier treatment wrote to a folder; None of any other.

    Raises:
        InputError: its record is not what was written.
    """
    return next((k.load(folder) for k in VIEWS if k.RECORD and (folder / k.RECORD).is_file()), None)


def tables(treated: Treated) -> tuple[Table, ...]:
    """Its tables: of all that there is, and the scores where a task judged it."""
    return view(treated).tables(treated)


def legend(shown: Iterable[Table], *, narrow: bool = False) -> str:
    """What the headings of numbers stand for, in one line; ``narrow``: as a terminal has them."""
    titled = (c for table in shown for c in table.columns if c.title and not c.words)
    columns = {(c.narrow if narrow else "") or c.name: c.title for c in titled}
    return "; ".join(f"{name}, {title}" for name, title in columns.items())


def write_page(treated: Treated, path: Path) -> Path:
    """Write the page of a treatment, and its picture as PNG and SVG beside it; returns the page's path.

    Raises:
        InputError: the libraries of the extra ``report`` are missing, or the path cannot be written.
    """
    require("jinja2", "matplotlib", extra="report", purpose="the page needs")
    from specbasis.figures.page import render_treatment

    shown, picture = view(treated), ""
    for file in kit.write_figure(path.with_name(f"{shown.verb}.png"), partial(shown.figure, treated)):
        picture = "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode("ascii")  # the last
    record = {**dict.fromkeys(("notes", "carried", "left_out"), ()), **treated.record}
    manifest = {key: value for key, value in record.items() if key not in LISTED}
    tuned = record["tuned"]
    text = render_treatment(
        verb=shown.verb,
        record=record,
        tuned=list(tuned.values()) if isinstance(tuned, Mapping) else [tuned],
        tables=shown.tables(treated),
        matrices=Table.of([_cells(line) for line in shown.lines(treated)], ".3g").filled(),
        sentences=shown.sentences(treated),
        picture=picture,
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False),
    )
    write_whole(path, text)
    return path


def _cells(line: Mapping[str, Any]) -> dict[str, Any]:
    """What of a line fits into cells."""
    shape = {"shape": " × ".join(map(str, line["shape"]))} if "shape" in line else {}
    return {name: value for name, value in {**line, **shape}.items() if not isinstance(value, list | dict)}


LISTED = ("matrices", "parameters", "carried", "left_out", "notes", "scores", "sha256")
"""Parts of a record that a page shows as tables and lists."""

# --- extract ------------------------------------------------------------------------------------------------------

SHARES = (
    Column("kept", ".3f", "share of the squared update ‖delta‖² that is kept, as it is stored"),
    Column("chance", ".3f", "what random subspaces of this rank hold on average"),
    Column("entries", ".3f", "what the largest entries hold, as many as fit into the same bytes with their places"),
    Column("signs", ".3f", "what one bit an entry and one scale a matrix hold (BitDelta)"),
    Column("LoRA", ".3f", "what a LoRA of as many bytes holds"),
)
OF_LINES = ("share", "chance", "share_of_entries", "share_of_signs", "share_of_lora")
"""The shares in the lines of an extraction, in the order of the columns."""

COLUMNS = (
    Column("role", title="what the matrices do in their block", words=True),
    Column("matrices", title="number of matrices", narrow="n"),
    Column("whole", title="of these stored as they are"),
    Column("ranks", title="least and greatest rank, or size of the core", words=True),
    Column("bits", title="an entry of what the directions leave", words=True),
    Column("MB", ".2f", "stored, millions of bytes"),
    *SHARES,
)


def _extraction_tables(extraction: Extraction) -> tuple[Table, ...]:
    """What is kept, by role, weighted with the size of the update, and in all; and the scores."""
    kept = Table(COLUMNS, _by_role(extraction.matrices, _row), total=True).filled()
    scores = extraction.record.get("scores")
    return (kept, _metrics_table(scores)) if scores else (kept,)


def _metrics_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table.of([{"metric": metric, **values} for metric, values in scores.items()], ".4f")
    names = [column.name for column in table.columns]
    *_, before, after = (name for name in names if name in ("base", "tuned", "treated"))
    titles = {
        "change": f"{after} − {before}, from change_low to change_high with 95 % confidence",
        "p": "of no change (paired randomisation)",
        "examples": "that both were judged on",
    }
    columns = (replace(column, title=titles.get(column.name, "")) for column in table.columns)
    return replace(table, columns=tuple(columns))


def _by_role(
    lines: Sequence[Mapping[str, Any]], row: Callable[..., tuple[Any, ...]]
) -> tuple[tuple[Any, ...], ...]:
    """A row for the lines of each role, and the last one for all."""
    own = {role: [line for line in lines if line["role"] == role] for role in _roles(lines)}
    return (*(row(role or "other", members) for role, members in own.items()), row("all", lines))


def _roles(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({line["role"] for line in lines}, key=lambda role: (_place(role), role))


def _extraction_sentences(extraction: Extraction) -> list[str]:
    total, carried = extraction.record["total"], extraction.record["carried"]
    without = [line["name"] for line in extraction.matrices if not line["bytes"]]
    lines = [
        f"kept: {total['share']:.2%} of the update in {total['bytes'] / 1e6:.3g} MB; the finetune has "
        f"{total['tuned_bytes'] / 1e6:.3g} MB"
    ]
    if without:
        lines.append(f"nothing kept of {named_parts(without, 1)}: less for the bytes than in the others")
    if carried:
        share = sum(item["share_of_update"] for item in carried)
        lines.append(
            f"carried whole: {len(carried)} parameters that are new, or that no low-rank update fits "
            f"({share:.2%} of the update)"
        )
    if healed := extraction.record.get("healed"):
        first, last = healed["loss"]
        lines.append(
            f"healed: {number_of(healed['steps'], 'step')} on {healed['task']} from there, training loss "
            f"{first:.4f} to {last:.4f}; the shares are those before"
        )
    return lines


def _place(role: str) -> int:
    first = role.partition("+")[0]
    return ROLES.index(first) if first in ROLES else len(ROLES)


def _row(role: str, lines: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    whole = sum(bool(line.get("whole")) for line in lines)
    parts = [line for line in lines if not line.get("whole")]
    spans = (_span([line[name] for line in parts if name in line]) for name in ("rank", "bits"))
    size = sum(line["bytes"] for line in lines) / 1e6
    shares = (_weighted((line.get(name), line["squares"]) for line in lines) for name in OF_LINES)
    return (role, len(lines), whole or None, *spans, size, *shares)


def _span(numbers: Sequence[int]) -> str:
    ends = sorted({min(numbers), max(numbers)}) if numbers else []
    return " … ".join(map(str, ends))


def _extraction_figure(extraction: Extraction) -> Figure | None:
    if not extraction.matrices:
        return None
    figure, (kept, rank) = _by_block(extraction.matrices, {"share": SHARES[0].title, "rank": "rank"})
    kept.set(ylim=(-0.02, 1.03))
    rank.set(ylim=(0, None))
    return figure


def _by_block(lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> tuple[Figure, Sequence[Axes]]:
    """Two figures of each matrix by block, a line for each role."""
    lines = [line for line in lines if line["block"] is not None] or lines
    figure, axes = kit.panels(1, 2, (4.6, 2.9), number_of(len(lines), "matrix"), between=0.7, below=1.1)
    roles = _roles(lines)
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


def _merging_tables(merging: Merging) -> tuple[Table, ...]:
    """How the updates stand to each other, by role, the last line over all parameters; and the scores."""
    columns = (*PAIRS, *(OUTCOME if merging.folder else DIRECTIONS))

    def row(role: str, lines: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        standing = _standing(role, lines)
        return tuple(standing[column.name] for column in columns)

    table = Table(columns, _by_role(merging.record["parameters"], row), total=True)
    return (table, _scores_table(merging)) if "scores" in merging.record else (table,)


def _merging_lines(merging: Merging) -> list[dict[str, Any]]:
    return [{**line, **_standing(line["role"], [line])} for line in merging.record["parameters"]]


def _merging_sentences(merging: Merging) -> list[str]:
    whole, options = _standing("all", merging.record["parameters"]), merging.record["options"]
    said = [f"merged by {options['method']}, scale {options['scale']:g}"] if merging.folder else []
    if (cosine := whole["cosine"]) is not None:
        how = "hardly interfere" if abs(cosine) < 0.1 else "agree in part" if cosine > 0 else "oppose each other"
        said.append(
            f"the updates {how}: cosine {cosine:+.3f} (random: 0), {whole['conflicts']:.1%} of the entries in "
            "conflict (random: 50%)"
        )
    return said + [
        f"merged − mean on {name}: {task['change']:+.4f} [{task['change_low']:+.4f}, {task['change_high']:+.4f}], "
        f"{task['examples']} examples"
        for name, task in merging.record.get("scores", {"tasks": {}})["tasks"].items()
        if task["change_low"] is not None
    ]


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


def _scores_table(merging: Merging) -> Table:
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


def _merging_figure(merging: Merging) -> Figure:
    """Cosine and conflicts of the updates by block, a line for each role."""
    titles = {"cosine": "cosine of two updates", "conflicts": "share of entries that are in conflict"}
    return _by_block(_merging_lines(merging), titles)[0]


# --- repair -------------------------------------------------------------------------------------------------------

FRONTIER = (
    Column("way", title="how the finetune is brought nearer to its base", words=True),
    Column("amount", ".2f"),
    Column("blocks", words=True),
    Column("choice", "+.4f", "change of the task's metric on the half of the examples that chooses the point"),
    Column("task", ".4f", "the metric of the task, on the half of the examples that reports"),
    Column("change", "+.4f", "of the task's metric against the finetune, on the half that reports"),
    Column("recovered", ".4f", "the metric of what the base could do; of a loss its negative"),
    Column("back", "+.0%", "share of what was forgotten that came back; its interval is in the rows"),
    Column("*", title="the point that is written", words=True),
)
"""The table of a repair: every point that was tried, a star at the one that is written."""


def _repair_tables(repair: Repair) -> tuple[Table, ...]:
    """Every point, base and finetune first; a star at the one that is written."""
    rows = []
    for row in repair.rows:
        point, values = row.experiment, row.values
        star = "*" if point == repair.record["chosen"] else ""
        names = ("choice.change", "report.keep", "report.change", "report.recover", "report.back")
        rows.append((point["way"], point.get("amount"), point.get("blocks", ""), *map(values.get, names), star))
    return (Table(FRONTIER, tuple(rows)),)


def _frontier(repair: Repair) -> Figure | None:
    points = [row for row in repair.rows if "amount" in row.experiment]
    if not points:
        return None
    figure, axes = kit.panels(1, 1, (6, 3.6), "what came back, and what it costs the task", left=0.9, below=1.0)
    ax, marks = axes[0, 0], []
    ways = list(dict.fromkeys(row.experiment["way"] for row in points))
    for color, way in zip(kit.COLORS, ways, strict=False):
        own = [row.values for row in points if row.experiment["way"] == way]
        x, y = ([values[f"report.{name}"] for values in own] for name in ("back", "change"))
        spread = [
            [v[f"report.{name}{end}"] for v in own] for name in ("back", "change") for end in ("_low", "_high")
        ]
        bars = [np.abs(np.array([low, high]) - at) for at, low, high in ((x, *spread[:2]), (y, *spread[2:]))]
        marks.append(ax.errorbar(x, y, bars[1], bars[0], fmt="o", ms=4, lw=0.5, color=color))
    for values in (row.values for row in points if row.experiment == repair.record["chosen"]):
        at = (values["report.back"], values["report.change"])
        ax.annotate("chosen", at, (0, 30), textcoords="offset points", ha="center", size=8, color=kit.INK,
                    arrowprops={"arrowstyle": "-", "color": kit.INK, "lw": 0.7})  # fmt: skip
    kit.reference(ax, 0.0)
    kit.reference(ax, -repair.record["tolerance"])
    ax.set(xlabel="share of what was forgotten that came back", ylabel="change of the task's metric")
    kit.legend_below(figure, marks, ways, 4)
    return figure


VIEWS: dict[type[Treated], View] = {
    Extraction: View(
        "extract", _extraction_tables, attrgetter("matrices"), _extraction_sentences, _extraction_figure
    ),
    Forgetting: View("forgetting", lambda forgetting: (_metrics_table(forgetting.record["scores"]),)),
    Merging: View("merge", _merging_tables, _merging_lines, _merging_sentences, _merging_figure),
    Repair: View(
        "repair",
        _repair_tables,
        lambda repair: [{**row.experiment, **row.values} for row in repair.rows],
        figure=_frontier,
    ),
}
