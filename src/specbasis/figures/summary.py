"""What a comparison comes to, in words and tables: for the terminal, the page and notebooks. Needs no library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from specbasis.comparison.facts import SIDES, Facts
from specbasis.comparison.headline import unmeasured
from specbasis.comparison.summary import RoleSummary
from specbasis.core.text import named_parts, number_of
from specbasis.figures.table import Column, Table, number

if TYPE_CHECKING:
    from specbasis.comparison.check import Finding
    from specbasis.comparison.comparison import Comparison

VERDICTS = {"identical": "=", "partial": "⊆", "copy": "≅", "finetuned": "→", "related": "~", "independent": "≠",
            "mixed": "≈", "undecided": "?"}  # fmt: skip
"""A sign for each kind of verdict, so that it does not rest on colour alone."""

SEVERITIES = {"problem": "!", "note": "·"}
"""A sign for each severity of a finding."""


def _both_sides(group: str, form: str, title: str, narrow: str) -> tuple[Column, Column]:
    left, right = (Column(side, form, title, group, narrow) for side in SIDES)
    return left, right


_MEAN, _VECTORS = "mean alignment of the leading", "singular vectors, over resolved ranks"
COLUMNS = (
    Column("role", title="what the matrices do in their block", words=True),
    Column("matrices", title="number of matrices compared", narrow="n"),
    *_both_sides("top-10 alignment", ".3f", f"{_MEAN} 10 {_VECTORS}", "top-10\nL     R"),
    *_both_sides("top-30 alignment", ".3f", f"{_MEAN} 30 {_VECTORS}", "top-30\nL     R"),
    *_both_sides("chance", ".2f", "alignment of independent directions", "chance\nL    R"),
    Column("RSD", ".2g", "relative spectral distance ‖S_tuned − S_base‖ / ‖S_base‖, mean over matrices"),
    Column("‖Δ‖/‖W‖", ".2g", "Frobenius norm of the update over that of the base, mean over matrices"),
    Column("unresolved", title="alignments whose error bound is not small; left out of the means", narrow="?"),
)
"""The table of a comparison: a line for each role, the last one over all matrices."""


def summary_table(lines: Sequence[RoleSummary], title: str = "") -> Table:
    """The summaries of one pair, by role; narrow enough for a terminal of 80 columns."""
    rows = []
    for line in lines:
        alignments = (*line.top10, *line.top30, *line.chance)
        rows.append((line.role, line.matrices, *alignments, line.rsd, line.relative_update, line.unresolved))
    return Table(COLUMNS, tuple(rows), title, total=True)


def no_problems(facts: Facts) -> str:
    """What is said where no problem was found: of all that there could be, or but for what was not measured."""
    missing = ", ".join(unmeasured(facts))
    return "no problems found" + (f" among what was measured; not looked for: {missing}" if missing else "")


def over_all_ranks(line: RoleSummary) -> str:
    """What was left out of the means of alignments, in words; empty where nothing was."""
    out, left = [], []
    if 0 < line.frozen < line.matrices:
        out.append(f"{line.frozen} frozen of {line.matrices} matrices")
    if 0 < line.short < line.matrices:
        out.append(f"the short side of {number_of(line.short, 'matrix')}, along which all directions are alike")
    if out:
        left.append(f"left out of the means of alignment: {', and '.join(out)}")
    if line.unresolved:
        ends = [" / ".join(number(v, ".3f") for v in sides) for sides in (line.every10, line.every30)]
        left.append(
            f"over all ranks, the {line.unresolved} unresolved included: top-10 {ends[0]}, top-30 {ends[1]}"
        )
    return "; ".join(left)


def evidence(finding: Finding) -> str:
    """The figures of a finding beside their thresholds."""
    parts = [f"{name.replace('_', ' ')} {number(value, '.3g')}" for name, value in finding.evidence.items()]
    limits = [f"{name.replace('_', ' ')} {value:g}" for name, value in finding.threshold.items()]
    return ", ".join(parts) + (f" (threshold: {', '.join(limits)})" if limits else "")


def by_reason(skipped: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Names of what was not compared, by the reason for it."""
    groups: dict[str, list[str]] = {}
    for item in skipped:
        where = "" if item["side"] == "both" else f", in {item['side']} only"
        groups.setdefault(item["reason"] + where, []).append(item["name"])
    return groups


def summary_html(comparison: Comparison) -> str:
    """A comparison as a notebook shows it: for each pair its verdict, its table, and what was left out."""
    parts = [_pair_html(comparison, label, comparison.manifest["pairs"][label]) for label in comparison.pairs]
    failed = "".join(f"<li>{escape(failure['error'])}</li>" for failure in comparison.failed)
    if failed:
        parts.append(f"<p><b>Failed</b></p><ul>{failed}</ul>")
    box = "max-width:100%;overflow-x:auto;font-size:13px;line-height:1.45"
    return f'<div style="{box}">{"".join(parts)}</div>'


def _pair_html(comparison: Comparison, label: str, about: Mapping[str, Any]) -> str:
    verdict, lines = comparison.verdicts[label], comparison.summaries[label]
    left_out = "; ".join(
        f"{len(names)}, {reason}: {named_parts(names, 2)}"
        for reason, names in by_reason(comparison.skipped[label]).items()
    )
    notes = "".join(f"<br><i>{escape(note)}</i>" for note in about["notes"])
    for finding in comparison.findings[label]:
        notes += f"<br>{SEVERITIES[finding.severity]} {escape(finding.sentence)}"
    averages = over_all_ranks(lines[-1])
    return (
        f'<p style="margin:.4em 0;overflow-wrap:anywhere"><b>{escape(label)}</b><br>'
        f"{VERDICTS[verdict.kind]} {escape(verdict.sentence)}{notes}</p>"
        + summary_table(lines).html(inline=True)
        + (f'<p style="margin:.4em 0">{escape(averages)}</p>' if averages else "")
        + (f'<p style="margin:.4em 0 1em;opacity:.8">Not compared: {escape(left_out)}</p>' if left_out else "")
    )
