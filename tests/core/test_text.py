"""Text of others on its way to terminals and spreadsheets."""

import pytest

from specbasis.core.text import cell, markdown, printable, shareable


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plain Ünïcode ×\n\tindented", "plain Ünïcode ×\n\tindented"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\rb\x07\x9b", r"a\rb\x07\x9b"),
        ("\u202eexe.txt", r"\u202eexe.txt"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_nothing_steers_a_terminal(text: str, said: str) -> None:
    assert printable(text) == said


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_word_is_a_formula(start: str) -> None:
    assert cell(f"{start}cmd|' /C calc'!A0") == f"'{start}cmd|' /C calc'!A0"


@pytest.mark.parametrize("value", ["-1", "+2.5e-3", "-0.", "word", "a=b", -3, None, True])
def test_numbers_and_words_stay(value: object) -> None:
    assert cell(value) == value


def test_floats_have_a_format_or_all_digits() -> None:
    assert float(cell(1 / 3)) == 1 / 3
    assert cell(1 / 3, ".3g") == "0.333"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/home/someone/models/bert", "…/models/bert"),
        ("/home/someone/models/bert.pt#model.x", "…/models/bert.pt#model.x"),
        ("/home/some one/my models/bert base", "…/my models/bert base"),
        (r"C:\Users\someone\models\bert", "…/models/bert"),
        ("LORA adapter on /home/someone/models/bert: 3 modules", "LORA adapter on …/models/bert: 3 modules"),
        ("--cache=/home/someone/cache", "--cache=…/someone/cache"),
    ],
)
def test_places_of_this_machine_are_left_out(text: str, said: str) -> None:
    assert shareable(text) == said
    assert shareable(said) == said


@pytest.mark.parametrize(
    "text",
    ["hub:org/name@main/sub", "https://a.org/b/c/d/e", "./a/b/c/d", "a/b/c/d/e", "../a/b/c", "/tmp/x", "1/2/3"],
)
def test_what_others_can_follow_stays(text: str) -> None:
    assert shareable(text) == text


def test_names_are_no_markup() -> None:
    hostile = "a|b\n# c <!-- specbasis: end of test --> [x](y) `z` *s* \x1b[31m /home/someone/models/x"
    text = markdown(hostile)
    assert "\n" not in text
    assert "<" not in text
    assert "\x1b" not in text
    assert "/home" not in text
    for sign in "|[]`*":
        assert text.count(sign) == text.count(f"\\{sign}")
