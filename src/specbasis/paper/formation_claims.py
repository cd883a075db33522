"""What the rows of a formation grid say about each claim, as effects with intervals over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specbasis.core.errors import InputError
from specbasis.core.statistics import student_interval
from specbasis.jobs.experiments import Row

Array = NDArray[np.float64]

GROUPS = ("final FFN", "all matrices")
"""The two feed-forward matrices of the last encoder block, which the paper shows, and every matrix of the
blocks."""

SAME_EPOCHS = 0.1
"""Pretrainings whose epochs differ by less than this share count as equally long."""


@dataclass(frozen=True)
class Claim:
    """One effect.

    Attributes:
        claim: letter and short text.
        setting: which cells.
        group: one of `GROUPS`, or "the model".
        measure: what the effect is of.
        effect: mean over seeds.
        low, high: 95 % interval of the mean over seeds (Student's t); NaN with one seed.
        seeds: number of them (of pairs of seeds, for "between seeds").
        each: the effect at each seed.
        verdict: see `verdict`.
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
    verdict: str


EXPECTED = {"(a)": 1, "(b)": 1, "(c)": -1}
"""Sign that the paper's claim gives an alignment's effect."""


def verdict(claim: str, measure: str, low: float, high: float) -> str:
    """Whether the interval lies on the claimed side of zero, on the other, or holds it; empty without a claim."""
    sign = EXPECTED.get(claim[:3], 0)
    if not sign or measure.startswith("‖delta‖"):
        return ""
    if math.isnan(low) or low <= 0 <= high:
        return "undecided"
    return "as claimed" if sign * low > 0 else "opposite"


def claims(rows: Iterable[Row]) -> list[Claim]:
    """Every claim that the rows have cells for.

    Raises:
        InputError: no cell of the grid has ended.
    """
    grid = Grid([row for row in rows if row.error is None])
    found = [claim for part in _PARTS for claim in part(grid)]
    if not found:
        raise InputError("no cell of this grid that a claim needs has ended; run more of it")
    return found


def as_rows(found: Sequence[Claim]) -> list[dict[str, Any]]:
    """Claims as plain dictionaries, for JSON."""
    return [asdict(claim) for claim in found]


def markdown(found: Sequence[Claim]) -> str:
    """Claims as a table."""
    lines = [
        "Each interval holds with 95 % for itself: of twenty, one misses by chance.",
        "",
        "| claim | setting | matrices | effect | 95 % interval | seeds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in found:
        ends = "–" if math.isnan(c.low) else f"{c.low:+.3f} … {c.high:+.3f}"
        numbers = f"{c.effect:+.3f} | {ends} | {c.seeds} | {c.verdict}"
        lines.append(f"| {c.claim}: {c.measure} | {c.setting} | {c.group} | {numbers} |")
    return "\n".join(lines) + "\n"


# --- reading rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of some matrices of one cell: alignment to the first checkpoint and size of the update, (matrices,
    steps).
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
        """Rows of a phase whose cells have these values."""
        return [
            row
            for row in self.rows
            if row.experiment["phase"] == phase
            and all(row.experiment.get(name) == value for name, value in wanted.items())
        ]

    def by_seed(self, phase: str, **wanted: Any) -> dict[int, list[Row]]:
        """The same, seed by seed."""
        found: dict[int, list[Row]] = defaultdict(list)
        for row in self.of(phase, **wanted):
            found[row.experiment["seed"]].append(row)
        return dict(found)

    def trainings(self) -> list[tuple[str, str, dict[int, list[Row]]]]:
        """(phase, what was trained, seed → rows) of everything that was trained."""
        found: dict[tuple[str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            if row.experiment["phase"] != "between":
                found[row.experiment["phase"], _trained(row)][row.experiment["seed"]].append(row)
        return [(phase, task, dict(rows)) for (phase, task), rows in found.items()]

    def families(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """Sets of pretrainings, (images, steps), that differ in their images: with equal steps, and with equal
        epochs.
        """
        sizes = sorted({(row.experiment["images"], row.experiment["steps"]) for row in self.of("pretrain")})
        found: list[tuple[str, list[tuple[int, int]]]] = []
        for steps in sorted({steps for _, steps in sizes}):
            same = [size for size in sizes if size[1] == steps]
            found += [(f"{steps} steps each", same)] if len(same) > 1 else []
        taken: set[tuple[int, int]] = set()
        for images, steps in sizes:
            same = [s for s in sizes if abs(s[1] * images / (s[0] * steps) - 1) < SAME_EPOCHS and s not in taken]
            if len(same) > 1:
                taken |= set(same)
                found.append((f"equal epochs ({', '.join(str(s) for _, s in same)} steps)", same))
        return found


def _trained(row: Row) -> str:
    """What was trained: the task, or which pretraining."""
    cell = row.experiment
    return cell.get("task") or f"pretraining, {cell['images']} images, {cell['steps']} steps"


def members(row: Row, group: str) -> list[dict[str, Any]]:
    """What a row says of each matrix of a group."""
    inside = [one for one in row.values["matrices"].values() if one["block"] is not None]
    last = max(one["block"] for one in inside)
    if group == "all matrices":
        return inside
    return [one for one in inside if one["block"] == last and one["role"].startswith("ffn.")]


def curves(row: Row, group: str) -> Curves:
    """Curves of a group's matrices."""
    of = members(row, group)
    first, size, null = (
        np.array([one[name] for one in of], dtype=np.float64) for name in ("first", "update_first", "null")
    )
    return Curves(first, size, null, float(np.mean([one["chance"] for one in of])))


def _claim(claim: str, setting: str, group: str, measure: str, each: Sequence[float]) -> list[Claim]:
    if not each:
        return []
    effect, low, high = student_interval(each)
    values = tuple(round(x, 5) for x in each)
    told = verdict(claim, measure, low, high)
    return [Claim(claim, setting, group, measure, effect, low, high, len(each), values, told)]


# --- (a) ----------------------------------------------------------------------------------------------------------


def _stages(grid: Grid) -> list[Claim]:
    """Neighbouring checkpoints of pretraining: the last third of the intervals against the first."""
    found: list[Claim] = []
    text = "(a) alignment between checkpoints rises"
    setting = "pretraining, mean over its sizes"
    runs = grid.by_seed("pretrain")
    for group in GROUPS:
        for name, measure in (
            ("next", "neighbours, last third − first third"),
            ("update_next", "‖delta‖/‖W‖ between neighbours, last third − first third"),
        ):
            each = [float(np.mean([_rise(members(row, group), name) for row in rows])) for rows in runs.values()]
            found += _claim(text, setting, group, measure, each)
    each = [float(np.mean([_rise_at_equal_size(row) for row in rows])) for rows in runs.values()]
    return found + _claim(text, setting, GROUPS[0], "pairs at equal ‖delta‖/‖W‖, second half − first half", each)


def _rise(of: Sequence[Mapping[str, Any]], name: str) -> float:
    steps = np.array([one[name] for one in of], dtype=np.float64).mean(axis=0)
    third = max(1, len(steps) // 3)
    return float(steps[-third:].mean() - steps[:third].mean())


def _rise_at_equal_size(row: Row) -> float:
    """Pairs of late checkpoints against early pairs as far apart, the latter interpolated by size from (0, 1)."""
    differences = []
    for one in row.values["ffn"].values():
        aligned, size = (np.array(one[name], dtype=np.float64) for name in ("between", "update_between"))
        n = len(aligned)
        early, late = (
            [(i, j) for i in part for j in part if i < j] for part in (range(n // 2 + 1), range(n // 2, n))
        )
        curve = sorted([(0.0, 1.0), *((size[pair], aligned[pair]) for pair in early)])
        x, y = np.array(curve).T
        inside = [pair for pair in late if size[pair] <= x[-1]]
        differences.append(np.mean([aligned[pair] - np.interp(size[pair], x, y) for pair in inside]))
    return float(np.mean(differences))


# --- (b) ----------------------------------------------------------------------------------------------------------


def _scale(grid: Grid) -> list[Claim]:
    """Alignment after what follows, against the number of pretraining images."""
    found: list[Claim] = []
    for name, sizes in grid.families():
        for task in ("same_task", "second_data", "true_labels"):
            for group in GROUPS:
                text, setting = "(b) larger sets keep more", f"{task}, {name}"
                table = _complete(grid, task, sizes, group)
                per_doubling = [math.log2(images) for images, _ in sizes]
                for measure, value in _MEASURES.items():
                    each = [_slope(per_doubling, value(of)) for of in table]
                    found += _claim(text, setting, group, f"{measure}, per doubling of images", each)
    return found


def _complete(grid: Grid, task: str, sizes: Sequence[tuple[int, int]], group: str) -> list[list[Curves]]:
    """For each seed that has them all: the curves after each pretraining."""
    found = []
    for rows in grid.by_seed("post", task=task).values():
        by_size = {(row.experiment["images"], row.experiment["steps"]): row for row in rows}
        if all(size in by_size for size in sizes):
            found.append([curves(by_size[size], group) for size in sizes])
    return found


_MEASURES: dict[str, Callable[[Sequence[Curves]], list[float]]] = {
    "alignment at the end": lambda of: [c.end for c in of],
    "‖delta‖/‖W‖ at the end": lambda of: [c.end_size for c in of],
    "alignment at equal ‖delta‖/‖W‖": at_equal_size,
}


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(x, y, 1)[0])


# --- (c) ----------------------------------------------------------------------------------------------------------


def _labels(grid: Grid) -> list[Claim]:
    """Random labels against true ones, from the same weights and images."""
    found: list[Claim] = []
    for phase, setting in (
        ("post", "from pretrained weights, mean over sizes"),
        ("scratch", "from random weights"),
    ):
        for group in GROUPS:
            pairs = _matched(grid, phase, group)
            for measure, value in _MEASURES.items():
                each = [float(np.mean([b - a for a, b in map(value, of)])) for of in pairs.values()]
                found += _claim(
                    "(c) random labels lose it faster", setting, group, f"{measure}, random − true", each
                )
    return found


def _matched(grid: Grid, phase: str, group: str) -> dict[int, list[list[Curves]]]:
    """Seed → [true, random] curves for each start that has both."""
    found: dict[int, list[list[Curves]]] = defaultdict(list)
    for row in grid.of(phase, task="true_labels"):
        start = {name: row.experiment[name] for name in ("seed", "images", "steps") if name in row.experiment}
        for other in grid.of(phase, task="random_labels", **start):
            found[row.experiment["seed"]].append([curves(row, group), curves(other, group)])
    return found


# --- (d) ----------------------------------------------------------------------------------------------------------


def _scratch(grid: Grid) -> list[Claim]:
    """The start against the end: from random weights, and against the same training from pretrained ones."""
    found: list[Claim] = []
    text = "(d) from scratch"
    for group in GROUPS:
        by_seed = grid.by_seed("pretrain").values()
        for measure, value in (("init with trained − chance", "beyond_chance"), ("‖delta‖/‖W‖", "end_size")):
            each = [float(np.mean([getattr(curves(row, group), value) for row in rows])) for rows in by_seed]
            found += _claim(text, "pretraining itself, mean over its sizes", group, measure, each)
        for task in ("same_task", "second_data", "true_labels", "random_labels"):
            scratch = {row.experiment["seed"]: curves(row, group) for row in grid.of("scratch", task=task)}
            found += _claim(
                text, task, group, "init with trained − chance", [c.beyond_chance for c in scratch.values()]
            )
            found += _claim(text, task, group, "‖delta‖/‖W‖", [c.end_size for c in scratch.values()])
            posts = grid.by_seed("post", task=task)
            for measure, value_of in _MEASURES.items():
                each = [
                    float(
                        np.mean([a - b for a, b in (value_of([curves(row, group), scratch[seed]]) for row in rows)])
                    )
                    for seed, rows in posts.items()
                    if seed in scratch
                ]
                found += _claim(text, task, group, f"{measure}, pretrained − scratch", each)
    return found


def _between_seeds(grid: Grid) -> list[Claim]:
    found: list[Claim] = []
    for group in GROUPS:
        settings: dict[str, list[float]] = defaultdict(list)
        for row in grid.of("between"):
            of = members(row, group)
            name = _trained(row) + (" from scratch" if "task" in row.experiment else "")
            settings[name].append(float(np.mean([one["first"][-1] - one["chance"] for one in of])))
        for name, each in settings.items():
            found += _claim("(d) between two seeds", name, group, "alignment − chance (pairs share seeds)", each)
    return found


# --- the null -----------------------------------------------------------------------------------------------------


def _null(grid: Grid) -> list[Claim]:
    """What follows pretraining, against a Gaussian update of the same size."""
    found: list[Claim] = []
    for phase, start in (("post", "pretrained"), ("scratch", "random")):
        for task in ("same_task", "second_data", "true_labels", "random_labels"):
            for group in GROUPS:
                each = []
                for rows in grid.by_seed(phase, task=task).values():
                    of = [curves(row, group) for row in rows]
                    each.append(float(np.mean([c.end - c.null.mean() for c in of])))
                measure = "alignment at the end − that of a Gaussian update as large"
                found += _claim("(e) beyond a random update", f"{task} from {start} weights", group, measure, each)
    return found


# --- what was learned ---------------------------------------------------------------------------------------------


def _learned(grid: Grid) -> list[Claim]:
    """Whether a training did what it was for: its losses, and the accuracy of a classification, at the end."""
    found: list[Claim] = []
    for phase, task, rows in grid.trainings():
        start = {"pretrain": "", "post": " from pretrained weights", "scratch": " from random weights"}[phase]
        for name, measure in (
            ("loss", "training loss"),
            ("validation", "validation loss"),
            ("accuracy", "validation accuracy"),
        ):
            each = [
                float(np.mean([row.values["log"][-1][name] for row in of]))
                for of in rows.values()
                if all(name in row.values["log"][-1] for row in of)
            ]
            found += _claim("(f) what was learned", f"{task}{start}", "the model", f"{measure} at the end", each)
    return found


_PARTS = (_stages, _scale, _labels, _scratch, _between_seeds, _null, _learned)
