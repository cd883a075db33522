"""How a finetune is done: the protocol that all methods share, and where a method is placed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from specbasis.core.errors import InputError

PRECISIONS = ("float32", "bf16", "fp16")
SELECTIONS = ("last", "best")


@dataclass(frozen=True)
class Protocol:
    """How it is trained; the defaults are those of the paper.

    AdamW; the learning rate rises linearly over the first 6 % of the steps and falls linearly to zero;
    gradients are clipped at norm 1, transformers' default, on which the paper is silent.

    Attributes:
        epochs: passes over train; None: the method's own for the task (Tab. 5 for the spectral adapter).
        learning_rate: at its peak; None: the method's own for the task.
        batch_size: examples a step, of one process.
        max_length: tokens at which texts are cut.
        warmup: share of the steps over which the learning rate rises.
        weight_decay: of AdamW.
        group_by_length: batches of examples of like length: less padding, another order than a plain shuffle.
        precision: "float32", or autocast to "bf16" or "fp16" with float32 weights.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        select: "last" epoch, or the "best" one on a fixed part of train, which is then not trained on.

    Source: Yu et al. 2026, App. M.
    """

    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int = 16
    max_length: int = 256
    warmup: float = 0.06
    weight_decay: float = 0.0
    group_by_length: bool = False
    precision: str = "float32"
    gradient_checkpointing: bool = False
    select: str = "last"

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "learning_rate": self.learning_rate, "batch_size": self.batch_size}
        for name, value in (*positive.items(), ("max_length", self.max_length)):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"got {name} = {value}; want a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"got weight_decay = {self.weight_decay}; want 0 or a positive number")
        for name, given, known in (
            ("precision", self.precision, PRECISIONS),
            ("select", self.select, SELECTIONS),
        ):
            if given not in known:
                raise InputError(f"got {name} = {given!r}; want one of {', '.join(known)}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"got warmup = {self.warmup}; want a share of the steps in [0, 1)")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise InputError("got precision = 'fp16' without a GPU; want bf16 or float32")


@dataclass(frozen=True)
class Placement:
    """Where a method goes and how large it is; None is the method's own default. See `methods.attach`."""

    rank: int | None = None
    interval: tuple[int, int] | None = None
    blocks: tuple[int, ...] | None = None
    roles: tuple[str, ...] | None = None
    target_modules: tuple[str, ...] | None = None
    checkpoint: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
