"""Figures of singular values: their change, and how much of a matrix the leading ones explain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specbasis.figures import kit
from specbasis.figures.alignment import curves
from specbasis.figures.data import Band, Pair
from specbasis.figures.drawing import figure
from specbasis.figures.kit import Figure


@figure("singular_value_change", page="change", over_pairs=True)
def singular_value_change(pairs: Sequence[Pair]) -> Figure:
    """Median relative change of singular values by relative rank. Source: Yu et al. 2026, Fig. 6."""
    figure, axes = kit.panels(1, 1, (5.6, 2.7), "Relative change of singular values", between=0.75, below=0.95)
    ax = axes[0][0]
    ax.axhline(0, color=kit.QUIET, lw=0.9)
    curves(ax, pairs, "singular_value_change", scale=100, x_scale=100)
    ax.set_ylim(*change_range([pair.bands["singular_value_change"]["all"] for pair in pairs]))
    ax.set(xlabel="relative rank (% of the spectrum, largest first)", ylabel="change of singular value (%)")
    ax.set_xlim(0, 100)
    kit.legend_of_pairs(figure, ax, [pair.label for pair in pairs])
    return figure


@figure("explained_variance_", page="variance", over_pairs=True)
def explained_variance(pairs: Sequence[Pair]) -> Figure:
    """Median explained variance of base (dotted) and tuned. Source: Yu et al. 2026, Fig. 16."""
    figure, axes = kit.panels(1, 2, (3.6, 2.7), "Explained variance", between=0.75, below=0.95)
    base = {"color": kit.QUIET, "dash": kit.DASHES[2], "width": 1.6, "label": "base", "alpha": 0.0}
    for ax, suffix, x_scale in zip(axes[0], ("", "_leading"), (100, 1), strict=True):
        curves(ax, pairs, f"explained_variance_tuned{suffix}", scale=100, x_scale=x_scale)
        curves(ax, pairs[:1], f"explained_variance_base{suffix}", scale=100, x_scale=x_scale, **base)
        ax.set(ylim=(-2, 103), ylabel="explained variance (% of ‖W‖²)")
    axes[0][0].set(title="by relative rank", xlabel="relative rank (%)", xlim=(0, 100))
    axes[0][1].set(title="by number of ranks", xlabel="number of ranks")
    kit.rank_axis(axes[0][1])
    kit.legend_of_pairs(figure, axes[0][0], [pair.label for pair in pairs], "base", kit.DASHES[2])
    return figure


def change_range(bands: Sequence[Band]) -> tuple[float, float]:
    """Limits in % that hold every median, and the quartiles but for the last ranks, which dwarf the rest."""
    values = [0.0]
    for band in bands:
        body = band.x < 0.95
        values += [*band.median, *band.low[body], *band.high[body]]
    finite = 100 * np.array([v for v in values if np.isfinite(v)])
    pad = 0.08 * (finite.max() - finite.min()) or 1.0
    return float(finite.min() - pad), float(finite.max() + pad)
