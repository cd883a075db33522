"""The layer: bit-equality at zero, kinds of layers, merging, precision, and the tools of torch around it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from specbasis.adapter import SpectralLinear
from specbasis.core.errors import InputError
from tests.adapter.helpers import linear, matrix, randomise, transcription

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def conv1d(out: int, in_: int) -> nn.Module:
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(out, in_)
    with torch.no_grad():
        layer.weight.copy_(matrix(out, in_).mT)
        layer.bias.normal_()
    return layer


def conv2d(out: int, in_: int, **options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(in_, out, 3, **options)


LAYERS = {
    "linear": (lambda: linear(12, 20), lambda: torch.randn(4, 5, 20)),
    "tall": (lambda: linear(20, 12), lambda: torch.randn(4, 5, 12)),
    "square": (lambda: linear(16, 16), lambda: torch.randn(40, 16)),
    "no bias": (lambda: nn.Linear(20, 12, bias=False), lambda: torch.randn(3, 20)),
    "conv1d": (lambda: conv1d(12, 20), lambda: torch.randn(4, 5, 20)),
    "conv1d wide": (lambda: conv1d(48, 16), lambda: torch.randn(4, 5, 16)),
    "conv2d": (lambda: conv2d(8, 4, padding=1, stride=2), lambda: torch.randn(2, 4, 9, 9)),
    "conv2d reflect": (lambda: conv2d(8, 4, padding=1, padding_mode="reflect"), lambda: torch.randn(2, 4, 9, 9)),
    "conv2d groups": (lambda: conv2d(8, 4, groups=2, dilation=2), lambda: torch.randn(2, 4, 9, 9)),
    "conv2d depthwise": (lambda: conv2d(8, 8, groups=8, padding=1), lambda: torch.randn(2, 8, 9, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("gradient", [True, False])
def test_zero_is_bit_equal(kind, gradient):
    base, x = LAYERS[kind][0](), LAYERS[kind][1]()
    x.requires_grad_(gradient)
    wanted = base(x)
    layer = SpectralLinear(base, interval=(1, 6))
    assert torch.equal(layer(x), wanted)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)


@given(
    tokens=st.integers(1, 300), out=st.integers(2, 40), in_=st.integers(2, 40), bits=st.sampled_from([16, 32, 64])
)
@settings(max_examples=40, deadline=None)
def test_zero_is_bit_equal_for_any_size(tokens, out, in_, bits):
    dtype = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}[bits]
    base = nn.Linear(in_, out, dtype=dtype)
    x = torch.randn(tokens, in_, dtype=dtype)
    wanted = base(x)
    assert torch.equal(SpectralLinear(base, interval=(0, min(out, in_)))(x), wanted)


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_is_factored_and_unmerging_restores_the_bits(kind):
    base, x = LAYERS[kind][0](), LAYERS[kind][1]()
    original, object_before = base.weight.detach().clone(), base.weight
    layer = SpectralLinear(base, interval=(1, 6))
    randomise(nn.ModuleDict({"x": layer}))
    wanted = layer(x)
    assert not torch.allclose(wanted, base(x))
    layer.merge(safe_merge=True)
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert torch.allclose(base(x), wanted, atol=1e-5)
    layer.unmerge()
    assert base.weight is object_before
    assert torch.equal(base.weight, original)
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_of_the_core_is_that_of_the_dense_weight(kind):
    base, x = LAYERS[kind][0]().double(), LAYERS[kind][1]().double()
    layer = SpectralLinear(base, interval=(0, 5))
    for frozen in (layer.spectral_U, layer.spectral_Vh, layer.spectral_S):
        frozen.put("default", frozen["default"].double())
    layer.spectral_M["default"] = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
    layer(x).square().sum().backward()
    weight = layer.stored_weight()
    M = layer.spectral_M["default"].detach().clone().requires_grad_()
    update = layer.layout.stored(layer.spectral_U["default"] @ M @ layer.spectral_Vh["default"], base)
    dense = torch.func.functional_call(base, {"weight": weight + update}, (x,))
    (wanted,) = torch.autograd.grad(dense.square().sum(), M)
    # The factors hold float32 values: routes through W V = U S differ by their rounding.
    got = layer.spectral_M["default"].grad
    assert (got - wanted).norm() <= 32 * torch.finfo(torch.float32).eps * wanted.norm()


def test_the_equation_as_printed():
    base = linear(14, 10)
    layer = SpectralLinear(base, interval=(2, 7))
    randomise(nn.ModuleDict({"x": layer}))
    M = layer.spectral_M["default"].detach()
    W = base.weight.detach()
    U = torch.linalg.svd(W.double(), full_matrices=False)[0][:, 2:7]
    signs = torch.sign((U * layer.spectral_U["default"].double()).sum(0)).float()
    wanted = transcription(W, signs[:, None] * M * signs, 2, 7)
    assert torch.allclose(layer.merged_weight(["default"]).double(), wanted, atol=1e-6)


def test_a_tied_weight_is_merged_in_one_place_only():
    embedding = nn.Embedding(12, 20)
    head = nn.Linear(20, 12, bias=False)
    head.weight = embedding.weight
    before = embedding.weight.detach().clone()
    layer = SpectralLinear(head, interval=(0, 5))
    randomise(nn.ModuleDict({"x": layer}))
    layer.merge()
    assert torch.equal(embedding.weight, before)
    assert not torch.equal(head.weight, before)
    layer.unmerge()
    assert head.weight is embedding.weight


def test_merging_and_moving_and_unmerging():
    base = linear(12, 20)
    layer = SpectralLinear(base, interval=(0, 5))
    randomise(nn.ModuleDict({"x": layer}))
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(base.weight, linear(12, 20).weight.to(torch.bfloat16))


def test_unsafe_sum_is_refused_and_changes_nothing():
    base = linear(12, 20)
    layer = SpectralLinear(base, interval=(0, 5))
    layer.spectral_M["default"].data.fill_(float("nan"))
    before = base.weight
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert base.weight is before
    assert not layer.merged


@pytest.mark.parametrize("interval", [(0, 13), (5, 5), (-1, 3), (6, 2), (0, 300), "ab", (1, 2, 3)])
def test_intervals_that_do_not_fit(interval):
    with pytest.raises(InputError, match=r"layer: got interval"):
        SpectralLinear(linear(12, 20), interval=interval)


def test_other_layers_are_refused():
    with pytest.raises(InputError, match="got a LayerNorm"):
        SpectralLinear(nn.LayerNorm(4), interval=(0, 1))


def test_half_and_to_keep_the_basis_and_the_core():
    layer = SpectralLinear(linear(12, 20), interval=(0, 5))
    randomise(nn.ModuleDict({"x": layer}))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if "spectral" in name}
    layer.half()
    for name, tensor in before.items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    assert layer.base_layer.weight.dtype == torch.float16
    assert layer(torch.randn(3, 20, dtype=torch.float16)).dtype == torch.float16


def test_shared_factors_stay_shared():
    layer = SpectralLinear(linear(12, 20), interval=(0, 5))
    layer.add("second", (0, 5))
    assert layer.spectral_U["second"].data_ptr() == layer.spectral_U["default"].data_ptr()
    layer.to("cpu")
    layer.to(torch.float64)
    copied = copy.deepcopy(layer)
    for each in (layer, copied):
        assert each.spectral_Vh["second"].data_ptr() == each.spectral_Vh["default"].data_ptr()


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_a_whole_layer_is_saved_and_read(kind):
    layer = SpectralLinear(LAYERS[kind][0](), interval=(1, 6))
    randomise(nn.ModuleDict({"x": layer}))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = LAYERS[kind][1]()
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_several_active_adapters_add():
    base = linear(12, 20)
    x = torch.randn(6, 20)
    layer = SpectralLinear(base, interval=(0, 5))
    layer.add("second", (3, 9))
    randomise(nn.ModuleDict({"x": layer}))
    layer._active_adapter = ["default", "second"]
    wanted = base(x) + x @ (layer.get_delta_weight("default") + layer.get_delta_weight("second")).mT
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    layer.merge()
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_mixed_batch_is_each_adapter_alone():
    base = linear(12, 20)
    layer = SpectralLinear(base, interval=(0, 5))
    layer.add("b", (0, 5))
    layer.add("c", (2, 8))
    randomise(nn.ModuleDict({"x": layer}))
    x = torch.randn(5, 3, 20)
    names = ["default", "c", "__base__", "b", "default"]
    mixed = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        layer._active_adapter = [] if name == "__base__" else [name]
        assert torch.allclose(mixed[row], layer(x[row : row + 1])[0], atol=1e-5), name
    with pytest.raises(ValueError, match="same as the number of inputs"):
        layer(x, adapter_names=["b"])


def test_mixed_batch_projects_once_for_a_shared_basis(monkeypatch):
    layer = SpectralLinear(linear(12, 20), interval=(0, 5))
    layer.add("b", (0, 5))
    calls = []
    project = layer._project
    monkeypatch.setattr(layer, "_project", lambda x, name: calls.append(name) or project(x, name))
    layer(torch.randn(4, 20), adapter_names=["default", "b", "b", "default"])
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    base = linear(12, 20)
    layer = SpectralLinear(base, interval=(0, 5))
    randomise(nn.ModuleDict({"x": layer}))
    x = torch.randn(6, 20)
    wanted = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == dtype
    assert layer.spectral_M["default"].grad.dtype == torch.float32
    assert torch.allclose(y.float(), wanted, rtol=0.05, atol=0.05)


def test_gradient_checkpointing_gives_the_same_gradient():
    layer = SpectralLinear(linear(12, 20), interval=(0, 5))
    randomise(nn.ModuleDict({"x": layer}))
    x = torch.randn(6, 20, requires_grad=True)
    grads = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append(layer.spectral_M["default"].grad.clone())
    assert torch.equal(*grads)


@pytest.mark.skipif(TORCH < (2, 7), reason="its compiler does not know `vars`, and fails for sizes that vary")
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_compiles_without_graph_breaks(shape):
    layer = SpectralLinear(linear(*shape), interval=(0, 5))
    randomise(nn.ModuleDict({"x": layer}))
    x = torch.randn(200, shape[1], requires_grad=True)
    wanted = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.allclose(y, wanted, atol=1e-5)
    y.square().sum().backward()
    got = layer.spectral_M["default"].grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert torch.allclose(got, layer.spectral_M["default"].grad, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_update_alone_and_not_in_evaluation():
    base = linear(12, 20)
    layer = SpectralLinear(base, interval=(0, 5), dropout=0.5)
    x = torch.randn(6, 20)
    assert torch.equal(layer(x), base(x))
    randomise(nn.ModuleDict({"x": layer}))
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_changed_base_weight_is_used_and_not_the_decomposed_one():
    """Routes that rely on W V = U S must notice that W is no longer the weight that was decomposed."""
    base = linear(12, 20)
    layer = SpectralLinear(base, interval=(0, 5))
    randomise(nn.ModuleDict({"x": layer}))
    x = torch.randn(6, 20)
    assert layer._route(x, "default") in ("inner", "outer")
    with torch.no_grad():
        base.weight.copy_(matrix(12, 20, seed=9))
    wanted = base(x) + x @ layer.get_delta_weight("default").mT
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_a_trained_base_weight_gets_its_gradient():
    base = linear(12, 20)
    layer = SpectralLinear(base, interval=(0, 5))
    base.weight.requires_grad_()
    layer(torch.randn(6, 20)).sum().backward()
    assert base.weight.grad is not None


def test_sigma_scale_is_in_units_of_the_singular_values():
    base = linear(12, 20)
    plain, scaled = SpectralLinear(base, interval=(2, 7)), SpectralLinear(base, interval=(2, 7), scale="sigma")
    M = torch.randn(5, 5)
    scaled.spectral_M["default"].data.copy_(M)
    plain.spectral_M["default"].data.copy_(torch.diag(scaled.spectral_S["default"]) @ M)
    x = torch.randn(6, 20)
    assert torch.allclose(plain(x), scaled(x), atol=1e-5)


def test_random_basis_is_orthonormal_reproducible_and_not_the_pretrained():
    one = SpectralLinear(linear(12, 20), interval=(0, 5), basis="random")
    other = SpectralLinear(linear(12, 20, seed=4), interval=(0, 5), basis="random")
    U = one.spectral_U["default"]
    assert torch.allclose(U.mT @ U, torch.eye(5), atol=1e-6)
    assert torch.equal(U, other.spectral_U["default"])
    pretrained = SpectralLinear(linear(12, 20), interval=(0, 5)).spectral_U["default"]
    assert float((U * pretrained).sum(0).abs().max()) < 0.99


def test_full_rank_adapter_can_reach_any_weight():
    base = linear(8, 8)
    target = matrix(8, 8, seed=3)
    layer = SpectralLinear(base, interval=(0, 8))
    delta = target - base.weight.detach().double()
    layer.spectral_M["default"].data.copy_(
        layer.spectral_U["default"].double().mT @ delta @ layer.spectral_Vh["default"].double().mT
    )
    assert torch.allclose(layer.merged_weight(["default"]).double(), target, atol=1e-5)
