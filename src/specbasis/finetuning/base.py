"""The base of a finetune: the model with its new task head, and what turns examples into its inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from specbasis.checkpoint.entry import first_line
from specbasis.checkpoint.places import transformers_address
from specbasis.core.errors import InputError
from specbasis.finetuning.tasks import Split, Task

SECOND = "second"
"""Where an example has the inputs of its second text, if the two go through the encoder one by one."""


@dataclass(frozen=True, eq=False)
class Base:
    """A pretrained model with the head of a task.

    Attributes:
        model: a transformers model; its head is random, of the seed that was set, unless the checkpoint has one.
        processor: tokenizer, or image processor.
        address: arguments of ``from_pretrained`` that load the same checkpoint.
        task: whose head it has.
        max_length: tokens at which texts are cut.
        head: where the head stands: "first", or "mean" (see `heads`).
    """

    model: Any
    processor: Any
    address: Mapping[str, Any]
    task: Task
    max_length: int
    head: str = "first"

    @property
    def apart(self) -> bool:
        """Whether the two texts of an example go through the encoder one by one."""
        return self.head == "mean" and self.task.pair

    def encode(self, split: Split) -> Examples:
        """The inputs of every example with its label; texts are tokenised here, images are read when asked for.

        Raises:
            InputError: the greatest length leaves no room for a text.
        """
        if self.task.images:
            return Images(split, self.processor)
        labels = split.labels if self.task.regression else map(int, split.labels)
        columns = list(map(list, zip(*split.inputs, strict=True)))
        if self.apart and columns:
            first, second = (self._tokens(column) for column in columns)
            return [{**u, SECOND: v, "labels": y} for u, v, y in zip(first, second, labels, strict=True)]
        return [{**row, "labels": y} for row, y in zip(self._tokens(*columns), labels, strict=True)]

    def _tokens(self, *columns: list[str]) -> list[dict[str, Any]]:
        if not columns:
            return []
        added = self.processor.num_special_tokens_to_add(pair=len(columns) > 1)
        if self.max_length <= added:
            raise InputError(
                f"got max_length = {self.max_length}; want more than {added}: the tokenizer adds so many tokens"
            )
        encoded = self.processor(*columns, truncation=True, max_length=self.max_length)
        names = [name for name in encoded if name in self.processor.model_input_names]
        return [{name: encoded[name][i] for name in names} for i in range(len(columns[0]))]

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Batches: padded to the longest of each batch."""
        from transformers import DataCollatorWithPadding, default_data_collator

        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]] = (
            default_data_collator if self.task.images else DataCollatorWithPadding(self.processor)
        )
        return partial(_texts_apart, collate) if self.apart else collate


def _texts_apart(collate: Callable[[Any], Mapping[str, Tensor]], examples: Sequence[Any]) -> dict[str, Tensor]:
    """A batch of pairs: a row for each text, an example's second behind its first, and a label for each example."""
    rows = [{k: v for k, v in e.items() if k not in (SECOND, "labels")} for e in examples]
    texts = [text for row, example in zip(rows, examples, strict=True) for text in (row, example[SECOND])]
    return {**collate(texts), "labels": torch.tensor([example["labels"] for example in examples])}


def tokens_of(example: Mapping[str, Any]) -> int:
    """Tokens of an example, of the longer of its texts where these are apart."""
    return max(len(text["input_ids"]) for text in (example, example.get(SECOND, example)))


class Images(Dataset[dict[str, Any]]):
    """Images with their labels, read from their files one by one."""

    def __init__(self, split: Split, processor: Any) -> None:
        self.split, self.processor = split, processor

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        (path,) = self.split.inputs[index]
        try:
            with Image.open(path) as image:
                pixels = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        except OSError as error:
            raise InputError(f"{path}: not a readable image: {error}") from error
        return {"pixel_values": pixels, "labels": int(self.split.labels[index])}


Examples = list[dict[str, Any]] | Images
"""What a Trainer takes as a dataset."""


def load_base(
    base: str | Path, task: Task, *, max_length: int = 256, scratch: bool = False, head: str = "first"
) -> Base:
    """Load a pretrained model with a head for a task, in float32; a head that it lacks is drawn from torch's
    generator.

    Args:
        base: folder, file, ``hub:org/name@revision/subfolder``, bare ``org/name``, ``timm:name`` or ``pkg:…``, of a
            model that transformers knows.
        task: what is to be predicted.
        max_length: tokens at which texts are cut; less where the model takes less.
        scratch: the same architecture with every weight drawn anew: what pretraining is compared with.
        head: what it stands on: "first", as transformers' own class has it, or "mean"; see `heads`.

    Raises:
        InputError: nothing there, no ``config.json``, or a model that transformers cannot give such a head without
            running code from the checkpoint; a mean head for images.
    """
    import transformers

    address = transformers_address(base)
    config = loading(base, lambda: transformers.AutoConfig.from_pretrained(**address, trust_remote_code=False))
    config.num_labels = max(1, len(task.labels))
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: index for index, name in enumerate(task.labels)}
    config.problem_type = "regression" if task.regression else "single_label_classification"
    if head == "mean" and task.images:
        raise InputError(f"got a mean head for {task.title}; want a task of texts, or the head of the model's own")
    if head == "mean" and getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{base}: got a mean head on an encoder with a decoder; want an encoder, or --head first")
    own = transformers.AutoModelForSequenceClassification
    texts = (transformers.AutoModel if head == "mean" else own, transformers.AutoTokenizer)
    images = (transformers.AutoModelForImageClassification, transformers.AutoImageProcessor)
    kind, processors = images if task.images else texts
    processor = loading(base, lambda: processors.from_pretrained(**address, trust_remote_code=False))
    weights: dict[str, Any] = {"config": config, "dtype": torch.float32, "trust_remote_code": False}
    model = loading(
        base,
        lambda: (
            kind.from_config(**weights)
            if scratch
            else kind.from_pretrained(**address, **weights, ignore_mismatched_sizes=True)
        ),
    )
    if head == "mean":
        from specbasis.finetuning.heads import under_mean_head

        model = under_mean_head(model, task.pair)
    if not task.images:
        if len(processor) <= len(set(processor.all_special_ids)):
            raise InputError(
                f"{base}: its tokenizer knows no words; are the tokenizer's files (tokenizer.json, vocab.txt …) "
                "beside the weights?"
            )
        let_pad(processor, base)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id
    return Base(model, processor, address, task, min(max_length, longest_input(model, processor)), head)


def let_pad(tokenizer: Any, base: str | Path) -> None:
    """Give a tokenizer a token to pad with, where it has none.

    Raises:
        InputError: it has none for ends or unknown words either.
    """
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise InputError(f"{base}: its tokenizer has no token to pad with, nor one for ends or unknown words")


def longest_input(model: nn.Module, processor: Any) -> int:
    """Tokens that a model takes: positions of its own, and what its tokenizer was made for."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == positions]
    # RoBERTa counts from behind the padding.
    taken = [m.padding_idx + 1 for m in tables if m.padding_idx is not None]
    return min(int(positions) - max(taken, default=0), int(getattr(processor, "model_max_length", sys.maxsize)))


def encoder_of(model: nn.Module) -> nn.Module:
    """The backbone below the task head, whatever method is on it."""
    get_base = getattr(model, "get_base_model", None)
    inner = get_base() if callable(get_base) else model
    backbone = getattr(inner, getattr(inner, "base_model_prefix", "") or "no prefix", None)
    return backbone if isinstance(backbone, nn.Module) else inner


_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


def loading(base: str | Path, load: Callable[[], Any]) -> Any:
    """What transformers loads, with its many errors as one line.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        return load()
    except (*_FAILURES, SafetensorError, UnpicklingError) as error:
        raise InputError(f"{base}: transformers cannot load it: {first_line(error)}") from error


def shape_of(base: str | Path) -> tuple[int, int]:
    """(singular values of a feed-forward matrix, number of blocks) of a base, from its configuration alone.

    Raises:
        InputError: the configuration does not say.
    """
    import transformers

    address = transformers_address(base)
    config = loading(base, lambda: transformers.AutoConfig.from_pretrained(**address, trust_remote_code=False))
    width, blocks = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(width, int) or not isinstance(blocks, int):
        raise InputError(f"{base}: its configuration has no hidden_size and num_hidden_layers; want a Transformer")
    inner = getattr(config, "intermediate_size", None)
    return min(width, inner) if isinstance(inner, int) else width, blocks
