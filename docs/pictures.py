"""The pictures of index.md and concepts.md: `python docs/pictures.py` writes them into docs/pictures/.

The matrix W is that of concepts.md; the finetunes are the models of the demo, which the package anarcii brings.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import specbasis
from specbasis.figures import kit

MODELS = "pkg:anarcii/models"
BASE = f"{MODELS}/antibody/antibody_4_2_128_512.pt"
FINETUNES = {"gentle": f"{MODELS}/shark/shark_4_2_128_512.pt", "strong": f"{MODELS}/tcr/tcr_4_2_128_512.pt"}
INDEPENDENT = f"{MODELS}/antibody/antibody_4_1_128_512.pt"
MEASURES = [
    "alignment_left",
    "chance_alignment_left",
    "null_alignment_gaussian_left",
    "relative_update",
    "singular_value_*",
    "explained_variance_delta",
]
DARK = {
    "#ffffff": "#1e2129",
    kit.INK: "#e8eaed",
    kit.QUIET: "#a3acb8",
    kit.STYLE["grid.color"]: "#343a45",
    kit.COLORS[0]: "#56b4e9",
    kit.COLORS[1]: "#ff9560",
    kit.COLORS[2]: "#3fd6a6",
}
"""What becomes of each colour where the reader's system is dark; every picture brings its own background."""


def page_matrix() -> torch.Tensor:
    """The W of concepts.md, from the page's own lines."""
    torch.manual_seed(0)
    return torch.randn(64, 64) @ torch.diag(torch.linspace(3, 0.1, 64))


def updated(W: torch.Tensor, size: float) -> torch.Tensor:
    """W and the page's update, scaled to a share of the norm of W."""
    page_matrix()  # leaves the generator where the page draws its update
    update = torch.randn(64, 64)
    return W + update * (size * W.norm() / update.norm())


def subplots(across: int, width: float, height: float, **options: object) -> tuple[kit.Figure, list[kit.Axes]]:
    """Panels beside each other; small, so that text is readable on a phone."""
    figure, axes = kit.free_panels(1, across, (width, height), "", **options)
    figure.set_size_inches(width * across, height)
    return figure, list(axes[0])


def below(figure: kit.Figure, ax: kit.Axes, columns: int = 3) -> None:
    """One legend for all panels, outside of them."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)


def alignment() -> kit.Figure:
    """|⟨uᵢ, ũⱼ⟩| of the leading ten ranks under updates of three sizes."""
    W = page_matrix()
    U = specbasis.decompose(W, 10).U
    figure, axes = subplots(3, 1.7, 2.25, sharey=True)
    for ax, size in zip(axes, (0.01, 0.1, 0.4), strict=True):
        cosines = (U.T @ specbasis.decompose(updated(W, size), 10).U).abs()
        image = kit.heat(ax, cosines.numpy(), (0.5, 10.5, 10.5, 0.5), aspect="equal", interpolation="none")
        ax.set_title(f"update {100 * size:.0f} % of W\noverlap {cosines.square().sum() / 10:.3f}", size=8)
    squares(figure, axes, image, [1, 5, 10], "rank in W + Δ", "rank in W", "|cosine| of the left vectors")
    return figure


def squares(figure: kit.Figure, axes: Sequence[kit.Axes], image: Any, ticks: list[int], *labels: str) -> None:
    """Axes of square heat maps in a row, and their colour bar; labels: of x, of y, and of the colours."""
    for ax in axes:
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
        ax.set_xlabel(labels[0])
    axes[0].set_ylabel(labels[1])
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.05, aspect=40)
    bar.outline.set_visible(False)
    bar.set_label(labels[2], color=kit.QUIET)


def gap() -> kit.Figure:
    """How far every pair of W turned, beside the bound of the sin θ theorem."""
    W = page_matrix().double()
    base = specbasis.decompose(W)
    figure, (ax,) = subplots(1, 4.8, 3.1)
    for size, color in ((0.01, kit.COLORS[0]), (0.1, kit.COLORS[1])):
        matrix = updated(page_matrix(), size).double()
        tuned = specbasis.decompose(matrix)
        distance = (base.S[:, None] - tuned.S).abs().fill_diagonal_(torch.inf).min(1).values
        cosine = ((base.U * tuned.U).sum(0) + (base.Vh * tuned.Vh).sum(1)).abs() / 2
        sine = (1 - cosine.square()).clamp(min=0).sqrt()
        strength = torch.linalg.matrix_norm(matrix - W, 2)
        label = f"update {100 * size:.0f} % of W"
        ax.plot(distance / strength, sine, "o", ms=4, color=color, label=label)
    places = np.array([0.001, 1, 40])
    ax.plot(places, np.minimum(1, 1 / places), color=kit.QUIET, ls=kit.REFERENCE, label="bound ‖Δ‖₂ / gap")
    kit.logarithmic(ax, "x")
    kit.logarithmic(ax, "y")
    ax.set_xlabel("gap of the rank, in units of ‖Δ‖₂")
    ax.set_ylabel("sine of the turn")
    below(figure, ax)
    return figure


class Rows:
    """Quantiles over the feed-forward matrices of the demo's models, by rank."""

    def __init__(self) -> None:
        models = [f"{name}={path}" for name, path in (FINETUNES | {"independent": INDEPENDENT}).items()]
        compared = specbasis.compare(BASE, models, roles=["ffn"], measures=MEASURES, nulls=True)
        self.table = compared.to_pandas()

    def __call__(self, pair: str, measure: str, quantile: float = 0.5) -> np.ndarray:
        """One quantile of a measure of a pair, for each rank that it has; by default the median."""
        chosen = self.table[(self.table["pair"] == pair) & (self.table["measure"] == measure)]
        return chosen.groupby("index", dropna=False)["value"].quantile(quantile).to_numpy()


def home(rows: Rows) -> kit.Figure:
    """Alignment by rank of the demo's three models."""
    figure, (ax,) = subplots(1, 4.8, 2.9)
    labels = {"gentle": "shark, gentle", "strong": "tcr, strong", "independent": "antibody_4_1, independent"}
    ranks = np.arange(1, 129)
    for (pair, label), color, dash in zip(labels.items(), kit.COLORS, kit.DASHES, strict=False):
        low, middle, high = (rows(pair, "alignment_left", quantile) for quantile in (0.25, 0.5, 0.75))
        kit.band(ax, ranks, low, middle, high, color=color, label=label, dash=dash)
    kit.reference(ax, rows("gentle", "chance_alignment_left")[0], "chance")
    ax.set_xlabel("rank")
    ax.set_ylabel("alignment, left")
    ax.set_ylim(0, 1.03)
    kit.rank_axis(ax)
    below(figure, ax, 2)
    return figure


def nulls(rows: Rows) -> kit.Figure:
    """Alignment by rank of two finetunes, beside noise of the same size and chance."""
    figure, axes = subplots(2, 2.45, 2.6, sharey=True)
    for ax, name in zip(axes, FINETUNES, strict=True):
        ranks = np.arange(1, 61)
        size = rows(name, "relative_update")[0]
        ax.plot(ranks, rows(name, "alignment_left")[:60], color=kit.COLORS[0], label="finetune")
        noise = rows(name, "null_alignment_gaussian_left")[:60]
        ax.plot(ranks, noise, color=kit.COLORS[1], ls=kit.DASHES[1], label="noise of the same size")
        kit.reference(ax, rows(name, "chance_alignment_left")[0], "chance")
        ax.set_title(f"{name}: ‖Δ‖/‖W‖ = {size:.3f}", size=8)
        ax.set_xlabel("rank")
        ax.set_ylim(0, 1.03)
        kit.rank_axis(ax)
    axes[0].set_ylabel("alignment, left")
    below(figure, axes[0])
    return figure


def size(rows: Rows) -> kit.Figure:
    """Singular values of base and updates, and what a LoRA of each rank could hold of the updates."""
    figure, (values, share) = subplots(2, 2.45, 2.6)
    ranks = np.arange(1, 129)
    values.plot(ranks, rows("strong", "singular_value_base"), color=kit.QUIET, label="W")
    for name, color, dash in zip(FINETUNES, kit.COLORS, kit.DASHES, strict=False):
        values.plot(ranks, rows(name, "singular_value_delta"), color=color, ls=dash, label=f"Δ, {name}")
        share.plot(ranks, rows(name, "explained_variance_delta"), color=color, ls=dash)
    torch.manual_seed(0)
    energy = torch.linalg.svdvals(torch.randn(512, 128)).square()
    share.plot(ranks, (energy.cumsum(0) / energy.sum()).numpy(), color=kit.QUIET, ls=kit.REFERENCE)
    values.plot([], [], color=kit.QUIET, ls=kit.REFERENCE, label="noise")
    kit.logarithmic(values, "y")
    values.set_title("singular values", size=8)
    share.set_title("share of ‖Δ‖² in a LoRA", size=8)
    share.set_ylim(0, 1.03)
    values.set_xlabel("rank")
    share.set_xlabel("rank of the LoRA")
    for ax in (values, share):
        kit.rank_axis(ax)
    below(figure, values, 4)
    return figure


def adapter() -> kit.Figure:
    """Updates of a spectral adapter and of a LoRA with 64 numbers each, in the singular basis of W."""
    torch.manual_seed(0)
    W = torch.randn(16, 16, dtype=torch.float64)
    svd = specbasis.decompose(W)
    core = torch.randn(8, 8, dtype=torch.float64)
    lora = torch.randn(16, 2, dtype=torch.float64) @ torch.randn(2, 16, dtype=torch.float64)
    updates = {"adapter, [k, m) = [2, 10)": svd.U[:, 2:10] @ core @ svd.Vh[2:10], "LoRA of rank 2": lora}
    figure, axes = subplots(2, 2.4, 2.9, sharey=True)
    for ax, (name, update) in zip(axes, updates.items(), strict=True):
        coefficients = (svd.U.T @ update @ svd.Vh.T).abs()
        share = (coefficients / coefficients.max()).numpy()
        image = kit.heat(ax, share, (0.5, 16.5, 16.5, 0.5), aspect="equal", interpolation="none")
        ax.set_title(name, size=8)
    words = "right vector of W", "left vector of W", "|coefficient|, largest = 1"
    squares(figure, axes, image, [1, 4, 8, 12, 16], *words)
    return figure


def themed(svg: bytes) -> bytes:
    """A picture whose colours follow the light or dark scheme of the reader's system; places to a hundredth."""
    svg = re.sub(rb"(?<![\d.])[1-9]\d*\.\d{3,}", lambda number: b"%.2f" % float(number[0]), svg)
    rules = "".join(
        f'[style*="{what}: {light}"] {{{what}: {dark} !important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    return svg.replace(b"</style>", f"@media (prefers-color-scheme: dark) {{{rules}}}</style>".encode(), 1)


def write(folder: Path) -> None:
    """Write every picture into a folder."""
    import matplotlib

    folder.mkdir(exist_ok=True)
    measured = Rows()
    figures = {make.__name__: make for make in (alignment, gap, adapter)}
    figures |= {make.__name__: partial(make, measured) for make in (home, nulls, size)}
    with matplotlib.rc_context({"text.color": kit.INK}):
        for name, make in figures.items():
            (folder / f"{name}.svg").write_bytes(themed(dict(kit.render(name, make))[f"{name}.svg"]))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "pictures")
