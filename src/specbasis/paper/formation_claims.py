"""The rows of a formation grid: curves of matrices, and what they say of each claim, with intervals over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specbasis.core.errors import InputError
from specbasis.core.statistics import student_interval
from specbasis.figures.table import Column, Table
from specbasis.jobs.experiments import Row
from specbasis.paper.formation_grid import POSTS

Array = NDArray[np.float64]

GROUPS = ("final FFN", "all matrices")
"""The two feed-forward matrices of the last encoder block, which the paper shows, and every matrix of the
blocks."""

SAME_EPOCHS = 0.1
"""Pretrainings whose epochs differ by less than this share count as equally long."""


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of some matrices of an experiment, (matrices, steps).

    Attributes:
        aligned: alignment with the first checkpoint.
        size: size of the update, ‖delta‖/‖W‖.
        null: alignment that a Gaussian update as large as the whole one leaves.
        chance: alignment of independent directions.
    """

    aligned: Array
    size: Array
    null: Array
    chance: float

    @property
    def end(self) -> float:
        """Alignment of the last checkpoint with the first, mean over the matrices."""
        return float(self.aligned[:, -1].mean())

    @property
    def beyond_chance(self) -> float:
        """The same, less what independent directions have."""
        return self.end - self.chance

    @property
    def end_size(self) -> float:
        """‖delta‖/‖W‖ at the last checkpoint, mean over the matrices."""
        return float(self.size[:, -1].mean())

    def at_size(self, sizes: Array) -> float:
        """Alignment where the update of each matrix has a given size, on the line between checkpoints; mean."""
        return float(np.mean([_at(s, a, x) for s, a, x in zip(self.size, self.aligned, sizes, strict=True)]))


def _at(sizes: Array, aligned: Array, x: float) -> float:
    """The alignment when the update first reaches a size."""
    over = np.nonzero(sizes >= x)[0]
    j = int(over[0]) if len(over) else len(sizes) - 1
    if j == 0:
        return float(aligned[0])
    return float(np.interp(x, [sizes[j - 1], sizes[j]], [aligned[j - 1], aligned[j]]))


def at_equal_size(curves: Sequence[Curves]) -> list[float]:
    """Alignment of each, where every matrix's update is as large as the smallest that all of them reach."""
    sizes = np.min([c.size.max(axis=1) for c in curves], axis=0)
    return [c.at_size(sizes) for c in curves]


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows by what they are."""

    rows: Sequence[Row]

    def of(self, phase: str, **wanted: Any) -> list[Row]:
        """Rows of a phase whose experiments have these values."""
        return [
            row
            for row in self.rows
            if row.experiment["phase"] == phase
            and all(row.experiment.get(name) == value for name, value in wanted.items())
        ]

    def by_seed(self, phase: str, **wanted: Any) -> dict[int, list[Row]]:
        """The same, seed by seed."""
        rows: dict[int, list[Row]] = defaultdict(list)
        for row in self.of(phase, **wanted):
            rows[row.experiment["seed"]].append(row)
        return dict(rows)

    def families(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """Sets of pretrainings, (images, steps), that differ in their images: equally many steps, or epochs."""
        sizes = sorted({(row.experiment["images"], row.experiment["steps"]) for row in self.of("pretrain")})
        families: list[tuple[str, list[tuple[int, int]]]] = []
        for steps in sorted({steps for _, steps in sizes}):
            same = [size for size in sizes if size[1] == steps]
            families += [(f"{steps} steps each", same)] if len(same) > 1 else []
        taken: set[tuple[int, int]] = set()
        for images, steps in sizes:
            same = [s for s in sizes if abs(s[1] * images / (s[0] * steps) - 1) < SAME_EPOCHS and s not in taken]
            if len(same) > 1:
                taken |= set(same)
                families.append((f"equal epochs ({', '.join(str(s) for _, s in same)} steps)", same))
        return families


def trained(row: Row) -> str:
    """What was trained: the task, or which pretraining."""
    experiment = row.experiment
    return experiment.get("task") or f"pretraining, {experiment['images']} images, {experiment['steps']} steps"


def members(row: Row, group: str) -> list[dict[str, Any]]:
    """What a row says of each matrix of a group."""
    inside = [matrix for matrix in row.values["matrices"].values() if matrix["block"] is not None]
    last = max(matrix["block"] for matrix in inside)
    if group == "all matrices":
        return inside
    return [matrix for matrix in inside if matrix["block"] == last and matrix["role"].startswith("ffn.")]


def curves(row: Row, group: str) -> Curves:
    """Curves of a group's matrices."""
    of = members(row, group)
    first, size, null = (
        np.array([matrix[name] for matrix in of], dtype=np.float64) for name in ("first", "update_first", "null")
    )
    return Curves(first, size, null, float(np.mean([matrix["chance"] for matrix in of])))


# --- claims -------------------------------------------------------------------------------------------------------

Effects = Iterator[tuple[str, str, str, str, Sequence[float]]]
"""Claim, setting, group, measure, and the effect at each seed."""


@dataclass(frozen=True)
class Claim:
    """One effect.

    Attributes:
        claim: letter and short text.
        setting: which experiments.
        group: one of `GROUPS`, or "the model".
        measure: what the effect is of.
        effect: mean over seeds.
        low, high: 95 % interval of the mean over seeds (Student's t); NaN with one seed.
        seeds: number of them (of pairs of seeds, for "between seeds").
        each: the effect at each seed.
    """

    claim: str
    setting: str
    group: str
    measure: str
    effect: float
    low: float
    high: float
    seeds: int
    each: tuple[float, ...]


def claims(rows: Iterable[Row]) -> list[Claim]:
    """Every claim that the rows have experiments for.

    Raises:
        InputError: no experiment of the grid has ended.
    """
    grid = Grid([row for row in rows if row.error is None])
    every = [_claim(*effect) for part in _PARTS for effect in part(grid) if effect[-1]]
    if not every:
        raise InputError("no experiment of this grid that a claim needs has ended; run more of it")
    return every


def table(effects: Sequence[Claim]) -> Table:
    """Claims as a table."""
    columns = (
        *(Column(name, words=True) for name in ("claim", "setting", "matrices")),
        Column("effect", "+.3f"),
        Column("95 % interval", narrow="interval", words=True),
        Column("seeds"),
    )
    rows = []
    for c in effects:
        ends = None if math.isnan(c.low) else f"{c.low:+.3f} … {c.high:+.3f}"
        rows.append((f"{c.claim}: {c.measure}", c.setting, c.group, c.effect, ends, c.seeds))
    return Table(columns, tuple(rows), "effects, with 95 % intervals over seeds")


def markdown(effects: Sequence[Claim]) -> str:
    """Claims as a page."""
    return (
        f"Each interval holds with 95 % for itself: of twenty, one misses by chance.\n\n{table(effects).markdown()}"
    )


def _claim(claim: str, setting: str, group: str, measure: str, by_seed: Sequence[float]) -> Claim:
    effect, low, high = student_interval(by_seed)
    values = tuple(round(x, 5) for x in by_seed)
    return Claim(claim, setting, group, measure, effect, low, high, len(by_seed), values)


def _by_seed(seeds: Iterable[Sequence[Row]], value: Callable[[Row], float]) -> list[float]:
    """A value of rows, averaged over those of each seed."""
    return [float(np.mean([value(row) for row in rows])) for rows in seeds]


_MEASURES: dict[str, Callable[[Sequence[Curves]], list[float]]] = {
    "alignment at the end": lambda of: [c.end for c in of],
    "‖delta‖/‖W‖ at the end": lambda of: [c.end_size for c in of],
    "alignment at equal ‖delta‖/‖W‖": at_equal_size,
}
"""What of several trainings is compared."""


def _stages(grid: Grid) -> Effects:
    """Neighbouring checkpoints of pretraining: the last third of the intervals against the first."""
    text, setting = "(a) alignment between checkpoints rises", "pretraining, mean over its sizes"
    seeds = grid.by_seed("pretrain").values()
    for group in GROUPS:
        for name, measure in (("next", "neighbours"), ("update_next", "‖delta‖/‖W‖ between neighbours")):
            values = _by_seed(seeds, lambda row, group=group, name=name: _rise(row, group, name))
            yield text, setting, group, f"{measure}, last third − first third", values
    values = _by_seed(seeds, _rise_at_equal_size)
    yield text, setting, GROUPS[0], "pairs at equal ‖delta‖/‖W‖, second half − first half", values


def _rise(row: Row, group: str, name: str) -> float:
    steps = np.array([matrix[name] for matrix in members(row, group)], dtype=np.float64).mean(axis=0)
    third = max(1, len(steps) // 3)
    return float(steps[-third:].mean() - steps[:third].mean())


def _rise_at_equal_size(row: Row) -> float:
    """Pairs of late checkpoints against early pairs as far apart, the latter interpolated by size from (0, 1)."""
    differences = []
    for matrix in row.values["ffn"].values():
        aligned, size = (np.array(matrix[name], dtype=np.float64) for name in ("between", "update_between"))
        n = len(aligned)
        early, late = (
            [(i, j) for i in part for j in part if i < j] for part in (range(n // 2 + 1), range(n // 2, n))
        )
        curve = sorted([(0.0, 1.0), *((size[pair], aligned[pair]) for pair in early)])
        x, y = np.array(curve).T
        inside = [pair for pair in late if size[pair] <= x[-1]]
        differences.append(np.mean([aligned[pair] - np.interp(size[pair], x, y) for pair in inside]))
    return float(np.mean(differences))


def _scale(grid: Grid) -> Effects:
    """Alignment after what follows, against the number of pretraining images."""
    for name, sizes in grid.families():
        doublings = [math.log2(images) for images, _ in sizes]
        for task in ("same_task", "second_data", "true_labels"):
            for group in GROUPS:
                complete = _complete(grid, task, sizes, group)
                for measure, values in _MEASURES.items():
                    slopes = [float(np.polyfit(doublings, values(of), 1)[0]) for of in complete]
                    measure = f"{measure}, per doubling of images"
                    yield "(b) larger sets keep more", f"{task}, {name}", group, measure, slopes


def _complete(grid: Grid, task: str, sizes: Sequence[tuple[int, int]], group: str) -> list[list[Curves]]:
    """For each seed that has them all: the curves after each pretraining."""
    tables = []
    for rows in grid.by_seed("post", task=task).values():
        by_size = {(row.experiment["images"], row.experiment["steps"]): row for row in rows}
        if all(size in by_size for size in sizes):
            tables.append([curves(by_size[size], group) for size in sizes])
    return tables


def _labels(grid: Grid) -> Effects:
    """Random labels against true ones, from the same weights and images."""
    settings = {"post": "from pretrained weights, mean over sizes", "scratch": "from random weights"}
    for phase, setting in settings.items():
        for group in GROUPS:
            seeds = _matched(grid, phase, group).values()
            for measure, values in _MEASURES.items():
                means = [float(np.mean([b - a for a, b in map(values, pairs)])) for pairs in seeds]
                yield "(c) random labels lose it faster", setting, group, f"{measure}, random − true", means


def _matched(grid: Grid, phase: str, group: str) -> dict[int, list[list[Curves]]]:
    """Seed → [true, random] curves for each start that has both."""
    pairs: dict[int, list[list[Curves]]] = defaultdict(list)
    for row in grid.of(phase, task="true_labels"):
        start = {name: row.experiment[name] for name in ("seed", "images", "steps") if name in row.experiment}
        for other in grid.of(phase, task="random_labels", **start):
            pairs[row.experiment["seed"]].append([curves(row, group), curves(other, group)])
    return pairs


def _scratch(grid: Grid) -> Effects:
    """The start against the end: from random weights, and against the same training from pretrained ones."""
    text, end, size = "(d) from scratch", "init with trained − chance", "‖delta‖/‖W‖"
    for group in GROUPS:
        seeds = grid.by_seed("pretrain").values()
        for measure, name in ((end, "beyond_chance"), (size, "end_size")):
            each = _by_seed(seeds, lambda row, group=group, name=name: getattr(curves(row, group), name))
            yield text, "pretraining itself, mean over its sizes", group, measure, each
        for task in POSTS:
            scratch = {row.experiment["seed"]: curves(row, group) for row in grid.of("scratch", task=task)}
            yield text, task, group, end, [c.beyond_chance for c in scratch.values()]
            yield text, task, group, size, [c.end_size for c in scratch.values()]
            posts = {seed: rows for seed, rows in grid.by_seed("post", task=task).items() if seed in scratch}
            for measure, values in _MEASURES.items():
                each = []
                for seed, rows in posts.items():
                    pairs = [values([curves(row, group), scratch[seed]]) for row in rows]
                    each.append(float(np.mean([a - b for a, b in pairs])))
                yield text, task, group, f"{measure}, pretrained − scratch", each


def _between_seeds(grid: Grid) -> Effects:
    for group in GROUPS:
        settings: dict[str, list[float]] = defaultdict(list)
        for row in grid.of("between"):
            name = trained(row) + (" from scratch" if "task" in row.experiment else "")
            ends = [matrix["first"][-1] - matrix["chance"] for matrix in members(row, group)]
            settings[name].append(float(np.mean(ends)))
        for name, differences in settings.items():
            yield "(d) between two seeds", name, group, "alignment − chance (pairs share seeds)", differences


def _null(grid: Grid) -> Effects:
    """What follows pretraining, against a Gaussian update of the same size."""
    for phase, start in (("post", "pretrained"), ("scratch", "random")):
        for task in POSTS:
            for group in GROUPS:
                values = _by_seed(
                    grid.by_seed(phase, task=task).values(),
                    lambda row, group=group: (of := curves(row, group)).end - of.null.mean(),
                )
                measure = "alignment at the end − that of a Gaussian update as large"
                yield "(e) beyond a random update", f"{task} from {start} weights", group, measure, values


def _learned(grid: Grid) -> Effects:
    """Whether a training did what it was for: its losses, and the accuracy of a classification, at the end."""
    starts = {"pretrain": "", "post": " from pretrained weights", "scratch": " from random weights"}
    names = {"loss": "training loss", "validation": "validation loss", "accuracy": "validation accuracy"}
    for phase, task in dict.fromkeys((row.experiment["phase"], trained(row)) for row in grid.rows):
        if phase not in starts:
            continue
        seeds = Grid([row for row in grid.rows if trained(row) == task]).by_seed(phase).values()
        for name, measure in names.items():
            known = [rows for rows in seeds if all(name in row.values["log"][-1] for row in rows)]
            values = _by_seed(known, lambda row, name=name: row.values["log"][-1][name])
            yield "(f) what was learned", f"{task}{starts[phase]}", "the model", f"{measure} at the end", values


_PARTS = (_stages, _scale, _labels, _scratch, _between_seeds, _null, _learned)
