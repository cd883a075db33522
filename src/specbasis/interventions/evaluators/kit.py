"""What evaluators share: how a text names them, how models are loaded, and batches that are encoded once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specbasis.checkpoint.places import transformers_address
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.extras import quiet
from specbasis.core.text import named_parts
from specbasis.finetuning.base import let_pad, loading, longest_input
from specbasis.interventions.samples import Sample

TOKENS = 4096
"""Tokens of one batch, padding included. More: fewer calls; less: less padding of short texts, less memory."""

Batch = tuple[list[int], dict[str, Tensor]]
"""Indices of examples, and what the model takes for them."""


class Judge(Protocol):
    """An evaluator that also knows how to load what it judges.

    Attributes:
        metric: the metric that figures show.
    """

    @property
    def metric(self) -> str:
        """The metric that figures show."""

    def load(self, source: str) -> nn.Module:
        """The model that a source holds."""

    def __call__(self, model: nn.Module) -> Mapping[str, Sample | float]:
        """Scores of every example."""


Make = Callable[[str, Mapping[str, Any]], Judge]
"""From what stands behind ``NAME:`` in a text, and the options of `judge`, to an evaluator."""

FORMS: dict[str, Make] = {}
"""The texts that `judge` understands, by what stands before their colon; each evaluator adds its own."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """An evaluator of texts, whose batches are encoded once for each tokenizer; each process encodes for itself."""

    _batches: dict[str, list[Batch]] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}

    def batches(self, model: Any, max_length: int) -> list[Batch]:
        """All batches for a model, whose texts have at most as many tokens as it can read."""
        location = location_of(model)
        if location not in self._batches:
            tokenizer = tokenizer_of(model)
            let_pad(tokenizer, location)
            longest = min(max_length, longest_input(model, tokenizer))
            batches = list(self.encode(tokenizer, longest, model))
            want_embedded((batch["input_ids"] for _, batch in batches), model)
            self._batches[location] = batches
        return self._batches[location]

    def encode(self, tokenizer: Any, max_length: int, model: nn.Module) -> Iterable[Batch]:
        """The examples in batches; see `padded`."""
        raise NotImplementedError


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer beside a transformers model.

    Raises:
        InputError: there is none.
    """
    import transformers

    location = location_of(model)
    load = partial(transformers.AutoTokenizer.from_pretrained, location, trust_remote_code=False)
    tokenizer = loading(location, load)
    # Of a folder without a tokenizer's files, transformers makes one that knows no word: every text is alike to it.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(
            f"{location}: has no tokenizer; want a folder that also holds its files, as tokenizer.save_pretrained "
            "writes them"
        )
    return tokenizer


def want_embedded(batches: Iterable[Tensor], model: Any) -> None:
    """Refuse texts whose tokens the model has no embeddings of.

    Raises:
        InputError: there are some: the tokenizer is another model's.
    """
    table = model.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    largest = max((int(ids.max()) for ids in batches if ids.numel()), default=0)
    if rows is not None and largest >= rows:
        raise InputError(
            f"{location_of(model)}: its tokenizer has token {largest}, and the model embeddings of {rows}; want "
            "the tokenizer of this model"
        )


def padded(tokenizer: Any, encoded: Any) -> Iterator[Batch]:
    """What a tokenizer made of texts, in batches of like length and at most `TOKENS` tokens."""
    names = [name for name in encoded if name in tokenizer.model_input_names]
    for indices in _by_length([len(ids) for ids in encoded["input_ids"]]):
        items = [{name: encoded[name][i] for name in names} for i in indices]
        yield indices, dict(tokenizer.pad(items, return_tensors="pt"))


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def logits_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """A transformers model's outputs for a batch, on the CPU in float32.

    Raises:
        NonFiniteError: they are not finite.
    """
    device = next(model.parameters()).device
    logits: Tensor = model(**{name: x.to(device) for name, x in inputs.items()}).logits.float().cpu()
    want_finite(logits)
    return logits


def want_finite(logits: Tensor) -> None:
    """Refuse outputs with NaN or Inf.

    Raises:
        NonFiniteError: there are some.
    """
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("the model's outputs hold NaN or Inf")


def pretrained(auto_class: Any, source: str, unread: str = "") -> nn.Module:
    """The transformers model that a source holds.

    Args:
        auto_class: of transformers.
        source: what holds it.
        unread: what the names of modules begin with that the evaluator does not read, and that may be absent.

    Raises:
        InputError: transformers cannot load it, or would draw a part of it, such as its head, at random.
    """
    load = partial(
        auto_class.from_pretrained,
        **transformers_address(source),
        trust_remote_code=False,
        dtype="auto",
        output_loading_info=True,
    )
    with quiet():
        model, about = loading(source, load)
    absent = sorted(name for name in about["missing_keys"] if not (unread and name.startswith(unread)))
    if absent:
        raise InputError(
            f"{source}: has no {named_parts(absent, 2)}, which {type(model).__name__} would draw at random; want a "
            "model with the head of its task, such as `specbasis finetune` writes"
        )
    whole: nn.Module = model.eval()
    return whole


def location_of(model: Any) -> str:
    """Where a transformers model came from, which is where its tokenizer is.

    Raises:
        InputError: it does not say.
    """
    location = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if not location:
        raise InputError(
            f"{type(model).__name__}: does not say where it was loaded from; want a transformers model"
        )
    return location


def describe(evaluate: object) -> str:
    """An evaluator in a manifest: its settings that change numbers, in one line."""
    fields = vars(evaluate) if hasattr(evaluate, "__dict__") else {}
    settings = {
        name: value
        for name, value in fields.items()
        # `data_dir` is a location: the same data can be anywhere.
        if name[0] != "_" and name != "data_dir" and value not in (None, "", ())
    }
    name = getattr(evaluate, "__qualname__", type(evaluate).__name__)
    return f"{name} {json.dumps(settings, sort_keys=True, default=lambda value: type(value).__name__)}"
