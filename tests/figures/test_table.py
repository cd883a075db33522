"""One table shows itself alike in a terminal, as Markdown, as CSV and as HTML."""

import csv
import io
import math
import re

from markupsafe import Markup
from rich.console import Console

from specbasis.figures.table import Column, Table, number

TABLE = Table(
    (
        Column("role", words=True, title="what it does"),
        Column("matrices", ",", narrow="n"),
        Column("left", ".3f", group="alignment", narrow="align\nL R"),
        Column("right", ".3f", group="alignment"),
        Column("verdict", words=True),
    ),
    (
        ("ffn & co", 1200, 0.12345, math.nan, "finetuned"),
        ("all", 1200, 0.5, None, Markup("<b>mixed</b>")),
    ),
    "the pair",
    total=True,
)


def shown(table: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table.terminal())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_joins_the_columns_of_a_group_and_uses_narrow_headings() -> None:
    text = shown(TABLE)
    assert text.startswith("the pair")
    assert "align" in text
    assert "matrices" not in text
    assert "1,200 0.123 – finetuned" in " ".join(text.split())


def test_a_narrow_terminal_folds_words_and_cuts_nothing_off() -> None:
    name = "encoder.layer.11.attention.self.query.weight"
    text = shown(Table.of([{"matrix": name, "alpha": 2.25}], ".2f"), width=30)
    words = "".join(line.split(" ")[0] for line in text.splitlines()[2:])
    assert words == name
    assert "…" not in text


def test_markdown_states_the_group_in_the_heading_and_aligns_numbers() -> None:
    assert TABLE.markdown().splitlines() == [
        "| role | matrices | alignment left | alignment right | verdict |",
        "| --- | ---: | ---: | ---: | --- |",
        "| ffn & co | 1,200 | 0.123 | – | finetuned |",
        "| all | 1,200 | 0.500 | – | <b>mixed</b> |",
    ]


def test_markdown_keeps_bars_inside_their_cell() -> None:
    """A reader of GFM takes a backslash with the sign behind it: what is left of a bar with none ends the cell."""
    names = ["a|b", r"a\|b", r"a\\|b", "|", "||", "a\\"]
    table = Table.of([{"name": name, "n": 1} for name in names])
    for name, line in zip(names, table.markdown().splitlines()[2:], strict=True):
        first, last, *rest = re.split(r"\|", re.sub(r"\\[|\\]", lambda sign: f"<{ord(sign[0][1])}>", line))[1:]
        assert rest == [""], line
        assert last.strip() == "1"
        assert re.sub(r"<(\d+)>", lambda code: chr(int(code[1])), first.strip()).replace("\\\\", "\\") == (
            name.replace("\\\\", "\\")
        )


def test_csv_holds_the_values_with_all_their_digits_or_in_a_format() -> None:
    records = [{"name": "a, b", "value": 1 / 3, "count": 2}, {"name": "c", "count": None, "late": True}]
    lines = list(csv.DictReader(io.StringIO(Table.of(records).csv())))
    assert [float(lines[0]["value"]), lines[0]["name"], lines[1]["value"]] == [1 / 3, "a, b", ""]
    assert lines[1] == {"name": "c", "value": "", "count": "", "late": "True"}
    assert Table.of(records).csv(".3g").splitlines()[1] == '"a, b",0.333,2,'


def test_html_escapes_words_keeps_markup_and_spans_its_groups() -> None:
    markup = TABLE.html()
    assert '<th scope="colgroup" colspan="2">alignment</th>' in markup
    assert '<th scope="col" rowspan="2" class="word"><abbr title="what it does">role</abbr></th>' in markup
    assert '<tr><th scope="row">ffn &amp; co</th><td>1,200</td><td>0.123</td><td>–</td>' in markup
    assert '<tr class="total"><th scope="row">all</th>' in markup
    assert '<td class="word"><b>mixed</b></td>' in markup
    assert "style=" not in markup
    assert 'style="' in TABLE.html(inline=True)
    assert "rowspan" not in Table.of([{"a": 1}]).html()


def test_a_number_that_is_none_is_a_dash() -> None:
    assert [number(v, ".1f") for v in (None, math.nan, 2.0)] == ["–", "–", "2.0"]
    assert number(2.5e6, ".1f", 1e6) == "2.5"
