"""How every two of some checkpoints are related: what they have in common, read once, and figures of each two."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtr
from torch import Tensor

from specbasis.architecture.key import MatrixKey, MatrixRef
from specbasis.architecture.pair import pair
from specbasis.checkpoint import Checkpoint
from specbasis.comparison.verdict import LEVEL, RELATED_COSINE, copy_form
from specbasis.core.blocks import unit_scale
from specbasis.core.entries import LEAST_SIDE, read_entries
from specbasis.core.errors import InputError
from specbasis.core.subspace import chance_alignment
from specbasis.core.svd import half_svd

SAMPLED = 8
"""Matrices, of those that moved, in which alignment, order and form are looked at; fewer in a large folder."""

RANKS = 10
"""Leading ranks whose vectors are aligned."""

ORDERS = 8
"""Random orders of rows, and of columns, of each sampled matrix: the null distribution of the inner product."""

LARGE = 100
"""A folder of more checkpoints has half as many matrices tested, and fewer decomposed."""

NEAREST = 4
"""Neighbours of each checkpoint whose form is looked at."""

_ENTRIES = 2**16  # of a sampled matrix, in which its order is tested
_CHUNK = 2**22  # entries of all models together that are in memory at a time

Places = dict[int, MatrixRef]
"""Number of a checkpoint → where it holds a matrix."""

Key = tuple[MatrixKey, int]
"""A matrix and its columns: models of one family have the same names and other sizes."""

Squares = NDArray[np.float64]
"""Of every two checkpoints."""


@dataclass(frozen=True)
class Kinship:
    """How two checkpoints are related.

    Attributes:
        first, second: their names.
        matrices: how many they have in common.
        cosine: of their weights, median over matrices; chance is 0.
        z: by how many standard deviations, over random orders, the inner product of sampled matrices exceeds its
            mean: of rows or of columns, whichever is smaller.
        error: chance that any two unrelated checkpoints of the folder have a z as large (Student's t, Bonferroni).
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
    error: float = math.nan


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
    matrices: Mapping[Key, Places]
    grown: frozenset[tuple[int, int]]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, opened: Sequence[Checkpoint], names: Sequence[str]) -> Shared:
        """Find what some checkpoints have in common.

        The first checkpoint of an architecture stands for all of it: who has its names is read by its roles.

        Raises:
            InputError: nothing.
        """
        matrices: dict[Key, Places] = {}
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
                    matrices.setdefault((m.key, m.base.shape[1]), {first: m.base})[other] = m.tuned
            if not any(first in places for places in matrices.values()):
                notes.append(f"{names[first]}: no matrix in common with the others")
        if not matrices:
            raise InputError(f"no matrix in common by name and shape among {', '.join(names[:4])}")
        for places in matrices.values():
            rows = {k: opened[k].entries[ref.parameter].shape[0] for k, ref in places.items()}
            if len(set(rows.values())) > 1:
                grown |= {(i, j) for i, j in itertools.permutations(rows, 2) if rows[i] < rows[j]}
        return cls(opened, names, matrices, frozenset(grown), tuple(notes))

    @cached_property
    def sums(self) -> Sums:
        """What every matrix adds to the figures of every two checkpoints, each read once."""
        sums = Sums(len(self.opened))
        for key, places in self.matrices.items():
            sums.add(key, {k: ref.read(self.opened[k]) for k, ref in sorted(places.items())})
        return sums

    def kinships(self, *, align: bool) -> dict[tuple[int, int], Kinship]:
        """The figures of every two checkpoints with matrices in common, the earlier one first."""
        sums, pairs = self.sums, list(zip(*np.nonzero(np.triu(self.sums.count, 1)), strict=True))
        cosine = sums.cosine()
        z = self._orders()
        freedom = ORDERS * self._tested(self._samples).clip(min=1)
        error = np.minimum(1.0, len(pairs) * stdtr(freedom, -z))
        related = (error <= LEVEL) & (cosine >= RELATED_COSINE)
        apart = np.sqrt(2 * sums.distance / (sums.first + sums.first.T).clip(min=np.finfo(float).tiny))
        vectors = self._leading if align else {}
        near = np.argsort(np.where(related, apart, np.inf), axis=1)[:, : NEAREST + 1]
        kinships = {}
        for i, j in ((int(i), int(j)) for i, j in pairs):
            known = related[i, j] and (j in near[i] or i in near[j])
            kinships[i, j] = Kinship(
                self.names[i],
                self.names[j],
                int(sums.count[i, j]),
                float(cosine[i, j]),
                float(z[i, j]),
                float(apart[i, j]),
                *self._alignment(i, j, vectors),
                bool(related[i, j]),
                self._form(i, j) if known else "",
                float(error[i, j]),
            )
        return kinships

    @cached_property
    def _samples(self) -> list[list[Key]]:
        """A few matrices, of those that most checkpoints have and that differ between most of them.

        Then a few of those that do so for most of the pairs that are left, which are of another architecture, until
        every two that have a matrix in common have one here.
        """
        many = SAMPLED if len(self.opened) <= LARGE else SAMPLED // 2
        apart = {
            k: a
            for k, a in self.sums.apart.items()
            if min(next(iter(self.matrices[k].values())).shape) >= LEAST_SIDE
        }
        samples: list[list[Key]] = []
        while True:
            left = (self._tested(samples) == 0) & ~np.eye(len(self.opened), dtype=bool)
            moved = {key: int(((a > 0) & left).sum()) for key, a in apart.items()}
            if not any(moved.values()):  # equal in all of them
                moved = {key: int((np.isfinite(a) & left).sum()) for key, a in apart.items()}
            most = max(moved.values(), default=0)
            if not most:
                return samples
            keys = sorted((key for key in moved if moved[key] >= 0.9 * most), key=lambda key: key[0].name)
            samples.append(_spread(keys, many))

    def _tested(self, samples: Sequence[Sequence[Key]]) -> NDArray[np.int64]:
        """How many of some matrices every two checkpoints have."""
        tested = np.zeros((len(self.opened),) * 2, np.int64)
        for key in (key for sample in samples for key in sample):
            tested[np.ix_(*(sorted(self.matrices[key]),) * 2)] += 1
        return tested

    def _orders(self) -> Squares:
        """`Kinship.z`: one draw of an order serves every two checkpoints."""
        n = len(self.opened)
        inner, square = np.zeros((2, n, n)), np.zeros((2, n, n))
        generator = torch.Generator().manual_seed(0)
        for key in (key for sample in self._samples for key in sample):
            places = self.matrices[key]
            holders = sorted(places)
            W = [places[k].read(self.opened[k]).to(torch.float64) for k in holders]
            rows, scale = min(len(X) for X in W), unit_scale(*W)
            rows = min(rows, max(LEAST_SIDE, _ENTRIES // key[1]))
            X = torch.stack([x[:rows] for x in W]) * scale
            X = torch.where(torch.isfinite(X), X, 0.0)
            X = X / torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True).clamp(min=torch.finfo(X.dtype).tiny)
            at = np.ix_(holders, holders)
            for axis in (1, 2):
                Y = (X - X.mean(axis, keepdim=True)).flatten(1)
                inner[axis - 1][at] += (Y @ Y.mT).numpy()
                for _ in range(ORDERS):
                    order = torch.randperm(X.shape[axis], generator=generator)
                    drawn = Y @ Y.reshape(X.shape).index_select(axis, order).flatten(1).mT
                    square[axis - 1][at] += ((drawn.square() + drawn.mT.square()) / 2 / ORDERS).numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            z: Squares = np.nan_to_num((inner / np.sqrt(square)).min(0), nan=0.0)
        return z

    def _alignment(self, i: int, j: int, vectors: Mapping[Key, Mapping[int, Sides]]) -> tuple[float, float]:
        """Of leading vectors, in the sampled matrices that differ between two, and what chance would give."""
        both = [key for key in vectors if {i, j} <= vectors[key].keys()]
        both = [key for key in both if self.sums.apart[key][i, j] > 0] or both
        sides = [xy for key in both for xy in zip(vectors[key][i], vectors[key][j], strict=True)]
        if not sides:
            return math.nan, math.nan
        aligned = [float((X * Y).sum(0).abs().mean()) for X, Y in sides]
        return float(np.mean(aligned)), float(np.mean([chance_alignment(len(X)) for X, _ in sides]))

    @cached_property
    def _leading(self) -> dict[Key, dict[int, Sides]]:
        """Leading vectors of every checkpoint in the sampled matrices."""
        vectors: dict[Key, dict[int, Sides]] = {}
        most = max(1, 8 * LARGE // (2 * len(self.opened)))
        for key in (key for sample in self._samples for key in _spread(sample, most)):
            rows = min(ref.shape[0] for ref in self.matrices[key].values())
            for k, ref in self.matrices[key].items():
                W = ref.read(self.opened[k])[:rows]
                if min(W.shape) >= 2 * RANKS and bool(torch.isfinite(W).all()) and float(W.abs().max()) > 0:
                    s = half_svd(W, RANKS, name=f"{key[0].name} in {self.opened[k].source}")
                    sides = (s.vectors("left", RANKS), s.vectors("right", RANKS))
                    vectors.setdefault(key, {})[k] = sides
        return vectors

    def _form(self, i: int, j: int) -> str:
        """In what form one holds the weights of the other, where all sampled matrices that differ say the same."""
        forms: set[str] = set()
        keys = [key for key in self.matrices if {i, j} <= self.matrices[key].keys()]
        differ = [key for key in keys if key in self.sums.apart and self.sums.apart[key][i, j] > 0]
        large = [key for key in differ if min(self.matrices[key][i].shape) >= LEAST_SIDE]
        for key in _spread(large or differ, SAMPLED):
            W, T = (self.matrices[key][k].read(self.opened[k]) for k in (i, j))
            rows = min(len(W), len(T))
            form = _copy(W[:rows], T[:rows]) or (f"<{back}" if (back := _copy(T[:rows], W[:rows])) else "")
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
        self.apart: dict[Key, Squares] = {}  # the part of each matrix in the distance; NaN where one has it not
        self._cosines: list[Squares] = []

    def cosine(self) -> Squares:
        """Median over matrices."""
        n = len(self.count)
        if not self._cosines:
            return np.full((n, n), math.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # two that have nothing in common
            cosine: Squares = np.nanmedian(np.stack(self._cosines), 0)
        return cosine

    def add(self, key: Key, matrices: Mapping[int, Tensor]) -> None:
        """Take in one matrix of every checkpoint that has it, a part at a time."""
        holders = list(matrices)
        rows = min(len(X) for X in matrices.values())
        flat = [X[:rows].reshape(-1) for X in matrices.values()]
        size, step, scale = len(flat[0]), max(1, _CHUNK // len(holders)), unit_scale(*flat)
        gram = np.zeros((len(holders), len(holders)))
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
        at = np.ix_(holders, holders)
        self.first[at] += weight * norms[:, None]
        self.distance[at] += weight * apart.clip(min=0)
        self.count[at] += 1
        self.apart[key] = np.full(self.count.shape, math.nan)
        self.apart[key][at] = weight * apart.clip(min=0)
        cosine = np.full(self.count.shape, math.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine[at] = gram / np.sqrt(np.outer(norms, norms))
        self._cosines.append(cosine)


def _copy(W: Tensor, T: Tensor) -> str:
    """In what form T holds the weights of W; empty where it does not, or where it is W that lost something."""
    entries = read_entries(W, T)
    size = {"out": len(W), "in": W.shape[1], "size": W.numel()}
    norms = {f"norm_{which}": norm for which, norm in entries.norms.items()}
    update = norms["norm_delta"] / norms["norm_base"] if norms["norm_base"] else math.nan
    form = copy_form({**size, **norms, "relative_update": update, **entries.figures})
    return "" if "base is" in form else form


def _spread(keys: Sequence[Key], most: int) -> list[Key]:
    """At most so many of some matrices, evenly spaced."""
    return [keys[int(k)] for k in np.unique(np.linspace(0, len(keys) - 1, min(most, len(keys))).round())]
