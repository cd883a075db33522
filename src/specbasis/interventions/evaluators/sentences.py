"""A text file that a sentence encoder embeds: whether it still tells which halves of a text belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from specbasis.finetuning.forgetting import GROUP, TEMPERATURE
from specbasis.interventions.evaluators.kit import form, location_of, pretrained
from specbasis.interventions.evaluators.text import passages
from specbasis.interventions.samples import Sample


@dataclass(frozen=True, eq=False)
class Sentences:
    """The loss that sentence encoders are pretrained for, on passages of a text file.

    Each passage is cut into its halves; embeddings are mean-pooled and normalised. ``loss`` of a passage: the
    cross entropy (nats) of telling its second half among those of 32 passages by its first one, and the other way
    round, averaged, at temperature 0.05. Chance is log 32 = 3.47.

    Attributes:
        path: a text file, UTF-8.
        limit: judge on this many passages; whole groups of 32.
        max_length: tokens at which a half is cut.
    """

    path: str
    limit: int | None = None
    max_length: int = 64
    metric: str = "loss"

    def prepare(self) -> None:
        """Read the passages.

        Raises:
            InputError: they cannot be had.
        """
        passages(self.path)

    @property
    def chance(self) -> float:
        """The loss of embeddings that tell nothing, for whole groups."""
        return log(min(GROUP, len(passages(self.path)[: self.limit])))

    def load(self, source: str) -> nn.Module:
        """The encoder without a head."""
        import transformers

        return pretrained(transformers.AutoModel, source, unread="pooler.")

    def __call__(self, model: nn.Module) -> dict[str, Sample]:
        """``loss`` of each passage."""
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(location_of(model), trust_remote_code=False)
        words = [text.split() for text in passages(self.path)[: self.limit]]
        losses = []
        for start in range(0, max(1, len(words) - GROUP + 1), GROUP):
            group = words[start : start + GROUP]
            halves = (
                [" ".join(split[: max(1, len(split) // 2)]) for split in group],
                [" ".join(split[len(split) // 2 :]) for split in group],
            )
            first, second = (self._embedded(model, tokenizer, texts) for texts in halves)
            similarity = first @ second.T / TEMPERATURE
            own = torch.arange(len(first))
            there, back = (F.cross_entropy(side, own, reduction="none") for side in (similarity, similarity.T))
            losses.append((there + back).double().numpy() / 2)
        return {"loss": Sample(np.concatenate(losses)[:, None], higher_is_better=False)}

    def _embedded(self, model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        with torch.inference_mode():
            states = model(**{name: value.to(model.device) for name, value in batch.items()}).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return F.normalize((states.float().cpu() * mask).sum(1) / mask.sum(1), dim=-1)


@form("sentences")
def _sentences(file: str, options: Mapping[str, Any]) -> Sentences:
    return Sentences(file, options.get("limit"))
