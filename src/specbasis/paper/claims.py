"""The paper's claims, one by one, against the committed rows: numbers and verdicts are computed, none is typed.

`claims.toml` says for each claim what the paper states, which number of `evidence` speaks of it, in which region
that number has to lie, and what would have contradicted it. `Verdict` follows from the interval alone.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from specbasis.figures.table import Column, Table
from specbasis.paper.evidence import NUMBERS, Effect, NoRowsError, Results

__all__ = ["Measurement", "Verdict", "claims", "markdown", "measurements"]


class Verdict(StrEnum):
    """What an interval allows to say of a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    SIZE = "supported only as an effect of size"
    UNTESTED = "not testable here"


@dataclass(frozen=True)
class Measurement:
    """One measurement of a claim.

    Attributes:
        on: what was measured, on which model and data.
        unit: of the number.
        form: its format.
        region: where the number lies if the claim holds; its ends may be infinite.
        effect: the number; None where there are no rows.
        beyond: how far it exceeds what an update of equal size does; None where size is no question.
        margin: an excess that would count: `beyond` has to lie below it for "an effect of size".
        unmet: what the experiment had to show before the claim could be tested, and did not; empty where it did.
    """

    on: str
    unit: str
    form: str
    region: tuple[float, float]
    effect: Effect | None
    beyond: Effect | None
    margin: float
    unmet: str

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """The verdict, and why it is none."""
        if self.effect is None:
            return Verdict.UNTESTED, "no rows"
        if self.unmet:
            return Verdict.UNTESTED, self.unmet
        if self.effect.high < self.region[0] or self.effect.low > self.region[1]:
            return Verdict.CONTRADICTED, ""
        if not _lies(self.effect, self.region):
            return Verdict.UNTESTED, "undecided, the interval reaches both sides"
        if self.beyond is None or self.beyond.low > 0:
            return Verdict.SUPPORTED, ""
        if self.beyond.high < self.margin:
            return Verdict.SIZE, ""
        return Verdict.UNTESTED, "it holds, but whether more than size is at work is undecided"


@cache
def claims() -> Mapping[str, Any]:
    """`claims.toml`: {"part": titles, "claim": [{"id", "part", "title", "where", "states", …, "test": […]}]}."""
    return tomllib.loads(files("specbasis.paper").joinpath("claims.toml").read_text(encoding="utf-8"))


def measurements(claim: Mapping[str, Any], results: Results) -> Iterator[Measurement]:
    """The measurements of a claim; an entry stands for as many as its ``each`` has combinations."""
    for entry in claim.get("test", ({"on": "–", "within": (-math.inf, math.inf)},)):
        lists = entry.get("each", {})
        for values in itertools.product(*lists.values()):
            yield _measurement(_filled(entry, dict(zip(lists, values, strict=True))), results)


def _measurement(entry: Mapping[str, Any], results: Results) -> Measurement:
    needs = [(need, _effect(need["number"], results)) for need in entry.get("needs", ())]
    unmet = [need["unmet"] for need, value in needs if value is None or not _lies(value, need["within"])]
    effect, beyond = (_effect(entry.get(key), results) for key in ("number", "beyond"))
    low, high = entry["within"]
    return Measurement(
        on=entry["on"],
        unit=entry.get("unit", ""),
        form=entry.get("form", "+.3f"),
        region=(float(low), float(high)),
        effect=effect,
        beyond=beyond,
        margin=entry.get("margin", 0.0),
        unmet="; ".join(unmet),
    )


def _effect(named: Mapping[str, Any] | None, results: Results) -> Effect | None:
    """The number that an entry names."""
    if not named:
        return None
    arguments = dict(named)
    try:
        return NUMBERS[arguments.pop("of")](results, **arguments)
    except NoRowsError:
        return None


def _lies(effect: Effect, region: Sequence[float]) -> bool:
    """Whether a whole interval lies in a region; one whose ends are NaN does not."""
    return region[0] <= effect.low and effect.high <= region[1]


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """An entry with the values of ``each`` in place of {NAME}, and with their titles in place of {NAME.title}."""
    if isinstance(value, str):
        for name, word in names.items():
            if value == f"{{{name}}}":
                return word
            value = value.replace(f"{{{name}.title}}", str(claims()["titles"].get(str(word), word)))
            value = value.replace(f"{{{name}}}", str(word))
        return value
    if isinstance(value, Mapping):
        return {key: _filled(item, names) for key, item in value.items()}
    return [_filled(item, names) for item in value] if isinstance(value, list) else value


# --- the page -----------------------------------------------------------------------------------------------------


def markdown(folder: Path) -> str:
    """The page, from the rows below a folder."""
    results, about = Results(folder), claims()
    tests = {claim["id"]: list(measurements(claim, results)) for claim in about["claim"]}
    count = Counter(test.verdict[0] for every in tests.values() for test in every)
    counts = "; ".join(f"{count[verdict]} *{verdict}*" for verdict in Verdict)
    summary = (
        (f"[{claim['title']}](#{_anchor(claim['title'])})", claim["where"], _summary(tests[claim["id"]]))
        for claim in about["claim"]
    )
    columns = tuple(Column(name, words=True) for name in ("claim", "where", "measurements"))
    parts = [about["head"].strip(), f"{len(tests)} claims, {count.total()} measurements: {counts}."]
    parts += ["\n".join(_agreeing(about["claim"], tests))]
    parts += [Table(columns, tuple(summary)).markdown().strip()]
    for part, title in about["part"].items():
        parts.append(f"## {title}")
        for claim in (claim for claim in about["claim"] if claim["part"] == part):
            parts += _section(claim, tests[claim["id"]])
    return "\n\n".join(parts) + "\n"


def _agreeing(about: Sequence[Mapping[str, Any]], tests: Mapping[str, Sequence[Measurement]]) -> Iterator[str]:
    """For each verdict but the last: the claims all of whose measurements have it."""
    for verdict in list(Verdict)[:-1]:
        titles = [c["title"] for c in about if {test.verdict[0] for test in tests[c["id"]]} == {verdict}]
        yield f"- *{verdict}* in every measurement: {'; '.join(titles) or 'none'}."


def _anchor(title: str) -> str:
    """What GitHub calls a heading in a link."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _summary(tests: list[Measurement]) -> str:
    """How many measurements have which verdict; the verdict alone where all agree."""
    count = Counter(test.verdict[0] for test in tests)
    if len(count) == 1:
        return f"**{next(iter(count))}**" + (f" ({len(tests)})" if len(tests) > 1 else "")
    return ", ".join(f"{verdict} ({count[verdict]})" for verdict in Verdict if count[verdict])


def _section(claim: Mapping[str, Any], tests: list[Measurement]) -> list[str]:
    controlled = any(test.beyond for test in tests)
    names = ("measured", "number", "interval over", "holds if", *(["beyond size"] if controlled else []), "verdict")
    body = [
        (test.on, _shown(test.effect, test), test.effect.over if test.effect else None, _region(test))
        + ((_shown(test.beyond, test),) if controlled else ())
        + (_verdict(test),)
        for test in tests
    ]
    table = Table(tuple(Column(name, words=True) for name in names), tuple(body)).markdown().strip()
    facts = {"Stated": f"{claim['states']} ({claim['where']})", "Would have contradicted it": claim["refuted"]}
    facts |= {"To test it": claim["open"]} if "open" in claim else {}
    facts |= {"Note": claim["note"]} if "note" in claim else {}
    links = ", ".join(f"[{Path(path).name}]({path})" for path in claim.get("see", ()))
    facts |= {"Rows and figures": links} if links else {}
    facts |= {"Command": f"`{claim['command']}`"} if "command" in claim else {}
    return [f"### {claim['title']}", table, "\n".join(f"- {k}: {v}" for k, v in facts.items())]


def _shown(effect: Effect | None, test: Measurement) -> str | None:
    if effect is None:
        return None
    value = format(effect.mean, test.form)
    if math.isinf(effect.low) and math.isinf(effect.high):
        return f"{value} {test.unit}".strip()
    ends = "" if effect.low == effect.high else f" [{effect.low:{test.form}}, {effect.high:{test.form}}]"
    return f"{value}{ends} {test.unit}".strip()


def _region(test: Measurement) -> str:
    low, high = test.region
    if math.isinf(low):
        return "–" if math.isinf(high) else f"≤ {high:g}"
    return f"≥ {low:g}" if math.isinf(high) else f"{low:g} … {high:g}"


def _verdict(test: Measurement) -> str:
    verdict, why = test.verdict
    return f"**{verdict}**" + (f": {why}" if why else "")
