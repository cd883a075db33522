"""A comparison of a pair in the few words that everybody reads first."""

from __future__ import annotations

import math
from collections.abc import Iterable

from specbasis.comparison.check import Finding, unlooked
from specbasis.comparison.facts import Facts
from specbasis.comparison.verdict import WHOLE, Verdict
from specbasis.core.statistics import finite_median
from specbasis.core.text import number_of

SIZES = {0.02: "gentle", 0.1: "moderate"}
"""Median ‖Δ‖/‖W‖ of what moved up to which a finetune is called so; beyond it is strong."""

DIRECTIONS = {0.99: "kept", 0.9: "nearly kept", 0.5: "partly kept"}
"""Median top-10 alignment of what moved from which on leading directions are called so; below they are turned."""

_HEADLINES = {
    "identical": "The same weights as this base",
    "partial": "Equal to this base in what was compared; the rest is unknown",
    "copy": "A copy of this base in another form",
    "related": "Related to this base: a finetune of it, or trained from the same start",
    "independent": "No finetune of this base: the weights do not correspond",
    "mixed": "Only partly from this base",
    "undecided": "Undecided: too little to tell whether this is a finetune of this base",
}


def headline(facts: Facts, verdict: Verdict, findings: Iterable[Finding]) -> str:
    """What a pair is, how far it moved, and whether anything is wrong: the first words wherever it is shown."""
    others = {*verdict.frozen, *verdict.unrelated, *verdict.copied}
    moved = [m for m in facts.matrices if m["matrix"] not in others]
    size, top10 = (finite_median(m.get(name, math.nan) for m in moved) for name in ("relative_update", "top10"))
    strength = next((word for most, word in SIZES.items() if size <= most), "strong")
    sentences = [_HEADLINES.get(verdict.kind, f"{strength.capitalize()} finetune of this base")]
    if moved and verdict.kind not in ("copy", "independent"):
        directions = next((word for least, word in DIRECTIONS.items() if top10 >= least), "turned")
        kept = "" if math.isnan(top10) else f"; leading directions {directions}"
        of = f"{len(moved)} of {number_of(len(facts.matrices), 'matrix')}"
        share = f"{100 * size:.2g}" if size < 1 else f"{100 * size:.0f}"
        sentences.append(f"{of} moved by {share}%{kept}")
    if facts.compared < WHOLE:
        sentences.append(f"Only {facts.compared:.0%} of the parameters were compared")
    problems = [finding.kind for finding in findings if finding.severity == "problem"]
    none = "No problems found among what was measured" if unmeasured(facts) else "No problems found"
    sentences.append(f"{number_of(len(problems), 'problem')}: {', '.join(problems)}" if problems else none)
    return ". ".join(sentences) + "."


def unmeasured(facts: Facts) -> list[str]:
    """The problems that nobody could look for, as what shows them was not measured."""
    return [check.kind for check in unlooked(facts.measures) if check.severity == "problem"]
