"""Training: transformers' Trainer on a base with a method on it, and the figures that come out."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from specbasis.adapter import Placed, initialize_gradient_basis, place_coefficients
from specbasis.checkpoint import open_checkpoint
from specbasis.checkpoint.regular import read_json
from specbasis.core.errors import InputError
from specbasis.core.extras import quiet
from specbasis.finetuning.base import Base, Images, load_base, tokens_of
from specbasis.finetuning.costs import Stopwatch, peak_memory, weights_bytes
from specbasis.finetuning.forgetting import Pretraining, pretraining_loss
from specbasis.finetuning.methods import Attached, attach
from specbasis.finetuning.metrics import Predictions
from specbasis.finetuning.options import FinetuneOptions, Placement
from specbasis.finetuning.prefix import NoPrefixError, PrefixCache, Uncut, find_cut, narrowed
from specbasis.finetuning.prefix.rows import Collator
from specbasis.finetuning.tasks import Split, Task, TaskData

CHECKPOINTS, TRAINED = "checkpoints", "trained.safetensors"


@dataclass(frozen=True, eq=False)
class Run:
    """One training: what `finetune` and the cells of a grid ask for.

    Attributes:
        base: as of `finetune`.
        data: the examples; the selection, where there is one, is scored too.
        method: name in `methods.METHODS`.
        options: with epochs and learning rate given; see `runs.resolved`. Data and texts were taken from them.
        held_back: what the texts are that forgetting is measured on, and the texts.
        resumable: write a checkpoint at the end of every epoch, and go on from the last.
        scratch: begin from random weights instead of the base's.
        unchanged: raises where the base's files, which have been loaded now, are no longer those that were hashed.
    """

    base: str | Path
    data: TaskData
    method: str
    options: FinetuneOptions
    held_back: tuple[str, Sequence[str]] = ("", ())
    resumable: bool = True
    scratch: bool = False
    unchanged: Callable[[], None] = lambda: None

    @property
    def scored(self) -> dict[str, Split]:
        """What is scored after training, by name: dev sets, then what was kept for choosing."""
        return {**self.data.dev, **({"selection": self.data.selection} if len(self.data.selection) else {})}


def train(run: Run, folder: Path, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, score, save the adapter into ``folder``, and return the metrics with the predictions."""
    data, options = run.data, run.options
    text, texts = run.held_back
    with quiet():
        pretraining, before = _pretraining(str(run.base), data.task, tuple(texts))
        with peak_memory() as peak:
            set_seed(options.seed)
            base = load_base(
                run.base, data.task, max_length=options.max_length, scratch=run.scratch, head=options.head
            )
            run.unchanged()
            attached = attach(base.model, run.method, options.part(Placement), seed=options.seed)
            placed = _give_basis(attached, base, run)
            watch = Stopwatch()
            with _trainer(run, base, attached, folder) as trainer:
                for callback in (watch, *attached.callbacks, *callbacks):
                    trainer.add_callback(callback)
                set_seed(options.seed)
                trainer.train(resume_from_checkpoint=_last_checkpoint(folder) if run.resumable else None)
                memory = peak()
                predictions = {name: trainer.predictions(split) for name, split in run.scored.items()}
        after = pretraining.loss(attached.model)
        if is_main_process():
            if not run.resumable:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            attached.save(folder)
            # Labels and tokenizer: what a merged model needs beside the base.
            base.model.config.save_pretrained(folder)
            base.processor.save_pretrained(folder)
    counts = attached.counts
    scores = {name: split.scores(data.task) for name, split in predictions.items()}
    constant = [
        f"{name}: the model predicts the same for every example; train longer, or with another learning rate"
        for name, split in predictions.items()
        if split.is_constant
    ]
    return {
        "score": data.task.score(next(iter(scores.values()))),
        **scores,
        "majority": {name: split.majority(data.task) for name, split in predictions.items()},
        "parameters": {"adapter": counts.adapter, "head": counts.head, "total": counts.total},
        "learning_rate": options.learning_rate,
        "epochs": options.epochs,
        "steps": trainer.state.global_step,
        "train_examples": len(data.train),
        "train_loss": [round(entry["loss"], 6) for entry in trainer.state.log_history if "loss" in entry],
        "seconds_per_epoch": _mean(watch.wall),
        "cpu_seconds_per_epoch": _mean(watch.cpu),
        "peak_memory_bytes": memory,
        "file_bytes": weights_bytes(folder) if is_main_process() else None,
        "forgetting": {"definition": pretraining.definition, "reason": pretraining.reason}
        | {"text": text, "before": before, "after": after},
        "prefix_cache": trainer.cache,
        "notes": [*data.notes, *_spread(placed), *trainer.notes, *constant],
        "coefficients": [dataclasses.asdict(matrix) for matrix in placed],
        "predictions": {name: split.packed() for name, split in predictions.items()},
    }


def _give_basis(attached: Attached, base: Base, run: Run) -> list[Placed]:
    """Make a basis that wants examples from some of train's, chosen by the seed, and spread a budget by them."""
    budget = attached.request.budget
    if attached.request.options.get("basis") != "gradient" and budget is None:
        return []
    split = run.data.train
    order = np.random.default_rng(run.options.seed).permutation(len(split))[: run.options.basis_examples]
    by_length = sorted(order.tolist(), key=lambda i: (sum(map(len, split.inputs[i])), i))  # less padding
    examples = base.encode(split.take(by_length))
    size = 4 * run.options.batch_size
    batches: DataLoader[Any] = DataLoader(examples, size, collate_fn=base.collator())  # type: ignore[arg-type]
    model = attached.model.to(PartialState().device)
    if budget is None:
        initialize_gradient_basis(model, batches)
        return []
    by = run.options.placement or "gradient"
    return place_coefficients(model, batches, budget, by=by, seed=run.options.seed)


def _spread(placed: Sequence[Placed]) -> list[str]:
    """Where a budget went, in one sentence."""
    got = [matrix for matrix in placed if matrix.coefficients]
    if not got:
        return []
    share = sum(matrix.energy * matrix.gradient for matrix in placed)
    return [
        f"{sum(matrix.coefficients for matrix in got):,} coefficients in {len(got)} of {len(placed)} matrices hold "
        f"{100 * share:.3g} % of the gradient's energy; manifest.json says where"
    ]


@functools.lru_cache(maxsize=4)
def _pretraining(base: str, task: Task, texts: tuple[str, ...]) -> tuple[Pretraining, float | None]:
    """The pretraining loss of a base, and its value before any training: the same for every run on it."""
    loaded = load_base(base, task)
    loss = pretraining_loss(loaded, texts)
    return loss, loss.loss(loaded.model)


def is_main_process() -> bool:
    """Whether this process writes: the only one, or the first of those that ``accelerate launch`` started."""
    return bool(PartialState().is_main_process)


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole: its state is what Trainer writes last."""
    steps: dict[int, Path] = {}
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        with suppress(OSError, ValueError):
            read_json(path / "trainer_state.json")
            steps[int(path.name.rpartition("-")[2])] = path
    return str(steps[max(steps)]) if steps else None


# --- the Trainer ------------------------------------------------------------------------------------------------


class _Trainer(Trainer):
    """transformers' Trainer, whose checkpoints hold what is trained alone, whatever the method.

    Attributes:
        base: whose inputs it takes.
        lengths: tokens of each training example, where batches are to be of examples of like length.
        cache: what a report says about the prefix cache; None without one.
        notes: what is to be said about the run.
    """

    base: Base
    lengths: Sequence[int] | None = None
    cache: Mapping[str, Any] | None = None
    notes: list[str]

    def predictions(self, split: Split) -> Predictions:
        """What the model says of examples, in their order; they run longest first, which needs less padding."""
        order = sorted(range(len(split)), key=lambda i: -sum(map(len, split.inputs[i])))
        outputs = self.predict(self.base.encode(split.take(order)))
        logits = _logits(outputs.predictions)
        lost = int((~np.isfinite(logits).reshape(len(split), -1).all(1)).sum())
        if lost:
            self.notes.append(f"diverged: {lost} of {len(split)} outputs are not finite, and count as 0")
        finite = np.nan_to_num(logits, posinf=0, neginf=0)
        predictions = Predictions.of(self.base.task, finite, np.asarray(outputs.label_ids))
        return predictions.take(np.argsort(order).tolist())

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
                if value.shape != stored[name].shape or not (
                    value.is_floating_point() or value.equal(stored[name])
                ):
                    raise InputError(
                        f"{resume_from_checkpoint}: holds coefficients at other positions than this machine's "
                        "gradient chooses now; delete the run's folder and run again"
                    )
                value.copy_(stored[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, and the positions of coefficients, for which the rest of them is nothing."""
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return trained | {name: value for name, value in model.named_buffers() if ".spectral_positions." in name}


@contextmanager
def _trainer(run: Run, base: Base, attached: Attached, folder: Path) -> Iterator[_Trainer]:
    """A Trainer; inside, the model runs from the cached activations of its frozen prefix where there is a cache.

    With or without it, a model that reads the first position alone does not run its last block on the others.
    """
    best = run.options.select == "best"
    args = _arguments(run, folder / CHECKPOINTS)
    examples = base.encode(run.data.train)
    collator: Collator = base.collator()
    notes: list[str] = []
    with ExitStack() as stack:
        cache = None
        if run.options.cache_prefix is not None:
            datasets = [examples, *map(base.encode, run.scored.values())]
            model = attached.model.to(args.device)
            if base.apart:
                notes.append("no prefix cache: under a mean head the two texts of a pair are two rows of a batch")
            else:
                cache = _prefix_cache(model, datasets, collator, run.options.cache_prefix, notes)
        if cache is None:  # what runs from a cache is narrowed already
            stack.enter_context(narrowed(attached.model))
        else:
            collator = cache.collator(collator)
            stack.enter_context(cache.suffix(attached.model))
        trainer = _Trainer(
            model=attached.model,
            args=args,
            train_dataset=examples,
            eval_dataset=base.encode(run.data.selection) if best else None,
            data_collator=collator,
            compute_metrics=_computed(run.data.task) if best else None,
        )
        trainer.base, trainer.notes = base, notes
        trainer.cache = None if cache is None else cache.manifest()
        # The mean loss of a classifier must not be scaled by the number of processes, which is for token losses.
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)  # the log is in the metrics, and goes where `report_to` says
        if run.options.group_by_length and not isinstance(examples, Images):
            trainer.lengths = [tokens_of(example) for example in examples]
        yield trainer


def _prefix_cache(
    model: nn.Module, datasets: list[Any], collator: Collator, folder: str | Path, notes: list[str]
) -> PrefixCache | None:
    """The cached activations of some datasets; None, with a note of the reason, where nothing can be cached."""
    cut = find_cut(model)
    try:
        if isinstance(cut, Uncut):
            raise NoPrefixError(cut.reason)
        return PrefixCache.build(model, cut, datasets, collator, folder)
    except NoPrefixError as error:
        notes.append(f"no prefix cache: {error}")
        return None


def _arguments(run: Run, folder: Path) -> TrainingArguments:
    """The protocol, as transformers has it."""
    options, best = run.options, run.options.select == "best"
    # Gradient checkpointing, under the name that this version of transformers has for it.
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    recomputing = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(folder),
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=not torch.accelerator.is_available(),
        num_train_epochs=float(options.epochs or 0),
        learning_rate=float(options.learning_rate or 0),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=4 * options.batch_size,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        save_strategy="epoch" if best or run.resumable else "no",
        save_total_limit=1,
        eval_strategy="epoch" if best else "no",
        load_best_model_at_end=best,
        metric_for_best_model="score" if best else None,
        greater_is_better=True if best else None,
        logging_strategy="epoch",
        report_to=options.report_to.split(","),
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **(recomputing if options.gradient_checkpointing else {}),
    )


def _computed(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    def compute(outputs: EvalPrediction) -> dict[str, float]:
        values = Predictions.of(task, _logits(outputs.predictions), np.asarray(outputs.label_ids)).scores(task)
        return {**values, "score": task.score(values)}

    return compute


def _logits(predictions: Any) -> Any:
    first = predictions[0] if isinstance(predictions, tuple | list) else predictions
    return np.asarray(first, dtype=np.float64)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None
