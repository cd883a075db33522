"""What the rows of one pair add up to: a line per role, and one verdict with its evidence.

Both are computed from rows alone, so that the terminal, the page and a notebook say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import and_
from statistics import fmean, median
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from specbasis.architecture import ROLES

RELATED_COSINE = 0.2
"""Below this cosine between base and tuned weights a matrix does not count as a finetune of the other."""

RELATED_SIGMAS = 6.0
"""Nor where the cosine is fewer standard deviations than this from that of randomly oriented matrices."""

SMALL_SHARE = 0.1
"""A share of the parameters below this does not change the verdict: it is named beside it."""

SIDES = ("left", "right")


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
        unresolved: alignments whose error bound is not small, left out of the means.
    """

    role: str
    matrices: int
    top10: tuple[float, float]
    top30: tuple[float, float]
    chance: tuple[float, float]
    rsd: float
    relative_update: float
    unresolved: int


@dataclass(frozen=True)
class Verdict:
    """What the pair is, with its evidence in one sentence.

    Attributes:
        kind: identical, finetuned, independent, or mixed.
        sentence: the verdict and the figures it rests on.
        frozen: matrices that are equal bit for bit.
        unrelated: matrices that were not finetuned from base (trained anew, or replaced).
    """

    kind: Literal["identical", "finetuned", "independent", "mixed"]
    sentence: str
    frozen: tuple[str, ...]
    unrelated: tuple[str, ...]


def summarise(rows: pa.Table, pair: str) -> list[RoleSummary]:
    """One line per role of a pair, in the order of `ROLES`, and one over all matrices."""
    needed = pa.array(
        [f"{m}_{s}" for m in ("alignment", "chance_alignment") for s in SIDES] + ["rsd", "relative_update"]
    )
    mine = _where(rows, pair=pair).filter(pc.is_in(pc.field("measure"), needed))
    present = set(mine["role"].unique().to_pylist())
    lines = [_line(role, _where(mine, role=role)) for role in ROLES if role in present]
    return [*lines, _line("all", mine)]


def judge(rows: pa.Table, pair: str) -> Verdict:
    """Tell a finetune from independent training.

    A matrix is *frozen* where delta is exactly zero; *related* where the cosine ⟨base, tuned⟩/(‖base‖‖tuned‖) is at
    least `RELATED_COSINE` and `RELATED_SIGMAS` standard deviations from random orientation, 1/√(out·in);
    *unrelated* otherwise. Shares count parameters:

    - identical: everything frozen;
    - independent: among what is not frozen, more than 1 − `SMALL_SHARE` unrelated, and less than half frozen;
    - finetuned: at most `SMALL_SHARE` frozen and at most `SMALL_SHARE` unrelated;
    - mixed: everything else; the frozen and the unrelated parts are named.
    """
    matrices = _matrices(_where(rows, pair=pair))
    total = sum(m["size"] for m in matrices)
    groups: dict[str, list[dict[str, Any]]] = {"frozen": [], "related": [], "unrelated": []}
    for m in matrices:
        groups[_group(m)].append(m)
    share = {group: sum(m["size"] for m in members) / total for group, members in groups.items()}
    changed = 1 - share["frozen"]
    kind: Literal["identical", "finetuned", "independent", "mixed"]
    if not groups["related"] and not groups["unrelated"]:
        kind = "identical"
    elif share["unrelated"] > (1 - SMALL_SHARE) * changed and share["frozen"] < 0.5:
        kind = "independent"
    elif share["frozen"] <= SMALL_SHARE and share["unrelated"] <= SMALL_SHARE:
        kind = "finetuned"
    else:
        kind = "mixed"
    return Verdict(
        kind,
        _sentence(kind, matrices, groups),
        tuple(m["matrix"] for m in groups["frozen"]),
        tuple(m["matrix"] for m in groups["unrelated"]),
    )


def named_parts(names: Iterable[str], limit: int = 4) -> str:
    """A few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _where(rows: pa.Table, **columns: str) -> pa.Table:
    return rows.filter(reduce(and_, (pc.field(name) == value for name, value in columns.items())))


def _line(role: str, mine: pa.Table) -> RoleSummary:
    def side(s: str, top: int) -> float:
        aligned = _where(mine, measure=f"alignment_{s}").filter((pc.field("index") < top) & pc.field("resolved"))
        return _mean(aligned)

    return RoleSummary(
        role,
        len(mine["matrix"].unique()),
        (side("left", 10), side("right", 10)),
        (side("left", 30), side("right", 30)),
        (
            _mean(_where(mine, measure="chance_alignment_left")),
            _mean(_where(mine, measure="chance_alignment_right")),
        ),
        _mean(_where(mine, measure="rsd")),
        _mean(_where(mine, measure="relative_update")),
        sum(_where(mine, measure=f"alignment_{s}").filter(~pc.field("resolved")).num_rows for s in SIDES),
    )


def _mean(rows: pa.Table) -> float:
    return fmean(rows["value"].to_pylist()) if rows.num_rows else math.nan


def _matrices(mine: pa.Table) -> list[dict[str, Any]]:
    """One dictionary per matrix with what the verdict needs."""
    found: dict[str, dict[str, Any]] = {}
    for measure in ("relative_update", "weight_cosine"):
        for row in _where(mine, measure=measure).to_pylist():
            m = found.setdefault(row["matrix"], {"matrix": row["matrix"], "role": row["role"]})
            m |= {measure: row["value"], "size": row["out_features"] * row["in_features"]}
    leading = mine.filter(
        pc.is_in(pc.field("measure"), pa.array([f"alignment_{s}" for s in SIDES]))
        & (pc.field("index") < 10)
        & pc.field("resolved")
    )
    by_matrix = leading.group_by("matrix").aggregate([("value", "mean")]).to_pylist()
    means = {row["matrix"]: row["value_mean"] for row in by_matrix}
    chance = {row["matrix"]: row["value"] for row in _where(mine, measure="chance_alignment_left").to_pylist()}
    for name, m in found.items():
        m |= {"top10": means.get(name, math.nan), "chance": chance[name]}
    return list(found.values())


def _group(m: dict[str, Any]) -> str:
    # A matrix of zeros on one side only has no cosine: NaN compares false, so it counts as unrelated.
    if not m["relative_update"] > 0 and not math.isnan(m["relative_update"]):
        return "frozen"
    needed = max(RELATED_COSINE, RELATED_SIGMAS / math.sqrt(m["size"]))
    return "related" if m["weight_cosine"] >= needed else "unrelated"


def _sentence(kind: str, matrices: list[dict[str, Any]], groups: dict[str, list[dict[str, Any]]]) -> str:
    n = len(matrices)
    if kind == "identical":
        return f"identical: all {n} compared matrices are equal bit for bit"
    changed = groups["related"] + groups["unrelated"]
    evidence = (
        f"weights keep a cosine of {_median(changed, 'weight_cosine'):.3f} with base (median; independent: 0), "
        f"‖Δ‖/‖W‖ is {_median(changed, 'relative_update'):.3g}, top-10 alignment {_median(changed, 'top10'):.2f} "
        f"(chance {_median(changed, 'chance'):.2f})"
    )
    frozen, unrelated = ([m["matrix"] for m in groups[group]] for group in ("frozen", "unrelated"))
    frozen_part = f"; frozen, bit for bit: {len(frozen)} ({named_parts(frozen)})" if frozen else ""
    new_part = f"; not from this base: {len(unrelated)} ({named_parts(unrelated)})" if unrelated else ""
    if kind == "independent":
        return f"independent training, or another base: in {len(unrelated)} of {n} matrices {evidence}{frozen_part}"
    related = f"{len(groups['related'])} of {n} matrices"
    if kind == "finetuned":
        return f"finetuned from this base: in {related} {evidence}{frozen_part}{new_part}"
    return f"mixed: {related} finetuned, {evidence}{frozen_part}{new_part}"


def _median(members: list[dict[str, Any]], field: str) -> float:
    values = [m[field] for m in members if not math.isnan(m[field])]
    return median(values) if values else math.nan
