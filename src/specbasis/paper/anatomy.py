"""Where a finetune's update lives: its share in parts of the base's basis, and what each part does to the task.

No training but the finetunes themselves. For every matrix, Δ = tuned − base in the base's singular basis, C =
Uᵀ Δ V: what the leading K × K block of C holds of ‖Δ‖² is what a spectral adapter of that size could represent.
Then the model is scored with parts of Δ alone, with the base's values in the tuned vectors, with the base's
vectors and the tuned values, and with controls that move the weights as far, with the same spectrum, in random
directions. Tests the thesis of Yu et al. 2026, §4.4 (adaptation reweights inside a stable basis) without the
adapter. Not in the paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from specbasis.core.columns import generator_of, random_orthonormal
from specbasis.core.draws import rotated
from specbasis.core.errors import want
from specbasis.core.extras import quiet
from specbasis.core.statistics import percentile_interval
from specbasis.core.svd import SVD, decompose
from specbasis.finetuning.base import Base, load_base
from specbasis.finetuning.methods.sites import ALL_LINEAR, sites
from specbasis.finetuning.metrics import Predictions
from specbasis.finetuning.options import require_libraries
from specbasis.finetuning.runs import finetune, load
from specbasis.finetuning.tasks import Split
from specbasis.jobs.environment import WHERE_USED
from specbasis.jobs.experiments import Row, run_experiments
from specbasis.jobs.progress import Progress
from specbasis.paper.differences import resampled
from specbasis.paper.encoder import portions
from specbasis.paper.grid import about_base, whole_task
from specbasis.paper.options import AnatomyOptions

SIZES = (10, 30, 75, 150, 300)
"""K of the blocks."""

EDITED = (30, 150)
"""K of the parts of Δ with which the model is scored."""

TRAINED: Mapping[str, dict[str, Any]] = {
    "sst2": {"epochs": 2, "learning_rate": 8e-5, "examples": 8000},
    "cola": {"epochs": 3, "learning_rate": 8e-5},
    "stsb": {"epochs": 4, "learning_rate": 8e-5},
    "rte": {"epochs": 5, "learning_rate": 8e-5},
}
"""How each task's full finetune is made, at the rate that the search of docs/findings/table1.md chose."""


def run(options: AnatomyOptions, out: str | Path, progress: Callable[[Progress], None] | None = None) -> list[Row]:
    """One row for each full finetune: made where the folder of models lacks it, then taken apart.

    Raises:
        InputError: a task without a recipe in `TRAINED`.
    """
    require_libraries()
    want("task", TRAINED, *options.tasks)
    models = options.models or f"{out}-models"
    cells = [{"task": task, "seed": seed, **TRAINED[task]} for seed in options.seeds for task in options.tasks]
    call = functools.partial(
        take_apart, base=options.base, data_dir=options.data_dir, models=models, device=options.device
    )
    return run_experiments(
        cells,
        call,
        out,
        config=about_base(options.base),
        uses=WHERE_USED,
        progress=progress,
        prepare=lambda cell: whole_task(cell["task"], data_dir=options.data_dir),
    )


def take_apart(
    cell: Mapping[str, Any], *, base: str, data_dir: str | None, models: str, device: str
) -> dict[str, Any]:
    """The shares of every matrix of one finetune, and its scores under every edit."""
    task, seed = cell["task"], cell["seed"]
    folder = Path(models) / f"{task}-{seed}"
    protocol: dict[str, Any] = {name: cell.get(name) for name in ("epochs", "learning_rate", "examples")}
    protocol |= {"seed": seed, "data_dir": data_dir, "group_by_length": True}
    data = whole_task(task, data_dir=data_dir)
    done = finetune(base, data, "full", out=folder, **protocol)
    tuned, _ = load(folder, base)
    with quiet():
        start = load_base(base, data.task)
    dev = next(iter(data.dev.values()))
    names = [site.name for site in sites(start.model, ALL_LINEAR)]
    blocks = {name: _pair(start.model, tuned, name) for name in names}
    poolers = [name for name, _ in start.model.named_modules() if name.endswith("pooler.dense")]
    pooler = {name: _pair(start.model, tuned, name) for name in poolers}
    scores = score_edits(tuned.to(device), start, dev, blocks, pooler, seed)
    return {
        "matrices": {name: shares(*pair) for name, pair in (blocks | pooler).items()},
        "scores": scores,
        "train": {"score": done.metrics["score"]},
        "examples": len(dev),
    }


def _pair(base: nn.Module, tuned: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    return _weight(base, name).double().cpu(), _weight(tuned, name).double().cpu()


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight").detach()


# --- closed form --------------------------------------------------------------------------------


def shares(W: Float[Tensor, "out in"], T: Float[Tensor, "out in"]) -> dict[str, Any]:
    """Shares of ‖Δ‖² by where they lie, each over `SIZES`; ``size`` is ‖Δ‖/‖W‖, ``top`` σ₁(Δ)/σ₁(W).

    leading, middle, last: the K × K block of C = Uᵀ Δ V; diagonal: its K leading diagonal entries; entries: the K²
    largest entries of C anywhere; plain: of Δ itself; low_rank: the best matrix of rank ⌊K²/(out + in)⌋ at least 1,
    which has as many numbers; chance: K²/(out·in), a K × K block in a random basis. ``thin`` is all of C, and
    ``thin_chance`` what a random Δ would have in it.
    """
    delta = T - W
    base, change = decompose(W), decompose(delta)
    C = base.U.mT @ delta @ base.Vh.mT
    total, n = delta.square().sum(), len(base.S)
    result: dict[str, Any] = {
        "size": rounded(delta.norm() / W.norm()),
        "top": rounded(change.spectrum[0] / base.spectrum[0]),
        "thin": rounded(C.square().sum() / total),
        "thin_chance": n * n / W.numel(),
    }
    largest = {"entries": _descending(C), "plain": _descending(delta)}
    for K in (K for K in SIZES if n >= K):
        start = (n - K) // 2
        rank = max(1, K * K // sum(W.shape))
        part = {
            "leading": C[:K, :K].square().sum(),
            "middle": C[start : start + K, start : start + K].square().sum(),
            "last": C[n - K :, n - K :].square().sum(),
            "diagonal": C.diagonal()[:K].square().sum(),
            "low_rank": change.spectrum[:rank].square().sum(),
            **{name: values[: K * K].sum() for name, values in largest.items()},
        }
        result[str(K)] = {name: rounded(value / total) for name, value in part.items()} | {
            "chance": K * K / W.numel()
        }
    return result


def _descending(X: Tensor) -> Tensor:
    return X.square().flatten().sort(descending=True).values


def rounded(value: Tensor | float) -> float:
    """To five digits, which is what rows keep."""
    return float(f"{float(value):.5g}")


# --- scores --------------------------------------------------------------------------------

Edit = Callable[[SVD, SVD, SVD, torch.Generator], Tensor]
"""From the decompositions of base, tuned and Δ to the matrix that the model is given."""


def _block(start: Callable[[int, int], int], K: int) -> Edit:
    def edit(base: SVD, tuned: SVD, delta: SVD, _: torch.Generator) -> Tensor:
        n = len(base.S)
        k, m = start(n, min(K, n)), start(n, min(K, n)) + min(K, n)
        U, Vh = base.U[:, k:m], base.Vh[k:m]
        return base.matrix() + U @ (U.mT @ delta.matrix() @ Vh.mT) @ Vh

    return edit


def _random_block(K: int) -> Edit:
    def edit(base: SVD, tuned: SVD, delta: SVD, generator: torch.Generator) -> Tensor:
        U, V = (random_orthonormal(d, min(K, len(base.S)), generator) for d in base.shape)
        return base.matrix() + U @ (U.mT @ delta.matrix() @ V) @ V.mT

    return edit


def _low_rank(K: int) -> Edit:
    def edit(base: SVD, tuned: SVD, delta: SVD, _: torch.Generator) -> Tensor:
        rank = min(len(delta.S), max(1, K * K // sum(base.shape)))
        return base.matrix() + delta.truncate(rank).matrix()

    return edit


def _base_values(base: SVD, tuned: SVD, delta: SVD, _: torch.Generator) -> Tensor:
    return (tuned.U * base.S) @ tuned.Vh


def _base_vectors(base: SVD, tuned: SVD, delta: SVD, _: torch.Generator) -> Tensor:
    return (base.U * tuned.S) @ base.Vh


def _as_far(edit: Edit) -> Edit:
    """The tuned matrix moved as far as an edit moves it, with the same spectrum, in random directions."""

    def control(base: SVD, tuned: SVD, delta: SVD, generator: torch.Generator) -> Tensor:
        T = tuned.matrix()
        return T + rotated(T, edit(base, tuned, delta, generator), generator)

    return control


EDITS: Mapping[str, Edit] = {
    "base": lambda base, tuned, delta, _: base.matrix(),
    "base values": _base_values,
    "base vectors": _base_vectors,
    "base values, rotated": _as_far(_base_values),
    "base vectors, rotated": _as_far(_base_vectors),
    "thin basis": _block(lambda n, K: 0, 10**6),
    **{f"leading {K}": _block(lambda n, K: 0, K) for K in EDITED},
    **{f"middle {K}": _block(lambda n, K: (n - K) // 2, K) for K in EDITED},
    **{f"last {K}": _block(lambda n, K: n - K, K) for K in EDITED},
    **{f"random {K}": _random_block(K) for K in EDITED},
    **{f"low rank {K}": _low_rank(K) for K in EDITED},
    "rotated": lambda base, tuned, delta, g: base.matrix() + rotated(base.matrix(), tuned.matrix(), g),
}
"""Name → what every edited matrix becomes. The first half edits vectors and values, the second keeps a part of Δ;
"X, rotated" moves the tuned matrix as far as X does, "rotated" the base as far as the finetune did."""


def score_edits(
    tuned: nn.Module,
    start: Base,
    dev: Split,
    blocks: Mapping[str, tuple[Tensor, Tensor]],
    pooler: Mapping[str, tuple[Tensor, Tensor]],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """The score of every edit of all blocks' matrices, and with ``+ pooler`` of the pooler too.

    Beside each the difference to the unedited model with its 95 % interval over the examples, paired.
    """
    task, pairs = start.task, {**blocks, **pooler}
    factors = {name: (decompose(W), decompose(T), decompose(T - W)) for name, (W, T) in pairs.items()}

    def predicted() -> Predictions:
        return predictions(tuned, start, dev)

    reference = predicted()
    resamples = resampled(task, reference)
    unedited = task.score(reference.scores(task))
    scored: dict[str, dict[str, Any]] = {"tuned": {"score": unedited}}
    for edit_name, edit in EDITS.items():
        for group, names in (("", list(blocks)), (" + pooler", [*blocks, *pooler])):
            for name in names:
                generator = generator_of(f"{edit_name} {name} {seed}")
                weight = _weight(tuned, name)
                weight.copy_(edit(*factors[name], generator).to(weight))
            now = predicted()
            for name in names:
                _weight(tuned, name).copy_(pairs[name][1])
            moved = resampled(task, now) - resamples
            score = task.score(now.scores(task))
            scored[edit_name + group] = {
                "score": score,
                "difference": score - unedited,
                "interval": list(percentile_interval(moved)),
            }
    return scored


@torch.no_grad()
def predictions(model: nn.Module, base: Base, split: Split, at_once: int = 64) -> Predictions:
    """What a model says of examples, in their order."""
    examples, collate = base.encode(split), base.collator()
    assert isinstance(examples, list), "the tasks of `TRAINED` are of texts"
    device = next(model.parameters()).device
    order = np.argsort([len(example["input_ids"]) for example in examples], kind="stable")
    outputs: dict[int, Any] = {}
    for rows in portions(order, at_once):
        batch = collate([examples[i] for i in rows])
        labels = batch.pop("labels")
        logits = model.eval()(**{name: value.to(device) for name, value in batch.items()}).logits
        outputs |= dict(
            zip(rows.tolist(), zip(logits.double().cpu().numpy(), labels.numpy(), strict=True), strict=True)
        )
    ordered = [outputs[i] for i in range(len(split))]
    return Predictions.of(base.task, np.stack([o for o, _ in ordered]), np.array([y for _, y in ordered]))
