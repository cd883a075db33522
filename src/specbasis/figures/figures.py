"""The figures of the page as PNG and SVG, for papers and slides."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from specbasis.figures.data import SIDES, Band, Floats, Pair, missing, own_ranks, representatives, turned

COLORS = ("#0072b2", "#c2410c", "#00795c", "#a8357f", "#7d6200", "#5a4fcf", "#4f5b66", "#9b1c31")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
QUIET = "#57606a"
SIDE_TITLES = {"left": "left, U (output side)", "right": "right, V (input side)"}
SCATTER_RANKS = (1, 5, 10, 100)
MOST_ROWS = 600
"""Matrices that the heat map shows, at most: above that, every second one of a role, and so on."""

Bands = dict[str, dict[str, Band]]

STYLE = {
    "svg.hashsalt": "specbasis",  # equal figures get equal files
    "font.family": "DejaVu Sans",  # part of matplotlib: the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad",
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.labelcolor": QUIET,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is a dollar
    "figure.facecolor": "white",
}


def draw(pairs: Sequence[Pair], bands: Sequence[Bands]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of every figure, each as PNG and as SVG."""
    labels = [_plain(pair.label) for pair in pairs]
    left_out = {file for file, figure in PAGE_NAMES.items() if figure in missing(pairs)}
    for name, over_pairs in OVER_PAIRS.items():
        if name in left_out:
            continue
        yield from render(name, lambda f=over_pairs: f(pairs, labels, bands))
    for i, (pair, label) in enumerate(zip(pairs, labels, strict=True)):
        tail = f"-{i + 1}-{re.sub(r'[^A-Za-z0-9._-]+', '_', pair.label)[-40:]}" if len(pairs) > 1 else ""
        for name, of_pair in OF_PAIR.items():
            if name in left_out:
                continue
            yield from render(name + tail, lambda f=of_pair, p=pair, t=label: f(p, t))
        for name, (of_pair, taken) in WHERE_TAKEN.items():
            if taken(pair):
                yield from render(name + tail, lambda f=of_pair, p=pair, t=label: f(p, t))


def render(name: str, make: Callable[[], Figure]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of a figure, as PNG and as SVG."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in any script; drawn as boxes
        figure = make()
        FigureCanvasAgg(figure)
        for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, dpi=144, metadata=metadata)
            yield f"{name}.{form}", buffer.getvalue()


# --- all pairs in one figure ------------------------------------------------------------------------------------


def alignment_by_rank(pairs: Sequence[Pair], labels: Sequence[str], bands: Sequence[Bands]) -> Figure:
    """Median alignment by rank with quartiles and chance. Source: Yu et al. 2026, Fig. 2A, B."""
    figure, axes = _panels(2, "Alignment of singular vectors before and after")
    for ax, side in zip(axes, SIDES, strict=True):
        _chance_lines(ax, _chance(pairs, side))
        _curves(ax, bands, f"alignment_{side}")
        ax.set(title=SIDE_TITLES[side], xlabel="rank i", ylabel="alignment |⟨base, tuned⟩|", ylim=(-0.02, 1.03))
        _from_one(ax)
    _legend(figure, axes[0], labels)
    return figure


def subspace_overlap(pairs: Sequence[Pair], labels: Sequence[str], bands: Sequence[Bands]) -> Figure:
    """Median overlap of the leading k directions with quartiles and chance k/d."""
    figure, axes = _panels(2, "Overlap of leading subspaces before and after")
    for ax, side in zip(axes, SIDES, strict=True):
        sizes = [band[f"subspace_overlap_{side}"]["all"].x for band in bands]
        last = max((float(x.max(initial=1)) for x in sizes), default=1.0)
        for d, _, _ in _chance(pairs, side):
            k = np.geomspace(1, min(d, last), 60)
            ax.plot(k, k / d, color=QUIET, lw=0.9, ls=(0, (4, 3)), zorder=1)
        _curves(ax, bands, f"subspace_overlap_{side}")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
        ax.set(title=SIDE_TITLES[side], xlabel="number of leading ranks k", ylabel="overlap of subspaces")
        ax.set_ylim(-0.02, 1.03)
    _legend(figure, axes[0], labels, extra="chance k/d")
    return figure


def singular_value_change(pairs: Sequence[Pair], labels: Sequence[str], bands: Sequence[Bands]) -> Figure:
    """Median relative change of singular values by relative rank. Source: Yu et al. 2026, Fig. 6."""
    figure, (ax,) = _panels(1, "Relative change of singular values")
    ax.axhline(0, color=QUIET, lw=0.9)
    _curves(ax, bands, "singular_value_change", scale=100, x_scale=100)
    ax.set_ylim(*change_range([band["singular_value_change"]["all"] for band in bands]))
    ax.set(xlabel="relative rank (% of the spectrum, largest first)", ylabel="change of singular value (%)")
    ax.set_xlim(0, 100)
    _legend(figure, ax, labels)
    return figure


def explained_variance(pairs: Sequence[Pair], labels: Sequence[str], bands: Sequence[Bands]) -> Figure:
    """Median explained variance of base (dotted) and tuned. Source: Yu et al. 2026, Fig. 16."""
    figure, axes = _panels(2, "Explained variance")
    for ax, suffix, x_scale in ((axes[0], "", 100), (axes[1], "_leading", 1)):
        _curves(ax, bands, f"explained_variance_tuned{suffix}", scale=100, x_scale=x_scale)
        _curves(
            ax,
            bands[:1],
            f"explained_variance_base{suffix}",
            scale=100,
            x_scale=x_scale,
            style={"color": QUIET, "ls": DASHES[2], "lw": 1.6, "label": "base"},
            fill=False,
        )
        ax.set(ylim=(-2, 103), ylabel="explained variance (% of ‖W‖²)")
    axes[0].set(title="by relative rank", xlabel="relative rank (%)", xlim=(0, 100))
    axes[1].set(title="by number of ranks", xlabel="number of ranks")
    _from_one(axes[1])
    _legend(figure, axes[0], labels, extra="base", extra_dash=DASHES[2])
    return figure


def change_range(bands: Sequence[Band]) -> tuple[float, float]:
    """Limits in % that hold every median, and the quartiles but for the last ranks, which dwarf the rest."""
    found = [0.0]
    for band in bands:
        body = band.x < 0.95
        found += [*band.median, *band.low[body], *band.high[body]]
    finite = 100 * np.array([v for v in found if np.isfinite(v)])
    pad = 0.08 * (finite.max() - finite.min()) or 1.0
    return float(finite.min() - pad), float(finite.max() + pad)


# --- one pair a figure ------------------------------------------------------------------------------------------


def alignment_heatmap(pair: Pair, label: str) -> Figure:
    """Alignment by block and rank, for each stack and role. Source: Yu et al. 2026, Fig. 2C."""
    panels = pair.panels()
    most = max(4, MOST_ROWS // len(panels))
    shown = [members[:: -(-len(members) // most)] for *_, members in panels]
    # One image for all panels, with an empty row between them: an axis for each would take seconds to draw.
    first = np.cumsum([0, *(len(members) + 1 for members in shown)])
    rows = int(first[-1]) - 1
    height = min(max(rows * 0.13, 1.6), 40.0)  # room for the colour bar; Agg draws no more than 2¹⁶ pixels
    figure, axes = grid_of_panels(
        1, 2, (3.4, height), f"Alignment by block and rank: {label}", between=0.25, left=2.2, right=0.85
    )
    every = max(1, round(0.13 / (height / rows)))
    image: Any = None
    for ax, side in zip(axes[0], SIDES, strict=True):
        dense = pair.figures(f"alignment_{side}").dense(max(1, pair.vectors()))
        values = np.full((rows, dense.shape[1]), np.nan)
        for start, members in zip(first, shown, strict=False):
            values[start : start + len(members)] = dense[members]
        ax.grid(False)
        ax.set_facecolor("#c9ced6")
        extent = (0.5, values.shape[1] + 0.5, rows - 0.5, -0.5)
        image = ax.imshow(
            values, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=1, extent=extent
        )
        for gap in first[1:-1] - 1:
            ax.axhspan(gap - 0.5, gap + 0.5, color="white", lw=0)
        for edge in ("left", "bottom"):
            ax.spines[edge].set_visible(False)
        ax.set_title(SIDE_TITLES[side])
        ax.set_xlabel("rank i")
        ax.tick_params(axis="y", length=0, labelsize=6.5, labelleft=side == "left")
        _from_one(ax, limits=False)
    ticks = [
        (start + i, members[i])
        for start, members in zip(first, shown, strict=False)
        for i in range(0, len(members), every)
    ]
    blocks = [pair.matrices["block"][m] for _, m in ticks]
    for ax in axes[0]:
        ax.set_yticks([row for row, _ in ticks], ["–" if block is None else str(block) for block in blocks])
    for start, members, (stack, role, _) in zip(first, shown, panels, strict=False):
        axes[0][0].annotate(
            f"{stack} {role}".strip(),
            (0, start + (len(members) - 1) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(-22, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            size=7.5,
        )
    axes[0][0].annotate(
        "block",
        (0, 1),
        xycoords="axes fraction",
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        size=7,
        color=QUIET,
    )
    width, whole = figure.get_size_inches()
    bar = figure.colorbar(image, cax=figure.add_axes((1 - 0.6 / width, 1 - 2.2 / whole, 0.12 / width, 1.3 / whole)))
    bar.outline.set_visible(False)
    bar.ax.set_title("alignment", size=8, weight="normal", color=QUIET, loc="center")
    return figure


def ratio_against_alignment(pair: Pair, label: str) -> Figure:
    """Size of the update against alignment, update alignment as colour. Source: Yu et al. 2026, Fig. 3A and 19."""
    ranks = [rank for rank in SCATTER_RANKS if rank <= pair.vectors()] or [1]
    figure, axes = grid_of_panels(
        2, len(ranks), (2.35, 2.05), f"Size of the update against alignment: {label}", right=0.95
    )
    dots = None
    for row, side in zip(axes, SIDES, strict=True):
        for ax, rank in zip(row, ranks, strict=True):
            ratio = pair.at_rank("singular_value_ratio", rank)
            aligned = pair.at_rank(f"alignment_{side}", rank)
            update = pair.at_rank(f"update_alignment_{side}", rank)
            drawn = np.isfinite(ratio) & (ratio > 0) & np.isfinite(aligned)
            known = drawn & np.isfinite(update)
            if drawn.any():
                ax.set_xscale("log")
            if known.any():
                dots = ax.scatter(
                    ratio[known],
                    aligned[known],
                    c=update[known],
                    cmap="cividis",
                    vmin=0,
                    vmax=1,
                    edgecolor="#1b1f24",
                    linewidth=0.6,
                    s=26,
                )
            unknown = drawn & ~known
            ax.scatter(ratio[unknown], aligned[unknown], facecolor="none", edgecolor=QUIET, s=26)
            if not drawn.any():
                ax.text(0.5, 0.5, "no update", transform=ax.transAxes, ha="center", color=QUIET)
            ax.set(title=f"rank {rank}, {side}", ylim=(-0.03, 1.05))
            _few_decades(ax)
            ax.tick_params(labelleft=ax is row[0])
        row[0].set_ylabel("alignment")
    figure.text(0.5, 0.03, "size of the update S_i(Δ) / S_i(base)", color=QUIET, ha="center")
    if dots is not None:
        width, height = figure.get_size_inches()
        place = figure.add_axes((1 - 0.78 / width, 0.5 - 1.1 / height, 0.12 / width, 2.2 / height))
        bar = figure.colorbar(dots, cax=place, label="update alignment")
        bar.outline.set_visible(False)
    return figure


def spectra(pair: Pair, label: str) -> Figure:
    """Spectra and alignment of the least and the most updated matrix. Source: Yu et al. 2026, Fig. 3B, C."""
    chosen = representatives(pair)
    which = "the matrices with the smallest and the largest update at rank 1" if len(chosen) > 1 else "one matrix"
    figure, axes = grid_of_panels(
        2, len(chosen), (3.8 if len(chosen) > 1 else 5.4, 2.05), f"{label}: {which}", between=0.8
    )
    for column, m in zip(axes.T, chosen, strict=True):
        column[0].set_title(_plain(pair.matrices["name"][m], 52), size=7.5)
        for i, name in enumerate(("base", "tuned", "delta")):
            series = pair.figures(f"singular_value_{name}")
            part = slice(series.start[m], series.start[m + 1])
            value = series.value[part]
            if (value > 0).any():
                column[0].set_yscale("log")
                column[0].yaxis.set_major_formatter(FuncFormatter(_power))
                color = COLORS[(0, 1, 6)[i]]
                column[0].plot(
                    series.index[part][value > 0] + 1,
                    value[value > 0],
                    color=color,
                    ls=DASHES[i],
                    lw=1.6,
                    label=("base", "tuned", "update Δ")[i],
                    marker="o" if len(value) < 3 else None,
                )
        column[0].set(xlabel="rank i", ylabel="singular value")
        for i, side in enumerate(SIDES):
            series = pair.figures(f"alignment_{side}")
            part = slice(series.start[m], series.start[m + 1])
            x, y, resolved = series.index[part] + 1, series.value[part], series.resolved[part]
            column[1].plot(
                x,
                np.where(resolved, y, np.nan),
                color=COLORS[i],
                ls=DASHES[i],
                lw=1.3,
                label=side,
                marker="o" if len(x) < 3 else None,
            )
            column[1].plot(x[~resolved], y[~resolved], "o", mfc="none", ms=3, color=COLORS[i])
            level = pair.whole(f"chance_alignment_{side}")[m]
            column[1].axhline(level, color=QUIET, lw=0.8, ls=(0, (4, 3)), zorder=1, label="chance" if i else None)
        column[1].set(xlabel="rank i", ylabel="alignment", ylim=(-0.02, 1.03))
        for ax in column:
            _from_one(ax)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=8)
    return figure


def size_alone(pair: Pair, label: str) -> Figure:
    """Alignment by rank beside what noise of the update's size, perturbation theory and rounding would leave."""
    figure, axes = _panels(2, f"Alignment beside what size alone would leave: {label}")
    for ax, side in zip(axes, SIDES, strict=True):
        _chance_lines(ax, pair.chance_levels(side))
        for i, (name, measure) in enumerate(BESIDE_NAMES.items()):
            series = pair.figures(f"{measure}_{side}")
            width = int(series.index.max(initial=-1)) + 1
            if not width:
                continue
            low, median, high = _quartiles(series.dense(width))
            x = np.arange(1, width + 1)
            if not i:
                ax.fill_between(x, low, high, color=COLORS[0], alpha=0.16, lw=0, label="quartiles over matrices")
            ax.plot(x, median, color=COLORS[i], ls=DASHES[i], lw=1.6, label=name, marker="o" if width < 3 else None)
        ax.set(title=SIDE_TITLES[side], xlabel="rank i", ylabel="alignment |⟨base, tuned⟩|", ylim=(-0.02, 1.03))
        _from_one(ax)
    handles, names = axes[0].get_legend_handles_labels()
    known = {name: handle for handle, name in zip(handles, names, strict=True) if not name.startswith("_")}
    chance = Line2D([], [], color=QUIET, lw=0.9, ls=(0, (4, 3)))
    height = figure.get_size_inches()[1]
    figure.legend(
        [*known.values(), chance],
        [*known, "chance"],
        loc="lower center",
        ncols=3,
        fontsize=7.5,
        bbox_to_anchor=(0.5, 0.02 / height),
    )
    return figure


def values_and_vectors(pair: Pair, label: str) -> Figure:
    """Change of singular values, and rotation of the leading ten vectors, of each matrix by the update's size."""
    figure, axes = _panels(2, f"Values and vectors at equal size of the update: {label}")
    size = pair.whole("relative_update")
    for ax, side in zip(axes, SIDES, strict=True):
        drawn = [size[:0]]
        for i, (name, values) in enumerate(
            (
                ("change of values, RSD", pair.whole("rsd")),
                ("rotation of vectors, ranks 1–10 (sine)", turned(pair, f"alignment_{side}")),
                ("rotation by noise of this size", turned(pair, f"null_alignment_gaussian_{side}")),
            )
        ):
            known = np.isfinite(size) & np.isfinite(values) & (size > 0) & (values > 0)
            if not known.any():
                continue
            drawn += [size[known], values[known]]
            look = {"c": (COLORS[0], COLORS[1], QUIET)[i], "marker": "osx"[i], "s": 20, "linewidth": 1.0}
            ax.scatter(size[known], values[known], label=name, **look | ({} if i == 2 else {"alpha": 0.75}))
        every = np.concatenate(drawn)
        if len(every):
            ends = np.array([every.min() / 1.3, every.max() * 1.3])
            ax.plot(ends, ends, color=QUIET, lw=0.9, ls=(0, (4, 3)), label="equal", zorder=1)
            ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(FuncFormatter(_power))
                axis.set_minor_formatter(NullFormatter())
        else:
            ax.text(0.5, 0.5, "no update", transform=ax.transAxes, ha="center", color=QUIET)
        ax.set(title=SIDE_TITLES[side], xlabel="size of the update ‖Δ‖/‖W‖", ylabel="change (of 1)")
    handles, names = axes[0].get_legend_handles_labels()
    if handles:
        height = figure.get_size_inches()[1]
        figure.legend(
            handles, names, loc="lower center", ncols=2, fontsize=7.5, bbox_to_anchor=(0.5, 0.02 / height)
        )
    return figure


def heads(pair: Pair, label: str) -> Figure:
    """Rotation of what each attention head reads from or writes to, by head and block, for each projection."""
    series = pair.figures("head_rotation")
    grid = series.dense(int(series.index.max(initial=0)) + 1)
    known = series.lengths > 0
    panels = [
        (f"{stack} {role}".strip(), [m for m in members if known[m]])
        for stack, role, members in pair.panels()
        if known[members].any()
    ]
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    most = max(len(members) for _, members in panels)
    figure, axes = grid_of_panels(
        down, across, (1.9, min(4.0, max(0.7, 0.2 * most))), f"Rotation of attention heads: {label}", right=0.95
    )
    top = float(np.nanmax(grid))
    image: Any = None
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, members) in zip(axes.flat, panels, strict=False):
        values = grid[members]
        width = int(np.isfinite(values).any(axis=0).sum())
        ax.grid(False)
        extent = (0.5, width + 0.5, len(members) - 0.5, -0.5)
        image = ax.imshow(
            values[:, :width], aspect="auto", cmap="cividis", vmin=0, vmax=top or 1.0, extent=extent,
            interpolation="nearest",
        )  # fmt: skip
        every = max(1, -(-len(members) // 12))
        blocks = [pair.matrices["block"][m] for m in members][::every]
        ax.set_yticks(range(0, len(members), every), ["–" if b is None else str(b) for b in blocks])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        ax.tick_params(length=0, labelsize=7)
        ax.set_title(title, size=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("block")
    for ax in axes.flat[max(0, len(panels) - across) : len(panels)]:
        ax.set_xlabel("head")
    width, height = figure.get_size_inches()
    side = min(1.4, height - 1.2)
    bar = figure.colorbar(image, cax=figure.add_axes((1 - 0.72 / width, 0.6 / height, 0.12 / width, side / height)))
    bar.outline.set_visible(False)
    bar.ax.set_title("sine", size=8, weight="normal", color=QUIET, loc="center")
    return figure


def own(pair: Pair, label: str) -> Figure:
    """A user's own measures by rank: median and quartiles over matrices."""
    names = own_ranks(pair)
    figure, axes = grid_of_panels(
        -(-len(names) // 2), min(2, len(names)), (3.6, 2.3), f"Own measures by rank: {label}", between=0.75
    )
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        series = pair.figures(name)
        width = int(series.index.max(initial=0)) + 1
        low, median, high = _quartiles(series.dense(width))
        x = np.arange(1, width + 1)
        ax.fill_between(x, low, high, color=COLORS[0], alpha=0.16, lw=0)
        ax.plot(x, median, color=COLORS[0], lw=1.6, marker="o" if width < 3 else None)
        ax.set(title=_plain(name, 40), xlabel="rank i", ylabel="median, quartiles over matrices")
        _from_one(ax)
    return figure


BESIDE_NAMES = {
    "observed": "alignment",
    "noise of the same size": "null_alignment_gaussian",
    "predicted from the update": "predicted_alignment",
    "rounding alone": "null_alignment_rounding",
}

OVER_PAIRS: dict[str, Callable[[Sequence[Pair], Sequence[str], Sequence[Bands]], Figure]] = {
    "alignment_by_rank": alignment_by_rank,
    "subspace_overlap": subspace_overlap,
    "singular_value_change": singular_value_change,
    "explained_variance": explained_variance,
}
OF_PAIR: dict[str, Callable[[Pair, str], Figure]] = {
    "alignment_heatmap": alignment_heatmap,
    "ratio_against_alignment": ratio_against_alignment,
    "spectra": spectra,
    "values_and_vectors": values_and_vectors,
}
WHERE_TAKEN: dict[str, tuple[Callable[[Pair, str], Figure], Callable[[Pair], bool]]] = {
    "size_alone": (size_alone, lambda pair: "null_alignment_gaussian_left" in pair.series),
    "heads": (heads, lambda pair: bool(np.isfinite(pair.figures("head_rotation").value).any())),
    "own": (own, lambda pair: bool(own_ranks(pair))),
}
"""Figures of what is measured on request: drawn for the pairs that have it."""


PAGE_NAMES = {
    "alignment_by_rank": "alignment",
    "subspace_overlap": "overlap",
    "singular_value_change": "change",
    "explained_variance": "variance",
    "alignment_heatmap": "heat",
    "ratio_against_alignment": "scatter",
    "spectra": "spectra",
    "values_and_vectors": "equal",
}
"""File → the page's figure of the same."""


# --- parts ------------------------------------------------------------------------------------------------------


def _panels(n: int, title: str) -> tuple[Figure, Any]:
    figure, axes = grid_of_panels(1, n, (3.6 if n > 1 else 5.6, 2.7), title, between=0.75, below=0.95)
    return figure, axes[0]


def grid_of_panels(
    down: int,
    across: int,
    size: tuple[float, float],
    title: str,
    *,
    between: float = 0.3,
    right: float = 0.15,
    left: float = 0.7,
    below: float = 0.6,
) -> tuple[Figure, Any]:
    """Panels of a size in inches, on fixed places: an automatic layout would draw everything several times."""
    top, gap = 0.7, 0.62
    width = left + across * size[0] + (across - 1) * between + right
    height = top + down * size[1] + (down - 1) * gap + below
    figure = Figure(figsize=(width, height))
    size_in_points = min(11.0, 72 * (width - 0.2) / (0.68 * len(title)))  # a long title shrinks to fit
    figure.text(0.12 / width, 1 - 0.28 / height, title, weight="bold", size=size_in_points)
    axes = figure.subplots(
        down,
        across,
        squeeze=False,
        gridspec_kw={
            "left": left / width,
            "right": 1 - right / width,
            "top": 1 - top / height,
            "bottom": below / height,
            "wspace": between / size[0],
            "hspace": gap / size[1],
        },
    )
    return figure, axes


def _quartiles(values: Floats) -> tuple[Floats, Floats, Floats]:
    """(lower quartile, median, upper quartile) down the columns over what is finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a rank that is resolved in no matrix
        low, median, high = np.nanquantile(values, (0.25, 0.5, 0.75), axis=0)
    return low, median, high


def _curves(
    ax: Any,
    bands: Sequence[Bands],
    profile: str,
    *,
    scale: float = 1,
    x_scale: float = 1,
    fill: bool = True,
    style: dict[str, Any] | None = None,
) -> None:
    """A line of medians for each pair, and quartiles around it where there are few."""
    for i, band in reversed(list(enumerate(bands))):
        line = band[profile]["all"]
        x = line.x * x_scale
        look = style or {"color": COLORS[i % 8], "ls": DASHES[i // 8 % 4], "lw": 1.8 if len(bands) <= 8 else 1.1}
        if fill and len(bands) <= 3:
            ax.fill_between(x, line.low * scale, line.high * scale, color=look["color"], alpha=0.16, lw=0)
        ax.plot(x, line.median * scale, marker="o" if len(x) < 3 else None, **({"label": str(i)} | look))


def _legend(figure: Figure, ax: Any, labels: Sequence[str], extra: str = "", extra_dash: Any = (0, (4, 3))) -> None:
    """The pairs in their order, below the panels; none where there is one pair and nothing else to tell."""
    lines = {line.get_label(): line for line in ax.get_lines()}
    handles = [lines[str(i)] for i in range(len(labels)) if str(i) in lines]
    names = list(labels)[: len(handles)]
    if extra:
        handles.append(Line2D([], [], color=QUIET, lw=1.2, ls=extra_dash))
        names.append(extra)
    columns = max(1, min(len(names), int(100 / (8 + max(map(len, names), default=1)))))
    rows = -(-len(names) // columns)
    if rows > 2:  # many pairs: the figure grows below by what the legend needs beyond the space that there is
        more = 0.19 * (rows - 2)
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + more)
        for panel in figure.axes:
            x, y, w, h = panel.get_position().bounds
            panel.set_position((x, (y * height + more) / (height + more), w, h * height / (height + more)))
        for text in figure.texts:
            text.set_y(1 - 0.28 / (height + more))
    figure.legend(handles, names, loc="lower left", ncols=columns, fontsize=8.5, borderaxespad=0.4)


def _chance(pairs: Sequence[Pair], side: str) -> list[tuple[int, float, int]]:
    """The chance levels of the pair with most matrices."""
    return max(pairs, key=len).chance_levels(side) if pairs else []


def _chance_lines(ax: Any, levels: Sequence[tuple[int, float, int]]) -> None:
    """Chance levels as dashed lines; those that lie close together share one label, above the highest."""
    clusters: list[list[tuple[int, float]]] = []
    for d, level, _ in sorted(levels, key=lambda entry: -entry[1]):
        ax.axhline(level, color=QUIET, lw=0.8, ls=(0, (4, 3)), zorder=1)
        if clusters and clusters[-1][0][1] - level < 0.06:
            clusters[-1].append((d, level))
        else:
            clusters.append([(d, level)])
    for cluster in clusters:
        ax.annotate(
            f"chance, d = {', '.join(str(d) for d, _ in cluster)}",
            (1, cluster[0][1]),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            size=7,
            color=QUIET,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )


def _from_one(ax: Any, *, limits: bool = True) -> None:
    """Ticks that begin at rank 1, as ranks do."""
    low, high = ax.get_xlim()
    high = max(high, 1.5)
    step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000) if (high - 1) / s <= 7), 5000)
    ticks = [1, *(t for t in range(step, int(high) + 1, step) if t > 1)]
    ax.set_xticks(ticks)
    if limits:
        ax.set_xlim(max(low, -0.05 * high), high)


def _few_decades(ax: Any) -> None:
    """Readable ticks on a logarithmic axis that spans little."""
    if ax.get_xscale() != "log":
        return
    low, high = ax.get_xlim()
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(_power))
    if high / low < 30:
        ticks = [m * 10.0**e for e in range(-12, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])


def _power(value: float, _: int) -> str:
    """A power of ten in plain characters."""
    if 0.01 <= value <= 100:
        return f"{value:g}"
    return "10" + str(round(np.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _plain(text: str, limit: int = 60) -> str:
    """A label that a figure can show: printable, on one line, not too long, never a hidden legend entry."""
    text = "".join(c if c.isprintable() else "\N{WHITE SQUARE}" for c in text)
    text = text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 + 1 :]}"
    return f" {text}" if text.startswith("_") else text
