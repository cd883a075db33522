"""Intruders against their definition and PEFT's own code."""

import pytest
import torch

from specbasis import decompose
from specbasis.core.intruders import intruder_cosine, intruders
from specbasis.core.svd import half_svd
from tests.helpers.matrices import gaussian, with_spectrum


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


def test_intruders_by_the_definition():
    base = torch.eye(4, dtype=torch.float64)
    tuned = torch.stack([torch.ones(4) / 2, torch.tensor([0.9, 0.436, 0.0, 0.0])], dim=1)
    assert intruders(base, tuned, threshold=0.6) == [0]
    assert intruders(base, tuned, threshold=0.5) == []
