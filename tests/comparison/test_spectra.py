"""Spectra of one model: closed forms, planted tails, and powerlaw itself."""

import math

import numpy as np
import pytest
import torch

from specbasis import open_checkpoint
from specbasis.comparison.spectra import marchenko_pastur_edge, spectra, spectrum
from tests.helpers.matrices import gaussian, with_spectrum


@pytest.mark.parametrize("alpha", [2.5, 4.5])
def test_a_planted_power_law_is_found(alpha):
    n = 2000
    u = (np.arange(n) + 0.5) / n
    squares = torch.from_numpy((1 - u) ** (-1 / (alpha - 1))).sort(descending=True).values
    found = spectrum(squares.sqrt(), (n, n), 1.0)
    assert found.alpha == pytest.approx(alpha, abs=0.2)
    assert found.alpha_error == pytest.approx((found.alpha - 1) / math.sqrt(found.tail))
    assert found.alpha_weighted == pytest.approx(found.alpha * math.log10(float(squares[0])))
    assert found.log_alpha_norm == pytest.approx(math.log10(float((squares**found.alpha).sum())), rel=1e-9)
    assert found.log_norm == pytest.approx(math.log10(float(squares.sum())))


def test_the_edge_holds_the_bulk_and_lets_planted_directions_out():
    W = gaussian(300, 200, 1)
    S = torch.linalg.svdvals(W)
    edge = marchenko_pastur_edge(1.0, (300, 200))
    assert float(S[0] ** 2) == pytest.approx(edge, rel=0.1)  # Tracy and Widom: ± 4 standard deviations
    spiked = W + with_spectrum([90.0, 80.0, 70.0], 300, 200, seed=3)
    assert spectrum(torch.linalg.svdvals(spiked), (300, 200), float(spiked.var())).spikes == 3


def test_every_matrix_of_a_model_and_what_has_no_tail():
    state = {"a.weight": gaussian(30, 40, 1).float(), "b.weight": torch.zeros(20, 20), "c.weight": torch.eye(4)}
    found = {key.name: s for key, _, s in spectra(open_checkpoint(state))}
    assert found["a.weight"].stable_rank == pytest.approx(
        float(state["a.weight"].norm() ** 2 / torch.linalg.matrix_norm(state["a.weight"], 2) ** 2), rel=1e-5
    )
    assert math.isnan(found["b.weight"].alpha)
    assert found["b.weight"].spikes == 0
    assert math.isnan(found["c.weight"].alpha)
    assert found["c.weight"].entropy == pytest.approx(1)
