"""What the rows of a formation grid say about each claim, as effects with intervals over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specbasis.core.errors import InputError
from specbasis.core.statistics import student_interval
from specbasis.jobs.experiments import Row
from specbasis.paper.formation_rows import GROUPS, Curves, Grid, at_equal_size, curves, members, trained


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
    """Every claim that the rows have experiments for.

    Raises:
        InputError: no experiment of the grid has ended.
    """
    grid = Grid([row for row in rows if row.error is None])
    effects = [claim for part in _PARTS for claim in part(grid)]
    if not effects:
        raise InputError("no experiment of this grid that a claim needs has ended; run more of it")
    return effects


def markdown(effects: Sequence[Claim]) -> str:
    """Claims as a table."""
    lines = [
        "Each interval holds with 95 % for itself: of twenty, one misses by chance.",
        "",
        "| claim | setting | matrices | effect | 95 % interval | seeds | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in effects:
        ends = "–" if math.isnan(c.low) else f"{c.low:+.3f} … {c.high:+.3f}"
        numbers = f"{c.effect:+.3f} | {ends} | {c.seeds} | {c.verdict}"
        lines.append(f"| {c.claim}: {c.measure} | {c.setting} | {c.group} | {numbers} |")
    return "\n".join(lines) + "\n"


def _claim(claim: str, setting: str, group: str, measure: str, each: Sequence[float]) -> list[Claim]:
    if not each:
        return []
    effect, low, high = student_interval(each)
    values = tuple(round(x, 5) for x in each)
    outcome = verdict(claim, measure, low, high)
    return [Claim(claim, setting, group, measure, effect, low, high, len(each), values, outcome)]


# --- (a) ----------------------------------------------------------------------------------------------------------


def _stages(grid: Grid) -> list[Claim]:
    """Neighbouring checkpoints of pretraining: the last third of the intervals against the first."""
    effects: list[Claim] = []
    text = "(a) alignment between checkpoints rises"
    setting = "pretraining, mean over its sizes"
    runs = grid.by_seed("pretrain")
    for group in GROUPS:
        for name, measure in (
            ("next", "neighbours, last third − first third"),
            ("update_next", "‖delta‖/‖W‖ between neighbours, last third − first third"),
        ):
            each = [float(np.mean([_rise(members(row, group), name) for row in rows])) for rows in runs.values()]
            effects += _claim(text, setting, group, measure, each)
    each = [float(np.mean([_rise_at_equal_size(row) for row in rows])) for rows in runs.values()]
    return effects + _claim(text, setting, GROUPS[0], "pairs at equal ‖delta‖/‖W‖, second half − first half", each)


def _rise(of: Sequence[Mapping[str, Any]], name: str) -> float:
    steps = np.array([matrix[name] for matrix in of], dtype=np.float64).mean(axis=0)
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


# --- (b) ----------------------------------------------------------------------------------------------------------


def _scale(grid: Grid) -> list[Claim]:
    """Alignment after what follows, against the number of pretraining images."""
    effects: list[Claim] = []
    for name, sizes in grid.families():
        for task in ("same_task", "second_data", "true_labels"):
            for group in GROUPS:
                text, setting = "(b) larger sets keep more", f"{task}, {name}"
                table = _complete(grid, task, sizes, group)
                per_doubling = [math.log2(images) for images, _ in sizes]
                for measure, value in _MEASURES.items():
                    each = [_slope(per_doubling, value(of)) for of in table]
                    effects += _claim(text, setting, group, f"{measure}, per doubling of images", each)
    return effects


def _complete(grid: Grid, task: str, sizes: Sequence[tuple[int, int]], group: str) -> list[list[Curves]]:
    """For each seed that has them all: the curves after each pretraining."""
    tables = []
    for rows in grid.by_seed("post", task=task).values():
        by_size = {(row.experiment["images"], row.experiment["steps"]): row for row in rows}
        if all(size in by_size for size in sizes):
            tables.append([curves(by_size[size], group) for size in sizes])
    return tables


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
    effects: list[Claim] = []
    for phase, setting in (
        ("post", "from pretrained weights, mean over sizes"),
        ("scratch", "from random weights"),
    ):
        for group in GROUPS:
            pairs = _matched(grid, phase, group)
            for measure, value in _MEASURES.items():
                each = [float(np.mean([b - a for a, b in map(value, of)])) for of in pairs.values()]
                effects += _claim(
                    "(c) random labels lose it faster", setting, group, f"{measure}, random − true", each
                )
    return effects


def _matched(grid: Grid, phase: str, group: str) -> dict[int, list[list[Curves]]]:
    """Seed → [true, random] curves for each start that has both."""
    pairs: dict[int, list[list[Curves]]] = defaultdict(list)
    for row in grid.of(phase, task="true_labels"):
        start = {name: row.experiment[name] for name in ("seed", "images", "steps") if name in row.experiment}
        for other in grid.of(phase, task="random_labels", **start):
            pairs[row.experiment["seed"]].append([curves(row, group), curves(other, group)])
    return pairs


# --- (d) ----------------------------------------------------------------------------------------------------------


def _scratch(grid: Grid) -> list[Claim]:
    """The start against the end: from random weights, and against the same training from pretrained ones."""
    effects: list[Claim] = []
    text = "(d) from scratch"
    for group in GROUPS:
        by_seed = grid.by_seed("pretrain").values()
        for measure, value in (("init with trained − chance", "beyond_chance"), ("‖delta‖/‖W‖", "end_size")):
            each = [float(np.mean([getattr(curves(row, group), value) for row in rows])) for rows in by_seed]
            effects += _claim(text, "pretraining itself, mean over its sizes", group, measure, each)
        for task in ("same_task", "second_data", "true_labels", "random_labels"):
            scratch = {row.experiment["seed"]: curves(row, group) for row in grid.of("scratch", task=task)}
            effects += _claim(
                text, task, group, "init with trained − chance", [c.beyond_chance for c in scratch.values()]
            )
            effects += _claim(text, task, group, "‖delta‖/‖W‖", [c.end_size for c in scratch.values()])
            posts = grid.by_seed("post", task=task)
            for measure, value_of in _MEASURES.items():
                each = [
                    float(
                        np.mean([a - b for a, b in (value_of([curves(row, group), scratch[seed]]) for row in rows)])
                    )
                    for seed, rows in posts.items()
                    if seed in scratch
                ]
                effects += _claim(text, task, group, f"{measure}, pretrained − scratch", each)
    return effects


def _between_seeds(grid: Grid) -> list[Claim]:
    effects: list[Claim] = []
    for group in GROUPS:
        settings: dict[str, list[float]] = defaultdict(list)
        for row in grid.of("between"):
            of = members(row, group)
            name = trained(row) + (" from scratch" if "task" in row.experiment else "")
            settings[name].append(float(np.mean([matrix["first"][-1] - matrix["chance"] for matrix in of])))
        for name, each in settings.items():
            effects += _claim("(d) between two seeds", name, group, "alignment − chance (pairs share seeds)", each)
    return effects


# --- the null -----------------------------------------------------------------------------------------------------


def _null(grid: Grid) -> list[Claim]:
    """What follows pretraining, against a Gaussian update of the same size."""
    effects: list[Claim] = []
    for phase, start in (("post", "pretrained"), ("scratch", "random")):
        for task in ("same_task", "second_data", "true_labels", "random_labels"):
            for group in GROUPS:
                each = []
                for rows in grid.by_seed(phase, task=task).values():
                    of = [curves(row, group) for row in rows]
                    each.append(float(np.mean([c.end - c.null.mean() for c in of])))
                measure = "alignment at the end − that of a Gaussian update as large"
                effects += _claim(
                    "(e) beyond a random update", f"{task} from {start} weights", group, measure, each
                )
    return effects


# --- what was learned ---------------------------------------------------------------------------------------------


def _learned(grid: Grid) -> list[Claim]:
    """Whether a training did what it was for: its losses, and the accuracy of a classification, at the end."""
    effects: list[Claim] = []
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
            effects += _claim("(f) what was learned", f"{task}{start}", "the model", f"{measure} at the end", each)
    return effects


_PARTS = (_stages, _scale, _labels, _scratch, _between_seeds, _null, _learned)
