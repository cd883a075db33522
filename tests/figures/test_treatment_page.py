"""The page of extract, repair and merge: what it says, and how it looks in a real browser, without a network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import specbasis
from specbasis.jobs.experiments import Row
from specbasis.treatment.extract import Extraction
from specbasis.treatment.merge import Merging
from specbasis.treatment.repair import Repair, conclude
from specbasis.treatment.treated import Treated
from tests.pico import bert_state, finetuned, write

from .conftest import HOSTILE
from .test_browser import DESKTOP, PHONE, browser, opened, overflow  # noqa: F401 - the browser is a fixture

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

BASE = bert_state(blocks=3)


def extraction(folder: Path) -> Treated:
    tuned = finetuned(BASE, 0.05) | {"classifier.weight": torch.ones(2, 16)}
    nan = "encoder.layer.0.output.dense.weight"
    tuned[nan] = torch.full_like(BASE[nan], torch.nan)
    base, path = write(folder / "base.safetensors", BASE), write(folder / "tuned.safetensors", tuned)
    made = specbasis.extract(base, path, folder / "out", energy=0.9)
    scores = {"base": 0.5, "tuned": 0.9, "treated": 0.88, "change": -0.02, "change_low": -0.05, "change_high": 0.01}
    notes = [*made.record["notes"], f"a note with {HOSTILE}"]
    return Extraction(made.folder, {**made.record, "scores": {"accuracy": scores}, "notes": notes})


def merging(folder: Path) -> Treated:
    base = write(folder / "base.safetensors", BASE)
    tuned = [write(folder / f"{n}.safetensors", finetuned(BASE, 0.05, seed=i)) for i, n in enumerate(("a", "b"))]
    made = specbasis.merge(base, tuned, folder / "out")
    values = {"a": 0.9, "b": 0.2, "mean": 0.8, "merged": 0.85}
    task = {
        "metric": "accuracy",
        "values": values,
        "change": 0.05,
        "change_low": 0.01,
        "change_high": 0.09,
        "examples": 80,
    }
    record = {**made.record, "scores": {"tasks": {"a": task}, "normalised": values}}
    return Merging(made.folder, record)


def repaired(folder: Path) -> Treated:
    rng, rows = np.random.default_rng(0), []
    for way, amount in [("tuned", None), ("base", None), *(("interpolation", x / 10) for x in range(1, 10))]:
        point = {"way": way} if amount is None else {"way": way, "amount": amount, "blocks": "all"}
        values = {}
        for half in ("choice", "report"):
            for name in ("keep", "recover", "change", "back", "forgotten"):
                value = float(rng.uniform(0.1, 0.2))
                values |= {
                    f"{half}.{name}": value,
                    f"{half}.{name}_low": value - 0.05,
                    f"{half}.{name}_high": value + 0.05,
                }
        rows.append(Row(point, values, None, 0.1, "", None))
    (folder / "out").mkdir()
    record = {"base": "base", "tuned": "tuned", **conclude(rows, 0.01)}
    return Repair(folder / "out", record, tuple(rows))


CASES = {"extract": extraction, "merge": merging, "repair": repaired}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def page(case: str) -> Path:
        if case not in made:
            made[case] = CASES[case](tmp_path_factory.mktemp(case)).report()
        return made[case]

    return page


@pytest.mark.parametrize("case", CASES)
def test_the_page_stands_in_the_folder_with_its_picture_and_asks_for_nothing(case: str, pages: Any) -> None:
    path = pages(case)
    text = path.read_text()
    assert path.name == "report.html"
    assert {f"{case}.png", f"{case}.svg"} <= {file.name for file in path.parent.iterdir()}
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', text) == []
    assert 'src="data:image/svg+xml;base64,' in text


def test_the_page_of_an_extraction_has_every_matrix_and_what_is_left_out(pages: Any) -> None:
    text = pages("extract").read_text().replace("<wbr>", "")  # where a long name may break
    for name, tensor in BASE.items():
        if tensor.ndim > 1:
            assert f">{name}<" in text or f"{name}</code>" in text, name
    assert "encoder.layer.0.output.dense.weight</code>: holds NaN or Inf" in text
    assert "-0.0500" in text  # the interval of the score
    assert "&lt;script&gt;" in text  # a note is text
    assert '"versions"' in text.replace("&#34;", '"')


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("case", CASES)
def test_it_fits_every_screen(browser: Any, pages: Any, case: str, screen: Any, scheme: str) -> None:  # noqa: F811
    with opened(browser, pages(case), **screen, color_scheme=scheme) as page:
        assert overflow(page) <= 0
        for details in page.locator("details").all():
            details.evaluate("element => element.open = true")
        assert overflow(page) <= 0
        assert page.evaluate("document.images[0].naturalWidth") > 100
        assert page.locator("table.numbers").count() >= 1
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        assert dark == (scheme == "dark")
        assert "owned" not in page.title()
