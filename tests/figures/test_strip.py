"""The layers in a terminal: each character is the size of one place, against a table built by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from specbasis.cli.common import PLAIN
from specbasis.comparison.facts import Facts
from specbasis.figures.strip import STEPS, layers


def facts(*matrices: tuple[str, str, int | None, float]) -> Facts:
    keys = ("stack", "role", "block", "relative_update")
    return cast(Facts, SimpleNamespace(matrices=[dict(zip(keys, m, strict=True)) for m in matrices]))


def lines(*matrices: tuple[str, str, int | None, float], width: int = 80) -> list[str]:
    text: Any = layers(facts(*matrices), width)
    return cast(list[str], text.plain.split("\n"))


def test_a_character_is_the_size_of_a_place() -> None:
    shown = lines(
        ("", "ffn.up", 0, 0.0), ("", "ffn.up", 1, 0.02), ("", "ffn.up", 3, 2.0),
        ("", "attention.query", 0, 1e-4), ("", "attention.query", 0, 0.2),
        ("", "embedding", None, 0.002),
    )  # fmt: skip
    assert [line.rstrip() for line in shown[:3]] == [
        "attention.query  ▆▆",
        "ffn.up           ··▄▄  ██",
        "embedding                  ▂▂",
    ]
    assert "blocks 0 to 3;" in shown[3]
    assert all(sign in shown[4] for _, sign, _, _ in STEPS)


def test_many_blocks_share_characters_and_the_larger_is_seen() -> None:
    shown = lines(*(("", "ffn.up", i, 0.5 if i == 70 else 0.001) for i in range(100)), width=60)
    assert "2 to a character" not in shown[1]
    assert all(len(line) <= 60 for line in shown[:1])
    wide = lines(*(("", "ffn.up", i, 0.5 if i == 70 else 0.001) for i in range(100)), width=70)
    assert "2 to a character" in wide[1]
    assert wide[0].split() == ["ffn.up", "▁" * 35 + "▇" + "▁" * 14]


def test_a_model_without_blocks_has_no_strip() -> None:
    assert layers(facts(("", "other", None, 0.1)), 80) is None


def test_stacks_are_named_where_there_are_several_and_steer_no_terminal() -> None:
    shown = lines(("enc", "ffn.up", 0, 0.1), ("de\x1b[2J", "ffn.up", 0, 0.1))
    assert shown[0].startswith("enc ffn.up")
    assert shown[1].startswith("de\\x1b[2J ffn.up")


@pytest.mark.parametrize("size", [math.nan, math.inf])
def test_a_size_that_is_no_number_is_shown(size: float) -> None:
    assert lines(("", "ffn.up", 0, size))[0].split() == ["ffn.up", "??" if math.isnan(size) else "██"]


def test_signs_and_their_spellings_tell_sizes_apart() -> None:
    signs = [sign for _, sign, _, _ in STEPS]
    assert len({*signs}) == len({PLAIN[sign] for sign in signs}) == len(STEPS)
    assert all(len(PLAIN[sign]) == 1 for sign in signs)
    assert [most for most, *_ in STEPS] == sorted(most for most, *_ in STEPS)
