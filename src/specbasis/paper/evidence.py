"""Numbers with intervals from the rows of experiments, for the page of claims.

Every kind of rows is read as lines of named cells (`Results.lines`), and each function with ``@number`` on it makes
an `Effect` of some; a claim names the function and its arguments (see `claims`).
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from specbasis.core.statistics import correlation, correlation_interval, student_interval
from specbasis.finetuning.tasks import GLUE
from specbasis.jobs.experiments import Row, read_experiments
from specbasis.paper.ablation_page import REFERENCE, Runs
from specbasis.paper.differences import Difference, Run, difference, runs
from specbasis.paper.fig5 import panel
from specbasis.paper.formation_claims import claims
from specbasis.paper.one_task import ALL, correlations
from specbasis.paper.options import PanelOptions, TableOptions
from specbasis.paper.table1 import comparison
from specbasis.paper.table1_page import printed

DRAWS = 500
SEEDS = (42, 43, 44)
"""Of Tab. 1, its controls and Fig. 5."""

JUDGED = (REFERENCE, "leading", "gradient")
"""Bases whose resamples are drawn together: that takes as long as the examples, not as the bases."""

Lines = Iterable[Mapping[str, Any]]


class NoRowsError(LookupError):
    """An experiment that a number is of has not run."""


@dataclass(frozen=True)
class Effect:
    """A number and what is known of it.

    Attributes:
        mean: the number.
        low, high: the ends of its interval, or of its range.
        over: what the interval is over, in words.
    """

    mean: float
    low: float
    high: float
    over: str

    def minus(self, other: Effect) -> Effect:
        """The difference, with the widest interval that the two allow: nothing is known of how they are paired."""
        return Effect(
            self.mean - other.mean, self.low - other.high, self.high - other.low, f"{self.over}; two intervals"
        )


# --- lines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Results:
    """The folder of all committed results; each file is read once."""

    folder: Path
    _read: dict[str, Any] = field(default_factory=dict)

    def rows(self, name: str) -> list[Row]:
        """The rows of a grid that ended."""
        return list(self._once(name, lambda path: [r for r in read_experiments(path) if r.error is None]))

    def lines(self, name: str) -> Lines:
        """The lines of a CSV file, or of a grid: "GRID:KIND", with a kind of `KINDS`."""
        grid, _, kind = name.partition(":")
        if kind:
            rows = self.rows(grid)
            return list(self.kept(name, lambda: list(KINDS[kind](rows))))
        return list(self._once(name, lambda path: list(csv.DictReader(path.read_text("utf-8").splitlines()))))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made once of rows that several numbers share."""
        if name not in self._read:
            self._read[name] = make()
        return self._read[name]

    def _once(self, name: str, read: Callable[[Path], Any]) -> Any:
        path = self.folder / name
        if not path.exists():
            raise NoRowsError(f"no {name}")
        return self.kept(name, lambda: read(path))


def _edits(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of an intervention: the change of the metric in points, its interval over examples."""
    for row in rows:
        metric = next(key.partition(".")[0] for key in row.values if key.endswith(".change"))
        ends = {"value": "change", "low": "change_low", "high": "change_high"}
        yield row.experiment | {name: 100 * row.values[f"{metric}.{end}"] for name, end in ends.items()} | {
            "over": f"{row.values[f'{metric}.examples']} examples, one finetune"
        }  # fmt: skip


def _scores(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of the anatomy: the change of the score by an edit in points, its interval over examples."""
    for row in rows:
        for edit, score in row.values["scores"].items():
            if "difference" in score:
                low, high = (100 * end for end in score["interval"])
                numbers = {"value": 100 * score["difference"], "low": low, "high": high}
                yield row.experiment | numbers | {"edit": edit, "over": "examples, least to greatest of the seeds"}


def _matrices(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of the anatomy: the figures of a matrix's update; of the parts of size K as "PART.K"."""
    for row in rows:
        for name, figures in row.values["matrices"].items():
            parts = {f"{part}.{K}": v for K, of in figures.items() if K.isdigit() for part, v in of.items()}
            yield row.experiment | figures | parts | {"matrix": name}


def _logs(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of the formation: losses and accuracy at the end of each training."""
    yield from ({"task": ""} | row.experiment | row.values["log"][-1] for row in rows if row.values.get("log"))


def _effects(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of the formation: the effects that `formation_claims` computes."""
    for c in claims(rows):
        yield vars(c) | {"value": c.effect, "over": f"{c.seeds} seeds, Student's t"}


KINDS: Mapping[str, Callable[[Sequence[Row]], Iterator[dict[str, Any]]]] = {
    "edits": _edits,
    "scores": _scores,
    "matrices": _matrices,
    "logs": _logs,
    "effects": _effects,
}

# --- numbers of lines ---------------------------------------------------------------------------------------------

Where = Mapping[str, Sequence[str]]
"""Column → patterns, one of which has to match."""

NUMBERS: dict[str, Callable[..., Effect]] = {}
"""Name → function of `Results` and what a claim says beside it."""


def number(function: Callable[..., Effect]) -> Callable[..., Effect]:
    """Let claims name a function."""
    NUMBERS[function.__name__] = function
    return function


def _student(values: Sequence[float], unit: str) -> Effect:
    mean, low, high = student_interval(values)
    ends = (-math.inf, math.inf) if math.isnan(low) else (low, high)  # one unit says nothing of others
    return Effect(mean, *ends, f"{len(values)} {unit}, Student's t")


def _range(values: Sequence[float], unit: str) -> Effect:
    over = f"one {unit}" if len(values) == 1 else f"least and greatest of {len(values)} {unit}"
    return Effect(float(np.mean(values)), min(values), max(values), over)


def _greatest(values: Sequence[float], unit: str) -> Effect:
    return Effect(max(values), max(values), max(values), f"the greatest of {len(values)} {unit}")


SPREADS = {"student": _student, "range": _range, "greatest": _greatest}
"""From the values of some units, and what these are called, to a number with its interval."""


def _chosen(lines: Lines, where: Where) -> list[Mapping[str, Any]]:
    chosen = [
        line
        for line in lines
        if all(any(fnmatchcase(str(line.get(c)), str(p)) for p in patterns) for c, patterns in where.items())
    ]
    if not chosen:
        raise NoRowsError(f"no lines with {where}")
    return chosen


def _means(lines: Lines, column: str, by: Sequence[str]) -> dict[tuple[Any, ...], float]:
    """Mean of a column, of several with + between them, or of a difference with −, for each unit; NaN left out."""
    units: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    first, _, second = column.partition(" − ")
    for line in lines:
        values = [float(line[name]) - (float(line[second]) if second else 0.0) for name in first.split(" + ")]
        units[tuple(line[name] for name in by)] += [value for value in values if not math.isnan(value)]
    return {unit: float(np.mean(values)) for unit, values in units.items() if values}


@number
def units(
    results: Results,
    file: str,
    column: str,
    by: Sequence[str],
    unit: str,
    where: Where | None = None,
    less: Where | None = None,
    spread: str = "student",
) -> Effect:
    """A column, averaged in each unit, over units; or the difference of two such means in each unit.

    Args:
        results: where the file is.
        file: as `Results.lines` takes it.
        column: of it; "a + b" is the mean of two, "a − b" their difference.
        by: columns that tell the units.
        unit: what those are called.
        where: which lines.
        less: of the lines whose mean is subtracted, what differs from ``where``.
        spread: of `SPREADS`.
    """
    lines, where = results.lines(file), where or {}
    values = _means(_chosen(lines, where), column, by)
    if less is not None:
        others = _means(_chosen(lines, {**where, **less}), column, by)
        values = {name: value - others[name] for name, value in values.items() if name in others}
    return SPREADS[spread](list(values.values()), unit)


@number
def stated(results: Results, file: str, where: Where, less: Where | None = None, value: str = "value") -> Effect:
    """What lines state with their own interval: the mean, from the lowest end of any of them to the highest.

    Args:
        results: where the file is.
        file: as `Results.lines` takes it.
        where: which lines.
        less: of the lines that are subtracted, what differs from ``where``.
        value: the column of the number; its ends are in "low" and "high".
    """
    lines = _chosen(results.lines(file), where)
    numbers = np.array([[float(line[name]) for name in (value, "low", "high")] for line in lines])
    over = lines[0].get("over", "bootstrap")
    effect = Effect(float(numbers[:, 0].mean()), float(numbers[:, 1].min()), float(numbers[:, 2].max()), over)
    return effect.minus(stated(results, file, {**where, **less})) if less else effect


@number
def rank_correlation(results: Results, file: str, x: str, y: str, cluster: str, unit: str, where: Where) -> Effect:
    """Spearman's correlation of two columns; the interval by a bootstrap of whole clusters of lines."""
    lines = _chosen(results.lines(file), where)
    a, b = (np.array([float(line[name]) for line in lines]) for name in (x, y))
    clusters = np.unique([line[cluster] for line in lines], return_inverse=True)[1]
    low, high = correlation_interval(a, b, clusters, DRAWS)
    return Effect(correlation(a, b), low, high, f"{clusters.max() + 1} {unit}, bootstrap")


# --- numbers of stored predictions --------------------------------------------------------------------------------


def _points(moved: Difference | None) -> Effect:
    """A difference in points, with the wider of its two intervals at either end: over examples, and over seeds."""
    if moved is None or moved.interval is None:
        raise NoRowsError("no runs")
    _, low, high = student_interval(moved.each)
    ends = min(moved.interval[0], low), max(moved.interval[1], high)
    over = f"examples, and {len(moved.each)} seeds by Student's t: the wider"
    return Effect(100 * moved.mean, 100 * ends[0], 100 * ends[1], over)


@number
def table1(results: Results, task: str, method: str, than: str, epoch: int | None = None) -> Effect:
    """Score of one method of Tab. 1 or its controls − another's, in points; or its training loss in an epoch."""
    ran = [_table1_runs(results, task, name) for name in (method, than)]
    if epoch is None:
        return _points(difference(*ran))
    losses = [{seed: run.values["train_loss"][epoch] for seed, run in by_seed.items()} for by_seed in ran]
    return _student([losses[0][seed] - losses[1][seed] for seed in losses[0] if seed in losses[1]], "seeds")


def _table1_runs(results: Results, task: str, method: str) -> dict[int, Run]:
    def make() -> dict[int, Run]:
        rows = results.rows("table1")
        options = TableOptions(
            tasks=(task,),
            methods=(method,),
            seeds=SEEDS,
            search=(1, 4, 16),
            examples=(("sst2", 8000),),
            epochs=(("", 2.0), ("rte", 3.0)),
        )
        plan = comparison("table1", options)
        return runs(rows, [plan.cell(task, method, seed, plan.factors(rows)) for seed in SEEDS])

    return dict(results.kept(f"runs of {task} {method}", make))


@number
def panel5(results: Results, name: str, point: str, than: str) -> Effect:
    """Score at one point of a panel of Fig. 5 − that at another, in points."""
    options = PanelOptions(task="sst2", epochs=2.0, learning_rate=0.0064, examples=8000, seeds=SEEDS)
    drawn = panel(name, ranks=384, blocks=6, options=options)
    places = {place.label: [drawn.cell(place, seed) for seed in SEEDS] for place in drawn.points}
    rows = results.rows("table1")
    ran = [results.kept(f"{name} {at}", lambda at=at: runs(rows, places[at])) for at in (point, than)]
    return _points(difference(*ran))


@number
def basis(results: Results, task: str, size: int, basis: str) -> Effect:
    """Score with the core in a basis − that in a random one, in points, on held-out examples."""
    for row in results.rows("basis"):
        if (row.experiment["stage"], row.experiment["task"], row.experiment.get("size")) == ("runs", task, size):
            arms = [arm for arm in row.values["arms"] if arm["basis"] in (*JUDGED, basis)]
            of_size = results.kept(
                f"{task} {size} {basis not in JUDGED and basis}",
                lambda row=row, arms=arms: Runs(GLUE[task], size, {**row.values, "arms": arms}),
            )
            mean, (low, high), _ = of_size.difference(basis)
            over = f"{len(of_size.each(basis, 'score'))} seeds × {row.values['examples']:,} examples, bootstrap"
            return Effect(mean, low, high, over)
    raise NoRowsError(f"no runs of K = {size}")


@number
def one_task(results: Results, figure: str, part: str = ALL) -> Effect:
    """Spearman's correlation of alignment with the score, the size, or the score at equal size; finetunes of one
    base on one task.
    """
    rows = [row for row in results.rows("population/one-task") if row.error is None]
    lines = results.kept("one task", lambda: correlations(rows))
    line = next(line for line in lines if line["part"] == part)
    value, low, high = line[figure]
    over = f"{line['finetunes']} finetunes of {line['settings']} settings, bootstrap over settings"
    return Effect(value, low, high, over)


@number
def as_printed(results: Results, method: str, than: str, figure: str) -> Effect:
    """The paper's own Tab. 1: a method's average score − another's, of one seed; or its parameters in percent."""
    lines = {row["method"]: row for row in printed()["row"]}
    a, b = (float(lines[name][figure]) for name in (method, than))
    if figure == "parameters":
        return Effect(100 * a / b, 100 * a / b, 100 * a / b, "counted")
    return Effect(a - b, -math.inf, math.inf, "as the paper prints it: one seed, no interval")
