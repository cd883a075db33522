"""Train a masked autoencoder or a classifier from memory, with checkpoints; a kill only delays the run.

Everything random is a function of the seed and the step, not of a generator's state, so that a run that was
killed and continued gives the same weights, bit for bit on one machine, as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specbasis.checkpoint import open_checkpoint, sha256
from specbasis.checkpoint.atomic import whole, write_whole, writing
from specbasis.core.blocks import device_named
from specbasis.core.errors import InputError
from specbasis.jobs.environment import environment
from specbasis.jobs.folder import Folder, Kind, opened
from specbasis.jobs.progress import Progress, Report, silent
from specbasis.paper.images import Images
from specbasis.paper.mae import (
    MAE,
    Model,
    PatchClassifier,
    _seed,
    load_weights,
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
        folders = self.folder.glob("checkpoint-*")
        return sorted(folders, key=lambda path: int(path.name.partition("-")[2]))

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
    progress: Report | None = None,
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
    place = device_named(device or ("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    start = None if start is None else Path(start)
    job = _Job(images, validation, Path(folder), mae or MAE(), training, start, classes or images.classes, place)
    with opened(job.folder, TRAINING, job.config()) as run:
        run.manifest.setdefault("done", False)
        if "state" not in run.manifest:
            run.manifest.update(environment(("transformers",)), steps=job.total, state=None)
            run.write_manifest()
        if not run.manifest["done"]:
            with _tf32(place):
                job.run(progress or silent)
    return Run(job.folder)


@dataclass(eq=False)
class _Job:
    """One training: data, settings and folder; and, from `resume` on, model, optimizer, scaler and step.

    ``losses`` are those since the last entry of the log, on the device.
    """

    images: Images
    validation: Images
    folder: Path
    mae: MAE
    training: Training
    start: Path | None
    classes: int
    device: torch.device
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
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

    def run(self, progress: Report) -> None:
        """Every step that is left, with what is due after it."""
        self.resume()
        validated, kept = self.marks(self.training.validations), self.kept()
        best_so_far = self.folder / "best" / "best.json"
        best = json.loads(best_so_far.read_text("utf-8"))["validation"] if best_so_far.is_file() else math.inf
        started = time.perf_counter()
        while self.step < self.total:
            self.advance()
            if self.step in validated:
                entry = self.validate() | {"seconds": round(time.perf_counter() - started, 3)}
                self.write_log([*Run(self.folder).log, entry])
                if entry["validation"] < best:
                    best = entry["validation"]
                    with writing(best_so_far.parent), whole(best_so_far.parent) as temporary:
                        save_model(self.model, temporary)
                        about = json.dumps({"step": self.step, "validation": best})
                        (temporary / best_so_far.name).write_text(about, encoding="utf-8")
            if self.step in kept:
                self.keep()
            progress(Progress(self.step, self.total, f"{self.folder.name}: step {self.step}"))
        self.update(done=True, state=None)
        for path in self.folder.glob("state-*.safetensors"):
            path.unlink()

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

    def config(self) -> dict[str, Any]:
        """What makes two trainings the same."""
        weights = None if self.start is None else self.start / "model.safetensors"
        if weights is not None and not weights.is_file():
            raise InputError(f"{self.start}: no model.safetensors here; want a checkpoint of a training")
        return {
            "mae": asdict(self.mae),
            "training": asdict(self.training),
            "classes": self.classes if self.training.task == CLASSIFY else None,
            "images": {"name": self.images.name, "count": len(self.images), "sha256": self.images.sha256},
            "validation": {"count": len(self.validation), "sha256": self.validation.sha256},
            "start": None if weights is None else sha256(weights),
        }

    def update(self, **changes: Any) -> None:
        Folder(self.folder, TRAINING.read(self.folder) | changes, TRAINING).write_manifest()

    def write_log(self, entries: list[dict[str, Any]]) -> None:
        write_whole(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))

    def keep(self) -> None:
        """Write a checkpoint, then what is needed to go on from it, then say that it is there."""
        path = self.folder / f"checkpoint-{self.step}"
        if not path.exists():  # else it was written before a kill: the same weights
            with writing(path), whole(path) as temporary:
                save_model(self.model, temporary)
        tensors = {
            f"{i}.{name}": value.cpu().contiguous()
            for i, p in enumerate(_trainable(self.model))
            for name, value in self.optimizer.state.get(p, {}).items()
        }
        tensors["losses"] = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        write_whole(self.state, lambda path: save_file(tensors, path))
        self.update(state=self.step, state_sha256=sha256(self.state), scaler=self.scaler.state_dict())
        for old in self.folder.glob("state-*.safetensors"):
            if old != self.state:
                old.unlink()

    @property
    def state(self) -> Path:
        """The file of what is needed to go on from this step's checkpoint."""
        return self.folder / f"state-{self.step}.safetensors"

    def resume(self) -> None:
        """Everything as it was at the last checkpoint, or at the start."""
        seed, classify = self.training.seed, self.training.task == CLASSIFY
        self.model: Model = new_classifier(self.mae, self.classes, seed) if classify else new_mae(self.mae, seed)
        if self.start is not None:
            load_weights(self.model, self.start, "vit." if classify else "")
        about = TRAINING.read(self.folder)
        at = about["state"]
        if at is not None:
            load_weights(self.model, self.folder / f"checkpoint-{at}")
        self.model.to(self.device).train()
        rate, decay = self.training.rate, self.training.weight_decay
        self.optimizer = torch.optim.AdamW(_trainable(self.model), lr=rate, weight_decay=decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda")
        if at is None:
            self.write_log([])
            self.keep()
            return
        self.step = at
        self.write_log([entry for entry in Run(self.folder).log if entry["step"] <= at])
        stored = open_checkpoint(self.state)
        if about.get("state_sha256", "") not in ("", sha256(self.state)):  # versions before seals have none
            raise InputError(f"{self.state}: is not what was written: its SHA-256 differs; train in a new folder")
        for i, p in enumerate(_trainable(self.model)):
            names = [name for name in ("step", "exp_avg", "exp_avg_sq") if f"{i}.{name}" in stored]
            self.optimizer.state[p] = {name: stored[f"{i}.{name}"].clone().to(self.device) for name in names}
        self.scaler.load_state_dict(about["scaler"])
        self.losses = list(stored["losses"].clone().to(self.device))

    def advance(self) -> None:
        """One step of AdamW, at its place on the cosine."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate * 0.5 * (1 + math.cos(math.pi * self.step / self.total))
        n, batch = len(self.images), self.training.batch
        epoch, place = divmod(self.step, math.ceil(n / batch))
        # A new order every epoch, all images once in each.
        generator = torch.Generator().manual_seed(_seed(self.training.seed, "order", epoch))
        index = torch.randperm(n, generator=generator)[place * batch : (place + 1) * batch]
        images = self._on_device.take(index.to(self.device))
        loss = self._loss(images, _seed(self.training.seed, "mask", self.step))[0]
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        self.step += 1

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """An entry of the log; masks are the same every time."""
        self.model.eval()
        loss, right = 0.0, 0.0
        for start in range(0, len(self.validation), 256):
            part = self.validation.take(slice(start, start + 256))
            mean, hits = self._loss(part, _seed(0, "validation", start))
            loss += float(mean) * len(part) / len(self.validation)
            right += hits / len(self.validation)
        self.model.train()
        train_loss = float(torch.stack(self.losses).double().mean()) if self.losses else math.nan
        self.losses.clear()
        if not math.isfinite(loss + train_loss):
            raise InputError(f"{self.folder}: the loss is not finite at step {self.step}; choose a lower rate")
        epoch = self.step * self.training.batch / len(self.images)
        entry = {"step": self.step, "epoch": round(epoch, 4), "loss": train_loss, "validation": loss}
        return entry | ({"accuracy": right} if self.training.task == CLASSIFY else {})

    @cached_property
    def _on_device(self) -> Images:
        labels = None if self.images.labels is None else self.images.labels.to(self.device)
        return replace(self.images, pixels=self.images.pixels.to(self.device), labels=labels)

    def _loss(self, images: Images, seed: int) -> tuple[Tensor, float]:
        """Mean loss of some images, and how many of them are classified rightly."""
        model, pixels = self.model, images.pixels.to(self.device).float().div_(127.5).sub_(1.0)
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


@contextmanager
def _tf32(device: torch.device) -> Iterator[None]:
    """TF32 products on a GPU for as long as this lasts."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _trainable(model: Model) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]
