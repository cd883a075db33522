"""Degenerate groups, matching and intruders against constructed cases and PEFT's own code."""

import pytest
import torch

from specbasis import decompose
from specbasis.core.groups import (
    degenerate_groups,
    group_alignment,
    intruder_cosine,
    matched_chance,
    matching,
)
from specbasis.core.svd import half_svd
from tests.helpers.matrices import gaussian, orthonormal, with_spectrum


def test_groups_are_chains_of_ranks_closer_than_the_noise():
    S = torch.tensor([5.0, 3.01, 3.0, 2.99, 2.0, 1.0]).double()
    assert degenerate_groups(S, 0.01**2, 6).tolist() == [0, 1, 1, 1, 4, 5]
    assert degenerate_groups(S, 1e-8, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert degenerate_groups(S, 1.0, 2).tolist() == [0, 1]


def test_a_group_that_turned_inside_of_itself_is_aligned_as_a_subspace():
    U = orthonormal(20, 6, 1)
    R = torch.block_diag(torch.eye(1), orthonormal(3, 3, 2), torch.eye(2)).double()
    C = U.mT @ (U @ R)
    first = torch.tensor([0, 1, 1, 1, 4, 5])
    assert float(C.diagonal()[1:4].abs().min()) < 0.9
    starts, alignments, sizes = group_alignment(C, first)
    assert (starts, sizes) == ([1], [3])
    assert alignments[0] == pytest.approx(1)


def test_matching_finds_a_permutation_inside_of_its_band_and_no_further():
    order = torch.tensor([1, 0, 2, 4, 3])
    C = torch.eye(5).double()[:, order]
    assert matching(C, C).tolist() == order.argsort().tolist()
    far = torch.eye(5).double()[:, torch.tensor([4, 1, 2, 3, 0])]
    assert (matching(far, far, band=2) - torch.arange(5)).abs().max() <= 2
    k, d = 12, 40
    (left, error), _ = matched_chance(k, d, d)
    plain = gaussian(k, k, 7).abs().mean() / d**0.5
    assert left > float(plain)  # choosing the best is more than chance at equal rank
    assert 0 < error < 0.1 * left


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_intruders_are_those_of_peft(shape):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(shape[1], shape[0], bias=False)

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    W = with_spectrum(torch.linspace(2, 0.2, 20), *shape, seed=2).float()
    model = Model()
    model.layer.weight.data = W.clone()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["layer"], lora_alpha=3))
    layer = tuned.base_model.model.layer
    layer.lora_A["default"].weight.data = gaussian(3, shape[1], 5).float()
    layer.lora_B["default"].weight.data = 0.6 * gaussian(shape[0], 3, 6).float()
    T = W + layer.get_delta_weight("default").detach()
    said: list[str] = []
    reduce_intruder_dimension(tuned, logging_sink=said.append)
    base, t = half_svd(W, 10, every=True), half_svd(T, 10)
    for side in ("left", "right"):
        whole = (decompose(T).vectors(side, 10).mT @ decompose(W).vectors(side)).abs().amax(1)
        assert torch.allclose(intruder_cosine(base, t, side, 10), whole, atol=1e-9)
    count = int((intruder_cosine(base, t, "left", 10) < 0.5).sum())
    assert count > 0
    assert said[0].endswith(f"Intruders: {count}")
