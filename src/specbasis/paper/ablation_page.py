"""The basis ablation as a page: scores, differences to a random basis, losses, and a figure; from rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from specbasis.core.statistics import Array, adjusted, paired_t_test, percentile_interval, student_interval
from specbasis.figures import kit
from specbasis.figures.kit import Figure
from specbasis.figures.table import Column, Table
from specbasis.finetuning.tasks import GLUE, Task
from specbasis.jobs.experiments import Row
from specbasis.paper.ablation import BASES, FLOOR_STRENGTHS, unpacked
from specbasis.paper.differences import percent

REFERENCE = "random"
"""The basis that the others are compared with: the control of equal size that knows nothing."""

RESAMPLES = 2000
PAIRS = (("gradient", "leading"), ("gradient", "gradient-shuffled"))
"""What else is compared: the gradient's basis with the pretrained one, and with its own control."""

Difference = tuple[float, tuple[float, float], float]  # mean, interval, p

MEANING = (
    f"[95 % interval; {RESAMPLES:,} resamples of seeds and of examples together]; * where Holm's adjusted p "
    "over all cells of the table is below 0.05."
)


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one (task, K).

    Attributes:
        task: which.
        size: K.
        values: of their row.
    """

    task: Task
    size: int
    values: Mapping[str, Any]

    @property
    def bases(self) -> list[str]:
        """Those that ran."""
        return list(dict.fromkeys(arm["basis"] for arm in self.values["arms"]))

    def each(self, basis: str, figure: str) -> list[Any]:
        """A figure of a basis, in the order of the seeds."""
        return [arm[figure] for arm in self.values["arms"] if arm["basis"] == basis]

    @cached_property
    def resampled(self) -> Mapping[str, Array]:
        """Basis → mean score over seeds, for each resample of seeds and examples; the same ones for all bases."""
        count = self.values["examples"]
        labels = unpacked(self.values["labels"], count)
        predicted = {
            basis: np.stack([unpacked(text, count) for text in self.each(basis, "predicted")])
            for basis in self.bases
        }
        seeds = len(next(iter(predicted.values())))
        random = np.random.default_rng(0)
        scores: dict[str, list[Array]] = {basis: [] for basis in predicted}
        for _ in range(RESAMPLES // 100):
            examples = random.integers(count, size=(100, count))
            weights = np.stack([np.bincount(drawn, minlength=count) for drawn in examples], axis=1).astype(float)
            drawn = random.integers(seeds, size=(100, seeds))
            for basis, classes in predicted.items():
                of_seed = _scores(self.task, classes, labels, weights)  # (seeds, 100)
                scores[basis].append(np.take_along_axis(of_seed.T, drawn, axis=1).mean(1))
        return {basis: np.concatenate(parts) for basis, parts in scores.items()}

    def difference(self, basis: str, than: str = REFERENCE) -> Difference:
        """To another, in points: mean, interval, and p, twice the share of resamples on the other side of 0."""
        moved = 100 * (self.resampled[basis] - self.resampled[than])
        mean = 100 * (np.mean(self.each(basis, "score")) - np.mean(self.each(than, "score")))
        below, above = ((1 + (side).sum()) / (1 + len(moved)) for side in (moved <= 0, moved >= 0))
        return float(mean), percentile_interval(moved), float(min(1, 2 * min(below, above)))

    def loss_difference(self, basis: str, than: str = REFERENCE) -> Difference:
        """Loss on the training set minus that in another: mean, and interval and p of Student's t over seeds."""
        moved = [a - b for a, b in zip(self.each(basis, "train_loss"), self.each(than, "train_loss"), strict=True)]
        mean, *interval = student_interval(moved)
        p = paired_t_test(moved)
        return mean, (interval[0], interval[1]), 1.0 if p is None else p


def _scores(task: Task, classes: Array, labels: Array, weights: Array) -> Array:
    """Accuracy or Matthews' correlation of two classes under weights of the examples: (seeds, resamples)."""
    n = weights.sum(0)
    both, predicted, true = (classes * labels) @ weights, classes @ weights, labels @ weights
    if task.metrics[0] == "accuracy":
        return np.asarray((n - predicted - true + 2 * both) / n, dtype=np.float64)
    spread = np.sqrt(predicted * (n - predicted) * true * (n - true))
    moved: Array = np.divide(n * both - predicted * true, spread, out=np.zeros_like(spread), where=spread > 0)
    return moved


def write(rows: Sequence[Row], base: str, out: str | Path) -> list[Path]:
    """Write ``basis.md``, and ``basis.png`` and ``.svg``, into the folder of the rows."""
    path = Path(out) / "basis.md"
    by_task: dict[str, list[Runs]] = {}
    floors = {
        row.experiment["task"]: row.values for row in rows if row.experiment["stage"] == "floor" and row.values
    }
    for row in rows:
        if row.experiment["stage"] == "runs" and row.error is None:
            task = row.experiment["task"]
            by_task.setdefault(task, []).append(Runs(GLUE[task], row.experiment["size"], row.values))
    by_task = {task: sorted(runs, key=lambda run: run.size) for task, runs in by_task.items()}
    parts = [f"# Which basis the core stands in: {base}"]
    for task, runs in by_task.items():
        parts += _task(runs, floors.get(task), rows)
    parts += [f"- {name}: {about}" for name, about in BASES.items()]
    failed = [f"- {' '.join(map(str, row.experiment.values()))}: {row.error}" for row in rows if row.error]
    return kit.write_page(path, [*parts, *failed], lambda: _figure(by_task, base) if by_task else None)


def _task(runs: Sequence[Runs], floor: Mapping[str, Any] | None, rows: Sequence[Row]) -> list[str]:
    task, first = runs[0].task, runs[0]
    seeds = len(first.each(first.bases[0], "score"))
    names = [basis for basis in BASES if any(basis in run.bases for run in runs)]
    others = [basis for basis in names if basis != REFERENCE]
    to_random = {basis: (basis, REFERENCE) for basis in others}
    between = {f"{one} − {other}": (one, other) for one, other in PAIRS if {one, other} <= set(names)}
    stands = "" if floor is None else (
        f" A converged logistic regression on the frozen model's features (C = {floor['C']:g} of "
        f"{', '.join(f'{c:g}' for c in FLOOR_STRENGTHS)}): {100 * floor['score']:.2f}."
    )  # fmt: skip
    sizes = "; ".join(f"K = {run.size}: {run.values['parameters']:,}" for run in runs)
    norms = "; ".join(f"K = {run.size}: {_norms(run)}" for run in runs)
    return [
        f"## {task.title}",
        f"{seeds} seeds, {first.values['examples']:,} held-out examples. Score in percent, mean ± standard "
        f"deviation over seeds.{stands} Numbers in the cores: {sizes}.",
        _table(names, runs, lambda basis, run: percent(run.each(basis, "score"))),
        f"Score − that in a random basis, in points: mean {MEANING}",
        _differences(to_random, runs, Runs.difference, "+.2f"),
        "Loss on the training set − that in a random basis: mean [95 % interval, Student's t]; * likewise.",
        _differences(to_random, runs, Runs.loss_difference, "+.4f"),
        "Two bases: the difference of scores in points, then of losses on the training set; * over each table.",
        _differences(between, runs, Runs.difference, "+.2f"),
        _differences(between, runs, Runs.loss_difference, "+.4f"),
        "Learning rates that the search chose, or the one for all; ! the smallest or largest of those tried.",
        _table(names, runs, lambda basis, run: _rate(basis, run, rows)),
        f"‖M‖ over ‖Σ_K‖ of the pretrained matrices, leading basis, median over matrices and seeds: {norms}.",
    ]


def _differences(
    pairs: Mapping[str, tuple[str, str]], runs: Sequence[Runs], take: Callable[..., Difference], form: str
) -> str:
    """Differences of named pairs of bases with Holm's mark over all cells of the table."""
    differences = {
        (name, run.size): take(run, *pair)
        for name, pair in pairs.items()
        for run in runs
        if set(pair) <= set(run.bases)
    }
    holm = dict(zip(differences, adjusted([p for *_, p in differences.values()], "holm"), strict=True))

    def cell(name: str, run: Runs) -> str | None:
        if (name, run.size) not in differences:
            return None
        mean, (low, high), _ = differences[name, run.size]
        mark = "*" if holm[name, run.size] < 0.05 else ""
        return f"{mean:{form}} [{low:{form}}, {high:{form}}]{mark}"

    return _table(list(pairs), runs, cell)


def _table(names: Sequence[str], runs: Sequence[Runs], cell: Any) -> str:
    columns = (Column("basis", words=True), *(Column(f"K = {run.size}") for run in runs))
    body = [
        (name, *(cell(name, run) if name in run.bases or name not in BASES else None for run in runs))
        for name in names
    ]
    return Table(columns, tuple(body)).markdown()


def _rate(basis: str, run: Runs, rows: Sequence[Row]) -> str:
    tried = {
        arm["rate"]
        for row in rows
        if row.experiment["stage"] == "search" and row.experiment["task"] == run.task.name
        if row.experiment["size"] == run.size
        for arm in row.values["arms"]
    }
    rate = run.each(basis, "rate")[0]
    return f"{rate:g}" + ("!" if tried and rate in (min(tried), max(tried)) else "")


def _norms(run: Runs) -> str:
    leading = run.values["leading_norms"]
    arms = [arm["norms"] for arm in run.values["arms"] if arm["basis"] == "leading"]
    ratios = [arm[name] / leading[name] for arm in arms for name in leading]
    return f"{np.median(ratios):.3g}" if ratios else "–"


def _figure(by_task: Mapping[str, Sequence[Runs]], base: str) -> Figure:
    figure, axes = kit.free_panels(1, len(by_task), (4.6, 3.4), f"Which basis the core stands in: {base}")
    for ax, runs in zip(axes[0], by_task.values(), strict=True):
        sizes = [run.size for run in runs]
        for i, basis in enumerate(b for b in BASES if b != REFERENCE):
            cells = [(run.size, run.difference(basis)) for run in runs if basis in run.bases]
            if not cells:
                continue
            shift = 1 + 0.04 * (i - 3)  # side by side, on a logarithmic axis
            x = [size * shift for size, _ in cells]
            y = [mean for _, (mean, *_) in cells]
            ends = np.array([[mean - low, high - mean] for _, (mean, (low, high), _) in cells]).T
            ax.errorbar(x, y, np.maximum(ends, 0), label=basis, fmt="o-", markersize=3, linewidth=1, elinewidth=0.8,
                        color=kit.COLORS[i % len(kit.COLORS)])  # fmt: skip
        kit.reference(ax, 0.0, "random basis")
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.set_xlabel("K, of K × K numbers in each of four matrices")
        metric = "accuracy" if runs[0].task.metrics[0] == "accuracy" else "Matthews' correlation × 100"
        ax.set_ylabel("score − that in a random basis (points)")
        ax.set_title(f"{runs[0].task.title}: {metric}, {runs[0].values['examples']:,} examples", size=9)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", fontsize=7, ncols=4)
    return figure
