"""The figure of a training that was tracked, drawn from rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from specbasis.core.subspace import chance_alignment
from specbasis.core.text import number_of
from specbasis.figures import kit
from specbasis.figures.kit import Axes, Figure, Floats
from specbasis.tracking.track import Tracking


def write_track_figure(tracking: Tracking, path: str | Path | None = None) -> list[Path]:
    """Heat map between checkpoints; alignment to the first, the last and the one before; sizes of the updates.

    Lines are medians over the matrices and leading ranks, bands their quartiles. Written as PNG and SVG (extra
    ``report``); as `track.png` and `track.svg` in the folder of the rows when ``path`` is None.
    """
    return kit.write_figure(Path(path) if path else tracking.folder / "track.png", lambda: _track_figure(tracking))


def between_checkpoints(figure: Figure, ax: Axes, table: Floats, steps: Sequence[int], title: str) -> None:
    """Alignment between all pairs of checkpoints, from 0 (dark) to 1. Source: Yu et al. 2026, Fig. 4A."""
    image = kit.heat(ax, table, cmap="viridis", origin="lower", aspect="equal")
    ticks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 6)).round().astype(int))
    names = [kit.counted(steps[i]) for i in ticks]
    ax.set_xticks(ticks, names, rotation=45)
    ax.set_yticks(ticks, names)
    ax.set(title=title, xlabel="step", ylabel="step")
    figure.colorbar(image, ax=ax, shrink=0.8, label="alignment")


def _track_figure(tracking: Tracking) -> Figure:
    about, rows = tracking.manifest, tracking.rows
    labels = [checkpoint["label"] for checkpoint in about["checkpoints"]]
    steps, top = tracking.steps, about["config"]["top"]
    matrices = len(about["pairs"]["checkpoints"]["matrices"])
    figure, axes = kit.free_panels(
        1, 3, (4, 3.4), f"{number_of(len(labels), 'checkpoint')}, {number_of(matrices, 'matrix')}"
    )
    heat_map, alignment, size = axes[0]
    between_checkpoints(figure, heat_map, _mean_alignment(rows, labels), steps, f"mean of the leading {top} ranks")
    measures = rows["measure"].cast(pa.string())
    for name, color in zip(("first", "last", "previous"), kit.COLORS, strict=False):
        aligned = pc.and_(pc.match_substring_regex(measures, f"^alignment_.*_{name}$"), pc.less(rows["index"], top))
        _quartiles(alignment, rows.filter(aligned), labels, steps, color, f"with the {name}")
        updates = rows.filter(pc.equal(measures, f"relative_update_{name}"))
        _quartiles(size, updates, labels, steps, color, f"from or to the {name}")
    for d in sorted({*rows["out_features"].unique().to_pylist(), *rows["in_features"].unique().to_pylist()}):
        kit.reference(alignment, chance_alignment(d))
    alignment.set(title=f"alignment, leading {top} ranks (dashed: chance)", xlabel="step", ylim=(-0.02, 1.03))
    size.set(title="size of the update ‖delta‖/‖W‖", xlabel="step")
    size.set_ylim(bottom=0)
    for ax in (alignment, size):
        ax.legend(fontsize=8)
    return figure


def _mean_alignment(rows: pa.Table, labels: list[str]) -> Floats:
    """Mean alignment of every pair of checkpoints, over the matrices; NaN where no matrix is in both."""
    n = len(labels)
    means = rows.filter(pc.equal(rows["measure"].cast(pa.string()), "mean_alignment"))
    first = np.array([labels.index(label) for label in means["pair"].to_pylist()], dtype=int)
    second, value = means["index"].to_numpy().astype(int), means["value"].to_numpy()
    total, count = np.zeros((n, n)), np.zeros((n, n))
    np.add.at(total, (first, second), value)
    np.add.at(count, (first, second), 1)
    with np.errstate(invalid="ignore"):
        table = total / count
    np.fill_diagonal(table, 1.0)
    return table


def _quartiles(ax: Axes, rows: pa.Table, labels: list[str], steps: list[int], color: str, title: str) -> None:
    """Median and quartiles of the rows of each checkpoint."""
    pairs, values = np.array(rows["pair"].to_pylist(), dtype=object), rows["value"].to_numpy()
    points: list[tuple[Any, ...]] = []
    for label, step in zip(labels, steps, strict=True):
        here = values[pairs == label]
        if len(here):
            points.append((step, *np.quantile(here, [0.25, 0.5, 0.75])))
    if points:
        x, low, median, high = np.array(points).T
        kit.band(ax, x, low, median, high, color=color, label=title, width=1.4, alpha=0.15, marker="o", ms=2.5)
