"""How every two of some checkpoints are related: what they have in common, read once, and figures of each two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from specbasis.architecture.key import MatrixKey, MatrixRef
from specbasis.architecture.pair import pair
from specbasis.checkpoint import Checkpoint
from specbasis.comparison.verdict import RELATED_COSINE, RELATED_SIGMAS, UNTESTED_COSINE, copy_form
from specbasis.core.blocks import unit_scale
from specbasis.core.entries import LEAST_SIDE, read_entries
from specbasis.core.errors import InputError
from specbasis.core.subspace import chance_alignment
from specbasis.core.svd import half_svd

SAMPLED = 8
"""Matrices in which the alignment of leading vectors, the order of rows and the form are looked at."""

RANKS = 10
"""Leading ranks whose vectors are aligned."""

_CHUNK = 2**22  # entries of all models together that are in memory at a time

Places = dict[int, MatrixRef]
"""Number of a checkpoint → where it holds a matrix."""


@dataclass(frozen=True)
class Kinship:
    """How two checkpoints are related.

    Attributes:
        first, second: their names.
        matrices: how many they have in common.
        cosine: of their weights, median over matrices; chance is 0.
        z: that cosine in standard deviations of random orders, median; NaN where the cosine alone decides.
        distance: ‖first − second‖ / ‖·‖, over all weights, each matrix scaled to its mean norm.
        alignment: of the leading `RANKS` vectors, both sides, mean over sampled matrices.
        chance: what independent directions would give there.
        related: whether their weights correspond.
        form: in what form second holds the weights of first ("rounded to bfloat16", …), or first those of second,
            behind a "<"; empty where neither.
    """

    first: str
    second: str
    matrices: int
    cosine: float
    z: float
    distance: float
    alignment: float
    chance: float
    related: bool
    form: str = ""


@dataclass(frozen=True, eq=False)
class Shared:
    """Some checkpoints, and the matrices that they have in common. A checkpoint is called by its number.

    Attributes:
        opened: the checkpoints.
        names: their names.
        matrices: matrix → checkpoint → where it is.
        grown: (a, b) where b has more rows than a.
        notes: what fits nothing.
    """

    opened: Sequence[Checkpoint]
    names: Sequence[str]
    matrices: Mapping[MatrixKey, Places]
    grown: frozenset[tuple[int, int]]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, opened: Sequence[Checkpoint], names: Sequence[str]) -> Shared:
        """Find what some checkpoints have in common.

        The first checkpoint of an architecture stands for all of it: who has its names is read by its roles.

        Raises:
            InputError: nothing.
        """
        matrices: dict[MatrixKey, Places] = {}
        grown: set[tuple[int, int]] = set()
        notes, waiting = [], list(range(len(opened)))
        while waiting:
            first, *others = waiting
            waiting = []
            for other in others:
                try:
                    matched = pair(opened[first], opened[other], common_rows=True).matched
                except InputError:
                    matched = ()
                if not matched:
                    waiting.append(other)
                for m in matched:
                    matrices.setdefault(m.key, {first: m.base})[other] = m.tuned
                    before, after = (
                        opened[k].entries[ref.parameter].shape[0] for k, ref in ((first, m.base), (other, m.tuned))
                    )
                    if before != after:
                        grown.add((first, other) if before < after else (other, first))
            if not any(first in places for places in matrices.values()):
                notes.append(f"{names[first]}: no matrix in common with the others")
        if not matrices:
            raise InputError(f"no matrix in common by name and shape among {', '.join(names[:4])}")
        return cls(opened, names, matrices, frozenset(grown), tuple(notes))

    def kinships(self, *, align: bool) -> dict[tuple[int, int], Kinship]:
        """The figures of every two checkpoints with matrices in common, the earlier one first."""
        sums = Sums(len(self.opened))
        for key, places in self.matrices.items():
            sums.add(key, {k: ref.read(self.opened[k]) for k, ref in sorted(places.items())})
        vectors = self._leading if align else {}
        return {
            (i, j): self._kinship(i, j, sums, vectors)
            for i, j in itertools.combinations(range(len(self.opened)), 2)
            if sums.count[i, j]
        }

    def _kinship(self, i: int, j: int, sums: Sums, vectors: Mapping[MatrixKey, Mapping[int, Sides]]) -> Kinship:
        cosines = {key: cosine for key, cosine in sums.cosines[i, j].items() if not math.isnan(cosine)}
        cosine = float(np.median(list(cosines.values()))) if cosines else math.nan
        # Far from both the cosines of trainings of their own and those of gentle finetunes the order is tested.
        related, z = cosine >= UNTESTED_COSINE, math.nan
        if RELATED_COSINE <= cosine < 2 * UNTESTED_COSINE:
            z = self._order(i, j, list(cosines))
            related = z >= RELATED_SIGMAS
        scale = math.sqrt((sums.first[i, j] + sums.first[j, i]) / 2)
        sides = [xy for of in vectors.values() if {i, j} <= of.keys() for xy in zip(of[i], of[j], strict=True)]
        return Kinship(
            self.names[i],
            self.names[j],
            int(sums.count[i, j]),
            cosine,
            z,
            math.sqrt(sums.distance[i, j]) / scale,
            float(np.mean([float((X * Y).sum(0).abs().mean()) for X, Y in sides])) if sides else math.nan,
            float(np.mean([chance_alignment(len(X)) for X, _ in sides])) if sides else math.nan,
            bool(related),
            self._form(i, j) if related else "",
        )

    @cached_property
    def _leading(self) -> dict[MatrixKey, dict[int, Sides]]:
        """Leading vectors of every checkpoint in a few matrices spread over those that most have."""
        by_name = sorted(self.matrices.items(), key=lambda item: (-len(item[1]), item[0].name))
        wide = [key for key, places in by_name if min(next(iter(places.values())).shape) >= 2 * RANKS]
        wide = [key for key in wide if len(self.matrices[key]) == len(self.matrices[wide[0]])]
        vectors: dict[MatrixKey, dict[int, Sides]] = {}
        for key in _spread(wide):
            rows = min(ref.shape[0] for ref in self.matrices[key].values())
            for k, ref in self.matrices[key].items():
                W = ref.read(self.opened[k])[:rows]
                if bool(torch.isfinite(W).all()) and float(W.abs().max()) > 0:
                    s = half_svd(W, RANKS, name=f"{key.name} in {self.opened[k].source}")
                    sides = (s.vectors("left", RANKS), s.vectors("right", RANKS))
                    vectors.setdefault(key, {})[k] = sides
        return vectors

    def _sample(self, i: int, j: int, keys: Sequence[MatrixKey]) -> list[tuple[Tensor, Tensor]]:
        """Both sides of a few matrices that both have, the small ones left out: these are read once more."""
        keys = [key for key in keys if {i, j} <= self.matrices[key].keys()]
        keys = sorted(keys, key=lambda key: math.prod(self.matrices[key][i].shape))
        sample = []
        for key in _spread([key for key in keys if min(self.matrices[key][i].shape) >= LEAST_SIDE] or keys):
            W, T = (self.matrices[key][k].read(self.opened[k]) for k in (i, j))
            rows = min(len(W), len(T))
            sample.append((W[:rows], T[:rows]))
        return sample

    def _order(self, i: int, j: int, keys: Sequence[MatrixKey]) -> float:
        """Median over sampled matrices of the cosine, in standard deviations of random orders."""
        z = [read_entries(W, T).figures["weight_cosine_z"] for W, T in self._sample(i, j, keys)]
        z = [value for value in z if not math.isnan(value)]
        return float(np.median(z)) if z else math.nan

    def _form(self, i: int, j: int) -> str:
        """In what form one holds the weights of the other, where all sampled matrices say the same."""
        forms: set[str] = set()
        for W, T in self._sample(i, j, list(self.matrices)):
            if torch.equal(W.double(), T.double()):
                continue
            form = _copy(W, T) or (f"<{reverse}" if (reverse := _copy(T, W)) else "")
            forms.add(form)
            if forms != {form} or not form:
                return ""
        return forms.pop() if forms else "equal"


Sides = tuple[Tensor, Tensor]
"""Leading vectors of a matrix, left and right."""


class Sums:
    """Sums over all matrices, each scaled to its mean squared norm, for every two checkpoints that both have it."""

    def __init__(self, n: int) -> None:
        self.first = np.zeros((n, n))  # Σ w ‖X_i‖², over the matrices that i and j have in common
        self.distance = np.zeros((n, n))  # Σ w ‖X_i − X_j‖²
        self.count = np.zeros((n, n), int)
        self.cosines: dict[tuple[int, int], dict[MatrixKey, float]] = {}

    def add(self, key: MatrixKey, matrices: Mapping[int, Tensor]) -> None:
        """Take in one matrix of every checkpoint that has it, a part at a time."""
        who = list(matrices)
        rows = min(len(X) for X in matrices.values())
        flat = [X[:rows].reshape(-1) for X in matrices.values()]
        size, step, scale = len(flat[0]), max(1, _CHUNK // len(who)), unit_scale(*flat)
        gram = np.zeros((len(who), len(who)))
        apart = np.zeros_like(gram)
        for start in range(0, size, step):
            X = torch.stack([x[start : start + step].to(torch.float64) for x in flat]) * scale
            gram += (X @ X.mT).numpy()
            # Differences to the first have more digits than the Gram matrix where all are near it.
            D = X - X[:1]
            inner = (D @ D.mT).numpy()
            square = np.diag(inner)
            apart += square[:, None] + square[None, :] - 2 * inner
        norms = np.diag(gram)
        if not np.isfinite(norms).all() or norms.mean() == 0:
            return
        weight = size / norms.mean()
        at = np.ix_(who, who)
        self.first[at] += weight * norms[:, None]
        self.distance[at] += weight * apart.clip(min=0)
        self.count[at] += 1
        for (a, i), (b, j) in itertools.combinations(enumerate(who), 2):
            product = math.sqrt(norms[a] * norms[b])
            self.cosines.setdefault((i, j), {})[key] = float(gram[a, b]) / product if product else math.nan


def _copy(W: Tensor, T: Tensor) -> str:
    """In what form T holds the weights of W; empty where it does not, or where it is W that lost something."""
    form = copy_form({"out": len(W), "in": W.shape[1], "size": W.numel(), **read_entries(W, T).figures})
    return "" if "base is" in form else form


def _spread(keys: Sequence[MatrixKey]) -> list[MatrixKey]:
    """At most `SAMPLED` of some matrices, evenly spaced."""
    return [keys[int(k)] for k in np.unique(np.linspace(0, len(keys) - 1, min(SAMPLED, len(keys))).round())]
