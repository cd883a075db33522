"""The search of learning rates for Tab. 1: on a part of train, with a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specbasis.finetuning.methods import METHODS
from specbasis.jobs.experiments import Row
from specbasis.paper.grid import SCRATCH, Experiment

BEYOND = 3
"""How many factors a search tries beyond those that it was given."""

SEARCH_SIZES = {"cola": (7000, 1500), "rte": (1660, 830), "wnli": (420, 210)}
"""`search_sizes` of some tasks. CoLA: models call everything acceptable until they have seen several thousand
sentences, and every rate would score 0. RTE and WNLI are small: two thirds and a third."""


def search_sizes(task: str) -> tuple[int, int]:
    """Examples of train that a search trains on, and others that it scores."""
    return SEARCH_SIZES.get(task, (2000, 1000))


def scaled_rate(method: str, task: str, factor: float = 1.0) -> float:
    """A multiple of the learning rate that a method is published with (Tab. 5's for the spectral ones)."""
    rate = METHODS["full" if method == SCRATCH else method].recipe(task)[1] * factor
    return float(f"{rate:.6g}")


@dataclass(frozen=True)
class Search:
    """How each method's learning rate is chosen.

    Every factor times the method's own rate is tried on few examples of the task. While the best is the smallest or
    the greatest that was tried, the next one beyond it is tried too, in the same ratio, `BEYOND` times at most.

    Attributes:
        factors: what the method's own learning rate is multiplied by.
        task: on which it is searched for all tasks; each on its own when empty.
        epochs: passes.
        seed: of the search alone.
    """

    factors: tuple[float, ...]
    task: str = ""
    epochs: float = 2
    seed: int = 0

    def experiments(self, task: str, method: str, rows: Iterable[Row] = ()) -> list[Experiment]:
        """The runs of a method's search, as far as they are known from the rows that are there."""
        return [self._experiment(task, method, factor) for factor in self.tried(task, method, rows)]

    def tried(self, task: str, method: str, rows: Iterable[Row] = ()) -> list[float]:
        """The factors of these runs, ascending."""
        rows, tried = list(rows), sorted(set(self.factors))
        if len(tried) < 2:
            return tried
        smaller, greater = tried[0] / tried[1], tried[-1] / tried[-2]
        for _ in range(BEYOND):
            best = self._best(task, method, tried, rows)
            if best == tried[0]:
                tried = [best * smaller, *tried]
            elif best == tried[-1]:
                tried = [*tried, best * greater]
            else:
                break
        return tried

    def factor(self, task: str, method: str, rows: Sequence[Row]) -> float | None:
        """The best factor of a method on a task, by the rows of its search; None until all of them are there."""
        return self._best(task, method, self.tried(task, method, rows), rows)

    def _best(self, task: str, method: str, factors: Sequence[float], rows: Sequence[Row]) -> float | None:
        """The best of some factors; of equal ones the nearest to 1. None where one has no score yet."""
        scores = {Experiment.of(row.experiment): row.values["score"] for row in rows if row.error is None}
        score = {factor: scores.get(self._experiment(task, method, factor)) for factor in factors}
        if None in score.values():
            return None
        return max(factors, key=lambda factor: (score[factor], -abs(math.log(factor))))

    def _experiment(self, task: str, method: str, factor: float) -> Experiment:
        task = self.task or task
        rate = scaled_rate(method, task, factor)
        return Experiment(task, method, self.seed, self.epochs, rate, *search_sizes(task))
