"""What a finding is, what a check reads of a pair, and how a function becomes a check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from specbasis.comparison.facts import Fact, Facts
from specbasis.comparison.verdict import Verdict

THRESHOLDS = "findings-1"
"""Name and version of all checks and their thresholds together: a change of any of them makes it another."""

Severity = Literal["problem", "note"]
Found = tuple[str, Iterable[str], dict[str, float]]
"""What a check found: a sentence, the matrices that it is about, and the figures that it rests on."""


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
    severity: Severity
    sentence: str
    matrices: tuple[str, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)
    threshold: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Judged:
    """What the checks read of one pair.

    Attributes:
        facts: what its rows say.
        verdict: what `judge` says of them.
    """

    facts: Facts
    verdict: Verdict

    @cached_property
    def moved(self) -> list[Fact]:
        """Matrices that changed and still are those of base."""
        still = {*self.verdict.frozen, *self.verdict.unrelated, *self.verdict.copied, *self.verdict.undecided}
        return [m for m in self.facts.matrices if m["matrix"] not in still]

    def share(self, matrices: Iterable[Fact | str]) -> float:
        """Of the compared parameters, how many are in some matrices."""
        names = {m if isinstance(m, str) else m["matrix"] for m in matrices}
        inside = sum(m["size"] for m in self.facts.matrices if m["matrix"] in names)
        return float(inside / sum(m["size"] for m in self.facts.matrices))

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
        needs: measures that it reads, of those that a comparison can leave out.
        threshold: figures that decide.
        find: what it finds in a pair; None where there is nothing to say.
    """

    kind: str
    about: str
    severity: Severity
    needs: tuple[str, ...]
    threshold: Mapping[str, float]
    find: Callable[[Judged, Mapping[str, float]], Found | None]


def thresholds() -> dict[str, Any]:
    """Name and version of the checks and their thresholds, and of each check what decides, as data."""
    checks = {c.kind: {"severity": c.severity, "about": c.about, "threshold": dict(c.threshold)} for c in CHECKS}
    return {"version": THRESHOLDS, "checks": checks}


_Function = Callable[[Judged, Mapping[str, float]], Found | None]

CHECKS: list[Check] = []
"""All checks, in the order in which their findings are told."""


def unlooked(measures: Set[str]) -> list[Check]:
    """The checks that these measures say nothing of: that they found nothing says nothing."""
    return [check for check in CHECKS if not measures >= {*check.needs}]


def check(
    kind: str, about: str, severity: Severity, *needs: str, **threshold: float
) -> Callable[[_Function], _Function]:
    """Make a function a check; see `Check` for what it is given and returns."""

    def register(function: _Function) -> _Function:
        CHECKS.append(Check(kind, about, severity, needs, threshold, function))
        return function

    return register
