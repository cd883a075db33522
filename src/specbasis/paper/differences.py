"""Differences between groups of runs, one run a seed: over the seeds, and over the examples of the dev set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from specbasis.core.statistics import (
    Array,
    Positions,
    bootstrap,
    mean_and_spread,
    paired_t_test,
    percentile_interval,
)
from specbasis.finetuning.metrics import METRICS, Predictions
from specbasis.finetuning.tasks import GLUE, Task
from specbasis.jobs.experiments import Row
from specbasis.paper.grid import Experiment

RESAMPLES = 2000
"""Of a dev set, for an interval."""
MEANING = (
    f"[95 % interval over the examples that are scored, these seeds; {RESAMPLES} paired resamples]; p of Student's "
    "paired t-test over the seeds, on these examples, two-sided. Neither is corrected for the number "
    "of comparisons."
)
"""What `Difference.shown` shows behind the mean."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a grid.

    Attributes:
        task: its task.
        values: of its row.
    """

    task: Task
    values: Mapping[str, Any]

    @property
    def score(self) -> float:
        """On what is scored."""
        return float(self.values["score"])

    @cached_property
    def predictions(self) -> Predictions | None:
        """On the (first) dev set; None where the row has no predictions."""
        packed = self.values.get("predictions")
        return Predictions.unpacked(next(iter(packed.values()))) if packed else None

    @cached_property
    def resampled(self) -> Array | None:
        """See `resampled`."""
        return None if self.predictions is None else resampled(self.task, self.predictions)

    @property
    def chance(self) -> float | None:
        """Score of the class that is most frequent in the dev set; 0 for a correlation."""
        if self.predictions is None:
            return None
        return self.task.score(self.predictions.majority(self.task))


def runs(rows: Iterable[Row], cells: Sequence[Experiment]) -> dict[int, Run]:
    """The runs of some cells of one task that differ in nothing but the seed, by seed."""
    task, wanted = GLUE[cells[0].task], set(cells)
    ran = [row for row in rows if row.error is None and Experiment.of(row.experiment) in wanted]
    return {row.experiment["seed"]: Run(task, row.values) for row in ran}


def percent(scores: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, in percent; – where nothing ran."""
    if not scores:
        return "–"
    mean, spread = mean_and_spread(scores)
    return f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def resampled(task: Task, predictions: Predictions, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """The score of a run on a dev set of which examples are drawn with replacement, for each resample.

    Two runs on the same dev set meet the same resamples, so their difference is paired. Costs the statistic on
    resamples × examples values, 2¹⁹ examples at once.

    Source: Efron & Tibshirani 1993, §13.3 (percentile interval). Not in Yu et al. 2026.
    """
    values = predictions.columns

    def score(drawn: Positions) -> Array:
        return np.asarray(task.score({name: METRICS[name].statistic(values[drawn]) for name in task.metrics}))

    return bootstrap(score, len(values), resamples, seed=seed, at_once=max(1, 2**19 // len(values)))


@dataclass(frozen=True)
class Difference:
    """Score − that of a reference, over the seeds that both have.

    Attributes:
        each: of the seeds.
        interval: 95 % interval of the mean over examples of the dev set, the seeds as they are; None without
            predictions.
    """

    each: tuple[float, ...]
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean_and_spread(self.each)[0]

    @property
    def p(self) -> float | None:
        """Of Student's paired t-test over seeds, two-sided; None for fewer than two, or all alike."""
        return paired_t_test(self.each)

    @property
    def shown(self) -> str:
        """In points: mean [interval] (p)."""
        ends = "" if self.interval is None else " [{:+.2f}, {:+.2f}]".format(*(100 * end for end in self.interval))
        return f"{100 * self.mean:+.2f}{ends}" + ("" if self.p is None else f" (p = {self.p:.2g})")


def difference(tested: Mapping[int, Run], reference: Mapping[int, Run]) -> Difference | None:
    """Between runs and others, paired by seed and example; None where they have no seed in common."""
    pairs = [(tested[seed], reference[seed]) for seed in tested if seed in reference]
    if not pairs:
        return None
    resamples = [(a.resampled, b.resampled) for a, b in pairs]
    moved = [a - b for a, b in resamples if a is not None and b is not None]
    interval = percentile_interval(np.mean(moved, axis=0)) if len(moved) == len(pairs) else None
    return Difference(tuple(a.score - b.score for a, b in pairs), interval)
