"""Rows as arrays: against pandas and numpy on the same rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import specbasis
from specbasis.comparison.comparison import Comparison
from specbasis.figures.data import MARKED_RANKS, QUANTILES, Pair, Series, quartiles, read_pairs


def frame_of(comparison: Comparison, pair: str, measure: str) -> pd.DataFrame:
    frame = comparison.to_pandas()
    return frame[(frame["pair"] == pair) & (frame["measure"] == measure)]


def pair_of(comparison: Comparison, i: int = 0) -> Pair:
    return read_pairs(comparison)[i]


@pytest.mark.parametrize("case", ["two_pairs", "degenerate", "single_small", "many_matrices"])
def test_series_hold_the_rows(comparisons: Callable[[str], Comparison], case: str) -> None:
    comparison = comparisons(case)
    for pair in read_pairs(comparison):
        assert pair.matrices["name"] == [
            name
            for name in comparison.manifest["pairs"][pair.label]["matrices"]
            if name not in {f["matrix"] for f in comparison.failed}
        ]
        for measure, series in pair.series.items():
            frame = frame_of(comparison, pair.label, measure)
            assert [pair.matrices["name"][m] for m in series.matrix] == frame["matrix"].tolist()
            assert np.array_equal(series.value, frame["value"], equal_nan=True)
            assert np.array_equal(series.index, frame["index"].fillna(-1))


def test_bands_are_quartiles_of_resolved_figures(comparisons: Callable[[str], Comparison]) -> None:
    comparison = comparisons("two_pairs")
    pair = pair_of(comparison, 1)
    frame = frame_of(comparison, pair.label, "alignment_left")
    for group in ("all", "ffn.up"):
        rows = frame if group == "all" else frame[frame["role"] == group]
        rows = rows[rows["resolved"].astype(bool)]
        by_rank = rows.groupby("index")["value"]
        band = pair.bands["alignment_left"][group]
        for q, got in ((0.25, band.low), (0.5, band.median), (0.75, band.high)):
            expected = by_rank.quantile(q)
            assert got[: len(expected)] == pytest.approx(expected.to_numpy(), rel=1e-14)
        assert band.count[: len(by_rank)].tolist() == by_rank.size().tolist()


def test_unresolved_ranks_are_left_out(comparisons: Callable[[str], Comparison]) -> None:
    """Every rank of an identity matrix is arbitrary: its alignments must not reach a median."""
    comparison = comparisons("degenerate")
    pair = pair_of(comparison)
    eye = pair.matrices["name"].index("blocks.1.eye.weight")
    series = pair.measure("alignment_left")
    assert not series.resolved[series.matrix == eye].any()
    assert np.isnan(series.dense(8)[eye]).all()
    assert np.isnan(pair.at_rank("alignment_left", 1)[eye])


def test_relative_rank_reads_the_value_at_that_share_of_the_spectrum(
    comparisons: Callable[[str], Comparison],
) -> None:
    comparison = comparisons("two_pairs")
    pair = pair_of(comparison)
    got = pair.measure("singular_value_change").at_quantiles(pair.sizes)
    frame = frame_of(comparison, pair.label, "singular_value_change")
    for m, name in enumerate(pair.matrices["name"]):
        values = frame[frame["matrix"] == name].sort_values("index")["value"].to_numpy()
        assert got[m].tolist() == [values[int(q * len(values))] for q in QUANTILES]


@given(
    hnp.arrays(float, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=st.floats(-9, 9) | st.just(np.nan))
)
def test_quartiles_ignore_what_is_missing(values: np.ndarray) -> None:
    band = quartiles(np.arange(values.shape[1], dtype=float), values)
    for column in range(values.shape[1]):
        present = values[:, column][~np.isnan(values[:, column])]
        expected = np.quantile(present, [0.25, 0.5, 0.75]) if len(present) else [np.nan] * 3
        got = [band.low[column], band.median[column], band.high[column]]
        assert got == pytest.approx(list(expected), abs=1e-12, nan_ok=True)
        assert band.count[column] == len(present)


@given(st.lists(st.integers(0, 700), min_size=1, max_size=5), st.integers(32, 256))
def test_thinning_keeps_the_leading_and_the_marked_ranks(lengths: list[int], limit: int) -> None:
    index = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
    start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    series = Series(start, index, index * 2.0, index * 0.0, np.ones(len(index), bool)).thinned(limit)
    for m, n in enumerate(lengths):
        kept = series.index[series.start[m] : series.start[m + 1]]
        assert (series.value[series.start[m] : series.start[m + 1]] == 2 * kept).all()
        assert len(kept) <= max(limit + len(MARKED_RANKS), 0)
        if n <= limit:
            assert len(kept) == n
        else:
            assert set(range(limit // 2)) <= set(kept)
            assert {rank - 1 for rank in MARKED_RANKS if rank <= n} <= set(kept)
            assert kept[-1] == n - 1


def test_panels_hold_every_matrix_once_by_block(comparisons: Callable[[str], Comparison]) -> None:
    pair = pair_of(comparisons("two_pairs"))
    panels = pair.panels()
    assert sorted(m for *_, members in panels for m in members) == list(range(len(pair)))
    for stack, role, members in panels:
        assert {(pair.matrices["stack"][m], pair.matrices["role"][m]) for m in members} == {(stack, role)}
        assert [pair.matrices["block"][m] for m in members] == sorted(pair.matrices["block"][m] for m in members)


def test_chance_levels_name_their_dimension(comparisons: Callable[[str], Comparison]) -> None:
    pair = pair_of(comparisons("single_small"))
    assert [(d, n) for d, _, n in pair.chance_levels("left")] == [(7, 1)]
    assert [(d, n) for d, _, n in pair.chance_levels("right")] == [(3, 1)]
    assert pair.chance_levels("right")[0][1] == pytest.approx(0.5)  # E|cos| on the sphere in three dimensions


def test_chance_of_sides_that_no_mean_holds_is_not_drawn() -> None:
    base = {"layers.0.weight": torch.randn(32, 40), "token_type.weight": torch.randn(2, 40)}
    comparison = specbasis.compare(base, {n: W + 0.1 * torch.randn(W.shape) for n, W in base.items()})
    pair = pair_of(comparison)
    assert [(d, n) for d, _, n in pair.chance_levels("left")] == [(32, 1)]
    assert [(d, n) for d, _, n in pair.chance_levels("right")] == [(40, 2)]


def test_representatives_have_the_extreme_ratios(comparisons: Callable[[str], Comparison]) -> None:
    comparison = comparisons("two_pairs")
    pair = pair_of(comparison)
    frame = frame_of(comparison, pair.label, "singular_value_ratio")
    leading = frame[frame["index"] == 0].set_index("matrix")["value"]
    assert [pair.matrices["name"][m] for m in pair.representatives()] == [leading.idxmin(), leading.idxmax()]
    assert pair_of(comparisons("identical")).representatives() == [0]
