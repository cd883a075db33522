"""Figures of the update and of singular values: what it does to vectors and values by its size, and spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from specbasis.figures import kit
from specbasis.figures.alignment import SIDE_TITLES, curves, unit_axis
from specbasis.figures.data import SIDES, Band, Pair
from specbasis.figures.drawing import figure
from specbasis.figures.kit import Axes, Figure

SCATTER_RANKS = (1, 5, 10, 100)


@figure("alignment_", "singular_value_ratio", page="scatter")
def ratio_against_alignment(pair: Pair) -> Figure:
    """Size of the update against alignment, update alignment as colour. Source: Yu et al. 2026, Fig. 3A and 19."""
    ranks = [rank for rank in SCATTER_RANKS if rank <= pair.vectors()] or [1]
    title = f"Size of the update against alignment: {kit.plain(pair.label)}"
    figure, axes = kit.panels(2, len(ranks), (2.35, 2.05), title, right=0.95)
    dots = None
    for row, side in zip(axes, SIDES, strict=True):
        for ax, rank in zip(row, ranks, strict=True):
            ratio = pair.at_rank("singular_value_ratio", rank)
            aligned = pair.at_rank(f"alignment_{side}", rank)
            update = pair.at_rank(f"update_alignment_{side}", rank)
            drawn = np.isfinite(ratio) & (ratio > 0) & np.isfinite(aligned)
            coloured = drawn & np.isfinite(update)
            if drawn.any():
                kit.logarithmic(ax, "x")
            else:
                kit.nothing(ax, "no update")
            if coloured.any():
                dots = kit.scatter(ax, ratio[coloured], aligned[coloured], update[coloured])
            uncoloured = drawn & ~coloured
            ax.scatter(ratio[uncoloured], aligned[uncoloured], facecolor="none", edgecolor=kit.QUIET, s=26)
            ax.set_title(f"rank {rank}, {side}")
            unit_axis(ax, [pair])
            kit.few_decades(ax)
            ax.tick_params(labelleft=ax is row[0])
        row[0].set_ylabel("alignment")
    figure.text(0.5, 0.03, "size of the update S_i(Δ) / S_i(base)", color=kit.QUIET, ha="center")
    if dots is not None:
        middle = figure.get_size_inches()[1] / 2
        kit.colorbar(figure, dots, "", middle - 1.1, 2.2, right=0.78).set_label("update alignment")
    return figure


@figure("singular_value_", page="spectra")
def spectra(pair: Pair) -> Figure:
    """Spectra and alignment of the least and the most updated matrix. Source: Yu et al. 2026, Fig. 3B, C."""
    chosen = pair.representatives()
    which = "the matrices with the smallest and the largest update at rank 1" if len(chosen) > 1 else "one matrix"
    size = (3.8 if len(chosen) > 1 else 5.4, 2.05)
    figure, axes = kit.panels(2, len(chosen), size, f"{kit.plain(pair.label)}: {which}", between=0.8)
    for (above, below), m in zip(axes.T, chosen, strict=True):
        above.set_title(kit.plain(pair.matrices["name"][m], 52), size=7.5)
        spectrum(above, pair, m, width=1.6)
        for i, side in enumerate(SIDES):
            x, y, resolved = pair.measure(f"alignment_{side}").of(m)
            marker = "o" if len(x) < 3 else None
            look = {"color": kit.COLORS[i], "ls": kit.DASHES[i], "lw": 1.3}
            below.plot(x, np.where(resolved, y, np.nan), label=side, marker=marker, **look)
            below.plot(x[~resolved], y[~resolved], "o", mfc="none", ms=3, color=kit.COLORS[i])
            kit.reference(below, pair.whole(f"chance_alignment_{side}")[m], "chance" if i else None)
        below.set(xlabel="rank i", ylabel="alignment", ylim=(-0.02, 1.03))
        for ax in (above, below):
            kit.rank_axis(ax)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=8)
    return figure


def spectrum(ax: Axes, pair: Pair, matrix: int, width: float = 1.5) -> None:
    """Positive singular values of base, tuned and update of one matrix by rank."""
    for i, (name, label) in enumerate({"base": "base", "tuned": "tuned", "delta": "update Δ"}.items()):
        rank, value, _ = pair.measure(f"singular_value_{name}").of(matrix)
        marker = "o" if len(value) < 3 else None
        look = {"color": kit.COLORS[(0, 1, 6)[i]], "ls": kit.DASHES[i], "lw": width, "label": label}
        if (value > 0).any():
            kit.logarithmic(ax, "y")
            ax.plot(rank[value > 0], value[value > 0], marker=marker, **look)
    ax.set(xlabel="rank i", ylabel="singular value")


@figure("alignment_", page="equal")
def values_and_vectors(pair: Pair) -> Figure:
    """Change of singular values, and rotation of the leading ten vectors, of each matrix by the update's size."""
    title = f"Values and vectors at equal size of the update: {kit.plain(pair.label)}"
    figure, axes = kit.panels(1, 2, (3.6, 2.7), title, between=0.75, below=0.95)
    size = pair.whole("relative_update")
    for ax, side in zip(axes[0], SIDES, strict=True):
        drawn = [size[:0]]
        changes = {
            "change of values, RSD": pair.whole("rsd"),
            "rotation of vectors, ranks 1–10 (sine)": pair.turned(f"alignment_{side}"),
            "rotation by noise of this size": pair.turned(f"null_alignment_gaussian_{side}"),
        }
        looks: tuple[dict[str, Any], ...] = (
            {"c": kit.COLORS[0], "marker": "o", "alpha": 0.75},
            {"c": kit.COLORS[1], "marker": "s", "alpha": 0.75},
            {"c": kit.QUIET, "marker": "x"},
        )
        for (name, values), look in zip(changes.items(), looks, strict=True):
            positive = np.isfinite(size) & np.isfinite(values) & (size > 0) & (values > 0)
            if positive.any():
                drawn += [size[positive], values[positive]]
                ax.scatter(size[positive], values[positive], label=name, s=20, linewidth=1.0, **look)
        numbers = np.concatenate(drawn)
        if len(numbers):
            ends = np.array([numbers.min() / 1.3, numbers.max() * 1.3])
            ax.plot(ends, ends, color=kit.QUIET, lw=0.9, ls=kit.REFERENCE, label="equal", zorder=1)
            ax.set(xlim=ends, ylim=ends)
            for axis in "xy":
                kit.logarithmic(ax, axis)
        else:
            kit.nothing(ax, "no update")
        ax.set(title=SIDE_TITLES[side], xlabel="size of the update ‖Δ‖/‖W‖", ylabel="change (of 1)")
    handles, names = axes[0][0].get_legend_handles_labels()
    if handles:
        kit.legend_below(figure, handles, names, 2)
    return figure


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
