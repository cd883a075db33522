"""What the paper's figures of comparisons are made of: models by modality, means with intervals, and recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specbasis.comparison.correlations import units
from specbasis.comparison.population import DEPTHS, Member, Population
from specbasis.core.statistics import cluster_bootstrap
from specbasis.figures import kit
from specbasis.figures.data import Pair, quantiles
from specbasis.figures.kit import Axes, Figure

ENOUGH = 5
"""Fewer bases, and fewer finetunes, than this give no interval over models."""

DRAWS = 500

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Records = list[dict[str, Any]]


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
        modality: draw these modalities alone, where any model has one of them.
        is_table: whether it is a table alone, without a picture.
    """

    name: str
    title: str
    source: str
    measures: tuple[str, ...]
    draw: Callable[[Material], tuple[Figure | None, Records]]
    scored: bool = False
    modality: tuple[str, ...] = ()
    is_table: bool = False

    @property
    def command(self) -> str:
        """The comparison that gives all that it reads."""
        nulls = " --nulls" if any(m.startswith("null") for m in self.measures) else ""
        return f"specbasis compare BASE TUNED --out DIR{nulls}"


RECIPES: dict[str, Recipe] = {}
"""Name → figure or table drawn from rows of comparisons."""

Draw = Callable[[Material], tuple[Figure | None, Records]]


def recipe(source: str, title: str, *measures: str, **options: Any) -> Callable[[Draw], Draw]:
    """Make a function the figure of its name; arguments as the attributes of `Recipe`."""

    def register(draw: Draw) -> Draw:
        RECIPES[draw.__name__] = Recipe(draw.__name__, title, source, measures, draw, **options)
        return draw

    return register


ALIGNED = ("alignment_left", "alignment_right", "chance_alignment_left", "chance_alignment_right")
NULL = ("null_alignment_gaussian_left?", "null_alignment_gaussian_right?")
SIZE = ("singular_value_ratio", "update_alignment_left", "update_alignment_right")
SPECTRA = ("singular_value_base", "singular_value_delta")


def title_of(modality: str, text: str) -> str:
    """The title of a panel, with the modality where there are several."""
    return f"{modality}: {text}" if modality else text


# --- matrices -----------------------------------------------------------------------------------------------------


def chosen(model: Model, role: str, notes: list[str]) -> Mask:
    """The matrices of a role inside of the blocks; all in the blocks, with a note, where a model has none of it."""
    roles, blocks = model.pair.matrices["role"], model.pair.matrices["block"]
    inside = np.array([block is not None for block in blocks], bool)
    mask = inside & np.array([r == role or r.startswith(role + ".") for r in roles], bool)
    if role == "ffn" and not mask.any():
        notes.append(f"{model.name}: no matrix has the role {role}; all matrices of its blocks are drawn")
        mask = inside if inside.any() else np.ones(len(roles), bool)
    return np.asarray(mask)


def last_ffn(model: Model, notes: list[str]) -> list[int]:
    """The FFN matrices of the last block of each stack; all of that block, with a note, where there are none."""
    mask = chosen(model, "ffn", notes)
    stacks, blocks = (np.array(model.pair.matrices[key], object) for key in ("stack", "block"))
    places = []
    for stack in dict.fromkeys(stacks[mask]):
        here = np.flatnonzero(mask & (stacks == stack))
        deepest = max((blocks[i] for i in here if blocks[i] is not None), default=None)
        places += [int(i) for i in here if blocks[i] == deepest]
    return places


def thirds(model: Model) -> NDArray[np.int64]:
    """Third of its stack in which each matrix is; −1 outside of the blocks."""
    places = list(zip(model.pair.matrices["stack"], model.pair.matrices["block"], strict=True))
    last = {s: max((b for stack, b in places if stack == s and b is not None), default=0) for s, _ in places}
    n = len(DEPTHS)
    return np.array([-1 if b is None else min(n - 1, n * b // (last[stack] + 1)) for stack, b in places])


# --- means and intervals ------------------------------------------------------------------------------------------


def curve(model: Model, measure: str, mask: Mask, width: int) -> Floats:
    """(matrices, ranks) resolved figures of some matrices."""
    return np.asarray(model.pair.measure(measure).dense(width)[mask])


def mean(values: Floats) -> Floats:
    """Mean down the columns over what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(0)
    total = np.where(finite, values, 0.0).sum(0)
    return np.asarray(np.divide(total, count, out=np.full(values.shape[1], np.nan), where=count > 0))


def mean_over(models: Sequence[Model], values: Sequence[Floats]) -> tuple[Floats, Floats, Floats]:
    """(low, mean, high) down the columns: mean over models and its bootstrap, or quartiles over matrices.

    ``values`` has for every model its (matrices, places).
    """
    means = np.array([mean(matrices) for matrices in values])
    _, clusters = _units(models)
    if clusters.max(initial=-1) + 1 >= ENOUGH:
        drawn = cluster_bootstrap(lambda at: mean(means[at]), clusters, DRAWS)
        low, high = quantiles(np.array(drawn), (0.025, 0.975))
    else:
        low, high = quantiles(np.concatenate(list(values)), (0.25, 0.75))
    return low, mean(means), high


def spread_name(models: Sequence[Model]) -> str:
    """What the band of `mean_over` is."""
    unit, clusters = _units(models)
    n = int(clusters.max(initial=-1)) + 1
    return f"95 % over {n} {unit}s" if n >= ENOUGH else "quartiles over matrices"


def _units(models: Sequence[Model]) -> tuple[str, NDArray[Any]]:
    return units([m.name for m in models], {m.name: m.member.base for m in models})


def chance(models: Sequence[Model], side: str, masks: Sequence[Mask]) -> float:
    """Mean chance alignment."""
    levels = [m.pair.whole(f"chance_alignment_{side}")[mask] for m, mask in zip(models, masks, strict=True)]
    return float(np.nanmean(np.concatenate(levels))) if levels else math.nan


def draw_mean(
    ax: Axes, models: Sequence[Model], values: Sequence[Floats], color: str, label: str, dash: Any = "solid"
) -> Records:
    """`mean_over` by rank as a line in its band; returns rank, mean, low and high as records."""
    low, middle, high = mean_over(models, values)
    ranks = np.arange(1, len(middle) + 1)
    kit.band(ax, ranks.astype(float), low, middle, high, color=color, label=label, dash=dash)
    return [
        {"rank": int(rank), "mean": float(m), "low": float(a), "high": float(b)}
        for rank, m, a, b in zip(ranks, middle, low, high, strict=True)
    ]


def from_rank_one(ax: Axes, last: int) -> None:
    """An axis of ranks from 1 to the last one."""
    ax.set_xlim(1, max(last, 2))
    kit.rank_axis(ax)
