"""Several finetunes of one base: what they share, parameter by parameter, and where their updates interfere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import Checkpoint, Entry, open_checkpoint, open_tuned
from specbasis.core.columns import gaussian, generator_of
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.subspace import subspace_overlap
from specbasis.jobs.progress import Progress, Report
from specbasis.jobs.results import opened_by_label
from specbasis.treatment.methods import Delta, leading
from specbasis.treatment.updates import Update, refuse_another_base, updates

Source = str | Path | Mapping[str, Tensor]
MEAN, MERGED = "mean", "merged"
"""What the mean of the finetunes and the merged model are called beside the finetunes."""

DRAWS = 1000
"""Pairs of random directions behind the bound of one update."""


@dataclass(frozen=True, eq=False)
class Finetunes:
    """A base and its finetunes.

    Attributes:
        base: the pretrained checkpoint.
        tuned: label → finetune.
        shared: the base's name of every parameter that all have in its shape → label → update.
        left_out: what is not merged: name, finetune and reason.
    """

    base: Checkpoint
    tuned: Mapping[str, Checkpoint]
    shared: Mapping[str, Mapping[str, Update]]
    left_out: Sequence[Mapping[str, str]]

    @classmethod
    def open(cls, base: Source, tuned: Sequence[Source] | Mapping[str, Source], progress: Report) -> Finetunes:
        """Open the finetunes, and read each once.

        Raises:
            InputError: there is none, one cannot be read, holds NaN or Inf, or is of another base; a name is taken;
                or nothing differs from the base.
        """
        sources = list(tuned.values() if isinstance(tuned, Mapping) else tuned)
        if isinstance(tuned, str | Path) or not sources or isinstance(sources[0], Tensor):
            raise InputError("got no list of finetunes; want [TUNED, …], or {NAME: TUNED, …}")
        pretrained = open_checkpoint(base)
        _, by_label = opened_by_label(tuned, lambda source: open_tuned(source, pretrained))
        if taken := {MEAN, MERGED}.intersection(by_label):
            raise InputError(
                f"got a finetune called {taken.pop()!r}, as the merged ones are; give it another NAME="
            )
        # A weight that is stored twice is one matrix to `updates`; here both are, so that they stay equal.
        tied = {ref.parameter: (ref,) for ref in model_map(pretrained).shared}
        by_finetune = {
            label: [replace(c, refs=tied.get(c.counterpart, c.refs)) for c in updates(pretrained, checkpoint)]
            for label, checkpoint in by_label.items()
        }
        for label, changes in by_finetune.items():
            for done, change in enumerate(changes):
                progress(Progress(done, len(changes), f"reading {label}: {change.name}"))
                if not change.reason and change.counterpart and isnan(change.squares[0]):
                    raise NonFiniteError(
                        f"{label}: {change.name} holds NaN or Inf here or in the base; leave it out"
                    )
            refuse_another_base(pretrained, by_label[label], changes)
        finetunes = cls(pretrained, by_label, *_sorted(pretrained, by_finetune))
        if not finetunes.changed:
            raise InputError(
                "the finetunes share no parameter that differs from the base; there is nothing to merge"
            )
        return finetunes

    def model(self, entry: Callable[[str], Entry], head: str = "") -> Checkpoint:
        """The base, or the finetune ``head`` with all that is its own, with other numbers for what is shared.

        Args:
            entry: from the base's name of a shared parameter to its numbers.
            head: a label; empty for the base.
        """
        model = self.tuned[head] if head else self.base
        return replace(model, entries={**model.entries, **{self.name(n, head): entry(n) for n in self.shared}})

    def name(self, name: str, head: str) -> str:
        """What a finetune, or the base, calls a shared parameter."""
        return self.shared[name][head].name if head else name

    def deltas(self, name: str) -> dict[str, Delta]:
        """Label → update of a shared parameter, read now."""
        return {
            label: Delta(factors=factors)
            if change.is_matrix and (factors := change.factors()) is not None
            else Delta(change.delta())
            for label, change in self.shared[name].items()
        }

    @cached_property
    def changed(self) -> list[str]:
        """The shared parameters that any finetune changed."""
        return [name for name, changes in self.shared.items() if any(c.is_changed for c in changes.values())]

    def line(self, name: str, deltas: Mapping[str, Delta], ranks: int = 0) -> dict[str, Any]:
        """How the updates of one parameter stand to each other; of a matrix, with ranks, direction by direction.

        Returns:
            name, role, block, shape; norms: label → ‖Δ‖; pairs: see `_pair`.
        """
        change = next(iter(self.shared[name].values()))
        norms = {label: float(delta.matrix.norm()) for label, delta in deltas.items()}
        pairs = []
        for a, b in combinations(deltas, 2):
            of_both = (deltas[a], deltas[b])
            pairs.append({"pair": [a, b], **_pair(*of_both, norms[a] * norms[b])})
            if ranks and change.is_matrix and norms[a] and norms[b]:
                pairs[-1] |= _directions(of_both, ranks)
        return {
            "name": name,
            "role": change.role if change.is_matrix else "vectors",
            "block": change.block,
            "shape": list(change.matrix_shape if change.is_matrix else change.shape),
            "norms": norms,
            "pairs": pairs,
        }


def _sorted(
    base: Checkpoint, by_finetune: Mapping[str, Sequence[Update]]
) -> tuple[dict[str, dict[str, Update]], list[dict[str, str]]]:
    """What all finetunes have as the base has it, and what not, with the reason."""
    left_out = []
    by_name: dict[str, dict[str, Update]] = {name: {} for name, entry in base.entries.items() if entry.is_float}
    for label, changes in by_finetune.items():
        for change in changes:
            if change.reason or change.counterpart not in by_name:
                reason = change.reason or "the base has none of this shape"
                left_out.append({"name": change.name, "finetune": label, "reason": reason})
            else:
                by_name[change.counterpart][label] = change
    for name, own in by_name.items():
        if len(own) < len(by_finetune) and any(change.is_changed for change in own.values()):
            lacking = ", ".join(label for label in by_finetune if label not in own)
            reason = f"the base's is kept: {lacking} has none of this shape"
            left_out.append({"name": name, "finetune": ", ".join(own), "reason": reason})
    return {name: own for name, own in by_name.items() if len(own) == len(by_finetune)}, left_out


def _pair(a: Delta, b: Delta, norms: float) -> dict[str, Any]:
    """Two updates entry by entry.

    Returns:
        cosine: ⟨Δ_a, Δ_b⟩ / ‖Δ_a‖ ‖Δ_b‖; of random updates with the same singular values 0 ± 1/√(out·in).
        conflicts: of the entries that both change the share with opposite signs; of random updates 1/2.
    """
    product = a.matrix * b.matrix
    both = int((product != 0).sum())
    return {
        "cosine": float(product.sum()) / norms if norms else None,
        "conflicts": int((product < 0).sum()) / both if both else None,
    }


def _directions(deltas: tuple[Delta, Delta], ranks: int) -> dict[str, Any]:
    """Two updates, neither of them zero, in the leading directions of each other.

    Returns:
        overlap: of the leading subspaces, mean over both sides; chance, that of random ones. response: for each
        leading triplet (u, σ, v) of the first uᵀ Δ v / σ with the second's Δ, and of the second likewise. 1: the
        other does the same there; below 0: it undoes it. agree, fight: the share of these directions where the
        response is beyond 95 % of those of random updates with the same singular values: 2.5 % each by chance.
    """
    svds = [leading(delta.svd, ranks) for delta in deltas]
    k = min(len(svd.S) for svd in svds)
    overlaps = [subspace_overlap(*(svd.vectors(side, k) for svd in svds)) for side in ("left", "right")]
    responses, signs = [], []
    for svd, other in ((svds[0], deltas[1]), (svds[1], deltas[0])):
        values = ((svd.U.mT @ other.matrix) * svd.Vh).sum(1)
        signs.append(torch.where(values.abs() > _bound(other), values.sign(), 0.0))
        responses.append((values / svd.S).tolist())
    ways = torch.cat(signs)
    return {
        "overlap": sum(overlaps) / 2,
        "chance": k * sum(1 / d for d in deltas[0].matrix.shape) / 2,
        "agree": float((ways > 0).double().mean()),
        "fight": float((ways < 0).double().mean()),
        "response": responses,
    }


def _bound(delta: Delta) -> float:
    """What |uᵀ Δ v| of independent uniform directions u and v stays below in 95 % of all draws.

    Uniform directions do not see the singular vectors: uᵀ Δ v = Σ σ_j x_j y_j with uniform unit vectors x and y.
    """
    S, generator = delta.svd.S, generator_of("directions")
    x, y = (normalize(gaussian(DRAWS, d, generator))[:, : len(S)] for d in delta.matrix.shape)
    return float((x * S * y).sum(1).abs().quantile(0.95))
