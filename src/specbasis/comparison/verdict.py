"""What a pair is, in one sentence: identical, a copy, finetuned, independent, mixed, …, with the evidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from specbasis.comparison.facts import Fact, Facts
from specbasis.core.dtypes import BY_PRECISION
from specbasis.core.statistics import finite_median

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


Kind = Literal["identical", "partial", "copy", "finetuned", "independent", "mixed"]


@dataclass(frozen=True)
class Verdict:
    """What the pair is, with its evidence in one sentence.

    Attributes:
        kind: identical, partial, copy, finetuned, independent, or mixed.
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


def judge(facts: Facts) -> Verdict:
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

    - identical: everything frozen, and every matrix of both compared;
    - partial: what was compared is frozen, and there are matrices that were not compared;
    - copy: nothing related, and of what is not frozen at most `SMALL_SHARE` unrelated, the rest copied;
    - independent: among what is not frozen, more than 1 − `SMALL_SHARE` unrelated, and less than half frozen;
    - finetuned: something related, and at most `SMALL_SHARE` unrelated; frozen parts are named;
    - mixed: everything else; the frozen and the unrelated parts are named.

    Two runs from one random initialisation, and two finetunes of one base, are related: from two checkpoints alone
    neither can be told from a finetune of the other (`specbasis.lineage.tree` says what several can tell).
    """
    matrices = facts.matrices
    total = sum(m["size"] for m in matrices)
    groups: dict[str, list[Fact]] = {group: [] for group in ("frozen", "copied", "related", "unrelated")}
    for m in matrices:
        groups[_group(m)].append(m)
    share = {group: sum(m["size"] for m in members) / total for group, members in groups.items()}
    changed = 1 - share["frozen"]
    kind: Kind
    if len(groups["frozen"]) == len(matrices):
        kind = "partial" if facts.uncompared else "identical"
    elif groups["copied"] and not groups["related"] and share["unrelated"] <= SMALL_SHARE * changed:
        kind = "copy"
    elif share["unrelated"] > (1 - SMALL_SHARE) * changed and share["frozen"] < 0.5:
        kind = "independent"
    elif groups["related"] and share["unrelated"] <= SMALL_SHARE:
        kind = "finetuned"
    else:
        kind = "mixed"
    frozen, copied, _, unrelated = (tuple(m["matrix"] for m in members) for members in groups.values())
    return Verdict(kind, _sentence(kind, matrices, groups, facts.uncompared), frozen, unrelated, copied)


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


def _sentence(kind: Kind, matrices: list[Fact], groups: dict[str, list[Fact]], uncompared: Sequence[str]) -> str:
    n = len(matrices)
    if kind == "partial":
        return (
            f"equal bit for bit in the {n} matrices that were compared, and unknown beyond: {len(uncompared)} were "
            f"not compared ({named_parts(uncompared)})"
        )
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


def _part(label: str, members: list[Fact]) -> str:
    return f"; {label}: {len(members)} ({named_parts(m['matrix'] for m in members)})" if members else ""


def _forms(members: list[Fact]) -> dict[str, list[Fact]]:
    forms: dict[str, list[Fact]] = {}
    for m in members:
        forms.setdefault(copy_form(m), []).append(m)
    return forms


def _median(members: list[Fact], measure: str) -> float:
    return finite_median(m.get(measure, math.nan) for m in members)
