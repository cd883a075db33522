"""How the basis forms (Fig. 4, 9, 21 and training from scratch): the grids."""

from __future__ import annotations

import math
from dataclasses import replace

from specbasis.pretrain.formation import Formation
from specbasis.pretrain.training import NEW_TASK, PRETRAINING, SAME_TASK

SMALL = Formation(
    passes=(((1_000, 300), (16_000, 300)), ((4_000, 300),), ((1_000, 75),), ((16_000, 1_200),)),
    pretraining=replace(PRETRAINING, checkpoints=15, validations=10),
    same_task=replace(SAME_TASK, epochs=6, checkpoints=6, validations=3),
    new_task=replace(NEW_TASK, epochs=6, checkpoints=6, validations=3),
    same_task_images=512,
    new_task_images=512,
    validation=256,
)
"""About 12 CPU minutes a seed for the first pass. Pretrainings of 300 steps differ in images alone; those of 75 and 1 200
steps have as many epochs as (4 000, 300)."""


def paper(data: str, second: str = "mnist-5k", scales: tuple[int, ...] = (1_000, 5_000, 10_000, 20_000, 50_000)) -> Formation:
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
