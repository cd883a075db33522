"""Writing the report: files, their bytes, what a user is told when it cannot be done."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import specbasis
from specbasis.comparison.comparison import Comparison
from specbasis.core.errors import InputError
from specbasis.figures.data import Pair, read_pairs
from specbasis.figures.drawing import DRAWINGS, draw, figure, missing
from specbasis.figures.kit import Figure, panels
from specbasis.figures.summary import summary_html, summary_table
from tests.helpers.patience import PATIENCE

from .conftest import CASES


@pytest.mark.parametrize("case", ["two_pairs", "identical", "rank_one", "degenerate", "hostile"])
def test_the_folder_holds_the_page_and_every_figure_in_both_formats(
    comparisons: Callable[[str], Comparison], case: str, tmp_path: Path
) -> None:
    comparison = comparisons(case)
    page = comparison.report(tmp_path / "new" / "page.html")
    assert page == tmp_path / "new" / "page.html"
    figures = sorted((tmp_path / "new" / "figures").iterdir())
    pairs = read_pairs(comparison)
    once = [d for d in DRAWINGS.values() if d.over_pairs]
    asked = sum(d.has(pair) for pair in pairs for d in DRAWINGS.values() if d.on_request)
    each = len(DRAWINGS) - len(once) - sum(d.on_request for d in DRAWINGS.values())
    assert (len(once), each) == (4, 4)
    assert len(figures) == 2 * (len(once) + len(pairs) * each + asked)
    for path in figures:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 300
                low, high = image.convert("L").getextrema()
                assert low < 120 < high
        else:
            root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
            assert root.tag.endswith("svg")
            assert len(list(root.iter())) > 50


def test_equal_rows_give_equal_figures(comparisons: Callable[[str], Comparison]) -> None:
    comparison = comparisons("single_small")

    def files() -> dict[str, bytes]:
        return dict(draw(read_pairs(comparison)))

    first, second = files(), files()
    assert first == second
    for name, content in first.items():
        assert b"<dc:date>" not in content, name
        assert b"Software" not in content, name


def test_a_folder_in_place_of_the_page(comparisons: Callable[[str], Comparison], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; want the file for the page"):
        comparisons("single_small").report(tmp_path)


def test_a_place_that_cannot_be_written(comparisons: Callable[[str], Comparison], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        comparisons("single_small").report(tmp_path / "file" / "page.html")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named(
    comparisons: Callable[[str], Comparison], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"{library}.*pip install .*\[report\]"):
        comparisons("single_small").report(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_package_and_a_notebook_table_need_no_drawing_library() -> None:
    code = (
        "import sys, specbasis, specbasis.figures.summary, specbasis.figures.table\n"
        "heavy = {'matplotlib', 'jinja2', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=PATIENCE)


class Wellformed(HTMLParser):
    """Fails on tags that do not close in order; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("case", ["two_pairs", "degenerate", "hostile"])
def test_a_notebook_shows_verdict_and_table(comparisons: Callable[[str], Comparison], case: str) -> None:
    comparison = comparisons(case)
    markup = comparison._repr_html_()
    assert markup == summary_html(comparison)
    parser = Wellformed()
    parser.feed(markup)
    assert parser.open == []
    assert "<script" not in markup
    assert "<img" not in markup
    for pair in comparison.pairs:
        assert comparison.verdicts[pair].sentence in parser.text
        for cells in summary_table(comparison.summaries[pair]).cells:
            assert "".join(cells) in parser.text
    for failure in comparison.failed:
        assert failure["error"] in parser.text


def test_figures_of_measures_that_were_not_taken_are_left_out(tmp_path: Path) -> None:
    base, tuned = CASES["single_small"]()
    few = specbasis.compare(base, next(iter(tuned.values())), measures=["singular_value_*"], workers=1)
    page = few.report(tmp_path / "few.html").read_text(encoding="utf-8")
    assert 'id="alignment" class="plot" hidden' in page
    assert 'id="change" class="plot">' in page
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert "singular_value_change" in drawn
    assert not {"alignment_by_rank", "ratio_against_alignment", "explained_variance"} & drawn


def test_a_function_with_the_decorator_is_a_figure_of_every_report(
    comparisons: Callable[[str], Comparison], tmp_path: Path
) -> None:
    @figure("rsd", page="distance")
    def spectral_distance(pair: Pair) -> Figure:
        drawing, axes = panels(1, 1, (3.0, 2.0), f"Relative spectral distance: {pair.label}")
        axes[0][0].plot(pair.whole("rsd"), "o")
        return drawing

    try:
        comparisons("two_pairs").report(tmp_path / "page.html")
        few = specbasis.compare(*CASES["single_small"]()[:1], {"weight": torch.ones(7, 3)}, measures=["alignment*"])
        assert "distance" in missing(read_pairs(few))
    finally:
        del DRAWINGS["spectral_distance"]
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"spectral_distance-1-gentle.png", "spectral_distance-2-strong.svg"} <= names
