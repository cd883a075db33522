"""What a pair is, in one sentence: identical, a copy, finetuned, related, independent, …, with the evidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from specbasis.comparison.facts import Fact, Facts
from specbasis.core.dtypes import BY_PRECISION
from specbasis.core.entries import EXACT_SIDE, LEAST_SIDE, PROBES
from specbasis.core.statistics import finite_median
from specbasis.core.text import named_parts

LEVEL = 1e-3
"""Chance that any matrix of a pair is taken for related where none is: the level of the test, family-wise."""

POWER = 0.95
"""Power at which `least_cosine` says what a test can see."""

RELATED_COSINE = 0.05
"""Below this cosine between base and tuned weights a matrix does not count as a finetune of the other."""

KEPT_COSINE = 0.5
"""What no finetune whose order cannot be seen loses: a matrix is unrelated only where as much is excluded."""

SMALL_SHARE = 0.1
"""A share of the parameters below this does not change the verdict: it is named beside it."""

WHOLE = 0.5
"""A verdict on less than this share of the matrix parameters is marked partial."""

GENTLE = 0.25
"""‖Δ‖/‖W‖ up to which trained weights were finetuned: trainings from one random start end further apart."""

MINUTE = 0.05
"""The same for weights as random as a start, from which two trainings may only have begun to part."""

STRONG = 0.7
"""‖Δ‖/‖W‖ beyond which the angle of an update says nothing about where it began, unless base is random."""

RIGHT_ANGLE = 0.15
"""|⟨Δ, W⟩| / ‖Δ‖² up to which an update leaves base whole: 0 for a step from base, 1/2 between two such steps."""

RANDOM = 0.8
"""Stable rank, over that of random entries, from which on weights are as random as a start."""

SAME_SPECTRUM = 0.01
"""Two matrices of n singular values have one spectrum where their relative spectral distance is below this / n.

Independent random matrices of one distribution differ by about 1/n.
"""

QUANTISED = 0.5
"""Share of sampled groups that must round to the grid; one whose entries skip every second level hides its grid."""

FLAT = 0.999
"""Spectra whose effective rank is above this share of n are all alike, and tell nothing."""

ROUNDING = 0.2
"""Root-mean-square rounding error over the root mean square of entries, in units of 2^(1 − bits).

ulp²/12 against x² over mantissas in [1, 2): √((1/12) / (7/3)) = 0.189 where these are uniform, 0.196 where their
logarithms are; 0.21 for normal entries.
"""

Kind = Literal["identical", "partial", "copy", "finetuned", "related", "independent", "mixed", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What the pair is, with its evidence in one sentence.

    Attributes:
        kind: identical, partial, copy, finetuned, related, independent, mixed, or undecided.
        sentence: the verdict and the figures it rests on.
        frozen: matrices that are equal bit for bit.
        unrelated: matrices that were not finetuned from base (trained anew, or replaced).
        copied: matrices that hold the same weights in another form; see `copy_form`.
        undecided: matrices whose test could not have told; they count for neither side.
        compared: share of the matrix parameters of both models that was compared; NaN where rows of version 0.1
            do not say it.
        test: level (family-wise), power, matrices tested, threshold (the median one, in standard deviations) and
            least_cosine (the median cosine that is found with that power).
    """

    kind: Kind
    sentence: str
    frozen: tuple[str, ...]
    unrelated: tuple[str, ...]
    copied: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()
    compared: float = math.nan
    test: Mapping[str, float] = field(default_factory=dict)


def judge(facts: Facts) -> Verdict:
    """Tell a finetune from a copy, from a relative and from independent training.

    A matrix is, by the first that holds,

    - *frozen* where delta is exactly zero;
    - *copied* where `copy_form` knows the form;
    - *related* where the cosine ⟨base, tuned⟩/(‖base‖‖tuned‖) is at least `RELATED_COSINE` and exceeds that of rows
      and of columns in random order (`weight_cosine_z`) by the `threshold` of a test of level `LEVEL`, family-wise
      over the matrices of the pair (Bonferroni);
    - *unrelated* where the same test of the opposite hypothesis, a cosine of `KEPT_COSINE` without the means, says
      so, or where only one side is zero;
    - *undecided* otherwise: a side is shorter than `LEAST_SIDE`, or the matrix is too small, or of too few
      directions, for either test.

    Shares count the parameters of what is decided:

    - identical: everything frozen, and every matrix of both compared;
    - partial: what was compared is frozen, and there are matrices that were not compared;
    - undecided: nothing that changed is decided;
    - copy: of what is not frozen at most `SMALL_SHARE` related, at most that unrelated, the rest copied;
    - independent: among what is not frozen, more than 1 − `SMALL_SHARE` unrelated, and less than half frozen;
    - finetuned: something related, at most `SMALL_SHARE` unrelated, and `_origin` finds evidence that base was the
      start; related: the same without it;
    - mixed: everything else; the frozen and the unrelated parts are named.
    """
    matrices = facts.matrices
    tested = [m for m in matrices if not _is_frozen(m) and not copy_form(m)]
    groups: dict[str, list[Fact]] = {name: [] for name in ("frozen", "copied", "related", "unrelated", "undecided")}
    for m in matrices:
        groups[_group(m, len(tested))].append(m)
    size = {name: sum(m["size"] for m in members) for name, members in groups.items()}
    changed = size["copied"] + size["related"] + size["unrelated"]
    decided = changed + size["frozen"]
    origin = ""
    kind: Kind
    if len(groups["frozen"]) == len(matrices):
        kind = "partial" if facts.uncompared else "identical"
    elif not changed:
        kind = "undecided"
    elif groups["copied"] and max(size["related"], size["unrelated"]) <= SMALL_SHARE * changed:
        kind = "copy"
    elif size["unrelated"] > (1 - SMALL_SHARE) * changed and size["frozen"] < 0.5 * decided:
        kind = "independent"
    elif groups["related"] and size["unrelated"] <= SMALL_SHARE * decided:
        origin = _origin(groups["related"], size["frozen"] / decided)
        kind = "finetuned" if origin else "related"
    else:
        kind = "mixed"
    names = {name: tuple(m["matrix"] for m in members) for name, members in groups.items()}
    return Verdict(
        kind,
        _sentence(kind, origin, facts, groups),
        names["frozen"],
        names["unrelated"],
        names["copied"],
        names["undecided"],
        facts.compared,
        _test(tested),
    )


# --- a matrix ---------------------------------------------------------------------------------------------------


def threshold(m: Mapping[str, Any], tested: int) -> float:
    """Standard deviations that a matrix, one of several tested, must exceed: level `LEVEL` over all of them.

    Of the normal law, or, where the deviation is measured with `PROBES` random vectors, of Student's with as many
    degrees of freedom, which holds whatever the spectrum.
    """
    from scipy.special import ndtri, stdtrit

    tail = LEVEL / max(tested, 1)
    return -float(ndtri(tail) if min(m["out"], m["in"]) < EXACT_SIDE else stdtrit(PROBES, tail))


def least_cosine(m: Mapping[str, Any], tested: int) -> float:
    """The cosine, without the means, that the test of a matrix finds with probability `POWER`."""
    from scipy.special import ndtri

    limit = m.get("weight_cosine_z_limit", math.nan)
    return (threshold(m, tested) + float(ndtri(POWER))) / limit if limit > 0 else math.nan


def rounding(m: Mapping[str, Any]) -> float:
    """Relative rounding error of both sides, in quadrature: `ROUNDING`·2^(1 − bits), or of a quantised side its."""
    errors = []
    for side in ("base", "tuned"):
        noise = m.get(f"rounding_noise_{side}", math.nan)
        errors.append(noise if math.isfinite(noise) else ROUNDING * 2.0 ** (1 - m[f"precision_{side}"]))
    return math.hypot(*errors)


def noise_rank(out: int, width: int) -> float:
    """Stable rank of a large matrix of independent entries: out·in / (√out + √in)². Source: Bai & Yin 1993."""
    return out * width / (math.sqrt(out) + math.sqrt(width)) ** 2


def copy_form(m: Mapping[str, Any]) -> str:
    """In what other form tuned holds the weights of base, or base those of tuned; empty where it does not.

    Equal once rounded to the coarser precision of the two; one rounds to the other on the other's own levels
    (quantised): those of the file, where it is stored so (`p_quantised`, at `LEVEL`), else those that its entries
    show; a multiple, to rounding; all entries equal but those set to zero; or the values in the spectrum the
    same (`SAME_SPECTRUM`) of weights that do not correspond: rows and columns in another order, as hidden units can
    have without any effect, or with other signs.
    """
    bits = {side: m.get(f"precision_{side}", math.nan) for side in ("base", "tuned")}
    if m.get("zero_entries_tuned", 0) == 1 or m.get("zero_entries_base", 0) == 1:
        return ""
    if m.get("equal_entries_rounded") == 1 and bits["base"] != bits["tuned"]:
        coarser = BY_PRECISION[int(min(bits.values()))]
        return f"rounded to {coarser}" if bits["tuned"] < bits["base"] else f"base is it rounded to {coarser}"
    if (chance := m.get("p_quantised", math.nan)) == chance:
        sides = [math.isfinite(m.get(f"rounding_noise_{side}", math.nan)) for side in ("base", "tuned")]
        form = "both are quantised" if all(sides) else "quantised" if sides[1] else "base is it quantised"
        return form if chance >= LEVEL else ""
    grids = [math.isfinite(m.get(f"grid_levels_{side}", math.nan)) for side in ("base", "tuned")]
    if m.get("equal_entries_grid", 0) >= QUANTISED and sum(grids) == 1:
        return "base is it quantised" if grids[0] else "quantised"
    if _is_multiple(m):
        return f"scaled by {math.copysign(m['norm_tuned'] / m['norm_base'], m['weight_cosine']):.6g}"
    new_zeros = m.get("zero_entries_tuned", math.nan) - m.get("zero_entries_base", math.nan)
    if new_zeros > 0 and abs(1 - m["equal_entries"] - new_zeros) * m["size"] < 0.5:
        return "pruned"
    n = min(m["out"], m["in"])
    same = m.get("rsd", math.nan) <= SAME_SPECTRUM / n and n >= LEAST_SIDE
    flat = m.get("effective_rank_base", math.nan) > FLAT * n
    return "reordered or reflected" if same and not flat and correspondence(m) != "related" else ""


def correspondence(m: Mapping[str, Any], tested: int = 1) -> str:
    """Whether two matrices are related, unrelated or undecided, one of several that are tested; see `judge`."""
    zeros = [m.get(f"zero_entries_{side}", 0) == 1 for side in ("base", "tuned")]
    if any(zeros):
        return "undecided" if all(zeros) else "unrelated"
    cosine, z, limit = (
        m.get(name, math.nan) for name in ("weight_cosine", "weight_cosine_z", "weight_cosine_z_limit")
    )
    if min(m["out"], m["in"]) < LEAST_SIDE:
        return "undecided"
    if math.isnan(limit):  # rows of version 0.1: six deviations of random orders, or, in small matrices, of entries
        z = cosine * math.sqrt(m["size"]) if math.isnan(z) else z
        return "related" if z >= 6 and cosine >= RELATED_COSINE else "unrelated"
    least = threshold(m, tested)
    if z >= least and cosine >= RELATED_COSINE:
        return "related"
    return "unrelated" if KEPT_COSINE * limit - z >= least else "undecided"


def _is_multiple(m: Mapping[str, Any]) -> bool:
    cosine = m["weight_cosine"]
    if not {"norm_base", "norm_tuned", "precision_base", "precision_tuned"} <= m.keys() or m["size"] == 1:
        return False
    beside = math.sqrt(max(0.0, 1 - cosine * cosine))  # of what no factor explains; a cosine has 16 digits
    return bool(beside <= max(1.5 * rounding(m), 1e-7) and m["relative_update"] > 4 * max(beside, 1e-7))


def _is_frozen(m: Mapping[str, Any]) -> bool:
    return not m["relative_update"] > 0 and not math.isnan(m["relative_update"])


def _group(m: Mapping[str, Any], tested: int) -> str:
    if _is_frozen(m):
        return "frozen"
    return "copied" if copy_form(m) else correspondence(m, tested)


# --- the pair ---------------------------------------------------------------------------------------------------


def _origin(related: Sequence[Fact], frozen: float) -> str:
    """What shows that tuned began at base, and not beside it at a start of both; empty where nothing does."""
    if frozen >= SMALL_SHARE:
        return f"{frozen:.0%} of the parameters are equal bit for bit"
    weights = np.array([m["size"] for m in related], float)
    update = np.array([m["relative_update"] for m in related])
    norms = np.array([m.get("norm_tuned", math.nan) / m.get("norm_base", math.nan) for m in related])
    kept = norms * [m["weight_cosine"] for m in related]  # ⟨W̃, W⟩ / ‖W‖²
    turn = float((weights @ (1 - kept)) / (weights @ update**2))
    size = finite_median(update)
    random = finite_median(m.get("stable_rank_base", math.nan) / noise_rank(m["out"], m["in"]) for m in related)
    if size <= (MINUTE if random >= RANDOM else GENTLE):
        began = "one was trained from the other (the weights do not say which), or both from a model close to them"
        return f"an update of this size (median ‖Δ‖/‖W‖ {size:.2g}) means that {began}"
    if abs(turn) <= RIGHT_ANGLE and (random >= RANDOM or size <= STRONG):
        return "the update leaves base whole, at right angles to it"
    return ""


def _test(tested: Sequence[Fact]) -> dict[str, float]:
    n = len(tested)
    return {
        "level": LEVEL,
        "power": POWER,
        "matrices": n,
        "threshold": finite_median(threshold(m, n) for m in tested),
        "least_cosine": finite_median(least_cosine(m, n) for m in tested),
    }


def _sentence(kind: Kind, origin: str, facts: Facts, groups: Mapping[str, list[Fact]]) -> str:
    n = len(facts.matrices)
    if kind == "partial":
        return (
            f"equal bit for bit in the {n} matrices that were compared{_of(facts.compared)}, and unknown beyond: "
            f"{len(facts.uncompared)} were not compared ({named_parts(facts.uncompared)})"
        )
    if kind == "identical":
        return f"identical: all {n} compared matrices are equal bit for bit"
    part = f" (partial:{_of(facts.compared)} were compared)" if facts.compared < WHOLE else ""
    parts = {label: _part(words, groups[label]) for label, words in _WORDS.items()}
    copied = "".join(_part(form, members) for form, members in _forms(groups["copied"]).items())
    rest = f"{parts['frozen']}{copied}"
    if kind == "copy":
        rest = f"{copied}{parts['frozen']}" + _part("changed beside that", groups["related"])
        return f"copy{part}: the same weights in another form{rest}{parts['unrelated']}{parts['undecided']}"
    evidence = _evidence([m for name in ("related", "unrelated", "undecided") for m in groups[name]])
    related, unrelated = (f"{len(groups[name])} of {n} matrices" for name in ("related", "unrelated"))
    if kind == "independent":
        return (
            f"independent training, or another base{part}: {unrelated}: {evidence}{rest}"
            f"{_part('related', groups['related'])}{parts['undecided']}"
        )
    start = {
        "finetuned": f"finetuned from this base{part}: {related}",
        "related": f"related{part}: {related} correspond: finetuned from this base, or trained from the same "
        "initialisation (or from a common base), which the size of the update does not tell",
        "mixed": f"mixed{part}: {related} correspond to those of base",
        "undecided": f"undecided{part}: too weak tests of all {len(groups['undecided'])} matrices that changed",
    }[kind]
    why = f"; {origin}" if origin else ""
    return f"{start}: {evidence}{why}{rest}{parts['unrelated']}{'' if kind == 'undecided' else parts['undecided']}"


_WORDS = {
    "frozen": "frozen, bit for bit",
    "unrelated": "not from this base",
    "undecided": "undecided, too small to tell",
}


def _of(share: float) -> str:
    return "" if math.isnan(share) else f" {share:.1%} of the matrix parameters"


def _evidence(changed: list[Fact]) -> str:
    top10, z, limit = (
        finite_median(m.get(n, math.nan) for m in changed)
        for n in ("top10", "weight_cosine_z", "weight_cosine_z_limit")
    )
    return (
        f"weight cosine with base {_median(changed, 'weight_cosine'):.3f} (chance 0"
        + ("" if math.isnan(z) else f", z {z:.1f}")
        + ("" if math.isnan(limit) else f"; of a copy {limit:.1f}")
        + f"), ‖Δ‖/‖W‖ {_median(changed, 'relative_update'):.3g}"
        + ("" if math.isnan(top10) else f", top-10 alignment {top10:.3f} (chance {_median(changed, 'chance'):.3f})")
        + "; medians over matrices"
    )


def _part(label: str, members: Sequence[Fact]) -> str:
    return f"; {label}: {len(members)} ({named_parts(m['matrix'] for m in members)})" if members else ""


def _forms(members: list[Fact]) -> dict[str, list[Fact]]:
    forms: dict[str, list[Fact]] = {}
    for m in members:
        forms.setdefault(copy_form(m), []).append(m)
    return forms


def _median(members: Iterable[Fact], measure: str) -> float:
    return finite_median(m.get(measure, math.nan) for m in members)
