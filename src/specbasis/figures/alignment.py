"""Figures of singular vectors: alignment by rank and block, overlap of subspaces, attention heads, own measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from specbasis.figures import kit
from specbasis.figures.data import SIDES, Pair
from specbasis.figures.drawing import figure
from specbasis.figures.kit import Axes, Figure

SIDE_TITLES = {"left": "left, U (output side)", "right": "right, V (input side)"}

MOST_ROWS = 600
"""Matrices that the heat map shows, at most: above that, every second one of a role, and so on."""

BESIDE_NAMES = {
    "observed": "alignment",
    "noise of the same size": "null_alignment_gaussian",
    "predicted from the update": "predicted_alignment",
    "rounding alone": "null_alignment_rounding",
}


@figure("alignment_", page="alignment", over_pairs=True)
def alignment_by_rank(pairs: Sequence[Pair]) -> Figure:
    """Median alignment by rank with quartiles and chance. Source: Yu et al. 2026, Fig. 2A, B."""
    figure, axes = _two_sides("Alignment of singular vectors before and after")
    for ax, side in zip(axes, SIDES, strict=True):
        kit.chance_lines(ax, max(pairs, key=len).chance_levels(side))
        curves(ax, pairs, f"alignment_{side}")
        _alignment_axes(ax, side, pairs)
    kit.legend_of_pairs(figure, axes[0], [pair.label for pair in pairs])
    return figure


@figure("subspace_overlap_", page="overlap", over_pairs=True)
def subspace_overlap(pairs: Sequence[Pair]) -> Figure:
    """Median overlap of the leading k directions with quartiles and chance k/d."""
    from matplotlib.ticker import FuncFormatter

    figure, axes = _two_sides("Overlap of leading subspaces before and after")
    for ax, side in zip(axes, SIDES, strict=True):
        sizes = [pair.bands[f"subspace_overlap_{side}"]["all"].x for pair in pairs]
        last = max((float(x.max(initial=1)) for x in sizes), default=1.0)
        for d, _, _ in max(pairs, key=len).chance_levels(side):
            k = np.geomspace(1, min(d, last), 60)
            ax.plot(k, k / d, color=kit.QUIET, lw=0.9, ls=kit.REFERENCE, zorder=1)
        curves(ax, pairs, f"subspace_overlap_{side}")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
        ax.set(title=SIDE_TITLES[side], xlabel="number of leading ranks k", ylabel="overlap of subspaces")
        unit_axis(ax, pairs)
    kit.legend_of_pairs(figure, axes[0], [pair.label for pair in pairs], extra="chance k/d")
    return figure


@figure("alignment_", page="heat")
def alignment_heatmap(pair: Pair) -> Figure:
    """Alignment by block and rank, for each stack and role. Source: Yu et al. 2026, Fig. 2C."""
    groups = pair.panels()
    most = max(4, MOST_ROWS // len(groups))
    shown = [members[:: -(-len(members) // most)] for *_, members in groups]
    # One image for all panels, with an empty row between them: an axis for each would take seconds to draw.
    first = np.cumsum([0, *(len(members) + 1 for members in shown)])
    rows = int(first[-1]) - 1
    height = min(max(rows * 0.13, 1.6), 40.0)  # room for the colour bar; Agg draws no more than 2¹⁶ pixels
    title = f"Alignment by block and rank: {kit.plain(pair.label)}"
    figure, axes = kit.panels(1, 2, (3.4, height), title, between=0.25, left=2.2, right=0.85)
    step = max(1, round(0.13 / (height / rows)))
    ticks = [
        (start + i, members[i])
        for start, members in zip(first, shown, strict=False)
        for i in range(0, len(members), step)
    ]
    image: Any = None
    for ax, side in zip(axes[0], SIDES, strict=True):
        dense = pair.measure(f"alignment_{side}").dense(max(1, pair.vectors()))
        values = np.full((rows, dense.shape[1]), np.nan)
        for start, members in zip(first, shown, strict=False):
            values[start : start + len(members)] = dense[members]
        image = kit.heat(ax, values, (0.5, values.shape[1] + 0.5, rows - 0.5, -0.5))
        for gap in first[1:-1] - 1:
            ax.axhspan(gap - 0.5, gap + 0.5, color="white", lw=0)
        for edge in ("left", "bottom"):
            ax.spines[edge].set_visible(False)
        ax.set_title(SIDE_TITLES[side])
        ax.set_xlabel("rank i")
        kit.block_axis(ax, [pair.matrices["block"][m] for _, m in ticks], [row for row, _ in ticks])
        ax.tick_params(axis="y", labelsize=6.5, labelleft=side == "left")
        kit.rank_axis(ax, limits=False)
    _name_rows(axes[0][0], [(f"{s} {r}".strip(), len(m)) for (s, r, _), m in zip(groups, shown, strict=True)])
    kit.colorbar(figure, image, "alignment", figure.get_size_inches()[1] - 2.2, 1.3)
    return figure


def _name_rows(ax: Axes, groups: Sequence[tuple[str, int]]) -> None:
    """Stack and role beside the rows of each panel, and what the ticks count above them."""
    start = 0
    for name, count in groups:
        place = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "ha": "right",
            "va": "center",
        }
        ax.annotate(name, (0, start + (count - 1) / 2), xytext=(-22, 0), size=7.5, **place)
        start += count + 1
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right"}
    ax.annotate("block", (0, 1), xytext=(-4, 4), size=7, color=kit.QUIET, **place)


@figure("null_alignment_gaussian_left", page="nulls", on_request=True)
def size_alone(pair: Pair) -> Figure:
    """Alignment by rank beside what noise of the update's size, perturbation theory and rounding would leave."""
    from matplotlib.lines import Line2D

    figure, axes = _two_sides(f"Alignment beside what size alone would leave: {kit.plain(pair.label)}")
    for ax, side in zip(axes, SIDES, strict=True):
        kit.chance_lines(ax, pair.chance_levels(side))
        for i, (name, measure) in enumerate(BESIDE_NAMES.items()):
            profile = pair.bands.get(f"{measure}_{side}", {}).get("all")
            if profile is None or not len(profile.x):
                continue
            look = {"alpha": 0.0} if i else {"fill_label": "quartiles over matrices"}
            values = (profile.x, profile.low, profile.median, profile.high)
            kit.band(ax, *values, color=kit.COLORS[i], dash=kit.DASHES[i], width=1.6, label=name, **look)
        _alignment_axes(ax, side, [pair])
    handles, names = axes[0].get_legend_handles_labels()
    entries = {name: handle for handle, name in zip(handles, names, strict=True) if not name.startswith("_")}
    chance = Line2D([], [], color=kit.QUIET, lw=0.9, ls=kit.REFERENCE)
    kit.legend_below(figure, [*entries.values(), chance], [*entries, "chance"], 3)
    return figure


@figure(
    page="heads", has=lambda pair: bool(np.isfinite(pair.measure("head_rotation").value).any()), on_request=True
)
def heads(pair: Pair) -> Figure:
    """Rotation of what each attention head reads from or writes to, by head and block, for each projection."""
    from matplotlib.ticker import MaxNLocator

    series = pair.measure("head_rotation")
    rotation, has_heads = series.dense(), series.lengths > 0
    groups = [
        (f"{stack} {role}".strip(), [m for m in members if has_heads[m]])
        for stack, role, members in pair.panels()
        if has_heads[members].any()
    ]
    across = min(4, len(groups))
    most = max(len(members) for _, members in groups)
    size = (1.9, min(4.0, max(0.7, 0.2 * most)))
    title = f"Rotation of attention heads: {kit.plain(pair.label)}"
    figure, axes = kit.panels(-(-len(groups) // across), across, size, title, right=0.95)
    kit.hide(axes, len(groups))
    top = float(np.nanmax(rotation)) or 1.0
    image: Any = None
    for ax, (name, members) in zip(axes.flat, groups, strict=False):
        width = int(np.isfinite(rotation[members]).any(axis=0).sum())
        image = kit.heat(ax, rotation[members, :width], (0.5, width + 0.5, len(members) - 0.5, -0.5), vmax=top)
        step = max(1, -(-len(members) // 12))
        blocks = [pair.matrices["block"][m] for m in members][::step]
        kit.block_axis(ax, blocks, range(0, len(members), step))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        ax.tick_params(length=0, labelsize=7)
        ax.set_title(name, size=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("block")
    for ax in axes.flat[max(0, len(groups) - across) : len(groups)]:
        ax.set_xlabel("head")
    kit.colorbar(figure, image, "sine", 0.6, min(1.4, figure.get_size_inches()[1] - 1.2), right=0.72)
    return figure


@figure(page="own", has=lambda pair: bool(pair.own_ranks), on_request=True)
def own(pair: Pair) -> Figure:
    """A user's own measures by rank: median and quartiles over matrices."""
    names = pair.own_ranks
    title = f"Own measures by rank: {kit.plain(pair.label)}"
    figure, axes = kit.panels(-(-len(names) // 2), min(2, len(names)), (3.6, 2.3), title, between=0.75)
    kit.hide(axes, len(names))
    for ax, name in zip(axes.flat, names, strict=False):
        profile = pair.bands[name]["all"]
        kit.band(ax, profile.x, profile.low, profile.median, profile.high, color=kit.COLORS[0], width=1.6)
        ax.set(title=kit.plain(name, 40), xlabel="rank i", ylabel="median, quartiles over matrices")
        kit.rank_axis(ax)
    return figure


def curves(
    ax: Axes, pairs: Sequence[Pair], profile: str, scale: float = 1, x_scale: float = 1, **look: Any
) -> None:
    """A line of medians over matrices for each pair, and quartiles where pairs are few; ``look`` as `band`."""
    for i, pair in reversed(list(enumerate(pairs))):
        line = pair.bands[profile]["all"]
        style = {
            "color": kit.COLORS[i % 8],
            "dash": kit.DASHES[i // 8 % 4],
            "width": 1.8 if len(pairs) <= 8 else 1.1,
        }
        style |= {"label": str(i), "alpha": 0.16 if len(pairs) <= 3 else 0.0}
        kit.band(ax, line.x * x_scale, line.low * scale, line.median * scale, line.high * scale, **(style | look))


def _two_sides(title: str) -> tuple[Figure, Any]:
    figure, axes = kit.panels(1, 2, (3.6, 2.7), title, between=0.75, below=0.95)
    return figure, axes[0]


def _alignment_axes(ax: Axes, side: str, pairs: Sequence[Pair]) -> None:
    ax.set(title=SIDE_TITLES[side], xlabel="rank i", ylabel="alignment |⟨base, tuned⟩|")
    unit_axis(ax, pairs)
    kit.rank_axis(ax)


def unit_axis(ax: Axes, pairs: Sequence[Pair]) -> None:
    """From 0 to 1; where everything is kept, logarithmic in what is lost, as nothing could be told apart."""
    medians = np.concatenate([pair.bands["alignment_left"]["all"].median for pair in pairs])
    if np.nanmin(medians, initial=1.0) > 0.95 and np.isfinite(medians).any():
        kit.stretched(ax)
    else:
        ax.set_ylim(-0.02, 1.03)
