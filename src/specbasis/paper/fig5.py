"""Fig. 5: rank budget, layer location, and location of a block of ranks, of the spectral adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specbasis.checkpoint.atomic import write_whole
from specbasis.core.errors import InputError
from specbasis.core.statistics import mean_and_spread
from specbasis.finetuning.grid import Experiment, Setting, run_grid
from specbasis.finetuning.tasks import GLUE, task_named
from specbasis.jobs.experiments import Row
from specbasis.jobs.progress import Progress
from specbasis.paper.differences import MEANING, Run, difference, percent, runs
from specbasis.paper.options import PanelOptions

DEFAULTS = PanelOptions()
"""Task, epochs and learning rate of all three panels (Yu et al. 2026, App. M)."""
WIDTH, STEP, MOST = 200, 50, 700


@dataclass(frozen=True)
class Point:
    """One position on the axis: where the adapter is.

    Attributes:
        x: on the axis.
        label: of the tick.
        interval: ranks [k, m).
        blocks: that are adapted.
    """

    x: float
    label: str
    interval: tuple[int, int]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Panel:
    """One panel of Fig. 5.

    Attributes:
        name: "fig5a", "fig5b", "fig5c".
        axis: what is varied.
        points: from left to right.
        task: name of a GLUE task.
        seeds: outermost.
        epochs, learning_rate: App. M's by default.
        examples: size of the fixed part of train; all when None.
    """

    name: str
    axis: str
    points: tuple[Point, ...]
    task: str = DEFAULTS.task
    seeds: tuple[int, ...] = (42,)
    epochs: float = DEFAULTS.epochs
    learning_rate: float = DEFAULTS.learning_rate
    examples: int | None = None

    def cell(self, point: Point, seed: int) -> Experiment:
        """One run."""
        return Experiment(
            self.task,
            "spectral",
            seed,
            self.epochs,
            self.learning_rate,
            self.examples,
            interval=point.interval,
            blocks=point.blocks,
        )

    def cells(self) -> list[Experiment]:
        """The runs, seeds outermost."""
        return [self.cell(point, seed) for seed in self.seeds for point in self.points]


def panel(
    name: str,
    *,
    ranks: int,
    blocks: int,
    task: str = DEFAULTS.task,
    seeds: Sequence[int] = (42,),
    epochs: float = DEFAULTS.epochs,
    learning_rate: float = DEFAULTS.learning_rate,
    examples: int | None = None,
) -> Panel:
    """A panel for a model of this many singular values in its feed-forward matrices, and this many blocks.

    - ``fig5a``: intervals [0, m), m = 50, 100, … 700, or up to the model's limit, in the last two blocks.
    - ``fig5b``: [0, 200) in two neighbouring blocks, from the first to the last; an odd number of blocks has one
      pair more, the last.
    - ``fig5c``: [k, k + 200), k = 0, 50, … to the last ranks, in the last two blocks.

    Raises:
        InputError: no such panel, or a model that is too small for it.
    """
    last = tuple(range(max(0, blocks - 2), blocks))
    width = min(WIDTH, ranks)
    if name == "fig5a":
        most = [*range(STEP, min(MOST, ranks) + 1, STEP)]
        most += [ranks] if ranks < MOST and ranks % STEP else []
        axis, points = "rank budget m", [Point(m, str(m), (0, m), last) for m in most]
    elif name == "fig5b":
        pairs = [(first, first + 1) for first in range(0, blocks - 1, 2)]
        pairs += [last] if len(last) == 2 and last not in pairs else []
        axis = "blocks that are adapted"
        points = [Point(i, f"{a + 1}, {b + 1}", (0, width), (a, b)) for i, (a, b) in enumerate(pairs)]
    elif name == "fig5c":
        starts = [*range(0, ranks - width + 1, STEP)]
        starts += [ranks - width] if (ranks - width) % STEP else []
        axis = f"first rank k of a block of {width}"
        points = [Point(k, str(k), (k, k + width), last) for k in starts]
    else:
        raise InputError(f"got panel {name!r}; want fig5a, fig5b or fig5c")
    if not points:
        raise InputError(f"{name}: a model with {ranks} singular values and {blocks} blocks is too small for it")
    return Panel(name, axis, tuple(points), task_named(task).name, tuple(seeds), epochs, learning_rate, examples)


def run(
    what: Panel, setting: Setting, out: str | Path, progress: Callable[[Progress], None] | None = None
) -> list[Row]:
    """Run what has not run yet."""
    return run_grid(what.cells(), setting, out, progress)


def curve(what: Panel, rows: Sequence[Row]) -> list[tuple[Point, dict[int, Run]]]:
    """The runs of each point by seed; empty where nothing ran yet."""
    return [(point, runs(rows, [what.cell(point, seed) for seed in what.seeds])) for point in what.points]


def markdown(what: Panel, points: Sequence[tuple[Point, Mapping[int, Run]]], base: str) -> str:
    """The panel's numbers as Markdown."""
    first = points[0][1]
    chance = next((run.chance for _, found in points for run in found.values() if run.chance is not None), None)
    return "\n".join(
        [
            f"# {what.name}: {base} on {GLUE[what.task].title}",
            "",
            f"{metric_of(what)} in percent on the dev set, mean ± standard deviation over seeds "
            f"{', '.join(map(str, what.seeds))}; {what.epochs:g} epochs"
            + (f" of {what.examples} examples" if what.examples else "")
            + f", learning rate {what.learning_rate:g}."
            + ("" if chance is None else f" Always the most frequent class: {100 * chance:.2f}."),
            "",
            f"Difference: to the first line, in points; {MEANING}",
            "",
            f"| {what.axis} | ranks | parameters | score | difference | seeds |",
            "|---|---|---:|---:|---:|---:|",
            *(_line(point, found, first if i else {}) for i, (point, found) in enumerate(points)),
            "",
        ]
    )


def _line(point: Point, found: Mapping[int, Run], first: Mapping[int, Run]) -> str:
    mean, spread = mean_and_spread([run.score for run in found.values()]) if found else (None, None)
    size = f"{next(iter(found.values())).values['parameters']['adapter']:,}" if found else "–"
    moved = difference(found, first)
    ranks, score = f"{point.interval[0]} … {point.interval[1]}", percent(mean, spread)
    return f"| {point.label} | {ranks} | {size} | {score} | {moved.shown if moved else '–'} | {len(found)} |"


def metric_of(what: Panel) -> str:
    """What the score of the panel's task is."""
    return {"matthews": "Matthews' correlation", "pearson": "Mean of Pearson's and Spearman's correlation"}.get(
        GLUE[what.task].metrics[0], "Accuracy"
    )


def write(what: Panel, rows: Sequence[Row], base: str, out: str | Path) -> list[Path]:
    """Write ``NAME.md``, and ``NAME.svg`` and ``.png`` where anything ran, into the folder of the rows."""
    table, points = Path(out) / f"{what.name}.md", curve(what, rows)
    text = markdown(what, points, base)
    write_whole(table, lambda path: path.write_text(text, encoding="utf-8"))
    if not any(found for _, found in points):
        return [table]
    from specbasis.paper.finetune_figures import write_panel

    scores = [(point, [run.score for run in found.values()]) for point, found in points]
    return [table, *write_panel(table.with_suffix(".png"), what, scores, base)]
