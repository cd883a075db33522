"""Rows of a comparison, column by column, as the arrays that figures and page show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from specbasis.architecture.key import ROLES

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SIDES = ("left", "right")

MARKED_RANKS = (1, 2, 5, 10, 20, 50, 100, 200)
"""1-based ranks at which a reader can ask for one point per matrix; never thinned out."""

LEADING = 200
"""Ranks shown where a figure counts ranks one by one (Yu et al. 2026, Fig. 8 and 16B)."""

BESIDE = tuple(
    f"{kind}_{side}"
    for kind in ("null_alignment_gaussian", "null_alignment_rounding", "predicted_alignment")
    for side in SIDES
)
"""Measures that stand beside the alignment by rank, where they were taken."""

QUANTILES = (np.arange(100) + 0.5) / 100
"""Where figures over relative rank are read: the middles of one hundred equal parts of the spectrum."""


NEEDS = {
    "alignment": ("alignment_",),
    "heat": ("alignment_",),
    "overlap": ("subspace_overlap_",),
    "change": ("singular_value_change",),
    "variance": ("explained_variance_",),
    "equal": ("alignment_",),
    "scatter": ("alignment_", "singular_value_ratio"),
    "spectra": ("singular_value_",),
    "single": ("alignment_",),
    "angles": ("subspace_overlap_",),
}
"""Figure of the page → beginnings of the names of measures; without rows of each it would be empty."""


@dataclass(frozen=True, eq=False)
class Series:
    """One measure of one pair for all matrices, one matrix after the other.

    Attributes:
        start: (matrices + 1) where each matrix begins.
        index: 0-based rank, or k; −1 for a figure of the whole matrix.
        value: the figures.
        bound: bounds on their numerical error, NaN where there is none.
        resolved: whether the bound is small; True where there is none.
    """

    start: Ints
    index: Ints
    value: Floats
    bound: Floats
    resolved: Bools

    @property
    def lengths(self) -> Ints:
        """How many figures each matrix has."""
        return np.diff(self.start)

    @cached_property
    def matrix(self) -> Ints:
        """Which matrix each figure belongs to."""
        return np.repeat(np.arange(len(self.start) - 1), self.lengths)

    def dense(self, width: int) -> Floats:
        """(matrices, width) resolved figures by index, NaN where there is none."""
        out = np.full((len(self.start) - 1, width), np.nan)
        keep = self.resolved & (self.index >= 0) & (self.index < width)
        out[self.matrix[keep], self.index[keep]] = self.value[keep]
        return out

    def at_quantiles(self) -> Floats:
        """(matrices, quantiles) figures at relative ranks: that of rank ⌊q·n⌋, NaN for a matrix without any."""
        n = self.lengths[:, None]
        out = np.full((len(n), len(QUANTILES)), np.nan)
        present = self.lengths > 0
        position = self.start[:-1, None] + np.floor(QUANTILES[None, :] * n).astype(np.int64)
        out[present] = self.value[position[present]]
        return out

    def thinned(self, limit: int) -> Series:
        """At most about ``limit`` ranks of a matrix: the leading half of them, and an even choice of the rest."""
        lengths = self.lengths
        if not len(lengths) or lengths.max() <= limit:
            return self
        keep = np.ones(len(self.index), bool)
        for n in np.unique(lengths[lengths > limit]):
            chosen = np.zeros(n, bool)
            head = limit // 2
            chosen[:head] = True
            chosen[np.linspace(head, n - 1, limit - head).round().astype(int)] = True
            chosen[[rank - 1 for rank in MARKED_RANKS if rank <= n]] = True
            of_this_length = (lengths == n)[self.matrix]
            keep[of_this_length] = chosen[self.index[of_this_length]]
        start = np.concatenate([[0], np.cumsum(np.bincount(self.matrix[keep], minlength=len(lengths)))])
        return Series(start, self.index[keep], self.value[keep], self.bound[keep], self.resolved[keep])


@dataclass(frozen=True, eq=False)
class Band:
    """Median and quartiles over matrices, at each of several places on an axis.

    Attributes:
        x: the places: 1-based ranks, numbers of ranks k, or relative ranks.
        low, median, high: quartiles of the finite figures there.
        count: how many matrices have one.
    """

    x: Floats
    low: Floats
    median: Floats
    high: Floats
    count: Ints


@dataclass(frozen=True, eq=False)
class Pair:
    """All rows of one pair.

    Attributes:
        label: label of the tuned checkpoint.
        rows: its rows.
        matrices: columns name, stack, block (None outside of blocks), role, out, in; one entry per matrix.
        series: the measures, by name; one that has no rows is absent.
        own: names of a user's own measures.
    """

    label: str
    rows: pa.Table
    matrices: dict[str, list[Any]]
    series: dict[str, Series]
    own: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.matrices["name"])

    def figures(self, measure: str) -> Series:
        """The rows of a measure; an empty series where there are none."""
        if measure in self.series:
            return self.series[measure]
        none = np.zeros(0)
        return Series(np.zeros(len(self) + 1, np.int64), none.astype(np.int64), none, none, none.astype(bool))

    def whole(self, measure: str) -> Floats:
        """One figure for each matrix, NaN where there is none."""
        series = self.figures(measure)
        out = np.full(len(self), np.nan)
        out[series.matrix] = series.value
        return out

    def at_rank(self, measure: str, rank: int) -> Floats:
        """The resolved figure of each matrix at a 1-based rank, NaN where there is none."""
        series = self.figures(measure)
        keep = (series.index == rank - 1) & series.resolved
        out = np.full(len(self), np.nan)
        out[series.matrix[keep]] = series.value[keep]
        return out

    def vectors(self) -> int:
        """The largest number of ranks whose singular vectors were compared."""
        return max((int(self.figures(f"alignment_{side}").lengths.max(initial=0)) for side in SIDES), default=0)

    def groups(self) -> Iterator[tuple[str, Bools]]:
        """All matrices, then those of each role that is present."""
        roles = np.array(self.matrices["role"], dtype=object)
        yield "all", np.ones(len(self), bool)
        for role in ROLES:
            if (roles == role).any():
                yield role, roles == role

    def panels(self) -> list[tuple[str, str, list[int]]]:
        """(stack, role, matrices by block): the panels of the heat map, roles in the order of `ROLES`."""
        found: dict[tuple[str, str], list[int]] = {}
        stacks = sorted(dict.fromkeys(self.matrices["stack"]), key=lambda stack: stack != "encoder")
        for i, (stack, role) in enumerate(zip(self.matrices["stack"], self.matrices["role"], strict=True)):
            found.setdefault((stack, role), []).append(i)
        block = self.matrices["block"]
        return [
            (stack, role, sorted(found[stack, role], key=lambda i: (block[i] is None, block[i] or 0)))
            for role in ROLES
            for stack in stacks
            if (stack, role) in found
        ]

    def chance_levels(self, side: str, most: int = 4) -> list[tuple[int, float, int]]:
        """(dimension, chance alignment, matrices) of the commonest dimensions, largest level first."""
        dimension = np.array(self.matrices["out" if side == "left" else "in"], np.int64)
        level = self.whole(f"chance_alignment_{side}")
        values, first, counts = np.unique(dimension, return_index=True, return_counts=True)
        common = np.argsort(-counts, kind="stable")[:most]
        levels = [(int(values[c]), float(level[first[c]]), int(counts[c])) for c in sorted(common)]
        return [entry for entry in levels if np.isfinite(entry[1])]


def read_pairs(rows: pa.Table, labels: list[str], own: tuple[str, ...] = ()) -> list[Pair]:
    """The pairs with these labels, each with its matrices in the order of the rows."""
    return [replace(_pair(label, rows.filter(pc.field("pair") == label)), own=own) for label in labels]


def missing(pairs: Sequence[Pair]) -> list[str]:
    """The figures of the page for which no pair has rows."""
    measures = {measure for pair in pairs for measure in pair.series}
    return [
        name
        for name, starts in NEEDS.items()
        if not all(any(measure.startswith(start) for measure in measures) for start in starts)
    ]


def bands(pair: Pair) -> dict[str, dict[str, Band]]:
    """Medians and quartiles over matrices, for all of them and for each role: {profile: {group: band}}.

    Profiles: ``alignment_SIDE`` by rank; ``subspace_overlap_SIDE`` by k; ``singular_value_change`` and
    ``explained_variance_WHICH`` by relative rank; ``explained_variance_WHICH_leading`` by rank.
    """
    shown = np.arange(1, min(LEADING, _longest(pair)) + 1)
    sources: dict[str, tuple[Floats, Floats]] = {}
    for side in SIDES:
        aligned = pair.figures(f"alignment_{side}").thinned(2 * LEADING)
        width = int(aligned.index.max(initial=-1)) + 1
        columns = np.unique(aligned.index)
        sources[f"alignment_{side}"] = (columns + 1).astype(np.float64), aligned.dense(width)[:, columns]
        overlap = pair.figures(f"subspace_overlap_{side}")
        # The last k of a small matrix is its own: there, a median would be over few others.
        sizes, counts = np.unique(overlap.index, return_counts=True)
        sizes = sizes[2 * counts >= counts.max(initial=0)]
        sources[f"subspace_overlap_{side}"] = (
            sizes.astype(float),
            overlap.dense(int(overlap.index.max(initial=-1)) + 1)[:, sizes],
        )
    for name in (*BESIDE, *own_ranks(pair)):
        if name in pair.series:
            beside = pair.figures(name).thinned(2 * LEADING)
            columns = np.unique(beside.index)
            values = beside.dense(int(beside.index.max(initial=-1)) + 1)[:, columns]
            sources[name] = (columns + 1).astype(np.float64), values
    sources["singular_value_change"] = QUANTILES, pair.figures("singular_value_change").at_quantiles()
    for which in ("base", "tuned"):
        variance = pair.figures(f"explained_variance_{which}")
        sources[f"explained_variance_{which}"] = QUANTILES, variance.at_quantiles()
        leading = variance.dense(len(shown))
        # Beyond its last rank a matrix is all explained: left out, it would bend the median where it ends.
        leading[(variance.lengths[:, None] > 0) & (np.arange(len(shown)) >= variance.lengths[:, None])] = 1.0
        sources[f"explained_variance_{which}_leading"] = shown.astype(float), leading
    groups = list(pair.groups())
    return {
        profile: {group: _band(x, values[mask]) for group, mask in groups}
        for profile, (x, values) in sources.items()
    }


def own_ranks(pair: Pair) -> list[str]:
    """A user's own measures that have a figure for each rank."""
    return [name for name in pair.own if name in pair.series and (pair.series[name].index >= 0).any()]


def own_numbers(pair: Pair) -> list[str]:
    """A user's own measures that have one figure for each matrix."""
    return [name for name in pair.own if name in pair.series and not (pair.series[name].index >= 0).any()]


def turned(pair: Pair, measure: str, ranks: int = 10) -> Floats:
    """Root mean square sine of the angle that the leading resolved ranks of each matrix turned; NaN without any."""
    series, resolved = pair.figures(measure), pair.figures(measure).resolved
    keep = resolved & (series.index >= 0) & (series.index < ranks)
    n = len(pair)
    total = np.bincount(series.matrix[keep], 1 - np.minimum(series.value[keep], 1) ** 2, n)
    count = np.bincount(series.matrix[keep], minlength=n)
    return np.sqrt(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def representatives(pair: Pair) -> list[int]:
    """The matrices with the smallest and with the largest ratio S_1(delta) / S_1(base), for Fig. 3B and C."""
    ratio = pair.at_rank("singular_value_ratio", 1)
    ratio[~np.isfinite(ratio)] = np.nan
    if np.isnan(ratio).all():
        return [0]
    return list(dict.fromkeys([int(np.nanargmin(ratio)), int(np.nanargmax(ratio))]))


def _longest(pair: Pair) -> int:
    return int(pair.figures("explained_variance_base").lengths.max(initial=0))


def _pair(label: str, mine: pa.Table) -> Pair:
    mine = mine.unify_dictionaries().combine_chunks()
    codes = _codes(mine, "matrix")
    _, first = np.unique(codes, return_index=True)
    first = np.sort(first)
    about = mine.take(pa.array(first))
    matrices = {
        name: about[column].to_pylist()
        for name, column in {
            "name": "matrix",
            "stack": "stack",
            "block": "block",
            "role": "role",
            "out": "out_features",
            "in": "in_features",
        }.items()
    }
    order = np.zeros(codes.max(initial=-1) + 1, np.int64)
    order[codes[first]] = np.arange(len(first))
    matrix = order[codes]
    index = pc.fill_null(mine["index"], -1).to_numpy().astype(np.int64)
    value, bound = (pc.fill_null(mine[name], np.nan).to_numpy() for name in ("value", "bound"))
    resolved = pc.fill_null(mine["resolved"], True).to_numpy(zero_copy_only=False)
    measures = _codes(mine, "measure")
    names = mine["measure"].chunk(0).dictionary.to_pylist() if len(mine) else []
    series = {}
    for code in np.unique(measures):
        at = np.flatnonzero(measures == code)
        at = at[np.lexsort((index[at], matrix[at]))]
        start = np.concatenate([[0], np.cumsum(np.bincount(matrix[at], minlength=len(first)))])
        series[names[code]] = Series(start, index[at], value[at], bound[at], resolved[at])
    return Pair(label, mine, matrices, series)


def _codes(table: pa.Table, column: str) -> Ints:
    """The dictionary codes of a column of words."""
    return table[column].chunk(0).indices.to_numpy().astype(np.int64) if len(table) else np.zeros(0, np.int64)


def _band(x: Floats, values: Floats) -> Band:
    """Quartiles down the columns of (matrices, places), each over its own finite entries."""
    # NaN sorts last: the finite entries of a column are its first `count`.
    values = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)
    count = np.isfinite(values).sum(axis=0)
    columns = np.arange(values.shape[1])
    quartiles = []
    for q in (0.25, 0.5, 0.75):
        place = q * np.maximum(count - 1, 0)
        below, above = np.floor(place).astype(int), np.ceil(place).astype(int)
        low, high = values[below, columns], values[above, columns]
        quartiles.append(low + (place - below) * (high - low))
    return Band(x, quartiles[0], quartiles[1], quartiles[2], count)
