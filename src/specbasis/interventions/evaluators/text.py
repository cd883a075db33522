"""A text file: how well a language model, causal or masked, predicts it, or a sentence encoder tells its halves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from specbasis.checkpoint.places import transformers_address
from specbasis.checkpoint.regular import read_text
from specbasis.core.errors import InputError
from specbasis.core.statistics import Array
from specbasis.finetuning.base import loading
from specbasis.finetuning.forgetting import GROUP, losses_of_halves
from specbasis.interventions.evaluators.kit import (
    FORMS,
    Batch,
    Encoded,
    logits_of,
    padded,
    pretrained,
    tokenizer_of,
    want_embedded,
)
from specbasis.interventions.samples import Sample, perplexity, ratio


@dataclass(frozen=True, eq=False)
class Text(Encoded):
    """How well a language model predicts a text file: the loss of each passage, and the perplexity of all.

    A passage is what blank lines separate, or a line where there are none. A causal model predicts each token from
    those before it in its passage; a masked one predicts 15 % of the tokens, drawn once, from all others.

    Attributes:
        path: a text file, UTF-8.
        limit: judge on this many passages.
        max_length: tokens of a passage; longer ones are cut into several.
    """

    path: str
    limit: int | None = None
    max_length: int = 256
    metric: str = "perplexity"
    about: ClassVar[str] = "nats a predicted token"

    def load(self, source: str) -> nn.Module:
        """A transformers model with its language-model head, causal or masked as its config says."""
        import transformers

        read = partial(transformers.AutoConfig.from_pretrained, trust_remote_code=False)
        config = loading(source, lambda: read(**transformers_address(source)))
        masked = any(map(_is_masked, config.architectures or ()))
        return pretrained(
            transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM, source
        )

    def __call__(self, model: nn.Module) -> dict[str, Sample]:
        """``perplexity`` and ``loss`` (nats per predicted token), from loss and tokens of each passage."""
        rows: dict[int, Array] = {}
        with torch.inference_mode():
            for indices, batch in self.batches(model, self.max_length):
                logits = logits_of(model, {name: x for name, x in batch.items() if name != "labels"})
                labels = batch["labels"]
                if not _is_masked(type(model).__name__):
                    logits, labels = logits[:, :-1], labels[:, 1:]
                losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
                for index, loss, label in zip(indices, losses.double(), labels, strict=True):
                    rows[index] = np.array([float(loss.sum()), float((label != -100).sum())])
        kept = [rows[index] for index in sorted(rows) if rows[index][1] > 0]
        if not kept:
            raise InputError(
                f"{self.path}: no passage has a token to predict; want texts of known words, and longer"
            )
        values, vocabulary = np.stack(kept), logits.shape[-1]
        return {
            "perplexity": Sample(values, perplexity, higher_is_better=False, chance=vocabulary),
            "loss": Sample(values, ratio, higher_is_better=False, chance=math.log(vocabulary)),
        }

    def encode(self, tokenizer: Any, max_length: int, model: nn.Module) -> Iterator[Batch]:
        """The passages, with the tokens that are to be predicted as labels."""
        encoded = tokenizer(
            passages(self.path)[: self.limit],
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=tokenizer.is_fast,
        )
        for indices, batch in padded(tokenizer, encoded):
            if _is_masked(type(model).__name__):
                _mask(batch, tokenizer, indices)
            else:
                batch["labels"] = torch.where(batch["attention_mask"] > 0, batch["input_ids"], -100)
            yield indices, batch


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
    about: ClassVar[str] = "nats, of telling which halves of a passage belong together, among 32"

    def prepare(self) -> None:
        """Read the passages.

        Raises:
            InputError: they cannot be had.
        """
        passages(self.path)

    def load(self, source: str) -> nn.Module:
        """The encoder without a head."""
        import transformers

        return pretrained(transformers.AutoModel, source, unread="pooler.")

    def __call__(self, model: nn.Module) -> dict[str, Sample]:
        """``loss`` of each passage."""
        tokenizer, texts = tokenizer_of(model), passages(self.path)[: self.limit]
        encoded = tokenizer(texts, truncation=True, max_length=2 * self.max_length)
        want_embedded((torch.tensor(ids) for ids in encoded["input_ids"]), model)
        losses = losses_of_halves(model, tokenizer, texts, self.max_length).double().numpy()
        chance = math.log(min(GROUP, len(texts)))  # of embeddings that tell nothing, for whole groups
        return {"loss": Sample(losses[:, None], higher_is_better=False, chance=chance)}


def _is_masked(class_name: str) -> bool:
    """Whether a class of transformers predicts tokens that are hidden, not those that follow."""
    return class_name.endswith(("ForMaskedLM", "ForPreTraining"))


def passages(path: str) -> list[str]:
    """The passages of a text file: what blank lines separate, or the lines where there are none.

    Raises:
        InputError: it cannot be read, or holds no text.
    """
    try:
        text = read_text(Path(path), limit=None)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text in UTF-8 ({error}); want a text file") from error
    parts = text.split("\n\n") if "\n\n" in text else text.splitlines()
    texts = [part.strip() for part in parts if part.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return texts


def _mask(batch: dict[str, Tensor], tokenizer: Any, indices: Sequence[int]) -> None:
    """Hide 15 % of each passage's tokens, at least one, special ones excepted; the same ones every time."""
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) | (batch["attention_mask"] == 0)
    noise = torch.stack(
        [torch.rand(ids.shape[1], generator=torch.Generator().manual_seed(index)) for index in indices]
    )
    noise[special] = 2.0
    count = (0.15 * (~special).sum(1)).ceil().long()
    hidden = (noise.argsort(1).argsort(1) < count[:, None]) & ~special
    batch["labels"] = torch.where(hidden, ids, -100)
    batch["input_ids"] = torch.where(hidden, tokenizer.mask_token_id, ids)


FORMS["text"] = lambda file, options: Text(file, options.get("limit"))
FORMS["sentences"] = lambda file, options: Sentences(file, options.get("limit"))
