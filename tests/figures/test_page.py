"""The page as text: complete, harmless, compact, the same for the same rows."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from specbasis.comparison.comparison import Comparison
from specbasis.figures.data import read_pairs
from specbasis.figures.page import _coarse, _floats, _ints, _json, render
from specbasis.figures.summary import summary_table
from specbasis.treatment.advice import next_steps

from .conftest import CASES, HOSTILE, page_data


@pytest.mark.parametrize("case", CASES)
def test_verdicts_and_summaries_are_those_of_the_terminal(
    comparisons: Callable[[str], Comparison], pages: Callable[[str], Path], case: str
) -> None:
    comparison, text = comparisons(case), pages(case).read_text(encoding="utf-8")
    verdicts, summaries = comparison.verdicts, comparison.summaries
    for pair in comparison.pairs:
        assert html.escape(verdicts[pair].sentence).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
        for cells in summary_table(summaries[pair]).cells:
            assert "".join(f"<td>{cell}</td>" for cell in cells[1:]) in text


def test_what_was_left_out_and_what_failed_is_told(
    comparisons: Callable[[str], Comparison], pages: Callable[[str], Path]
) -> None:
    text = html.unescape(pages("degenerate").read_text(encoding="utf-8"))
    assert comparisons("degenerate").failed[0]["error"] in text
    assert "NaN" in text
    assert "every parameter was compared" not in text
    assert "every parameter was compared" in pages("single_small").read_text(encoding="utf-8")
    hostile = pages("hostile").read_text(encoding="utf-8")
    assert f"<code>{html.escape(f'only {HOSTILE}', quote=False).replace(chr(39), '&#39;')}</code>" in hostile


def test_what_can_be_done_next_is_on_the_page(
    comparisons: Callable[[str], Comparison], pages: Callable[[str], Path]
) -> None:
    comparison = comparisons("two_pairs")
    page = pages("two_pairs").read_text(encoding="utf-8")
    for label in comparison.pairs:
        for step in next_steps(comparison, label):
            assert f"<code>{html.escape(step.command)}</code>" in page
    assert any(next_steps(comparison, label) for label in comparison.pairs)


def test_the_manifest_is_there(comparisons: Callable[[str], Comparison], pages: Callable[[str], Path]) -> None:
    manifest, text = comparisons("two_pairs").manifest, pages("two_pairs").read_text(encoding="utf-8")
    for about in (manifest["base"], *(pair["tuned"] for pair in manifest["pairs"].values())):
        assert about["files"][0]["sha256"] in text
    assert manifest["versions"]["torch"] in text


def test_nothing_is_loaded_from_elsewhere(pages: Callable[[str], Path]) -> None:
    text = pages("two_pairs").read_text(encoding="utf-8")
    markup = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.S)
    assert set(re.findall(r"""(?:src|href|action)\s*=\s*["']?([^>"'\s]*)""", markup)) <= {"data:,"}
    assert not re.findall(r"url\(|@import", markup)


def test_the_policy_admits_the_scripts_of_the_page(pages: Callable[[str], Path]) -> None:
    text = pages("single_small").read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    scripts = [script.encode() for script in re.findall(r"<script>(.*?)</script>", text, flags=re.S)]
    packed = re.search(r'<script type="application/gzip" id="plotly">(.*?)</script>', text)
    assert packed is not None
    assert len(scripts) == 1
    for script in (*scripts, gzip.decompress(base64.b64decode(packed[1]))):
        digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
        assert f"'sha256-{digest}'" in html.unescape(policy[1])


def test_names_cannot_leave_the_data(pages: Callable[[str], Path]) -> None:
    text = pages("hostile").read_text(encoding="utf-8")
    assert "</script><script>document.title" not in text
    assert "<img" not in text
    names = page_data(pages("hostile"))[0]["matrices"]["name"]
    assert f"h.0.{HOSTILE}" in names


@pytest.mark.parametrize("text", ["</script>", "<!--", "\u2028", "]]>", "&lt;", "\ud83d\ude00", '"\\'])
def test_json_inside_a_script_element(text: str) -> None:
    encoded = _json({"name": text})
    assert not set("<>&\u2028") & set(encoded)


def test_numbers_survive_as_float32() -> None:
    values = np.array([0.0, 1.0, -1.5, 1e-30, math.pi, math.inf, -math.inf, math.nan, 1e300])
    back = np.frombuffer(base64.b64decode(_floats(values)[1:]), "<f4")
    with np.errstate(over="ignore"):
        assert np.array_equal(back, values.astype("f4"), equal_nan=True)
    bounds = np.array([1e-16, 3.3e-7, 0.02, 1.0, math.inf])
    halves = np.frombuffer(base64.b64decode(_coarse(bounds)[1:]), "<u2").astype("<u4") << 16
    assert halves.view("<f4") == pytest.approx(bounds, rel=2**-7)
    for integers in (np.array([0, 7, 65535]), np.array([0, 70000]), np.array([], dtype=np.int64)):
        text = _ints(integers.astype(np.int64))
        dtype = "<u2" if text[0] == "u" else "<i4"
        assert np.frombuffer(base64.b64decode(text[1:]), dtype).tolist() == integers.tolist()


def test_the_data_are_the_rows(comparisons: Callable[[str], Comparison], pages: Callable[[str], Path]) -> None:
    comparison = comparisons("two_pairs")
    frame = comparison.to_pandas()
    for pair, data in zip(comparison.pairs, page_data(pages("two_pairs")), strict=True):
        series = data["series"]["alignment_left"]
        value = np.frombuffer(base64.b64decode(series["value"][1:]), "<f4")
        rows = frame[(frame["pair"] == pair) & (frame["measure"] == "alignment_left")]
        assert value == pytest.approx(rows["value"].to_numpy(), rel=1e-6)


def test_equal_rows_give_an_equal_page(
    comparisons: Callable[[str], Comparison], pages: Callable[[str], Path]
) -> None:
    comparison = comparisons("hostile")
    again = render(comparison, read_pairs(comparison))
    assert again == pages("hostile").read_bytes()


def test_many_matrices_and_many_pairs_stay_small(pages: Callable[[str], Path]) -> None:
    assert pages("single_small").stat().st_size < 1.5e6
    assert pages("many_matrices").stat().st_size < 5e6
    assert pages("many_pairs").stat().st_size < 5e6


def test_both_averages_are_given(comparisons: Callable[[str], Comparison], pages: Callable[[str], Path]) -> None:
    """Without and with the ranks that are not resolved: in the summary, on the page, in a notebook."""
    comparison = comparisons("degenerate")
    line = comparison.summaries["tuned"][-1]
    frame = comparison.to_pandas()
    leading = frame[(frame["measure"] == "alignment_left") & (frame["index"] < 10)]
    resolved = leading[leading["resolved"] == True]  # noqa: E712
    assert line.every10[0] == pytest.approx(leading["value"].mean(), rel=1e-12)
    assert line.top10[0] == pytest.approx(resolved["value"].mean(), rel=1e-12)
    assert line.every10 != line.top10
    words = f"over all ranks, the {line.unresolved} unresolved included: top-10 {line.every10[0]:.3f} / "
    assert words in html.unescape(pages("degenerate").read_text(encoding="utf-8"))
    assert words in html.unescape(comparison._repr_html_())
