"""Fig. 3A–C and 19: the size of the update against alignment, and the spectra of two extremes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from specbasis.core.statistics import correlation, correlation_interval
from specbasis.figures import kit
from specbasis.figures.data import SIDES
from specbasis.figures.kit import Axes, Figure
from specbasis.figures.update import SCATTER_RANKS, spectrum
from specbasis.paper.material import ALIGNED, DRAWS, ENOUGH, NULL, SIZE, SPECTRA, Material, Records, chosen, recipe


@recipe("Fig. 3A–C", "size and direction of the update", *ALIGNED, *SIZE, *SPECTRA, *NULL)
def fig3(material: Material) -> tuple[Figure, Records]:
    """A: update size against alignment at rank 1; B, C: spectra of a small and of a large but aligned update."""
    figure, axes = kit.free_panels(1, 4, (3.3, 2.9), "Size and direction of the update, FFN matrices")
    table: Records = []
    dots = None
    for ax, side in zip(axes[0], SIDES, strict=False):
        points = _points(material, 1, side)
        dots = _scatter(ax, points) or dots
        ax.set_title(f"A, rank 1, {side}")
        table += points
    if dots is not None:
        figure.colorbar(dots, ax=axes[0][1], label="alignment of the update")
        axes[0][0].legend(fontsize=6, loc="center left")
    left = [p for p in table if p["side"] == "left"]
    cases = {}
    if left:
        cases["B, smallest update"] = min(left, key=lambda p: p["ratio"])
        # As in the paper's panel C: as large as base at rank 1, and the best aligned of those that are.
        large = [p for p in left if p["ratio"] >= 0.5] or [max(left, key=lambda p: p["ratio"])]
        cases["C, large update, best aligned"] = max(large, key=lambda p: p["update_alignment"])
    for ax, (panel, point) in zip(axes[0][2:], cases.items(), strict=False):
        pair = next(m for m in material.models if m.name == point["pair"]).pair
        spectrum(ax, pair, pair.matrices["name"].index(point["matrix"]))
        text = f"ratio {point['ratio']:.2g}, alignment {point['alignment']:.2f}"
        ax.set_title(f"{panel}\n{kit.ending(point['matrix'], 34)}\n{text}", size=7)
        ax.legend(fontsize=7)
    return figure, table


@recipe("Fig. 19", "size of the update against alignment at ranks 1, 5, 10, 100", *ALIGNED, *SIZE, *NULL)
def fig19(material: Material) -> tuple[Figure, Records]:
    """Update size against alignment at ranks 1, 5, 10 and 100, left and right."""
    figure, axes = kit.free_panels(2, 4, (2.9, 2.6), "Size of the update against alignment, FFN matrices")
    table: Records = []
    dots = None
    for row, side in zip(axes, SIDES, strict=True):
        for ax, rank in zip(row, SCATTER_RANKS, strict=True):
            points = _points(material, rank, side)
            dots = _scatter(ax, points) or dots
            ax.set_title(f"rank {rank}, {side}")
            table += points
    if dots is not None:
        figure.colorbar(dots, ax=axes, label="alignment of the update", shrink=0.6)
    return figure, table


def _points(material: Material, rank: int, side: str) -> Records:
    """One record for each matrix that has an update at a rank."""
    points: Records = []
    for m in material.models:
        values = {
            "ratio": m.pair.at_rank("singular_value_ratio", rank),
            "alignment": m.pair.at_rank(f"alignment_{side}", rank),
            "update_alignment": m.pair.at_rank(f"update_alignment_{side}", rank),
            "chance": m.pair.whole(f"chance_alignment_{side}"),
            "random_update": m.pair.at_rank(f"null_alignment_gaussian_{side}", rank),
        }
        about = {"pair": m.name, "base": m.member.base, "modality": m.member.modality}
        for i in np.flatnonzero(chosen(m, "ffn", material.notes)):
            point = {name: float(numbers[i]) for name, numbers in values.items()}
            if 0 < point["ratio"] < math.inf and math.isfinite(point["alignment"]):
                matrix = {"matrix": m.pair.matrices["name"][i], "rank": rank, "side": side}
                points.append(about | matrix | point)
    return points


def _scatter(ax: Axes, points: Records) -> Any:
    """Size of the update against alignment, colour the alignment of the update, with Spearman and its interval."""
    if not points:
        kit.nothing(ax, "no update here")
        return None
    x, y, update, null = (
        np.array([p[key] for p in points]) for key in ("ratio", "alignment", "update_alignment", "random_update")
    )
    kit.logarithmic(ax, "x")
    finite = np.isfinite(null)
    look = {"marker": "_", "color": kit.COLORS[1], "s": 14, "lw": 0.9}
    ax.scatter(x[finite], null[finite], label="random update of the same size", **look)
    dots = kit.scatter(ax, x, y, update, size=15, edge=0.4)
    kit.reference(ax, float(np.mean([p["chance"] for p in points])), "independent directions", kit.DASHES[2])
    ax.set(ylim=(-0.03, 1.05), xlabel="size of the update S_i(Δ)/S_i(base)", ylabel="alignment")
    rho = correlation(x, y)
    if math.isfinite(rho):
        models = np.unique([p["pair"] for p in points], return_inverse=True)[1]
        # Where models are few, none could be drawn in another's place: their matrices are drawn.
        clusters = models if models.max() + 1 >= ENOUGH else np.arange(len(points))
        low, high = correlation_interval(x, y, clusters, DRAWS)
        ax.text(
            0.02,
            0.03,
            f"Spearman {rho:.2f} [{low:.2f}, {high:.2f}]",
            transform=ax.transAxes,
            size=7,
            color=kit.QUIET,
        )
    return dots
