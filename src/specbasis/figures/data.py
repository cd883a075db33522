"""Rows of a comparison, column by column, as the arrays that figures and page show."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from specbasis.architecture.key import ROLES
from specbasis.comparison.comparison import Comparison
from specbasis.core.entries import LEAST_SIDE

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

    @property
    def width(self) -> int:
        """The largest number of ranks, 0 where there is none."""
        return int(self.index.max(initial=-1)) + 1

    def of(self, matrix: int) -> tuple[Ints, Floats, Bools]:
        """(1-based ranks, figures, whether they are resolved) of one matrix."""
        part = slice(self.start[matrix], self.start[matrix + 1])
        return self.index[part] + 1, self.value[part], self.resolved[part]

    def dense(self, width: int | None = None) -> Floats:
        """(matrices, width) resolved figures by index, NaN where there is none; all indices by default."""
        width = self.width if width is None else width
        out = np.full((len(self.start) - 1, width), np.nan)
        keep = self.resolved & (self.index >= 0) & (self.index < width)
        out[self.matrix[keep], self.index[keep]] = self.value[keep]
        return out

    def by_rank(self) -> tuple[Floats, Floats]:
        """(1-based ranks, their resolved figures as (matrices, ranks)); beyond `LEADING` an even choice of them."""
        thin = self.thinned(2 * LEADING)
        ranks = np.unique(thin.index)
        return (ranks + 1).astype(np.float64), thin.dense()[:, ranks]

    def at_quantiles(self, sizes: Ints) -> Floats:
        """(matrices, quantiles) figures at relative ranks: of rank ⌊q·n⌋, n the size; NaN where there is none."""
        rank = np.floor(QUANTILES[None, :] * sizes[:, None]).astype(np.int64)
        out = np.full(rank.shape, np.nan)
        known = rank < self.lengths[:, None]
        out[known] = self.value[(self.start[:-1, None] + rank)[known]]
        # Where only leading values are known, a median far down would be over the few smallest matrices.
        out[:, 2 * known.sum(0) < known.sum(0).max(initial=0)] = np.nan
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
        matrices: columns name, stack, block (None outside of blocks), role, out, in; one entry per matrix.
        series: the measures, by name; one that has no rows is absent.
        own: names of a user's own measures.
    """

    label: str
    matrices: dict[str, list[Any]]
    series: dict[str, Series]
    own: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.matrices["name"])

    def measure(self, name: str) -> Series:
        """The rows of a measure; an empty series where there are none."""
        if name in self.series:
            return self.series[name]
        none = np.zeros(0)
        return Series(np.zeros(len(self) + 1, np.int64), none.astype(np.int64), none, none, none.astype(bool))

    @property
    def sizes(self) -> Ints:
        """Number of singular values of each matrix."""
        return np.minimum(self.matrices["out"], self.matrices["in"]).astype(np.int64)

    def whole(self, measure: str) -> Floats:
        """One figure for each matrix, NaN where there is none."""
        series = self.measure(measure)
        out = np.full(len(self), np.nan)
        out[series.matrix] = series.value
        return out

    def at_rank(self, measure: str, rank: int) -> Floats:
        """The resolved figure of each matrix at a 1-based rank, NaN where there is none."""
        series = self.measure(measure)
        keep = (series.index == rank - 1) & series.resolved
        out = np.full(len(self), np.nan)
        out[series.matrix[keep]] = series.value[keep]
        return out

    def vectors(self) -> int:
        """The largest number of ranks whose singular vectors were compared."""
        return max((int(self.measure(f"alignment_{side}").lengths.max(initial=0)) for side in SIDES), default=0)

    @property
    def own_ranks(self) -> list[str]:
        """A user's own measures that have a figure for each rank."""
        return [name for name in self.own if (self.measure(name).index >= 0).any()]

    @property
    def own_numbers(self) -> list[str]:
        """A user's own measures that have one figure for each matrix."""
        return [name for name in self.own if name in self.series and name not in self.own_ranks]

    def groups(self) -> Iterator[tuple[str, Bools]]:
        """All matrices, then those of each role that is present."""
        roles = np.array(self.matrices["role"], dtype=object)
        yield "all", np.ones(len(self), bool)
        for role in ROLES:
            if (roles == role).any():
                yield role, roles == role

    def panels(self) -> list[tuple[str, str, list[int]]]:
        """(stack, role, matrices by block): the panels of the heat map, roles in the order of `ROLES`."""
        members: dict[tuple[str, str], list[int]] = {}
        stacks = sorted(dict.fromkeys(self.matrices["stack"]), key=lambda stack: stack != "encoder")
        for i, (stack, role) in enumerate(zip(self.matrices["stack"], self.matrices["role"], strict=True)):
            members.setdefault((stack, role), []).append(i)
        block, name = self.matrices["block"], self.matrices["name"]

        def place(i: int) -> tuple[Any, ...]:
            """By block, then by name with its numbers as numbers: layer.2 before layer.10."""
            return (
                block[i] is None,
                block[i] or 0,
                [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", name[i])],
            )

        return [
            (stack, role, sorted(members[stack, role], key=place))
            for role in ROLES
            for stack in stacks
            if (stack, role) in members
        ]

    @cached_property
    def bands(self) -> dict[str, dict[str, Band]]:
        """Medians and quartiles over matrices, for all of them and for each role: {profile: {group: band}}.

        Profiles: ``alignment_SIDE`` and what stands beside it by rank; ``subspace_overlap_SIDE`` by k;
        ``singular_value_change`` and ``explained_variance_WHICH`` by relative rank;
        ``explained_variance_WHICH_leading`` by rank.
        """
        beside = [name for name in (*BESIDE, *self.own_ranks) if name in self.series]
        sources = {name: self.measure(name).by_rank() for name in (*(f"alignment_{s}" for s in SIDES), *beside)}
        for side in SIDES:
            overlap = self.measure(f"subspace_overlap_{side}")
            # The last k of a small matrix is its own: there, a median would be over few others.
            sizes, counts = np.unique(overlap.index, return_counts=True)
            sizes = sizes[2 * counts >= counts.max(initial=0)]
            sources[f"subspace_overlap_{side}"] = sizes.astype(float), overlap.dense()[:, sizes]
        for name in ("singular_value_change", "explained_variance_base", "explained_variance_tuned"):
            sources[name] = QUANTILES, self.measure(name).at_quantiles(self.sizes)
        shown = np.arange(1, min(LEADING, self.measure("explained_variance_base").lengths.max(initial=0)) + 1)
        for which in ("base", "tuned"):
            variance = self.measure(f"explained_variance_{which}")
            leading = variance.dense(len(shown))
            # Beyond its last rank a matrix is all explained: left out, it would bend the median where it ends.
            leading[(variance.lengths[:, None] > 0) & (shown > self.sizes[:, None])] = 1.0
            sources[f"explained_variance_{which}_leading"] = shown.astype(float), leading
        groups = list(self.groups())
        return {
            profile: {group: quartiles(x, values[self._telling(profile, mask)]) for group, mask in groups}
            for profile, (x, values) in sources.items()
        }

    def _telling(self, profile: str, mask: Bools) -> Bools:
        """Those of some matrices whose alignment says something: see `specbasis.comparison.summary.summarise`."""
        kind, _, side = profile.rpartition("_")
        if kind not in ("alignment", "subspace_overlap"):
            return mask
        dimension = np.array(self.matrices["out" if side == "left" else "in"], np.int64)
        telling = mask & (dimension >= LEAST_SIDE) & (self.whole("relative_update") != 0)
        return telling if telling.any() else mask

    def turned(self, measure: str, ranks: int = 10) -> Floats:
        """Root mean square sine of the angle of the leading resolved ranks of each matrix, NaN without any."""
        series = self.measure(measure)
        keep = series.resolved & (series.index >= 0) & (series.index < ranks)
        total = np.bincount(series.matrix[keep], 1 - np.minimum(series.value[keep], 1) ** 2, len(self))
        count = np.bincount(series.matrix[keep], minlength=len(self))
        return np.sqrt(np.where(count > 0, total / np.maximum(count, 1), np.nan))

    def representatives(self) -> list[int]:
        """The matrices with the smallest and with the largest ratio S_1(delta) / S_1(base), for Fig. 3B and C."""
        ratio = self.at_rank("singular_value_ratio", 1)
        ratio[~np.isfinite(ratio)] = np.nan
        if np.isnan(ratio).all():
            return [0]
        return list(dict.fromkeys([int(np.nanargmin(ratio)), int(np.nanargmax(ratio))]))

    def chance_levels(self, side: str, most: int = 4) -> list[tuple[int, float, int]]:
        """(dimension, chance alignment, matrices) of the commonest dimensions, largest level first.

        As in the means, sides shorter than `LEAST_SIDE` do not count beside longer ones.
        """
        dimension = np.array(self.matrices["out" if side == "left" else "in"], np.int64)
        level = self.whole(f"chance_alignment_{side}")
        if (long := dimension >= LEAST_SIDE).any():
            dimension, level = dimension[long], level[long]
        values, first, counts = np.unique(dimension, return_index=True, return_counts=True)
        common = np.argsort(-counts, kind="stable")[:most]
        levels = [(int(values[c]), float(level[first[c]]), int(counts[c])) for c in sorted(common)]
        return [entry for entry in levels if np.isfinite(entry[1])]


def read_pairs(comparison: Comparison) -> list[Pair]:
    """Every pair that has rows."""
    return [read_pair(comparison, label) for label in comparison.pairs]


def read_pair(comparison: Comparison, label: str) -> Pair:
    """The rows of one pair, with its matrices in the order of the rows."""
    own = tuple(measure["name"] for measure in comparison.manifest.get("measures", []))
    rows = comparison.facts[label].rows.unify_dictionaries().combine_chunks()
    codes = _codes(rows, "matrix")
    _, first = np.unique(codes, return_index=True)
    first = np.sort(first)
    about = rows.take(pa.array(first))
    columns = {"matrix": "name", "out_features": "out", "in_features": "in"}
    matrices = {
        columns.get(column, column): about[column].to_pylist()
        for column in ("matrix", "stack", "block", "role", "out_features", "in_features")
    }
    order = np.zeros(codes.max(initial=-1) + 1, np.int64)
    order[codes[first]] = np.arange(len(first))
    matrix = order[codes]
    index = pc.fill_null(rows["index"], -1).to_numpy().astype(np.int64)
    value, bound = (pc.fill_null(rows[name], np.nan).to_numpy() for name in ("value", "bound"))
    resolved = pc.fill_null(rows["resolved"], True).to_numpy(zero_copy_only=False)
    measures = _codes(rows, "measure")
    names = rows["measure"].chunk(0).dictionary.to_pylist() if len(rows) else []
    series = {}
    for code in np.unique(measures):
        at = np.flatnonzero(measures == code)
        at = at[np.lexsort((index[at], matrix[at]))]
        start = np.concatenate([[0], np.cumsum(np.bincount(matrix[at], minlength=len(first)))])
        series[names[code]] = Series(start, index[at], value[at], bound[at], resolved[at])
    return Pair(label, matrices, series, own)


def _codes(table: pa.Table, column: str) -> Ints:
    """The dictionary codes of a column of words."""
    return table[column].chunk(0).indices.to_numpy().astype(np.int64) if len(table) else np.zeros(0, np.int64)


def quartiles(x: Floats, values: Floats) -> Band:
    """Quartiles down the columns of (matrices, places), each over its finite entries; NaN where there are none."""
    low, median, high = quantiles(values, (0.25, 0.5, 0.75))
    return Band(x, low, median, high, np.isfinite(values).sum(axis=0))


def quantiles(values: Floats, at: Sequence[float]) -> list[Floats]:
    """Quantiles down the columns, each over its finite entries, interpolated; NaN where there are none."""
    # NaN sorts last: the finite entries of a column are its first `count`.
    values = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)
    count = np.isfinite(values).sum(axis=0)
    columns = np.arange(values.shape[1])
    levels = []
    for q in at:
        place = q * np.maximum(count - 1, 0)
        below, above = np.floor(place).astype(int), np.ceil(place).astype(int)
        low, high = values[below, columns], values[above, columns]
        levels.append(low + (place - below) * (high - low))
    return levels
