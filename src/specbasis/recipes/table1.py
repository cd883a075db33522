"""Tab. 1: the spectral adapter against every other method on GLUE; and the controls that the table lacks.

A configuration says which runs there are; the table is made of the rows of those that ended, and shows what is
missing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from specbasis.cells import Progress, Row
from specbasis.errors import InputError
from specbasis.finetune.grid import (
    BEYOND,
    SCRATCH,
    Cell,
    Search,
    Setting,
    by_seed,
    mean_and_spread,
    run_grid,
    scaled_rate,
)
from specbasis.finetune.metrics import Array, Predictions
from specbasis.finetune.tasks import GLUE, Task, task_named
from specbasis.intervene.evaluators import STATISTICS
from specbasis.results import write_whole

BASE = "microsoft/deberta-v3-base"
OURS = "spectral"
EPOCHS = {"sst2": 20, "mrpc": 12, "mnli": 5, "cola": 30, "qnli": 10, "qqp": 10, "rte": 20, "stsb": 10}
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
    """

    name: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (42,)
    epochs: Mapping[str, float] = field(default_factory=lambda: EPOCHS)
    examples: Mapping[str, int] = field(default_factory=dict)
    search: Search | None = None

    def cells(self, factors: Mapping[str, float], seeds: Sequence[int] | None = None) -> list[Cell]:
        """The runs, seeds outermost."""
        return [
            self.cell(task, method, seed, factors)
            for seed in (self.seeds if seeds is None else seeds)
            for task in self.tasks
            for method in self.methods
        ]

    def cell(self, task: str, method: str, seed: int, factors: Mapping[str, float]) -> Cell:
        """One run."""
        name, _, rank = method.partition("@")
        return Cell(
            task,
            name,
            seed,
            self.epochs[task],
            scaled_rate(name, task, factors.get(rate_from(name), 1.0)),
            self.examples.get(task),
            rank=int(rank) if rank else None,
            checkpoint=SCRATCH if name == "spectral-scratch" else None,
        )

    def search_cells(self, rows: Sequence[Row] = ()) -> list[Cell]:
        """The runs that choose the learning rates, as far as they are known from the rows that are there."""
        return (
            [] if self.search is None else [c for name in self._searched() for c in self.search.cells(name, rows)]
        )

    def factors(self, rows: Sequence[Row]) -> dict[str, float]:
        """The factor of each method whose search is complete."""
        if self.search is None:
            return {}
        found = {name: self.search.factor(name, rows) for name in self._searched()}
        return {name: factor for name, factor in found.items() if factor is not None}

    def _searched(self) -> list[str]:
        return list(dict.fromkeys(rate_from(method.partition("@")[0]) for method in self.methods))


def rate_from(method: str) -> str:
    """The method whose search chooses this one's learning rate."""
    return RATE_FROM.get(method, method)


def comparison(
    name: str,
    *,
    tasks: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (42,),
    epochs: Mapping[str, float] | None = None,
    examples: Mapping[str, int] | None = None,
    search: Search | None = None,
) -> Comparison:
    """The configuration of ``table1`` or ``controls``; the paper's own where nothing is given.

    Raises:
        InputError: a task or a method does not exist, or no seeds.
    """
    from specbasis.finetune.methods import method_named

    paper = tuple(task for task in GLUE if task in EPOCHS)
    names = tuple(task_named(task).name for task in tasks) or (paper if name == "table1" else ("sst2",))
    chosen = tuple(methods) or (COMPARED if name == "table1" else CONTROLS)
    for method in chosen:
        first, at, rank = method.partition("@")
        if at and not rank.isdigit():
            raise InputError(f"got method {method!r}; want NAME or NAME@RANK")
        if first != SCRATCH:
            method_named(first)
    if not seeds:
        raise InputError("got no seeds; want at least one")
    passes = {**EPOCHS, **(epochs or {})}
    unknown = [task for task in names if task not in passes]
    if unknown:
        raise InputError(f"the paper has no epochs for {GLUE[unknown[0]].title}; say --epochs {unknown[0]}=NUMBER")
    return Comparison(name, names, chosen, tuple(seeds), passes, dict(examples or {}), search)


def run(
    what: Comparison, setting: Setting, out: str | Path, progress: Callable[[Progress], None] | None = None
) -> tuple[list[Row], dict[str, float]]:
    """Run the search, then the runs; returns all rows of the two, and the factors."""
    searched: list[Row] = []
    while len(cells := what.search_cells(searched)) > len(searched):  # each round may ask for rates beyond its own
        searched = run_grid(cells, setting, out, progress)
    factors = what.factors(searched)
    return [*searched, *run_grid(what.cells(factors), setting, out, progress)], factors


RESAMPLES = 2000
"""Of a dev set, for an interval."""
FIGURES = {
    "adapter": ("parameters", "adapter"),
    "head": ("parameters", "head"),
    "memory": ("peak_memory_bytes",),
    "seconds": ("cpu_seconds_per_epoch",),
    "wall": ("seconds_per_epoch",),
    "bytes": ("file_bytes",),
    "before": ("forgetting", "before"),
    "after": ("forgetting", "after"),
}
"""What a line shows beside the score, and where a run has it."""


# --- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One method on one task.

    Attributes:
        task, method: which.
        seeds: those that ran.
        mean, spread: of the score; spread is the standard deviation over seeds, None for one.
        difference: mean of (score − spectral's) over the seeds that both have; None for the spectral method itself.
        p: of Student's paired t-test on these differences, two-sided; None for fewer than two, or no difference.
        interval: 95 % interval of the difference over examples of the dev set, seeds as they are (`resampled`).
        values: means of the other figures over the seeds.
    """

    task: str
    method: str
    seeds: tuple[int, ...]
    mean: float | None = None
    spread: float | None = None
    difference: float | None = None
    p: float | None = None
    interval: tuple[float, float] | None = None
    values: Mapping[str, float | None] = field(default_factory=dict)


def lines(what: Comparison, rows: Sequence[Row], factors: Mapping[str, float]) -> list[Line]:
    """Every line of the table, those without a run yet too."""
    found = []
    for task in what.tasks:
        reference = _runs(what, rows, factors, task, OURS)
        found += [
            _line(task, method, _runs(what, rows, factors, task, method), reference) for method in what.methods
        ]
    return found


@dataclass(frozen=True, eq=False)
class _Run:
    """The values of a row, and its scores on the resampled dev set; None where the row has no predictions."""

    values: Mapping[str, Any]
    resampled: Array | None

    @property
    def score(self) -> float:
        return float(self.values["score"])


def _runs(
    what: Comparison, rows: Sequence[Row], factors: Mapping[str, float], task: str, method: str
) -> dict[int, _Run]:
    found = by_seed(rows, [what.cell(task, method, seed, factors) for seed in what.seeds])
    return {seed: _Run(values, _resampled(task, values)) for seed, values in found.items()}


def _line(task: str, method: str, runs: Mapping[int, _Run], reference: Mapping[int, _Run]) -> Line:
    if not runs:
        return Line(task, method, ())
    mean, spread = mean_and_spread([run.score for run in runs.values()])
    common = [seed for seed in runs if seed in reference] if method != OURS else []
    differences = [runs[seed].score - reference[seed].score for seed in common]
    return Line(
        task,
        method,
        tuple(runs),
        mean,
        spread,
        mean_and_spread(differences)[0] if differences else None,
        paired_p(differences),
        _interval([(runs[seed].resampled, reference[seed].resampled) for seed in common]),
        {name: _mean([_at(run.values, path) for run in runs.values()]) for name, path in FIGURES.items()},
    )


def _resampled(task: str, values: Mapping[str, Any]) -> Array | None:
    said = values.get("predictions")
    return resampled(GLUE[task], Predictions.unpacked(next(iter(said.values())))) if said else None


def resampled(task: Task, said: Predictions, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """The score of a run on a dev set of which examples are drawn with replacement, for each resample.

    Two runs on the same dev set meet the same resamples, so their difference is paired. Costs the statistic on
    resamples × examples values; several resamples at once, within 2²⁰ numbers.

    Source: Efron & Tibshirani 1993, §13.3 (percentile interval). Not in Yu et al. 2026.
    """
    values = np.stack([said.predicted, said.labels], axis=1)
    random = np.random.default_rng(seed)
    chunk, found = max(1, 2**19 // len(values)), []
    for start in range(0, resamples, chunk):
        drawn = values[random.integers(len(values), size=(min(chunk, resamples - start), len(values)))]
        found.append(task.score({name: STATISTICS[name](drawn) for name in task.metrics}))
    return np.concatenate(found)


def _interval(pairs: Sequence[tuple[Array | None, Array | None]]) -> tuple[float, float] | None:
    """Of the mean over seeds of score − the spectral method's."""
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences or len(differences) < len(pairs):
        return None
    low, high = np.quantile(np.mean(differences, axis=0), (0.025, 0.975))
    return float(low), float(high)


def _at(run: Mapping[str, Any], path: Sequence[str]) -> float | None:
    found: Any = run
    for name in path:
        found = found[name]
    return None if found is None else float(found)


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's t-test that the mean of paired differences is zero; None where it cannot be said."""
    if len(differences) < 2 or len(set(differences)) == 1:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean_and_spread(known)[0] if known else None


@cache
def printed() -> Mapping[str, Any]:
    """Tab. 1 as the paper prints it: {"base", "tasks", "row": [{"method", "parameters", "scores", "average"}]}.

    Source: Yu et al. 2026, Tab. 1.
    """
    return tomllib.loads(files("specbasis").joinpath("recipes/table1.toml").read_text(encoding="utf-8"))


def markdown(what: Comparison, rows: Sequence[Row], factors: Mapping[str, float], base: str) -> str:
    """The table, what it cost, and the paper's own numbers, as Markdown."""
    found = {(line.task, line.method): line for line in lines(what, rows, factors)}
    titles = [GLUE[task].title for task in what.tasks]
    wanted, ran = len(found) * len(what.seeds), sum(len(line.seeds) for line in found.values())
    failed = [row for row in rows if row.error is not None]
    parts = [
        f"# {what.name}: {base}",
        "",
        f"{ran} of {wanted} runs; seeds {', '.join(map(str, what.seeds))}. Scores in percent: mean ± standard "
        "deviation over seeds on the dev set, which chose nothing; – is a run that is missing, (n) fewer "
        "seeds than "
        f"{len(what.seeds)}.",
        "",
        *_grid(["method", "parameters", *titles], [_score_row(what, found, method) for method in what.methods]),
    ]
    others = [method for method in what.methods if method != OURS]
    if OURS in what.methods and others:
        parts += [
            "",
            "## Difference to the spectral method",
            "",
            "Mean over the seeds that both have, in points; [95 % interval over the examples of the dev set, these "
            f"seeds; {RESAMPLES} paired resamples]; p of Student's paired t-test over the seeds, on this dev set, "
            "two-sided. Neither is corrected for the number of comparisons.",
            "",
            *_grid(["method", *titles], [[_title(m), *(_delta(found[t, m]) for t in what.tasks)] for m in others]),
        ]
    parts += ["", "## Cost", "", *_cost(what, found)]
    parts += ["", "## Learning rates", "", *_rates(what, rows, factors)]
    parts += ["", *_paper(what)]
    if failed:
        parts += ["", "## Failed", "", *(f"- {_cell_name(row.cell)}: {row.error}" for row in failed)]
    return "\n".join([*parts, ""])


def _score_row(what: Comparison, found: Mapping[tuple[str, str], Line], method: str) -> list[str]:
    adapters = [line.values["adapter"] for (_, m), line in found.items() if m == method and line.seeds]
    size = f"{adapters[0]:,.0f}" if adapters and adapters[0] is not None else "–"
    return [_title(method), size, *(_score(found[task, method], len(what.seeds)) for task in what.tasks)]


def _score(line: Line, seeds: int) -> str:
    if line.mean is None:
        return "–"
    spread = "" if line.spread is None else f" ± {100 * line.spread:.2f}"
    return f"{100 * line.mean:.2f}{spread}" + ("" if len(line.seeds) == seeds else f" ({len(line.seeds)})")


def _delta(line: Line) -> str:
    if line.difference is None:
        return "–"
    interval = "" if line.interval is None else " [{:+.2f}, {:+.2f}]".format(*(100 * end for end in line.interval))
    return f"{100 * line.difference:+.2f}{interval}" + ("" if line.p is None else f" (p = {line.p:.2g})")


def _cost(what: Comparison, found: Mapping[tuple[str, str], Line]) -> list[str]:
    headings = [
        "task",
        "method",
        "parameters: method",
        "head",
        "peak memory (MB)",
        "epoch (CPU s)",
        "epoch (wall s)",
        "files (MB)",
        "held-back loss before → after",
    ]
    body = [
        [
            GLUE[task].title,
            _title(method),
            _number(line.values.get("adapter"), "{:,.0f}"),
            _number(line.values.get("head"), "{:,.0f}"),
            _number(line.values.get("memory"), "{:.0f}", 1e6),
            _number(line.values.get("seconds"), "{:.1f}"),
            _number(line.values.get("wall"), "{:.1f}"),
            _number(line.values.get("bytes"), "{:.2f}", 1e6),
            f"{_number(line.values.get('before'), '{:.3f}')} → {_number(line.values.get('after'), '{:.3f}')}",
        ]
        for (task, method), line in found.items()
        if line.seeds
    ]
    return _grid(headings, body)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else form.format(value / unit)


def _rates(what: Comparison, rows: Sequence[Row], factors: Mapping[str, float]) -> list[str]:
    titles = [GLUE[task].title for task in what.tasks]
    rates = [[f"{_rate(what, factors, task, method):g}" for task in what.tasks] for method in what.methods]
    if what.search is None:
        text = "Each method's own, as published (Tab. 5 for the spectral ones)."
        body = [[_title(method), *each] for method, each in zip(what.methods, rates, strict=True)]
        return [text, "", *_grid(["method", *titles], body)]
    text = (
        f"Each method's own times a factor, chosen on {GLUE[what.search.task].title} alone: "
        f"{what.search.examples} examples, {what.search.epochs:g} epochs, seed {what.search.seed}, scored on "
        f"{what.search.selection} other examples of train. Tried: "
        f"{', '.join(f'{f:g}' for f in what.search.factors)}, and while the best was at an end, up to {BEYOND} "
        "beyond it. A factor with * is still at an end: a better one may lie beyond."
    )
    body = [
        [_title(method), *_factor(what, what.search, rows, factors, method), *each]
        for method, each in zip(what.methods, rates, strict=True)
    ]
    return [text, "", *_grid(["method", "tried", "factor", *titles], body)]


def _factor(
    what: Comparison, search: Search, rows: Sequence[Row], factors: Mapping[str, float], method: str
) -> tuple[str, str]:
    """What was tried, and what was chosen."""
    source = rate_from(method.partition("@")[0])
    if source not in factors:
        return "–", "1 (not searched yet)"
    if source != method:
        return "–", f"{factors[source]:g} ({_title(source)}'s)"
    tried = search.tried(source, rows)
    edge = "*" if len(tried) > 1 and factors[source] in (tried[0], tried[-1]) else ""
    return ", ".join(f"{factor:g}" for factor in tried), f"{factors[source]:g}{edge}"


def _rate(what: Comparison, factors: Mapping[str, float], task: str, method: str) -> float:
    return what.cell(task, method, what.seeds[0], factors).learning_rate


def _paper(what: Comparison) -> list[str]:
    table = printed()
    shown = [task for task in what.tasks if task in table["tasks"]]
    named = {method.partition("@")[0] for method in what.methods}
    body = [
        [
            row["printed"],
            f"{row['parameters']:g} M",
            *(f"{row['scores'][table['tasks'].index(task)]:.2f}" for task in shown),
        ]
        for row in table["row"]
        if row["method"] in named
    ]
    if not body:
        return []
    return [
        f"## As the paper prints it ({table['base']}, one seed; Yu et al. 2026, Tab. 1)",
        "",
        *_grid(["method", "parameters", *(GLUE[task].title for task in shown)], body),
    ]


def _title(method: str) -> str:
    from specbasis.finetune.methods import METHODS

    name, _, rank = method.partition("@")
    title = "Full, random start" if name == SCRATCH else METHODS[name].title
    return f"{title}, K = {rank}" if rank else title


def _cell_name(cell: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in cell.items())


def _grid(headings: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in headings[1:])]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *body)]


def write(what: Comparison, rows: Sequence[Row], factors: Mapping[str, float], base: str, out: str | Path) -> Path:
    """Write ``NAME.md`` into the folder of the rows."""
    path = Path(out) / f"{what.name}.md"
    text = markdown(what, rows, factors, base)
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
    return path
