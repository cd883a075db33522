"""How the basis forms (Fig. 4, 9, 21 and training from scratch): the grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specbasis.checkpoint.atomic import write_whole
from specbasis.core.errors import InputError
from specbasis.figures import kit
from specbasis.jobs.experiments import Row
from specbasis.jobs.folder import plain, write_json
from specbasis.paper import formation_figures
from specbasis.paper.formation_claims import Claim, claims, markdown
from specbasis.paper.formation_grid import POSTS, Formation
from specbasis.paper.formation_rows import Grid
from specbasis.paper.training import NEW_TASK, PRETRAINING


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


_LABELS = ("true_labels", "random_labels")
_TRAINED = ("pretrain", "post", "scratch")
FIGURES = {
    "fig4": Outcome(formation_figures.fig4, _TRAINED[:2], ("same_task", "true_labels"), ("(a)", "(b)")),
    "fig9": Outcome(formation_figures.fig9, _TRAINED, _LABELS, ("(c)",)),
    "fig21": Outcome(formation_figures.fig21, _TRAINED[:2], ("same_task", "second_data", "true_labels"), ("(b)",)),
    "scratch": Outcome(formation_figures.scratch, (*_TRAINED, "between"), POSTS, ("(d)", "(e)")),
}

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


def paper(
    data: str, second: str = "mnist-5k", scales: tuple[int, ...] = (1_000, 5_000, 10_000, 20_000, 50_000)
) -> Formation:
    """The paper's sizes: 200 epochs, batch 64, so that larger sets also take more steps; at 16 000 steps beside it.

    Fig. 21 names its largest and smallest scale only; the ones between are this project's.
    """
    batch = PRETRAINING.batch
    return Formation(
        data=data,
        second=second,
        passes=(
            tuple((n, PRETRAINING.epochs * math.ceil(n / batch)) for n in scales),
            tuple((n, 16_000) for n in scales),
        ),
    )


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
