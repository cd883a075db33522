"""Pretraining against a bare PyTorch loop, tracking 50 checkpoints, and the share that the callback takes.

    python benchmarks/bench_pretrain.py [--images N] [--checkpoints N] [--steps N]

Seconds are wall time, with the processor's beside them: on a machine that does other work, compare the latter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainingArguments

from specbasis.paper.images import Images
from specbasis.paper.mae import MAE, new_mae, save_model
from specbasis.paper.training import Training, train
from specbasis.tracking.callback import SpectralCallback
from specbasis.tracking.track import track


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def noise(n: int) -> Images:
    g = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), None, "noise")


def epoch(images: Images, folder: Path) -> None:
    """One epoch as specbasis trains it: with its checkpoint at the end, and validation on 256 images."""
    settings = Training(epochs=1, checkpoints=1, validations=1)
    train(images, images.first(256), folder, training=settings, device="cpu")


def bare_epoch(images: Images) -> None:
    """The same model, optimizer and batches in a loop as short as it can be, on floats that are ready."""
    model = new_mae(MAE(), seed=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1.5e-3, weight_decay=1e-4, fused=True)
    pixels = images.pixels.float() / 127.5 - 1
    for index in torch.randperm(len(images)).split(64):
        model(pixels[index]).loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def pretraining(images: int) -> None:
    data = noise(images)
    bare_epoch(data.first(128))  # what is done once in a process is done
    bare = timed(lambda: bare_epoch(data))
    with tempfile.TemporaryDirectory() as folder:
        ours = timed(lambda: epoch(data, Path(folder) / "run"))
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    print(f"one epoch of {images} images: {ours[0]:.1f} s ({ours[1]:.1f} of processor)")
    print(f"  bare loop:                  {bare[0]:.1f} s ({bare[1]:.1f} of processor)")
    print(f"  ratio:                      {ratios[0]:.2f} ({ratios[1]:.2f} of processor)   at most 1.2 is wanted")


def tracking(checkpoints: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, g = new_mae(MAE(), seed=0), torch.Generator().manual_seed(0)
        for i in range(checkpoints):
            save_model(model, Path(folder) / "run" / f"checkpoint-{i}")
            with torch.no_grad():
                for p in model.parameters():
                    p += 1e-3 * torch.randn(p.shape, generator=g)
        wall, cpu = timed(lambda: track(Path(folder) / "run", Path(folder) / "out", workers=2))
    print(f"tracking {checkpoints} checkpoints of the ViT-Tiny, two workers: {wall:.1f} s ({cpu:.1f} of processor)")


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images.pixels[i].float() / 127.5 - 1}


def callback(steps: int) -> None:
    follower = SpectralCallback()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=64, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_steps=10**6, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(new_mae(MAE(), seed=0), arguments, train_dataset=_Rows(noise(640)), callbacks=[follower])
        wall, _ = timed(trainer.train)
    end = follower._last  # taken at the end whatever it costs
    share = (follower.seconds - end) / wall
    print(f"callback, {steps} steps, default frequency: {share:.2%} of {wall:.0f} s   below 2 % is wanted")
    print(f"  one measurement: {end:.2f} s; {len(follower.history)} taken, the last of them at the end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    for run, size in ((pretraining, given.images), (tracking, given.checkpoints), (callback, given.steps)):
        if size:
            run(size)


if __name__ == "__main__":
    main()
