"""Figures 2A–C, 3, 6, 8, 10, 11, 16, 18, 19, 20 and Tab. 4 of Yu et al. 2026, from the rows of comparisons.

A recipe is data: what the figure shows, which measures it reads, and the function that draws it. Each figure
carries what chance, or a random update, would give, and an interval: over bases with all their finetunes, or over
the finetunes of few bases, where there are `ENOUGH`; else the quartiles over matrices. Beside the picture stands a
table of what is drawn.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from specbasis.comparison.comparison import Comparison
from specbasis.comparison.population import DEPTHS, Correlation, Member, Population, gather, population, units
from specbasis.core.errors import InputError
from specbasis.figures.data import QUANTILES, SIDES, Pair, read_pairs
from specbasis.jobs.folder import plain
from specbasis.paper.zoo import zoo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 5
"""Fewer bases, and fewer finetunes, than this give no interval over models."""

DRAWS = 500

Floats = NDArray[np.float64]
Table = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Model:
    """One pair: where it stands in the population, and its rows as arrays."""

    member: Member
    pair: Pair

    @property
    def name(self) -> str:
        """What the figures call it."""
        return self.member.name


@dataclass(frozen=True, eq=False)
class Material:
    """What a figure is drawn from.

    Attributes:
        groups: modality → models; one without a name where none is said.
        population: the same with scores, where a figure asks for them.
        notes: what had to be left out; each drawing may add to it.
    """

    groups: Mapping[str, Sequence[Model]]
    population: Population | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[Model]:
        """All models."""
        return [model for group in self.groups.values() for model in group]


@dataclass(frozen=True)
class Recipe:
    """One figure or table of the paper.

    Attributes:
        name: as `specbasis reproduce NAME`.
        title: what it shows.
        source: where in the paper.
        measures: what it reads; one that ends with "?" is drawn where it is there.
        draw: what makes the figure and its table.
        scored: whether it needs a score for each model.
        modality: draw only this modality where models have one.
    """

    name: str
    title: str
    source: str
    measures: tuple[str, ...]
    draw: Callable[[Material], tuple[Figure | None, Table]]
    scored: bool = False
    modality: str = ""

    @property
    def command(self) -> str:
        """The comparison that gives all that it reads."""
        nulls = " --nulls" if any(m.startswith("null") for m in self.measures) else ""
        return f"specbasis compare BASE TUNED --out DIR{nulls}"


@dataclass(frozen=True)
class Drawn:
    """What a recipe made: its files, and what to know about them."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]
    table: Table


def reproduce(
    name: str,
    results: Sequence[str | Path | Comparison],
    out: str | Path,
    *,
    modality: Mapping[str, str] | None = None,
    scores: Mapping[str, float] | None = None,
) -> Drawn:
    """Draw one figure of the paper from the rows of some comparisons.

    Args:
        name: of a recipe in `RECIPES`.
        results: results folders or comparisons, each with one or many pairs.
        out: folder for NAME.png, NAME.svg, NAME.csv (what is drawn) and NAME.json (sources and notes).
        modality: pair or folder → modality; pairs of the paper's zoo have theirs.
        scores: pair → score; those that the paper prints where its own pairs have none.

    Raises:
        InputError: no such figure, rows lack a measure that it reads, or a figure of scores got none.
    """
    recipe = next((r for r in RECIPES if r.name == name), None)
    if recipe is None:
        raise InputError(f"no figure {name!r}; there is: {', '.join(r.name for r in RECIPES)}")
    known = _of_the_zoo()
    members = [
        m if m.modality or m.pair not in known else Member(m.name, m.pair, m.comparison, known[m.pair][0])
        for m in gather(results, modality or {})
    ]
    if recipe.modality and any(m.modality == recipe.modality for m in members):
        members = [m for m in members if m.modality == recipe.modality]
    whole = None
    if recipe.scored:
        printed = {m.name: known[m.pair][1] for m in members if m.pair in known}
        given = {n: s for n, s in printed.items() if s is not None} | dict(scores or {})
        whole = population(results, scores=given, score="score", modality={m.name: m.modality for m in members})
    groups: dict[str, list[Model]] = {}
    for m in members:
        groups.setdefault(m.modality, []).append(Model(m, read_pairs(m.comparison.rows, [m.pair])[0]))
    material = Material(groups, whole)
    _require(recipe, material)
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("figures need matplotlib: pip install 'specbasis[report]'") from error
    from specbasis.figures.figures import STYLE

    with matplotlib.rc_context(STYLE), np.errstate(invalid="ignore"):
        figure, table = recipe.draw(material)
    return _write(recipe, material, figure, table, Path(out))


def _of_the_zoo() -> dict[str, tuple[str, float | None]]:
    """Label of a finetuned model of the paper → its modality and the score that the paper prints."""
    found = {}
    for entry in zoo().pairs:
        for label in (entry.name, entry.tuned.rpartition("/")[2], entry.tuned):
            found[label] = (entry.modality, entry.accuracy)
    return found


def _require(recipe: Recipe, material: Material) -> None:
    for model in material.models:
        missing = [
            m for m in recipe.measures if not m.endswith("?") and m not in model.pair.series and len(model.pair)
        ]
        if missing and model.member.comparison.verdicts[model.member.pair].kind != "identical":
            raise InputError(
                f"{recipe.name}: {model.name} has no rows of {', '.join(missing)}; {recipe.command} gives them"
            )
        optional = [m[:-1] for m in recipe.measures if m.endswith("?") and m[:-1] not in model.pair.series]
        if optional:
            material.notes.append(
                f"{model.name}: no {optional[0].rsplit('_', 1)[0]}, so not drawn; {recipe.command} gives it"
            )


def _write(recipe: Recipe, material: Material, figure: Figure | None, table: Table, out: Path) -> Drawn:
    files: dict[str, bytes] = {}
    if figure is not None:
        from specbasis.figures.figures import render

        drawn = figure
        files.update(render(recipe.name, lambda: drawn))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for line in table for k in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in table)
    files[f"{recipe.name}.csv"] = text.getvalue().encode()
    if figure is None:
        files[f"{recipe.name}.md"] = _markdown(table).encode()
    about = {
        "figure": recipe.name,
        "title": recipe.title,
        "source": recipe.source,
        "measures": recipe.measures,
        "notes": list(dict.fromkeys(material.notes)),
        "models": [
            {
                "pair": m.name,
                "modality": m.member.modality,
                "base": m.member.base,
                "tuned": m.member.comparison.manifest["pairs"][m.member.pair]["tuned"]["sha256"],
                "verdict": m.member.comparison.verdicts[m.member.pair].kind,
            }
            for m in material.models
        ],
    }
    files[f"{recipe.name}.json"] = (json.dumps(plain(about), indent=1, ensure_ascii=False) + "\n").encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another place") from error
    return Drawn(tuple(out / name for name in files), tuple(dict.fromkeys(material.notes)), table)


def _markdown(table: Table) -> str:
    if not table:
        return "nothing\n"
    heads = list(table[0])

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(text(line.get(head, "")) for head in heads) for line in table]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


# --- what figures are made of -----------------------------------------------------------------------------------


def _chosen(model: Model, role: str, notes: list[str]) -> NDArray[np.bool_]:
    """The matrices of a role inside of the blocks; all in the blocks, with a note, where a model has none of it."""
    roles, blocks = model.pair.matrices["role"], model.pair.matrices["block"]
    inside = np.array([block is not None for block in blocks], bool)
    mask = inside & np.array([r == role or r.startswith(role + ".") for r in roles], bool)
    if role == "ffn" and not mask.any():
        notes.append(f"{model.name}: no matrix has the role {role}; all matrices of its blocks are drawn")
        mask = inside if inside.any() else np.ones(len(roles), bool)
    return np.asarray(mask)


def _thirds(model: Model) -> NDArray[np.int64]:
    """Third of its stack in which each matrix is; −1 outside of the blocks."""
    stacks, blocks = model.pair.matrices["stack"], model.pair.matrices["block"]
    last: dict[str, int] = {}
    for stack, block in zip(stacks, blocks, strict=True):
        if block is not None:
            last[stack] = max(last.get(stack, 0), block)
    n = len(DEPTHS)
    return np.array(
        [
            -1 if block is None else min(n - 1, n * block // (last[stack] + 1))
            for stack, block in zip(stacks, blocks, strict=True)
        ]
    )


def _curve(model: Model, measure: str, mask: NDArray[np.bool_], width: int) -> Floats:
    """(matrices, ranks) resolved figures of some matrices."""
    return np.asarray(model.pair.figures(measure).dense(width)[mask])


def _over(models: Sequence[Model], each: Sequence[Floats]) -> tuple[Floats, Floats, Floats]:
    """(middle, low, high) down the columns: mean over models and its bootstrap, or quartiles over matrices.

    ``each`` has for every model its (matrices, places).
    """
    means = np.array([_mean(values) for values in each])
    _, of = _units(models)
    if of.max(initial=-1) + 1 >= ENOUGH:
        rng = np.random.default_rng(0)
        members = [np.flatnonzero(of == c) for c in range(of.max() + 1)]
        drawn = [
            _mean(means[np.concatenate([members[c] for c in rng.integers(0, len(members), len(members))])])
            for _ in range(DRAWS)
        ]
        low, high = _quantiles(np.array(drawn), (0.025, 0.975))
    else:
        low, high = _quantiles(np.concatenate(list(each)), (0.25, 0.75))
    return _mean(means), low, high


def _mean(values: Floats) -> Floats:
    """Mean down the columns over what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(0)
    total = np.where(finite, values, 0.0).sum(0)
    return np.asarray(np.divide(total, count, out=np.full(values.shape[1], np.nan), where=count > 0))


def _quantiles(values: Floats, at: Sequence[float]) -> list[Floats]:
    columns = [column[np.isfinite(column)] for column in values.T]
    return [np.array([np.quantile(c, q) if len(c) else np.nan for c in columns]) for q in at]


def _spread_name(models: Sequence[Model]) -> str:
    unit, of = _units(models)
    n = int(of.max(initial=-1)) + 1
    return f"95 % over {n} {unit}s" if n >= ENOUGH else "quartiles over matrices"


def _units(models: Sequence[Model]) -> tuple[str, NDArray[Any]]:
    return units([m.name for m in models], {m.name: m.member.base for m in models})


def _level(models: Sequence[Model], side: str, masks: Sequence[NDArray[np.bool_]]) -> float:
    """Mean chance alignment."""
    levels = [m.pair.whole(f"chance_alignment_{side}")[mask] for m, mask in zip(models, masks, strict=True)]
    return float(np.nanmean(np.concatenate(levels))) if levels else math.nan


def _panels(down: int, across: int, title: str, size: tuple[float, float] = (3.4, 2.5)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * across, size[1] * down + 0.5), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=10)
    return figure, figure.subplots(down, across, squeeze=False)


def _title(modality: str, text: str) -> str:
    return f"{modality}: {text}" if modality else text


def _draw_curve(
    ax: Any, x: Floats, found: tuple[Floats, Floats, Floats], color: str, label: str, dash: Any = "-"
) -> None:
    middle, low, high = found
    ax.fill_between(x, low, high, color=color, alpha=0.16, lw=0)
    ax.plot(x, middle, color=color, lw=1.7, ls=dash, label=label, marker="o" if len(x) < 3 else None)


def _rank_axis(ax: Any, last: int) -> None:
    from specbasis.figures.figures import _from_one

    ax.set_xlim(1, max(last, 2))
    _from_one(ax)


def _logarithmic(ax: Any, which: str) -> None:
    """A logarithmic axis whose ticks are plain characters: a figure's text is never read as a formula."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from specbasis.figures.figures import _power

    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(_power))
    axis.set_minor_formatter(NullFormatter())


def _alignment_panel(
    ax: Any,
    models: Sequence[Model],
    masks: Sequence[NDArray[np.bool_]],
    side: str,
    ranks: int,
    table: Table,
    about: dict[str, Any],
) -> None:
    """Mean alignment by rank of one side: models as thin lines, their mean with its interval, chance, the null."""
    from specbasis.figures.figures import COLORS, QUIET

    last = max((int(m.pair.figures(f"alignment_{side}").lengths.max(initial=0)) for m in models), default=1)
    width = max(1, min(ranks, last))
    x = np.arange(1, width + 1, dtype=float)
    each = [_curve(m, f"alignment_{side}", mask, width) for m, mask in zip(models, masks, strict=True)]
    found = _over(models, each)
    if len(models) > 1:
        for values in each:
            ax.plot(x, _mean(values), color=COLORS[0], lw=0.6, alpha=0.35)
    _draw_curve(ax, x, found, COLORS[0], f"mean, {_spread_name(models)}")
    null = [
        _curve(m, f"null_alignment_gaussian_{side}", mask, width) for m, mask in zip(models, masks, strict=True)
    ]
    expected = _mean(np.concatenate(null))
    if np.isfinite(expected).any():
        ax.plot(x, expected, color=COLORS[1], lw=1.4, ls=(0, (5, 2)), label="random update of the same size")
    chance = _level(models, side, masks)
    ax.axhline(chance, color=QUIET, lw=0.9, ls=(0, (1, 1.5)), label="independent directions")
    ax.set(ylim=(-0.02, 1.03), xlabel="rank i", ylabel="alignment |⟨base, tuned⟩|")
    _rank_axis(ax, width)
    for i in range(width):
        table.append(
            about
            | {"side": side, "rank": i + 1, "models": len(models), "mean": float(found[0][i])}
            | {"low": float(found[1][i]), "high": float(found[2][i])}
            | {"random_update": float(expected[i]), "chance": chance}
        )


# --- the figures ------------------------------------------------------------------------------------------------


def figure2(material: Material) -> tuple[Figure, Table]:
    """A, B: alignment of the leading 30 ranks, left and right; C: the same by depth; for each modality."""
    figure, axes = _panels(len(material.groups), 3, "Alignment before and after finetuning, FFN matrices")
    table: Table = []
    for row, (modality, models) in zip(axes, material.groups.items(), strict=True):
        masks = [_chosen(m, "ffn", material.notes) for m in models]
        for ax, side in zip(row, SIDES, strict=False):
            _alignment_panel(ax, models, masks, side, 30, table, {"panel": "A, B", "modality": modality})
            ax.set_title(_title(modality, side))
        _heat(figure, row[2], models, masks, 30, modality, table)
        row[0].legend(fontsize=7, loc="lower left")  # what the band is differs between modalities
    return figure, table


def _heat(
    figure: Any,
    ax: Any,
    models: Sequence[Model],
    masks: Sequence[NDArray[np.bool_]],
    ranks: int,
    modality: str,
    table: Table,
) -> None:
    """Mean alignment of both sides by relative depth (ten rows, or as many as the deepest stack has) and rank."""
    depths = []
    for m in models:
        blocks = [block for block in m.pair.matrices["block"] if block is not None]
        depths.append(max(blocks, default=0) + 1)
    rows = min(10, max(depths))
    width = max(1, min(ranks, max(m.pair.vectors() for m in models)))
    layers = []
    for m, mask, deep in zip(models, masks, depths, strict=True):
        place = np.array([-1 if b is None else min(rows - 1, rows * b // deep) for b in m.pair.matrices["block"]])
        by_row = []
        for r in range(rows):
            here = mask & (place == r)
            sides = [_curve(m, f"alignment_{side}", here, width) for side in SIDES]
            by_row.append(_mean(np.concatenate(sides)) if here.any() else np.full(width, np.nan))
        layers.append(np.array(by_row))
    grid = _mean(np.array(layers).reshape(len(models), -1)).reshape(rows, width)
    ax.grid(False)
    ax.set_facecolor("#c9ced6")
    extent = (0.5, width + 0.5, 100.0, 0.0)
    image = ax.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    ax.set(xlabel="rank i", ylabel="depth (% of the blocks)", title=_title(modality, "by depth"))
    figure.colorbar(image, ax=ax, label="alignment")
    table += [
        {"panel": "C", "modality": modality, "depth": (r + 0.5) / rows, "rank": i + 1, "mean": float(grid[r, i])}
        for r in range(rows)
        for i in range(width)
    ]


def figure8(material: Material) -> tuple[Figure, Table]:
    """Alignment over 200 ranks by third of the depth, FFN matrices, left and right; for each modality."""
    from specbasis.figures.figures import COLORS, DASHES, QUIET

    figure, axes = _panels(
        len(material.groups), 2, "Alignment over broader ranges of ranks, FFN matrices", (4.2, 2.5)
    )
    table: Table = []
    for row, (modality, models) in zip(axes, material.groups.items(), strict=True):
        masks = [_chosen(m, "ffn", material.notes) for m in models]
        width = max(1, min(200, max(m.pair.vectors() for m in models)))
        x = np.arange(1, width + 1, dtype=float)
        for ax, side in zip(row, SIDES, strict=True):
            for d, depth in enumerate(DEPTHS):
                here = [mask & (_thirds(m) == d) for m, mask in zip(models, masks, strict=True)]
                some = [(m, mask) for m, mask in zip(models, here, strict=True) if mask.any()]
                if not some:
                    continue
                each = [_curve(m, f"alignment_{side}", mask, width) for m, mask in some]
                found = _over([m for m, _ in some], each)
                _draw_curve(ax, x, found, COLORS[d], depth, DASHES[d])
                table += [
                    {"modality": modality, "side": side, "depth": depth, "rank": i + 1}
                    | {"mean": float(found[0][i]), "low": float(found[1][i]), "high": float(found[2][i])}
                    for i in range(width)
                ]
            chance = _level(models, side, masks)
            ax.axhline(
                chance, color=QUIET, lw=0.9, ls=(0, (1, 1.5)), label=f"independent directions ({chance:.2f})"
            )
            ax.set(ylim=(-0.02, 1.03), xlabel="rank i", ylabel="alignment", title=_title(modality, side))
            _rank_axis(ax, width)
        row[0].legend(fontsize=7, title=f"bands: {_spread_name(models)}", title_fontsize=7)
    return figure, table


ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")


def attention(material: Material) -> tuple[Figure, Table]:
    """Alignment of the query, key, value and output projections by rank, left above right."""
    groups: dict[str, Sequence[Model]] = {}
    for modality, models in material.groups.items():
        if any(_chosen(m, role, material.notes).any() for m in models for role in ATTENTION):
            groups[modality] = models
        else:
            names = ", ".join(m.name for m in models)
            material.notes.append(f"{names}: no attention projections, so not drawn")
    groups = groups or dict(material.groups)
    figure, axes = _panels(2 * len(groups), 4, "Alignment of the attention projections", (2.9, 2.3))
    table: Table = []
    for g, (modality, models) in enumerate(groups.items()):
        for s, side in enumerate(SIDES):
            for ax, role in zip(axes[2 * g + s], ATTENTION, strict=True):
                some = [(m, mask) for m in models if (mask := _chosen(m, role, material.notes)).any()]
                ax.set_title(_title(modality, f"{role.rpartition('.')[2]}, {side}"))
                if not some:
                    ax.text(0.5, 0.5, "no such matrix", ha="center", transform=ax.transAxes)
                    continue
                about = {"modality": modality, "role": role}
                _alignment_panel(ax, [m for m, _ in some], [k for _, k in some], side, 200, table, about)
        axes[2 * g][0].legend(fontsize=6, loc="lower left")  # what the band is differs between modalities
    return figure, table


def _points(material: Material, rank: int, side: str) -> Table:
    """One line for each matrix that has an update at a rank."""
    found: Table = []
    for m in material.models:
        mask = _chosen(m, "ffn", material.notes)
        figures = {
            "ratio": m.pair.at_rank("singular_value_ratio", rank),
            "alignment": m.pair.at_rank(f"alignment_{side}", rank),
            "update_alignment": m.pair.at_rank(f"update_alignment_{side}", rank),
            "chance": m.pair.whole(f"chance_alignment_{side}"),
            "random_update": m.pair.at_rank(f"null_alignment_gaussian_{side}", rank),
        }
        for i in np.flatnonzero(mask):
            line = {name: float(values[i]) for name, values in figures.items()}
            if math.isfinite(line["ratio"]) and line["ratio"] > 0 and math.isfinite(line["alignment"]):
                about = {"pair": m.name, "base": m.member.base, "modality": m.member.modality}
                found.append(about | {"matrix": m.pair.matrices["name"][i], "rank": rank, "side": side, **line})
    return found


def _scatter(ax: Any, points: Table) -> Any:
    """Size of the update against alignment, colour the alignment of the update, with Spearman and its interval."""
    from specbasis.figures.figures import COLORS, QUIET

    if not points:
        ax.text(0.5, 0.5, "no update here", ha="center", transform=ax.transAxes, color=QUIET)
        return None
    x, y, c, null = (
        np.array([p[key] for p in points]) for key in ("ratio", "alignment", "update_alignment", "random_update")
    )
    _logarithmic(ax, "x")
    have = np.isfinite(null)
    ax.scatter(
        x[have], null[have], marker="_", color=COLORS[1], s=14, lw=0.9, label="random update of the same size"
    )
    dots = ax.scatter(x, y, c=c, cmap="cividis", vmin=0, vmax=1, edgecolor="#1b1f24", linewidth=0.4, s=15)
    level = float(np.mean([p["chance"] for p in points]))
    ax.axhline(level, color=QUIET, lw=0.9, ls=(0, (1, 1.5)), label="independent directions")
    ax.set(ylim=(-0.03, 1.05), xlabel="size of the update S_i(Δ)/S_i(base)", ylabel="alignment")
    rho, low, high = _spearman(points)
    if math.isfinite(rho):
        told = f"Spearman {rho:.2f} [{low:.2f}, {high:.2f}]"
        ax.text(0.02, 0.03, told, transform=ax.transAxes, size=7, color=QUIET)
    return dots


def _spearman(points: Table) -> tuple[float, float, float]:
    """Rank correlation of size and alignment, and an interval that draws whole models."""
    from scipy.stats import rankdata

    pairs = sorted({p["pair"] for p in points})
    members = [np.array([i for i, p in enumerate(points) if p["pair"] == name]) for name in pairs]
    x, y = (np.array([p[key] for p in points]) for key in ("ratio", "alignment"))

    def rho(at: NDArray[Any]) -> float:
        a, b = rankdata(x[at]), rankdata(y[at])
        return float(np.corrcoef(a, b)[0, 1]) if len(at) > 2 and np.ptp(a) and np.ptp(b) else math.nan

    rng = np.random.default_rng(0)
    # A single model has no other to be drawn instead: its matrices are drawn.
    units = members if len(members) >= ENOUGH else [np.array([i]) for i in range(len(points))]
    drawn = [rho(np.concatenate([units[k] for k in rng.integers(0, len(units), len(units))])) for _ in range(DRAWS)]
    finite = [d for d in drawn if math.isfinite(d)]
    low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) > DRAWS // 2 else (math.nan, math.nan)
    return rho(np.arange(len(points))), float(low), float(high)


def figure3(material: Material) -> tuple[Figure, Table]:
    """A: update size against alignment at rank 1; B, C: spectra of a small and of a large but aligned update."""
    from specbasis.figures.figures import COLORS, DASHES

    figure, axes = _panels(1, 4, "Size and direction of the update, FFN matrices", (3.3, 2.9))
    table: Table = []
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
        model = next(m for m in material.models if m.name == point["pair"])
        at = model.pair.matrices["name"].index(point["matrix"])
        for i, which in enumerate(("base", "tuned", "delta")):
            series = model.pair.figures(f"singular_value_{which}")
            part = slice(series.start[at], series.start[at + 1])
            value = series.value[part]
            shown = value > 0
            label = "update Δ" if which == "delta" else which
            x = series.index[part][shown] + 1
            ax.plot(x, value[shown], color=COLORS[(0, 1, 6)[i]], ls=DASHES[i], label=label)
        _logarithmic(ax, "y")
        ax.set(xlabel="rank i", ylabel="singular value")
        told = f"{_end(point['matrix'], 34)}\nratio {point['ratio']:.2g}, alignment {point['alignment']:.2f}"
        ax.set_title(f"{panel}\n{told}", size=7)
        ax.legend(fontsize=7)
    return figure, table


def figure19(material: Material) -> tuple[Figure, Table]:
    """Update size against alignment at ranks 1, 5, 10 and 100, left and right."""
    figure, axes = _panels(2, 4, "Size of the update against alignment, FFN matrices", (2.9, 2.6))
    table: Table = []
    dots = None
    for row, side in zip(axes, SIDES, strict=True):
        for ax, rank in zip(row, (1, 5, 10, 100), strict=True):
            points = _points(material, rank, side)
            dots = _scatter(ax, points) or dots
            ax.set_title(f"rank {rank}, {side}")
            table += points
    if dots is not None:
        figure.colorbar(dots, ax=axes, label="alignment of the update", shrink=0.6)
    return figure, table


def figure6(material: Material) -> tuple[Figure, Table]:
    """Relative change of singular values by relative rank: each model's median over matrices, and their mean."""
    from specbasis.figures.figures import COLORS, QUIET

    figure, axes = _panels(1, len(material.groups), "Relative change of singular values", (4.2, 2.9))
    table: Table = []
    for ax, (modality, models) in zip(axes[0], material.groups.items(), strict=True):
        each = [100 * m.pair.figures("singular_value_change").at_quantiles() for m in models]
        medians = [np.array(_quantiles(values, (0.5,))) for values in each]
        shown = QUANTILES * 100
        for i, (m, median) in enumerate(zip(models, medians, strict=True)):
            ax.plot(shown, median[0], color=COLORS[i % 8], lw=1.2, label=_end(m.name, 40))
            table += [
                {"modality": modality, "pair": m.name, "quantile": float(q), "median_change_percent": float(v)}
                for q, v in zip(QUANTILES, median[0], strict=True)
            ]
        _, low, high = _over(models, each if len(models) < ENOUGH else medians)
        ax.fill_between(shown, low, high, color=QUIET, alpha=0.15, lw=0, label=_spread_name(models))
        floor = [100 * m.pair.whole("rounding_update") for m in models]
        level = float(np.nanmax([np.nanmedian(f) if np.isfinite(f).any() else np.nan for f in floor] + [0.0]))
        ax.axhspan(-level, level, color=COLORS[1], alpha=0.2, lw=0, label=f"storage rounding (±{level:.1g} %)")
        ax.axhline(0, color=QUIET, lw=0.8)
        body = np.concatenate([median[0][shown < 95] for median in medians] + [np.zeros(1)])
        edge = max(1.15 * float(np.nanmax(np.abs(body[np.isfinite(body)]))), 1e-6)
        ax.set_ylim(-edge, edge)
        ax.set(
            xlabel="relative rank (%, largest first)", ylabel="change (%)", title=_title(modality, "all matrices")
        )
        if len(models) <= 8:
            ax.legend(fontsize=6)
    return figure, table


def _last_ffn(model: Model, notes: list[str]) -> list[int]:
    """The FFN matrices of the last block of each stack; all of that block, with a note, where there are none."""
    mask = _chosen(model, "ffn", notes)
    stacks, blocks = (np.array(model.pair.matrices[key], object) for key in ("stack", "block"))
    found = []
    for stack in dict.fromkeys(stacks[mask]):
        here = np.flatnonzero(mask & (stacks == stack))
        deepest = max((blocks[i] for i in here if blocks[i] is not None), default=None)
        found += [int(i) for i in here if blocks[i] == deepest]
    return found


def figure16(material: Material) -> tuple[Figure, Table]:
    """Explained variance of the FFN matrices of the last block, up and down: by relative rank, and of 200 ranks."""
    from specbasis.figures.figures import COLORS, DASHES, QUIET

    figure, axes = _panels(2, 2, "Explained variance, FFN matrices of the last block", (4.2, 2.6))
    table: Table = []
    for column, (name, ends) in zip(axes.T, (("up", ("up", "gate")), ("down", ("down",))), strict=True):
        drawn = 0
        for m in material.models:
            for i in _last_ffn(m, material.notes):
                role = str(m.pair.matrices["role"][i]).rpartition(".")[2]
                if role not in ends and not (role == "other" and name == "up"):
                    continue
                color = COLORS[drawn % 8]
                drawn += 1
                for which, dash in (("tuned", DASHES[0]), ("base", DASHES[2])):
                    series = m.pair.figures(f"explained_variance_{which}")
                    value = 100 * series.value[series.start[i] : series.start[i + 1]]
                    x = np.arange(1, len(value) + 1)
                    label = _end(m.name, 30) if which == "tuned" else None
                    column[0].plot(100 * x / len(x), value, color=color, ls=dash, lw=1.3, label=label)
                    column[1].plot(x[:200], value[:200], color=color, ls=dash, lw=1.3)
                    table += [
                        {"pair": m.name, "matrix": m.pair.matrices["name"][i], "which": which, "rank": int(k)}
                        | {"explained": float(value[k - 1]) / 100, "of": len(x)}
                        for k in (1, 10, 30, 100, 200, math.ceil(0.6 * len(x)), len(x))
                        if k <= len(x)
                    ]
                shape = sorted((m.pair.matrices["out"][i], m.pair.matrices["in"][i]))
                q, null = random_variance(*shape)
                column[0].plot(100 * q, 100 * null, color=QUIET, lw=0.9, ls=(0, (5, 2)), zorder=1)
                column[1].plot(q * shape[0], 100 * null, color=QUIET, lw=0.9, ls=(0, (5, 2)), zorder=1)
        column[0].set(
            title=f"{name}: by relative rank", xlabel="relative rank (%)", ylabel="explained variance (%)"
        )
        column[1].set(title=f"{name}: leading ranks", xlabel="number of ranks", ylabel="explained variance (%)")
        column[1].set_xlim(1, 200)
        told = "solid tuned, dotted base, dashed random entries"
        if 0 < drawn <= 8:
            column[0].legend(fontsize=6, title=told, title_fontsize=6)
        elif drawn:
            column[0].text(
                0.98, 0.03, f"{drawn} matrices: {told}", transform=column[0].transAxes, size=6, ha="right"
            )
    return figure, table


def random_variance(n: int, m: int) -> tuple[Floats, Floats]:
    """(relative rank, explained variance) of a large n × m matrix of independent entries, n ≤ m.

    The top share of the Marchenko–Pastur law with ratio n/m. Source: Marchenko & Pastur 1967.
    """
    c = n / m
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    # λ = middle + half·cos t takes the square roots out of the density.
    t = np.linspace(0, math.pi, 4001)
    value = (low + high) / 2 + (high - low) / 2 * np.cos(t)
    density = np.sin(t) ** 2 / np.maximum(value, 1e-12)
    steps = np.diff(t)

    def upto(f: Floats) -> Floats:
        total = np.concatenate([[0.0], np.cumsum((f[1:] + f[:-1]) / 2 * steps)])
        return np.asarray(total / total[-1])

    return upto(density), upto(density * value)


def figure20(material: Material) -> tuple[Figure, Table]:
    """Singular values of base and of the update, FFN matrices of the last block, one panel for each model."""
    from specbasis.figures.figures import COLORS

    shown = material.models[:12]
    if len(material.models) > len(shown):
        material.notes.append(f"the first {len(shown)} of {len(material.models)} models are drawn")
    across = min(4, len(shown))
    title = "Spectra of base and of the update; dotted: S₁ of random entries of its norm"
    figure, axes = _panels(math.ceil(len(shown) / across), across, title, (3.1, 2.5))
    table: Table = []
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, m in zip(axes.flat, shown, strict=False):
        for j, i in enumerate(_last_ffn(m, material.notes)[:2]):
            for which, dash in (("base", "-"), ("delta", (0, (4, 2)))):
                series = m.pair.figures(f"singular_value_{which}")
                value = series.value[series.start[i] : series.start[i + 1]]
                positive = value > 0
                role = m.pair.matrices["role"][i].rpartition(".")[2]
                label = f"{role}, {'update' if which == 'delta' else which}"
                x = np.arange(1, len(value) + 1)
                ax.plot(x[positive], value[positive], color=COLORS[j], ls=dash, lw=1.3, label=label)
            out, width = m.pair.matrices["out"][i], m.pair.matrices["in"][i]
            ratio = m.pair.at_rank("singular_value_ratio", 1)[i]
            size = m.pair.whole("norm_delta")[i]
            # The largest singular value of random entries with the update's norm.
            noise = size * (math.sqrt(out) + math.sqrt(width)) / math.sqrt(out * width)
            if size > 0:
                ax.axhline(noise, color=COLORS[j], lw=0.7, ls=(0, (1, 1.5)))
            table.append(
                {"pair": m.name, "matrix": m.pair.matrices["name"][i], "ratio_rank_1": float(ratio)}
                | {"relative_update": float(m.pair.whole("relative_update")[i]), "random_update_s1": float(noise)}
            )
        _logarithmic(ax, "y")
        ax.set(xlabel="rank i", ylabel="singular value")
        ax.set_title(_end(m.name, 36), size=8)
        ax.legend(fontsize=6)
    return figure, table


def _end(name: str, length: int) -> str:
    """The end of a name, which tells it from others; what is left out is marked."""
    return name if len(name) <= length else "…" + name[1 - length :]


def figure18(material: Material) -> tuple[Figure, Table]:
    """Correlation of alignment and score by depth and ranks; a dot where it survives BY, a ring where BH."""
    from specbasis.figures.figures import QUIET

    assert material.population is not None
    found = material.population.correlations
    groups = list(dict.fromkeys(c.modality for c in found)) or [""]
    figure, axes = _panels(len(groups), 2, "Alignment against score", (4.6, 2.5))
    for row, modality in zip(axes, groups, strict=True):
        for ax, method in zip(row, ("spearman", "pearson"), strict=True):
            mine = [c for c in found if (c.modality, c.method) == (modality, method)]
            ranks = list(dict.fromkeys(c.ranks for c in mine))
            _correlations(figure, ax, mine, ranks)
            n = max((c.clusters for c in mine), default=0)
            tests = max((c.family for c in mine), default=0)
            ax.set_title(_title(modality, method))
            power = next((p for p in material.population.power if p["clusters"] == n), None)
            if power:
                told = (
                    f"{n} {power['unit']}s: |r| ≥ {power['alone']:.2f} seen 4 times in 5; "
                    f"≥ {power['family']:.2f} in {tests} tests"
                )
                ax.set_xlabel(f"range of ranks\n{told}", size=7, color=QUIET)
    table: Table = [asdict(c) for c in found]
    return figure, table


def _correlations(figure: Any, ax: Any, mine: Sequence[Correlation], ranks: Sequence[str]) -> None:
    grid = np.full((len(DEPTHS), max(1, len(ranks))), np.nan)
    ax.grid(False)
    for c in mine:
        y, x = DEPTHS.index(c.depth), ranks.index(c.ranks)
        grid[y, x] = c.r
        sign = "●" if c.q_by < 0.05 else "○" if c.q_bh < 0.05 else ""
        told = f"{c.r:.2f}{sign}\n[{c.low:.2f}, {c.high:.2f}]" if math.isfinite(c.r) else "–"
        ax.text(x, y, told, ha="center", va="center", size=6.5, color="#ffffff" if abs(c.r) > 0.6 else "#1b1f24")
    image = ax.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    ax.set_xticks(range(len(ranks)), ranks)
    ax.set_yticks(range(len(DEPTHS)), DEPTHS)
    figure.colorbar(image, ax=ax, label="r")


def table4(material: Material) -> tuple[None, Table]:
    """Change of the spectrum of the FFN matrices of the last block, with what size and rounding would give."""
    table: Table = []
    for m in material.models:
        facts = {f["matrix"]: f for f in m.member.comparison.facts[m.member.pair].matrices}
        for i in _last_ffn(m, material.notes):
            f = facts[m.pair.matrices["name"][i]]
            get = {key: f.get(key, math.nan) for key in ("rsd", "mrc", "max_rc", "t1_rc", "tail_rc")}
            before, after = (f.get(f"effective_rank_{side}", math.nan) for side in ("base", "tuned"))
            table.append(
                {
                    "model": m.name,
                    "modality": m.member.modality,
                    "layer": f"{m.pair.matrices['stack'][i]} {f['role']}".strip(),
                    "n_sv": min(f["out"], f["in"]),
                    "RSD": get["rsd"],
                    # First order: u_iᵀ Δ v_i of independent entries has the variance ‖Δ‖²/(out·in).
                    "RSD random update": f["relative_update"] / math.sqrt(max(f["out"], f["in"])),
                    "RSD rounding": f.get("rounding_update", math.nan) / math.sqrt(max(f["out"], f["in"])),
                    "MRC": get["mrc"],
                    "MaxRC": get["max_rc"],
                    "T1RC": get["t1_rc"],
                    "TailRC": get["tail_rc"],
                    "ER pre": before,
                    "ER ft": after,
                    "ΔER": after - before,
                    "‖Δ‖/‖W‖": f["relative_update"],
                }
            )
    return None, table


_ALIGNED = ("alignment_left", "alignment_right", "chance_alignment_left", "chance_alignment_right")
_NULL = ("null_alignment_gaussian_left?", "null_alignment_gaussian_right?")
_SIZE = ("singular_value_ratio", "update_alignment_left", "update_alignment_right")
_SPECTRA = ("singular_value_base", "singular_value_delta")

RECIPES: tuple[Recipe, ...] = (
    Recipe("fig2", "alignment by rank and depth (A, B, C)", "Fig. 2A–C", (*_ALIGNED, *_NULL), figure2),
    Recipe(
        "fig3", "size and direction of the update", "Fig. 3A–C", (*_ALIGNED, *_SIZE, *_SPECTRA, *_NULL), figure3
    ),
    Recipe(
        "fig6",
        "relative change of singular values",
        "Fig. 6",
        ("singular_value_change", "rounding_update?"),
        figure6,
    ),
    Recipe("fig8", "alignment over 200 ranks by depth", "Fig. 8", _ALIGNED, figure8),
    Recipe("fig10", "attention, vision", "Fig. 10", (*_ALIGNED, *_NULL), attention, modality="vision"),
    Recipe("fig11", "attention, language", "Fig. 11", (*_ALIGNED, *_NULL), attention, modality="language"),
    Recipe(
        "fig16",
        "explained variance of the last block",
        "Fig. 16",
        ("explained_variance_base", "explained_variance_tuned"),
        figure16,
    ),
    Recipe("fig18", "alignment against a score", "Fig. 18", _ALIGNED, figure18, scored=True),
    Recipe(
        "fig19",
        "size of the update against alignment at ranks 1, 5, 10, 100",
        "Fig. 19",
        (*_ALIGNED, *_SIZE, *_NULL),
        figure19,
    ),
    Recipe(
        "fig20",
        "spectra of base and of the update",
        "Fig. 20",
        (*_SPECTRA, "singular_value_ratio", "norm_delta"),
        figure20,
    ),
    Recipe(
        "tab4",
        "change of the spectrum of the last block",
        "Tab. 4",
        (
            "rsd",
            "mrc",
            "max_rc",
            "t1_rc",
            "tail_rc",
            "effective_rank_base",
            "effective_rank_tuned",
            "rounding_update?",
        ),
        table4,
    ),
)
"""All figures and tables drawn from rows of comparisons."""
