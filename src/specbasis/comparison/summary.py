"""What the rows of one pair add up to: a line per role, and one over all matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specbasis.architecture.key import ROLES
from specbasis.comparison.facts import SIDES, Columns, Facts, is_resolved, of, where
from specbasis.core.entries import LEAST_SIDE

TOP = 10
"""Leading ranks over which a user's own measure of each rank is averaged."""

_MEASURES = (
    *(f"{kind}_{side}" for kind in ("alignment", "chance_alignment") for side in SIDES),
    "rsd",
    "relative_update",
)


@dataclass(frozen=True)
class RoleSummary:
    """Means over the matrices of one role in one pair.

    Attributes:
        role: the role, or "all".
        matrices: how many.
        top10, top30: alignment of the leading 10 and 30 ranks, (left, right), over resolved ranks.
        chance: alignment of independent directions, (left, right).
        rsd: relative spectral distance.
        relative_update: ‖delta‖_F / ‖base‖_F.
        unresolved: alignments whose error bound is not small, or which the stored numbers do not tell apart: left
            out of the means.
        every10, every30: the same means over all ranks, unresolved ones included.
        frozen: matrices equal bit for bit, whose alignment of 1 is left out of the means, unless all are.
        short: matrices with a side shorter than `LEAST_SIDE`, along which alignment and chance are near 1 by
            definition: left out likewise.
    """

    role: str
    matrices: int
    top10: tuple[float, float]
    top30: tuple[float, float]
    chance: tuple[float, float]
    rsd: float
    relative_update: float
    unresolved: int
    every10: tuple[float, float]
    every30: tuple[float, float]
    frozen: int = 0
    short: int = 0


def summarise(facts: Facts) -> list[RoleSummary]:
    """One line per role of a pair, in the order of `ROLES`, and one over all matrices."""
    return [_line(role, columns) for role, columns in _by_role(facts.columns(_MEASURES))]


def own_means(facts: Facts, names: Sequence[str]) -> list[dict[str, Any]]:
    """A user's own measures: for each of `ROLES` and over all matrices, the mean over matrices of each.

    Of a measure with a figure for each rank the leading 10 are averaged within a matrix first. Keys: role, and the
    measures' names; NaN where a role has none. Empty without names.
    """
    lines = []
    for role, columns in _by_role(facts.columns(names)) if names else ():
        line: dict[str, Any] = {"role": role}
        for name in names:
            part = of(columns, name)
            part = where(part, ~(part["index"] >= TOP))  # not a number: a figure of the whole matrix
            means = [part["value"][part["matrix"] == m].mean() for m in dict.fromkeys(part["matrix"])]
            line[name] = float(np.mean(means)) if means else math.nan
        lines.append(line)
    return lines


def _by_role(columns: Columns) -> list[tuple[str, Columns]]:
    """The rows of each role that there is, in the order of `ROLES`, and all of them."""
    present = set(columns["role"])
    by_role = [(role, where(columns, columns["role"] == role)) for role in ROLES if role in present]
    return [*by_role, ("all", columns)]


def _line(role: str, columns: Columns) -> RoleSummary:
    parts = {name: of(columns, name) for name in _MEASURES}  # empty, and its mean NaN, where one was not wanted
    updates = parts["relative_update"]
    still = updates["matrix"][updates["value"] == 0]
    sides = dict(zip(SIDES, ("out_features", "in_features"), strict=True))
    every = [_telling(parts[f"alignment_{side}"], still, sides[side]) for side in SIDES]
    resolved = [where(side, is_resolved(side)) for side in every]

    short = np.minimum(updates["out_features"], updates["in_features"]).max(initial=0)
    taken = 1 + max(int(side["index"].max(initial=-1)) for side in every)

    def both(columns: list[Columns], top: int | None) -> tuple[float, float]:
        if top == 30 and taken < min(top, short):  # of fewer ranks it would be another mean
            return math.nan, math.nan
        return _mean(columns[0], top), _mean(columns[1], top)

    return RoleSummary(
        role,
        matrices=len(parts["relative_update"]["value"]),
        top10=both(resolved, 10),
        top30=both(resolved, 30),
        chance=both([_telling(parts[f"chance_alignment_{side}"], still, sides[side]) for side in SIDES], None),
        rsd=_mean(parts["rsd"]),
        relative_update=_mean(parts["relative_update"]),
        unresolved=sum(len(side["value"]) for side in every) - sum(len(side["value"]) for side in resolved),
        every10=both(every, 10),
        every30=both(every, 30),
        frozen=len(still),
        short=int((np.minimum(updates["out_features"], updates["in_features"]) < LEAST_SIDE).sum()),
    )


def _telling(columns: Columns, still: Any, dimension: str) -> Columns:
    """The rows of matrices that moved and have room to turn along one side; all where there are none."""
    telling = where(columns, ~np.isin(columns["matrix"], still) & (columns[dimension] >= LEAST_SIDE))
    return telling if len(telling["value"]) else columns


def _mean(columns: Columns, top: int | None = None) -> float:
    values = columns["value"] if top is None else columns["value"][columns["index"] < top]
    return float(np.mean(values)) if len(values) else math.nan
