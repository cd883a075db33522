"""How many ranks each matrix gets: captured energy for stored bytes, over all matrices together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specbasis.core.statistics import Array

TRIALS = 200_000
"""How many choices are tried at most. What then is left untried is better by less than one direction."""


def ranks_within(energies: Sequence[Array], costs: Sequence[int], budget: int) -> list[int]:
    """Ranks that capture the most energy for at most so many bytes.

    Maximise Σ_m Σ_{i<r_m} e_{m,i} subject to Σ_m r_m c_m ≤ budget: a knapsack. Directions of equal cost compete
    by energy alone, so that of each cost only the number n has to be found. With λ the ratio e / c at which the
    budget ends, no choice has more than λ budget + Σ_c max_n φ_c(n), where φ_c(n) is the energy of the leading n
    directions of cost c less λ c n. A choice is short of that by λ times the bytes that it leaves and by what each
    φ_c falls short: branch and bound over the costs, nearest first, is exact.

    Args:
        energies: of each matrix the energy of its directions, σ², descending.
        costs: of each matrix the bytes of one direction.
        budget: bytes.

    Source: Dantzig 1957 (the linear bound).
    """
    energy, cost, owner = _flat(energies, costs)
    classes = [_Class.of(energy[cost == c], c) for c in sorted(set(cost.tolist()), reverse=True)]
    if not classes:
        return [0] * len(energies)
    order = np.argsort(-energy / cost, kind="stable")
    whole = int(np.searchsorted(np.cumsum(cost[order]), budget, side="right"))
    ratio = 0.0 if whole == len(order) else energy[order[whole]] / cost[order[whole]]
    counts = _Search(classes, ratio).best(budget)
    taken = np.zeros(len(energy), dtype=bool)
    for members, count in zip(classes, counts, strict=True):
        own = np.flatnonzero(cost == members.cost)
        taken[own[np.argsort(-energy[own], kind="stable")[:count]]] = True
    return _counts(owner, taken, len(energies))


def ranks_for(energies: Sequence[Array], costs: Sequence[int], share: float) -> list[int]:
    """Ranks that capture a share of all energy, in the order of energy for stored bytes.

    At most one direction is stored more than the least bytes would ask for.
    """
    energy, cost, owner = _flat(energies, costs)
    order = np.argsort(-energy / cost, kind="stable")
    captured = np.cumsum(energy[order])
    taken = np.zeros(len(energy), dtype=bool)
    if len(order):
        enough = int(np.searchsorted(captured, share * captured[-1] * (1 - 1e-12)))
        taken[order[: enough + 1]] = True
    return _counts(owner, taken, len(energies))


@dataclass(frozen=True, eq=False)
class _Class:
    """Directions of one cost: ``energy[n]`` is what the leading n hold."""

    cost: float
    energy: Array

    @classmethod
    def of(cls, energies: Array, cost: float) -> _Class:
        return cls(cost, np.concatenate([[0.0], np.cumsum(np.sort(energies)[::-1])]))


class _Search:
    """Branch and bound over the number of directions of each cost."""

    def __init__(self, classes: Sequence[_Class], ratio: float) -> None:
        self.classes, self.ratio = classes, ratio
        falls = [c.energy - ratio * c.cost * np.arange(len(c.energy)) for c in classes]
        self.losses = [fall.max() - fall for fall in falls]
        self.nearest = [np.argsort(loss, kind="stable") for loss in self.losses]
        self.loss, self.counts, self.trials = np.inf, [0] * len(classes), 0

    def best(self, budget: float) -> list[int]:
        """The numbers of directions that lose least against the bound."""
        self._try([], budget, 0.0)
        return self.counts

    def _try(self, chosen: list[int], left: float, loss: float) -> None:
        at = len(chosen)
        cost, losses = self.classes[at].cost, self.losses[at]
        if at == len(self.classes) - 1:  # as many of the cheapest as fit: each of them adds energy
            n = min(int(left // cost), len(losses) - 1)
            total = loss + losses[n] + self.ratio * (left - n * cost)
            if total < self.loss:
                self.loss, self.counts = total, [*chosen, n]
            return
        for n in self.nearest[at]:
            if loss + losses[n] >= self.loss or self.trials >= TRIALS:
                return
            self.trials += 1
            if n * cost <= left:
                self._try([*chosen, int(n)], left - n * cost, loss + losses[n])


def _flat(energies: Sequence[Array], costs: Sequence[int]) -> tuple[Array, Array, Array]:
    """Energy, cost and matrix of each direction that has any energy."""
    owner = np.concatenate([np.full(len(e), m) for m, e in enumerate(energies)] or [np.zeros(0, dtype=int)])
    energy = np.concatenate([np.asarray(e, dtype=np.float64) for e in energies] or [np.zeros(0)])
    kept = energy > 0
    return energy[kept], np.asarray(costs, dtype=np.float64)[owner[kept].astype(int)], owner[kept]


def _counts(owner: Array, taken: Array, matrices: int) -> list[int]:
    return [int(n) for n in np.bincount(owner[taken].astype(int), minlength=matrices)]
