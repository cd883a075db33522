"""Findings: what a user of a finetune should know, in plain words, each with its evidence and threshold as data.

Computed from rows alone, so that terminal, page, notebook and JSON say the same. To add one, write a function of a
`Facts` that returns a `Finding` or None, and add one line to `CHECKS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from specbasis.comparison.summary import (
    RELATED_COSINE,
    RELATED_SIGMAS,
    SIDES,
    Verdict,
    copy_form,
    judge,
    matrix_facts,
    named_parts,
)
from specbasis.core.errors import InputError
from specbasis.core.intruders import INTRUDER_COSINE, INTRUDER_RANKS

ROUNDING = 0.2
"""Root-mean-square rounding error over the root mean square of entries, in units of 2^(1 − bits).

ulp²/12 against x² over mantissas in [1, 2): √((1/12) / (7/3)) = 0.189 where these are uniform, 0.196 where their
logarithms are; 0.21 for normal entries.
"""

Fact = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a pair.

    Attributes:
        kind: which check found it, as in `CHECKS` and ``--fail-on``.
        severity: "problem" where the comparison or the finetune is likely not what was meant, else "note".
        sentence: what was found, in plain words, with its figures.
        matrices: which matrices it is about; all when empty.
        evidence: the figures it rests on.
        threshold: the figures they were held against.
    """

    kind: str
    severity: Literal["problem", "note"]
    sentence: str
    matrices: tuple[str, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)
    threshold: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Facts:
    """What the checks read of one pair.

    Attributes:
        rows: the rows of the pair.
        verdict: what `judge` said.
        matrices: see `specbasis.comparison.summary.matrix_facts`.
        failed: matrices that could not be decomposed, with the error.
    """

    rows: pa.Table
    verdict: Verdict
    matrices: Sequence[Fact]
    failed: Sequence[Mapping[str, str]] = ()

    @cached_property
    def moved(self) -> list[Fact]:
        """Matrices that changed and still are those of base."""
        still = {*self.verdict.frozen, *self.verdict.unrelated, *self.verdict.copied}
        return [m for m in self.matrices if m["matrix"] not in still]

    def share(self, matrices: Iterable[Fact | str]) -> float:
        """Of the compared parameters, how many are in some matrices."""
        names = {m if isinstance(m, str) else m["matrix"] for m in matrices}
        inside = sum(m["size"] for m in self.matrices if m["matrix"] in names)
        return float(inside / sum(m["size"] for m in self.matrices))

    def having(self, *measures: str) -> list[Fact]:
        """The moved matrices that have some figures."""
        return [m for m in self.moved if all(math.isfinite(m.get(measure, math.nan)) for measure in measures)]


@dataclass(frozen=True)
class Check:
    """One kind of finding.

    Attributes:
        kind: its name.
        about: what it looks for.
        severity: that of what it finds.
        threshold: figures that decide.
        find: what it finds in a pair: sentence, matrices, evidence; None where there is nothing to say.
    """

    kind: str
    about: str
    severity: Literal["problem", "note"]
    threshold: Mapping[str, float]
    find: Callable[[Facts, Mapping[str, float]], tuple[str, Iterable[str], dict[str, float]] | None]


Found = tuple[str, Iterable[str], dict[str, float]] | None


def find(rows: pa.Table, pair: str, failed: Sequence[Mapping[str, str]] = ()) -> list[Finding]:
    """All findings of a pair, problems first, in the order of `CHECKS`.

    Args:
        rows: rows of a comparison.
        pair: the pair's label.
        failed: matrices without rows: dictionaries with pair, matrix and error.
    """
    mine = rows.filter(pc.field("pair") == pair)
    mine = mine.unify_dictionaries() if len(mine) else mine
    facts = Facts(mine, judge(mine, pair), matrix_facts(mine, pair), [f for f in failed if f["pair"] == pair])
    found = [_made(check, check.find(facts, check.threshold)) for check in CHECKS]
    return sorted((f for f in found if f), key=lambda f: f.severity != "problem")


def kinds(words: Sequence[str]) -> tuple[str, ...]:
    """The names of checks that a user asked for.

    Raises:
        InputError: one of them is no check.
    """
    known = [check.kind for check in CHECKS]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise InputError(f"no finding is called {', '.join(unknown)}; there is: {', '.join(known)}")
    return tuple(words)


def _made(check: Check, found: Found) -> Finding | None:
    if found is None:
        return None
    sentence, matrices, evidence = found
    return Finding(
        check.kind, check.severity, f"{check.kind}: {sentence}", tuple(matrices), evidence, check.threshold
    )


# --- the checks -------------------------------------------------------------------------------------------------


def _failed(facts: Facts, _: Mapping[str, float]) -> Found:
    if not facts.failed:
        return None
    names = [f["matrix"] for f in facts.failed]
    return f"{_count(names)} could not be decomposed: {facts.failed[0]['error']}", names, {"matrices": len(names)}


def _wrong_base(facts: Facts, _: Mapping[str, float]) -> Found:
    if facts.verdict.kind != "independent":
        return None
    gone = [m for m in facts.matrices if m["matrix"] in facts.verdict.unrelated]
    cosine, z = (_median(gone, name) for name in ("weight_cosine", "weight_cosine_z"))
    words = "" if math.isnan(z) else f", {z:.1f} standard deviations from chance"
    return (
        f"the weights do not correspond to those of base (median cosine {cosine:.3f}{words}): another base, "
        "training from scratch, or hidden units in another order",
        [m["matrix"] for m in gone],
        {"weight_cosine": cosine, "weight_cosine_z": z, "share": facts.share(gone)},
    )


def _foreign(facts: Facts, _: Mapping[str, float]) -> Found:
    names = facts.verdict.unrelated
    if not names or facts.verdict.kind == "independent":
        return None
    share = facts.share(names)
    return f"{_count(names)} ({share:.1%} of the parameters) were not finetuned from base", names, {"share": share}


def _intruders(facts: Facts, threshold: Mapping[str, float]) -> Found:
    counted = facts.having(*(f"intruders_{side}" for side in SIDES))
    most = [m for m in counted if max(m[f"intruders_{side}"] for side in SIDES) >= threshold["count"]]
    if not most:
        return None
    most = sorted(most, key=lambda m: -sum(m[f"intruders_{side}"] for side in SIDES))
    left, right = (sum(m[f"intruders_{side}"] for m in most) for side in SIDES)
    return (
        f"among the leading {INTRUDER_RANKS} vectors of tuned, {left:g} left and {right:g} right are like none of "
        f"base (best cosine below {INTRUDER_COSINE:g}), in {_count(most)}",
        [m["matrix"] for m in most],
        {"left": left, "right": right, "matrices": len(most)},
    )


def _collapse(facts: Facts, threshold: Mapping[str, float]) -> Found:
    ratio = {
        m["matrix"]: m["effective_rank_tuned"] / m["effective_rank_base"]
        for m in facts.having("effective_rank_base", "effective_rank_tuned")
    }
    low = sorted((name for name in ratio if ratio[name] <= threshold["ratio"]), key=lambda name: ratio[name])
    if not low:
        return None
    return (
        f"the effective rank of {_count(low)} fell, to {ratio[low[0]]:.0%} of that of base in {low[0]}",
        low,
        {"lowest_ratio": ratio[low[0]], "median_ratio": median(ratio.values())},
    )


def _rounding(facts: Facts, threshold: Mapping[str, float]) -> Found:
    # What is seen is update and rounding in quadrature: √2 times the rounding where the two are equal.
    within = [
        m
        for m in facts.having("precision_base", "precision_tuned")
        if m["relative_update"] <= threshold["factor"] * rounding(m)
    ]
    if not within:
        return None
    worst = max(within, key=lambda m: rounding(m) / m["relative_update"])
    bits = min(worst["precision_base"], worst["precision_tuned"])
    return (
        f"in {_count(within)} the update is no larger than the rounding of the stored weights, e.g. "
        f"{worst['matrix']}: ‖Δ‖/‖W‖ {worst['relative_update']:.2g}, "
        f"rounding to {bits:g} bits {rounding(worst):.2g}",
        [m["matrix"] for m in within],
        {"relative_update": worst["relative_update"], "rounding": rounding(worst), "share": facts.share(within)},
    )


def _reordered(facts: Facts, threshold: Mapping[str, float]) -> Found:
    def sides(m: Fact) -> tuple[float, float]:
        low, high = sorted((m["top10_left"], m["top10_right"]))
        return low, high

    gone = [m for m in facts.matrices if m["matrix"] in facts.verdict.unrelated]
    gone = [m for m in gone if min(m["out"], m["in"]) >= threshold["side"]]
    one_sided = [m for m in gone if sides(m)[1] >= threshold["kept"] and sides(m)[0] <= threshold["lost"]]
    if not one_sided:
        return None
    low, high = (median(sides(m)[i] for m in one_sided) for i in (0, 1))
    return (
        f"in {_count(one_sided)} the vectors of one side keep their directions (median top-10 "
        f"alignment {high:.2f}) and those of the other do not ({low:.2f}): rows or columns in another order",
        [m["matrix"] for m in one_sided],
        {"kept": high, "lost": low},
    )


def _copied(facts: Facts, _: Mapping[str, float]) -> Found:
    names = facts.verdict.copied
    if not names:
        return None
    share = facts.share(names)
    kinds_ = sorted({copy_form(m) for m in facts.matrices if m["matrix"] in names})
    return (
        f"{_count(names)} ({share:.1%} of the parameters) hold the weights of base in another form: "
        + ", ".join(kinds_),
        names,
        {"share": share},
    )


def _frozen(facts: Facts, _: Mapping[str, float]) -> Found:
    names = facts.verdict.frozen
    if not names:
        return None
    share = facts.share(names)
    text = f"{_count(names)} ({share:.1%} of the parameters) are equal bit for bit"
    return text, names, {"share": share, "matrices": len(names)}


def _barely(facts: Facts, threshold: Mapping[str, float]) -> Found:
    still = [m for m in facts.having("relative_update") if m["relative_update"] <= threshold["relative_update"]]
    if not still:
        return None
    size = _median(still, "relative_update")
    return (
        f"{_count(still)} ({facts.share(still):.1%} of the parameters) changed by at most "
        f"{threshold['relative_update']:.1%} of their norm (median {size:.2g}): high alignment there says nothing",
        [m["matrix"] for m in still],
        {"relative_update": size, "share": facts.share(still)},
    )


def _noise(facts: Facts, threshold: Mapping[str, float]) -> Found:
    """Σσ⁴ and σ₁ would tell more; the stable rank alone separates noise from every real finetune measured."""
    tested = [m for m in facts.having("stable_rank_delta") if min(m["out"], m["in"]) >= threshold["side"]]
    ratio = {m["matrix"]: m["stable_rank_delta"] / noise_rank(m["out"], m["in"]) for m in tested}
    like = [name for name in ratio if ratio[name] >= threshold["ratio"]]
    if not tested or len(like) < threshold["share"] * len(tested):
        return None
    middle = median(ratio.values())
    return (
        f"the update of {_count(like)} has the spectrum of noise (stable rank {middle:.0%} of that of random "
        "entries): rounding, quantisation or added noise rather than training",
        like,
        {"ratio": middle, "relative_update": _median(tested, "relative_update")},
    )


def noise_rank(out: int, width: int) -> float:
    """Stable rank of a large matrix of independent entries: out·in / (√out + √in)². Source: Bai & Yin 1993."""
    return out * width / (math.sqrt(out) + math.sqrt(width)) ** 2


def rounding(m: Fact) -> float:
    """Relative rounding error that the precision of both sides leaves: `ROUNDING`·2^(1 − bits), in quadrature."""
    return ROUNDING * math.hypot(*(2.0 ** (1 - m[f"precision_{side}"]) for side in ("base", "tuned")))


def _low_rank(facts: Facts, threshold: Mapping[str, float]) -> Found:
    """Ranks of delta that stand out of the rounding of the weights, whose largest singular value is about that."""
    spectra = _spectra(facts.rows, "singular_value_delta")
    ranks: dict[str, int] = {}
    for m in facts.having("norm_base", "precision_base"):
        S = spectra.get(m["matrix"])
        if S is None or min(m["out"], m["in"]) < threshold["side"]:
            continue
        floor = rounding(m) * m["norm_base"] / math.sqrt(noise_rank(m["out"], m["in"]))
        rank = int((threshold["floor"] * floor < S).sum())
        if 0 < rank <= threshold["share"] * len(S):
            ranks[m["matrix"]] = rank
    if not ranks:
        return None
    low, high = min(ranks.values()), max(ranks.values())
    text = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return (
        f"the update of {_count(ranks)} has only {text} above the rounding of the weights: a merged low-rank "
        "adapter, or only some of the rows trained",
        ranks,
        {"lowest_rank": low, "highest_rank": high},
    )


def _quantised(facts: Facts, _: Mapping[str, float]) -> Found:
    on = [m for m in facts.having("grid_levels_tuned") if math.isnan(m.get("grid_levels_base", math.nan))]
    if not on:
        return None
    levels = _median(on, "grid_levels_tuned")
    text = f"the entries of {_count(on)} lie on a grid, with about {levels:.0f} levels for 32 neighbours; those of "
    return text + "base do not", [m["matrix"] for m in on], {"levels": levels, "share": facts.share(on)}


def _pruned(facts: Facts, threshold: Mapping[str, float]) -> Found:
    zeros = {
        m["matrix"]: m["zero_entries_tuned"] - m["zero_entries_base"]
        for m in facts.having("zero_entries_tuned", "zero_entries_base")
    }
    cut = {name: share for name, share in zeros.items() if share >= threshold["share"]}
    if not cut:
        return None
    middle = median(cut.values())
    return f"in {_count(cut)} a share of the entries became zero (median {middle:.1%})", cut, {"share": middle}


def _outliers(facts: Facts, threshold: Mapping[str, float]) -> Found:
    """Robust z of the logarithm of ‖Δ‖/‖W‖ among the matrices of one role."""
    by_role: dict[str, list[Fact]] = {}
    for m in facts.having("relative_update"):
        by_role.setdefault(m["role"], []).append(m)
    far: dict[str, tuple[float, float]] = {}
    for members in by_role.values():
        if len(members) < threshold["members"]:
            continue
        logs = np.log([m["relative_update"] for m in members])
        off = logs - np.median(logs)
        spread = 1.4826 * float(np.median(np.abs(off)))
        for m, distance in zip(members, off, strict=True):
            z = distance / spread if spread > 0 else math.copysign(math.inf, distance)
            if abs(distance) >= math.log(threshold["factor"]) and abs(z) >= threshold["robust_z"]:
                far[m["matrix"]] = (float(z), math.exp(distance))
    if not far:
        return None
    name = max(far, key=lambda name: abs(far[name][0]))
    z, factor = far[name]
    return (
        f"{_count(far)} moved unlike the others of the same role: {name} by {factor:.2g} times their median "
        f"(robust z {z:.1f})",
        sorted(far, key=lambda name: -abs(far[name][0])),
        {"robust_z": z, "factor": factor},
    )


def _count(names: Iterable[Any]) -> str:
    names = [m if isinstance(m, str) else m["matrix"] for m in names]
    return f"{len(names)} matri{'x' if len(names) == 1 else 'ces'}" + (
        f" ({named_parts(names, 2)})" if names else ""
    )


def _median(matrices: Iterable[Fact], measure: str) -> float:
    values = [m[measure] for m in matrices if math.isfinite(m.get(measure, math.nan))]
    return median(values) if values else math.nan


def _spectra(rows: pa.Table, measure: str) -> dict[str, np.ndarray[Any, Any]]:
    part = rows.filter(pc.field("measure") == measure)
    names, values = part["matrix"].to_pylist(), part["value"].to_numpy()
    at: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        at.setdefault(name, []).append(i)
    return {name: values[places] for name, places in at.items()}


CHECKS: tuple[Check, ...] = (
    Check("failed", "matrices with NaN or Inf", "problem", {}, _failed),
    Check(
        "wrong-base",
        "weights that do not come from base",
        "problem",
        {"weight_cosine": RELATED_COSINE, "weight_cosine_z": RELATED_SIGMAS},
        _wrong_base,
    ),
    Check(
        "foreign-parts",
        "parts of a finetune that do not come from base",
        "problem",
        {"weight_cosine": RELATED_COSINE, "weight_cosine_z": RELATED_SIGMAS},
        _foreign,
    ),
    Check(
        "reordered",
        "rows or columns in another order",
        "problem",
        {"kept": 0.9, "lost": 0.3, "side": 8},
        _reordered,
    ),
    Check(
        "intruders",
        "leading vectors of tuned that are like none of base",
        "problem",
        {"count": 1, "cosine": INTRUDER_COSINE, "leading": INTRUDER_RANKS},
        _intruders,
    ),
    Check("rank-collapse", "a fall of the effective rank", "problem", {"ratio": 0.8}, _collapse),
    Check("storage-rounding", "updates no larger than rounding", "problem", {"factor": 1.5}, _rounding),
    Check(
        "outlier-layer",
        "matrices that moved unlike the others of their role",
        "problem",
        {"robust_z": 5.0, "factor": 3.0, "members": 5},
        _outliers,
    ),
    Check(
        "noise", "updates with the spectrum of noise", "problem", {"ratio": 0.8, "share": 0.5, "side": 32}, _noise
    ),
    Check("copied", "weights of base in another form", "note", {}, _copied),
    Check("quantised", "entries on a grid", "note", {}, _quantised),
    Check("pruned", "entries that became zero", "note", {"share": 0.01}, _pruned),
    Check("frozen", "matrices equal bit for bit", "note", {}, _frozen),
    Check("barely-moved", "updates too small to turn vectors", "note", {"relative_update": 1e-3}, _barely),
    Check(
        "low-rank",
        "updates of few ranks above rounding",
        "note",
        {"floor": 4.0, "share": 0.25, "side": 32},
        _low_rank,
    ),
)
"""All checks, in the order in which their findings are told."""


def as_json(content: Any) -> Any:
    """Plain data for JSON: NaN and infinities, which it does not have, become null."""
    if isinstance(content, Mapping):
        return {str(key): as_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [as_json(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    return content
