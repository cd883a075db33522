"""How the basis forms (Fig. 4, 9, 21 and training from scratch): the grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from specbasis.checkpoint.atomic import write_whole
from specbasis.jobs.experiments import Row
from specbasis.jobs.folder import plain, write_json
from specbasis.paper.formation_claims import Claim, claims, markdown
from specbasis.paper.formation_figures import write_formation_figure
from specbasis.paper.formation_grid import Formation
from specbasis.paper.training import NEW_TASK, PRETRAINING

FIGURES = {
    "fig4": (("pretrain", "post"), ("same_task", "true_labels"), ("(a)", "(b)")),
    "fig9": (("pretrain", "post", "scratch"), ("true_labels", "random_labels"), ("(c)",)),
    "fig21": (("pretrain", "post"), ("same_task", "second_data", "true_labels"), ("(b)",)),
    "scratch": (
        ("pretrain", "post", "scratch", "between"),
        ("same_task", "second_data", "true_labels", "random_labels"),
        ("(d)", "(e)"),
    ),
}
"""Figure → the phases and tasks that it needs, and the claims that it is about."""

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
    phases, tasks, _ = FIGURES[figure]
    return [
        experiment
        for experiment in plan.experiments()
        if experiment["phase"] in phases and experiment.get("task", tasks[0]) in tasks
    ]


def write_outcome(figure: str, rows: Sequence[Row], folder: Path) -> tuple[list[Path], list[Claim]]:
    """Draw a figure, and write every claim that the rows allow (`claims.json`, `claims.md`).

    Returns:
        The files, and the claims that the figure is about.

    Raises:
        InputError: the rows hold nothing that the figure needs.
    """
    paths = write_formation_figure(figure, rows, folder)
    every = claims(rows)
    write_json(folder / "claims.json", plain([asdict(claim) for claim in every]))
    write_whole(folder / "claims.md", markdown(every))
    letters = FIGURES[figure][2]
    return [*paths, folder / "claims.json", folder / "claims.md"], [c for c in every if c.claim.startswith(letters)]
