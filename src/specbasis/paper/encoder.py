"""A frozen encoder cut below its last blocks: the states there, and what they give without any adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from specbasis.adapter.gradients import converged_head, summed_gradients
from specbasis.core.errors import InputError
from specbasis.core.pooling import mean_state
from specbasis.finetuning.base import load_base
from specbasis.finetuning.methods.sites import FEED_FORWARD, sites
from specbasis.finetuning.prefix.narrow import slicing
from specbasis.finetuning.tasks import Split, Task

MAX_LENGTH = 64
"""Tokens at which texts are cut: beyond the longest of CoLA and SST-2, and 99 % of STS-B's."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen encoder, cut below its last blocks.

    Attributes:
        model: without its head, in evaluation mode.
        tokenizer: its own.
        task: what is predicted.
        blocks: the last ones.
        matrices: the modules that are adapted, by name.
        first: whether the head stands on the pooled first state, as that of `finetune`, and not on the mean of all.
    """

    model: nn.Module
    tokenizer: Any
    task: Task
    blocks: nn.ModuleList
    matrices: Mapping[str, nn.Linear]
    first: bool = False

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device


@dataclass(frozen=True, eq=False)
class Examples:
    """What the last blocks are given, and the labels.

    Attributes:
        hidden: states below the last blocks, (examples, texts, tokens, width).
        lengths: tokens of each text, (examples, texts).
        labels: class or value, (examples,).
    """

    hidden: Float[Tensor, "n texts tokens width"]
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def longest(self) -> np.ndarray:
        """Tokens of the longer text of each example."""
        return self.lengths.amax(1).cpu().numpy()


def load_encoder(base: str, task: Task, device: str, blocks: int = 2, head: str = "mean") -> Encoder:
    """An encoder, without dropout and head, and its last blocks.

    Raises:
        InputError: not a model with a list of blocks at ``encoder.layer``, as BERT and its relatives have.
    """
    loaded = load_base(base, task, max_length=MAX_LENGTH)
    backbone = loaded.model.base_model.eval().requires_grad_(False).to(device)
    stack = getattr(getattr(backbone, "encoder", None), "layer", None)
    if not isinstance(stack, nn.ModuleList) or len(stack) < blocks:
        raise InputError(
            f"{base}: got a {type(backbone).__name__}; want an encoder of BERT's kind, whose last blocks train"
        )
    if head == "first" and getattr(backbone, "pooler", None) is None:
        raise InputError(f"{base}: has no pooler for a head on the first state; want --head mean")
    chosen = sites(backbone, FEED_FORWARD, tuple(range(-blocks, 0)))
    matrices = {site.name: backbone.get_submodule(site.name) for site in chosen}
    return Encoder(backbone, loaded.processor, task, stack[-blocks:], matrices, head == "first")


@torch.no_grad()
def encode(encoder: Encoder, split: Split, at_once: int = 256) -> Examples:
    """The hidden states of every text below the last blocks."""
    texts = [text for inputs in split.inputs for text in inputs]
    tokens = encoder.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    lengths = torch.tensor([len(ids) for ids in tokens])
    hidden = torch.zeros(len(texts), int(lengths.max()), encoder.width, device=encoder.device)
    with _stopped_before(encoder.blocks[0]):
        for rows in portions(np.argsort(lengths.numpy(), kind="stable"), at_once):
            padded = encoder.tokenizer.pad({"input_ids": [tokens[i] for i in rows]}, return_tensors="pt")
            states = _below(encoder, padded.to(encoder.device))
            hidden[torch.from_numpy(rows).to(encoder.device), : states.shape[1]] = states
    per_example = len(split.inputs[0])
    kind = torch.float32 if encoder.task.regression else torch.int64
    return Examples(
        hidden.view(len(split), per_example, *hidden.shape[1:]),
        lengths.view(len(split), per_example).to(encoder.device),
        torch.tensor(split.labels, dtype=kind, device=encoder.device),
    )


class _Stop(Exception):  # noqa: N818 - no error: the states are there
    def __init__(self, states: Tensor) -> None:
        self.states = states


def _stopped_before(block: nn.Module) -> Any:
    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _Stop(inputs[0])

    return block.register_forward_pre_hook(stop)


def _below(encoder: Encoder, batch: Mapping[str, Tensor]) -> Tensor:
    try:
        encoder.model(**batch)
    except _Stop as stopped:
        return stopped.states
    raise InputError("the model never ran its last blocks")  # pragma: no cover - load_encoder has seen to it


def pooled(encoder: Encoder, states: Float[Tensor, "n tokens width"], lengths: Tensor) -> Float[Tensor, "n width"]:
    """What the head stands on, from the states below the last blocks: means over each text's own tokens, or the
    pooled first state, for which the last block works on that one alone behind its attention.
    """
    mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    seen = torch.where(mask, 0.0, torch.finfo(states.dtype).min)[:, None, None, :]
    with slicing(encoder.blocks[-1], "attention" if encoder.first else None):
        for block in encoder.blocks:
            outputs = block(states, seen)
            states = outputs if isinstance(outputs, Tensor) else outputs[0]
    if encoder.first:
        first: Tensor = encoder.model.pooler(states)  # type: ignore[operator]
        return first
    return mean_state(states, mask)


def batch(examples: Examples, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, lengths and labels of some rows, as short as the longest of them."""
    tokens = int(examples.longest[rows].max())
    at = torch.from_numpy(rows).to(examples.hidden.device)
    return examples.hidden[at, :, :tokens], examples.lengths[at], examples.labels[at]


def portions(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in parts of at most a size."""
    return np.array_split(rows, math.ceil(len(rows) / size))


def frozen_means(encoder: Encoder, examples: Examples) -> np.ndarray:
    """Means of the frozen model's last states over each example's one text, (examples, width)."""
    order = np.argsort(examples.longest, kind="stable")
    with torch.no_grad():
        means = _means(encoder, examples, order).double().cpu().numpy()
    return means[np.argsort(order)]


def _means(encoder: Encoder, examples: Examples, order: np.ndarray) -> Tensor:
    batches = (batch(examples, rows) for rows in portions(order, 128))
    return torch.cat([pooled(encoder, hidden[:, 0], lengths[:, 0]) for hidden, lengths, _ in batches])


def mean_gradients(encoder: Encoder, examples: Examples, labels: Tensor) -> dict[str, Float[Tensor, "out in"]]:
    """The gradient of the mean loss to each matrix, under a converged linear head on the frozen features.

    Args:
        encoder: the frozen model.
        examples: some hundred are enough.
        labels: theirs, or others as a control.

    Raises:
        InputError: a regression: its head would be a ridge regression, which nothing asks for yet.
    """
    if encoder.task.regression:
        raise InputError("gradients of a regression are not taken; want a classification")

    def loss() -> Iterator[Tensor]:
        features = _means(encoder, examples, np.arange(len(examples)))
        yield F.cross_entropy(converged_head(features, labels, len(encoder.task.labels))(features), labels)

    return summed_gradients(encoder.matrices, loss())
