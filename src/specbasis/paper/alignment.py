"""Fig. 2A–C, 8, 10, 11 and 18: alignment by rank and depth, of the attention projections, and against a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from specbasis.comparison.correlations import Correlation
from specbasis.comparison.population import DEPTHS
from specbasis.figures import kit
from specbasis.figures.data import SIDES
from specbasis.figures.kit import Axes, Figure
from specbasis.paper.material import (
    ALIGNED,
    NULL,
    Mask,
    Material,
    Model,
    Records,
    chance,
    chosen,
    curve,
    draw_mean,
    from_rank_one,
    mean,
    recipe,
    spread_name,
    thirds,
    title_of,
)

ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")


@recipe("Fig. 2A–C", "alignment by rank and depth (A, B, C)", *ALIGNED, *NULL)
def fig2(material: Material) -> tuple[Figure, Records]:
    """A, B: alignment of the leading 30 ranks, left and right; C: the same by depth; for each modality."""
    return _by_modality(material, "Alignment before and after finetuning, FFN matrices")


@recipe("Fig. 7", "EEG and fMRI", *ALIGNED, *NULL, modality=("EEG", "fMRI"))
def fig7(material: Material) -> tuple[Figure, Records]:
    """The same of EEG and fMRI models."""
    return _by_modality(material, "Alignment in EEG and fMRI models, FFN matrices")


def _by_modality(material: Material, title: str) -> tuple[Figure, Records]:
    figure, axes = kit.free_panels(len(material.groups), 3, (3.4, 2.5), title)
    table: Records = []
    for row, (modality, models) in zip(axes, material.groups.items(), strict=True):
        masks = [chosen(m, "ffn", material.notes) for m in models]
        for ax, side in zip(row, SIDES, strict=False):
            records = _alignment_panel(ax, models, masks, side, 30)
            table += [{"panel": "A, B", "modality": modality} | record for record in records]
            ax.set_title(title_of(modality, side))
        grid = _by_depth(models, masks, 30)
        image = kit.heat(row[2], grid, (0.5, grid.shape[1] + 0.5, 100.0, 0.0))
        row[2].set(xlabel="rank i", ylabel="depth (% of the blocks)", title=title_of(modality, "by depth"))
        figure.colorbar(image, ax=row[2], label="alignment")
        depths = (np.arange(len(grid)) + 0.5) / len(grid)
        table += [
            {"panel": "C", "modality": modality, "depth": float(depth), "rank": i + 1, "mean": float(value)}
            for depth, values in zip(depths, grid, strict=True)
            for i, value in enumerate(values)
        ]
        row[0].legend(fontsize=7, loc="lower left")  # what the band is differs between modalities
    return figure, table


def _alignment_panel(ax: Axes, models: Sequence[Model], masks: Sequence[Mask], side: str, ranks: int) -> Records:
    """Mean alignment by rank of one side: models as thin lines, their mean with its interval, chance, the null."""
    measure = f"alignment_{side}"
    width = max(1, min(ranks, max((m.pair.measure(measure).width for m in models), default=1)))
    values, null = (
        [curve(m, name, mask, width) for m, mask in zip(models, masks, strict=True)]
        for name in (measure, f"null_alignment_gaussian_{side}")
    )
    x = np.arange(1, width + 1, dtype=float)
    if len(models) > 1:
        for matrices in values:
            ax.plot(x, mean(matrices), color=kit.COLORS[0], lw=0.6, alpha=0.35)
    records = draw_mean(ax, models, values, kit.COLORS[0], f"mean, {spread_name(models)}")
    expected, level = mean(np.concatenate(null)), chance(models, side, masks)
    if np.isfinite(expected).any():
        ax.plot(x, expected, color=kit.COLORS[1], lw=1.4, ls=kit.DASHES[1], label="random update of the same size")
    kit.reference(ax, level, "independent directions", kit.DASHES[2])
    ax.set(ylim=(-0.02, 1.03), xlabel="rank i", ylabel="alignment |⟨base, tuned⟩|")
    from_rank_one(ax, width)
    return [
        {"side": side, "models": len(models)} | record | {"random_update": float(null), "chance": level}
        for record, null in zip(records, expected, strict=True)
    ]


def _by_depth(models: Sequence[Model], masks: Sequence[Mask], ranks: int) -> Any:
    """Mean alignment of both sides by relative depth (ten rows, or as many as the deepest stack has) and rank."""
    blocks = [[-1 if block is None else block for block in m.pair.matrices["block"]] for m in models]
    depths = [max(numbers, default=0) + 1 or 1 for numbers in blocks]
    rows, width = min(10, max(depths)), max(1, min(ranks, max(m.pair.vectors() for m in models)))
    layers = []
    for m, mask, numbers, depth in zip(models, masks, blocks, depths, strict=True):
        place = np.array([-1 if block < 0 else min(rows - 1, rows * block // depth) for block in numbers])
        both = [[curve(m, f"alignment_{side}", mask & (place == r), width) for side in SIDES] for r in range(rows)]
        layers.append([mean(np.concatenate(sides)) for sides in both])
    return mean(np.array(layers).reshape(len(models), -1)).reshape(rows, width)


@recipe("Fig. 8", "alignment over 200 ranks by depth", *ALIGNED)
def fig8(material: Material) -> tuple[Figure, Records]:
    """Alignment over 200 ranks by third of the depth, FFN matrices, left and right; for each modality."""
    title = "Alignment over broader ranges of ranks, FFN matrices"
    figure, axes = kit.free_panels(len(material.groups), 2, (4.2, 2.5), title)
    table: Records = []
    for row, (modality, models) in zip(axes, material.groups.items(), strict=True):
        masks = [chosen(m, "ffn", material.notes) for m in models]
        width = max(1, min(200, max(m.pair.vectors() for m in models)))
        for ax, side in zip(row, SIDES, strict=True):
            for d, depth in enumerate(DEPTHS):
                here = [(m, mask & (thirds(m) == d)) for m, mask in zip(models, masks, strict=True)]
                here = [(m, mask) for m, mask in here if mask.any()]
                if here:
                    values = [curve(m, f"alignment_{side}", mask, width) for m, mask in here]
                    records = draw_mean(ax, [m for m, _ in here], values, kit.COLORS[d], depth, kit.DASHES[d])
                    table += [{"modality": modality, "side": side, "depth": depth} | record for record in records]
            level = chance(models, side, masks)
            kit.reference(ax, level, f"independent directions ({level:.2f})", kit.DASHES[2])
            ax.set(ylim=(-0.02, 1.03), xlabel="rank i", ylabel="alignment", title=title_of(modality, side))
            from_rank_one(ax, width)
        row[0].legend(fontsize=7, title=f"bands: {spread_name(models)}", title_fontsize=7)
    return figure, table


@recipe("Fig. 10", "attention, vision", *ALIGNED, *NULL, modality=("vision",))
def fig10(material: Material) -> tuple[Figure, Records]:
    """Alignment of the attention projections of vision models."""
    return _attention(material)


@recipe("Fig. 11", "attention, language", *ALIGNED, *NULL, modality=("language",))
def fig11(material: Material) -> tuple[Figure, Records]:
    """Alignment of the attention projections of language models."""
    return _attention(material)


def _attention(material: Material) -> tuple[Figure, Records]:
    """Alignment of the query, key, value and output projections by rank, left above right."""
    groups = dict(material.groups)
    for modality, models in material.groups.items():
        if not any(chosen(m, role, material.notes).any() for m in models for role in ATTENTION):
            del groups[modality]
            names = ", ".join(m.name for m in models)
            material.notes.append(f"{names}: no attention projections, so not drawn")
    groups = groups or dict(material.groups)
    figure, axes = kit.free_panels(2 * len(groups), 4, (2.9, 2.3), "Alignment of the attention projections")
    table: Records = []
    for g, (modality, models) in enumerate(groups.items()):
        for s, side in enumerate(SIDES):
            for ax, role in zip(axes[2 * g + s], ATTENTION, strict=True):
                members = [(m, mask) for m in models if (mask := chosen(m, role, material.notes)).any()]
                ax.set_title(title_of(modality, f"{role.rpartition('.')[2]}, {side}"))
                if not members:
                    kit.nothing(ax, "no such matrix")
                    continue
                records = _alignment_panel(ax, [m for m, _ in members], [mask for _, mask in members], side, 200)
                table += [{"modality": modality, "role": role} | record for record in records]
        axes[2 * g][0].legend(fontsize=6, loc="lower left")  # what the band is differs between modalities
    return figure, table


@recipe("Fig. 18", "alignment against a score", *ALIGNED, scored=True)
def fig18(material: Material) -> tuple[Figure, Records]:
    """Correlation of alignment and score by depth and ranks; a dot where it survives BY, a ring where BH."""
    assert material.population is not None
    correlations = material.population.correlations
    groups = list(dict.fromkeys(c.modality for c in correlations)) or [""]
    figure, axes = kit.free_panels(len(groups), 2, (4.6, 2.5), "Alignment against score")
    for row, modality in zip(axes, groups, strict=True):
        for ax, method in zip(row, ("spearman", "pearson"), strict=True):
            cells = [c for c in correlations if (c.modality, c.method) == (modality, method)]
            figure.colorbar(_correlation_map(ax, cells), ax=ax, label="r")
            ax.set_title(title_of(modality, method))
            n = max((c.clusters for c in cells), default=0)
            tests = max((c.family for c in cells), default=0)
            for power in [p for p in material.population.power if p["clusters"] == n][:1]:
                text = f"range of ranks\n{n} {power['unit']}s: |r| ≥ {power['alone']:.2f} seen 4 times in 5; "
                text += f"≥ {power['family']:.2f} in {tests} tests"
                ax.set_xlabel(text, size=7, color=kit.QUIET)
    return figure, [asdict(c) for c in correlations]


def _correlation_map(ax: Axes, cells: Sequence[Correlation]) -> Any:
    """Correlations as numbers with their intervals and as colours, by depth and range of ranks."""
    ranks = list(dict.fromkeys(c.ranks for c in cells))
    grid = np.full((len(DEPTHS), max(1, len(ranks))), np.nan)
    texts = [[""] * len(ranks) for _ in DEPTHS]
    for c in cells:
        y, x = DEPTHS.index(c.depth), ranks.index(c.ranks)
        grid[y, x] = c.r
        sign = "●" if c.q_by < 0.05 else "○" if c.q_bh < 0.05 else ""
        texts[y][x] = f"{c.r:.2f}{sign}\n[{c.low:.2f}, {c.high:.2f}]" if math.isfinite(c.r) else "–"
    return kit.numbers(ax, grid, texts, DEPTHS, ranks, cmap="RdBu_r", vmin=-1)
