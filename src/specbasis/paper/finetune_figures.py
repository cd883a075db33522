"""The figures of grids that finetune: differences between methods, and the panels of Fig. 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from specbasis.core.statistics import mean_and_spread
from specbasis.figures.figures import COLORS, QUIET
from specbasis.figures.tracking import write_figure
from specbasis.finetuning.tasks import GLUE
from specbasis.paper.differences import Difference
from specbasis.paper.fig5 import Panel, Point, metric_of
from specbasis.paper.table1 import Comparison, Line, ours
from specbasis.paper.table1_page import title_of


def write_differences(path: Path, what: Comparison, compared: Sequence[Line], base: str) -> list[Path]:
    """Draw every method's difference to the spectral one as PNG and SVG."""
    return write_figure(path, lambda: _differences(what, compared, base))


def write_panel(path: Path, what: Panel, points: Sequence[tuple[Point, Sequence[float]]], base: str) -> list[Path]:
    """Draw a panel of Fig. 5 as PNG and SVG."""
    return write_figure(path, lambda: _panel(what, points, base))


def _differences(what: Comparison, compared: Sequence[Line], base: str) -> Figure:
    """Score of every method − the spectral method's, in points: mean, its interval over the dev set, and seeds."""
    tasks = [task for task in what.tasks if any(line.task == task for line in compared)]
    methods = [method for method in what.methods if any(line.method == method for line in compared)]
    references = ours(what.methods)
    place = {method: -i for i, method in enumerate(methods)}
    size = (2.4 + 2.6 * len(tasks), 1.5 + 0.34 * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for ax, task in zip(panels, tasks, strict=True):
        ax.axvline(0, color=QUIET, linewidth=1)
        for line in compared:
            for i, name in enumerate(references):
                if line.task == task and name in line.differences:
                    _draw(ax, line.differences[name], place[line.method] - 0.4 * i, COLORS[i])
        ax.set_title(GLUE[task].title)
        ax.set_xlabel("score − spectral adapter's (points)")
        ax.grid(visible=False, axis="y")
    sizes = {line.method: line.values.get("adapter") for line in compared}
    panels[0].set_yticks(
        [y - 0.2 * (len(references) - 1) for y in place.values()],
        [f"{title_of(m)} · {_count(sizes[m])}" for m in methods],
    )
    figure.suptitle(f"{what.name}: {base}", fontsize=9)
    bars = [Line2D([], [], color=COLORS[i], marker="o", markersize=4) for i in range(len(references))]
    labels = [f"− {title_of(name)}: mean of the seeds, 95 % interval over the dev set" for name in references]
    dot = Line2D([], [], color=QUIET, marker=".", linestyle="none")
    figure.legend([*bars, dot], [*labels, "one seed"], loc="outside lower center", fontsize=8)
    return figure


def _draw(ax: Any, found: Difference, y: float, color: str) -> None:
    if found.interval is not None:
        ax.plot([100 * end for end in found.interval], [y, y], color=color, linewidth=1.5)
    ax.plot(100 * found.mean, y, "o", color=color, markersize=4)
    seeds = [100 * one for one in found.each]
    ax.plot(seeds, [y - 0.16] * len(seeds), ".", color=QUIET, markersize=3)


def _count(parameters: float | None) -> str:
    if parameters is None:
        return "–"
    if parameters < 1e3:
        return f"{parameters:.0f}"
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}k"


def _panel(what: Panel, points: Sequence[tuple[Point, Sequence[float]]], base: str) -> Figure:
    figure = Figure(figsize=(5.0, 3.3), layout="constrained")
    axes = figure.subplots()
    x = [point.x for point, _ in points]
    found = [  # nothing where nothing ran: the line has a gap there
        mean_and_spread([100 * score for score in scores]) if scores else (math.nan, None) for _, scores in points
    ]
    spread = [deviation or 0.0 for _, deviation in found]
    axes.errorbar(x, [mean for mean, _ in found], yerr=spread, marker="o", capsize=3, color=COLORS[0])
    for point, scores in points:
        axes.plot([point.x] * len(scores), [100 * s for s in scores], ".", color=QUIET, markersize=4)
    axes.set_xticks([point.x for point in what.points], [point.label for point in what.points])
    margin = 0.05 * (what.points[-1].x - what.points[0].x) or 1.0
    axes.set_xlim(what.points[0].x - margin, what.points[-1].x + margin)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(what.axis)
    axes.set_ylabel(f"{metric_of(what)} (%)" if len(metric_of(what)) < 30 else "mean correlation (%)")
    counts = sorted({len(scores) for _, scores in points if scores})
    shown = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    seeds = f"{shown} seed" + ("" if counts[-1] == 1 else "s")
    title = f"{what.name}: {GLUE[what.task].title}, {base}\nbars: standard deviation, {seeds}"
    axes.set_title(title, fontsize=8, fontweight="normal")
    return figure
