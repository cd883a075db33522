"""Documents for other programs: what their readers require, and names that are nothing but text in all of them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

import specbasis
from specbasis.cli.compare import FORMATS
from specbasis.comparison.check import CHECKS, THRESHOLDS
from specbasis.comparison.comparison import Comparison
from specbasis.core.text import markdown
from specbasis.figures.documents import DOCUMENTS, MOST_LOCATIONS, _fenced
from tests.pico import bert_state, finetuned

from .conftest import CASES

Comparisons = Callable[[str], Comparison]
ALL = tuple(check.kind for check in CHECKS)


def document(comparison: Comparison, name: str, fail_on: tuple[str, ...] = ()) -> Any:
    return DOCUMENTS[name](comparison, (), fail_on)


def test_the_command_line_offers_every_document() -> None:
    assert FORMATS == ("text", *DOCUMENTS)


@pytest.mark.parametrize("case", CASES)
def test_every_document_of_every_comparison_can_be_read(comparisons: Comparisons, case: str) -> None:
    comparison = comparisons(case)
    for name in DOCUMENTS:
        content = document(comparison, name, ALL)
        text = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
        assert THRESHOLDS in text
        if name == "markdown":
            assert text.isprintable() or set(text) - {"\n"} == {c for c in text if c.isprintable()}
    ET.fromstring(document(comparison, "junit"))


# --- SARIF ------------------------------------------------------------------------------------------------------

REQUIRED = {
    "": {"version", "runs"},
    "runs": {"tool"},
    "driver": {"name"},
    "rules": {"id"},
    "results": {"message"},
    "invocations": {"executionSuccessful"},
    "toolExecutionNotifications": {"message"},
}
"""What OASIS SARIF 2.1.0 requires of the objects that are used here."""


def lacking(value: Any, name: str = "") -> list[str]:
    """Names of objects that lack what the standard requires of them."""
    if isinstance(value, list):
        return [fault for item in value for fault in lacking(item, name)]
    if not isinstance(value, dict) or name == "properties":
        return []
    faults = [name] if REQUIRED.get(name, set()) - set(value) else []
    return faults + [fault for key, item in value.items() for fault in lacking(item, key)]


@pytest.mark.parametrize("case", ["two_pairs", "degenerate", "hostile", "many_matrices"])
def test_sarif_has_what_the_standard_and_code_hosts_require(comparisons: Comparisons, case: str) -> None:
    comparison = comparisons(case)
    content = document(comparison, "sarif", ("intruders",))
    assert lacking(content) == []
    (run,) = content["runs"]
    rules, results = run["tool"]["driver"]["rules"], run["results"]
    assert [rule["id"] for rule in rules] == [check.kind for check in CHECKS]
    findings = [(label, f) for label, found in comparison.findings.items() for f in found]
    assert len(results) == len(findings)
    marks = set()
    for result, (label, finding) in zip(results, findings, strict=True):
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == finding.kind
        assert result["level"] == {"problem": "error", "note": "note"}[finding.severity]
        assert result["properties"]["threshold"] == finding.threshold
        named = [place["logicalLocations"][0]["name"] for place in result["locations"] if len(place) > 1]
        assert named == list(finding.matrices[:MOST_LOCATIONS])
        for place in result["locations"]:
            uri = place["physicalLocation"]["artifactLocation"]["uri"]
            assert re.fullmatch(r"(?:[\w.~/-]|%[0-9A-F]{2})+", uri)  # no scheme, no blank, no other character
        assert not re.search(r"(?<!\{)\{(?!\{)|\]\(", result["message"]["text"])
        marks.add(result["partialFingerprints"]["primaryLocationLineHash"])
        assert result["properties"]["pair"] == label
    assert len(marks) == len(results)
    assert run["invocations"][0]["executionSuccessful"] is not bool(comparison.failed)


# --- JUnit ------------------------------------------------------------------------------------------------------


def test_junit_fails_where_a_pipeline_stops_and_only_there() -> None:
    base = bert_state(width=48)
    comparison = specbasis.compare(base, finetuned(base, 0.02, frozen="layer.0"), workers=1)
    assert {"noise", "frozen"} <= {f.kind for f in comparison.findings["state_dict"]}
    root = ET.fromstring(document(comparison, "junit", ("frozen", "zeros")))
    (suite,) = root
    assert [test.get("name") for test in suite.iter("testcase")] == list(ALL)
    states = {test.get("name"): [part.tag for part in test] for test in suite.iter("testcase")}
    assert states["frozen"] == ["failure"]
    assert states["noise"] == ["system-out"]
    assert states["zeros"] == []
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == (str(len(ALL)), "1", "0")
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == (str(len(ALL)), "1", "0")


def test_junit_skips_what_nothing_was_measured_for_and_errs_where_a_matrix_failed(comparisons: Comparisons) -> None:
    base = bert_state(width=48)
    quick = specbasis.compare(base, finetuned(base, 0.1), quick=True, workers=1)
    skipped = [
        test
        for test in ET.fromstring(document(quick, "junit")).iter("testcase")
        if test.find("skipped") is not None
    ]
    assert [test.get("name") for test in skipped] == ["intruders"]
    failed = ET.fromstring(document(comparisons("degenerate"), "junit"))
    assert failed.get("errors") == "1"
    assert failed.find(".//testcase[@name='failed']/error") is not None


def test_junit_tells_of_a_pair_in_which_every_matrix_failed() -> None:
    base = bert_state(width=16)
    broken = {name: torch.full_like(value, torch.nan) for name, value in base.items()}
    comparison = specbasis.compare(base, {"fine": finetuned(base), "broken": broken}["fine"], workers=1)
    comparison.manifest["pairs"]["broken"] = comparison.manifest["pairs"]["state_dict"]
    comparison.manifest["failed"].append({"pair": "broken", "matrix": "m", "size": 1, "error": "m: has \x00 NaN"})
    root = ET.fromstring(document(comparison, "junit"))
    assert [suite.get("name") for suite in root] == ["state_dict", "broken"]
    assert root.get("errors") == "1"
    assert root[1].get("skipped") == str(len(ALL) - 1)
    assert document(comparison, "sarif")["runs"][0]["invocations"][0]["executionSuccessful"] is False


# --- names that others chose ------------------------------------------------------------------------------------

NASTY = (
    "a|b", r"a\|b", "`code`", "``", "<img src=x onerror=alert(1)>", "</sub><b>", "line\n# title", "a\r\n\n- b",
    "&lt;",
    "[x](http://e.com)", "![x](y)", "@someone", "#12", "*a* __b__ ~~c~~", "$x$", "\x1b[2J", "\x00\x0b\ufffe", "{0}",
    "caf\udce9", "\u202etxt", "]]>", "a](b)", "```\nrm -rf /\n```", "\\",
)  # fmt: skip


class Text(HTMLParser):
    """What a page shows, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.elements = "", list[str]()

    def handle_data(self, data: str) -> None:
        self.shown += data

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append(tag)


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text_in_markdown(name: str) -> None:
    """Against a reader of its own kind: every character with a meaning is behind a backslash or an entity."""
    said = markdown(name)
    assert "\n" not in said
    assert said.isprintable()
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]~$]", re.sub(r"\\[\\`*_\[\]~$]", "", said))
    assert "|" not in said
    page = Text()
    page.feed(re.sub(r"\\([\\`*_\[\]~$])", r"\1", said))
    page.close()
    assert set(page.elements) <= {"span"}
    assert not re.search(r"[@#]\w", re.sub(r"<span>.</span>", "", said).replace("&#124;", ""))


def test_names_are_text_in_every_document(comparisons: Comparisons) -> None:
    comparison = comparisons("two_pairs")
    manifest = json.loads(json.dumps(comparison.manifest))
    for name in NASTY:
        other = Comparison(comparison.results, comparison.rows)
        base, failure = (
            {"base": manifest["base"] | {"source": name}},
            {"pair": "strong", "matrix": name, "error": name},
        )
        for key, value in (base | {"failed": [failure]}).items():
            other.manifest[key] = value
        try:
            root = ET.fromstring(document(other, "junit"))
            assert root.get("errors") == "1"
            text = document(other, "markdown")
            assert len(text.splitlines()[0]) > 10
            assert text.splitlines()[0].startswith("## specbasis")
            assert "<img" not in re.sub(r"^(`+)sh$.*?^\1$", "", text, flags=re.M | re.S)
            assert lacking(document(other, "sarif")) == []
        finally:
            comparison.manifest.update(manifest)


@pytest.mark.parametrize("name", NASTY)
def test_a_command_ends_no_block_of_code(name: str) -> None:
    first, *lines, last = _fenced(f"specbasis extract {name}").split("\n")
    assert len(lines) == 1
    assert first == last + "sh"
    assert last not in lines[0]


# --- the headline -----------------------------------------------------------------------------------------------


def test_a_headline_says_what_a_pair_is_and_how_far_it_moved(comparisons: Comparisons) -> None:
    two = comparisons("two_pairs")
    assert two.headlines["gentle"].startswith("Gentle finetune of this base. ")
    assert "32 of 32 matrices moved by 0.98%; leading directions kept" in two.headlines["gentle"]
    same = comparisons("identical")
    assert same.headlines["same"] == "The same weights as this base. No problems found."
    base = bert_state(width=48)
    frozen = specbasis.compare(base, finetuned(base, 0.3, frozen="layer.0"), workers=1)
    assert "8 of 14 matrices moved by 30%" in frozen.headlines["state_dict"]
    other = specbasis.compare(base, bert_state(width=48, seed=9), workers=1)
    assert other.headlines["state_dict"] == (
        "No finetune of this base: the weights do not correspond. 1 problem: wrong-base."
    )
    quick = specbasis.compare(base, finetuned(base, 0.1), quick=True, measures=["alignment*"], workers=1)
    assert "No problems found among what was measured." in quick.headlines["state_dict"]


def test_page_and_markdown_have_the_headline(comparisons: Comparisons, pages: Callable[[str], Any]) -> None:
    comparison, page = comparisons("two_pairs"), pages("two_pairs").read_text(encoding="utf-8")
    for label in comparison.pairs:
        said = comparison.headlines[label]
        assert f'<p class="headline">{html.escape(said)}</p>' in page
        assert f"**{markdown(said)}**" in document(comparison, "markdown")
        assert document(comparison, "json")["pairs"][label]["headline"] == said
