"""Finetune a base on a task by a method: transformers' Trainer, and what a run leaves in its folder.

A run is (base, task, method, seed, protocol). Its folder holds the adapter, `metrics.json`, `manifest.json` and a
model card, and while it is under way `checkpoints/` with what is trained, so that a run that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers import logging as transformers_logging
from transformers.trainer_pt_utils import LengthGroupedSampler

from specbasis.checkpoint import open_checkpoint
from specbasis.errors import InputError
from specbasis.finetune.base import Base, Examples, load_base
from specbasis.finetune.card import model_card
from specbasis.finetune.costs import Stopwatch, peak_memory, weights_bytes
from specbasis.finetune.forgetting import Pretraining, pretraining_loss
from specbasis.finetune.methods import METHODS, Attached, attach, method_named
from specbasis.finetune.metrics import scores
from specbasis.finetune.prefix import PrefixCache, Uncut, find_cut
from specbasis.finetune.tasks import Split, Task, TaskData, load_task, selection_size, subset
from specbasis.results import environment, write_whole, writing

METRICS, MANIFEST, CARD, CHECKPOINTS, TRAINED = (
    "metrics.json",
    "manifest.json",
    "README.md",
    "checkpoints",
    "trained.safetensors",
)
HELD_BACK = 128
"""How many held-back texts are taken where the user gives none."""
PRECISIONS = ("float32", "bf16", "fp16")
SELECTIONS = ("last", "best")


@dataclass(frozen=True)
class Protocol:
    """How it is trained; the defaults are those of the paper.

    AdamW; the learning rate rises linearly over the first 6 % of the steps and falls linearly to zero.

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
            if value is not None and value <= 0:
                raise InputError(f"got {name} = {value}; want a positive number")
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


@dataclass(frozen=True)
class Finetuned:
    """A finished run.

    Attributes:
        folder: where it is; see the module.
        metrics: content of `metrics.json`.
    """

    folder: Path
    metrics: Mapping[str, Any]

    @property
    def score(self) -> float:
        """The task's one number on the dev set (MNLI: matched)."""
        return float(self.metrics["score"])


def finetune(
    base: str | Path,
    task: str | Path | TaskData,
    method: str = "spectral",
    *,
    out: str | Path,
    seed: int = 42,
    data_dir: str | Path | None = None,
    dev: str | Path | None = None,
    text: Sequence[str] = (),
    label: str = "",
    regression: bool = False,
    examples: int | None = None,
    rank: int | None = None,
    interval: tuple[int, int] | None = None,
    blocks: Sequence[int] | None = None,
    roles: Sequence[str] | None = None,
    target_modules: Sequence[str] | None = None,
    checkpoint: str | None = None,
    options: Mapping[str, Any] | None = None,
    cache_prefix: str | Path | None = None,
    held_back: str | Path | Sequence[str] | None = None,
    report_to: str = "none",
    callbacks: Sequence[TrainerCallback] = (),
    **protocol: Any,
) -> Finetuned:
    """Finetune a base on a task by a method, and write adapter, metrics, manifest and model card.

    The same call goes on where a killed run stopped, and returns a finished run as it is.

    Args:
        base: pretrained model: folder, ``hub:org/name``, ``timm:name``, ``pkg:…``; see `base.load_base`.
        task: name of a GLUE task, the path of a table or of a folder of images, or examples that are read already.
        method: name in `methods.METHODS`.
        out: folder of the run.
        seed: of the head, the method's random parts, the order of the examples, and dropout.
        data_dir: GLUE in its official layout; from the Hub when None.
        dev, text, label, regression: of a user's own task; see `tasks.load_task`.
        examples: train on a fixed part of train, of this size.
        rank, interval, blocks, roles, target_modules, checkpoint, options: see `methods.attach`.
        cache_prefix: folder in which the activations below the first trained module are kept, computed once.
        held_back: texts, or a file with one a line, for the loss before and after (`forgetting`); by default the
            premises of RTE's dev set where GLUE is at hand, else the texts of the task's own dev set.
        report_to: "tensorboard", "wandb", "trackio", … as transformers has it.
        callbacks: of transformers' Trainer, beside the method's own.
        protocol: fields of `Protocol`.

    Raises:
        InputError: an argument does not fit, the data are damaged, the folder holds another run, the disk is full.
    """
    known = {field.name for field in dataclasses.fields(Protocol)}
    if set(protocol) - known:
        raise InputError(f"got {sorted(set(protocol) - known)[0]!r}; want fields of Protocol: {', '.join(sorted(known))}")
    chosen = method_named(method)
    how = Protocol(**protocol)
    where = Placement(
        rank,
        interval,
        None if blocks is None else tuple(blocks),
        None if roles is None else tuple(roles),
        None if target_modules is None else tuple(target_modules),
        checkpoint,
        dict(options or {}),
    )
    if isinstance(task, TaskData):
        data = task
    else:
        data = load_task(task, data_dir=data_dir, dev=dev, text=text, label=label, regression=regression)
    how, data = resolved(how, chosen.name, data, examples)
    config = {
        "base": str(base),
        "task": data.task.name,
        "data": data.digest,
        "method": chosen.name,
        "seed": seed,
        "protocol": dataclasses.asdict(how),
        "placement": dataclasses.asdict(where),
        "cache_prefix": cache_prefix is not None,
    }
    folder = Path(out)
    finished = _begin(folder, config)
    if finished is not None:
        return finished
    with _one_line_on_a_full_disk(folder):
        metrics = run(
            base,
            data,
            chosen.name,
            seed,
            how,
            where,
            folder,
            cache_prefix=None if cache_prefix is None else Path(cache_prefix),
            held_back=held_back_texts(held_back, data, data_dir),
            report_to=report_to,
            callbacks=callbacks,
        )
        if is_main_process():
            _finish(folder, config, metrics, data)
    return Finetuned(folder, metrics)


def resolved(protocol: Protocol, method: str, data: TaskData, examples: int | None = None) -> tuple[Protocol, TaskData]:
    """The protocol with the method's own epochs and learning rate, and the data with what is chosen on taken out."""
    epochs, learning_rate = METHODS[method].recipe(data.task.name)
    how = dataclasses.replace(
        protocol,
        epochs=protocol.epochs or epochs,
        learning_rate=protocol.learning_rate or learning_rate,
    )
    if len(data.selection):
        return how, data
    held = selection_size(len(data.train)) if how.select == "best" else None
    return how, subset(data, examples=examples, selection=held) if held or examples else data


def run(
    base: str | Path,
    data: TaskData,
    method: str,
    seed: int,
    protocol: Protocol,
    placement: Placement,
    folder: Path,
    *,
    cache_prefix: Path | None = None,
    held_back: tuple[str, Sequence[str]] = ("", ()),
    report_to: str = "none",
    callbacks: Sequence[TrainerCallback] = (),
    resumable: bool = True,
) -> dict[str, Any]:
    """Train, score, save the adapter into ``folder``, and return the metrics: what `finetune` does, without its files.

    Args:
        base, method, seed: as of `finetune`.
        data: the examples; selection, where there are any, is scored too.
        protocol: with epochs and learning rate given; see `resolved`.
        placement: where the method goes.
        folder: the adapter's, and of the checkpoints.
        cache_prefix, report_to, callbacks: as of `finetune`.
        held_back: what the texts are, and the texts.
        resumable: write a checkpoint at the end of every epoch, and go on from the last.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        pretraining, before = _pretraining(str(base), data.task, tuple(held_back[1]))
        with peak_memory() as peak:
            set_seed(seed)
            loaded = load_base(base, data.task, max_length=protocol.max_length)
            attached = _attach(loaded, method, seed, placement)
            watch = Stopwatch()
            with _ready(loaded, attached, data, protocol, seed, folder, cache_prefix, report_to, resumable) as ready:
                for callback in (watch, *attached.callbacks, *callbacks):
                    ready.trainer.add_callback(callback)
                set_seed(seed)
                ready.trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if resumable else None)
                memory = peak()
                found = {name: ready.score(split) for name, split in _scored(data).items()}
        after = pretraining.loss(attached.model)
        if is_main_process():
            attached.save(folder)
            if (folder / "config.json").is_file():  # a whole model, which loads without its base
                loaded.processor.save_pretrained(folder)
        counts = attached.counts
        trainer = ready.trainer
        return {
            "score": data.task.score(next(iter(found.values()))),
            **found,
            "parameters": {"adapter": counts.adapter, "head": counts.head, "total": counts.total},
            "learning_rate": protocol.learning_rate,
            "epochs": protocol.epochs,
            "steps": trainer.state.global_step,
            "train_examples": len(data.train),
            "train_loss": [
                round(entry["loss"], 6) for entry in trainer.state.log_history if "loss" in entry
            ],
            "seconds_per_epoch": _mean(watch.wall),
            "cpu_seconds_per_epoch": _mean(watch.cpu),
            "peak_memory_bytes": memory,
            "file_bytes": weights_bytes(folder) if is_main_process() else None,
            "forgetting": {
                "definition": pretraining.definition,
                "reason": pretraining.reason,
                "text": held_back[0],
                "before": before,
                "after": after,
            },
            "prefix_cache": ready.cache,
            "notes": [*data.notes, *ready.notes],
        }
    finally:
        transformers_logging.set_verbosity(verbosity)


@functools.lru_cache(maxsize=4)
def _pretraining(base: str, task: Task, texts: tuple[str, ...]) -> tuple[Pretraining, float | None]:
    """The pretraining loss of a base, and its value before any training: the same for every run on it."""
    loaded = load_base(base, task)
    loss = pretraining_loss(loaded, texts)
    return loss, loss.loss(loaded.model)


def is_main_process() -> bool:
    """Whether this process writes: the only one, or the first of those that ``accelerate launch`` started."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def held_back_texts(
    given: str | Path | Sequence[str] | None, data: TaskData, data_dir: str | Path | None
) -> tuple[str, Sequence[str]]:
    """The texts that forgetting is measured on, and what they are.

    Raises:
        InputError: the file is not there, or holds no text.
    """
    if given is not None and not isinstance(given, str | Path):
        return "given texts", list(given)
    if given is not None:
        try:
            texts = [one for one in Path(given).read_text(encoding="utf-8").split("\n") if one.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{given}: not readable text: {error}") from error
        if len(texts) < 2:
            raise InputError(f"{given}: holds {len(texts)} texts; want one a line, at least two")
        return str(Path(given).name), texts
    if data.task.images:
        return "", ()
    if data_dir is not None and (Path(data_dir).expanduser() / "RTE" / "dev.tsv").is_file():
        held = load_task("rte", data_dir=data_dir).dev["dev"]
        return "premises of RTE's dev set", sorted({inputs[0] for inputs in held.inputs})[:HELD_BACK]
    first, split = next(iter(data.dev.items()))
    return f"texts of {data.task.title}'s {first} set", [" ".join(inputs) for inputs in split.inputs[:HELD_BACK]]


# --- the Trainer ------------------------------------------------------------------------------------------------


class _Trainer(Trainer):
    """transformers' Trainer, whose checkpoints hold what is trained alone, whatever the method."""

    lengths: Sequence[int] | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        generator = torch.Generator().manual_seed(self.args.seed)
        return LengthGroupedSampler(self.args.train_batch_size, lengths=list(self.lengths), generator=generator)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        save_file({name: value.cpu().contiguous() for name, value in _trained(model).items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = open_checkpoint(Path(resume_from_checkpoint) / TRAINED)
        wanted = _trained(self.accelerator.unwrap_model(self.model if model is None else model))
        lacking = sorted(set(wanted) - set(stored))
        if lacking:
            raise InputError(f"{resume_from_checkpoint}: lacks {lacking[0]}; delete the folder and run again")
        with torch.no_grad():
            for name, value in wanted.items():
                value.copy_(stored[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _attach(base: Base, method: str, seed: int, placement: Placement) -> Attached:
    return attach(
        base.model,
        method,
        rank=placement.rank,
        interval=placement.interval,
        blocks=placement.blocks,
        roles=placement.roles,
        target_modules=placement.target_modules,
        checkpoint=placement.checkpoint,
        options=dict(placement.options),
        seed=seed,
    )


def _scored(data: TaskData) -> dict[str, Split]:
    """What is scored after training, by name: dev sets, then what was kept for choosing."""
    return {**data.dev, **({"selection": data.selection} if len(data.selection) else {})}


@dataclass(frozen=True, eq=False)
class _Ready:
    """A Trainer, ready to train and to score.

    Attributes:
        trainer: of the attached model.
        base: whose inputs it takes.
        collate: makes batches, with the cached activations where there are any.
        cache: what a report says about the prefix cache; None without one.
        notes: what is to be said about it.
    """

    trainer: _Trainer
    base: Base
    collate: Callable[[list[Any]], Any]
    cache: Mapping[str, Any] | None
    notes: Sequence[str]

    def score(self, split: Split) -> dict[str, float]:
        """The metrics on examples, taken longest first: less padding, and the same metrics."""
        order = sorted(range(len(split)), key=lambda i: -sum(map(len, split.inputs[i])))
        judge = Trainer(model=self.trainer.model, args=self.trainer.args, data_collator=self.collate)
        found = judge.predict(self.base.encode(split.take(order)))
        return scores(self.base.task, _logits(found.predictions), np.asarray(found.label_ids, dtype=np.float64))


@contextmanager
def _ready(
    base: Base,
    attached: Attached,
    data: TaskData,
    protocol: Protocol,
    seed: int,
    folder: Path,
    cache_prefix: Path | None,
    report_to: str,
    resumable: bool,
) -> Iterator[_Ready]:
    """A Trainer; inside, the model runs from the cached activations of its frozen prefix where there is a cache."""
    best = protocol.select == "best"
    train, notes, about = base.encode(data.train), [], None
    collate: Callable[[list[Any]], Any] = base.collator()
    args = _arguments(protocol, seed, folder / CHECKPOINTS, report_to, best or resumable, best)
    with ExitStack() as stack:
        if cache_prefix is not None:
            cut = find_cut(attached.model.to(args.device))
            if isinstance(cut, Uncut):
                notes.append(f"no prefix cache: {cut.reason}")
            else:
                sets = [train, *(base.encode(split) for split in _scored(data).values())]
                cache = PrefixCache.build(attached.model, cut, sets, collate, cache_prefix)
                collate, about = cache.collator(collate), cache.manifest()
                stack.enter_context(cut.suffix(attached.model))
        trainer = _Trainer(
            model=attached.model,
            args=args,
            train_dataset=train,
            eval_dataset=base.encode(data.selection) if best else None,
            data_collator=collate,
            compute_metrics=_computed(data.task) if best else None,
        )
        if protocol.group_by_length:
            trainer.lengths = train.lengths
        yield _Ready(trainer, base, collate, about, notes)


def _arguments(
    protocol: Protocol, seed: int, folder: Path, report_to: str, saves: bool, best: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        num_train_epochs=float(protocol.epochs or 0),
        learning_rate=float(protocol.learning_rate or 0),
        per_device_train_batch_size=protocol.batch_size,
        per_device_eval_batch_size=4 * protocol.batch_size,
        lr_scheduler_type="linear",
        warmup_steps=protocol.warmup,
        weight_decay=protocol.weight_decay,
        bf16=protocol.precision == "bf16",
        fp16=protocol.precision == "fp16",
        gradient_checkpointing=protocol.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if protocol.gradient_checkpointing else None,
        save_strategy="epoch" if saves else "no",
        save_total_limit=1,
        eval_strategy="epoch" if best else "no",
        load_best_model_at_end=best,
        metric_for_best_model="score" if best else None,
        greater_is_better=True if best else None,
        logging_strategy="epoch",
        report_to=report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )


def _computed(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    def compute(found: EvalPrediction) -> dict[str, float]:
        values = scores(task, _logits(found.predictions), np.asarray(found.label_ids, dtype=np.float64))
        return {**values, "score": task.score(values)}

    return compute


def _logits(predictions: Any) -> Any:
    first = predictions[0] if isinstance(predictions, tuple | list) else predictions
    return np.asarray(first, dtype=np.float64)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


# --- the folder -------------------------------------------------------------------------------------------------


def _begin(folder: Path, config: Mapping[str, Any]) -> Finetuned | None:
    """The run of this folder if it is finished; else a manifest is in the folder when this returns.

    Raises:
        InputError: the folder holds another run, or anything else.
    """
    plain = json.loads(json.dumps(config))
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; want a folder for the run")
    if path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"{path}: damaged ({error}); choose another folder") from error
        differing = [name for name in {**held, **plain} if held.get(name) != plain.get(name)]
        if differing:
            raise InputError(f"{folder}: holds another run (its {', '.join(differing)} differ); choose another folder")
        if (folder / METRICS).is_file():
            return Finetuned(folder, json.loads((folder / METRICS).read_text(encoding="utf-8")))
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty and holds no run; choose a new folder")
    if is_main_process():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _write_json(path, {"config": plain, "environment": environment()})
    return None


def _finish(folder: Path, config: Mapping[str, Any], metrics: Mapping[str, Any], data: TaskData) -> None:
    """Card, then metrics, whose presence says that the run is finished."""
    write_whole(folder / CARD, lambda path: path.write_text(model_card(config, metrics, data.task), encoding="utf-8"))
    _write_json(folder / METRICS, metrics)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole: its state is what Trainer writes last."""
    found = [
        path
        for path in (folder / CHECKPOINTS).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and _is_json(path / "trainer_state.json")
    ]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


class _one_line_on_a_full_disk:  # noqa: N801
    """Turn what a full disk makes of each library into one line that names the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and "No space left" in str(error):
            raise InputError(
                f"{self.folder}: no space left on the disk; free some, and the same command goes on"
            ) from error
