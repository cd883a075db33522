"""Summary tables as HTML: the figures of the terminal, for the page and for notebooks. Needs no library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from specbasis.comparison.facts import SIDES
from specbasis.comparison.summary import RoleSummary
from specbasis.comparison.verdict import Verdict, named_parts

if TYPE_CHECKING:
    from specbasis.comparison.check import Finding
    from specbasis.comparison.comparison import Comparison

HEADINGS: tuple[tuple[str, str, int], ...] = (
    ("role", "what the matrices do in their block", 1),
    ("matrices", "number of matrices compared", 1),
    ("top-10 alignment", "mean alignment of the leading 10 singular vectors, over resolved ranks", 2),
    ("top-30 alignment", "mean alignment of the leading 30 singular vectors, over resolved ranks", 2),
    ("chance", "alignment of independent directions", 2),
    ("RSD", "relative spectral distance ‖S_tuned − S_base‖ / ‖S_base‖, mean over matrices", 1),
    ("‖Δ‖/‖W‖", "Frobenius norm of the update over that of the base, mean over matrices", 1),
    ("unresolved", "alignments whose error bound is not small; left out of the means", 1),
)
"""Headings of the summary table, each with what it means, and how many columns (1, or left and right) it spans."""

VERDICTS = {
    "identical": "=",
    "copy": "≅",
    "finetuned": "→",
    "independent": "≠",
    "mixed": "≈",
}
"""A sign for each kind of verdict, so that it does not rest on colour alone."""


SEVERITIES = {"problem": "!", "note": "·"}
"""A sign for each severity of a finding."""


def evidence(finding: Finding) -> str:
    """The figures of a finding beside their thresholds."""
    parts = [f"{name.replace('_', ' ')} {number(value, '.3g')}" for name, value in finding.evidence.items()]
    limits = [f"{name.replace('_', ' ')} {value:g}" for name, value in finding.threshold.items()]
    return ", ".join(parts) + (f" (threshold: {', '.join(limits)})" if limits else "")


def cells(line: RoleSummary) -> list[str]:
    """The cells of one line, as text with the terminal's digits."""
    return [
        line.role,
        str(line.matrices),
        *(number(v, ".3f") for pair in (line.top10, line.top30) for v in pair),
        *(number(v, ".2f") for v in line.chance),
        number(line.rsd, ".2g"),
        number(line.relative_update, ".2g"),
        str(line.unresolved),
    ]


def over_all_ranks(line: RoleSummary) -> str:
    """The other averages, in words, where ranks were left out of those of the table; empty where none were."""
    if not line.unresolved:
        return ""
    ends = [" / ".join(number(v, ".3f") for v in sides) for sides in (line.every10, line.every30)]
    return f"over all ranks, the {line.unresolved} unresolved included: top-10 {ends[0]}, top-30 {ends[1]}"


def number(value: float, form: str) -> str:
    """A number in a format; a dash where there is none."""
    return "–" if math.isnan(value) else format(value, form)


def by_reason(skipped: Iterable[dict[str, str]]) -> dict[str, list[str]]:
    """Names of what was not compared, by the reason for it."""
    groups: dict[str, list[str]] = {}
    for item in skipped:
        where = "" if item["side"] == "both" else f", in {item['side']} only"
        groups.setdefault(item["reason"] + where, []).append(item["name"])
    return groups


def summary_html(comparison: Comparison) -> str:
    """A comparison as a notebook shows it: for each pair its verdict, its table, and what was left out."""
    parts = [
        _notebook_pair(
            label,
            comparison.verdicts[label],
            comparison.findings[label],
            comparison.summaries[label],
            comparison.manifest,
        )
        for label in comparison.pairs
    ]
    failed = "".join(f"<li>{escape(f['error'])}</li>" for f in comparison.failed)
    if failed:
        parts.append(f"<p><b>Failed</b></p><ul>{failed}</ul>")
    return f'<div style="{_BOX}">{"".join(parts)}</div>'


# A notebook has its own colours, light or dark: everything here inherits them, and lines are translucent grey.
_BOX = "max-width:100%;overflow-x:auto;font-size:13px;line-height:1.45"
_LINE = "border-bottom:1px solid rgba(128,128,128,.45)"
_CELL = "padding:2px 9px;text-align:right;white-space:nowrap;background:none;font-variant-numeric:tabular-nums"
_FIRST = _CELL.replace("right", "left")


def _notebook_pair(
    label: str,
    verdict: Verdict,
    findings: Sequence[Finding],
    lines: Sequence[RoleSummary],
    manifest: dict[str, Any],
) -> str:
    about = manifest["pairs"][label]
    head = "".join(
        f'<th scope="col{"group" if span > 1 else ""}" title="{escape(title)}"'
        f' {"colspan" if span > 1 else "rowspan"}="2"'
        f' style="{_FIRST if i == 0 else _CELL};{_LINE if span == 1 else ""}">{escape(name)}</th>'
        for i, (name, title, span) in enumerate(HEADINGS)
    )
    sides = "".join(
        f'<th scope="col" style="{_CELL};{_LINE};font-weight:400">{side}</th>'
        for *_, span in HEADINGS
        if span > 1
        for side in SIDES
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row" style="{_FIRST};font-weight:{weight}">{escape(cell)}</th>'
            if i == 0
            else f'<td style="{_CELL};font-weight:{weight}">{escape(cell)}</td>'
            for i, cell in enumerate(cells(line))
        )
        + "</tr>"
        for line in lines
        for weight in ("600" if line is lines[-1] else "400",)
    )
    left_out = "; ".join(
        f"{len(names)}, {reason}: {named_parts(names, 2)}" for reason, names in by_reason(about["skipped"]).items()
    )
    notes = "".join(f"<br><i>{escape(note)}</i>" for note in about["notes"])
    notes += "".join(f"<br>{SEVERITIES[f.severity]} {escape(f.sentence)}" for f in findings)
    return (
        f'<p style="margin:.4em 0;overflow-wrap:anywhere"><b>{escape(label)}</b><br>'
        f"{VERDICTS[verdict.kind]} {escape(verdict.sentence)}{notes}</p>"
        f'<table style="border-collapse:collapse;background:none;margin:0">'
        f"<thead><tr>{head}</tr><tr>{sides}</tr></thead><tbody>{body}</tbody></table>"
        + (f'<p style="margin:.4em 0">{escape(every)}</p>' if (every := over_all_ranks(lines[-1])) else "")
        + (f'<p style="margin:.4em 0 1em;opacity:.8">Not compared: {escape(left_out)}</p>' if left_out else "")
    )
