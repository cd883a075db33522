"""Train a masked autoencoder or a classifier from memory, with checkpoints; a kill only delays the run.

Everything random is a function of the seed and the step, not of a generator's state, so that a run that was
killed and continued gives the same weights, bit for bit on one machine, as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specbasis.checkpoint import open_checkpoint, sha256
from specbasis.checkpoint.atomic import whole, write_whole, writing
from specbasis.core.errors import InputError
from specbasis.jobs.folder import Folder, Kind, environment, opened
from specbasis.jobs.progress import Progress
from specbasis.paper.images import Images
from specbasis.paper.mae import (
    MAE,
    Model,
    PatchClassifier,
    _seed,
    load_encoder,
    load_model,
    new_classifier,
    new_mae,
    save_model,
)
from specbasis.paper.options import CLASSIFY, Training

TRAINING = Kind("training", manifest="run.json", keys=("config", "state", "done"))

PRETRAINING = Training()
"""Yu et al. 2026, App. L: 200 epochs at 1.5e-3."""

SAME_TASK = Training(epochs=10, rate=3e-3, checkpoints=10, early=True, validations=10)
"""App. L: masked reconstruction goes on, on 1 000 held-out images."""

NEW_TASK = Training(task=CLASSIFY, epochs=10, checkpoints=10, early=True, validations=10)
"""App. L: classification of 3 000 images."""


@dataclass(frozen=True)
class Run:
    """A folder that a training filled.

    Attributes:
        folder: holds `run.json`, `log.jsonl`, `checkpoint-STEP/` and `best/`.
    """

    folder: Path

    @property
    def best(self) -> Path:
        """The checkpoint with the least validation loss."""
        return self.folder / "best"

    @property
    def log(self) -> list[dict[str, Any]]:
        """One entry a validation: step, loss (mean since the last entry), validation loss, accuracy, seconds."""
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, in the order of their steps."""
        found = self.folder.glob("checkpoint-*")
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))

    @property
    def is_done(self) -> bool:
        """Whether the training ended."""
        return (self.folder / "run.json").is_file() and bool(TRAINING.read(self.folder)["done"])


def train(
    images: Images,
    validation: Images,
    folder: str | Path,
    *,
    mae: MAE | None = None,
    training: Training = PRETRAINING,
    start: str | Path | None = None,
    classes: int | None = None,
    device: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train a model, or continue a training that was killed, or return one that is done.

    Mixed precision (AMP with a GradScaler, TF32) where there is a GPU, float32 elsewhere.

    Args:
        images: what it learns from; labels are needed for classification.
        validation: what the best checkpoint is chosen on.
        folder: new, or of the same training.
        mae: sizes of the model; the paper's when None.
        training: how.
        start: a checkpoint to start from: of reconstruction the whole model, of classification the encoder; random
            weights when None.
        classes: number of classes; as many as the images have when None.
        device: "cpu", "cuda", …; a GPU where there is one when None.
        progress: called after each step.

    Raises:
        InputError: the folder holds another training, labels are missing, sizes differ, or the loss is not finite.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    job = _Job(images, validation, Path(folder), mae or MAE(), training, start, classes, torch.device(device))
    job.check()
    with job.begun() as is_done:
        if not is_done:
            with _tf32(job.device):
                _train(job, progress or (lambda _: None))
    return Run(job.folder)


def _train(job: _Job, progress: Callable[[Progress], None]) -> None:
    state = job.resume()
    validated, kept = job.marks(job.training.validations), job.kept()
    best = job.best_loss()
    started = time.perf_counter()
    for step in range(state.step, job.total):
        job.advance(state, step)
        if state.step in validated:
            entry = job.validate(state) | {"seconds": round(time.perf_counter() - started, 3)}
            job.write_log([*Run(job.folder).log, entry])
            if entry["validation"] < best:
                best = entry["validation"]
                job.keep_best(state, best)
        if state.step in kept:
            job.keep(state)
        progress(Progress(state.step, job.total, f"{job.folder.name}: step {state.step}"))
    job.update(done=True, state=None)
    for path in job.folder.glob("state-*.safetensors"):
        path.unlink()


# --- one training -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _State:
    """What changes from step to step; ``losses`` are those since the last entry of the log, on the device."""

    model: Model
    optimizer: torch.optim.AdamW
    scaler: Any
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Job:
    """What stays: the data, the settings, the folder."""

    images: Images
    validation: Images
    folder: Path
    mae: MAE
    training: Training
    start: str | Path | None
    given_classes: int | None
    device: torch.device

    @property
    def classes(self) -> int:
        return self.given_classes or self.images.classes

    @property
    def total(self) -> int:
        return self.training.total(len(self.images))

    def marks(self, count: int) -> frozenset[int]:
        """Steps after which something is done `count` times, evenly spaced, the last step among them."""
        count = min(count, self.total)
        return frozenset(round(self.total * i / count) for i in range(1, count + 1))

    def kept(self) -> frozenset[int]:
        """Steps whose checkpoints are kept."""
        even = self.marks(self.training.checkpoints)
        doubling = (2**i for i in range(min(even).bit_length()))
        return even | {step for step in doubling if self.training.early and step < min(even)}

    def check(self) -> None:
        for images in (self.images, self.validation):
            size = images.pixels.shape[-1]
            if size != self.mae.image:
                raise InputError(f"{images.name}: images of {size} pixels; the model takes {self.mae.image}")
            if self.training.task != CLASSIFY:
                continue
            if images.labels is None or not 2 <= max(self.classes, images.classes) <= self.classes:
                raise InputError(
                    f"{images.name}: got {images.classes} classes; want labels of {self.classes} (2 or more)"
                )

    # --- the folder

    def config(self) -> dict[str, Any]:
        """What makes two trainings the same."""
        start = None if self.start is None else _weights_digest(Path(self.start))
        return {
            "mae": asdict(self.mae),
            "training": asdict(self.training),
            "classes": self.classes if self.training.task == CLASSIFY else None,
            "images": {"name": self.images.name, "count": len(self.images), "sha256": self.images.sha256},
            "validation": {"count": len(self.validation), "sha256": self.validation.sha256},
            "start": start,
        }

    @contextmanager
    def begun(self) -> Iterator[bool]:
        """Make the folder, or find that it belongs to this training; whether that is done already."""
        with opened(self.folder, TRAINING, self.config()) as run:
            run.manifest.setdefault("done", False)
            if "state" not in run.manifest:
                run.manifest.update(environment(("transformers",)), steps=self.total, state=None)
                run.write_manifest()
            yield bool(run.manifest["done"])

    def update(self, **changes: Any) -> None:
        Folder(self.folder, TRAINING.read(self.folder) | changes, TRAINING).write_manifest()

    def write_log(self, entries: list[dict[str, Any]]) -> None:
        write_whole(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))

    def keep(self, state: _State) -> None:
        """Write a checkpoint, then what is needed to go on from it, then say that it is there."""
        path = self.folder / f"checkpoint-{state.step}"
        if not path.exists():  # else it was written before a kill: the same weights
            with writing(path), whole(path) as temporary:
                save_model(state.model, temporary)
        tensors = {
            f"{i}.{name}": value.cpu().contiguous()
            for i, p in enumerate(_trainable(state.model))
            for name, value in state.optimizer.state.get(p, {}).items()
        }
        tensors["losses"] = torch.stack(state.losses).cpu() if state.losses else torch.zeros(0)
        write_whole(self._state(state.step), lambda path: save_file(tensors, path))
        seal = sha256(self._state(state.step))
        self.update(state=state.step, state_sha256=seal, scaler=state.scaler.state_dict())
        for old in self.folder.glob("state-*.safetensors"):
            if old != self._state(state.step):
                old.unlink()

    def _state(self, step: int) -> Path:
        return self.folder / f"state-{step}.safetensors"

    def keep_best(self, state: _State, loss: float) -> None:
        path = self.folder / "best"
        with writing(path), whole(path) as temporary:
            save_model(state.model, temporary)
            about = {"step": state.step, "validation": loss}
            (temporary / "best.json").write_text(json.dumps(about), encoding="utf-8")

    def best_loss(self) -> float:
        """Least validation loss so far."""
        path = self.folder / "best" / "best.json"
        return float(json.loads(path.read_text(encoding="utf-8"))["validation"]) if path.is_file() else math.inf

    # --- the training

    def new_model(self) -> Model:
        """The model at step 0."""
        seed = self.training.seed
        classify = self.training.task == CLASSIFY
        model: Model = new_classifier(self.mae, self.classes, seed) if classify else new_mae(self.mae, seed)
        if self.start is not None:
            (load_encoder if classify else load_model)(model, Path(self.start))
        return model

    def resume(self) -> _State:
        """Everything as it was at the last checkpoint, or at the start."""
        model, about = self.new_model(), TRAINING.read(self.folder)
        at = about["state"]
        if at is not None:
            load_model(model, self.folder / f"checkpoint-{at}")
        model.to(self.device).train()
        rate, decay = self.training.rate, self.training.weight_decay
        optimizer = torch.optim.AdamW(_trainable(model), lr=rate, weight_decay=decay, fused=True)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda")
        state = _State(model, optimizer, scaler, at or 0)
        if at is None:
            self.write_log([])
            self.keep(state)
            return state
        self.write_log([entry for entry in Run(self.folder).log if entry["step"] <= at])
        stored = open_checkpoint(self._state(at))
        if about.get("state_sha256", "") not in ("", sha256(self._state(at))):  # versions before seals have none
            raise InputError(
                f"{self._state(at)}: is not what was written: its SHA-256 differs; train in a new folder"
            )
        for i, p in enumerate(_trainable(model)):
            names = [name for name in ("step", "exp_avg", "exp_avg_sq") if f"{i}.{name}" in stored]
            optimizer.state[p] = {name: stored[f"{i}.{name}"].clone().to(self.device) for name in names}
        scaler.load_state_dict(about["scaler"])
        state.losses = list(stored["losses"].clone().to(self.device))
        return state

    def advance(self, state: _State, step: int) -> None:
        """One step of AdamW, at its place on the cosine."""
        for group in state.optimizer.param_groups:
            group["lr"] = self.training.rate * 0.5 * (1 + math.cos(math.pi * step / self.total))
        images = self._on_device.take(self._batch(step))
        loss = self._loss(state.model, images, _seed(self.training.seed, "mask", step))[0]
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), self.training.clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.losses.append(loss.detach())
        state.step = step + 1

    @torch.no_grad()
    def validate(self, state: _State) -> dict[str, Any]:
        """An entry of the log; masks are the same every time."""
        state.model.eval()
        loss, right = 0.0, 0.0
        for start in range(0, len(self.validation), 256):
            part = self.validation.take(slice(start, start + 256))
            mean, hits = self._loss(state.model, part, _seed(0, "validation", start))
            loss += float(mean) * len(part) / len(self.validation)
            right += hits / len(self.validation)
        state.model.train()
        train_loss = float(torch.stack(state.losses).double().mean()) if state.losses else math.nan
        state.losses.clear()
        if not math.isfinite(loss + train_loss):
            raise InputError(f"{self.folder}: the loss is not finite at step {state.step}; choose a lower rate")
        epoch = state.step * self.training.batch / len(self.images)
        entry = {"step": state.step, "epoch": round(epoch, 4), "loss": train_loss, "validation": loss}
        return entry | ({"accuracy": right} if self.training.task == CLASSIFY else {})

    @cached_property
    def _on_device(self) -> Images:
        labels = self.images.labels
        return Images(
            self.images.pixels.to(self.device), None if labels is None else labels.to(self.device), self.images.name
        )

    def _batch(self, step: int) -> Tensor:
        """Indices of a step's images: a new order every epoch, all images once in each."""
        n, batch = len(self.images), self.training.batch
        epoch, place = divmod(step, math.ceil(n / batch))
        generator = torch.Generator().manual_seed(_seed(self.training.seed, "order", epoch))
        return torch.randperm(n, generator=generator)[place * batch : (place + 1) * batch].to(self.device)

    def _loss(self, model: Model, images: Images, seed: int) -> tuple[Tensor, float]:
        """Mean loss of some images, and how many of them are classified rightly."""
        pixels = images.pixels.to(self.device).float().div_(127.5).sub_(1.0)
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            if isinstance(model, PatchClassifier):
                labels = images.labels
                assert labels is not None
                logits, labels = model(pixels), labels.to(self.device)
                hits = 0.0 if model.training else float((logits.argmax(dim=1) == labels).sum())
                return torch.nn.functional.cross_entropy(logits, labels), hits
            generator = torch.Generator().manual_seed(seed)
            noise = torch.rand(len(pixels), self.mae.patches, generator=generator).to(self.device)
            loss: Tensor = model(pixels, noise=noise).loss
            return loss, 0.0


class _tf32:  # noqa: N801
    """TF32 products on a GPU for as long as this lasts."""

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        if self.on:
            torch.set_float32_matmul_precision("high")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def _trainable(model: Model) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _weights_digest(folder: Path) -> str:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder}: no model.safetensors here; want a checkpoint of a training")
    return sha256(path)
