"""What the rows of one pair add up to: a line per role, and one verdict with its evidence.

Both are computed from rows alone, so that the terminal, the page and a notebook say the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from specbasis.architecture.key import ROLES
from specbasis.core.dtypes import BY_PRECISION

RELATED_COSINE = 0.05
"""Below this cosine between base and tuned weights a matrix does not count as a finetune of the other."""

RELATED_SIGMAS = 6.0
"""Nor where the cosine is fewer standard deviations than this from that of rows and columns in random order."""

UNTESTED_COSINE = 0.2
"""The least cosine of a matrix too small for that test; there, the deviation is that of random entries."""

SMALL_SHARE = 0.1
"""A share of the parameters below this does not change the verdict: it is named beside it."""

SAME_SPECTRUM = 0.01
"""Two matrices of n singular values have one spectrum where their relative spectral distance is below this / n.

Independent random matrices of one distribution differ by about 1/n.
"""

QUANTISED = 0.5
"""Share of sampled groups that must round to tuned; one whose entries skip every second level hides its grid."""

LEAST_SPECTRUM = 8
"""Fewer singular values could be the same by chance."""

FLAT = 0.999
"""Spectra whose effective rank is above this share of n are all alike, and tell nothing."""

SIDES = ("left", "right")

_BOTH = {measure: [f"{measure}_{side}" for side in SIDES] for measure in ("alignment", "chance_alignment")}
_NEEDED = ("matrix", "role", "out_features", "in_features", "measure", "index", "value", "resolved")

Columns = dict[str, NDArray[Any]]


TOP = 10
"""Leading ranks over which a user's own measure of each rank is averaged."""


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


Kind = Literal["identical", "copy", "finetuned", "independent", "mixed"]


@dataclass(frozen=True)
class Verdict:
    """What the pair is, with its evidence in one sentence.

    Attributes:
        kind: identical, copy, finetuned, independent, or mixed.
        sentence: the verdict and the figures it rests on.
        frozen: matrices that are equal bit for bit.
        unrelated: matrices that were not finetuned from base (trained anew, or replaced).
        copied: matrices that hold the same weights in another form: rounded, pruned, or reordered.
    """

    kind: Kind
    sentence: str
    frozen: tuple[str, ...]
    unrelated: tuple[str, ...]
    copied: tuple[str, ...] = ()


def summarise(rows: pa.Table, pair: str) -> list[RoleSummary]:
    """One line per role of a pair, in the order of `ROLES`, and one over all matrices."""
    mine = _columns(rows, pair, [*_BOTH["alignment"], *_BOTH["chance_alignment"], "rsd", "relative_update"])
    present = set(mine["role"])
    lines = [_line(role, _where(mine, mine["role"] == role)) for role in ROLES if role in present]
    return [*lines, _line("all", mine)]


def own_means(rows: pa.Table, pair: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """A user's own measures: for each of `ROLES` and over all matrices, the mean over matrices of each.

    Of a measure with a figure for each rank the leading 10 are averaged within a matrix first. Keys: role, and the
    measures' names; NaN where a role has none.
    """
    names = list(names)
    mine = _columns(rows, pair, names)
    lines = []
    for role in (*(role for role in ROLES if role in set(mine["role"])), "all"):
        here = mine if role == "all" else _where(mine, mine["role"] == role)
        line: dict[str, Any] = {"role": role}
        for name in names:
            part = _of(here, name)
            kept = ~(part["index"] >= TOP)  # not a number: a figure of the whole matrix
            means = [
                part["value"][kept & (part["matrix"] == m)].mean() for m in dict.fromkeys(part["matrix"][kept])
            ]
            line[name] = float(np.mean(means)) if means else math.nan
        lines.append(line)
    return lines


def judge(rows: pa.Table, pair: str) -> Verdict:
    """Tell a finetune from a copy and from independent training.

    A matrix is, by the first that holds,

    - *frozen* where delta is exactly zero;
    - *copied* where base and tuned are equal once rounded to the coarser precision of the two; where base rounds to
      tuned on tuned's own grid (quantised); where all entries but those set to zero are equal; or where the values
      in the spectrum are the same (`SAME_SPECTRUM`) of weights that do not correspond: rows and columns in another
      order, as hidden units can have without any effect, or with other signs;
    - *related* where the cosine ⟨base, tuned⟩/(‖base‖‖tuned‖) is at least `RELATED_COSINE` and `RELATED_SIGMAS`
      standard deviations above that of rows and of columns in random order (`weight_cosine_z`); a matrix too small
      for that test needs `UNTESTED_COSINE` and as many deviations of random entries, 1/√(out·in);
    - *unrelated* otherwise.

    Shares count parameters:

    - identical: everything frozen;
    - copy: nothing related, and of what is not frozen at most `SMALL_SHARE` unrelated, the rest copied;
    - independent: among what is not frozen, more than 1 − `SMALL_SHARE` unrelated, and less than half frozen;
    - finetuned: something related, and at most `SMALL_SHARE` unrelated; frozen parts are named;
    - mixed: everything else; the frozen and the unrelated parts are named.

    Two runs from one random initialisation, and two finetunes of one base, are related: from two checkpoints alone
    neither can be told from a finetune of the other (`specbasis.lineage.tree` says what several can tell).
    """
    matrices = [m | {"group": _group(m)} for m in matrix_facts(rows, pair)]
    total = sum(m["size"] for m in matrices)
    groups = {g: [m for m in matrices if m["group"] == g] for g in ("frozen", "copied", "related", "unrelated")}
    share = {group: sum(m["size"] for m in members) / total for group, members in groups.items()}
    changed = 1 - share["frozen"]
    kind: Kind
    if len(groups["frozen"]) == len(matrices):
        kind = "identical"
    elif groups["copied"] and not groups["related"] and share["unrelated"] <= SMALL_SHARE * changed:
        kind = "copy"
    elif share["unrelated"] > (1 - SMALL_SHARE) * changed and share["frozen"] < 0.5:
        kind = "independent"
    elif groups["related"] and share["unrelated"] <= SMALL_SHARE:
        kind = "finetuned"
    else:
        kind = "mixed"
    frozen, copied, _, unrelated = (tuple(m["matrix"] for m in members) for members in groups.values())
    return Verdict(kind, _sentence(kind, matrices, groups), frozen, unrelated, copied)


def copy_form(m: Mapping[str, Any]) -> str:
    """In what other form tuned holds the weights of base; empty where it does not."""
    bits = {side: m.get(f"precision_{side}", math.nan) for side in ("base", "tuned")}
    if m.get("equal_entries_rounded") == 1 and bits["base"] != bits["tuned"]:
        coarser = BY_PRECISION[int(min(bits.values()))]
        return f"rounded to {coarser}" if bits["tuned"] < bits["base"] else f"base is it rounded to {coarser}"
    if m.get("equal_entries_grid", 0) >= QUANTISED and math.isnan(m.get("grid_levels_base", math.nan)):
        return "quantised"
    new_zeros = m.get("zero_entries_tuned", math.nan) - m.get("zero_entries_base", math.nan)
    if new_zeros > 0 and abs(1 - m["equal_entries"] - new_zeros) * m["size"] < 0.5:
        return "pruned"
    n = min(m["out"], m["in"])
    same = m.get("rsd", math.nan) <= SAME_SPECTRUM / n and n >= LEAST_SPECTRUM
    flat = m.get("effective_rank_base", math.nan) > FLAT * n
    return "reordered or reflected" if same and not flat and not _corresponds(m) else ""


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
        (_mean(sides[0], top=10), _mean(sides[1], top=10)),
        (_mean(sides[0], top=30), _mean(sides[1], top=30)),
    )


def _mean(mine: Columns, top: int | None = None) -> float:
    values = mine["value"] if top is None else mine["value"][mine["index"] < top]
    return float(np.mean(values)) if len(values) else math.nan


def matrix_facts(rows: pa.Table, pair: str) -> list[dict[str, Any]]:
    """One dictionary per matrix of a pair: what it is, its figures by measure, and its leading alignment.

    Keys beside the measures: matrix, role, stack, block, out, in, size, chance (mean of both sides), top10_left,
    top10_right, top10 (mean over the resolved of the leading 10 ranks).
    """
    mine = rows.filter(pc.field("pair") == pair)
    whole = mine.filter(pc.is_null(pc.field("index")))
    names = ("matrix", "role", "stack", "block", "out_features", "in_features", "measure", "value")
    found: dict[str, dict[str, Any]] = {}
    for matrix, role, stack, block, out, width, measure, value in zip(
        *(whole[name].to_pylist() for name in names), strict=True
    ):
        m = found.setdefault(
            matrix,
            {"matrix": matrix, "role": role, "stack": stack, "block": block, "out": out, "in": width}
            | {"size": out * width, "top10": math.nan, "top10_left": math.nan, "top10_right": math.nan},
        )
        m[measure] = math.nan if value is None else value
    for m in found.values():
        m["chance"] = sum(m[side] for side in _BOTH["chance_alignment"]) / len(SIDES)
    leading = _columns(mine, pair, _BOTH["alignment"])
    leading = _where(leading, (leading["index"] < 10) & (leading["resolved"] == True))  # noqa: E712
    sides = {
        key: _where(leading, leading["measure"] == f"alignment_{key[6:]}") for key in ("top10_left", "top10_right")
    }
    for key, part in {"top10": leading, **sides}.items():
        labels, at = np.unique(part["matrix"].astype(str), return_inverse=True)
        sums, counts = np.bincount(at, part["value"].astype(float)), np.bincount(at)
        for label, total, count in zip(labels, sums, counts, strict=True):
            found[str(label)][key] = float(total / count)
    return list(found.values())


def _corresponds(m: Mapping[str, Any]) -> bool:
    # A matrix of zeros on one side only has no cosine: NaN compares false, so it counts as unrelated.
    cosine, z = m["weight_cosine"], m.get("weight_cosine_z", math.nan)
    if math.isnan(z):
        return bool(cosine >= max(UNTESTED_COSINE, RELATED_SIGMAS / math.sqrt(m["size"])))
    return bool(cosine >= RELATED_COSINE and z >= RELATED_SIGMAS)


def _group(m: Mapping[str, Any]) -> str:
    if not m["relative_update"] > 0 and not math.isnan(m["relative_update"]):
        return "frozen"
    if copy_form(m):
        return "copied"
    return "related" if _corresponds(m) else "unrelated"


def _sentence(kind: Kind, matrices: list[dict[str, Any]], groups: dict[str, list[dict[str, Any]]]) -> str:
    n = len(matrices)
    if kind == "identical":
        return f"identical: all {n} compared matrices are equal bit for bit"
    frozen = _part("frozen, bit for bit", groups["frozen"])
    copied = "".join(_part(form, members) for form, members in _forms(groups["copied"]).items())
    if kind == "copy":
        return f"copy: the same weights in another form{copied}{frozen}" + _part(
            "not from this base", groups["unrelated"]
        )
    changed = groups["related"] + groups["unrelated"]
    top10, z = _median(changed, "top10"), _median(changed, "weight_cosine_z")
    evidence = (
        f"weight cosine with base {_median(changed, 'weight_cosine'):.3f} (chance 0"
        + ("" if math.isnan(z) else f", {z:.1f} standard deviations")
        + f"), ‖Δ‖/‖W‖ {_median(changed, 'relative_update'):.3g}"
        + ("" if math.isnan(top10) else f", top-10 alignment {top10:.3f} (chance {_median(changed, 'chance'):.3f})")
        + "; medians over matrices"
    )
    unrelated = _part("not from this base", groups["unrelated"])
    if kind == "independent":
        count = f"{len(groups['unrelated'])} of {n} matrices"
        return f"independent training, or another base: {count}: {evidence}{frozen}{copied}"
    related = f"{len(groups['related'])} of {n} matrices"
    start = f"finetuned from this base: {related}" if kind == "finetuned" else f"mixed: {related} finetuned"
    return f"{start}: {evidence}{frozen}{copied}{unrelated}"


def _part(what: str, members: list[dict[str, Any]]) -> str:
    return f"; {what}: {len(members)} ({named_parts(m['matrix'] for m in members)})" if members else ""


def _forms(members: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    forms: dict[str, list[dict[str, Any]]] = {}
    for m in members:
        forms.setdefault(copy_form(m), []).append(m)
    return forms


def _median(members: list[dict[str, Any]], field: str) -> float:
    values = [m[field] for m in members if not math.isnan(m.get(field, math.nan))]
    return median(values) if values else math.nan
