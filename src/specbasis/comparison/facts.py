"""The rows of one pair, read once: columns of some measures, and the facts of every matrix.

What the terminal, the page and a notebook say is computed from these alone, so that they say the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

SIDES = ("left", "right")

LEADING = 10
"""Leading ranks whose mean alignment is a fact of a matrix."""

Columns = dict[str, NDArray[Any]]
Fact = dict[str, Any]

_COLUMNS = ("matrix", "role", "out_features", "in_features", "measure", "index", "value", "resolved")


@dataclass(frozen=True, eq=False)
class Facts:
    """What the rows of one pair say.

    Attributes:
        rows: all of them.
        failed: matrices that could not be decomposed: pair, matrix, size, error.
        skipped: parameters that were not compared, as the manifest lists them: name, side, size, reason.
        other_base: of an adapter whose file names other weights than base's: what it says; else empty.
    """

    rows: pa.Table
    failed: Sequence[Mapping[str, Any]] = ()
    skipped: Sequence[Mapping[str, Any]] = ()
    other_base: str = ""

    @cached_property
    def measures(self) -> set[str]:
        """Names of the measures that some matrix has."""
        return set(self.rows["measure"].unique().to_pylist())

    @cached_property
    def uncompared(self) -> list[str]:
        """Matrices of either side that are not in the rows: without a partner, unreadable, or failed.

        What is no matrix, or is counted in another place, is not among them.
        """
        left = [
            item["name"] for item in self.skipped if item.get("size", 1) and not _NO_MATRIX.match(item["reason"])
        ]
        return [*left, *(failure["matrix"] for failure in self.failed)]

    @cached_property
    def compared(self) -> float:
        """Share of the matrix parameters of both models that the rows are about; NaN where it is not known.

        The others are those that are on one side only, unreadable, failed, or of unknown layout.
        """
        left = [*self.skipped, *self.failed]
        if any("size" not in item for item in left):  # a folder of version 0.1
            return math.nan
        inside = sum(m["size"] for m in self.matrices)
        whole = inside + sum(int(item["size"]) for item in left)
        return inside / whole if whole else math.nan

    def columns(self, measures: Sequence[str]) -> Columns:
        """The rows of some measures, as NumPy columns."""
        rows = self.rows.filter(pc.is_in(pc.field("measure"), pa.array(measures, pa.string())))
        return {name: _array(rows[name]) for name in _COLUMNS}

    @cached_property
    def matrices(self) -> list[Fact]:
        """One dictionary per matrix: what it is, its figures by measure, and its leading alignment.

        Keys beside the measures: matrix, role, stack, block, out, in, size, chance (mean of both sides),
        top10_left, top10_right, top10 (mean over the resolved of the leading 10 ranks).
        """
        whole = self.rows.filter(pc.is_null(pc.field("index")))
        names = ("matrix", "role", "stack", "block", "out_features", "in_features", "measure", "value")
        facts: dict[str, Fact] = {}
        for matrix, role, stack, block, out, width, measure, value in zip(
            *(whole[name].to_pylist() for name in names), strict=True
        ):
            fact = facts.setdefault(
                matrix,
                {"matrix": matrix, "role": role, "stack": stack, "block": block, "out": out, "in": width}
                | {"size": out * width, "top10": math.nan, "top10_left": math.nan, "top10_right": math.nan},
            )
            fact[measure] = math.nan if value is None else value
        for fact in facts.values():
            fact["chance"] = sum(fact[f"chance_alignment_{side}"] for side in SIDES) / len(SIDES)
        leading = self.columns([f"alignment_{side}" for side in SIDES])
        leading = where(leading, (leading["index"] < LEADING) & is_resolved(leading))
        parts = {"top10": leading} | {f"top10_{side}": of(leading, f"alignment_{side}") for side in SIDES}
        for key, part in parts.items():
            labels, at = np.unique(part["matrix"].astype(str), return_inverse=True)
            means = np.bincount(at, part["value"].astype(float)) / np.bincount(at)
            for label, mean in zip(labels, means, strict=True):
                facts[str(label)][key] = float(mean)
        return list(facts.values())


_NO_MATRIX = re.compile(
    r"(in tuned: )?(a vector or scalar|empty|the scales of|holds the values of|\d+-D and not known)"
)
"""How the reasons begin for which something was not compared that is no matrix, or is compared elsewhere."""


def by_pair(
    rows: pa.Table,
    labels: Sequence[str],
    failed: Sequence[Mapping[str, Any]] = (),
    skipped: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Facts]:
    """The facts of some pairs; the rows of each are found in one pass over all, and not copied."""
    column = rows["pair"].combine_chunks()
    codes = column.indices.to_numpy() if isinstance(column, pa.DictionaryArray) else _array(rows["pair"])
    starts = np.flatnonzero(np.r_[len(codes) > 0, codes[1:] != codes[:-1]])
    parts: dict[str, list[pa.Table]] = {label: [] for label in labels}
    for start, stop in zip(starts, [*starts[1:], len(codes)], strict=True):
        label = column[int(start)].as_py()
        if label in parts:
            parts[label].append(rows.slice(start, stop - start))
    return {
        label: Facts(
            pa.concat_tables(tables or [rows.slice(0, 0)]),
            [f for f in failed if f["pair"] == label],
            (skipped or {}).get(label, ()),
        )
        for label, tables in parts.items()
    }


def where(columns: Columns, mask: NDArray[Any]) -> Columns:
    """Some of the rows."""
    return {name: column[mask] for name, column in columns.items()}


def of(columns: Columns, measure: str) -> Columns:
    """The rows of one measure."""
    return where(columns, columns["measure"] == measure)


def is_resolved(columns: Columns) -> NDArray[np.bool_]:
    """Which rows are resolved; those without a bound are not."""
    return np.asarray(columns["resolved"] == True)  # noqa: E712 - may be null


def _array(column: pa.ChunkedArray) -> NDArray[Any]:
    whole = column.combine_chunks()
    if isinstance(whole, pa.DictionaryArray):
        whole = whole.dictionary_decode()
    return np.asarray(whole.to_numpy(zero_copy_only=False))
