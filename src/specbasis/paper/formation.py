"""How the basis forms (Fig. 4, 9, 21, training from scratch): plans of grids, figures, claims."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from specbasis.checkpoint.atomic import write_whole
from specbasis.core.errors import InputError
from specbasis.core.statistics import student_interval
from specbasis.core.text import number_of
from specbasis.figures import kit
from specbasis.figures.kit import COLORS, Axes, Figure
from specbasis.figures.tracking import between_checkpoints
from specbasis.jobs.experiments import Row
from specbasis.jobs.folder import plain, write_json
from specbasis.paper.formation_claims import GROUPS, Claim, Grid, claims, curves, markdown, members
from specbasis.paper.formation_grid import POSTS, Formation
from specbasis.paper.training import NEW_TASK, PRETRAINING

SMALL = Formation(
    passes=(((1_000, 300), (16_000, 300)), ((4_000, 300),), ((1_000, 75),), ((16_000, 1_200),)),
    pretraining=replace(PRETRAINING, checkpoints=15, validations=10),
    new_task=replace(NEW_TASK, epochs=30),
    new_task_images=512,
    validation=512,
)
"""About 40 CPU minutes a seed for the first pass. The same task goes on as in the paper; classification has few
images and many epochs, so that random labels can be learned in 240 steps. Pretrainings of 300 steps differ in
images alone; those of 75 and 1 200 steps have as many epochs as (4 000, 300)."""


def paper() -> Formation:
    """The paper's sizes: 200 epochs, batch 64, so that larger sets also take more steps; at 16 000 steps beside it.

    Fig. 21 names its largest and smallest scale only; the ones between are this project's.
    """
    scales = (1_000, 5_000, 10_000, 20_000, 50_000)
    passes = (tuple((n, PRETRAINING.total(n)) for n in scales), tuple((n, 16_000) for n in scales))
    return Formation(passes=passes)


@dataclass(frozen=True)
class Outcome:
    """A figure of a grid.

    Attributes:
        draw: makes it.
        phases, tasks: whose experiments it needs.
        letters: of the claims that it is about.
    """

    draw: Callable[[Grid], Any]
    phases: tuple[str, ...]
    tasks: tuple[str, ...]
    letters: tuple[str, ...]


def experiments_of(figure: str, plan: Formation) -> list[dict[str, Any]]:
    """The experiments of a grid that a figure needs."""
    wanted = FIGURES[figure]
    return [
        experiment
        for experiment in plan.experiments()
        if experiment["phase"] in wanted.phases and experiment.get("task", wanted.tasks[0]) in wanted.tasks
    ]


def write_outcome(figure: str, rows: Sequence[Row], folder: Path) -> tuple[list[Path], list[Claim]]:
    """Draw a figure, and write every claim that the rows allow (`claims.json`, `claims.md`).

    Returns:
        The files, and the claims that the figure is about.

    Raises:
        InputError: the rows hold nothing that the figure needs.
    """
    wanted, grid = FIGURES[figure], Grid([row for row in rows if row.error is None])
    if not grid.of("pretrain"):
        raise InputError("no pretraining of this grid has ended; run more of it")
    every = claims(rows)
    paths = kit.write_figure(folder / f"{figure}.png", lambda: wanted.draw(grid))
    write_json(folder / "claims.json", plain([asdict(claim) for claim in every]))
    write_whole(folder / "claims.md", markdown(every))
    about = [claim for claim in every if claim.claim.startswith(wanted.letters)]
    return [*paths, folder / "claims.json", folder / "claims.md"], about


TITLES = {
    "same_task": "same task, held-out images",
    "second_data": "same task, second data set",
    "true_labels": "classification, true labels",
    "random_labels": "classification, random labels",
}


def fig4(grid: Grid) -> Figure:
    """A: between the checkpoints of pretraining; B, C: after it, smallest and largest set."""
    title = "Final block's feed-forward matrices, mean of the leading 10 ranks and both sides"
    figure, (axes,) = kit.free_panels(1, 3, (12.5 / 3, 3.4), title)
    sizes = grid.families()[0][1] if grid.families() else _sizes(grid)[:1]
    largest = sizes[-1]
    runs = grid.of("pretrain", images=largest[0], steps=largest[1])
    tables = [np.mean([matrix["between"] for matrix in row.values["ffn"].values()], axis=0) for row in runs]
    title = f"A  pretraining on {kit.counted(largest[0])} images ({number_of(len(runs), 'seed')})"
    between_checkpoints(figure, axes[0], np.mean(tables, axis=0), runs[0].values["steps"], title)
    for ax, letter, task in ((axes[1], "B", "true_labels"), (axes[2], "C", "same_task")):
        _after(ax, grid, task, [sizes[0], sizes[-1]], GROUPS[0])
        ax.set_title(f"{letter}  {TITLES[task]}")
    return figure


def fig9(grid: Grid) -> Figure:
    """True against random labels: by step, and by size of the update."""
    title = "True against random labels, from pretrained (solid) and random (dotted) weights"
    figure, rows = kit.free_panels(2, 2, (12.5 / 2, 3.35), title)
    for axes, group in zip(rows, GROUPS, strict=True):
        _starts(axes, grid, group, ("true_labels", "random_labels"))
    return figure


def fig21(grid: Grid) -> Figure:
    """Every set of pretrainings: alignment after the same task on new data and after a new task."""
    tasks = ("same_task", "second_data", "true_labels")
    families = grid.families() or [("one size", _sizes(grid))]
    lines = [(name, sizes, group) for name, sizes in families for group in GROUPS]
    title = "Alignment with the pretrained weights, mean of the leading 10 ranks and both sides"
    figure, rows = kit.free_panels(len(lines), 3, (12.5 / 3, 3.0), title)
    for axes, (name, sizes, group) in zip(rows, lines, strict=True):
        for ax, task in zip(axes, tasks, strict=True):
            _after(ax, grid, task, sizes, group)
            ax.set_title(f"{TITLES[task]}; {group}; {name}", fontsize=8)
    return figure


def scratch(grid: Grid) -> Figure:
    """The same training from pretrained and from random weights; and the ends of two seeds."""
    title = "Alignment of the start with the weights on the way; ends of two seeds"
    figure, rows = kit.free_panels(2, 3, (12.5 / 3, 3.35), title)
    for axes, group in zip(rows, GROUPS, strict=True):
        _starts(axes, grid, group, ("same_task", "true_labels"))
        _bars(axes[2], grid, group)
    return figure


_LABELS = ("true_labels", "random_labels")
_TRAINED = ("pretrain", "post", "scratch")
FIGURES = {
    "fig4": Outcome(fig4, _TRAINED[:2], ("same_task", "true_labels"), ("(a)", "(b)")),
    "fig9": Outcome(fig9, _TRAINED, _LABELS, ("(c)",)),
    "fig21": Outcome(fig21, _TRAINED[:2], ("same_task", "second_data", "true_labels"), ("(b)",)),
    "scratch": Outcome(scratch, (*_TRAINED, "between"), POSTS, ("(d)", "(e)")),
}


def _sizes(grid: Grid) -> list[tuple[int, int]]:
    return sorted({(row.experiment["images"], row.experiment["steps"]) for row in grid.of("pretrain")})


def _starts(axes: Sequence[Axes], grid: Grid, group: str, tasks: Sequence[str]) -> None:
    """Two tasks, each from pretrained (solid) and random (dotted) weights: by step, and by size of the update."""
    for color, task in zip(COLORS, tasks, strict=False):
        for phase, start, dash in (("post", "pretrained", "solid"), ("scratch", "random weights", (0, (1, 1.5)))):
            rows = grid.of(phase, task=task)
            _line(axes[0], rows, group, color, f"{TITLES[task]}; {start}", dash)
            for of in (curves(row, group) for row in rows):
                size, aligned = of.size.mean(axis=0), of.aligned.mean(axis=0)
                axes[1].plot(size, aligned, color=color, ls=dash, lw=1.0, alpha=0.8)
    _finish(axes[0], grid, group, f"{group}: by step")
    axes[1].set(xlabel="‖delta‖/‖W‖", ylabel="alignment with the start", ylim=(-0.02, 1.03))
    axes[1].set_title(f"{group}: by size of the update, a line an experiment")


def _after(ax: Axes, grid: Grid, task: str, sizes: Sequence[tuple[int, int]], group: str) -> None:
    for i, (images, steps) in enumerate(sizes):
        rows = grid.of("post", task=task, images=images, steps=steps)
        _line(ax, rows, group, COLORS[i % len(COLORS)], f"{kit.counted(images)} images")
    _finish(ax, grid, group, "")


def _line(ax: Axes, rows: Sequence[Row], group: str, color: str, title: str, dash: Any = "solid") -> None:
    """Mean over seeds of the alignment at each checkpoint (those of one seed averaged), and its interval."""
    by_seed: dict[int, list[Any]] = defaultdict(list)
    for row in rows:
        by_seed[row.experiment["seed"]].append(curves(row, group).aligned.mean(axis=0))
    if not by_seed:
        return
    seeds = [np.mean(each, axis=0) for each in by_seed.values()]
    x = rows[0].values["steps"]
    ends = np.array([student_interval([float(curve[t]) for curve in seeds]) for t in range(len(x))])
    mean, low, high = ends[:, 0], ends[:, 1].clip(0, 1), ends[:, 2].clip(0, 1)
    look = {"color": color, "dash": dash, "label": f"{title} ({number_of(len(seeds), 'seed')})"}
    kit.band(ax, x, low, mean, high, width=1.4, alpha=0.12, marker="o", ms=2.5, **look)


def _finish(ax: Axes, grid: Grid, group: str, title: str) -> None:
    kit.reference(ax, _chance(grid, group), "chance")
    ax.set(title=title, xlabel="optimizer step", ylabel="alignment with the start", ylim=(-0.02, 1.03))
    ax.legend(fontsize=7, loc="upper right")


def _chance(grid: Grid, group: str) -> float:
    return float(np.mean([matrix["chance"] for matrix in members(grid.of("pretrain")[0], group)]))


def _bars(ax: Axes, grid: Grid, group: str) -> None:
    """Alignment of two seeds' ends, a dot for each pair."""
    pairs: dict[str, list[float]] = defaultdict(list)
    for row in grid.of("between"):
        start = row.experiment
        name = f"{TITLES[start['task']]}\nfrom random weights" if "task" in start else ""
        name = name or f"pretraining, {start['steps']} steps\n{kit.counted(start['images'])} images"
        pairs[name].append(float(np.mean([matrix["first"][-1] for matrix in members(row, group)])))
    for x, ends in enumerate(pairs.values()):
        ax.plot([x] * len(ends), ends, "o", color=COLORS[0], ms=4)
    kit.reference(ax, _chance(grid, group))
    ax.set_xticks(range(len(pairs)), pairs, rotation=60, fontsize=6, ha="right")
    ax.set(title=f"{group}: two seeds (dashed: chance)", ylim=(-0.02, 1.03))
