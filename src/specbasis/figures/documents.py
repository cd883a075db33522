"""A comparison as one document: JSON, Markdown, SARIF 2.1.0 and JUnit XML, and the section of a model's card."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree as ET

from specbasis import __version__
from specbasis.checkpoint.adapter_file import CONFIG
from specbasis.checkpoint.card import digest_line, hub_name, write_section
from specbasis.comparison.check import CHECKS, THRESHOLDS, Check, Finding, unlooked
from specbasis.comparison.comparison import Comparison
from specbasis.comparison.verdict import LEVEL, POWER
from specbasis.core.errors import InputError, want
from specbasis.core.text import markdown as escaped, number_of, printable
from specbasis.figures.summary import evidence, no_problems, over_all_ranks, summary_table
from specbasis.figures.table import number
from specbasis.figures.treatment import legend, view
from specbasis.treatment.advice import next_steps
from specbasis.treatment.treated import Treated

LEVELS = {"problem": "error", "note": "note"}
"""Severity → level of SARIF."""

MOST_LOCATIONS = 100
"""Matrices that a result of SARIF names: as many locations of one as code hosts take."""


def failing(comparison: Comparison, kinds: Sequence[str]) -> list[tuple[str, Finding]]:
    """(pair, finding) of the findings that a pipeline stops at."""
    return [(pair, f) for pair, findings in comparison.findings.items() for f in findings if f.kind in kinds]


def json(comparison: Comparison, given: Sequence[str], fail_on: Sequence[str]) -> dict[str, Any]:
    """`Comparison.summary`, with each pair's headline and next steps, and what fails."""
    content = {"specbasis": __version__} | comparison.summary()
    for label, pair in content["pairs"].items():
        pair["headline"] = comparison.headlines[label]
        pair["next_steps"] = [step._asdict() for step in next_steps(comparison, label, given)]
    hits = [{"pair": label, "kind": finding.kind} for label, finding in failing(comparison, fail_on)]
    return content | {"fail_on": list(fail_on), "failing": hits}


# --- Markdown ---------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison, given: Sequence[str], fail_on: Sequence[str]) -> str:
    """A summary for a job or a merge request: of each pair headline, verdict, table, size and findings."""
    hits = [f"`{f.kind}` in {escaped(label)}" for label, f in failing(comparison, fail_on)]
    gate = f"**Stops** at {', '.join(hits)}." if hits else f"Passes: none of {_listed(fail_on)} was found."
    parts = [f"## specbasis: what changed since {escaped(comparison.manifest['base']['source'])}"]
    parts += [gate] if fail_on else []
    for label in comparison.pairs:
        parts += [f"### {escaped(label)}", f"**{escaped(comparison.headlines[label])}**"]
        parts += _pair_markdown(comparison, label, given)
    lost = [failure for failure in comparison.failed if failure["pair"] not in comparison.pairs]
    parts += ["\n".join(f"- **failed**: {escaped(failure['error'])}" for failure in lost[:10])] if lost else []
    parts.append(f"<sub>specbasis {__version__}, thresholds `{THRESHOLDS}`</sub>")
    return "\n\n".join(parts)


def _pair_markdown(comparison: Comparison, label: str, given: Sequence[str]) -> Iterator[str]:
    lines = comparison.summaries[label]
    compared = comparison.facts[label].compared
    yield summary_table(lines).markdown().rstrip("\n")
    yield f"Size of the update: ‖Δ‖/‖W‖ {number(lines[-1].relative_update, '.2g')}, mean over matrices; " + (
        f"{number(compared, '.1%')} of the parameters compared. {escaped(over_all_ranks(lines[-1]))}".rstrip()
    )
    yield "\n".join(_findings(comparison, label))
    yield f"Verdict: {escaped(comparison.verdicts[label].sentence)}"
    for note in comparison.manifest["pairs"][label]["notes"]:
        yield f"Note: {escaped(note)}"
    for step in next_steps(comparison, label, given):
        yield f"Next: {escaped(step.reason)}:\n\n{_fenced(step.command)}"


def _findings(comparison: Comparison, label: str) -> list[str]:
    """A list of what was found, with its evidence; and that nothing is a problem, where that is so."""
    findings = comparison.findings[label]
    lines = [f"- **{f.severity}**: {escaped(f.sentence)}; {escaped(evidence(f))}".rstrip("; ") for f in findings]
    if not any(finding.severity == "problem" for finding in findings):
        lines.append(f"- {escaped(no_problems(comparison.facts[label]))}")
    return lines


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(f"`{kind}`" for kind in kinds)


def _fenced(command: str) -> str:
    """A block of code that nothing in the command ends."""
    line = printable(command).replace("\n", "\\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}sh\n{line}\n{fence}"


# --- a model's card ---------------------------------------------------------------------------------------------

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
    want("pair", comparison.pairs, label)
    known = _fields(comparison, label) | fields
    return write_section(readme, "comparison", section(comparison, label), known, escaped(label))


def _fields(comparison: Comparison, label: str) -> dict[str, Any]:
    base, tuned = comparison.manifest["base"], comparison.manifest["pairs"][label]["tuned"]
    verdict = comparison.verdicts[label]
    is_quantised = verdict.kind == "copy" and "quantised" in verdict.sentence
    relation = "quantized" if is_quantised else RELATIONS.get(verdict.kind, "")
    if any(Path(file["path"]).name == CONFIG for file in tuned.get("files", [])):
        relation = relation and "adapter"
    name = hub_name(base["source"]) if relation and "revision" in base else ""
    return {"base_model": name, "base_model_relation": relation, "tags": ["specbasis"]}


def write_treated_card(treated: Treated, readme: Path, **fields: str) -> list[str]:
    """Write how a model was extracted, repaired or merged into its card; see `checkpoint.card.write_section`.

    Args:
        treated: what a treatment made.
        readme: the card.
        **fields: of the front matter, in the place of what follows from the record.

    Raises:
        InputError: the card cannot be written.
    """
    record, verb = treated.record, view(treated).verb
    weights = record.get("weights", [])  # records of earlier versions lack them
    bases = weights if verb == "merge" else weights[:1]
    names = [hub_name(of["source"]) for of in bases if "revision" in of]
    known = {
        "base_model": names if len(names) == len(bases) > 1 else names[0] if names else "",
        "base_model_relation": "merge" if verb == "merge" else "finetune",
        "tags": ["specbasis", verb],
    }
    lines = [digest_line(f"{of['name']}: {escaped(of['source'])}", of["sha256"]) for of in weights]
    shown, said = view(treated).tables(treated), view(treated).sentences(treated)
    options = [f"{name} {value}" for name, value in record.get("options", {}).items() if value not in (None, "")]
    parts = [
        "## How this model was made",
        *(f"{text[:1].upper()}{escaped(text[1:])}".removesuffix(".") + "." for text in said),
        "\n".join(lines),
        f"Options: {escaped(', '.join(options))}." if options else "",
        *(table.markdown().strip() for table in shown),
        escaped(legend(shown)),
        f"Made by `specbasis {verb}` {record.get('versions', {}).get('specbasis', __version__)}.",
    ]
    section_text = "\n\n".join(filter(None, parts))
    return write_section(readme, verb, section_text, known | fields, escaped(readme.resolve().parent.name))


def section(comparison: Comparison, label: str) -> str:
    """The section of a card: headline, verdict, digests, table by role, findings and versions."""
    manifest, lines = comparison.manifest, comparison.summaries[label]
    about = manifest["pairs"][label]
    sources = {"base": manifest["base"], "this model": about["tuned"]}
    notes = [f"- {escaped(sentence)}" for sentence in (over_all_ranks(lines[-1]), *about["notes"]) if sentence]
    parts = [
        "## What finetuning changed",
        f"**{escaped(comparison.headlines[label])}**",
        escaped(comparison.verdicts[label].sentence),
        "\n".join(digest_line(f"{name}: {escaped(s['source'])}", s["sha256"]) for name, s in sources.items()),
        summary_table(lines).markdown().strip(),
        "Alignment of singular vectors with those of the base, left and right, and what chance would give; RSD: "
        "change of the singular values; ‖Δ‖/‖W‖: size of the update.",
        "\n".join([*_findings(comparison, label), *notes]),
        f"Measured by specbasis {manifest['versions']['specbasis']}; the verdict rests on a test of level "
        f"{LEVEL:g} for all matrices together, with power {POWER:g}.",
    ]
    return "\n\n".join(parts)


# --- SARIF ------------------------------------------------------------------------------------------------------


def sarif(comparison: Comparison, given: Sequence[str], fail_on: Sequence[str]) -> dict[str, Any]:
    """Findings as results, checks as rules with their thresholds. Source: OASIS SARIF 2.1.0."""
    order = {check.kind: i for i, check in enumerate(CHECKS)}
    driver = {
        "name": "specbasis",
        "semanticVersion": __version__,
        "rules": [_rule(check) for check in CHECKS],
        "properties": {"thresholds": THRESHOLDS, "failOn": list(fail_on)},
    }
    failures = [
        {"level": "error", "message": _message(f"{failure['pair']}: {failure['error']}")}
        for failure in comparison.failed
    ]
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": not failures, "toolExecutionNotifications": failures}],
        "results": [
            _result(comparison, label, finding) | {"ruleIndex": order[finding.kind]}
            for label, findings in comparison.findings.items()
            for finding in findings
        ],
        "properties": {"headlines": {label: comparison.headlines[label] for label in comparison.pairs}},
    }
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}


def _rule(check: Check) -> dict[str, Any]:
    limits = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in check.threshold.items())
    return {
        "id": check.kind,
        "shortDescription": _message(check.about),
        "help": _message(f"Looks for {check.about}." + (f" Held against: {limits}." if limits else "")),
        "defaultConfiguration": {"level": LEVELS[check.severity]},
        "properties": {"threshold": dict(check.threshold), "thresholds": THRESHOLDS},
    }


def _result(comparison: Comparison, label: str, finding: Finding) -> dict[str, Any]:
    # A colon in the first part would make it a scheme, which code hosts refuse.
    place = {
        "artifactLocation": {
            "uri": quote(comparison.manifest["pairs"][label]["tuned"]["source"], safe="/", errors="surrogateescape")
        }
    }
    places: list[dict[str, Any]] = [
        {
            "physicalLocation": place,
            "logicalLocations": [{"name": name, "fullyQualifiedName": name, "kind": "matrix"}],
        }
        for name in finding.matrices[:MOST_LOCATIONS]
    ]
    # Of the pair and the kind alone: the next finetune's finding is the same one, in whatever matrices.
    mark = hashlib.sha256(f"{label}\0{finding.kind}".encode("utf-8", "surrogateescape")).hexdigest()
    return {
        "ruleId": finding.kind,
        "level": LEVELS[finding.severity],
        "message": _message(f"{label}: {finding.sentence}"),
        "locations": places or [{"physicalLocation": place}],
        "partialFingerprints": {"pairAndKind/v1": mark, "primaryLocationLineHash": f"{mark[:16]}:1"},
        "properties": {
            "pair": label,
            "matrices": len(finding.matrices),
            "evidence": dict(finding.evidence),
            "threshold": dict(finding.threshold),
        },
    }


def _message(text: str) -> dict[str, str]:
    """Plain text of SARIF, in which braces are placeholders and ``](`` is a link."""
    return {"text": printable(text).replace("{", "{{").replace("}", "}}").replace("](", "] (")}


# --- JUnit ------------------------------------------------------------------------------------------------------


def junit(comparison: Comparison, given: Sequence[str], fail_on: Sequence[str]) -> str:
    """A suite for each pair, a test for each check: failed where it is found and stops a pipeline.

    A finding that does not is in the test's output; a check that nothing was measured for is skipped; matrices that
    failed are an error. Of ASCII, without a declaration: the same document in UTF-8 and UTF-16.
    """
    root = ET.Element("testsuites", name="specbasis")
    for label in comparison.manifest["pairs"]:
        failures = [failure["error"] for failure in comparison.failed if failure["pair"] == label]
        if label in comparison.pairs or failures:
            suite = ET.SubElement(root, "testsuite", name=printable(label))
            _fill(suite, comparison, label, failures, fail_on)
            for name, tag in {
                "tests": "testcase",
                "failures": "failure",
                "errors": "error",
                "skipped": "skipped",
            }.items():
                suite.set(name, str(sum(1 for _ in suite.iter(tag))))
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, 0)) for suite in root)))
    ET.indent(root, " ")
    return bytes(ET.tostring(root, "us-ascii", xml_declaration=False)).decode()


def _fill(
    suite: ET.Element, comparison: Comparison, label: str, failures: list[str], fail_on: Sequence[str]
) -> None:
    about = {"base": comparison.manifest["base"]["source"], "thresholds": THRESHOLDS, "specbasis": __version__}
    about |= {"headline": comparison.headlines[label]} if label in comparison.pairs else {}
    properties = ET.SubElement(suite, "properties")
    for name, value in about.items():
        ET.SubElement(properties, "property", name=name, value=printable(value))
    findings = {finding.kind: finding for finding in comparison.findings.get(label, [])}
    for check in CHECKS:
        test = ET.SubElement(suite, "testcase", classname=f"specbasis.{printable(label)}", name=check.kind)
        finding = findings.get(check.kind)
        if check.kind == "failed" and failures:
            error = ET.SubElement(test, "error", type="problem", message=printable(failures[0]))
            error.text = printable("\n".join(failures))
        elif finding and check.kind in fail_on:
            failure = ET.SubElement(test, "failure", type=finding.severity, message=printable(finding.sentence))
            failure.text = printable("\n".join((evidence(finding), *finding.matrices)))
        elif finding:
            ET.SubElement(test, "system-out").text = printable(f"{finding.sentence}\n{evidence(finding)}")
        elif label not in comparison.pairs or check in unlooked(comparison.facts[label].measures):
            ET.SubElement(test, "skipped", message=f"not measured: {', '.join(check.needs) or 'anything'}")


DOCUMENTS: dict[str, Callable[[Comparison, Sequence[str], Sequence[str]], str | dict[str, Any]]] = {
    "json": json,
    "markdown": markdown,
    "sarif": sarif,
    "junit": junit,
}
"""Name of a format → what makes the document: as text, or as the content of one in JSON.

It is given the comparison, the sources as the user wrote them, and the kinds of findings that a pipeline stops at.
"""
