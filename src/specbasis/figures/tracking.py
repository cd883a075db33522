"""Figures of a training that was tracked, drawn from rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from specbasis.checkpoint.atomic import write_whole
from specbasis.core.subspace import chance_alignment
from specbasis.figures.figures import COLORS, QUIET, render
from specbasis.tracking.track import Tracking

Array = NDArray[np.float64]


def write_figure(path: Path, make: Callable[[], Figure]) -> list[Path]:
    """Write a figure as PNG and SVG, beside each other under one name."""
    written = []
    for name, content in render(path.stem, make):
        target = path.with_name(name)
        write_whole(target, lambda temporary, content=content: temporary.write_bytes(content))
        written.append(target)
    return written


def heat_map(figure: Figure, ax: Axes, table: Array, steps: list[int], title: str) -> None:
    """Alignment between all pairs of checkpoints, from 0 (white) to 1. Source: Yu et al. 2026, Fig. 4A."""
    n = len(steps)
    image = ax.imshow(table, origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    ticks = np.unique(np.linspace(0, n - 1, min(n, 6)).round().astype(int))
    names = [f"{steps[i]:,}".replace(",", " ") for i in ticks]
    ax.set_xticks(ticks, names, rotation=45)
    ax.set_yticks(ticks, names)
    ax.set(title=title, xlabel="step", ylabel="step")
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, shrink=0.8, label="alignment")


def write_track_figure(tracking: Tracking, path: str | Path | None = None) -> list[Path]:
    """Heat map between checkpoints; alignment to the first, the last and the one before; sizes of the updates.

    Lines are medians over the matrices and leading ranks, bands their quartiles. Written as PNG and SVG (extra
    ``report``); as `track.png` and `track.svg` in the folder of the rows when ``path`` is None.
    """
    return write_figure(Path(path) if path else tracking.folder / "track.png", lambda: _track_figure(tracking))


def _track_figure(tracking: Tracking) -> Figure:
    about = tracking.manifest
    labels = [one["label"] for one in about["checkpoints"]]
    steps, top = tracking.steps, about["config"]["top"]
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    figure.suptitle(f"{len(labels)} checkpoints, {len(about['pairs']['checkpoints']['matrices'])} matrices")
    axes = figure.subplots(1, 3)
    heat_map(figure, axes[0], _table(tracking.rows, labels), steps, f"mean of the leading {top} ranks")
    references = (("first", COLORS[0]), ("last", COLORS[1]), ("previous", COLORS[2]))
    for name, color in references:
        aligned = pc.match_substring_regex(tracking.rows["measure"].cast(pa.string()), f"^alignment_.*_{name}$")
        rows = tracking.rows.filter(pc.and_(aligned, pc.less(tracking.rows["index"], top)))
        _band(axes[1], rows, labels, steps, color, f"with the {name}")
        sizes = tracking.rows.filter(
            pc.equal(tracking.rows["measure"].cast(pa.string()), f"relative_update_{name}")
        )
        _band(axes[2], sizes, labels, steps, color, f"from or to the {name}")
    for d in sorted({*_unique(tracking.rows["out_features"]), *_unique(tracking.rows["in_features"])}):
        axes[1].axhline(chance_alignment(d), color=QUIET, lw=0.8, ls=(0, (4, 3)), zorder=1)
    axes[1].set(title=f"alignment of the leading {top} ranks (dashed: chance)", xlabel="step", ylim=(-0.02, 1.03))
    axes[2].set(title="size of the update ‖delta‖/‖W‖", xlabel="step")
    axes[2].set_ylim(bottom=0)
    for ax in axes[1:]:
        ax.legend(fontsize=8)
    return figure


def _table(rows: pa.Table, labels: list[str]) -> Array:
    """Mean alignment of every pair of checkpoints, over the matrices; NaN where no matrix is in both."""
    n = len(labels)
    some = rows.filter(pc.equal(rows["measure"].cast(pa.string()), "mean_alignment"))
    a = np.array([labels.index(label) for label in some["pair"].to_pylist()], dtype=int)
    b, value = some["index"].to_numpy().astype(int), some["value"].to_numpy()
    total, count = np.zeros((n, n)), np.zeros((n, n))
    np.add.at(total, (a, b), value)
    np.add.at(count, (a, b), 1)
    with np.errstate(invalid="ignore"):
        table = total / count
    np.fill_diagonal(table, 1.0)
    return table


def _band(ax: Axes, rows: pa.Table, labels: list[str], steps: list[int], color: str, title: str) -> None:
    """Median and quartiles at each checkpoint."""
    pairs, values = np.array(rows["pair"].to_pylist(), dtype=object), rows["value"].to_numpy()
    found: list[tuple[int, Any]] = []
    for label, step in zip(labels, steps, strict=True):
        mine = values[pairs == label]
        if len(mine):
            found.append((step, np.quantile(mine, [0.25, 0.5, 0.75])))
    if not found:
        return
    x, quartiles = np.array([step for step, _ in found]), np.array([q for _, q in found])
    ax.fill_between(x, quartiles[:, 0], quartiles[:, 2], color=color, alpha=0.15, lw=0)
    ax.plot(x, quartiles[:, 1], color=color, label=title, marker="o", ms=2.5, lw=1.4)


def _unique(column: pa.ChunkedArray) -> list[int]:
    values: list[int] = column.unique().to_pylist()
    return values
