"""Comparisons of pico models, made by the real path, for all tests of the report."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import specbasis
from specbasis.comparison.comparison import Comparison
from specbasis.figures.data import read_pairs
from specbasis.figures.page import render

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
HOSTILE_FILE = "<img src=x onerror=alert(1)> ${a} %{y} $x_1$ \"'&amp;"

Weights = dict[str, torch.Tensor]


def _random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _transformer(seed: int) -> Weights:
    """An encoder and a decoder of two blocks each, and an embedding outside of the blocks."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a fast path that a test does not need
        model = torch.nn.Transformer(16, 2, 2, 2, 24)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _moved(weights: Weights, size: float, seed: int = 9) -> Weights:
    return {
        name: value + size * value.std() * _random(*value.shape, seed=seed + i) if value.ndim > 1 else value
        for i, (name, value) in enumerate(weights.items())
    }


def _bert(blocks: int, width: int, seed: int) -> Weights:
    names = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    shapes = dict.fromkeys(names, (width, width))
    shapes |= {"intermediate.dense": (2 * width, width), "output.dense": (width, 2 * width)}
    weights = {"embeddings.word_embeddings.weight": _random(50, width, seed=seed)}
    for block in range(blocks):
        for i, (name, shape) in enumerate(shapes.items()):
            weights[f"encoder.layer.{block}.{name}.weight"] = _random(*shape, seed=seed + 10 * block + i)
            weights[f"encoder.layer.{block}.{name}.bias"] = torch.zeros(shape[0])
    return weights


def two_pairs() -> tuple[Weights, dict[str, Weights]]:
    base = _transformer(1)
    return base, {"gentle": _moved(base, 0.01), "strong": _moved(base, 0.5)}


def identical() -> tuple[Weights, dict[str, Weights]]:
    base = _bert(2, 12, seed=3)
    return base, {"same": dict(base)}


def single_small() -> tuple[Weights, dict[str, Weights]]:
    """One matrix, no block, three ranks."""
    W = _random(7, 3, seed=5)
    return {"weight": W}, {"tuned": {"weight": W + 0.1 * _random(7, 3, seed=6)}}


def rank_one() -> tuple[Weights, dict[str, Weights]]:
    """A row and a column: a single rank."""
    a, b = _random(1, 9, seed=5), _random(9, 1, seed=6)
    return {"head.weight": a, "x.0.w": b}, {"tuned": {"head.weight": 2 * a, "x.0.w": b + 1}}


def degenerate() -> tuple[Weights, dict[str, Weights]]:
    """Zeros in base (infinite changes), zeros in both, equal singular values (unresolved), and a NaN (fails)."""
    base = {
        "blocks.0.zero.weight": torch.zeros(8, 6),
        "blocks.0.still.weight": torch.zeros(8, 6),
        "blocks.1.eye.weight": torch.eye(8),
        "blocks.1.low.weight": _random(8, 2, seed=1) @ _random(2, 8, seed=2),
        "blocks.1.fine.weight": _random(8, 6, seed=4),
        "blocks.1.bad.weight": _random(8, 6, seed=4),
    }
    tuned = {name: value + 0.1 * _random(*value.shape, seed=7) for name, value in base.items()}
    tuned["blocks.0.still.weight"] = torch.zeros(8, 6)
    tuned["blocks.1.eye.weight"] = torch.eye(8).flip(0)
    tuned["blocks.1.bad.weight"][0, 0] = torch.nan
    return base, {"tuned": tuned}


def hostile() -> tuple[Weights, dict[str, Weights]]:
    W = _random(12, 8, seed=1)
    base = {f"h.0.{HOSTILE}": W, f"h.1.{HOSTILE}": W + 1, f"only {HOSTILE}": W, "_hidden $\\frac$": W}
    tuned = {name: value + 0.1 * _random(12, 8, seed=2) for name, value in base.items() if "only" not in name}
    return base, {HOSTILE_FILE: tuned, "_second": tuned}


def many_pairs() -> tuple[Weights, dict[str, Weights]]:
    base = {f"h.{i}.weight": _random(8, 6, seed=i) for i in range(3)}
    return base, {f"checkpoint-{i}": _moved(base, 0.02 * (i + 1)) for i in range(20)}


def many_matrices() -> tuple[Weights, dict[str, Weights]]:
    base = {
        f"stage.{block}.part{i}.weight": _random(10, 12, seed=7 * block + i)
        for block in range(30)
        for i in range(7)
    }
    return base, {"tuned": _moved(base, 0.1)}


CASES: dict[str, Callable[[], tuple[Weights, dict[str, Weights]]]] = {
    f.__name__: f
    for f in (
        two_pairs, identical, single_small, rank_one, degenerate, hostile, many_pairs, many_matrices,
    )
}  # fmt: skip


@pytest.fixture(scope="session")
def comparisons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Comparison]]:
    """The comparison of a case by its name, made once."""
    made: dict[str, Comparison] = {}

    def get(case: str) -> Comparison:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            base, tuned = CASES[case]()
            paths = {name: folder / f"{name}.safetensors" for name in ("base", *tuned)}
            for name, weights in ({"base": base} | tuned).items():
                save_file({k: v.clone().contiguous() for k, v in weights.items()}, paths[name])
            made[case] = specbasis.compare(
                paths["base"], [paths[name] for name in tuned], folder / "out", workers=1
            )
        return made[case]

    yield get
    for comparison in made.values():
        shutil.rmtree(comparison.folder.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def pages(comparisons: Callable[[str], Comparison]) -> Callable[[str], Path]:
    """The page of a case by its name, written once, without the figures beside it."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            c = comparisons(case)
            made[case] = c.folder / "page.html"
            made[case].write_bytes(render(c, read_pairs(c)))
        return made[case]

    return get


def page_data(page: Path) -> list[dict[str, Any]]:
    """The data of the pairs, read back from a page as a browser reads it."""
    import json
    from html.parser import HTMLParser

    class Reader(HTMLParser):
        found: list[str] = []
        inside = False

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.inside = tag == "script" and ("class", "data") in attrs
            if self.inside:
                self.found.append("")

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.found[-1] += data

    reader = Reader()
    reader.found = []
    reader.feed(page.read_text(encoding="utf-8"))
    return [json.loads(text) for text in reader.found]
