"""Texts and images that are classified, or texts that are scored: GLUE, a table, a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from specbasis.core.errors import InputError
from specbasis.finetuning.base import Images
from specbasis.finetuning.metrics import METRICS, Predictions
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import Split, Task, task_named
from specbasis.interventions.evaluators.kit import FORMS, Batch, Encoded, location_of, logits_of, padded, pretrained
from specbasis.interventions.samples import Sample


@dataclass(frozen=True, eq=False)
class Classification(Encoded):
    """A task of texts or images with labels: GLUE, or one's own table or folder; see `specbasis.finetuning.tasks`.

    Attributes:
        source: name of a GLUE task, path of a table of texts, or of a folder of images with one folder a class.
        data_dir: folder with GLUE in its official layout; without it GLUE comes from the Hub.
        limit: judge on this many examples of the dev set, drawn once with a fixed seed; all where it has fewer.
        text: the columns of a table that hold the one or two texts.
        label: its column with the label.
        max_length: tokens at which texts are cut.
    """

    source: str
    data_dir: str | None = None
    limit: int | None = None
    text: tuple[str, ...] = ()
    label: str = ""
    max_length: int = 256

    regression: ClassVar[bool] = False
    """Whether the labels of one's own table are numbers."""

    @cached_property
    def _data(self) -> tuple[Task, Split]:
        data = load_task(
            self.source,
            data_dir=self.data_dir,
            dev=self._own_file if self._own_file.exists() else None,
            text=self.text,
            label=self.label,
            regression=self.regression and self._own_file.exists(),
        )
        split = next(iter(data.dev.values()))
        if self.limit is not None and self.limit < len(split):
            chosen = np.random.default_rng(0).choice(len(split), self.limit, replace=False)
            split = split.take(sorted(chosen.tolist()))
        return data.task, split

    @property
    def _own_file(self) -> Path:
        return Path(self.source).expanduser()

    @property
    def _task(self) -> Task:
        return self._data[0] if self._own_file.exists() else task_named(self.source)

    @property
    def metric(self) -> str:
        """The task's first metric."""
        return self._task.metrics[0]

    def prepare(self) -> None:
        """Read the examples.

        Raises:
            InputError: they cannot be had.
        """
        _ = self._data

    def load(self, source: str) -> nn.Module:
        """A transformers model with the head that its folder holds."""
        import transformers

        images, texts = (
            transformers.AutoModelForImageClassification,
            transformers.AutoModelForSequenceClassification,
        )
        return pretrained(images if self._task.images else texts, source)

    def __call__(self, model: nn.Module) -> dict[str, Sample | float]:
        """The task's metrics, from prediction and label of every example; chance is the most frequent label."""
        task, split = self._data
        order = [] if task.regression else _label_order(model, task)
        predictions = np.zeros(len(split))
        with torch.inference_mode():
            for indices, batch in _images(model, split) if task.images else self.batches(model, self.max_length):
                logits = logits_of(model, batch)
                outputs = logits[:, 0] if task.regression else logits[:, order].argmax(-1)
                predictions[indices] = outputs.numpy()
        judged = Predictions(predictions, np.asarray(split.labels, dtype=np.float64))
        chance = judged.majority(task)
        return {name: Sample(judged.columns, METRICS[name].statistic, chance=chance[name]) for name in task.metrics}

    def encode(self, tokenizer: Any, max_length: int, model: nn.Module) -> Iterator[Batch]:
        """The texts, or pairs of texts, cut at ``max_length`` tokens."""
        columns = [list(column) for column in zip(*self._data[1].inputs, strict=True)]
        return padded(tokenizer, tokenizer(*columns, truncation=True, max_length=max_length))


def _images(model: nn.Module, split: Split) -> Iterator[Batch]:
    """Pictures as the model's processor has them, read each time: they take too much memory to be kept."""
    import transformers

    images = Images(split, transformers.AutoImageProcessor.from_pretrained(location_of(model)))
    for start in range(0, len(split), 32):
        indices = list(range(start, min(start + 32, len(split))))
        yield indices, {"pixel_values": torch.stack([images[index]["pixel_values"] for index in indices])}


def _label_order(model: Any, task: Task) -> list[int]:
    """Which logit belongs to each class of the task: by the names in the model's config where they agree."""
    named = {str(name).lower(): int(index) for name, index in (model.config.label2id or {}).items()}
    wanted = [str(name).lower() for name in task.labels]
    if set(wanted) <= set(named):
        return [named[name] for name in wanted]
    if model.config.num_labels != len(wanted):
        count, location = model.config.num_labels, location_of(model)
        raise InputError(f"{location}: has {count} labels; the task has {len(wanted)} ({', '.join(wanted)})")
    return list(range(len(wanted)))


FORMS["glue"] = lambda task, options: Classification(
    task_named(task).name, options.get("data_dir"), options.get("limit")
)
FORMS["table"] = lambda file, options: Classification(
    file, limit=options.get("limit"), text=tuple(options.get("text", ())), label=options.get("label", "")
)
FORMS["images"] = lambda folder, options: Classification(folder, limit=options.get("limit"))
