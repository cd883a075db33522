"""Which basis the adapter's core stands in: how much it matters, where capacity is the limit and where it is not.

For every size K the same training in each of `BASES`, over seeds; the learning rate is chosen for each (task, K,
basis) on a part of train of its own, and everything is scored on many sentences of train that nothing else has
seen. One row is one stack of trainings (see `cores`): the search of a (task, K), or its runs. Not in Yu et al.
2026, whose Tab. 1 has the pretrained basis alone.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specbasis.checkpoint import open_checkpoint, weights_sha256
from specbasis.core.columns import generator_of, random_orthonormal
from specbasis.core.errors import InputError, want
from specbasis.core.svd import SVD, decompose
from specbasis.finetuning.metrics import Predictions
from specbasis.finetuning.options import require_libraries
from specbasis.finetuning.tasks import GLUE, Split
from specbasis.jobs.environment import WHERE_USED
from specbasis.jobs.experiments import Row, run_experiments
from specbasis.jobs.progress import Progress
from specbasis.paper.cores import Basis, Experiment, Recipe, score, train
from specbasis.paper.encoder import Encoder, Examples, encode, frozen_means, load_encoder, mean_gradients
from specbasis.paper.grid import about_base, whole_task
from specbasis.paper.options import AblationOptions

BASES = {
    "leading": "pretrained, leading ranks",
    "middle": "pretrained, middle ranks",
    "last": "pretrained, last ranks",
    "shuffled": "pretrained, leading right with random left vectors",
    "random": "random orthonormal",
    "scratch": "leading ranks of a model trained from scratch on the task",
    "gradient": "leading ranks of the first gradient",
    "gradient-shuffled": "the same, of shuffled labels",
}
"""The bases that are compared, and what they are."""

GRADIENT_EXAMPLES = 1024
"""Sentences whose mean gradient makes the basis; other ones for each seed, all of train's own."""

SEARCH_SEEDS = (0, 1)

FLOOR_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse regularisation of the logistic regression, chosen like the learning rates."""


@dataclass(frozen=True)
class Part:
    """How a task's train is divided, and how long it is trained: sizes of train and of what chooses the rate; all
    other sentences of train, and the dev set, are scored.
    """

    train: int
    selection: int
    epochs: int


PARTS = {"sst2": Part(8000, 2000, 3), "cola": Part(6000, 1000, 10)}


def checked(options: AblationOptions) -> AblationOptions:
    """The options with all bases where none are named.

    Raises:
        InputError: a task or a basis does not exist, or fewer than two seeds.
    """
    options = dataclasses.replace(options, bases=options.bases or tuple(BASES))
    want("task", PARTS, *options.tasks)
    want("basis", BASES, *options.bases)
    if len(options.seeds) < 2:
        raise InputError(f"got seeds = {options.seeds}; want at least two: what seeds do is half of the error")
    return options


def bases_of(options: AblationOptions, task: str) -> tuple[str, ...]:
    """The bases of a task: that of a model from scratch only where there is one."""
    return tuple(basis for basis in options.bases if basis != "scratch" or task in dict(options.scratch))


def config(options: AblationOptions) -> dict[str, Any]:
    """What the manifest says: what decides the values beside the row itself, and no path."""
    return {
        **about_base(options.base),
        "bases": list(options.bases),
        "rates": list(options.rates),
        "scratch_sha256": {task: weights_sha256(open_checkpoint(path)) for task, path in options.scratch},
        "parts": {task: dataclasses.asdict(part) for task, part in PARTS.items()},
        "gradient_examples": GRADIENT_EXAMPLES,
        "held_back": options.held_back,
        **({"head": options.head} if options.head != "mean" else {}),  # folders of before know the mean alone
    }


def run(options: AblationOptions, out: str | Path, progress: Callable[[Progress], None] | None = None) -> list[Row]:
    """Run what has no row yet: of each task the floor, then of each size the search and the runs."""
    require_libraries()
    options = checked(options)
    torch.set_float32_matmul_precision(options.precision)
    call = functools.partial(run_stack, options=options)
    shared: dict[str, Any] = {"config": config(options), "uses": WHERE_USED, "progress": progress}

    def one(**row: Any) -> Row:
        prepare = functools.partial(whole_task, row["task"], data_dir=options.data_dir)
        (done,) = run_experiments([row], call, out, prepare=lambda _: prepare(), **shared)
        return done

    rows: list[Row] = []
    for task in options.tasks:
        rows.append(one(task=task, stage="floor"))
        for size in options.sizes:
            rates = dict.fromkeys(bases_of(options, task), options.rates[0])
            if len(options.rates) > 1:
                rows.append(one(task=task, size=size, stage="search", seeds=list(SEARCH_SEEDS)))
                if rows[-1].error is not None:
                    continue
                rates = chosen_rates(rows[-1])
            rows.append(one(task=task, size=size, stage="runs", seeds=list(options.seeds), rates=rates))
    return rows


def chosen_rates(search: Row) -> dict[str, float]:
    """The rate of each basis with the best mean score of a search; of equal ones the smallest."""
    chosen = {}
    for basis in dict.fromkeys(arm["basis"] for arm in search.values["arms"]):
        arms = [arm for arm in search.values["arms"] if arm["basis"] == basis]
        means = {
            rate: np.mean([arm["score"] for arm in arms if arm["rate"] == rate])
            for rate in sorted({arm["rate"] for arm in arms})
        }
        chosen[basis] = max(means, key=lambda rate: (means[rate], -rate))
    return chosen


def run_stack(row: Mapping[str, Any], options: AblationOptions) -> dict[str, Any]:
    """One stack, the search of a (task, K) or its runs; or the floor of a task."""
    material = _material(options, row["task"])
    on = {"device": torch.device(options.device).type, "precision": options.precision}
    if row["stage"] == "floor":
        return floor(material) | {"on": on}
    searches = row["stage"] == "search"
    arms = [
        (basis, seed, rate)
        for basis in bases_of(options, row["task"])
        for seed in row["seeds"]
        for rate in (options.rates if searches else (row["rates"][basis],))
    ]
    bases = {
        (basis, seed): material.basis(basis, row["size"], seed)
        for basis, seed in dict.fromkeys(a[:2] for a in arms)
    }
    experiments = [Experiment(bases[basis, seed], seed, rate) for basis, seed, rate in arms]
    stack = train(material.encoder, material.train, experiments, Recipe(PARTS[row["task"]].epochs))
    fitted = score(stack, material.train)
    examples = material.selection if searches else material.held_back
    scored, labels = score(stack, examples), examples.labels.cpu().numpy()
    task = material.encoder.task
    values: dict[str, Any] = {"arms": [], "on": on}
    for i, (basis, seed, rate) in enumerate(arms):
        predictions = Predictions(scored.predicted[i].astype(np.float64), labels.astype(np.float64))
        arm = {
            "basis": basis,
            "seed": seed,
            "rate": rate,
            "score": task.score(predictions.scores(task)),
            "loss": float(scored.loss[i]),
            "train_loss": float(fitted.loss[i]),
        }
        if not searches:
            arm["norms"] = {name: float(core[i].norm()) for name, core in stack.cores.items()}
            arm["predicted"] = packed(scored.predicted[i])
        values["arms"].append(arm)
    if not searches:
        values |= {
            "labels": packed(labels),
            "examples": len(labels),
            "parameters": sum(core[0].numel() for core in stack.cores.values()),
            "leading_norms": material.leading_norms(row["size"]),
        }
    return values


def floor(material: Material) -> dict[str, Any]:
    """What no adapter reaches: a converged logistic regression on the frozen model's mean hidden states."""
    from sklearn.linear_model import LogisticRegression

    features = {name: frozen_means(material.encoder, part) for name, part in material.parts.items()}
    labels = {name: part.labels.cpu().numpy() for name, part in material.parts.items()}

    fitted = {
        strength: LogisticRegression(C=strength, max_iter=5000).fit(features["train"], labels["train"])
        for strength in FLOOR_STRENGTHS
    }

    def scored(strength: float, part: str) -> tuple[float, np.ndarray]:
        classes = fitted[strength].predict(features[part])
        task = material.encoder.task
        return task.score(Predictions(classes.astype(float), labels[part].astype(float)).scores(task)), classes

    strength = max(FLOOR_STRENGTHS, key=lambda value: scored(value, "selection")[0])
    score, classes = scored(strength, "held_back")
    return {"score": score, "C": strength, "predicted": packed(classes), "labels": packed(labels["held_back"])}


def packed(classes: np.ndarray) -> str:
    """Two classes as text, a bit each."""
    return base64.b64encode(np.packbits(classes.astype(bool)).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """The inverse of `packed`."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8))
    return bits[:count].astype(np.float64)


# --- material -----------------------------------------------------------------------------------------------------


class Material:
    """The encoder, the examples below its last blocks, and what bases are made of; each made once."""

    def __init__(self, options: AblationOptions, task: str) -> None:
        self.options, self.task, part = options, task, PARTS[task]
        self.data = data = whole_task(task, data_dir=options.data_dir)
        order = data.train.by_content()
        first, second = part.selection, part.selection + part.train
        held_back = data.train.take(order[second:])
        dev = next(iter(data.dev.values()))
        whole = Split([*dev.inputs, *held_back.inputs], [*dev.labels, *held_back.labels])
        self.encoder: Encoder = load_encoder(options.base, GLUE[task], options.device, head=options.head)
        self.selection = encode(self.encoder, data.train.take(order[:first]))
        self.train = encode(self.encoder, data.train.take(order[first:second]))
        self.held_back = encode(self.encoder, whole.take(range(min(len(whole), options.held_back or len(whole)))))

    @property
    def parts(self) -> dict[str, Examples]:
        """Train, what rates are chosen on, and what is scored."""
        return {"train": self.train, "selection": self.selection, "held_back": self.held_back}

    @functools.cached_property
    def pretrained(self) -> dict[str, SVD]:
        """Of the base's matrices."""
        return {
            name: decompose(linear.weight.detach().cpu(), name=name)
            for name, linear in self.encoder.matrices.items()
        }

    @functools.cached_property
    def scratch(self) -> dict[str, SVD]:
        """Of the matrices of the model from scratch."""
        from specbasis.adapter.bases import parameter_named

        path = dict(self.options.scratch)[self.task]
        checkpoint = open_checkpoint(path)
        names = {
            name: parameter_named(checkpoint, f"{name}.weight", where=path, want="the same architecture")
            for name in self.encoder.matrices
        }
        return {name: decompose(checkpoint[key], name=key) for name, key in names.items()}

    @functools.cache  # noqa: B019 - lives as long as the process
    def gradient(self, seed: int, shuffled: bool) -> dict[str, SVD]:
        """Of the mean gradients of some sentences of train."""
        random = np.random.default_rng((seed, 7))
        rows = torch.from_numpy(random.permutation(len(self.train))[:GRADIENT_EXAMPLES]).to(self.encoder.device)
        some = Examples(self.train.hidden[rows], self.train.lengths[rows], self.train.labels[rows])
        labels = (
            some.labels[torch.from_numpy(random.permutation(len(some))).to(rows.device)]
            if shuffled
            else some.labels
        )
        gradients = mean_gradients(self.encoder, some, labels)
        return {name: decompose(G.cpu(), name=f"gradient of {name}") for name, G in gradients.items()}

    def basis(self, kind: str, size: int, seed: int) -> dict[str, Basis]:
        """The vectors of each matrix."""
        return {name: self._of(kind, name, size, seed) for name in self.encoder.matrices}

    def _of(self, kind: str, name: str, size: int, seed: int) -> Basis:
        svd = self.pretrained[name]
        n = len(svd.S)
        if size > n:
            raise InputError(f"{name} has {n} singular values; got K = {size}")
        generator = generator_of(f"{kind} {name} {size} {seed}")
        if kind == "random":
            U, V = (random_orthonormal(d, size, generator) for d in svd.shape)
            return self._basis(U, V.mT)
        if kind == "shuffled":
            left = torch.randperm(n, generator=generator)[:size].to(svd.U.device)
            return self._basis(svd.U[:, left], svd.Vh[:size])
        if kind == "scratch":
            svd = self.scratch[name]
        elif kind.startswith("gradient"):
            svd = self.gradient(seed, kind.endswith("shuffled"))[name]
        start = {"middle": (n - size) // 2, "last": n - size}.get(kind, 0)
        return self._basis(svd.U[:, start : start + size], svd.Vh[start : start + size])

    def _basis(self, U: Tensor, Vh: Tensor) -> Basis:
        U, Vh = (X.to(self.encoder.device, torch.float32).contiguous() for X in (U, Vh))
        return Basis(U, Vh)

    def leading_norms(self, size: int) -> dict[str, float]:
        """‖Σ_K‖ of each matrix: what ‖M‖ is to be held against."""
        return {name: float(svd.S[:size].norm()) for name, svd in self.pretrained.items()}


@functools.lru_cache(maxsize=1)
def _material(options: AblationOptions, task: str) -> Material:
    return Material(options, task)
