"""Findings: what a user of a finetune should know, in plain words, each with its evidence and threshold as data.

To add one, write a function of a `Judged` pair and of its thresholds that returns what it found, or None, and put
`check` on it: the terminal, the page, notebooks, JSON and ``--fail-on`` then know it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from specbasis.comparison.check import CHECKS, Finding, Found, Judged, check
from specbasis.comparison.facts import SIDES, Fact, Facts
from specbasis.comparison.verdict import (
    KEPT_COSINE,
    LEVEL,
    RELATED_COSINE,
    Verdict,
    copy_form,
    noise_rank,
    rounding,
)
from specbasis.core.errors import want
from specbasis.core.intruders import INTRUDER_COSINE, INTRUDER_RANKS
from specbasis.core.statistics import finite_median
from specbasis.core.text import named_parts, number_of

__all__ = ["CHECKS", "find", "kinds"]

_VALUES = "singular_value_delta"
_ORIGIN = {"weight_cosine": RELATED_COSINE, "kept_cosine": KEPT_COSINE, "level": LEVEL}
_CUT = {"floor": 4.0, "share": 0.25, "side": 32, "fall": 3.0}


def find(facts: Facts, verdict: Verdict) -> list[Finding]:
    """All findings of a pair, problems first, in the order of `CHECKS`."""
    pair = Judged(facts, verdict)
    findings = []
    for kind in CHECKS:
        if (result := kind.find(pair, kind.threshold)) is not None:
            sentence, matrices, evidence = result
            text = f"{kind.kind}: {sentence}"
            findings.append(Finding(kind.kind, kind.severity, text, tuple(matrices), evidence, kind.threshold))
    return sorted(findings, key=lambda finding: finding.severity != "problem")


def kinds(words: Sequence[str]) -> tuple[str, ...]:
    """The names of checks that a user asked for.

    Raises:
        InputError: one of them is no check.
    """
    want("finding", [kind.kind for kind in CHECKS], *words)
    return tuple(words)


def _both(measure: str, sides: Sequence[str] = ("base", "tuned")) -> list[str]:
    return [f"{measure}_{side}" for side in sides]


# --- the checks -------------------------------------------------------------------------------------------------


@check("failed", "matrices with NaN or Inf", "problem")
def _failed(pair: Judged, _: Mapping[str, float]) -> Found | None:
    if not pair.facts.failed:
        return None
    names = [f["matrix"] for f in pair.facts.failed]
    return (
        f"{_count(names)} could not be decomposed: {pair.facts.failed[0]['error']}",
        names,
        {"matrices": len(names)},
    )


@check("wrong-base", "weights that do not come from base, or an adapter that names others", "problem", **_ORIGIN)
def _wrong_base(pair: Judged, _: Mapping[str, float]) -> Found | None:
    if pair.facts.other_base:
        return f"tuned {pair.facts.other_base}; only where these hold the same numbers is it this base's", (), {}
    if pair.verdict.kind != "independent":
        return None
    gone = [m for m in pair.facts.matrices if m["matrix"] in pair.verdict.unrelated]
    cosine, z = (_median(gone, name) for name in ("weight_cosine", "weight_cosine_z"))
    words = "" if math.isnan(z) else f", {z:.1f} standard deviations from chance"
    return (
        f"the weights do not correspond to those of base (median cosine {cosine:.3f}{words}): another base, "
        "training from scratch, or hidden units in another order",
        [m["matrix"] for m in gone],
        {"weight_cosine": cosine, "weight_cosine_z": z, "share": pair.share(gone)},
    )


@check("foreign-parts", "parts of a finetune that do not come from base", "problem", **_ORIGIN)
def _foreign(pair: Judged, _: Mapping[str, float]) -> Found | None:
    names = pair.verdict.unrelated
    if not names or pair.verdict.kind == "independent":
        return None
    share = pair.share(names)
    return f"{_count(names)} ({share:.1%} of the parameters) were not finetuned from base", names, {"share": share}


@check("zeros", "matrices of nothing but zeros in tuned", "problem", *_both("zero_entries"))
def _zeros(pair: Judged, _: Mapping[str, float]) -> Found | None:
    lost = [m for m in pair.facts.matrices if m.get("zero_entries_tuned") == 1 and m.get("zero_entries_base") != 1]
    if not lost:
        return None
    share = pair.share(lost)
    text = f"{_count(lost)} of tuned hold nothing but zeros ({share:.1%} of the parameters), where base has weights"
    return text, [m["matrix"] for m in lost], {"share": share}


@check(
    "reordered",
    "rows or columns in another order",
    "problem",
    *_both("alignment", SIDES),
    kept=0.9,
    lost=0.3,
    side=8,
)
def _reordered(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    def sides(m: Fact) -> tuple[float, float]:
        low, high = sorted((m["top10_left"], m["top10_right"]))
        return low, high

    gone = [m for m in pair.facts.matrices if m["matrix"] in pair.verdict.unrelated]
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


@check(
    "intruders",
    "leading vectors of tuned that are like none of base",
    "problem",
    *_both("intruders", SIDES),
    count=1,
    cosine=INTRUDER_COSINE,
    leading=INTRUDER_RANKS,
)
def _intruders(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    counted = pair.having(*(f"intruders_{side}" for side in SIDES))
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


@check("rank-collapse", "a fall of the effective rank", "problem", *_both("effective_rank"), ratio=0.8)
def _collapse(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    ratio = {
        m["matrix"]: m["effective_rank_tuned"] / m["effective_rank_base"]
        for m in pair.having("effective_rank_base", "effective_rank_tuned")
    }
    low = sorted((name for name in ratio if ratio[name] <= threshold["ratio"]), key=lambda name: ratio[name])
    if not low:
        return None
    return (
        f"the effective rank of {_count(low)} fell, to {ratio[low[0]]:.0%} of that of base in {low[0]}",
        low,
        {"lowest_ratio": ratio[low[0]], "median_ratio": median(ratio.values())},
    )


@check("storage-rounding", "updates no larger than rounding", "problem", *_both("precision"), factor=1.5)
def _rounding(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    # What is seen is update and rounding in quadrature: √2 times the rounding where the two are equal.
    within = [
        m
        for m in pair.having("precision_base", "precision_tuned")
        if m["relative_update"] <= threshold["factor"] * rounding(m)
    ]
    if not within:
        return None
    worst = max(within, key=lambda m: rounding(m) / m["relative_update"])
    bits = f"{min(worst['precision_base'], worst['precision_tuned']):g} bits"
    bits = "its quantised levels" if math.isfinite(worst.get("p_quantised", math.nan)) else bits
    return (
        f"in {_count(within)} the update is no larger than the rounding of the stored weights, e.g. "
        f"{worst['matrix']}: ‖Δ‖/‖W‖ {worst['relative_update']:.2g}, "
        f"rounding to {bits} {rounding(worst):.2g}",
        [m["matrix"] for m in within],
        {"relative_update": worst["relative_update"], "rounding": rounding(worst), "share": pair.share(within)},
    )


@check(
    "outlier-layer",
    "matrices that moved unlike the others of their role",
    "problem",
    robust_z=5.0,
    factor=3.0,
    members=5,
)
def _outliers(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    """Robust z of the logarithm of ‖Δ‖/‖W‖ among the matrices of one role."""
    by_role: dict[str, list[Fact]] = {}
    for m in pair.having("relative_update"):
        # A file that mixes quantised formats moves some more than others.
        if math.isnan(m.get("p_quantised", math.nan)) or m["relative_update"] > 1.5 * rounding(m):
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


@check("noise", "updates with the spectrum of noise", "problem", "stable_rank_delta", ratio=0.8, share=0.5, side=32)
def _noise(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    """Σσ⁴ and σ₁ would tell more; the stable rank alone separates noise from every real finetune measured."""
    tested = [m for m in pair.having("stable_rank_delta") if min(m["out"], m["in"]) >= threshold["side"]]
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


@check("copied", "weights of base in another form", "note")
def _copied(pair: Judged, _: Mapping[str, float]) -> Found | None:
    names = pair.verdict.copied
    if not names:
        return None
    share = pair.share(names)
    kinds_ = sorted({copy_form(m) for m in pair.facts.matrices if m["matrix"] in names})
    return (
        f"{_count(names)} ({share:.1%} of the parameters) hold the weights of base in another form: "
        + ", ".join(kinds_),
        names,
        {"share": share},
    )


@check("quantised", "entries on a grid", "note")
def _quantised(pair: Judged, _: Mapping[str, float]) -> Found | None:
    if stored := [m for m in pair.facts.matrices if m["relative_update"] > 0 and "p_quantised" in m]:
        return _stored_quantised(pair, stored)
    on = [m for m in pair.having("grid_levels_tuned") if math.isnan(m.get("grid_levels_base", math.nan))]
    if not on:
        return None
    levels = _median(on, "grid_levels_tuned")
    text = f"the entries of {_count(on)} lie on a grid, with about {levels:.0f} levels for 32 neighbours; those of "
    return text + "base do not", [m["matrix"] for m in on], {"levels": levels, "share": pair.share(on)}


def _stored_quantised(pair: Judged, stored: Sequence[Fact]) -> Found:
    noises = {m["matrix"]: rounding(m) for m in stored}
    ratio = median(m["relative_update"] / noises[m["matrix"]] for m in stored)
    alone = sum(m["p_quantised"] >= LEVEL for m in stored)
    return (
        f"{_count(stored)} are stored quantised, and read as what their numbers stand for: rounding is about "
        f"{median(noises.values()):.2%} of the weights, and turns trailing singular vectors by itself; the "
        f"difference from base is {ratio:.2f} times as large, and in {alone} of them rounding explains all of it "
        f"(p ≥ {LEVEL:g})",
        [m["matrix"] for m in stored],
        {"rounding_noise": median(noises.values()), "ratio": ratio, "share": pair.share(stored)},
    )


@check("pruned", "entries that became zero", "note", *_both("zero_entries"), share=0.01)
def _pruned(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    zeros = {
        m["matrix"]: m["zero_entries_tuned"] - m["zero_entries_base"]
        for m in pair.having("zero_entries_tuned", "zero_entries_base")
        if math.isnan(m.get("rounding_noise_tuned", math.nan))  # which rounds small entries to zero
    }
    cut = {name: share for name, share in zeros.items() if share >= threshold["share"]}
    if not cut:
        return None
    middle = median(cut.values())
    return f"in {_count(cut)} a share of the entries became zero (median {middle:.1%})", cut, {"share": middle}


@check("frozen", "matrices equal bit for bit", "note")
def _frozen(pair: Judged, _: Mapping[str, float]) -> Found | None:
    names = pair.verdict.frozen
    if not names:
        return None
    share, uncompared = pair.share(names), len(pair.facts.uncompared)
    if uncompared:  # their size is not in the rows
        text = f"{_count(names)}, bit for bit; not compared: {uncompared} of both models"
        return text, names, {"matrices": len(names), "uncompared": uncompared}
    text = f"{_count(names)}, {share:.1%} of the parameters, bit for bit"
    return text, names, {"share": share, "matrices": len(names)}


@check("barely-moved", "updates too small to turn vectors", "note", relative_update=1e-3)
def _barely(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    still = [m for m in pair.having("relative_update") if m["relative_update"] <= threshold["relative_update"]]
    if not still:
        return None
    size = _median(still, "relative_update")
    return (
        f"{_count(still)} ({pair.share(still):.1%} of the parameters) changed by at most "
        f"{threshold['relative_update']:.1%} of their norm (median {size:.2g}): high alignment there says nothing",
        [m["matrix"] for m in still],
        {"relative_update": size, "share": pair.share(still)},
    )


def _ranks(pair: Judged, threshold: Mapping[str, float], *, cut_off: bool) -> dict[str, int]:
    """Matrix → ranks of delta that stand out of the rounding of the weights, whose largest singular value is about
    that: those where the values fall from one rank to the next (cut off), or those where they sink into it.
    """
    columns = pair.facts.columns([_VALUES])
    ranks: dict[str, int] = {}
    for m in pair.having("norm_base", "precision_base"):
        S = columns["value"][columns["matrix"] == m["matrix"]]
        if min(m["out"], m["in"]) < threshold["side"]:
            continue
        floor = rounding(m) * m["norm_base"] / math.sqrt(noise_rank(m["out"], m["in"]))
        rank = int((threshold["floor"] * floor < S).sum())
        # Where only leading values are known, all of them may stand out: what comes then is not known.
        if 0 < rank < len(S) and rank <= threshold["share"] * min(m["out"], m["in"]):
            falls = S[rank - 1] >= threshold["fall"] * max(S[rank], floor)
            ranks |= {m["matrix"]: rank} if falls == cut_off else {}
    return ranks


def _of_ranks(ranks: Mapping[str, int], words: str) -> Found | None:
    if not ranks:
        return None
    low, high = min(ranks.values()), max(ranks.values())
    text = f"rank {low}" if low == high else f"ranks {low} to {high}"
    about = f"the update of {_count(ranks)} has only {text} above the rounding of the weights{words}"
    return about, ranks, {"lowest_rank": low, "highest_rank": high}


@check("low-rank", "updates of few ranks, and nothing beyond them", "note", _VALUES, **_CUT)
def _low_rank(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    words = ", and none in between: a merged low-rank adapter, or only some of the rows trained"
    return _of_ranks(_ranks(pair, threshold, cut_off=True), words)


@check("below-rounding", "updates whose tail is lost in rounding", "note", _VALUES, **_CUT)
def _below(pair: Judged, threshold: Mapping[str, float]) -> Found | None:
    words = ", into which the others sink: what rank it was trained at is not in the stored weights"
    return _of_ranks(_ranks(pair, threshold, cut_off=False), words)


def _count(names: Iterable[Any]) -> str:
    names = [m if isinstance(m, str) else m["matrix"] for m in names]
    return number_of(len(names), "matrix") + (f" ({named_parts(names, 2)})" if names else "")


def _median(matrices: Iterable[Fact], measure: str) -> float:
    return finite_median(m.get(measure, math.nan) for m in matrices)
