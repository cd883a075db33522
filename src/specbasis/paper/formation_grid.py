"""The grid of experiments behind Fig. 4, 9 and 21, and training from scratch beside it.

Pretrain on more or fewer images; go on from the best checkpoint, and from random weights, in four ways; follow
every encoder matrix over the checkpoints. An experiment's values hold all that claims and figures need, so that the
weights can go.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.architecture.key import MatrixRef
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from specbasis.jobs.experiments import Row, run_experiments
from specbasis.jobs.progress import Report
from specbasis.paper.images import ImageData, Images, open_images
from specbasis.paper.mae import MAE
from specbasis.paper.options import Training
from specbasis.paper.training import NEW_TASK, PRETRAINING, SAME_TASK, Run, train
from specbasis.tracking.trajectory import Trajectory, follow

POSTS = ("same_task", "second_data", "true_labels", "random_labels")
"""What follows pretraining: reconstruction of held-out images, of another data set's; classification by true and by
shuffled labels."""

TOP = 10
"""Leading ranks over which a curve's alignment is averaged."""

RANKS = 32
"""Leading ranks that are followed."""

NULL_DRAWS = 2
"""Gaussian updates that give the null."""


@dataclass(frozen=True)
class Formation:
    """What a grid consists of.

    Attributes:
        data: source of the images (see `open_images`).
        second: source of the second distribution.
        mae: sizes of the model.
        passes: (images, optimizer steps) of each pretraining, in passes: each is run for all seeds before the next.
        seeds: each seeds the sample of images, the weights, orders and masks.
        pretraining, same_task, new_task: how each is trained; ``seed`` and the pretraining's ``steps`` are the
            experiment's.
        same_task_images, new_task_images: how many, from the start of the test set.
        validation: how many, from the end of the test set.

    Source: Yu et al. 2026, App. L: the validation images are the last 5 000 of the test set, the same task goes
    on with its first 1 000, classification with its first 3 000. The images of each pretraining are the first of
    one random order.
    """

    data: str = "fashion-mnist"
    second: str = "mnist-5k"
    mae: MAE = field(default_factory=MAE)
    passes: tuple[tuple[tuple[int, int], ...], ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    pretraining: Training = PRETRAINING
    same_task: Training = SAME_TASK
    new_task: Training = NEW_TASK
    same_task_images: int = 1000
    new_task_images: int = 3000
    validation: int = 5000

    def experiments(self) -> list[dict[str, Any]]:
        """Every experiment, seed by seed, so that a part of the grid says something; pairs once both are there."""
        experiments: list[dict[str, Any]] = []
        for number, pretrainings in enumerate(self.passes):
            sizes: list[dict[str, Any]] = [{"images": n, "steps": steps} for n, steps in pretrainings]
            scratch: list[dict[str, Any]] = [{"task": task} for task in POSTS] if number == 0 else []
            for i, seed in enumerate(self.seeds):
                for size in sizes:
                    experiments.append({"phase": "pretrain", "seed": seed, **size})
                    experiments += [{"phase": "post", "seed": seed, **size, "task": task} for task in POSTS]
                experiments += [{"phase": "scratch", "seed": seed, **task} for task in scratch]
                for other in self.seeds[:i]:
                    between = {"phase": "between", "seed": seed, "other": other}
                    experiments += [between | start for start in (*sizes, *scratch)]
        return experiments


@dataclass(frozen=True, eq=False)
class Followed:
    """A matrix of a model: where it stands, its trajectory, and its first value."""

    ref: MatrixRef
    trajectory: Trajectory
    first: Tensor


def run_formation(
    plan: Formation,
    out: str | Path,
    *,
    experiments: Sequence[dict[str, Any]] | None = None,
    progress: Report | None = None,
) -> list[Row]:
    """Run a grid, or go on with it, in a folder; weights are kept in its subfolder `work` and may be deleted after.

    Raises: as `run_experiments`.
    """
    # What experiments of one folder share; the lists of experiments may grow.
    config = {k: v for k, v in asdict(plan).items() if k not in ("passes", "seeds")} | {"top": TOP, "ranks": RANKS}
    run = partial(run_experiment, plan=plan, work=Path(out) / "work")
    wanted = plan.experiments() if experiments is None else experiments
    return run_experiments(wanted, run, out, config=config, uses=("transformers",), progress=progress)


def run_experiment(experiment: dict[str, Any], *, plan: Formation, work: Path) -> dict[str, Any]:
    """One experiment: train, or continue, and follow; or compare the ends of two seeds."""
    if experiment["phase"] == "between":
        return _between(experiment, plan, work)
    run = (_pretrained if experiment["phase"] == "pretrain" else _post)(experiment, plan, work)
    followed = follow_checkpoints(run.checkpoints)
    values = {
        "steps": [int(path.name.partition("-")[2]) for path in run.checkpoints],
        "log": [{name: entry[name] for name in entry if name != "seconds"} for entry in run.log],
        "matrices": {name: _summary(f) for name, f in followed.items()},
        "ffn": _final_ffn(followed, pairs=experiment["phase"] == "pretrain"),
    }
    for path in run.checkpoints[1:-1]:  # the first, the last and the best are needed again
        shutil.rmtree(path)
    return values


def follow_checkpoints(checkpoints: Sequence[Path]) -> dict[str, Followed]:
    """Every encoder matrix over some checkpoints of one model, by name."""
    opened = [open_checkpoint(path) for path in checkpoints]
    refs = [r for r in model_map(opened[0]).matrices if r.key.stack != "decoder" and r.key.role != "head"]

    def one(ref: MatrixRef) -> Followed:
        matrices = [ref.read(checkpoint).to(torch.float64) for checkpoint in opened]
        return Followed(ref, follow(matrices.__getitem__, len(matrices), ranks=RANKS), matrices[0])

    return {ref.key.name: one(ref) for ref in refs}


_data = cache(open_images)


def _splits(plan: Formation) -> tuple[ImageData, Images]:
    """The data and its validation images, which no training sees.

    Raises:
        InputError: the test set is too small for the splits.
    """
    data = _data(plan.data, size=plan.mae.image)
    wanted = plan.validation + max(plan.same_task_images, plan.new_task_images)
    if len(data.test) < wanted:
        raise InputError(
            f"{data.test.name}: {len(data.test)} test images; want {wanted}: {plan.validation} for validation, the "
            "others to train on after pretraining; ask for fewer of either"
        )
    return data, data.test.last(plan.validation)


def _pretrained(experiment: dict[str, Any], plan: Formation, work: Path) -> Run:
    data, validation = _splits(plan)
    training = replace(plan.pretraining, steps=experiment["steps"], seed=experiment["seed"])
    images = data.train.sample(experiment["images"], experiment["seed"])
    return train(images, validation, _place(work, experiment, "pretrain"), mae=plan.mae, training=training)


def _post(experiment: dict[str, Any], plan: Formation, work: Path) -> Run:
    """What follows, from the best checkpoint of the seed's pretraining or from the weights that it began with."""
    data, validation = _splits(plan)
    task, seed = experiment["task"], experiment["seed"]
    classes = None
    if task == "same_task":
        images, training = data.test.first(plan.same_task_images), plan.same_task
    elif task == "second_data":
        second = _data(plan.second, size=plan.mae.image).train
        images, training = second.first(plan.same_task_images), plan.same_task
    else:
        images, training = data.test.first(plan.new_task_images), plan.new_task
        classes = data.train.classes
        images = images.shuffled_labels(seed) if task == "random_labels" else images
    start = _pretrained(experiment, plan, work).best if experiment["phase"] == "post" else None
    folder = _place(work, experiment, task)
    training = replace(training, seed=seed)
    return train(images, validation, folder, mae=plan.mae, training=training, start=start, classes=classes)


def _place(work: Path, experiment: dict[str, Any], name: str) -> Path:
    start = f"{experiment['images']}-images-{experiment['steps']}-steps" if "images" in experiment else "scratch"
    return work / f"seed-{experiment['seed']}" / start / name


def _between(experiment: dict[str, Any], plan: Formation, work: Path) -> dict[str, Any]:
    """The ends of the same training at two seeds: pretraining's best, or the end of a training from scratch."""
    ends: list[Path] = []
    for seed in (experiment["other"], experiment["seed"]):
        of_seed = {**experiment, "seed": seed}
        if "images" in experiment:
            ends.append(_pretrained(of_seed, plan, work).best)
        else:
            ends.append(_post({**of_seed, "phase": "scratch"}, plan, work).checkpoints[-1])
    return {"matrices": {name: _summary(f) for name, f in follow_checkpoints(ends).items()}}


def _summary(f: Followed) -> dict[str, Any]:
    """Curves of one matrix: alignment (mean over both sides and the leading ranks) and size of the update."""
    t, key = f.trajectory, f.ref.key
    aligned, leading, size = t.mean_alignment(TOP), t.mean_alignment(1), t.relative_distance()
    return {
        "block": key.block,
        "role": key.role,
        "chance": _rounded(t.chance()),
        "first": _rounded(aligned[0]),
        "last": _rounded(aligned[-1]),
        "next": _rounded(aligned.diagonal(1)),
        "first_leading": _rounded(leading[0]),
        "update_first": _rounded(size[0]),
        "update_last": _rounded(size[:, -1]),
        "update_next": _rounded(size.diagonal(1)),
        "null": _rounded(_null(f)),
        "unresolved": int((t.bound[[0, -1], :TOP] > 1e-6).sum()),
    }


def _null(f: Followed) -> float:
    """Alignment of the first matrix with itself plus a Gaussian one as large as the whole update, mean of draws."""
    size = float(f.trajectory.distance[0, -1])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NULL_DRAWS, *f.first.shape, dtype=torch.float64, generator=generator)
    noise *= size / torch.linalg.vector_norm(noise, dim=(1, 2), keepdim=True)
    matrices = [f.first, *(f.first + N for N in noise)]
    return float(follow(matrices.__getitem__, len(matrices), ranks=TOP).mean_alignment(TOP)[0, 1:].mean())


def _final_ffn(followed: dict[str, Followed], *, pairs: bool) -> dict[str, Any]:
    """The two feed-forward matrices of the last block, which the paper shows: rank by rank, and pair by pair."""
    last = max(f.ref.key.block for f in followed.values() if f.ref.key.block is not None)
    values: dict[str, Any] = {}
    for f in followed.values():
        t, key = f.trajectory, f.ref.key
        if key.block != last or not key.role.startswith("ffn."):
            continue
        values[key.role] = {side: _rounded(t.alignment(side)[0]) for side in ("left", "right")}
        if pairs:
            values[key.role] |= {
                "between": _rounded(t.mean_alignment(TOP)),
                "between_leading": _rounded(t.mean_alignment(1)),
                "update_between": _rounded(t.relative_distance()),
            }
    return values


def _rounded(values: Tensor | float) -> Any:
    return (torch.as_tensor(values, dtype=torch.float64) * 1e5).round().div(1e5).tolist()
