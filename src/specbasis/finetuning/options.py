"""How a finetune is done: the protocol of all methods, where a method is placed, and what it is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specbasis.core.errors import InputError
from specbasis.core.extras import require
from specbasis.core.grammar import intervals, parse_count
from specbasis.core.options import ADVANCED, PYTHON, Options, Rule, option


def require_libraries() -> None:
    """Say in one line what finetuning lacks.

    Raises:
        MissingExtra: a library of the extra ``finetune`` is not installed.
    """
    require("transformers", "peft", "accelerate", "sklearn", extra="finetune", purpose="finetuning needs")


PRECISIONS = ("float32", "bf16", "fp16")
SELECTIONS = ("last", "best")
PLACEMENTS = ("gradient", "uniform")
HEADS = ("first", "mean")
BASES = ("pretrained", "gradient", "random", "shuffled")


@dataclass(frozen=True)
class Protocol(Options):
    """How it is trained; the defaults are those of the paper.

    AdamW; the learning rate rises linearly over the first 6 % of the steps and falls linearly to zero; gradients
    are clipped at norm 1, transformers' default, on which the paper is silent. A text is cut at ``max_length``
    tokens; ``group_by_length`` makes batches of another order than a plain shuffle; with autocast the weights stay
    float32; the part of train on which the ``best`` epoch is chosen is not trained on. Under a ``head`` on the mean
    the two texts of a pair go through the encoder one by one; see `heads`.

    Source: Yu et al. 2026, App. M.
    """

    epochs: float | None = option(None, "passes over train; default: Tab. 5's, or the method's")
    learning_rate: float | None = option(None, "at its peak; default: Tab. 5's, or the method's")
    batch_size: int = option(16, "examples in each step, for each process")
    max_length: int = option(256, "tokens at which texts are cut", panel=ADVANCED)
    warmup: float = option(0.06, "share of the steps over which the learning rate rises", panel=PYTHON)
    weight_decay: float = option(0.0, "of AdamW", panel=PYTHON)
    group_by_length: bool = option(False, "batches of texts of similar length: less padding", panel=ADVANCED)
    precision: str = option("float32", "float32, bf16, fp16", panel=ADVANCED, choices=PRECISIONS)
    gradient_checkpointing: bool = option(False, "less memory, more time", panel=ADVANCED)
    head: str = option(
        "first",
        "what the task head stands on: one state, or the mean of all states (sentence encoders)",
        panel=ADVANCED,
        choices=HEADS,
    )
    select: str = option(
        "last", "last epoch, or the best on a fixed part of train", panel=ADVANCED, choices=SELECTIONS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "learning_rate", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"got {name} = {value}; want a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"got weight_decay = {self.weight_decay}; want 0 or a positive number")
        if not 0 <= self.warmup < 1:
            raise InputError(f"got warmup = {self.warmup}; want a share of the steps in [0, 1)")
        if self.precision == "fp16":
            import torch

            if not torch.cuda.is_available():
                raise InputError("got precision = 'fp16' without a GPU; want bf16 or float32")


def _interval(text: str, flag: str) -> tuple[int, int]:
    ranges = intervals(text, flag)
    if len(ranges) != 1:
        raise InputError(f"{flag} got {text!r}; want two ranks, such as 0:300")
    return ranges[0]


@dataclass(frozen=True)
class Placement(Options):
    """Where a method goes and how large it is; None is the method's own default. See `methods.attach`."""

    rank: int | None = option(None, "size of the method; default: its own")
    interval: tuple[int, int] | None = option(
        None, "ranks of the spectral methods, e.g. 0:300", panel=ADVANCED, parse=_interval
    )
    blocks: tuple[int, ...] | None = option(
        None, "blocks to adapt, e.g. 10:12; default: the method's own", panel=ADVANCED
    )
    basis: str | None = option(
        None,
        "frozen vectors of the spectral methods: pretrained, gradient, random, shuffled; default: the method's own",
        panel=ADVANCED,
        choices=BASES,
    )
    budget: int | str | None = option(
        None,
        "numbers that a spectral method trains in all, spread by the gradient: 60k, or 0.1% of the base",
        panel=ADVANCED,
    )
    placement: str | None = option(
        None, "what spreads a budget: gradient (the default), uniform", panel=ADVANCED, choices=PLACEMENTS
    )
    basis_examples: int | None = option(
        None, "training examples for a gradient basis or a budget; default: 1024", panel=ADVANCED, least=1
    )
    roles: tuple[str, ...] | None = option(None, "roles of the matrices that are adapted", panel=PYTHON)
    target_modules: tuple[str, ...] | None = option(None, "names of the adapted modules", panel=PYTHON)
    checkpoint: str | Path | None = option(None, "model whose singular vectors are used", panel=ADVANCED)
    options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"rule": Rule("settings of the method", panel=PYTHON)}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis_examples is not None and not self.takes_gradient:
            raise InputError(
                f"got basis_examples = {self.basis_examples} with basis = {self.basis!r}; want basis = 'gradient', "
                "or a budget"
            )
        if self.budget is not None:
            parse_count(self.budget, 10**15)  # how many parameters a share is of shows when the base is there
        elif self.placement is not None:
            raise InputError(f"got placement = {self.placement!r} without a budget; want a budget, such as 60k")
        if isinstance(self.checkpoint, Path):
            object.__setattr__(self, "checkpoint", str(self.checkpoint))

    @property
    def takes_gradient(self) -> bool:
        """Whether the method wants the gradient of examples before it is trained."""
        return self.basis == "gradient" or self.budget is not None


@dataclass(frozen=True)
class Source(Options):
    """Where the examples of a task are; see `sources.load_task`."""

    data_dir: str | Path | None = option(None, "GLUE in its official layout; default: from the Hub")
    text: tuple[str, ...] = option((), "column of your table with the text, or two: premise,hypothesis")
    label: str = option("", "column of your table with the label")
    regression: bool = option(False, "the label of your table is a number", panel=ADVANCED)
    dev: str | Path | None = option(None, "dev set of your own task; default: a tenth of the table", panel=ADVANCED)


@dataclass(frozen=True)
class FinetuneOptions(Source, Placement, Protocol):
    """Everything about a finetune but base, task and method.

    By default ``held_back`` is the premises of RTE's dev set where GLUE is at hand, else the texts of the task's
    own dev set. TensorBoard's files are in ``OUT/runs`` when the run is finished.
    """

    seed: int = option(42, "seed of head, order, dropout and the method's random parts")
    examples: int | None = option(None, "train on a fixed part of train, of this size", panel=ADVANCED)
    cache_prefix: str | Path | None = option(
        None, "folder of activations: what lies below the first trained module runs once for each example"
    )
    held_back: str | Path | Sequence[str] | None = option(
        None, "texts, one on each line, for the pretraining loss before and after", panel=ADVANCED
    )
    report_to: str = option("none", "tensorboard, wandb, trackio …", panel=ADVANCED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**32:
            raise InputError(f"got seed = {self.seed}; want a number in 0 … 2³² − 1")
        if self.examples is not None and self.examples < 1:
            raise InputError(f"got examples = {self.examples}; want at least 1, or none given for all of train")
