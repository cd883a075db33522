"""What a method of the scoreboard has to beat: the frozen encoder's means, without a head and with a fitted one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from specbasis.adapter.gradients import converged_head
from specbasis.core.errors import InputError
from specbasis.core.extras import quiet
from specbasis.finetuning.base import Base, load_base
from specbasis.finetuning.metrics import Predictions
from specbasis.finetuning.tasks import Split, Task, TaskData

COSINE, CONVERGED = "cosine", "converged-probe"
FLOORS = {COSINE: "Cosine of the frozen means", CONVERGED: "Linear probe, converged"}
"""Names and titles. The cosine of two texts is for tasks that score how alike they are."""


def exists(floor: str, task: Task) -> bool:
    """Whether a task has a floor."""
    return floor == CONVERGED or (task.regression and task.pair)


def floor(name: str, base: str, data: TaskData, head: str) -> dict[str, Any]:
    """The score of a floor and what else a run has; what it has not is None.

    Raises:
        InputError: the head does not stand on the mean.
    """
    if head != "mean":
        raise InputError(f"got {name} with a head on the first state; want --head mean")
    with quiet():
        loaded = load_base(base, data.task, head=head)
    loaded.model.eval()
    scored = {key: _features(loaded, split) for key, split in data.dev.items()}
    width = loaded.model.config.hidden_size
    if name == COSINE:
        outputs = {key: F.cosine_similarity(x[:, :width], x[:, width : 2 * width]) for key, x in scored.items()}
        head_size = 0
    else:
        kind = torch.float64 if data.task.regression else torch.int64
        labels = torch.tensor(data.train.labels, dtype=kind)
        linear = loaded.model.mean_head
        fitted = converged_head(_features(loaded, data.train), labels, linear.out_features)
        outputs = {key: fitted(x) for key, x in scored.items()}
        head_size = sum(p.numel() for p in linear.parameters())
    predictions = {
        key: Predictions.of(data.task, out.double().numpy(), np.asarray(data.dev[key].labels))
        for key, out in outputs.items()
    }
    first = next(iter(predictions.values()))
    total = sum(p.numel() for p in loaded.model.parameters())
    return {
        "score": data.task.score(first.scores(data.task)),
        "parameters": {"adapter": 0, "head": head_size, "total": total},
        "predictions": {key: split.packed() for key, split in predictions.items()},
        "forgetting": {"before": None, "after": None},
        **dict.fromkeys(("peak_memory_bytes", "cpu_seconds_per_epoch", "seconds_per_epoch", "file_bytes")),
    }


@torch.no_grad()
def _features(base: Base, split: Split) -> Float[Tensor, "n features"]:
    """What the head reads of each example, in their order; they run by length, which needs less padding."""
    order = sorted(range(len(split)), key=lambda i: sum(map(len, split.inputs[i])))
    examples: Sequence[Any] = base.encode(split.take(order))  # type: ignore[assignment]
    collate, read = base.collator(), []
    with base.model.mean_head.register_forward_hook(lambda _, inputs, __: read.append(inputs[0])):
        for start in range(0, len(examples), 64):
            base.model(**collate(list(examples[start : start + 64])))
    return torch.cat(read)[torch.from_numpy(np.argsort(order))]
