"""Tab. 1: the spectral adapter against every other method on GLUE; the controls that the table lacks; and the
scoreboard: the methods that score most for their size, at the head that fits a sentence encoder.

A configuration says which runs there are; lines are made of the rows of those that ended, and `table1_page` shows
them, and what is missing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specbasis.core.errors import InputError
from specbasis.core.statistics import mean_and_spread, percentile_interval
from specbasis.finetuning.methods import METHODS, TABLE_5
from specbasis.finetuning.tasks import GLUE, task_named
from specbasis.jobs.experiments import Row
from specbasis.paper.differences import Difference, Run, difference, runs
from specbasis.paper.floors import FLOORS, exists
from specbasis.paper.grid import SCRATCH, Experiment, Search, check_method, scaled_rate, variant
from specbasis.paper.options import TableOptions

OURS = "spectral"
EPOCHS: Mapping[str, float] = {task: epochs for task, (epochs, _) in TABLE_5.items()}
"""Epochs of each task, for every method (Yu et al. 2026, Tab. 5)."""
COMPARED = (
    "spectral",
    "full",
    "pissa",
    "lora",
    "lora-gaussian",
    "adalora",
    "dora",
    "houlsby",
    "pfeiffer",
    "bitfit",
    "svft",
    "svft-banded",
    "svft-random",
    "svft-top-k",
    "speclora",
    "lora-xs",
    "psoft",
    "probe",
)
CONTROLS = (
    "spectral",
    "spectral-random",
    SCRATCH,
    "spectral-scratch",
    "spectral-shuffled",
    "spectral-middle",
    "spectral-tail",
    "probe",
)
FRONT = (
    "spectral@basis=gradient@budget=0.1%",
    "spectral@basis=gradient@budget=1000",
    "spectral@budget=0.1%",
    "spectral",
    "lora-xs@15",
    "svft-banded",
    "lora@1",
    "lora",
    "bitfit",
    "full",
    "probe",
    *FLOORS,
)
"""The first is what the others are compared with. LoRA-XS trains 900 numbers so, at the paper's place."""


@dataclass(frozen=True)
class Preset:
    """What a grid is where nothing else is asked for.

    Attributes:
        methods: in the order in which they run.
        tasks: of GLUE.
        epochs: of each task.
        examples: of tasks that are cut down.
        own_rates: each method has a search of its own, at each of its sizes; else those of `RATE_FROM` take over
            another's, and sizes that of the method.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    epochs: Mapping[str, float] = field(default_factory=lambda: EPOCHS)
    examples: Mapping[str, int] = field(default_factory=dict)
    own_rates: bool = False


PRESETS = {
    "table1": Preset(COMPARED, tuple(task for task in GLUE if task in EPOCHS)),
    "controls": Preset(CONTROLS, ("sst2",)),
    "scoreboard": Preset(
        FRONT, ("sst2", "cola", "stsb"), dict.fromkeys(GLUE, 2.0), examples={"sst2": 8000}, own_rates=True
    ),
}

RATE_FROM = {
    SCRATCH: "full",
    "lora-gaussian": "lora",
    "dora": "lora",
    "speclora": "lora",
    "svft-random": "svft-banded",
    "svft-top-k": "svft-banded",
    "spectral-random": OURS,
    "spectral-scratch": OURS,
    "spectral-shuffled": OURS,
    "spectral-middle": OURS,
    "spectral-tail": OURS,
}
"""Methods that take over the factor which the search found for another."""


Factors = Mapping[tuple[str, str], float]
"""(task, method) → what the method's own learning rate is multiplied by."""


@dataclass(frozen=True)
class Comparison:
    """Methods on tasks over seeds.

    Attributes:
        name: of the files: "table1", "controls".
        tasks: names of GLUE tasks.
        methods: names of methods, in the order in which they run and are shown; ``spectral@300`` is one at rank
            300.
        seeds: outermost: a grid that is under way is a table already.
        epochs: of each task.
        examples: size of the fixed part of train, of tasks that are cut down.
        search: how learning rates are chosen; None: the published ones.
        held_out: examples of train that score the tasks that are cut down, in place of the dev set.
    """

    name: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: Mapping[str, float]
    examples: Mapping[str, int]
    search: Search | None
    held_out: int | None = None

    @property
    def references(self) -> list[str]:
        """The methods that the others are compared with."""
        return list(self.methods[:1]) if PRESETS[self.name].own_rates else ours(self.methods)

    def rate_from(self, method: str) -> str:
        """The method whose search chooses this one's learning rate; see `Preset.own_rates`."""
        if PRESETS[self.name].own_rates:
            return method
        name = variant(method)[0]
        return RATE_FROM.get(name, name)

    def cells(self, factors: Factors) -> list[Experiment]:
        """The runs, seeds outermost."""
        return [
            self.cell(task, method, seed, factors)
            for seed in self.seeds
            for task in self.tasks
            for method in self.methods
            if method not in FLOORS or (seed == self.seeds[0] and exists(method, GLUE[task]))
        ]

    def cell(self, task: str, method: str, seed: int, factors: Factors) -> Experiment:
        """One run."""
        name, fields = variant(method)
        return Experiment(
            task,
            name,
            seed,
            0.0 if name in FLOORS else self.epochs[task],
            scaled_rate(name, task, factors.get((task, self.rate_from(method)), 1.0)),
            self.examples.get(task),
            checkpoint=SCRATCH if name == "spectral-scratch" else None,
            held_out=self.held_out if task in self.examples else None,
            **fields,
        )

    def search_cells(self, rows: Sequence[Row] = ()) -> list[Experiment]:
        """The runs that choose the learning rates, as far as they are known from the rows that are there."""
        if self.search is None:
            return []
        cells = [cell for task, name in self._searched() for cell in self.search.experiments(task, name, rows)]
        return list(dict.fromkeys(cells))

    def factors(self, rows: Sequence[Row]) -> Factors:
        """The factor of each method whose search on a task is complete."""
        if self.search is None:
            return {}
        chosen = {(task, name): self.search.factor(task, name, rows) for task, name in self._searched()}
        return {key: factor for key, factor in chosen.items() if factor is not None}

    def _searched(self) -> list[tuple[str, str]]:
        names = dict.fromkeys(self.rate_from(method) for method in self.methods if method not in FLOORS)
        return [(task, name) for task in self.tasks for name in names]


def comparison(name: str, options: TableOptions | None = None, **keywords: Any) -> Comparison:
    """The configuration of ``table1``, ``controls`` or ``scoreboard``; its own where nothing is given.

    Args:
        name: of the three.
        options: what is asked for.
        **keywords: its fields, in its place.

    Raises:
        InputError: a task or a method does not exist, or no seeds.
    """
    options = TableOptions.of(options, keywords)
    preset = PRESETS[name]
    tasks = tuple(task_named(task).name for task in options.tasks) or preset.tasks
    methods = options.methods or preset.methods
    for method in methods:
        check_method(method)
    if options.head != "mean" and (blind := [method for method in methods if method in FLOORS]):
        raise InputError(f"got {blind[0]} with a head on the first state; want --head mean")
    if not options.seeds:
        raise InputError("got no seeds; want at least one")
    epochs = {**preset.epochs, **_by_task(options.epochs)}
    unknown = [task for task in tasks if task not in epochs]
    if unknown:
        raise InputError(f"the paper has no epochs for {GLUE[unknown[0]].title}; say --epochs {unknown[0]}=NUMBER")
    search_task = task_named(options.search_task).name if options.search_task else ""
    search = Search(options.search, search_task) if options.search else None
    examples = {**preset.examples, **_by_task(options.examples)}
    return Comparison(name, tasks, methods, options.seeds, epochs, examples, search, options.held_out)


def _by_task(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Numbers by task; one without a name holds for every task."""
    numbers: dict[str, Any] = {}
    for name, number in pairs:
        numbers |= {task_named(name).name: number} if name else dict.fromkeys(GLUE, number)
    return numbers


def rows_of(plan: Comparison, run: Callable[[list[Experiment]], list[Row]]) -> list[Row]:
    """The rows of the search, then of the runs; ``run`` gives those of some experiments (see `grid.run_grid`)."""
    searched: list[Row] = []
    cells: list[Experiment] = []
    while cells != (cells := plan.search_cells(searched)):  # each round may ask for rates beyond its own
        searched = run(cells)
    return [*searched, *run(plan.cells(plan.factors(searched)))]


FIGURES = {
    "adapter": ("parameters", "adapter"),
    "head": ("parameters", "head"),
    "total": ("parameters", "total"),
    "memory": ("peak_memory_bytes",),
    "seconds": ("cpu_seconds_per_epoch",),
    "wall": ("seconds_per_epoch",),
    "bytes": ("file_bytes",),
    "before": ("forgetting", "before"),
    "after": ("forgetting", "after"),
}
"""What a line shows beside the score, and where a run has it."""


@dataclass(frozen=True)
class Line:
    """One method on one task.

    Attributes:
        task, method: which.
        scores: of the seeds that ran.
        differences: to each of the references but itself, by its name among the methods; without what has no seed
            in common.
        interval: 95 % interval of the mean score over the examples, these seeds; None without predictions.
        chance: score of the class that is most frequent in the dev set, or 0 for a correlation; None where the
            rows have no predictions.
        values: means of the other figures over the seeds.
    """

    task: str
    method: str
    scores: Mapping[int, float]
    differences: Mapping[str, Difference]
    interval: tuple[float, float] | None
    chance: float | None
    values: Mapping[str, float | None]

    @property
    def mean(self) -> float:
        """Of the scores, over the seeds."""
        return mean_and_spread(list(self.scores.values()))[0]


def lines(plan: Comparison, rows: Sequence[Row]) -> list[Line]:
    """Every line of the table, those without a run yet too."""
    table, factors = [], plan.factors(rows)
    for task in plan.tasks:
        ran = {
            method: runs(rows, [plan.cell(task, method, seed, factors) for seed in plan.seeds])
            for method in plan.methods
        }
        for method, seeds in ran.items():
            moves = {name: difference(seeds, ran[name]) for name in plan.references if name != method}
            table.append(
                Line(
                    task,
                    method,
                    {seed: run.score for seed, run in seeds.items()},
                    {name: moved for name, moved in moves.items() if moved is not None},
                    _interval(list(seeds.values())),
                    next((run.chance for run in seeds.values()), None),
                    {name: _mean([run.values for run in seeds.values()], path) for name, path in FIGURES.items()},
                )
            )
    return table


def _interval(runs: Sequence[Run]) -> tuple[float, float] | None:
    resamples = [scores for run in runs if (scores := run.resampled) is not None]
    return percentile_interval(np.mean(resamples, axis=0)) if resamples else None


def _mean(runs: Sequence[Any], path: Sequence[str]) -> float | None:
    """The mean of a figure that stands at a path in the values of runs; None where none has it."""
    figures = [functools.reduce(operator.getitem, path, values) for values in runs]
    known = [float(figure) for figure in figures if figure is not None]
    return mean_and_spread(known)[0] if known else None


def ours(methods: Iterable[str]) -> list[str]:
    """Those of the methods that are the spectral one, at any rank: what the others are compared with."""
    return [method for method in methods if method.partition("@")[0] == OURS]


_TITLES = {SCRATCH: "Full, random start", **FLOORS}


def title_of(method: str) -> str:
    """A method's name in tables and figures."""
    name, fields = variant(method)
    title = _TITLES.get(name) or METHODS[name].title
    words = {"rank": "K = {}", "basis": "{} basis", "budget": "{} coefficients"}
    if str(fields.get("budget")).endswith("%"):
        words["budget"] = "{} of the base"
    return ", ".join([title, *(words[field].format(value) for field, value in fields.items())])
