"""Fig. 3, 6, 16, 19, 20 and Tab. 4: size and spectra of the update, singular values, explained variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from specbasis.core.statistics import correlation, correlation_interval
from specbasis.figures import kit
from specbasis.figures.data import QUANTILES, SIDES, quantiles
from specbasis.figures.kit import Axes, Figure
from specbasis.figures.update import SCATTER_RANKS, spectrum
from specbasis.paper.material import (
    ALIGNED,
    DRAWS,
    ENOUGH,
    NULL,
    SIZE,
    SPECTRA,
    Floats,
    Material,
    Model,
    Records,
    chosen,
    last_ffn,
    mean_over,
    recipe,
    spread_name,
    title_of,
)

CHANGE = (
    "rsd",
    "mrc",
    "max_rc",
    "t1_rc",
    "tail_rc",
    "effective_rank_base",
    "effective_rank_tuned",
    "rounding_update?",
)


@recipe("Fig. 3A–C", "size and direction of the update", *ALIGNED, *SIZE, *SPECTRA, *NULL)
def fig3(material: Material) -> tuple[Figure, Records]:
    """A: update size against alignment at rank 1; B, C: spectra of a small and of a large but aligned update."""
    figure, axes = kit.free_panels(1, 4, (3.3, 2.9), "Size and direction of the update, FFN matrices")
    table, dots = _scatters(material, [(ax, 1, side, "A, ") for ax, side in zip(axes[0], SIDES, strict=False)])
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
    places = [(axes[s, r], rank, side, "") for s, side in enumerate(SIDES) for r, rank in enumerate(SCATTER_RANKS)]
    table, dots = _scatters(material, places)
    if dots is not None:
        figure.colorbar(dots, ax=axes, label="alignment of the update", shrink=0.6)
    return figure, table


def _scatters(material: Material, places: Sequence[tuple[Axes, int, str, str]]) -> tuple[Records, Any]:
    """A panel for each rank and side, with what its title begins with; records, and dots for a scale of colours."""
    table: Records = []
    dots = None
    for ax, rank, side, begin in places:
        points = _points(material, rank, side)
        dots = _scatter(ax, points) or dots
        ax.set_title(f"{begin}rank {rank}, {side}")
        table += points
    return table, dots


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
        text = f"Spearman {rho:.2f} [{low:.2f}, {high:.2f}]"
        ax.text(0.02, 0.03, text, transform=ax.transAxes, size=7, color=kit.QUIET)
    return dots


@recipe("Fig. 6", "relative change of singular values", "singular_value_change", "rounding_update?")
def fig6(material: Material) -> tuple[Figure, Records]:
    """Relative change of singular values by relative rank: each model's median over matrices, and their mean."""
    figure, axes = kit.free_panels(1, len(material.groups), (4.2, 2.9), "Relative change of singular values")
    shown = QUANTILES * 100
    table: Records = []
    for ax, (modality, models) in zip(axes[0], material.groups.items(), strict=True):
        changes = [100 * m.pair.measure("singular_value_change").at_quantiles(m.pair.sizes) for m in models]
        medians = [np.array(quantiles(values, (0.5,))) for values in changes]
        for i, (m, (median,)) in enumerate(zip(models, medians, strict=True)):
            ax.plot(shown, median, color=kit.COLORS[i % 8], lw=1.2, label=kit.ending(m.name, 40))
            table += [
                {"modality": modality, "pair": m.name, "quantile": float(q), "median_change_percent": float(v)}
                for q, v in zip(QUANTILES, median, strict=True)
            ]
        low, _, high = mean_over(models, changes if len(models) < ENOUGH else medians)
        ax.fill_between(shown, low, high, color=kit.QUIET, alpha=0.15, lw=0, label=spread_name(models))
        rounding = [m.pair.whole("rounding_update") for m in models]
        level = 100 * max([float(np.nanmedian(r)) for r in rounding if np.isfinite(r).any()] + [0.0])
        ax.axhspan(-level, level, color=kit.COLORS[1], alpha=0.2, lw=0, label=f"storage rounding (±{level:.1g} %)")
        ax.axhline(0, color=kit.QUIET, lw=0.8)
        body = np.abs(np.concatenate([median[0][shown < 95] for median in medians] + [np.zeros(1)]))
        edge = max(1.15 * float(np.max(body[np.isfinite(body)])), 1e-6)
        ax.set(ylim=(-edge, edge), xlabel="relative rank (%, largest first)", ylabel="change (%)")
        ax.set_title(title_of(modality, "all matrices"))
        if len(models) <= 8:
            ax.legend(fontsize=6)
    return figure, table


@recipe("Fig. 16", "explained variance of the last block", "explained_variance_base", "explained_variance_tuned")
def fig16(material: Material) -> tuple[Figure, Records]:
    """Explained variance of the FFN matrices of the last block, up and down: by relative rank, and of 200 ranks."""
    figure, axes = kit.free_panels(2, 2, (4.2, 2.6), "Explained variance, FFN matrices of the last block")
    table: Records = []
    for column, (name, ends) in zip(
        axes.T, {"up": ("up", "gate", "other"), "down": ("down",)}.items(), strict=True
    ):
        matrices = [
            (m, i)
            for m in material.models
            for i in last_ffn(m, material.notes)
            if str(m.pair.matrices["role"][i]).rpartition(".")[2] in ends
        ]
        for n, (m, i) in enumerate(matrices):
            table += _variance(column, m, i, kit.COLORS[n % 8])
        column[0].set(
            title=f"{name}: by relative rank", xlabel="relative rank (%)", ylabel="explained variance (%)"
        )
        column[1].set(title=f"{name}: leading ranks", xlabel="number of ranks", ylabel="explained variance (%)")
        column[1].set_xlim(1, 200)
        text = "solid tuned, dotted base, dashed random entries"
        if 0 < len(matrices) <= 8:
            column[0].legend(fontsize=6, title=text, title_fontsize=6)
        elif matrices:
            text = f"{len(matrices)} matrices: {text}"
            column[0].text(0.98, 0.03, text, transform=column[0].transAxes, size=6, ha="right")
    return figure, table


def _variance(axes: tuple[Axes, Axes], model: Model, matrix: int, color: str) -> Records:
    """One matrix by relative rank and by number of ranks, and random entries of its shape."""
    table: Records = []
    pair = model.pair
    for which, dash in (("tuned", kit.DASHES[0]), ("base", kit.DASHES[2])):
        x, share, _ = pair.measure(f"explained_variance_{which}").of(matrix)
        label = kit.ending(model.name, 30) if which == "tuned" else None
        axes[0].plot(100 * x / len(x), 100 * share, color=color, ls=dash, lw=1.3, label=label)
        axes[1].plot(x[:200], 100 * share[:200], color=color, ls=dash, lw=1.3)
        table += [
            {"pair": model.name, "matrix": pair.matrices["name"][matrix], "which": which, "rank": int(k)}
            | {"explained": float(share[k - 1]), "of": len(x)}
            for k in (1, 10, 30, 100, 200, math.ceil(0.6 * len(x)), len(x))
            if k <= len(x)
        ]
    short, long = sorted((pair.matrices["out"][matrix], pair.matrices["in"][matrix]))
    q, null = random_variance(short, long)
    axes[0].plot(100 * q, 100 * null, color=kit.QUIET, lw=0.9, ls=kit.DASHES[1], zorder=1)
    axes[1].plot(q * short, 100 * null, color=kit.QUIET, lw=0.9, ls=kit.DASHES[1], zorder=1)
    return table


def random_variance(n: int, m: int) -> tuple[Floats, Floats]:
    """(relative rank, explained variance) of a large n × m matrix of independent entries, n ≤ m.

    The top share of the Marchenko–Pastur law with ratio n/m. Source: Marchenko & Pastur 1967.
    """
    from scipy.integrate import cumulative_trapezoid

    c = n / m
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    # λ = middle + half·cos t takes the square roots out of the density.
    t = np.linspace(0, math.pi, 4001)
    value = (low + high) / 2 + (high - low) / 2 * np.cos(t)
    density = np.sin(t) ** 2 / np.maximum(value, 1e-12)
    ranks, energy = (cumulative_trapezoid(f, t, initial=0) for f in (density, density * value))
    return ranks / ranks[-1], energy / energy[-1]


@recipe("Fig. 20", "spectra of base and of the update", *SPECTRA, "singular_value_ratio", "norm_delta")
def fig20(material: Material) -> tuple[Figure, Records]:
    """Singular values of base and of the update, FFN matrices of the last block, one panel for each model."""
    shown = material.models[:12]
    if len(material.models) > len(shown):
        material.notes.append(f"the first {len(shown)} of {len(material.models)} models are drawn")
    across = min(4, len(shown))
    title = "Spectra of base and of the update; dotted: S₁ of random entries of its norm"
    figure, axes = kit.free_panels(math.ceil(len(shown) / across), across, (3.1, 2.5), title)
    table: Records = []
    kit.hide(axes, len(shown))
    for ax, m in zip(axes.flat, shown, strict=False):
        for color, i in zip(kit.COLORS, last_ffn(m, material.notes)[:2], strict=False):
            role = m.pair.matrices["role"][i].rpartition(".")[2]
            for which, name, dash in (("base", "base", "-"), ("delta", "update", (0, (4, 2)))):
                x, value, _ = m.pair.measure(f"singular_value_{which}").of(i)
                look = {"color": color, "ls": dash, "lw": 1.3, "label": f"{role}, {name}"}
                ax.plot(x[value > 0], value[value > 0], **look)
            out, width = m.pair.matrices["out"][i], m.pair.matrices["in"][i]
            size = m.pair.whole("norm_delta")[i]
            # The largest singular value of random entries with the update's norm.
            noise = size * (math.sqrt(out) + math.sqrt(width)) / math.sqrt(out * width)
            if size > 0:
                ax.axhline(noise, color=color, lw=0.7, ls=kit.DASHES[2])
            ratio = m.pair.at_rank("singular_value_ratio", 1)[i]
            table.append(
                {"pair": m.name, "matrix": m.pair.matrices["name"][i], "ratio_rank_1": float(ratio)}
                | {"relative_update": float(m.pair.whole("relative_update")[i]), "random_update_s1": float(noise)}
            )
        kit.logarithmic(ax, "y")
        ax.set(xlabel="rank i", ylabel="singular value")
        ax.set_title(kit.ending(m.name, 36), size=8)
        ax.legend(fontsize=6)
    return figure, table


@recipe("Tab. 4", "change of the spectrum of the last block", *CHANGE, is_table=True)
def tab4(material: Material) -> tuple[None, Records]:
    """Change of the spectrum of the FFN matrices of the last block, with what size and rounding would give."""
    table: Records = []
    measures = {"MRC": "mrc", "MaxRC": "max_rc", "T1RC": "t1_rc", "TailRC": "tail_rc"}
    for m in material.models:
        facts = {f["matrix"]: f for f in m.member.comparison.facts[m.member.pair].matrices}
        for i in last_ffn(m, material.notes):
            f = facts[m.pair.matrices["name"][i]]
            before, after = (f.get(f"effective_rank_{side}", math.nan) for side in ("base", "tuned"))
            root = math.sqrt(max(f["out"], f["in"]))
            table.append(
                {
                    "model": m.name,
                    "modality": m.member.modality,
                    "layer": f"{m.pair.matrices['stack'][i]} {f['role']}".strip(),
                    "n_sv": min(f["out"], f["in"]),
                    "RSD": f.get("rsd", math.nan),
                    # First order: u_iᵀ Δ v_i of independent entries has the variance ‖Δ‖²/(out·in).
                    "RSD random update": f["relative_update"] / root,
                    "RSD rounding": f.get("rounding_update", math.nan) / root,
                    **{heading: f.get(name, math.nan) for heading, name in measures.items()},
                    "ER pre": before,
                    "ER ft": after,
                    "ΔER": after - before,
                    "‖Δ‖/‖W‖": f["relative_update"],
                }
            )
    return None, table
