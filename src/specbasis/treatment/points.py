"""Ways from a finetune back towards its base, each as a model whose tensors are made when they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from specbasis.checkpoint import Checkpoint
from specbasis.core import edits
from specbasis.core.intruders import intruders
from specbasis.jobs.cache import Cache
from specbasis.treatment.updates import Update, base_entries, updates

SHARES = (0.1, 0.25, 0.5, 1.0)
STRENGTHS = tuple(round(0.1 * i, 1) for i in range(1, 10))
ENERGIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
DEPTHS = {"all": (0.0, 1.0), "lower": (0.0, 0.5), "upper": (0.5, 1.0)}
"""Which blocks, as shares of their number."""

INTERPOLATION = "interpolation"
"""The baseline: what every other way has to beat."""


def grid() -> list[dict[str, Any]]:
    """Every point that is tried, the baselines among them, as rows of the results have it.

    interpolation: base + amount · delta, in every parameter (WiSE-FT); truncation: base + the leading directions of
    each matrix's delta that hold this share of its square; directions: the base's singular vectors put back in this
    share of the leading ranks, values stay tuned; intruders: singular values of directions that the base does not
    have, multiplied by amount.
    """
    points: list[dict[str, Any]] = [{"way": INTERPOLATION, "amount": x, "blocks": "all"} for x in STRENGTHS]
    points += [{"way": "truncation", "amount": x, "blocks": "all"} for x in ENERGIES]
    points += [{"way": "directions", "amount": x, "blocks": depth} for x in SHARES for depth in DEPTHS]
    return points + [{"way": "intruders", "amount": x, "blocks": "all"} for x in (0.0, 0.5)]


@dataclass(frozen=True, eq=False)
class Ways:
    """A finetune, its base, and the decompositions that all points share.

    Attributes:
        base: the pretrained checkpoint.
        tuned: the finetune.
        changes: what differs between them.
        cache: where decompositions are kept: a point costs its products and its evaluation.
    """

    base: Checkpoint
    tuned: Checkpoint
    changes: tuple[Update, ...]
    cache: Cache

    @classmethod
    def of(cls, base: Checkpoint, tuned: Checkpoint, cache: Cache) -> Ways:
        """What differs between two checkpoints."""
        changed = (c for c in updates(base, tuned) if c.in_base and not c.reason and c.is_changed)
        return cls(base, tuned, tuple(changed), cache)

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return 1 + max((c.block for c in self.changes if c.block is not None), default=-1)

    def at(self, point: Mapping[str, Any]) -> tuple[Checkpoint, Checkpoint]:
        """The model at a point, with the finetune's own modules, and with the base's own ones."""
        low, high = (round(share * self.blocks) for share in DEPTHS[point["blocks"]])
        inside = [c for c in self.changes if point["blocks"] == "all" or low <= (c.block or 0) < high]
        if point["way"] != INTERPOLATION:
            inside = [c for c in inside if c.block is not None and c.is_matrix]
        made = {c.name: partial(self._stored, c, point["way"], point["amount"]) for c in inside}
        own, into_base = self.tuned.entries, base_entries(self.base, self.changes, made)
        treated = {name: replace(own[name], load=load, factors=None, part=None) for name, load in made.items()}
        source = f"{self.tuned.source} at {point['way']} {point['amount']} ({point['blocks']})"
        return (
            replace(self.tuned, source=source, entries={**own, **treated}),
            replace(self.base, source=source, entries={**self.base.entries, **into_base}),
        )

    def _stored(self, change: Update, way: str, amount: float) -> Tensor:
        """A treated parameter as the finetune stores it."""
        stored = self.tuned[change.name]
        if way == INTERPOLATION:  # of every parameter, matrix or not
            W = change.as_tuned().double()
            return (W + amount * (stored.double() - W)).to(stored.dtype)
        changed = stored.clone()
        for ref in change.refs:
            own = replace(ref, parameter=change.name)
            T, W = own.read(self.tuned), ref.read(self.base)
            own.write(changed, MATRIX_WAYS[way](self.cache, W, T, amount, ref.key.name).to(stored.dtype))
        return changed


# --- the ways of one matrix, from W (base) and T (tuned) ----------------------------------------------------------


def _truncated(cache: Cache, W: Tensor, T: Tensor, share: float, name: str) -> Tensor:
    delta = cache.decompose(T.double() - W.double(), name=name)
    held = delta.S.square().cumsum(0)
    rank = int((held < share * held[-1]).sum()) + 1
    return W.double() + delta.truncate(min(rank, len(delta.S))).matrix()


def _directed(cache: Cache, W: Tensor, T: Tensor, share: float, name: str) -> Tensor:
    base, tuned = cache.decompose(W, name=name), cache.decompose(T, name=name)
    return edits.replace(T, tuned, base, range(math.ceil(share * len(tuned.S))))


def _damped(cache: Cache, W: Tensor, T: Tensor, factor: float, name: str) -> Tensor:
    base, tuned = cache.decompose(W, name=name), cache.decompose(T, name=name)
    ranks = intruders(base.U, tuned.U)
    return edits.rescale(T, tuned, ranks, factor) if ranks else T.double()


MATRIX_WAYS: dict[str, Callable[[Cache, Tensor, Tensor, float, str], Tensor]] = {
    "truncation": _truncated,
    "directions": _directed,
    "intruders": _damped,
}
