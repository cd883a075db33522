"""The page in a real browser: nothing asked of the network, nothing complained of, everything drawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.patience import PATIENCE

from .conftest import CASES, HOSTILE, HOSTILE_FILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="the page tests drive Chromium through playwright")

FIGURES = ("alignment", "heat", "overlap", "change", "variance", "scatter", "spectra", "single", "angles")
ANNOTATIONS = "n => document.querySelector(`#${n} .canvas`).layout.annotations.map(a => a.text)"
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; also of the other files that open a page, so that they too skip where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the page is not opened in a browser")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@contextmanager
def opened(browser: Any, path: Path, **context: Any) -> Iterator[Any]:
    """A page that fails the test if it logs anything or asks for anything but itself."""
    inside = browser.new_context(**(DESKTOP | context))
    page = inside.new_page()
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    inside.close()
    assert trouble == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


def scroll_through(page: Any) -> None:
    """Bring every figure into view, and wait until each is drawn."""
    for name in FIGURES:
        page.locator(f"#{name}").scroll_into_view_if_needed()
        page.wait_for_selector(f"#{name} .canvas .main-svg", state="attached", timeout=1000 * PATIENCE)


def traces(page: Any, figure: str) -> list[dict[str, Any]]:
    return list(
        page.evaluate(
            "name => document.querySelector(`#${name} .canvas`).data.map(t =>"
            " ({type: t.type, meta: t.meta, visible: t.visible, n: t.x.length, color: (t.line || {}).color}))",
            figure,
        )
    )


def overflow(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_drawn_and_fits_a_phone(browser: Any, pages: Callable[[str], Path], case: str) -> None:
    with opened(browser, pages(case), **PHONE, color_scheme="dark") as page:
        scroll_through(page)
        assert overflow(page) <= 0
        for name in FIGURES:
            empty = page.evaluate(ANNOTATIONS, name)
            assert sum(t["n"] for t in traces(page, name)) > 0 or any("no " in text for text in empty), name
            assert page.locator(f"#{name} .canvas").get_attribute("aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_desktop(browser: Any, pages: Callable[[str], Path], scheme: str) -> None:
    with opened(browser, pages("two_pairs"), color_scheme=scheme) as page:
        scroll_through(page)
        assert overflow(page) <= 0
        for name in FIGURES:
            drawn = page.locator(f"#{name} .canvas .trace, #{name} .canvas .hm, #{name} .canvas image")
            assert drawn.count() > 0, name
            assert sum(t["n"] for t in traces(page, name)) > 0, name


def test_figures_are_drawn_only_when_they_come_into_view(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("two_pairs")) as page:
        page.locator("#alignment").scroll_into_view_if_needed()
        page.wait_for_selector("#alignment .main-svg", state="attached")
        assert page.locator("#angles .main-svg").count() == 0


def test_the_colours_follow_the_system_while_the_page_is_open(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("two_pairs"), color_scheme="light") as page:
        scroll_through(page)
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lines = {t["color"] for t in traces(page, "angles")}
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(300)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        assert {t["color"] for t in traces(page, "angles")}.isdisjoint(lines)


def test_the_pair_selector_changes_words_table_and_figures(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("two_pairs")) as page:
        scroll_through(page)

        def shown() -> tuple[str, str, str]:
            return (
                page.locator("section.pair:visible h2").inner_text(),
                page.locator("#matrices tbody tr").first.inner_text(),
                page.evaluate(
                    "JSON.stringify([...document.querySelector('#angles .canvas').data.map(t => [...t.y])])"
                ),
            )

        before = shown()
        page.select_option("#pair", index=1)
        page.wait_for_timeout(300)
        after = shown()
        assert before[0] == "gentle"
        assert after[0] == "strong"
        assert before[1] != after[1]
        assert before[2] != after[2]
        page.locator("[data-choose-pair='0']").click()
        assert page.locator("section.pair:visible h2").inner_text() == "gentle"


def test_side_role_rank_axis_and_curves(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("two_pairs")) as page:
        scroll_through(page)
        heat = "JSON.stringify(document.querySelector('#heat .canvas').data[0].z)"
        left = page.evaluate(heat)
        page.locator("#heat").scroll_into_view_if_needed()
        page.select_option("#side", "right")
        page.wait_for_timeout(300)
        assert page.evaluate(heat) != left

        panels = len(traces(page, "heat"))
        page.select_option("#role", "ffn.up")
        page.wait_for_timeout(300)
        assert [t["meta"] for t in traces(page, "heat")] == ["encoder: ffn.up", "decoder: ffn.up"] != panels

        page.locator("#alignment").scroll_into_view_if_needed()
        page.select_option("#axis", "log")
        page.select_option("#curves", "roles")
        page.wait_for_timeout(300)
        assert page.evaluate("document.querySelector('#alignment .canvas').layout.xaxis.type") == "log"
        assert "cross_attention.query" in {t["meta"] for t in traces(page, "alignment")}

        page.locator("#scatter").scroll_into_view_if_needed()
        page.select_option("#rank", "10")
        page.wait_for_timeout(300)
        assert "rank 10" in page.evaluate("document.querySelector('#scatter .canvas').layout.annotations[0].text")


def test_a_key_switches_its_curve_off_and_on(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("two_pairs")) as page:
        scroll_through(page)
        page.locator("#alignment").scroll_into_view_if_needed()
        key = page.locator("#alignment .key button", has_text="strong")
        key.focus()
        page.keyboard.press("Enter")
        assert key.get_attribute("aria-pressed") == "false"
        assert all(t["visible"] is False for t in traces(page, "alignment") if t["meta"] == "strong")
        page.keyboard.press("Enter")
        assert key.get_attribute("aria-pressed") == "true"


def test_the_table_sorts_finds_and_selects(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("two_pairs")) as page:
        scroll_through(page)
        page.locator("#values").scroll_into_view_if_needed()
        page.locator("#matrices button[data-key='rsd']").click()
        column = [h.strip() for h in page.locator("#matrices thead th").all_inner_texts()].index("RSD")
        cells = page.locator(f"#matrices tbody tr > :nth-child({column + 1})").all_inner_texts()
        values = [float(cell.replace("−", "-")) for cell in cells]
        assert values == sorted(values, reverse=True)
        assert page.locator("#matrices th[aria-sort='descending']").inner_text().strip().startswith("RSD")

        page.fill("#find", "decoder ffn.down")
        rows = page.locator("#matrices tbody tr")
        assert rows.count() == 2
        name = rows.nth(1).locator("th").inner_text()
        rows.nth(1).locator("button").press("Enter")
        assert page.locator("#matrix option:checked").inner_text() == name
        page.wait_for_timeout(600)
        assert name in page.locator("#spectra .canvas").get_attribute("aria-label")


def test_a_point_selects_its_matrix(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("two_pairs")) as page:
        scroll_through(page)
        page.locator("#scatter").scroll_into_view_if_needed()
        before = page.locator("#matrix").input_value()
        page.evaluate(
            """before => {
                const box = document.querySelector("#scatter .canvas");
                const other = box.data[0].customdata.find((c) => String(c[0]) !== before);
                box.emit("plotly_click", { points: [{ customdata: other }] });
            }""",
            before,
        )
        assert page.locator("#matrix").input_value() != before


def test_hover_tells_matrix_rank_value_and_bound(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("single_small")) as page:
        scroll_through(page)
        page.locator("#heat").scroll_into_view_if_needed()
        box = page.locator("#heat .canvas .nsewdrag").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector("#heat .hovertext")
        told = page.locator("#heat .hovertext").text_content()
        assert "weight" in told
        assert "rank 2" in told
        assert "error at most" in told


def test_names_are_text_never_markup(browser: Any, pages: Callable[[str], Path]) -> None:
    with opened(browser, pages("hostile")) as page:
        scroll_through(page)
        page.select_option("#curves", "roles")
        page.select_option("#pair", index=1)
        page.wait_for_timeout(300)
        page.select_option("#pair", index=0)
        assert page.locator("img").count() == 0
        assert "owned" not in page.title()
        assert page.locator("section.pair:visible h2").inner_text() == HOSTILE_FILE
        assert f"h.0.{HOSTILE}" in page.locator("#matrices tbody th").all_inner_texts()
        page.select_option("#matrix", label=f"h.0.{HOSTILE}")
        page.locator("#spectra").scroll_into_view_if_needed()
        assert page.locator("#spectra .annotation-text").first.text_content() == f"h.0.{HOSTILE}"


def test_only_the_scripts_of_the_page_run(browser: Any, pages: Callable[[str], Path]) -> None:
    """Were something to slip through, the content security policy would still refuse to run it or to call out."""
    path = pages("single_small")
    inside = browser.new_context()
    page = inside.new_page()
    page.goto(path.as_uri())
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
    }""")
    assert "owned" not in page.title()
    assert page.evaluate("fetch('https://example.org').then(() => 'called', () => 'refused')") == "refused"
    inside.close()


def test_words_and_tables_stand_without_javascript(browser: Any, pages: Callable[[str], Path]) -> None:
    inside = browser.new_context(java_script_enabled=False)
    page = inside.new_page()
    page.goto(pages("two_pairs").as_uri())
    assert page.locator(".verdict").first.is_visible()
    assert "need" in page.locator("noscript").inner_text()
    inside.close()
