"""How alike two texts are: the cosine of a sentence encoder's embeddings against what people said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from specbasis.core.errors import InputError
from specbasis.core.pooling import mean_state
from specbasis.finetuning.metrics import METRICS
from specbasis.finetuning.tasks import CORRELATIONS, task_named
from specbasis.interventions.evaluators.classification import Classification
from specbasis.interventions.evaluators.kit import FORMS, Batch, padded, pretrained, want_finite
from specbasis.interventions.samples import Sample


@dataclass(frozen=True, eq=False)
class Similarity(Classification):
    """How well an encoder without a head orders pairs of texts: STS-B, or a table of two texts and a number.

    The score of a pair is the cosine of the means of its texts' last states, each text encoded alone; the metrics
    are its correlations with the labels.

    Source: Cer et al. 2017 (STS-B); Reimers & Gurevych 2019 (arXiv 1908.10084), §4.1.
    """

    regression: ClassVar[bool] = True

    @property
    def metric(self) -> str:
        """Spearman's correlation, as sentence encoders are compared by."""
        return "spearman"

    def prepare(self) -> None:
        """Read the examples.

        Raises:
            InputError: they cannot be had, or are no pairs of texts.
        """
        if not self._data[0].pair:
            raise InputError(f"{self._data[0].title}: is no task of two texts; want one, such as similarity:stsb")

    def load(self, source: str) -> nn.Module:
        """The encoder without a head."""
        import transformers

        return pretrained(transformers.AutoModel, source, unread="pooler.")

    def __call__(self, model: nn.Module) -> dict[str, Sample | float]:
        """``spearman`` and ``pearson``, from cosine and label of every pair."""
        self.prepare()
        split, device = self._data[1], next(model.parameters()).device
        means: list[torch.Tensor] = [torch.zeros(0)] * (2 * len(split))
        with torch.inference_mode():
            for indices, batch in self.batches(model, self.max_length):
                states = model(**{name: x.to(device) for name, x in batch.items()}).last_hidden_state.float().cpu()
                want_finite(states)
                for index, mean in zip(indices, mean_state(states, batch["attention_mask"]), strict=True):
                    means[index] = mean
        u, v = torch.stack(means).double().chunk(2)
        values = np.stack([F.cosine_similarity(u, v).numpy(), np.asarray(split.labels, np.float64)], axis=1)
        return {name: Sample(values, METRICS[name].statistic, chance=0.0) for name in reversed(CORRELATIONS)}

    def encode(self, tokenizer: Any, max_length: int, model: nn.Module) -> Iterator[Batch]:
        """The first texts of all pairs, then the second ones."""
        texts = [text for column in zip(*self._data[1].inputs, strict=True) for text in column]
        return padded(tokenizer, tokenizer(texts, truncation=True, max_length=max_length))


def _named(text: str, options: Any) -> Similarity:
    where = {"text": tuple(options.get("text", ())), "label": options.get("label", "")} if "." in text else {}
    source = text if where else task_named(text).name
    return Similarity(source, options.get("data_dir"), options.get("limit"), **where)


FORMS["similarity"] = _named
