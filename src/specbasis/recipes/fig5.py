"""Fig. 5: rank budget, layer location, and location of a block of ranks, of the spectral adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specbasis.cells import Progress, Row
from specbasis.errors import InputError
from specbasis.finetune.grid import Cell, Setting, by_seed, mean_and_spread, run_grid, scaled_rate
from specbasis.finetune.tasks import GLUE, task_named
from specbasis.results import write_whole

LEARNING_RATE, EPOCHS, TASK = 1e-4, 3.0, "mnli"
"""Of all three panels (Yu et al. 2026, App. M)."""
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
    task: str = TASK
    seeds: tuple[int, ...] = (42,)
    epochs: float = EPOCHS
    learning_rate: float = LEARNING_RATE
    examples: int | None = None

    def cell(self, point: Point, seed: int) -> Cell:
        """One run."""
        return Cell(
            self.task,
            "spectral",
            seed,
            self.epochs,
            self.learning_rate,
            self.examples,
            interval=point.interval,
            blocks=point.blocks,
        )

    def cells(self) -> list[Cell]:
        """The runs, seeds outermost."""
        return [self.cell(point, seed) for seed in self.seeds for point in self.points]


def panel(
    name: str,
    *,
    ranks: int,
    blocks: int,
    task: str = TASK,
    seeds: Sequence[int] = (42,),
    epochs: float = EPOCHS,
    learning_rate: float = LEARNING_RATE,
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


def spectral_rate(task: str, factor: float) -> float:
    """The spectral method's learning rate for a task, times a factor that a search found."""
    return scaled_rate("spectral", task, factor)


def run(
    what: Panel, setting: Setting, out: str | Path, progress: Callable[[Progress], None] | None = None
) -> list[Row]:
    """Run what has not run yet."""
    return run_grid(what.cells(), setting, out, progress)


def curve(what: Panel, rows: Sequence[Row]) -> list[tuple[Point, dict[int, float]]]:
    """The scores of each point by seed; empty where nothing ran yet."""
    return [
        (point, {seed: run["score"] for seed, run in _runs(what, rows, point).items()}) for point in what.points
    ]


def _runs(what: Panel, rows: Sequence[Row], point: Point) -> dict[int, Mapping[str, Any]]:
    return by_seed(rows, [what.cell(point, seed) for seed in what.seeds])


def markdown(what: Panel, rows: Sequence[Row], base: str) -> str:
    """The panel's numbers as Markdown."""
    metric = _metric(what)
    body = []
    for point, scores in curve(what, rows):
        parameters = [run["parameters"]["adapter"] for run in _runs(what, rows, point).values()]
        mean, spread = mean_and_spread(list(scores.values())) if scores else (None, None)
        shown = "–" if mean is None else f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
        size = f"{parameters[0]:,}" if parameters else "–"
        body.append(
            f"| {point.label} | {point.interval[0]} … {point.interval[1]} | {size} | {shown} | {len(scores)} |"
        )
    return "\n".join(
        [
            f"# {what.name}: {base} on {GLUE[what.task].title}",
            "",
            f"{metric} in percent on the dev set, mean ± standard deviation over seeds "
            f"{', '.join(map(str, what.seeds))}; {what.epochs:g} epochs"
            + (f" of {what.examples} examples" if what.examples else "")
            + f", learning rate {what.learning_rate:g}.",
            "",
            f"| {what.axis} | ranks | parameters | score | seeds |",
            "|---|---|---:|---:|---:|",
            *body,
            "",
        ]
    )


def _metric(what: Panel) -> str:
    return {"matthews": "Matthews' correlation", "pearson": "Mean of Pearson's and Spearman's correlation"}.get(
        GLUE[what.task].metrics[0], "Accuracy"
    )


def write(what: Panel, rows: Sequence[Row], base: str, out: str | Path) -> list[Path]:
    """Write ``NAME.md``, and ``NAME.svg`` and ``.png`` where anything ran, into the folder of the rows."""
    folder = Path(out)
    table = folder / f"{what.name}.md"
    write_whole(table, lambda path: path.write_text(markdown(what, rows, base), encoding="utf-8"))
    points = curve(what, rows)
    return [table, *(_figure(what, points, base, folder) if any(scores for _, scores in points) else [])]


def _figure(
    what: Panel, points: Sequence[tuple[Point, Mapping[int, float]]], base: str, folder: Path
) -> list[Path]:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    x = [point.x for point, _ in points]
    found = [  # nothing where nothing ran: the line has a gap there
        mean_and_spread([100 * score for score in scores.values()]) if scores else (math.nan, None)
        for _, scores in points
    ]
    spread = [deviation or 0.0 for _, deviation in found]
    axes.errorbar(x, [mean for mean, _ in found], yerr=spread, marker="o", capsize=3, color="#1f5fa8")
    for point, scores in points:
        axes.plot(
            [point.x] * len(scores), [100 * s for s in scores.values()], ".", color="0.6", markersize=4, zorder=0
        )
    axes.set_xticks([point.x for point in what.points], [point.label for point in what.points])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(what.axis)
    axes.set_ylabel(f"{_metric(what)} (%)" if len(_metric(what)) < 30 else "mean correlation (%)")
    counts = sorted({len(scores) for _, scores in points if scores})
    shown = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    seeds = f"{shown} seed" + ("" if counts[-1] == 1 else "s")
    axes.set_title(
        f"{what.name}: {base.rpartition('/')[2]}, {GLUE[what.task].title}; bars: standard deviation, {seeds}",
        fontsize=8,
    )
    axes.grid(alpha=0.3)
    paths = [folder / f"{what.name}.{kind}" for kind in ("svg", "png")]
    for path in paths:
        write_whole(path, lambda target, kind=path.suffix[1:]: figure.savefig(target, format=kind, dpi=150))
    plt.close(figure)
    return paths


def with_seeds(what: Panel, seeds: Sequence[int]) -> Panel:
    """The same panel over other seeds."""
    return replace(what, seeds=tuple(seeds))
