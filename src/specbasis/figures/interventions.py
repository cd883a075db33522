"""Figures of a grid of interventions, and of sharing across tasks, from rows alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specbasis.checkpoint.atomic import write_whole
from specbasis.checkpoint.regular import read_json
from specbasis.core.errors import InputError, want
from specbasis.figures import kit
from specbasis.figures.kit import Axes, Figure
from specbasis.figures.table import Table, number
from specbasis.finetuning.metrics import METRICS
from specbasis.interventions.grid import read_grid
from specbasis.interventions.sharing import Shared, overlaps, sharing
from specbasis.interventions.stage import BASE, BASELINE
from specbasis.jobs.cache import factors_in
from specbasis.jobs.experiments import Row

OVERLAPS = "overlaps.json"
"""Overlap of every two models' leading subspaces: the one thing that rows do not hold."""

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

TITLES: Mapping[str, str] = {
    "exact": "share of sequences all right",
    "perplexity": "perplexity",
    "loss": "loss (nats)",
    **{name: metric.title for name, metric in METRICS.items()},
}
"""Metric → how an axis calls it."""


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
    """What a figure of the paper shows.

    Attributes:
        title: of the figure.
        shows: whether a cell of the grid belongs to it.
        group: place of its group of matrices in the grid's order; all groups when None.
        change: whether it shows the change of the metric instead of the metric.
    """

    title: str
    shows: Callable[[Mapping[str, Any]], bool]
    group: int | None
    change: bool = False


def _trailing(cell: Mapping[str, Any]) -> bool:
    return str(cell["ranks"]).startswith("-")


def _from_base(cell: Mapping[str, Any]) -> bool:
    control = cell["kind"] in ("random", "random_complement", "zero", "noise") and not _trailing(cell)
    return control or (cell["kind"] == "swap" and cell["source"] == BASE)


def _from_others(cell: Mapping[str, Any]) -> bool:
    control = cell["kind"] in ("random", "zero") and not _trailing(cell)
    return control or (cell["kind"] == "swap" and cell["source"] != BASE)


def _masking(cell: Mapping[str, Any]) -> bool:
    return bool(cell["kind"] == "zero")


PLOTS: Mapping[str, Plot] = {
    "fig2d": Plot("Pretrained singular vectors in finetuned models", _from_base, 0),
    "fig2e": Plot("Change of the metric by singular vectors of other tasks", _from_others, 0, change=True),
    "fig12": Plot("Pretrained singular vectors in finetuned models", _from_base, 0),
    "fig13": Plot("Singular vectors of other tasks", _from_others, 0),
    "fig14": Plot("Pretrained singular vectors in finetuned models", _from_base, 1),
    "fig15": Plot("Singular vectors of other tasks", _from_others, 1),
    "fig17": Plot("Masking from the leading ranks down, and from the trailing ranks up", _masking, None),
}
"""The figures of Yu et al. 2026 by number."""


def write_figures(
    folder: str | Path,
    names: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    out: str | Path | None = None,
    models: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
) -> list[Path]:
    """Draw figures of a grid from its rows, as PNG and SVG.

    Args:
        folder: of the grid.
        names: keys of `PLOTS`, or ``sharing``; all that the rows allow when empty.
        only: labels of the models to show.
        out: where to write; ``figures`` in the folder when None. Tables go beside the rows.
        models: label → checkpoint, ``base`` among them: overlaps of subspaces are then measured and kept in the
            folder, where a later call finds them.
        cache: folder of decompositions, for that.

    Raises:
        InputError: no grid there, a library of the extra ``report`` is missing, or a named figure has nothing to
            show.
    """
    folder = Path(folder)
    target = folder / "figures" if out is None else Path(out)
    rows, metrics = read_grid(folder)
    contents: dict[Path, str | bytes] = {}
    for name in names or (*PLOTS, "sharing"):
        try:
            if name == "sharing":
                shared = _shared(folder, rows, metrics, models, cache)
                contents[folder / "sharing.csv"] = Table.of([asdict(swap) for swap in shared]).csv(".6g")
                pictures = kit.render(name, lambda shared=shared: sharing_figure(shared))
            else:
                pictures = draw(name, rows, metrics, only)
            contents |= {target / file: content for file, content in pictures}
        except InputError:
            if names:
                raise  # not every grid holds what every figure shows, but a named one was asked for
    for path, content in contents.items():
        write_whole(path, content)
    return list(contents)


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
    want("figure", PLOTS, name)
    want("model", metrics, *only)
    plot = PLOTS[name]
    labels = [label for label in metrics if not only or label in only]
    groups = list(dict.fromkeys(row.experiment["roles"] for row in rows if "roles" in row.experiment))
    if plot.group is not None and plot.group >= len(groups):
        raise InputError(f"{name} shows the second group of matrices; the grid has {', '.join(groups) or 'none'}")
    shown = groups if plot.group is None else [groups[plot.group]]
    curves = {
        (group, label): lines(rows, label, group, metrics[label], plot) for group in shown for label in labels
    }
    controls = {kind for kind in NAMES.values() if "{" not in kind}
    if all(line.name in controls for panel in curves.values() for line in panel):
        raise InputError(f"{name}: the rows hold nothing to show; run the kinds and ranks that it needs")
    yield from kit.render(name, lambda: _figure(f"{plot.title} ({', '.join(shown)})", curves, rows, metrics, plot))


def lines(rows: Sequence[Row], label: str, group: str, metric: str, plot: Plot) -> list[Line]:
    """The curves of one panel; cells that failed leave a gap."""
    points: dict[str, dict[int | str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cell = row.experiment
        if row.error or cell["kind"] == BASELINE or cell["tuned"] != label or cell["roles"] != group:
            continue
        if plot.shows(cell) and metric in row.values:
            ranks = str(cell["ranks"]).removeprefix("-")
            points[_name(cell, plot)][int(ranks) if ranks.isdecimal() else ranks].append(row.values)
    shown = f"{metric}.change" if plot.change else metric
    ends = ("_low", "_high") if plot.change else (".low", ".high")
    curves = []
    for name, by_size in points.items():
        x = sorted(by_size, key=_order)
        y = [float(np.mean([values[shown] for values in by_size[size]])) for size in x]
        low, high = (
            [float(pick([v.get(shown + end, v[shown]) for v in by_size[size]])) for size in x]
            for pick, end in zip((min, max), ends, strict=True)
        )
        curves.append(Line(name, tuple(x), tuple(y), tuple(low), tuple(high)))
    return sorted(curves, key=lambda line: (line.name in NAMES.values(), line.name))


def _name(cell: Mapping[str, Any], plot: Plot) -> str:
    if plot.shows is _masking:
        return "trailing ranks masked" if _trailing(cell) else "leading ranks masked"
    return NAMES.get(str(cell["kind"]), str(cell["kind"])).format(source=cell["source"])


def _order(size: int | str) -> tuple[int, int]:
    return (0, size) if isinstance(size, int) else (1, len(size))


def _figure(
    title: str,
    curves: Mapping[tuple[str, str], list[Line]],
    rows: Sequence[Row],
    metrics: Mapping[str, str],
    plot: Plot,
) -> Figure:
    groups, labels = (list(dict.fromkeys(names)) for names in zip(*curves, strict=True))
    figure, axes = kit.panels(len(groups), len(labels), (3.1, 2.5), title, between=0.75, below=0.95)
    names = list(dict.fromkeys(line.name for panel in curves.values() for line in panel))
    handles: dict[str, Any] = {}
    for (group, label), panel in curves.items():
        ax, metric = axes[groups.index(group)][labels.index(label)], metrics[label]
        unedited = next(
            (r.values for r in rows if r.experiment == {"tuned": label, "kind": BASELINE} and not r.error), {}
        )
        if plot.change:
            handles["unedited"] = ax.axhline(0, color=kit.QUIET, lw=1.1)
        elif metric in unedited:
            handles["unedited"] = ax.axhline(unedited[metric], color=kit.QUIET, lw=1.1)
            if f"{metric}.low" in unedited:
                ax.axhspan(unedited[f"{metric}.low"], unedited[f"{metric}.high"], color=kit.QUIET, alpha=0.12, lw=0)
        handles |= _draw_lines(ax, panel, names)
        ax.set_title(f"{label}, {group}" if len(groups) > 1 else label)
        if group == groups[-1]:
            ax.set_xlabel("number of ranks")
        shown = TITLES.get(metric, metric)
        ax.set_ylabel(f"change of {shown}" if plot.change else shown)
    figure.legend(handles.values(), handles, loc="lower left", ncols=max(2, 2 * len(labels)), fontsize=8)
    return figure


def _draw_lines(ax: Axes, curves: Sequence[Line], names: Sequence[str]) -> dict[str, Any]:
    """The curves of a panel, each a little beside the others, over sets of ranks; returns their handles."""
    ticks = sorted({size for line in curves for size in line.x}, key=_order)
    handles = {}
    for line in curves:
        i, y = names.index(line.name), np.array(line.y)
        x = np.array([ticks.index(size) for size in line.x]) + 0.07 * (i - (len(names) - 1) / 2)
        look = {"color": kit.COLORS[i % 8], "ls": kit.DASHES[i // 2 % 4], "lw": 1.5, "marker": "o", "ms": 3}
        handles[line.name] = ax.errorbar(x, y, _spread(y, line.low, line.high), elinewidth=0.8, capsize=1.5, **look)
    ax.set_xticks(range(len(ticks)), [str(size) for size in ticks])
    return handles


def _spread(y: Any, low: Any, high: Any) -> Any:
    """Lengths of the bars below and above, as matplotlib wants them."""
    return np.maximum([y - np.asarray(low), np.asarray(high) - y], 0)


def sharing_figure(table: Sequence[Shared]) -> Figure:
    """What swaps do and how subspaces overlap at one set of ranks, and overlap against the sharing index at all.

    Shown are the first group of matrices, at 30 ranks where the table has them and else at the middle of its sizes.
    """
    sizes = list(dict.fromkeys(row.ranks for row in table))
    roles, ranks = table[0].roles, 30 if 30 in sizes else sizes[len(sizes) // 2]
    title = f"Sharing across tasks: {roles}, {ranks} ranks"
    figure, axes = kit.panels(1, 3, (2.9, 2.5), title, between=0.95, below=0.75, left=1.0)
    shown = [row for row in table if row.roles == roles and row.ranks == ranks]
    change, overlap, scatter = axes[0]
    _matrix(change, "change of the metric", shown, [row.change for row in shown], "RdBu")
    _matrix(overlap, "overlap of subspaces (chance)", shown, [row.overlap for row in shown], "Blues")
    for i, group in enumerate(dict.fromkeys(row.roles for row in table)):
        swaps = [row for row in table if row.roles == group and row.overlap is not None and row.index is not None]
        y, low, high = (np.array([getattr(row, name) for row in swaps], float) for name in ("index", "low", "high"))
        look = {"fmt": "os^v"[i % 4], "ms": 3.5, "lw": 0, "elinewidth": 0.7, "color": kit.COLORS[i % 8]}
        scatter.errorbar([row.overlap for row in swaps], y, _spread(y, low, high), label=group, **look)
    scatter.axhline(1, color=kit.QUIET, lw=0.8, ls=kit.REFERENCE)
    scatter.axhline(0, color=kit.QUIET, lw=0.8)
    scatter.set(title="every swap", xlabel="overlap of subspaces", ylabel="sharing index")
    figure.legend(*scatter.get_legend_handles_labels(), loc="lower right", ncols=4, fontsize=7.5)
    return figure


def _matrix(ax: Axes, title: str, rows: Sequence[Shared], values: Sequence[float | None], colors: str) -> None:
    """A value of every swap as number and colour: models judged down, sources of vectors across."""
    tuned = list(dict.fromkeys(row.tuned for row in rows))
    sources = sorted(dict.fromkeys(row.source for row in rows), key=lambda name: (name != BASE, name))
    grid = np.full((len(tuned), len(sources)), np.nan)
    texts = [[""] * len(sources) for _ in tuned]
    signed = colors == "RdBu"
    for row, value in zip(rows, values, strict=True):
        y, x = tuned.index(row.tuned), sources.index(row.source)
        grid[y, x] = np.nan if value is None else value
        texts[y][x] = number(value, "+.3f" if signed else ".3f")
        texts[y][x] += "" if signed or value is None else f"\n({row.chance:.3f})"
    most = max(float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 1.0, 1e-9)
    look = {"cmap": colors, "vmin": -most if signed else 0, "vmax": most, "alpha": 0.3, "aspect": "equal"}
    kit.numbers(ax, grid, texts, tuned, sources, **look)
    ax.set(title=title, xlabel="vectors from", ylabel="model judged")


def _shared(
    folder: Path,
    rows: Sequence[Row],
    metrics: Mapping[str, str],
    models: Mapping[str, str] | None,
    cache: str | Path | None,
) -> list[Shared]:
    """The table of sharing, with overlaps that are measured where the models are given, and else read."""
    path = folder / OVERLAPS
    if models is not None:
        swaps = [row.experiment for row in rows if row.experiment["kind"] == "swap"]
        groups, sizes = (list(dict.fromkeys(cell[name] for cell in swaps)) for name in ("roles", "ranks"))
        factors = factors_in(cache)
        measured = overlaps(models, groups, sizes, factors=lambda W, name: factors.decompose(W, name=name))
        entries = [[*key, *value] for key, value in measured.items()]
        write_whole(path, json.dumps(entries, indent=0, ensure_ascii=False) + "\n")
    kept = {}
    if path.exists():
        try:
            kept = {(a, b, c, d): (x, y) for a, b, c, d, x, y in read_json(path)}
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: is damaged ({error}); delete it and run the grid again") from error
    return sharing(rows, metrics, overlaps=kept)
