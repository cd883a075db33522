"""The figures of a grid of interventions, from its rows alone, and of sharing across tasks."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specbasis.core.errors import InputError
from specbasis.figures.figures import COLORS, DASHES, QUIET, grid_of_panels, render
from specbasis.interventions.sharing import Shared
from specbasis.interventions.stage import BASE, BASELINE
from specbasis.jobs.experiments import Row

NAMES: Mapping[str, str] = {
    "swap": "vectors of {source}",
    "random": "random vectors",
    "random_complement": "random in the complement",
    "zero": "zero",
    "noise": "noise as large as the swap",
    "values": "values of {source}",
    "keep": "all others zero",
    "rescale": "rescaled",
}
"""Kind → how a legend calls it."""

ALL = "all"


@dataclass(frozen=True)
class Line:
    """One curve: a metric, or its change, against the number of ranks.

    Attributes:
        name: for the legend.
        x: sets of ranks, as the grid has them.
        y: mean over seeds.
        low: the lowest lower end of the intervals over examples, over seeds.
        high: the highest upper end.
    """

    name: str
    x: tuple[int | str, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Plot:
    """What a figure of the paper shows: which lines, of which matrices, and whether the metric or its change."""

    title: str
    wanted: Callable[[Mapping[str, Any]], bool]
    group: int | None
    change: bool = False


def _controls(cell: Mapping[str, Any]) -> bool:
    return cell["kind"] in ("random", "random_complement", "zero", "noise") and not _is_bottom(cell)


def _from_base(cell: Mapping[str, Any]) -> bool:
    return (cell["kind"] == "swap" and cell["source"] == BASE) or _controls(cell)


def _from_others(cell: Mapping[str, Any]) -> bool:
    return (cell["kind"] == "swap" and cell["source"] != BASE) or (
        cell["kind"] in ("random", "zero") and not _is_bottom(cell)
    )


def _masking(cell: Mapping[str, Any]) -> bool:
    return bool(cell["kind"] == "zero")


def _is_bottom(cell: Mapping[str, Any]) -> bool:
    return str(cell["ranks"]).startswith("-")


PLOTS: Mapping[str, Plot] = {
    "fig2d": Plot("Pretrained singular vectors in finetuned models", _from_base, 0),
    "fig2e": Plot("Change of the metric by singular vectors of other tasks", _from_others, 0, change=True),
    "fig12": Plot("Pretrained singular vectors in finetuned models", _from_base, 0),
    "fig13": Plot("Singular vectors of other tasks", _from_others, 0),
    "fig14": Plot("Pretrained singular vectors in finetuned models", _from_base, 1),
    "fig15": Plot("Singular vectors of other tasks", _from_others, 1),
    "fig17": Plot("Masking from the leading ranks down, and from the trailing ranks up", _masking, None),
}
"""The figures of Yu et al. 2026 by number; `group` is the place of the group of matrices in the grid's order."""


def draw(
    name: str, rows: Sequence[Row], metrics: Mapping[str, str], only: Sequence[str] = ()
) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of one figure as PNG and SVG: a panel for each model, and for fig17 each group.

    Args:
        name: a key of `PLOTS`.
        rows: of a grid of interventions.
        metrics: label → the metric that is shown.
        only: labels of the models to show; all when empty.

    Raises:
        InputError: no such figure or model, or the rows hold nothing to show in it.
    """
    if name not in PLOTS:
        raise InputError(f"no figure {name!r}; there is: {', '.join(PLOTS)}")
    plot = PLOTS[name]
    labels = [label for label in metrics if not only or label in only]
    unknown = [label for label in only if label not in metrics]
    if unknown:
        raise InputError(f"no model {unknown[0]!r} in these rows; there is: {', '.join(metrics)}")
    groups = list(dict.fromkeys(row.experiment["roles"] for row in rows if "roles" in row.experiment))
    if plot.group is not None and plot.group >= len(groups):
        raise InputError(f"{name} shows the second group of matrices; the grid has {', '.join(groups) or 'none'}")
    shown = groups if plot.group is None else [groups[plot.group]]
    panels = {
        (group, label): lines(rows, label, group, metrics[label], plot) for group in shown for label in labels
    }
    controls = {kind for kind in NAMES.values() if "{" not in kind}
    if all(line.name in controls for each in panels.values() for line in each):
        raise InputError(f"{name}: the rows hold nothing to show; run the kinds and ranks that it needs")
    yield from render(name, lambda: _figure(f"{plot.title} ({', '.join(shown)})", panels, rows, metrics, plot))


def lines(rows: Sequence[Row], label: str, group: str, metric: str, plot: Plot) -> list[Line]:
    """The curves of one panel; cells that failed leave a gap."""
    points: dict[str, dict[int | str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cell = row.experiment
        if row.error or cell["kind"] == BASELINE or cell["tuned"] != label or cell["roles"] != group:
            continue
        if plot.wanted(cell) and metric in row.values:
            points[_name(cell, plot)][_size(cell["ranks"])].append(row.values)
    suffix = ".change" if plot.change else ""
    ends = (".change_low", ".change_high") if plot.change else (".low", ".high")
    found = []
    for name, by_size in points.items():
        x = sorted(by_size, key=_order)
        y = [float(np.mean([v[metric + suffix] for v in by_size[size]])) for size in x]
        low, high = (
            [float(pick([v.get(metric + end, v[metric + suffix]) for v in by_size[size]])) for size in x]
            for pick, end in zip((min, max), ends, strict=True)
        )
        found.append(Line(name, tuple(x), tuple(y), tuple(low), tuple(high)))
    return sorted(found, key=lambda line: (line.name in NAMES.values(), line.name))


def _name(cell: Mapping[str, Any], plot: Plot) -> str:
    if plot.wanted is _masking:
        return "trailing ranks masked" if _is_bottom(cell) else "leading ranks masked"
    return NAMES.get(str(cell["kind"]), str(cell["kind"])).format(source=cell["source"])


def _size(ranks: int | str) -> int | str:
    text = str(ranks).removeprefix("-")
    return int(text) if text.isdecimal() else text


def _order(size: int | str) -> tuple[int, int]:
    return (0, size) if isinstance(size, int) else (1, len(size))


def _figure(
    title: str,
    panels: Mapping[tuple[str, str], list[Line]],
    rows: Sequence[Row],
    metrics: Mapping[str, str],
    plot: Plot,
) -> Figure:
    groups, labels = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    figure, axes = grid_of_panels(len(groups), len(labels), (3.1, 2.5), title, between=0.75, below=0.95)
    names = list(dict.fromkeys(line.name for each in panels.values() for line in each))
    handles: dict[str, Any] = {}
    for (group, label), each in panels.items():
        ax = axes[groups.index(group)][labels.index(label)]
        ticks = sorted({size for line in each for size in line.x}, key=_order)
        at = {size: i for i, size in enumerate(ticks)}
        before = next(
            (r.values for r in rows if r.experiment == {"tuned": label, "kind": BASELINE} and not r.error), {}
        )
        metric = metrics[label]
        if plot.change:
            handles["unedited"] = ax.axhline(0, color=QUIET, lw=1.1)
        elif metric in before:
            handles["unedited"] = ax.axhline(before[metric], color=QUIET, lw=1.1)
            if f"{metric}.low" in before:
                ax.axhspan(before[f"{metric}.low"], before[f"{metric}.high"], color=QUIET, alpha=0.12, lw=0)
        for line in each:
            i = names.index(line.name)
            x = np.array([at[size] for size in line.x]) + 0.07 * (i - (len(names) - 1) / 2)
            y = np.array(line.y)
            spread = np.maximum([y - line.low, np.array(line.high) - y], 0)
            style: dict[str, Any] = {
                "color": COLORS[i % 8],
                "ls": DASHES[i // 2 % 4],
                "lw": 1.5,
                "marker": "o",
                "ms": 3,
            }
            handles[line.name] = ax.errorbar(x, y, spread, elinewidth=0.8, capsize=1.5, **style)
        ax.set_xticks(range(len(ticks)), [str(size) for size in ticks])
        ax.set_title(f"{label}, {group}" if len(groups) > 1 else label)
        if group == groups[-1]:
            ax.set_xlabel("number of ranks")
        ax.set_ylabel(f"change of {metric}" if plot.change else metric)
    figure.legend(handles.values(), handles, loc="lower left", ncols=max(2, 2 * len(labels)), fontsize=8)
    return figure


# --- sharing ------------------------------------------------------------------------------------------------------


def draw_sharing(table: Sequence[Shared], roles: str, ranks: int | str) -> Iterator[tuple[str, bytes]]:
    """Matrices of what swaps do and of overlap at one set of ranks, and overlap against the sharing index at all.

    Raises:
        InputError: nothing in the table at these ranks.
    """
    here = [row for row in table if row.roles == roles and row.ranks == ranks]
    if not here:
        there = ", ".join(dict.fromkeys(f"{row.roles} {row.ranks}" for row in table))
        raise InputError(f"no swap of {roles} at ranks {ranks}; there is: {there}")
    yield from render("sharing", lambda: _sharing(table, here, roles, ranks))


def _sharing(table: Sequence[Shared], here: Sequence[Shared], roles: str, ranks: int | str) -> Figure:
    title = f"Sharing across tasks: {roles}, {ranks} ranks"
    figure, axes = grid_of_panels(1, 3, (2.9, 2.5), title, between=0.95, below=0.75, left=1.0)
    tuned = list(dict.fromkeys(row.tuned for row in here))
    sources = sorted(dict.fromkeys(row.source for row in here), key=lambda name: (name != BASE, name))
    columns: tuple[tuple[str, Callable[[Shared], float | None], str], ...] = (
        ("change of the metric", lambda row: row.change, "RdBu"),
        ("overlap of subspaces (chance)", lambda row: row.overlap, "Blues"),
    )
    for ax, (name, of, colors) in zip(axes[0], columns, strict=False):
        values = np.full((len(tuned), len(sources)), np.nan)
        for row in here:
            value = of(row)
            values[tuned.index(row.tuned), sources.index(row.source)] = np.nan if value is None else value
        most = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
        ax.imshow(
            values, cmap=colors, vmin=-max(most, 1e-9) if colors == "RdBu" else 0, vmax=max(most, 1e-9), alpha=0.3
        )
        for row in here:
            value = of(row)
            text = (
                "–"
                if value is None
                else f"{value:+.3f}"
                if colors == "RdBu"
                else f"{value:.3f}\n({row.chance:.3f})"
            )
            ax.text(sources.index(row.source), tuned.index(row.tuned), text, ha="center", va="center", size=8)
        ax.set_xticks(range(len(sources)), sources)
        ax.set_yticks(range(len(tuned)), tuned)
        ax.set(title=name, xlabel="vectors from", ylabel="model judged")
        ax.grid(visible=False)
    ax = axes[0][2]
    for i, group in enumerate(dict.fromkeys(row.roles for row in table)):
        each = [row for row in table if row.roles == group and row.overlap is not None and row.index is not None]
        x, y = [row.overlap for row in each], np.array([row.index for row in each], dtype=float)
        ends = np.array([[row.low, row.high] for row in each], dtype=float).reshape(-1, 2)
        spread = np.maximum(np.stack([y - ends[:, 0], ends[:, 1] - y]), 0)
        ax.errorbar(x, y, spread, fmt="os^v"[i % 4], ms=3.5, lw=0, elinewidth=0.7, color=COLORS[i % 8], label=group)
    ax.axhline(1, color=QUIET, lw=0.8, ls=(0, (4, 3)))
    ax.axhline(0, color=QUIET, lw=0.8)
    ax.set(title="every swap", xlabel="overlap of subspaces", ylabel="sharing index")
    figure.legend(*ax.get_legend_handles_labels(), loc="lower right", ncols=4, fontsize=7.5)
    return figure


def sharing_csv(table: Sequence[Shared]) -> str:
    """The table as CSV, one swap a line."""
    buffer = io.StringIO()
    names = [item.name for item in fields(Shared)]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for row in table:
        values = [getattr(row, name) for name in names]
        writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
    return buffer.getvalue()
