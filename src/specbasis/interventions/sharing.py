"""How far finetunes of one base share their singular vectors, as a number: by what a swap does, and by overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from specbasis.architecture.pair import pair
from specbasis.checkpoint import open_checkpoint, open_tuned
from specbasis.core.errors import InputError
from specbasis.core.subspace import subspace_overlap
from specbasis.core.svd import decompose
from specbasis.interventions.live import Decompose
from specbasis.interventions.stage import BASE, BASELINE, admitted
from specbasis.jobs.experiments import Row


@dataclass(frozen=True)
class Shared:
    """One ordered pair of models at one set of ranks in one group of matrices.

    Attributes:
        tuned: the model that is judged.
        source: the model whose singular vectors it gets.
        roles: group of matrices.
        ranks: set of ranks.
        change: change of the metric by the swap, positive where the model gets better.
        random: the same for random orthonormal vectors, mean over seeds.
        index: sharing index 1 − change / random: 1 where the other model's vectors serve as well as its own, 0
            where they are worth no more than random ones; None where random vectors do no harm that can be told
            from none, so that nothing can be concluded.
        low: lower end of a 95 % interval of the index, from that of the change; None as above.
        high: upper end.
        size: ‖ΔW‖_F / ‖W‖_F of the swap.
        overlap: mean over the matrices and both sides of ‖U_kᵀ U'_k‖_F² / k at k = the number of ranks; None for
            ranks that are not leading ones, or where weights were not given.
        chance: what independent subspaces give, k/d, mean over the same.
    """

    tuned: str
    source: str
    roles: str
    ranks: int | str
    change: float
    random: float
    index: float | None
    low: float | None
    high: float | None
    size: float
    overlap: float | None = None
    chance: float | None = None


def sharing(
    rows: Sequence[Row],
    metrics: Mapping[str, str],
    *,
    lower_is_better: Sequence[str] = ("loss", "perplexity"),
    overlaps: Mapping[tuple[str, str, str, int | str], tuple[float, float]] | None = None,
) -> list[Shared]:
    """The sharing index of every swap in a grid.

    index(t ← s) = 1 − Δ_swap / Δ_random, Δ the change of t's metric at the same ranks in the same matrices.

    Args:
        rows: of a grid with the kinds swap and random.
        metrics: label → the metric to look at.
        lower_is_better: endings of names of metrics that are losses.
        overlaps: from `overlaps`, by (tuned, source, roles, ranks).

    Raises:
        InputError: no swap in the rows.
    """
    edits = [row for row in rows if row.error is None and row.experiment["kind"] != BASELINE]
    table: list[Shared] = []
    for row in edits:
        swap = row.experiment
        if swap["kind"] != "swap" or swap["source"] == swap["tuned"]:
            continue
        metric = metrics[swap["tuned"]]
        sign = -1.0 if metric.endswith(tuple(lower_is_better)) else 1.0
        controls = [other for other in edits if _is_control(other.experiment, swap)]
        # A swap that changes no weight is one between equal models, and says nothing about sharing.
        if not controls or f"{metric}.change_low" not in row.values or row.values["size"] == 0:
            continue
        random = sign * float(np.mean([other.values[f"{metric}.change"] for other in controls]))
        harmful = random < 0 and all(other.values[f"{metric}.p"] < 0.05 for other in controls)
        change = sign * row.values[f"{metric}.change"]
        ends = sorted(sign * row.values[f"{metric}.change_{end}"] for end in ("low", "high"))
        # The larger the loss by the swap against that by random vectors, the smaller the index.
        index, low, high = (1 - value / random if harmful else None for value in (change, *ends))
        key = (swap["tuned"], swap["source"], swap["roles"], swap["ranks"])
        overlap = (overlaps or {}).get(key, (None, None))
        table.append(Shared(*key, change, random, index, low, high, row.values["size"], *overlap))
    if not table:
        raise InputError("no swap with its random control in these rows; run the kinds swap and random")
    return table


def _is_control(experiment: Mapping[str, Any], swap: Mapping[str, Any]) -> bool:
    same = ("tuned", "roles", "blocks", "ranks", "sides")
    return experiment["kind"] == "random" and all(experiment[name] == swap[name] for name in same)


def overlaps(
    models: Mapping[str, str],
    roles: Sequence[str],
    ranks: Sequence[int | str],
    *,
    blocks: str = "",
    factors: Decompose | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[tuple[str, str, str, int | str], tuple[float, float]]:
    """Overlap of the leading subspaces of every pair of models, with its chance level.

    Mean over the matrices of a group, and over both sides, of ‖U_kᵀ U'_k‖_F² / k; chance k/d likewise.

    Args:
        models: label → checkpoint; ``base`` among them.
        roles: groups of matrices, as in a grid.
        ranks: sets of leading ranks; others are passed over.
        blocks: group of blocks.
        factors: how to decompose.
        progress: told the name of each pair.
    """
    decomposed = factors or (lambda W, name: decompose(W, name=name))
    base = open_checkpoint(models[BASE])
    opened = {label: base if label == BASE else open_tuned(source, base) for label, source in models.items()}
    sizes = [n for n in ranks if isinstance(n, int) and n > 0]
    sums: dict[tuple[str, str, str, int | str], list[tuple[float, float]]] = {}
    for group in roles:
        admits = admitted(group, blocks)
        refs = {
            label: {m.key.name: m.tuned for m in pair(base, checkpoint, admits=admits).matched}
            for label, checkpoint in opened.items()
        }
        for name in sorted(set.intersection(*map(set, refs.values()))):
            if progress is not None:
                progress(name)
            factor = {label: decomposed(refs[label][name].read(opened[label]), name) for label in models}
            for (tuned, a), (source, b) in permutations(factor.items(), 2):
                for size in sizes:
                    k = min(size, len(a.S))
                    sides = ((a.U, b.U), (a.Vh.mT, b.Vh.mT))
                    value = math.fsum(subspace_overlap(x[:, :k], y[:, :k]) for x, y in sides) / 2
                    chance = math.fsum(k / len(x) for x, _ in sides) / 2
                    sums.setdefault((tuned, source, group, size), []).append((value, chance))
    columns = {key: zip(*pairs, strict=True) for key, pairs in sums.items()}
    return {key: (float(np.mean(values)), float(np.mean(chances))) for key, (values, chances) in columns.items()}
