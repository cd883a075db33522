"""Layers whose parent reads their weight are refused by name and left out of "all-linear"."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

from peft import get_peft_model  # noqa: E402

from specbasis.adapter import SpectralConfig  # noqa: E402
from specbasis.adapter.inert import is_inert  # noqa: E402
from specbasis.core.errors import InputError  # noqa: E402
from tests.adapter.helpers import randomise  # noqa: E402


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(OrderedDict(first=nn.Linear(16, 16), encoder=nn.TransformerEncoder(layer, 1)))


class Multiplies(nn.Module):
    """Reads the weight of ``inner``; calls ``outer`` after a look at its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        if isinstance(self.outer.weight, torch.Tensor) and x.dtype != self.outer.weight.dtype:
            x = x.to(self.outer.weight.dtype)
        return self.outer(x @ self.inner.weight.T)


class Derived(Multiplies):
    """Inherits what its parent does."""


def mamba(kind: str) -> nn.Module:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20, "state_size": 4}
    if kind == "Mamba2":
        shape |= {"num_heads": 4, "head_dim": 8, "n_groups": 1}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape))


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (encoder, "linear1"),
        (encoder, "linear2"),
        (encoder, "out_proj"),
        (Multiplies, "inner"),
        (Derived, "inner"),
        (lambda: mamba("Mamba"), "out_proj"),
        (lambda: mamba("Mamba"), "x_proj"),
        (lambda: mamba("Mamba"), "dt_proj"),
        (lambda: mamba("Mamba2"), "out_proj"),
    ],
)
def test_a_layer_that_would_not_act_is_refused_and_left_out_of_all_linear(model, target):
    with pytest.raises(InputError, match=rf"{target}: \w+ reads the weight of {target} .*leave it out"):
        get_peft_model(model(), SpectralConfig(rank=4, target_modules=[target]))
    with pytest.warns(UserWarning, match="all-linear leaves out"):
        adapted = get_peft_model(model(), SpectralConfig(rank=1, target_modules="all-linear"))
    names = set(adapted.base_model.spectral_layers())
    assert names
    assert not any(name.endswith(target) for name in names)


def test_what_is_adapted_of_all_linear_acts_in_evaluation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(encoder(), SpectralConfig(rank=4, target_modules="all-linear")).eval()
    x = torch.randn(4, 3, 16)
    with torch.no_grad():
        before = model(x)
        randomise(model)
        assert not torch.allclose(model(x), before)
        assert torch.allclose(model.train()(x), model.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["Llama", "Bert", "GPT2", "T5", "Bloom", "DebertaV2", "ViT", "MT5", "OPT", "Mixtral", "Qwen3"]
)
def test_no_layer_of_ordinary_models_is_taken_for_one(name):
    model = getattr(transformers, f"{name}Model")
    with torch.device("meta"):
        model = model(model.config_class(**({"num_hidden_layers": 1} if name != "Bloom" else {"n_layer": 1})))
    for parent in model.modules():
        for child, layer in parent.named_children():
            assert not (isinstance(layer, nn.Linear) and is_inert(parent, child)), (
                f"{type(parent).__name__}.{child}"
            )
