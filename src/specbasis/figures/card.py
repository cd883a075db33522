"""The section of a model's card that a comparison comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specbasis.checkpoint.adapter_file import CONFIG
from specbasis.checkpoint.card import digest_line, hub_name, write_section
from specbasis.comparison.comparison import Comparison
from specbasis.comparison.verdict import LEVEL, POWER
from specbasis.core.errors import InputError, unknown
from specbasis.core.text import markdown, number_of
from specbasis.figures.summary import evidence, headline, no_problems, over_all_ranks, summary_table

RELATIONS = dict.fromkeys(("identical", "partial", "finetuned"), "finetune")
"""Verdict → how a model stands to base, in the Hub's words; under any other, base is not called its base."""


def write_card(comparison: Comparison, readme: Path, label: str = "", **fields: str) -> list[str]:
    """Write what a comparison found of one finetune into a card; see `checkpoint.card.write_section`.

    Args:
        comparison: what was found.
        readme: the card.
        label: of the finetune, where there are several.
        **fields: of the front matter, in the place of what follows from the results.

    Raises:
        InputError: there is no such finetune, none is chosen, or the card cannot be written.
    """
    if not label and len(comparison.pairs) != 1:
        raise InputError(
            f"{comparison.folder}: holds {number_of(len(comparison.pairs), 'finetune')}; say which (--pair): "
            f"{', '.join(comparison.pairs)}"
        )
    label = label or comparison.pairs[0]
    if label not in comparison.pairs:
        raise unknown("pair", label, comparison.pairs)
    known = _fields(comparison, label) | fields
    return write_section(readme, "comparison", section(comparison, label), known, markdown(label))


def _fields(comparison: Comparison, label: str) -> dict[str, Any]:
    base, tuned = comparison.manifest["base"], comparison.manifest["pairs"][label]["tuned"]
    verdict = comparison.verdicts[label]
    is_quantised = verdict.kind == "copy" and "quantised" in verdict.sentence
    relation = "quantized" if is_quantised else RELATIONS.get(verdict.kind, "")
    if any(Path(file["path"]).name == CONFIG for file in tuned.get("files", [])):
        relation = relation and "adapter"
    name = hub_name(base["source"]) if relation and "revision" in base else ""
    return {"base_model": name, "base_model_relation": relation, "tags": ["specbasis"]}


def section(comparison: Comparison, label: str) -> str:
    """Headline, verdict, digests, table by role, findings with their thresholds, and versions, as Markdown."""
    manifest, lines = comparison.manifest, comparison.summaries[label]
    findings, about = comparison.findings[label], manifest["pairs"][label]
    sources = {"base": manifest["base"], "this model": about["tuned"]}
    said = [f"{finding.severity}: {finding.sentence} ({evidence(finding)})" for finding in findings]
    if not any(finding.severity == "problem" for finding in findings):
        said.append(no_problems(comparison.facts[label]))
    said += filter(None, (over_all_ranks(lines[-1]), *about["notes"]))
    parts = [
        "## What finetuning changed",
        f"**{markdown(headline(comparison, label))}**",
        markdown(comparison.verdicts[label].sentence),
        "\n".join(digest_line(f"{name}: {markdown(s['source'])}", s["sha256"]) for name, s in sources.items()),
        summary_table(lines).markdown().strip(),
        "Alignment of singular vectors with those of the base, left and right, and what chance would give; RSD: "
        "change of the singular values; ‖Δ‖/‖W‖: size of the update.",
        "\n".join(f"- {markdown(sentence)}" for sentence in said),
        f"Measured by specbasis {manifest['versions']['specbasis']}; the verdict rests on a test of level "
        f"{LEVEL:g} for all matrices together, with power {POWER:g}.",
    ]
    return "\n\n".join(parts)
