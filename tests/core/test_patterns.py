"""Patterns of others: the answers of Python's own engine where that ends, and an end where it has none."""

import random
import re

import pytest

from specbasis.core.errors import InputError
from specbasis.core.patterns import BUDGET, Matcher

ATOMS = ("a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "a?", r"\b", "layers")
REPEATS = ("*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?", "{2,}")


def written(depth: int, draw: random.Random) -> str:
    """A random pattern."""
    kind = draw.random()
    if depth == 0 or kind < 0.35:
        return draw.choice(ATOMS)
    inner = written(depth - 1, draw)
    if kind < 0.55:
        return inner + written(depth - 1, draw)
    if kind < 0.7:
        return f"({inner}|{written(depth - 1, draw)})"
    if kind < 0.8:
        return f"(?{draw.choice('=!')}{inner})"
    if kind < 0.84:
        return draw.choice((f"^{inner}", f"{inner}$"))
    return f"(?:{inner}){draw.choice(REPEATS)}"


def test_the_answers_are_those_of_re() -> None:
    draw = random.Random(0)
    matched = 0
    for _ in range(2000):
        pattern = written(3, draw)
        name = "".join(draw.choice("ab.1") for _ in range(draw.randint(0, 7)))
        want = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert (Matcher("file").first([pattern], name) is not None) == want, (pattern, name)
        matched += want
        assert Matcher("file").whole(pattern, name) == (re.fullmatch(pattern, name) is not None), (pattern, name)
    assert 200 < matched < 1800


def test_the_first_of_several_patterns_counts() -> None:
    matcher = Matcher("file")
    assert matcher.first(["k_proj", r"layers\.\d+\.q_proj", "q_proj"], "layers.3.q_proj") == r"layers\.\d+\.q_proj"
    assert matcher.first(["proj"], "layers.3.q_proj") is None  # no component begins there


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("(a+)+b", "a" * 60),
        ("(a|a)*b", "a" * 60),
        ("(a|a)" * 60 + "b", "a" * 60),
        ("(.*)*.*.*.*.*.*x", "a" * 500),
        ("((((a{1000}){1000}){1000}){1000})", "a" * 60),
        ("a{4000000000}", "aa"),
        (r"(\w+\s?)*!", "a" * 60),
    ],
)
def test_what_backtracks_for_ever_elsewhere_is_answered(pattern: str, name: str) -> None:
    matcher = Matcher("file")
    assert matcher.first([pattern], name) is None
    assert matcher.left > BUDGET // 2


@pytest.mark.parametrize("pattern", ["(a?){65000}b", "(?:a?){3000}a{3000}"])
def test_what_is_long_even_so_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="take too long to match"):
        Matcher("file").first([pattern], "a" * 3000)


@pytest.mark.parametrize("pattern", ["(", "*a", r"(a)\1", "(" * 5000 + ")" * 5000, "(?P<x>a)(?P=x)", "[z-a]"])
def test_no_pattern(pattern: str) -> None:
    with pytest.raises(InputError, match=r"adapter\.json: .* is no pattern"):
        Matcher("adapter.json").first([pattern], "aa")
