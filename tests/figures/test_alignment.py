"""Figures of alignment: what their axis can tell apart."""

from __future__ import annotations

import numpy as np
import pytest

import specbasis
from specbasis.figures.alignment import alignment_by_rank, subspace_overlap
from specbasis.figures.data import read_pairs
from tests.pico import bert_state, finetuned

BASE = bert_state(width=24)


@pytest.mark.parametrize(("size", "scale"), [(1e-5, "function"), (1.0, "linear")])
def test_what_is_all_kept_is_drawn_by_what_is_lost(size: float, scale: str) -> None:
    pairs = read_pairs(specbasis.compare(BASE, finetuned(BASE, size)))
    for draw in (alignment_by_rank, subspace_overlap):
        for ax in draw(pairs).axes:
            assert ax.get_yscale() == scale
            if scale == "function":  # each nine is a step of its own, of one height
                heights = ax.transData.transform([(1, tick) for tick in ax.get_yticks()])[:, 1]
                assert np.allclose(np.diff(heights), np.diff(heights)[0])
                assert [label.get_text() for label in ax.get_yticklabels()][:3] == ["0", "0.9", "0.99"]
