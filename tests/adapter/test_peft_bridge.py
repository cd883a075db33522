"""The method inside PEFT and transformers: the checks that PEFT makes of every method, re-created here."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model, inject_adapter_in_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from specbasis.adapter import (  # noqa: E402
    SpectralConfig,
    parameter_counts,
    peft_bridge,
    peft_resolve,
)
from specbasis.core.errors import InputError  # noqa: E402
from tests.adapter.helpers import TARGETS, linear, load_classifier, randomise, save_deberta  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_deberta(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


IDS = torch.arange(48).reshape(4, 12)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = linear(20, 10, seed=1)
        self.relu = nn.ReLU()
        self.lin1 = linear(4, 20, seed=2)

    def forward(self, x, adapter_names=None):
        return self.lin1(self.relu(self.lin0(x)))


def mlp() -> Mlp:
    torch.manual_seed(3)
    return Mlp().eval()


X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


def adapted(**options) -> PeftModel:
    model = get_peft_model(mlp(), SpectralConfig(**{"rank": 4, "target_modules": ["lin0"], **options}))
    randomise(model)
    return model.eval()


CASES = {
    "plain": {},
    "both layers": {"target_modules": ["lin0", "lin1"]},
    "regex": {"target_modules": "lin[01]"},
    "all-linear": {"target_modules": "all-linear"},
    "interval": {"rank": None, "interval": (2, 6)},
    "sigma": {"scale": "sigma"},
    "random": {"basis": "random"},
    "no basis": {"save_basis": False},
    "pattern": {"target_modules": ["lin0", "lin1"], "interval_pattern": {"lin1": (1, 3)}},
    "modules_to_save": {"modules_to_save": ["lin1"]},
    "parameters": {"shard_basis": True},
    "band": {"pattern": "band:1", "target_modules": ["lin0", "lin1"]},
    "scattered": {"pattern": {"lin0": "scattered:5"}, "target_modules": ["lin0", "lin1"], "save_basis": False},
}


@pytest.mark.parametrize("case", CASES)
def test_starts_bit_equal_and_changes_when_trained(case):
    wanted = mlp()(X)
    model = get_peft_model(mlp(), SpectralConfig(**{"rank": 4, "target_modules": ["lin0"], **CASES[case]})).eval()
    assert torch.equal(model(X), wanted)
    randomise(model)
    assert not torch.allclose(model(X), wanted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(case, low_cpu_mem_usage, tmp_path):
    model = adapted(**CASES[case])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(X), model(X))
    assert not any(p.requires_grad for p in loaded.parameters())
    for parameter in loaded.parameters():
        assert parameter.device.type == "cpu"
    trainable = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    assert parameter_counts(trainable).adapter > 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(case, safe_merge):
    model = adapted(**CASES[case])
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = model(X)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.allclose(model(X), wanted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(X), wanted)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert torch.allclose(merged(X), wanted, atol=1e-5)
    assert type(merged.lin0) is nn.Linear


def test_what_a_merged_adapter_saves_is_the_adapter():
    model = adapted()
    before = peft.get_peft_model_state_dict(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    model.merge_adapter()
    after = peft.get_peft_model_state_dict(model)
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_merged_model_is_an_ordinary_one(tmp_path):
    model = adapted()
    wanted = model(X)
    torch.save(model.merge_and_unload().state_dict(), tmp_path / "m.pt")
    plain = mlp()
    plain.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.allclose(plain(X), wanted, atol=1e-5)


def test_unload_returns_the_base():
    assert torch.equal(adapted().unload()(X), mlp()(X))


def test_disable_adapter():
    model = adapted()
    wanted = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), mlp()(X))
    assert torch.equal(model(X), wanted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), mlp()(X))


def test_several_adapters(tmp_path):
    model = adapted()
    first = model(X)
    with pytest.raises(InputError, match="lin1: got interval"):
        model.add_adapter("other", SpectralConfig(rank=6, target_modules=["lin0", "lin1"]))
    assert not any("other" in name for name in model.state_dict())
    assert type(model.base_model.model.lin1) is nn.Linear
    model.add_adapter(
        "other", SpectralConfig(rank=6, target_modules=["lin0", "lin1"], interval_pattern={"lin1": (0, 3)})
    )
    assert torch.equal(model(X), first)
    assert parameter_counts(model).adapter == 16
    model.set_adapter("other")
    assert torch.equal(model(X), mlp()(X))
    randomise(model, seed=9, adapter="other")
    second = model(X)
    assert not torch.allclose(first, second)
    assert parameter_counts(model).adapter == 36 + 9
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(loaded(X), first)
    loaded.set_adapter("other")
    assert torch.equal(loaded(X), second)
    loaded.delete_adapter("other")
    assert loaded.active_adapters == ["default"]
    assert torch.equal(loaded(X), first)
    assert not any("other" in name for name in loaded.state_dict())
    loaded.delete_adapter("default")
    assert torch.equal(loaded.base_model.model(X), mlp()(X))


@pytest.mark.parametrize("name", ["half", "a.b", "keys"])
def test_a_name_that_torch_cannot_hold_is_refused_and_leaves_no_trace(name):
    model = adapted()
    wanted = model(X)
    with pytest.raises(InputError, match=f"adapter name '{name}'"):
        model.add_adapter(name, SpectralConfig(rank=2, target_modules=["lin0", "lin1"]))
    assert torch.equal(model(X), wanted)
    assert type(model.base_model.model.lin1) is nn.Linear


def test_reloading_under_another_name_and_into_a_folder_that_exists(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, adapter_name="mine")
    assert torch.equal(loaded(X), model(X))


def test_mixed_batch_in_a_model():
    model = adapted()
    for seed, name in enumerate(("b", "c")):
        model.add_adapter(name, SpectralConfig(rank=4, target_modules=["lin0"]))
        randomise(model, seed=seed + 5, adapter=name)
    names = ["default", "b", "c", "__base__", "b"]
    mixed = model(X, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            wanted = mlp()(X)[row]
        else:
            model.set_adapter(name)
            wanted = model(X)[row]
        assert torch.allclose(mixed[row], wanted, atol=1e-6), name
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(X, adapter_names=["default", "b", "c", "x", "b"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(X, adapter_names=names)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(X, adapter_names=names)


def test_weighted_sum_is_exact():
    model = adapted()
    model.add_adapter(
        "wide", SpectralConfig(interval=(2, 8), target_modules=["lin0", "lin1"], interval_pattern={"lin1": (0, 3)})
    )
    randomise(model, seed=4, adapter="wide")
    model.add_weighted_adapter(["default", "wide"], [0.5, -2.0], "sum")
    layer = model.base_model.model.lin0
    wanted = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("wide")
    assert layer.adapters["sum"].interval == (0, 8)
    assert torch.allclose(layer.get_delta_weight("sum"), wanted, atol=1e-6)
    other = model.base_model.model.lin1
    assert torch.allclose(other.get_delta_weight("sum"), -2 * other.get_delta_weight("wide"), atol=1e-6)
    with pytest.raises(InputError, match="combination_type"):
        model.add_weighted_adapter(["default"], [1.0], "x", combination_type="svd")
    model.add_adapter("random", SpectralConfig(rank=4, basis="random", target_modules=["lin0"]))
    with pytest.raises(InputError, match="different bases"):
        model.add_weighted_adapter(["default", "random"], [1.0, 1.0], "x")


def test_weighted_sum_of_a_loaded_and_a_new_adapter(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    loaded.add_weighted_adapter(["default"], [3.0], "triple")
    layer = loaded.base_model.model.lin0
    assert torch.allclose(layer.get_delta_weight("triple"), 3 * layer.get_delta_weight("default"), atol=1e-6)


@pytest.mark.parametrize("first", [["lin0"], "all-linear"])
def test_a_second_adapter_on_all_linear_has_the_layers_of_the_first(first):
    model = adapted(target_modules=first)
    model.add_adapter("second", SpectralConfig(rank=3, target_modules="all-linear"))
    assert [name for name, m in model.base_model.spectral_layers().items() if "second" in m.adapters] == [
        "lin0",
        "lin1",
    ]


def test_all_linear_leaves_convolutions_of_an_earlier_adapter_alone():
    net = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, 6))
    model = get_peft_model(net, SpectralConfig(rank=3, target_modules=["0", "2"]))
    model.add_adapter("second", SpectralConfig(rank=3, target_modules="all-linear"))
    assert [name for name, m in model.base_model.spectral_layers().items() if "second" in m.adapters] == ["2"]


def test_layers_have_the_sizes_that_pefts_have():
    for net, target in ((nn.Linear(5, 7), "0"), (nn.Conv2d(4, 6, 3, groups=2), "0")):
        kinds = [
            get_peft_model(nn.Sequential(copy.deepcopy(net)), kind(target_modules=[target], **size))
            for kind, size in ((SpectralConfig, {"rank": 2}), (peft.LoraConfig, {"r": 2}))
        ]
        ours, theirs = (model.base_model.model[0] for model in kinds)
        assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
        assert ours.weight is ours.base_layer.weight


def test_the_default_is_all_ranks_of_a_layer_with_fewer_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"2 of 2 layers have fewer than the default of 300 .*smallest: lin1, 4\)"):
        model = get_peft_model(mlp(), SpectralConfig(target_modules="all-linear")).eval()
    randomise(model)
    layers = model.base_model.spectral_layers()
    assert {name: layer.adapters["default"].interval for name, layer in layers.items()} == {
        "lin0": (0, 10),
        "lin1": (0, 4),
    }
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path)(X), model(X))


def test_layers_to_transform_are_blocks():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"lin": linear(6, 6)}) for _ in range(3))

    for options in ({"layers_to_transform": [0, 2]}, {"blocks_to_transform": [0, 2]}):
        config = SpectralConfig(rank=2, target_modules=["lin"], **options)
        assert config.layers_to_transform == config.blocks_to_transform == [0, 2]
        assert sorted(get_peft_model(nn.Sequential(Deep()), config).base_model.spectral_layers()) == [
            "0.layers.0.lin",
            "0.layers.2.lin",
        ]
    with pytest.raises(InputError, match="want one of the two"):
        SpectralConfig(layers_to_transform=[0], blocks_to_transform=[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_in_the_dtype_of_the_base_on_request(dtype, tmp_path):
    config = SpectralConfig(rank=3, target_modules=["lin0"])
    wide = get_peft_model(mlp().to(dtype), config)
    assert wide.base_model.model.lin0.spectral_M["default"].dtype == torch.float32
    narrow = get_peft_model(mlp().to(dtype), config, autocast_adapter_dtype=False).eval()
    M = narrow.base_model.model.lin0.spectral_M["default"]
    assert M.dtype == dtype
    assert M.requires_grad
    assert narrow.base_model.model.lin0.spectral_U["default"].dtype == torch.float32
    randomise(narrow)
    wanted = narrow(X.to(dtype))
    with torch.enable_grad():
        narrow(X.to(dtype)).float().square().sum().backward()
    assert M.grad.dtype == dtype
    assert M.grad.abs().max() > 0
    narrow.save_pretrained(tmp_path)
    for cast, low_cpu_mem_usage in ((True, False), (True, True), (False, False), (False, True)):
        options = {"autocast_adapter_dtype": cast, "low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(mlp().to(dtype), tmp_path, **options)
        assert loaded.base_model.model.lin0.spectral_M["default"].dtype == (torch.float32 if cast else dtype)
        assert torch.equal(loaded(X.to(dtype)), wanted)


@pytest.mark.parametrize("save_basis", [True, False])
def test_injected_on_meta_and_filled_from_a_state_dict(save_basis):
    model = adapted(save_basis=save_basis)
    state = peft.get_peft_model_state_dict(model)
    config = SpectralConfig(rank=4, target_modules=["lin0"], save_basis=save_basis)
    fresh = inject_adapter_in_model(config, mlp(), low_cpu_mem_usage=True)
    assert fresh.lin0.spectral_M["default"].is_meta
    peft.set_peft_model_state_dict(fresh, state, low_cpu_mem_usage=True)
    assert fresh.lin0.adapters["default"].settled
    assert torch.equal(fresh(X), model(X))


ORDERS = [("spectral", "lora"), ("lora", "spectral")]


def both(order, wrap):
    """A spectral and a LoRA adapter over the same layers, with random coefficients, by name."""
    configs = {
        "spectral": SpectralConfig(target_modules=["lin0", "lin1"], rank=4),
        "lora": peft.LoraConfig(target_modules=["lin0", "lin1"], r=2, init_lora_weights=False),
    }
    return wrap(mlp(), [(name, configs[name]) for name in order])


def mixed_model(net, configs):
    (name, config), (second, other) = configs
    model = get_peft_model(net, config, adapter_name=name, mixed=True)
    model.add_adapter(second, other)
    return model


def nested(net, configs):
    for name, config in configs:
        net = inject_adapter_in_model(config, net, name)
    return net


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrap", [mixed_model, nested])
def test_beside_an_adapter_of_another_kind_updates_add(order, wrap):
    model = both(order, wrap).eval()
    randomise(model)
    if wrap is mixed_model:
        model.set_adapter(list(order))
    wanted = mlp()
    for name in ("lin0", "lin1"):
        layer = model.get_submodule(f"base_model.model.{name}" if wrap is mixed_model else name)
        while hasattr(layer, "base_layer"):
            adapter = next(iter(layer.adapters if hasattr(layer, "adapters") else layer.lora_A))
            wanted.get_submodule(name).weight += layer.get_delta_weight(adapter)
            layer = layer.base_layer
    assert torch.allclose(model(X), wanted(X), atol=1e-5)
    with torch.enable_grad():
        assert torch.allclose(model(X.clone().requires_grad_()), wanted(X), atol=1e-5)
    if wrap is mixed_model:
        model.set_adapter("spectral")
        assert not torch.allclose(model(X), wanted(X), atol=1e-3)
        model.set_adapter(list(order))
        assert torch.allclose(model.merge_and_unload()(X), wanted(X), atol=1e-5)


def test_stacked_experts_are_refused_with_the_reason():
    with pytest.raises(InputError, match=r"target_parameters = \['experts.up'\]; a spectral adapter wraps layers"):
        SpectralConfig(target_parameters=["experts.up"])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_as_diffusers_does_and_loaded_by_injection(low_cpu_mem_usage, tmp_path):
    """diffusers asks for the configuration first, then for the tensors, and injects by the names of the tensors."""
    config = SpectralConfig(rank=4, target_modules=["lin0"])
    model = inject_adapter_in_model(config, mlp())
    for seed in (0, 1):
        randomise(model, seed)
        text = json.dumps(model.peft_config["default"].to_dict())
        tensors = peft.get_peft_model_state_dict(model)
        save_file(tensors, tmp_path / "weights.safetensors", metadata={"adapter": text})
        assert "seal" not in json.loads(text), "the second time it would be that of the first"
    state = load_file(tmp_path / "weights.safetensors")
    loaded = peft.PeftConfig.from_peft_type(**json.loads(text))
    for again in (loaded, SpectralConfig(rank=4, target_modules=["lin0"])):
        fresh = inject_adapter_in_model(again, mlp(), state_dict=state, low_cpu_mem_usage=low_cpu_mem_usage)
        result = peft.set_peft_model_state_dict(fresh, state, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        assert torch.equal(fresh(X), model(X))


def test_inject_and_state_dict_functions():
    model = mlp()
    config = SpectralConfig(rank=4, target_modules=["lin0"])
    injected = inject_adapter_in_model(config, model)
    randomise(injected)
    wanted = injected(X)
    state = peft.get_peft_model_state_dict(injected)
    assert sorted(state) == [
        f"lin0.spectral_{part}" for part in ("M", "S", "U", "Vh", "origin", "sketch_U", "sketch_V")
    ]
    fresh = inject_adapter_in_model(SpectralConfig(rank=4, target_modules=["lin0"]), mlp())
    result = peft.set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    assert torch.equal(fresh(X), wanted)


def test_lora_conversion_by_peft():
    model = adapted()
    assert model.supports_lora_conversion()


def test_deepcopy_and_whole_state_dict():
    model = adapted()
    wanted = model(X)
    copied = copy.deepcopy(model)
    assert torch.allclose(copied(X), wanted, atol=1e-6)
    fresh = get_peft_model(mlp(), SpectralConfig(rank=4, target_modules=["lin0"])).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(fresh(X), wanted, atol=1e-6)


def test_a_wrong_base_is_refused_at_load(tmp_path):
    for save_basis in (True, False):
        folder = tmp_path / str(save_basis)
        adapted(save_basis=save_basis).save_pretrained(folder)
        other = mlp()
        other.lin0.weight.mul_(1.01)
        with pytest.raises(InputError, match=r"lin0 .adapter 'default'.: .*base"):
            PeftModel.from_pretrained(other, folder)


@pytest.mark.parametrize("part", ["origin", "sketch_V", "Vh"])
def test_files_that_lack_their_proof_or_basis_are_refused(part, tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if not k.endswith(f"_{part}")}, file)
    with pytest.raises(InputError, match=f"lin0 lacks spectral_{part}: .*save it again"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_pickled_file_is_proven_like_another(tmp_path):
    adapted(save_basis=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({k: v for k, v in tensors.items() if k.endswith("_M")}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="does not say which basis"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_file_on_the_hub_is_checked_like_a_folder(tmp_path, monkeypatch):
    """The Hub is a folder here: what is fetched for the check is what PEFT fetches."""
    import huggingface_hub

    adapted().save_pretrained(tmp_path)
    asked = []

    @functools.wraps(huggingface_hub.hf_hub_download)
    def fetch(repo_id, filename, **options):
        asked.append((repo_id, filename, options.get("revision")))
        return str(tmp_path / filename)

    for place in (huggingface_hub, sys.modules["peft.config"]):
        monkeypatch.setattr(place, "hf_hub_download", fetch)
    config = SpectralConfig.from_pretrained("someone/adapter", revision="r1")
    get_peft_model(mlp(), config)
    assert ("someone/adapter", "adapter_model.safetensors", "r1") in asked
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "sketch_U" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"someone/adapter: .*lacks spectral_sketch_U"):
        get_peft_model(mlp(), config)


def test_a_configuration_of_other_ranks_is_refused(tmp_path):
    adapted(save_basis=False, rank=None, interval=(2, 6)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("2,\n    6", "0,\n    4"))
    with pytest.raises(InputError, match=r"ranks \[2, 6\), the configuration says \[0, 4\)"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_loaded_configuration_can_start_a_new_adapter(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, SpectralConfig)
    model = get_peft_model(mlp(), config).eval()
    assert torch.equal(model(X), mlp()(X))
    randomise(model)
    assert not torch.equal(model(X), mlp()(X))


def test_basis_file_is_written_read_and_checked(tmp_path):
    path = tmp_path / "bases.safetensors"
    options = {"rank": 4, "target_modules": ["lin0"], "save_basis": False, "basis_file": str(path)}
    one = get_peft_model(mlp(), SpectralConfig(**options))
    two = get_peft_model(mlp(), SpectralConfig(**options))
    assert path.exists()
    U = [model.base_model.model.lin0.spectral_U["default"] for model in (one, two)]
    assert torch.equal(*U)
    other = mlp()
    other.lin0.weight.add_(0.1)
    model = get_peft_model(other, SpectralConfig(**options))  # another weight: decomposed, not read
    Vh, W = model.base_model.model.lin0.spectral_Vh["default"], other.lin0.weight
    S = model.base_model.model.lin0.spectral_S["default"]
    assert torch.allclose((W @ Vh.mT).norm(dim=0), S, atol=1e-5)
    one.save_pretrained(tmp_path / "adapter")
    assert "basis_file" not in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())


@pytest.mark.parametrize("damage", ["U", "S", "Vh", "seal", "names exchanged", "without a seal"])
def test_a_basis_that_is_not_what_was_written_is_decomposed_anew(tmp_path, damage):
    path = tmp_path / "bases.safetensors"
    options = {"rank": 4, "target_modules": ["lin0"], "save_basis": False, "basis_file": str(path)}
    own = get_peft_model(mlp(), SpectralConfig(**options)).base_model.model.lin0
    stored = load_file(path)
    if damage == "names exchanged":
        stored["lin0.U"] = stored["lin0.U"].flip(1)
    elif damage == "without a seal":  # as versions before seals wrote it, so that nothing proves the vectors
        del stored["lin0.seal"]
        stored["lin0.S"] *= 2
    else:
        stored[f"lin0.{damage}"].view(torch.uint8).view(-1)[0] ^= 1
    save_file(stored, path)
    again = get_peft_model(mlp(), SpectralConfig(**options)).base_model.model.lin0
    for part in ("spectral_U", "spectral_S", "spectral_Vh"):
        torch.testing.assert_close(getattr(again, part)["default"], getattr(own, part)["default"])


def test_a_folder_is_a_cache_of_bases(tmp_path, monkeypatch):
    options = {"rank": 4, "target_modules": ["lin0", "lin1"], "save_basis": False, "basis_file": str(tmp_path)}
    one = get_peft_model(mlp(), SpectralConfig(**options))
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("specbasis.jobs.cache.decompose", lambda *_, **__: pytest.fail("decomposed again"))
    two = get_peft_model(mlp(), SpectralConfig(**options))
    for name, layer in one.base_model.spectral_layers().items():
        assert torch.equal(
            layer.spectral_U["default"], two.base_model.spectral_layers()[name].spectral_U["default"]
        )


def test_matrices_are_decomposed_side_by_side_with_equal_bits():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (3, 1):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(96, 130), nn.Linear(130, 96), nn.Linear(96, 96))
            adapter = get_peft_model(model, SpectralConfig(rank=20, target_modules=["0", "1", "2"], init="normal"))
            results.append(peft.get_peft_model_state_dict(adapter))
            assert torch.get_num_threads() == count
            assert all(parameter.requires_grad for name, parameter in adapter.named_parameters() if "_M" in name)
    finally:
        torch.set_num_threads(threads)
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
        assert tensor.abs().max() > 0


def test_a_matrix_without_a_decomposition_leaves_no_trace():
    model = mlp()
    model.lin1.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="lin1: 1 of 80 entries are NaN"):
        get_peft_model(model, SpectralConfig(rank=3, target_modules=["lin0", "lin1"]))
    assert type(model.lin0) is nn.Linear


def test_basis_of_another_checkpoint(tmp_path):
    torch.manual_seed(8)
    other = Mlp()
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, tmp_path / "other.safetensors")
    model = adapted(basis=f"from:{tmp_path / 'other.safetensors'}")
    other_U = torch.linalg.svd(other.lin0.weight.double())[0][:, :4]
    U = model.base_model.model.lin0.spectral_U["default"].double()
    assert torch.allclose((other_U * U).sum(0).abs(), torch.ones(4, dtype=torch.float64), atol=1e-5)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "other.safetensors").unlink()
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path / "a")(X), model(X))
    with pytest.raises(InputError, match="no such file"):
        adapted(basis="from:/nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 11}, r"interval \[0, 11\) for a weight of 20 × 10.*<= 10"),
        ({"rank": 0}, "interval"),
        ({"rank": 4, "interval": (1, 4)}, "want one of the two"),
        ({"interval": "ab"}, "want two ranks"),
        ({"rank": 4, "scale": "x"}, "scale"),
        ({"rank": 4, "basis": "x"}, "basis"),
        ({"rank": 4, "init": "x"}, "init"),
        ({"rank": 4, "dropout": 1.5}, "dropout"),
        ({"rank": 4, "basis": "from:x", "save_basis": False}, "save_basis = True"),
        ({"rank": 4, "blocks_to_transform": [-1]}, "blocks"),
    ],
)
def test_bad_options_get_one_line(options, message):
    with pytest.raises(InputError, match=message) as error:
        get_peft_model(mlp(), SpectralConfig(target_modules=["lin0"], **options))
    assert "\n" not in str(error.value)


def test_free_r_psoft_is_the_sigma_scale():
    """W + U S (R − 1) Vh with a free R: PEFT's own layer, forward and gradient."""
    model = get_peft_model(mlp(), SpectralConfig(rank=4, scale="sigma", target_modules=["lin0"]))
    psoft = get_peft_model(
        mlp(),
        peft.PsoftConfig(
            r=4, psoft_alpha=4, target_modules=["lin0"], psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
        ),
    )
    randomise(model)
    ours, theirs = model.base_model.model.lin0, psoft.base_model.model.lin0
    A, _ = theirs._get_psoft_ab_cache_buffers("default")
    signs = torch.sign((A * ours.spectral_Vh["default"]).sum(1))
    M = ours.spectral_M["default"]
    R = next(p for n, p in theirs.named_parameters() if p.requires_grad)
    identity = torch.eye(4)
    R.copy_(identity + signs[:, None] * M * signs)
    if not torch.allclose(theirs.psoft_R["default"].get_matrix(), R):
        R.copy_(R.mT)
    assert torch.allclose(ours.get_delta_weight("default"), theirs.get_delta_weight("default"), atol=1e-5)
    assert torch.allclose(model(X), psoft(X), atol=1e-5)
    with torch.enable_grad():
        model(X).square().sum().backward()
        psoft(X).square().sum().backward()
    got = signs[:, None] * M.grad * signs
    assert torch.allclose(got, R.grad, atol=1e-4) or torch.allclose(got, R.grad.mT, atol=1e-4)


def test_registration_is_idempotent_and_reversible_in_names():
    members = list(peft.PeftType)
    peft_bridge.register()
    peft_bridge.register()
    assert list(peft.PeftType) == members
    assert peft.PeftType("SPECTRAL") is peft.PeftType.SPECTRAL
    assert "SPECTRAL" in peft.PeftType.__members__
    assert SpectralConfig().peft_type is peft.PeftType.SPECTRAL


def test_too_old_a_peft_is_named(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.1")
    with pytest.raises(InputError, match=r"peft 0\.20\.1 is installed"):
        peft_bridge.register()


def test_a_process_without_specbasis_is_told(tmp_path):
    adapted().save_pretrained(tmp_path)
    code = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "from specbasis.adapter import SpectralConfig" in done.stderr


def test_importing_the_core_does_not_import_peft():
    code = "import sys, specbasis.adapter.bases\nassert not {'peft', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- transformers models
# ---------------------------------------------------------------------------------------------


def classifier(base: Path, **options):
    config = SpectralConfig(
        **{
            "rank": 10,
            "target_modules": TARGETS,
            "blocks_to_transform": [-2, -1],
            "task_type": "SEQ_CLS",
            **options,
        }
    )
    return get_peft_model(load_classifier(base), config).eval()


def test_head_and_missing_pooler_are_trained_saved_and_restored(base, tmp_path):
    torch.manual_seed(1)
    model = classifier(base)
    trained = {
        n.split(".modules_to_save")[0]
        for n, p in model.named_parameters()
        if p.requires_grad and "modules_to_save" in n
    }
    assert trained == {"base_model.model.pooler", "base_model.model.classifier"}
    assert parameter_counts(model).head == 32 * 32 + 32 + 3 * 32 + 3
    randomise(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.normal_()
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    assert torch.equal(PeftModel.from_pretrained(load_classifier(base), tmp_path)(IDS).logits, wanted)
    native = load_classifier(base)
    native.load_adapter(tmp_path)
    assert torch.equal(native(IDS).logits, wanted)


def test_the_mark_on_parameters_is_the_loading_report(base):
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, output_loading_info=True
    )
    from specbasis.adapter.task_heads import fresh_modules

    assert (
        {key.split(".")[0] for key in report["missing_keys"]}
        == set(fresh_modules(model))
        == {"pooler", "classifier"}
    )


def test_a_poolers_place_below_the_backbone(tmp_path):
    from specbasis.adapter.task_heads import fresh_modules

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert sorted(fresh_modules(model)) == ["bert.pooler", "classifier"]
    model.save_pretrained(tmp_path / "tuned")
    assert fresh_modules(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "tuned")) == []
    assert fresh_modules(transformers.BertForSequenceClassification(config)) == []


def test_resized_embeddings_are_not_a_head(tmp_path):
    from specbasis.adapter.task_heads import fresh_modules

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert fresh_modules(model) == ["lm_head"]
    model.resize_token_embeddings(60)
    assert fresh_modules(model) == ["lm_head"]


def test_a_head_of_unknown_origin_is_warned_of(base, tmp_path):
    """A model that was not loaded with from_pretrained does not tell what in it is random."""
    full = load_classifier(base)
    for task, lacking in ((None, "pooler, classifier"), ("SEQ_CLS", "pooler")):  # PEFT saves a classifier of a task
        model = get_peft_model(copy.deepcopy(full), SpectralConfig(rank=4, target_modules=TARGETS, task_type=task))
        model.save_pretrained(tmp_path / lacking)
        with pytest.warns(UserWarning, match=f"^{lacking}: the adapter does not bring them"):
            PeftModel.from_pretrained(copy.deepcopy(full), tmp_path / lacking)
        with pytest.raises(InputError, match=f"^{lacking}: random in this base"):
            PeftModel.from_pretrained(load_classifier(base), tmp_path / lacking)


def test_a_random_head_is_refused_at_load(base, tmp_path):
    model = classifier(base)
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "pooler" not in k}, file)
    with pytest.raises(InputError, match="lacks pooler, which is random in this base"):
        PeftModel.from_pretrained(load_classifier(base), tmp_path / "a")
    full = load_classifier(base)
    full.save_pretrained(tmp_path / "full")  # this base has a head: nothing is random in training
    other = get_peft_model(load_classifier(tmp_path / "full"), SpectralConfig(rank=4, target_modules=TARGETS))
    assert not other.peft_config["default"].modules_to_save
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match="random in this base"):
        PeftModel.from_pretrained(load_classifier(base), tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_base(base, tmp_path, dtype):
    model = classifier(base)
    randomise(model)
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path / "with")
    bare = classifier(base, save_basis=False)
    bare.save_pretrained(tmp_path / "without")
    with pytest.raises(InputError, match="rounded to"):
        PeftModel.from_pretrained(load_classifier(base, dtype=dtype), tmp_path / "without")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(load_classifier(base, dtype=dtype), tmp_path / "with")
    assert any("rounding of those" in str(w.message) for w in caught)
    delta = [
        m.base_model.model.deberta.encoder.layer[2].output.dense.get_delta_weight("default")
        for m in (model, loaded)
    ]
    assert torch.equal(delta[0].to(dtype), delta[1])
    assert torch.allclose(loaded(IDS).logits.float(), wanted, atol=0.05)


def test_a_rounded_base_cast_back_gets_the_trained_update(tmp_path):
    """Routes through W V = U S must not be used where the stored basis is that of the unrounded weight."""
    model = adapted(rank=10)
    model.save_pretrained(tmp_path)
    rounded = mlp()
    rounded.lin0.weight.copy_(rounded.lin0.weight.to(torch.bfloat16))
    loaded = PeftModel.from_pretrained(rounded, tmp_path)
    layer = loaded.base_model.model.lin0
    delta = model.base_model.model.lin0.get_delta_weight("default")
    assert torch.equal(layer.get_delta_weight("default"), delta)
    assert torch.allclose(layer(X) - layer.base_layer(X), X @ delta.mT, atol=2e-6)
    loaded.add_adapter(
        "new", SpectralConfig(rank=10, target_modules=["lin0"])
    )  # has the rounded weight's own basis
    W = layer.base_layer.weight
    assert torch.allclose(
        W @ layer.spectral_Vh["new"].mT, layer.spectral_U["new"] * layer.spectral_S["new"], atol=1e-5
    )


def test_native_loading_refuses_a_wrong_base(base, tmp_path):
    model = classifier(base, save_basis=False)
    randomise(model)
    model.save_pretrained(tmp_path)
    native = load_classifier(base)
    native.deberta.encoder.layer[2].output.dense.weight.mul_(1.01)
    for trainable in (False, True):
        with pytest.raises(InputError, match="load the base"):
            native.load_adapter(tmp_path, f"mine{trainable}", is_trainable=trainable)
    with pytest.raises(InputError, match="load the base"):
        native(IDS)  # and what was refused cannot be used


@pytest.mark.parametrize("save_basis", [True, False])
def test_native_loading_proves_and_keeps_float32_on_a_bfloat16_base(base, tmp_path, save_basis):
    half = load_classifier(base, dtype=torch.bfloat16)
    model = get_peft_model(
        half, SpectralConfig(rank=6, target_modules=TARGETS, task_type="SEQ_CLS", save_basis=save_basis)
    ).eval()
    randomise(model)
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path)
    native = load_classifier(base, dtype=torch.bfloat16)
    native.load_adapter(tmp_path, is_trainable=True)
    layers = [module for module in native.modules() if isinstance(module, peft_bridge.SpectralLayer)]
    assert not any(not layer.adapters["default"].settled for layer in layers)
    assert {layer.spectral_M["default"].dtype for layer in layers} == {torch.float32}
    assert torch.equal(native.eval()(IDS).logits, wanted)


def test_native_add_save_and_switch(base):
    model = load_classifier(base)
    wanted = model(IDS).logits
    model.add_adapter(SpectralConfig(rank=5, target_modules=TARGETS), "mine")
    randomise(model)
    assert model.active_adapters() == ["mine"]
    changed = model(IDS).logits
    assert not torch.allclose(changed, wanted)
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, wanted)
    model.enable_adapters()
    assert torch.equal(model(IDS).logits, changed)
    assert any(key.endswith("spectral_M") for key in model.get_adapter_state_dict("mine"))


def test_blocks_limit_regular_expressions_and_lists(base):
    for targets in (TARGETS, ["intermediate.dense", "output.dense"]):
        model = classifier(base, target_modules=targets, exclude_modules=r".*attention.*")
        blocks = {name.split("layer.")[1].split(".")[0] for name in model.base_model.spectral_layers()}
        assert blocks == {"1", "2"}


def test_conv1d_language_model(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=60,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    gpt = transformers.GPT2LMHeadModel(config).eval()
    wanted = gpt(IDS % 60).logits
    state = copy.deepcopy(gpt.state_dict())
    model = get_peft_model(
        gpt, SpectralConfig(rank=6, target_modules=["c_attn", "c_fc", "c_proj", "lm_head"], task_type="CAUSAL_LM")
    ).eval()
    assert torch.equal(model(IDS % 60).logits, wanted)
    randomise(model, std=0.5)
    changed = model(IDS % 60).logits
    model.save_pretrained(tmp_path)
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.load_state_dict(state)
    assert torch.equal(PeftModel.from_pretrained(plain, tmp_path)(IDS % 60).logits, changed)
    generated = model.generate(
        input_ids=IDS[:2, :4] % 60,
        max_new_tokens=3,
        num_beams=2,
        do_sample=False,
        adapter_names=["default", "__base__"],
    )
    assert generated.shape[0] == 2
    merged = model.merge_and_unload()
    assert torch.allclose(merged(IDS % 60).logits, changed, atol=1e-4)
    assert torch.equal(merged.transformer.wte.weight, state["transformer.wte.weight"])


def test_feed_forward_layers_are_the_default_where_the_family_is_known(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )
    model = get_peft_model(transformers.BertModel(config), SpectralConfig(rank=4, blocks_to_transform=-1))
    assert sorted(model.base_model.spectral_layers()) == [
        "encoder.layer.1.intermediate.dense",
        "encoder.layer.1.output.dense",
    ]
    with pytest.raises(InputError, match="specify `target_modules`"):
        get_peft_model(mlp(), SpectralConfig(rank=2))
    mixture = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=20,
            num_local_experts=2,
        )
    )
    with pytest.raises(InputError, match="2 feed-forward parameters of MixtralForCausalLM are stacks of experts"):
        get_peft_model(mixture, SpectralConfig(rank=2))


SHAPE = {"vocab_size": 50, "num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 2}
FAMILIES = {
    "DebertaV2ForSequenceClassification": (
        {**SHAPE, "intermediate_size": 32},
        "deberta.encoder.layer.1.output.dense",
    ),
    "DebertaForSequenceClassification": (
        {**SHAPE, "intermediate_size": 32},
        "deberta.encoder.layer.1.output.dense",
    ),
    "GPT2LMHeadModel": ({"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}, "transformer.h.1.mlp.c_proj"),
    "LlamaForCausalLM": ({**SHAPE, "intermediate_size": 32}, "model.layers.1.mlp.gate_proj"),
    "Phi3ForCausalLM": ({**SHAPE, "intermediate_size": 32, "pad_token_id": 0}, "model.layers.1.mlp.gate_up_proj"),
    "ViTForImageClassification": (
        {**SHAPE, "intermediate_size": 32, "image_size": 32, "patch_size": 16},
        "vit.layers.1.mlp.fc1",
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 50, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2},
        "decoder.block.1.layer.2.DenseReluDense.wi",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_of_families(name):
    shape, wanted = FAMILIES[name]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**shape)
    names = set(
        get_peft_model(
            model_class(config), SpectralConfig(rank=4, blocks_to_transform=-1)
        ).base_model.spectral_layers()
    )
    assert wanted in names
    assert len(names) in (2, 3, 4)  # of one block: 2, 3 with a gate, 4 with a decoder


def test_defaults_where_weights_are_packed(base):
    """Quantised layers hold integers of another shape."""
    model = load_classifier(base)
    wanted = peft_resolve.feed_forward(model)
    for name in wanted:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(
            torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
        )
    assert peft_resolve.feed_forward(model) == wanted


def test_a_second_adapter_has_the_same_defaults(base):
    model = get_peft_model(load_classifier(base), SpectralConfig(rank=4, task_type="SEQ_CLS"))
    model.add_adapter("other", SpectralConfig(rank=5, task_type="SEQ_CLS"))
    layers = model.base_model.spectral_layers()
    assert len(layers) == 6
    assert all(list(layer.adapters) == ["default", "other"] for layer in layers.values())


def test_counts_of_the_paper():
    """DeBERTa-v3-base, K = 300, last two blocks: 4 · 300² = 0.36 M, on the real configuration without its
    memory."""
    config = transformers.DebertaV2Config(
        vocab_size=128100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    with torch.device("meta"):
        model = transformers.DebertaV2ForSequenceClassification(config)
    model = get_peft_model(
        model,
        SpectralConfig(
            rank=300,
            target_modules=TARGETS,
            blocks_to_transform=[-2, -1],
            modules_to_save=["pooler"],
            task_type="SEQ_CLS",
        ),
    )
    counts = parameter_counts(model)
    assert counts.adapter == 360_000
    assert counts.head == 768 * 768 + 768 + 2 * 768 + 2
    assert 183e6 < counts.total - counts.adapter - counts.head < 186e6
    assert str(counts).startswith("adapter parameters: 360,000 || head parameters: 592,130 || all parameters:")


def test_file_size_without_basis(tmp_path):
    model = nn.Sequential(*(nn.Linear(768, 320) for _ in range(4)))
    config = SpectralConfig(rank=300, basis="random", save_basis=False, target_modules=["0", "1", "2", "3"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 1.5e6


BACKTRACKS = {
    "target_modules": r"(\w+\s?)*!",
    "exclude_modules": r"(.*)*.*.*.*.*.*x",
    "modules_to_save": [r"(\w+)*!"],
}


@pytest.mark.parametrize("field", BACKTRACKS)
def test_a_pattern_that_backtracks_ends(field):
    model = nn.ModuleDict({"l" * 60: linear(6, 5, seed=1), "lin": linear(6, 5, seed=2)})
    with contextlib.suppress(ValueError):  # PEFT's own, where nothing matches
        config = SpectralConfig(**{"rank": 2, "target_modules": ["lin"], field: BACKTRACKS[field]})
        inject_adapter_in_model(config, model)


@pytest.mark.parametrize("pattern", [r"lin\d", r".*0", r"(lin0|lin1)", r"^(?!lin0).*1$", "lin", "lin1"])
def test_patterns_match_what_peft_matches(pattern):
    theirs = functools.partial(
        peft.tuners.tuners_utils.check_target_module_exists, peft.LoraConfig(target_modules=pattern)
    )
    wanted = [name for name, module in Mlp().named_modules() if isinstance(module, nn.Linear) and theirs(name)]
    if not wanted:
        with pytest.raises(ValueError, match="not found"):
            inject_adapter_in_model(SpectralConfig(rank=2, target_modules=pattern), Mlp())
        return
    model = inject_adapter_in_model(SpectralConfig(rank=2, target_modules=pattern), Mlp())
    assert [n for n, m in model.named_modules() if isinstance(m, peft_bridge.SpectralLayer)] == wanted
