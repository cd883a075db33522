"""The decorator is the only table: a measure that stands under it is found everywhere it should show."""

import sys
from pathlib import Path

import pytest

import specbasis
from specbasis.core.errors import InputError
from specbasis.measures.measure import REGISTRY, measure
from specbasis.measures.table import choose, listing, registered, table
from tests.pico import bert_state, finetuned

MODULE = """
from specbasis.measures.measure import measure, PAIR

@measure(formula="σ₁", values=("{which}",), variants={"which": PAIR})
def largest(t, which):
    'Largest singular value of {which}.'
    return float(getattr(t, which).spectrum[0])

@measure(formula="σᵢ²", index="rank", values=("base",))
def squares(t):
    'Squares of the singular values.'
    return t.base.spectrum.square()
"""


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A module of two measures, registered while the test runs."""
    (tmp_path / "new_measures.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(REGISTRY)
    import new_measures

    yield new_measures
    REGISTRY[:] = before
    del sys.modules["new_measures"]


def test_an_added_measure_is_in_rows_terminal_and_page(added, tmp_path, capsys):
    from specbasis.cli.tables import print_comparison

    base = bert_state(1)
    result = specbasis.compare(base, finetuned(base), measures=["largest*", "squares"], out=tmp_path / "out")
    rows = result.rows.to_pylist()
    values = {r["matrix"]: r["value"] for r in rows if r["measure"] == "largest_base"}
    squares = {r["matrix"]: r["value"] for r in rows if r["measure"] == "squares" and r["index"] == 0}
    assert squares == {name: pytest.approx(value**2) for name, value in values.items()}
    assert "squares" in result.own[result.pairs[0]][-1]
    print_comparison(specbasis.load(tmp_path / "out"))
    assert "largest_tuned" in capsys.readouterr().out
    page = result.report(tmp_path / "page.html", figures=False).read_text(encoding="utf-8")
    assert '"largest_base","largest_base","Largest singular value of base"' in page
    assert '"own":["squares"]' in page


def test_an_added_measure_is_in_the_help(added, monkeypatch):
    from typer.testing import CliRunner

    from specbasis.cli import app
    from specbasis.cli.common import STDOUT

    monkeypatch.setattr(STDOUT, "width", 200)
    told = CliRunner().invoke(app, ["compare", "--measures", "help"])
    assert told.exit_code == 0
    assert "largest_base" in told.output
    assert "Squares of the singular values" in told.output


def test_docs_list_every_measure_as_it_is_registered():
    page = (Path(__file__).parents[2] / "docs" / "rows.md").read_text(encoding="utf-8")
    assert listing() in page, "make rows writes docs/rows.md anew"
    assert not [m.name for m in REGISTRY if f"`{m.name}`" not in page]


def test_an_added_measure_is_listed_for_the_docs(added, monkeypatch):
    monkeypatch.setattr("specbasis.measures.table.KINDS", (added,))
    added.__doc__ = "Tests: measures of a test."
    assert "| `largest_base`, `largest_tuned` |  | 1 | Largest singular value of base/tuned | σ₁ |  |" in listing()


def test_every_measure_is_of_a_kind_and_says_what_it_is():
    names = [m.name for m in registered()]
    assert len(set(names)) == len(names)
    for m in registered():
        assert m.title
        assert m.shown in ("table", "matrices", "ranks", "rows"), m.name
        assert m.when in ("", "nulls", "samples"), m.name
        assert set(m.reads) <= {"every", "rounding", "heads"}, m.name
        assert "{" not in m.name + m.title + "".join(m.vectors + m.values), m.name
        assert m.shown != "matrices" or m.heading, m.name


def test_nulls_and_samples_are_taken_on_request():
    default = {m.name for m in table()}
    assert "alignment_left" in default
    assert "p_gaussian_left" not in default
    assert "p_gaussian_left" in {m.name for m in table(null=True)}
    assert "p_sampled_rotated_left" in {m.name for m in table(sampled=True)} - default


def test_a_pattern_that_matches_nothing_names_the_nearest_measure():
    with pytest.raises(InputError, match=r"no measure 'alignment_lef'; did you mean alignment_left\?"):
        choose(["alignment_lef"])


def test_what_reads_no_decomposition_is_always_taken():
    free = {m.name for m in table() if m.is_free}
    assert {"weight_cosine", "relative_update", "chance_alignment_left"} <= free
    chosen = {m.name for m in choose(["rsd"])}
    assert chosen == free | {"rsd"}


def test_only_leading_values_leave_out_what_needs_all_of_them():
    chosen = {m.name for m in choose([], whole=False)}
    assert {"alignment_left", "singular_value_base", "t1_rc", "effective_rank_base", "stable_rank_delta"} <= chosen
    assert not {"rsd", "tail_rc", "intruder_cosine_left", "head_rotation"} & chosen
    assert "head_rotation" in {m.name for m in choose(["head*"], whole=False)}


def test_variants_are_named_by_their_placeholders():
    before = list(REGISTRY)
    try:

        @measure(vectors=("{b}",), variants={"a": ("p", "q"), "b": ("base",)})
        def x(t, a, b):
            """{a} of {b}."""

        added = REGISTRY[len(before) :]
    finally:
        REGISTRY[:] = before
    assert [(m.name, m.title, m.vectors) for m in added] == [
        ("x_p_base", "p of base", ("base",)),
        ("x_q_base", "q of base", ("base",)),
    ]
