"""What the rows of one pair add up to: a line per role, and one verdict with its evidence.

Both are computed from rows alone, so that the terminal, the page and a notebook say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from specbasis.architecture import ROLES

RELATED_COSINE = 0.2
"""Below this cosine between base and tuned weights a matrix does not count as a finetune of the other."""

RELATED_SIGMAS = 6.0
"""Nor where the cosine is fewer standard deviations than this from that of randomly oriented matrices."""

SMALL_SHARE = 0.1
"""A share of the parameters below this does not change the verdict: it is named beside it."""

SIDES = ("left", "right")

_BOTH = {measure: [f"{measure}_{side}" for side in SIDES] for measure in ("alignment", "chance_alignment")}
_NEEDED = ("matrix", "role", "out_features", "in_features", "measure", "index", "value", "resolved")

Columns = dict[str, NDArray[Any]]


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
    mine = _columns(rows, pair, [*_BOTH["alignment"], *_BOTH["chance_alignment"], "rsd", "relative_update"])
    present = set(mine["role"])
    lines = [_line(role, _where(mine, mine["role"] == role)) for role in ROLES if role in present]
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
    matrices = _matrices(rows, pair)
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


def _columns(rows: pa.Table, pair: str, measures: list[str]) -> Columns:
    """The rows of some measures of one pair, as NumPy columns."""
    wanted = (pc.field("pair") == pair) & pc.is_in(pc.field("measure"), pa.array(measures))
    kept = rows.filter(wanted)
    return {name: _array(kept[name]) for name in _NEEDED}


def _array(column: pa.ChunkedArray) -> NDArray[Any]:
    whole = column.combine_chunks()
    if isinstance(whole, pa.DictionaryArray):
        whole = whole.dictionary_decode()
    return np.asarray(whole.to_numpy(zero_copy_only=False))


def _where(mine: Columns, mask: NDArray[Any]) -> Columns:
    return {name: column[mask] for name, column in mine.items()}


def _of(mine: Columns, measure: str) -> Columns:
    return _where(mine, mine["measure"] == measure)


def _line(role: str, mine: Columns) -> RoleSummary:
    names = [*_BOTH["alignment"], *_BOTH["chance_alignment"], "rsd", "relative_update"]
    parts = {name: _of(mine, name) for name in names}  # empty, and its mean NaN, where a measure was not wanted
    sides = [parts[name] for name in _BOTH["alignment"]]
    left, right = (_where(side, side["resolved"] == True) for side in sides)  # noqa: E712 - may be null
    chance_left, chance_right = (_mean(parts[name]) for name in _BOTH["chance_alignment"])
    return RoleSummary(
        role,
        len(parts["relative_update"]["value"]),
        (_mean(left, top=10), _mean(right, top=10)),
        (_mean(left, top=30), _mean(right, top=30)),
        (chance_left, chance_right),
        _mean(parts["rsd"]),
        _mean(parts["relative_update"]),
        sum(len(side["value"]) for side in sides) - len(left["value"]) - len(right["value"]),
    )


def _mean(mine: Columns, top: int | None = None) -> float:
    values = mine["value"] if top is None else mine["value"][mine["index"] < top]
    return float(np.mean(values)) if len(values) else math.nan


def _matrices(rows: pa.Table, pair: str) -> list[dict[str, Any]]:
    """One dictionary per matrix with what the verdict needs."""
    whole = ("relative_update", "weight_cosine", *_BOTH["chance_alignment"])
    mine = _columns(rows, pair, [*whole, *_BOTH["alignment"]])
    found: dict[str, dict[str, Any]] = {}
    for measure in whole:
        part = _of(mine, measure)
        sizes = part["out_features"] * part["in_features"]
        for name, value, size in zip(part["matrix"], part["value"], sizes, strict=True):
            found.setdefault(name, {"matrix": name, "top10": math.nan, "size": int(size)})[measure] = float(value)
    for m in found.values():
        m["chance"] = sum(m[side] for side in _BOTH["chance_alignment"]) / len(SIDES)
    leading = _where(mine, np.isin(mine["measure"], _BOTH["alignment"]))
    leading = _where(leading, (leading["index"] < 10) & (leading["resolved"] == True))  # noqa: E712
    names, at = np.unique(leading["matrix"].astype(str), return_inverse=True)
    for i, name in enumerate(names):  # none where alignment was not wanted
        found[str(name)]["top10"] = float(np.mean(leading["value"][at == i]))
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
    top10 = _median(changed, "top10")
    evidence = (
        f"weight cosine with base {_median(changed, 'weight_cosine'):.3f} (chance 0), "
        f"‖Δ‖/‖W‖ {_median(changed, 'relative_update'):.3g}"
        + ("" if math.isnan(top10) else f", top-10 alignment {top10:.3f} (chance {_median(changed, 'chance'):.3f})")
        + "; medians over matrices"
    )
    frozen, unrelated = ([m["matrix"] for m in groups[group]] for group in ("frozen", "unrelated"))
    frozen_part = f"; frozen, bit for bit: {len(frozen)} ({named_parts(frozen)})" if frozen else ""
    new_part = f"; not from this base: {len(unrelated)} ({named_parts(unrelated)})" if unrelated else ""
    if kind == "independent":
        return f"independent training, or another base: {len(unrelated)} of {n} matrices: {evidence}{frozen_part}"
    related = f"{len(groups['related'])} of {n} matrices"
    if kind == "finetuned":
        return f"finetuned from this base: {related}: {evidence}{frozen_part}{new_part}"
    return f"mixed: {related} finetuned: {evidence}{frozen_part}{new_part}"


def _median(members: list[dict[str, Any]], field: str) -> float:
    values = [m[field] for m in members if not math.isnan(m[field])]
    return median(values) if values else math.nan
