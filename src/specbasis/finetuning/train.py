"""Training: transformers' Trainer on a base with a method on it, and the figures that come out."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from specbasis.finetuning.base import Base, load_base, quiet
from specbasis.finetuning.costs import Stopwatch, peak_memory, weights_bytes
from specbasis.finetuning.forgetting import Pretraining, pretraining_loss
from specbasis.finetuning.methods import Attached, attach
from specbasis.finetuning.metrics import Predictions
from specbasis.finetuning.prefix import NoPrefixError, PrefixCache, Uncut, find_cut, narrowed
from specbasis.finetuning.protocol import Placement, Protocol
from specbasis.finetuning.tasks import Split, Task, TaskData

CHECKPOINTS, TRAINED = "checkpoints", "trained.safetensors"


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
    scratch: bool = False,
) -> dict[str, Any]:
    """Train, score, save the adapter into ``folder``, and return the metrics: what `finetune` does, without its
    files.

    Args:
        base: as of `finetune`.
        method: likewise.
        seed: likewise.
        data: the examples; selection, where there are any, is scored too.
        protocol: with epochs and learning rate given; see `resolved`.
        placement: where the method goes.
        folder: the adapter's, and of the checkpoints.
        cache_prefix: as of `finetune`.
        report_to: likewise.
        callbacks: likewise.
        held_back: what the texts are, and the texts.
        resumable: write a checkpoint at the end of every epoch, and go on from the last.
        scratch: begin from random weights instead of the base's.
    """
    with quiet():
        pretraining, before = _pretraining(str(base), data.task, tuple(held_back[1]))
        with peak_memory() as peak:
            set_seed(seed)
            loaded = load_base(base, data.task, max_length=protocol.max_length, scratch=scratch)
            attached = _attach(loaded, method, seed, placement)
            watch = Stopwatch()
            with _ready(
                loaded, attached, data, protocol, seed, folder, cache_prefix, report_to, resumable
            ) as ready:
                for callback in (watch, *attached.callbacks, *callbacks):
                    ready.trainer.add_callback(callback)
                set_seed(seed)
                ready.trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if resumable else None)
                memory = peak()
                said = {name: ready.predict(split) for name, split in _scored(data).items()}
        after = pretraining.loss(attached.model)
        if is_main_process():
            if not resumable:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            attached.save(folder)
            if (folder / "config.json").is_file():  # a whole model, which loads without its base
                loaded.processor.save_pretrained(folder)
        counts = attached.counts
        trainer = ready.trainer
        found = {name: one.scores(data.task) for name, one in said.items()}
        return {
            "score": data.task.score(next(iter(found.values()))),
            **found,
            "parameters": {"adapter": counts.adapter, "head": counts.head, "total": counts.total},
            "learning_rate": protocol.learning_rate,
            "epochs": protocol.epochs,
            "steps": trainer.state.global_step,
            "train_examples": len(data.train),
            "train_loss": [round(entry["loss"], 6) for entry in trainer.state.log_history if "loss" in entry],
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
            "predictions": {name: one.packed() for name, one in said.items()},
        }


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
        folder = Path(output_dir or self.args.output_dir)
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
        notes: what is to be said about the run.
    """

    trainer: _Trainer
    base: Base
    collate: Callable[[list[Any]], Any]
    cache: Mapping[str, Any] | None
    notes: list[str]

    def predict(self, split: Split) -> Predictions:
        """What the model says of examples, in their order; they run longest first, which needs less padding."""
        order = sorted(range(len(split)), key=lambda i: -sum(map(len, split.inputs[i])))
        found = self.trainer.predict(self.base.encode(split.take(order)))
        logits = _logits(found.predictions)
        lost = int((~np.isfinite(logits).reshape(len(split), -1).all(1)).sum())
        if lost:
            self.notes.append(f"diverged: {lost} of {len(split)} outputs are not finite, and count as 0")
        said = Predictions.of(
            self.base.task, np.nan_to_num(logits, posinf=0, neginf=0), np.asarray(found.label_ids)
        )
        return said.take(np.argsort(order).tolist())


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
    """A Trainer; inside, the model runs from the cached activations of its frozen prefix where there is a cache.

    With or without it, a model that reads the first position alone does not run its last block on the others.
    """
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
                try:
                    cache = PrefixCache.build(attached.model, cut, sets, collate, cache_prefix)
                except NoPrefixError as error:
                    notes.append(f"no prefix cache: {error}")
                else:
                    collate, about = cache.collator(collate), cache.manifest()
                    stack.enter_context(cache.suffix(attached.model))
        if about is None:  # what runs from a cache is narrowed already
            stack.enter_context(narrowed(attached.model))
        trainer = _Trainer(
            model=attached.model,
            args=args,
            train_dataset=train,
            eval_dataset=base.encode(data.selection) if best else None,
            data_collator=collate,
            compute_metrics=_computed(data.task) if best else None,
        )
        # The mean loss of a classifier must not be scaled by the number of processes, which is for token losses.
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)  # the log is in the metrics, and goes where `report_to` says
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
        use_cpu=not torch.accelerator.is_available(),
        num_train_epochs=float(protocol.epochs or 0),
        learning_rate=float(protocol.learning_rate or 0),
        per_device_train_batch_size=protocol.batch_size,
        per_device_eval_batch_size=4 * protocol.batch_size,
        lr_scheduler_type="linear",
        warmup_steps=protocol.warmup,
        weight_decay=protocol.weight_decay,
        bf16=protocol.precision == "bf16",
        fp16=protocol.precision == "fp16",
        save_strategy="epoch" if saves else "no",
        save_total_limit=1,
        eval_strategy="epoch" if best else "no",
        load_best_model_at_end=best,
        metric_for_best_model="score" if best else None,
        greater_is_better=True if best else None,
        logging_strategy="epoch",
        report_to=report_to.split(","),
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **(_recomputing() if protocol.gradient_checkpointing else {}),
    )


def _recomputing() -> dict[str, Any]:
    """Gradient checkpointing, under the name that this version of transformers has for it."""
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}


def _computed(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    def compute(found: EvalPrediction) -> dict[str, float]:
        values = Predictions.of(task, _logits(found.predictions), np.asarray(found.label_ids)).scores(task)
        return {**values, "score": task.score(values)}

    return compute


def _logits(predictions: Any) -> Any:
    first = predictions[0] if isinstance(predictions, tuple | list) else predictions
    return np.asarray(first, dtype=np.float64)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None
