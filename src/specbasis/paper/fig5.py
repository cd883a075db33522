"""Fig. 5: rank budget, layer location, and location of a block of ranks, of the spectral adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specbasis.core.errors import InputError
from specbasis.core.statistics import mean_and_spread
from specbasis.core.text import number_of
from specbasis.figures import kit
from specbasis.figures.kit import Figure
from specbasis.figures.table import Column, Table
from specbasis.finetuning.tasks import GLUE, task_named
from specbasis.jobs.experiments import Row
from specbasis.paper.differences import MEANING, Run, difference, percent, runs
from specbasis.paper.grid import Experiment, base_name
from specbasis.paper.options import PanelOptions

WIDTH, STEP, MOST = 200, 50, 700
_NUMBERS = ("parameters", "score", "difference", "seeds")


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
        options: what all of its runs share; seeds are outermost.
    """

    name: str
    axis: str
    points: tuple[Point, ...]
    options: PanelOptions

    def cell(self, point: Point, seed: int) -> Experiment:
        """One run."""
        o = self.options
        run = Experiment(o.task, "spectral", seed, o.epochs, o.learning_rate, o.examples)
        return replace(run, interval=point.interval, blocks=point.blocks)

    def cells(self) -> list[Experiment]:
        """The runs, seeds outermost."""
        return [self.cell(point, seed) for seed in self.options.seeds for point in self.points]


def panel(name: str, *, ranks: int, blocks: int, options: PanelOptions | None = None) -> Panel:
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
    options = options or PanelOptions()
    return Panel(name, axis, tuple(points), replace(options, task=task_named(options.task).name))


def write(plan: Panel, rows: Sequence[Row], out: str | Path) -> list[Path]:
    """Write ``NAME.md``, and ``NAME.svg`` and ``.png`` where anything ran, into the folder of the rows."""
    path = Path(out) / f"{plan.name}.md"
    points = [(point, runs(rows, [plan.cell(point, s) for s in plan.options.seeds])) for point in plan.points]
    is_any = any(seeds for _, seeds in points)
    return kit.write_page(path, [markdown(plan, points)], lambda: _figure(plan, points) if is_any else None)


def markdown(plan: Panel, points: Sequence[tuple[Point, Mapping[int, Run]]]) -> str:
    """The panel's numbers as Markdown; the runs of a point are by seed, none where nothing ran yet."""
    chance = next((run.chance for _, seeds in points for run in seeds.values() if run.chance is not None), None)
    columns = (
        *(Column(name, words=True) for name in (plan.axis, "ranks")),
        *(Column(name, "," if name == "parameters" else "") for name in _NUMBERS),
    )
    lines = []
    for i, (point, seeds) in enumerate(points):
        scores = [run.score for run in seeds.values()]
        size = next((run.values["parameters"]["adapter"] for run in seeds.values()), None)
        moved = difference(seeds, points[0][1]) if i else None
        ranks = f"{point.interval[0]} … {point.interval[1]}"
        lines.append((point.label, ranks, size, percent(scores), moved.shown if moved else None, len(seeds)))
    options = plan.options
    return (
        f"# {plan.name}: {base_name(options.base)} on {GLUE[options.task].title}\n\n"
        f"{metric_of(plan)} in percent on the dev set, mean ± standard deviation over seeds "
        f"{', '.join(map(str, options.seeds))}; {options.epochs:g} epochs"
        + (f" of {options.examples} examples" if options.examples else "")
        + f", learning rate {options.learning_rate:g}."
        + ("" if chance is None else f" Always the most frequent class: {100 * chance:.2f}.")
        + f"\n\nDifference: to the first line, in points; {MEANING}\n\n"
        + Table(columns, tuple(lines)).markdown()
    )


def metric_of(plan: Panel) -> str:
    """What the score of the panel's task is."""
    names = {"matthews": "Matthews' correlation", "pearson": "Mean of Pearson's and Spearman's correlation"}
    return names.get(GLUE[plan.options.task].metrics[0], "Accuracy")


def _figure(plan: Panel, points: Sequence[tuple[Point, Mapping[int, Run]]]) -> Figure:
    """Mean and standard deviation of the scores at each point, with a dot for each seed."""
    figure, ((ax,),) = kit.free_panels(1, 1, (5.0, 2.8), "")
    scores = [[100 * run.score for run in seeds.values()] for _, seeds in points]
    # Nothing where nothing ran: the line has a gap there.
    means = [mean_and_spread(values) if values else (math.nan, None) for values in scores]
    x = [point.x for point, _ in points]
    spread = [deviation or 0.0 for _, deviation in means]
    ax.errorbar(x, [mean for mean, _ in means], yerr=spread, marker="o", capsize=3, color=kit.COLORS[0])
    for place, values in zip(x, scores, strict=True):
        ax.plot([place] * len(values), values, ".", color=kit.QUIET, markersize=4)
    ax.set_xticks(x, [point.label for point, _ in points])
    margin = 0.05 * (x[-1] - x[0]) or 1.0
    ax.set_xlim(x[0] - margin, x[-1] + margin)
    ax.tick_params(axis="x", labelsize=8)
    metric = metric_of(plan)
    ax.set(xlabel=plan.axis, ylabel=f"{metric} (%)" if len(metric) < 30 else "mean correlation (%)")
    counts = sorted({len(values) for values in scores if values})
    seeds = number_of(counts[0], "seed") if len(counts) == 1 else f"{counts[0]}–{counts[-1]} seeds"
    title = f"{plan.name}: {GLUE[plan.options.task].title}, {base_name(plan.options.base)}"
    ax.set_title(f"{title}\nbars: standard deviation, {seeds}", fontsize=8, fontweight="normal")
    return figure
