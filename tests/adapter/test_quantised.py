"""Quantised bases: the adapter runs, merges with a warning, and unmerges to the very bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", minversion="0.21")

from peft import PeftModel, get_peft_model  # noqa: E402

from specbasis.adapter import SpectralConfig  # noqa: E402
from specbasis.core.errors import InputError  # noqa: E402
from tests.adapter.helpers import linear, randomise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def bnb_8bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(linear(64, 64).state_dict())
    return nn.Sequential(layer.to("cpu")).eval()


def bnb_4bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    layer.load_state_dict(linear(64, 64).state_dict())
    model = nn.Sequential(layer.to("cpu")).eval()
    model(torch.randn(2, 64))  # evaluation packs the weight for the CPU
    return model


def torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    options = type("Options", (), {"get_apply_tensor_subclass": staticmethod(quantization.Int8WeightOnlyConfig)})
    model.hf_quantizer = type("Quantizer", (), {"quantization_config": options})
    return model.eval()


def test_a_base_that_quantize_has_quantised_is_adapted_and_not_merged(tmp_path):
    """torchao's ``quantize_`` leaves no recipe on the model."""
    model = torchao()
    del model.hf_quantizer
    model = get_peft_model(model, SpectralConfig(rank=8, target_modules=["0"])).eval()
    randomise(model)
    x = torch.randn(8, 64)
    with torch.no_grad():
        changed = model(x)
        layer = model.base_model.model[0]
        wanted = x @ (layer.weight_matrix() + layer.get_delta_weight("default")).mT + layer.base_layer.bias
        assert torch.allclose(changed, wanted, atol=1e-3)
        with pytest.raises(InputError, match="merge into the unquantised base"):
            model.merge_adapter()
        assert torch.equal(model(x), changed)


@pytest.mark.parametrize("make", [bnb_8bit, bnb_4bit, torchao])
def test_quantised_base(make, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    with torch.no_grad():
        wanted = make()(x)
        model = get_peft_model(make(), SpectralConfig(rank=8, target_modules=["0"])).eval()
        layer = model.base_model.model[0]
        assert torch.equal(model(x), layer.base_layer(x))
        assert torch.allclose(model(x), wanted, atol=0.05)  # unpacking and packing 4 bits rounds their scales
        W = linear(64, 64).weight
        U, S, Vh = layer.spectral_U["default"], layer.spectral_S["default"], layer.spectral_Vh["default"]
        rounding = layer.weight_matrix() - W
        assert rounding.norm() < 0.15 * W.norm()
        # (W + rounding) v = σ u: the basis is that of the weight, up to its rounding.
        assert (W @ Vh.mT - U * S).norm(dim=0).max() <= 1.01 * torch.linalg.matrix_norm(rounding, 2)
        randomise(model)
        changed = model(x)
        assert not torch.allclose(changed, wanted, atol=1e-2)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(), tmp_path)
        assert torch.equal(
            loaded.base_model.model[0].get_delta_weight("default"), layer.get_delta_weight("default")
        )
        assert torch.allclose(loaded(x), changed, atol=0.05)
        changed = model(x)
        with pytest.warns(UserWarning, match="quantised again"):
            model.merge_adapter()
        assert (model(x) - changed).norm() < 0.15 * changed.norm()
        model.unmerge_adapter()
        assert torch.equal(model(x), changed)
