"""Fig. 5: the positions of each panel, on the paper's model and on smaller ones."""

import math

import pytest

from specbasis.core.errors import InputError
from specbasis.jobs.experiments import Row
from specbasis.paper.fig5 import panel, write
from specbasis.paper.options import PanelOptions


def test_the_default_panels_are_those_of_appendix_m():
    a, b, c = (panel(name, ranks=768, blocks=12) for name in ("fig5a", "fig5b", "fig5c"))
    assert [point.interval for point in a.points] == [(0, m) for m in range(50, 701, 50)]
    assert {point.blocks for point in (*a.points, *c.points)} == {(10, 11)}
    assert [point.blocks for point in b.points] == [(i, i + 1) for i in range(0, 12, 2)]
    assert {point.interval for point in b.points} == {(0, 200)}
    assert [point.interval[0] for point in c.points] == [*range(0, 551, 50), 568]
    assert {m - k for k, m in (point.interval for point in c.points)} == {200}
    cell = a.cells()[0]
    assert (cell.task, cell.seed, cell.epochs, cell.learning_rate) == ("mnli", 42, 3, 1e-4)


def test_a_smaller_model_ends_at_its_own_limit():
    a, c = (panel(name, ranks=384, blocks=6) for name in ("fig5a", "fig5c"))
    assert [point.interval[1] for point in a.points] == [50, 100, 150, 200, 250, 300, 350, 384]
    assert [point.interval for point in c.points] == [(0, 200), (50, 250), (100, 300), (150, 350), (184, 384)]
    assert a.points[0].blocks == (4, 5)
    odd = panel("fig5b", ranks=384, blocks=5)
    assert [point.blocks for point in odd.points] == [(0, 1), (2, 3), (3, 4)]


def test_a_line_has_a_gap_where_nothing_ran(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    what = panel("fig5a", ranks=200, blocks=4, options=PanelOptions(base="org/base", seeds=(1, 2)))
    size = {"adapter": 1}
    rows = [
        Row(what.cell(point, seed).row(), {"score": 0.5 + seed / 10, "parameters": size}, None, 1, "", None)
        for point, seeds in ((what.points[0], (1, 2)), (what.points[2], (1, 2)), (what.points[3], (1,)))
        for seed in seeds
    ]
    drawn, titles = [], []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **rest: drawn.append((x, y, rest["yerr"])))
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **_: titles.append(text))
    paths = write(what, rows, tmp_path)
    ((x, y, spread),) = drawn
    assert x == [50, 100, 150, 200]
    assert y == pytest.approx([65.0, math.nan, 65.0, 60.0], nan_ok=True)
    assert spread == pytest.approx([math.sqrt(50), 0.0, math.sqrt(50), 0.0])
    assert titles == ["fig5a: MNLI, org/base\nbars: standard deviation, 1–2 seeds"]
    text = paths[0].read_text(encoding="utf-8")
    assert "| 50 | 0 … 50 | 1 | 65.00 ± 7.07 | – | 2 |" in text
    assert "| 100 | 0 … 100 | – | – | – | 0 |" in text
    assert "| 200 | 0 … 200 | 1 | 60.00 | +0.00 | 1 |" in text  # on the seed that the first point has too


def test_what_is_no_panel_is_refused():
    with pytest.raises(InputError, match="want fig5a, fig5b or fig5c"):
        panel("fig5d", ranks=768, blocks=12)
    with pytest.raises(InputError, match="too small"):
        panel("fig5b", ranks=768, blocks=1)
