"""Coefficients at chosen positions: against a dense W + U M Vh in float64, in a file, and refused when hostile."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from specbasis.adapter import SpectralConfig, SpectralLinear, folder, parameter_counts, set_positions  # noqa: E402
from specbasis.checkpoint import open_checkpoint, open_tuned  # noqa: E402
from specbasis.checkpoint.pattern import positions_of  # noqa: E402
from specbasis.core.errors import InputError  # noqa: E402
from tests.adapter.helpers import TARGETS, load_classifier, randomise, save_deberta  # noqa: E402
from tests.adapter.test_layer import LAYERS  # noqa: E402
from tests.adapter.test_peft_bridge import X, mlp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

IDS = torch.arange(48).reshape(4, 12)
SCATTERED = torch.tensor([[2, 2, 3, 6], [3, 6, 2, 5]])
WHERE = {
    "diagonal": lambda i, j: i == j,
    "band:2": lambda i, j: abs(i - j) <= 2,
    "scattered": lambda i, j: [i, j] in SCATTERED.mT.tolist(),
}


def layer_with(base: nn.Module, pattern: str) -> SpectralLinear:
    """A layer with random coefficients on ranks [2, 7), in float64."""
    if pattern == "scattered":
        layer = SpectralLinear(base, interval=(0, 8))
        layer.place("default", SCATTERED)
    else:
        layer = SpectralLinear(base, interval=(2, 7), pattern=pattern)
    for frozen in (layer.spectral_U, layer.spectral_Vh, layer.spectral_S):
        frozen.put("default", frozen["default"].double())
    torch.manual_seed(1)
    M = torch.randn(layer.spectral_M["default"].shape, dtype=torch.float64)
    layer.spectral_M["default"] = nn.Parameter(M)
    return layer


def naive(layer: SpectralLinear, pattern: str, M: torch.Tensor) -> torch.Tensor:
    """U M Vh entry by entry: the rank-one matrices of the pattern's places in a loop over the square."""
    k, m = layer.adapters["default"].interval
    assert (k, m) == (2, 7)
    U, Vh = layer.spectral_U["default"], layer.spectral_Vh["default"]
    places = [(i, j) for i in range(k, m) for j in range(k, m) if WHERE[pattern](i, j)]
    assert len(places) == len(M)
    return sum(x * torch.outer(U[:, i - k], Vh[j - k]) for x, (i, j) in zip(M, places, strict=True))


ROUTES = [("linear", route) for route in (None, "factored", "folded", "outer")]
ROUTES += [("tall", "inner"), ("conv1d", None), ("conv2d groups", None)]


@pytest.mark.parametrize("pattern", WHERE)
@pytest.mark.parametrize(("kind", "route"), ROUTES)
def test_output_and_gradients_are_those_of_the_dense_weight(kind, route, pattern, monkeypatch):
    base, x = LAYERS[kind][0]().double(), LAYERS[kind][1]().double().requires_grad_()
    layer = layer_with(base, pattern)
    if route is not None:
        monkeypatch.setattr(SpectralLinear, "_route", lambda self, x, name: route)
    M = layer.spectral_M["default"].detach().clone().requires_grad_()
    weight = layer.stored_weight() + layer.layout.stored(naive(layer, pattern, M), base)
    wanted = torch.func.functional_call(base, {"weight": weight}, (x,))
    expected = torch.autograd.grad(wanted.sin().sum(), (M, x))
    output = layer(x)
    found = torch.autograd.grad(output.sin().sum(), (layer.spectral_M["default"], x))
    for ours, theirs in zip((output, *found), (wanted, *expected), strict=True):
        rounding = (
            64 * torch.finfo(torch.float32).eps * float(theirs.detach().abs().max())
        )  # as far as W V = U S holds
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding)
    before = base.weight.detach().clone()
    layer.merge(safe_merge=True)
    torch.testing.assert_close(base.weight, weight, rtol=0, atol=1e-12)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_a_diagonal_is_the_band_of_no_width_and_a_wide_band_the_square():
    assert torch.equal(positions_of("diagonal", (3, 9), ""), positions_of("band:0", (3, 9), ""))
    every = torch.cartesian_prod(torch.arange(3, 6), torch.arange(3, 6)).mT
    for pattern in ("band:2", "band:999999999999", "scattered:9"):
        assert torch.equal(positions_of(pattern, (3, 6), "").long(), every)
    assert positions_of("square", (3, 6), "") is None
    drawn = positions_of("scattered:40", (10, 30), "")
    assert drawn.shape == (2, 40)
    assert len(set(map(tuple, drawn.mT.tolist()))) == 40
    assert drawn.min() >= 10
    assert drawn.max() < 30


def test_choosing_positions_changes_no_vector_and_a_full_square_is_one_again():
    base = LAYERS["linear"][0]()
    whole, part, square = (SpectralLinear(base, interval=(1, 8)) for _ in range(3))
    part.place("default", SCATTERED)
    assert part.adapters["default"].interval == (2, 7)
    assert torch.equal(part.spectral_U["default"], whole.spectral_U["default"][:, 1:6])
    direct = SpectralLinear(base, interval=(2, 7)).proof("default")
    for name in ("origin", "S", "sketch_U", "sketch_V"):
        assert torch.equal(getattr(part.proof("default"), name), getattr(direct, name)), name
    square.place("default", torch.cartesian_prod(torch.arange(2, 5), torch.arange(2, 5)).mT)
    assert square.adapters["default"].pattern == "square"
    assert square.spectral_M["default"].shape == (3, 3)
    assert "default" not in square.spectral_positions
    random = SpectralLinear(base, interval=(1, 8), basis="random:3")
    random.place("default", SCATTERED)
    assert random.adapters["default"].interval == (1, 8), "random vectors of another interval are others"
    randomise(nn.ModuleDict({"x": part}))
    with pytest.raises(InputError, match="coefficients are not zero, and at other positions"):
        part.place("default", SCATTERED)


def classifier(place):
    torch.manual_seed(2)  # its head is random
    return load_classifier(place)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_deberta(tmp_path_factory.mktemp("models") / "base", layers=2)


PATTERN = {r"0\.intermediate\.dense": "diagonal", r"output\.dense": "scattered:30"}


def adapted(base, **options):
    options = {"rank": 16, "target_modules": TARGETS, "task_type": "SEQ_CLS", "pattern": PATTERN, **options}
    model = get_peft_model(classifier(base), SpectralConfig(**options)).eval()
    randomise(model, std=2.0)
    return model


def loaded(base, place):
    return PeftModel.from_pretrained(classifier(base), place).eval()


@torch.no_grad()
@pytest.mark.parametrize("save_basis", [True, False])
@pytest.mark.parametrize("scale", ["none", "sigma"])
def test_a_file_of_mixed_patterns_gives_the_same_model_by_every_door(base, tmp_path, save_basis, scale):
    model = adapted(base, save_basis=save_basis, scale=scale)
    assert parameter_counts(model).adapter == 16 + 256 + 2 * 30
    expected, layers = model(IDS).logits, model.base_model.spectral_layers()
    assert not torch.allclose(expected, classifier(base)(IDS).logits, atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["file_format"] == 2
    again = loaded(base, tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, expected)
    for name, layer in again.base_model.spectral_layers().items():
        for part in ("M", "S", "U", "positions"):
            stored, first = (getattr(which, f"spectral_{part}") for which in (layer, layers[name]))
            assert ("default" in stored) == ("default" in first)
            assert "default" not in stored or torch.equal(stored["default"], first["default"])
    native = classifier(base)
    native.load_adapter(tmp_path / "adapter")
    assert torch.equal(native.eval()(IDS).logits, expected)
    rows = {row["module"]: row["parameters"] for row in folder.info(tmp_path / "adapter")["layers"]}
    assert sorted(rows.values()) == [16, 30, 30, 256]
    assert len(folder.verify(tmp_path / "adapter", base)) == 4
    folder.export_lora(tmp_path / "adapter", tmp_path / "lora", base)
    assert torch.allclose(loaded(base, tmp_path / "lora")(IDS).logits, expected, atol=1e-5)
    folder.merge(tmp_path / "adapter", tmp_path / "merged", base)
    merged = classifier(tmp_path / "merged")
    assert torch.allclose(merged(IDS).logits, expected, atol=1e-5)
    tuned = open_tuned(tmp_path / "adapter", open_checkpoint(base))
    for name, layer in layers.items():
        W = layer.merged_weight(["default"])
        assert torch.equal(merged.get_submodule(name).weight, W)
        assert torch.allclose(tuned[f"{name.removeprefix('deberta.')}.weight"], W, atol=1e-6)


@torch.no_grad()
def test_an_exported_lora_has_no_more_ranks_than_the_pattern_couples(base, tmp_path):
    model = get_peft_model(classifier(base), SpectralConfig(rank=16, target_modules=TARGETS, task_type="SEQ_CLS"))
    names = sorted(model.base_model.spectral_layers())
    column, row = torch.tensor([[0, 4, 9], [3, 3, 3]]), torch.tensor([[5, 5], [0, 15]])
    set_positions(model, {names[0]: column, names[1]: row})
    model.save_pretrained(tmp_path / "zero")
    folder.export_lora(tmp_path / "zero", tmp_path / "nothing", base)
    assert torch.equal(loaded(base, tmp_path / "nothing")(IDS).logits, classifier(base)(IDS).logits)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    folder.export_lora(tmp_path / "adapter", tmp_path / "lora", base)
    factors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert [tensor.shape[0] for name, tensor in factors.items() if "lora_A" in name] == [1, 1]
    assert torch.allclose(loaded(base, tmp_path / "lora")(IDS).logits, model.eval()(IDS).logits, atol=1e-5)


@torch.no_grad()
def test_patterns_mix_in_a_batch_and_add():
    both = ["lin0", "lin1"]
    model = get_peft_model(mlp(), SpectralConfig(rank=4, target_modules=both, pattern="scattered:7")).eval()
    model.add_adapter(
        "band", SpectralConfig(interval=(1, 4), target_modules=both, pattern={"lin0": "band:1"}, scale="none")
    )
    randomise(model)
    alone = {}
    for name in ("default", "band"):
        model.set_adapter(name)
        alone[name] = model(X)
    alone["__base__"] = mlp()(X)
    names = ["band", "default", "__base__", "band", "default"]
    mixed = model(X, adapter_names=names)
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], alone[name][row], atol=1e-5), name
    model.add_weighted_adapter(["default", "band"], [0.5, -2.0], "sum")
    for layer in model.base_model.spectral_layers().values():
        wanted = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("band")
        assert torch.allclose(layer.get_delta_weight("sum"), wanted, atol=1e-6)


def test_a_square_is_written_as_ever(base, tmp_path):
    adapted(base, pattern="square").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["file_format"] == 1
    assert "pattern" not in config
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "positions" in name]


def put(tensors, value):
    name = next(name for name in tensors if "spectral_positions" in name)
    tensors[name] = value(tensors[name].clone())


def with_first(positions, value):
    positions[0, 0] = value
    return positions


def wide(tensors, stop):
    """An interval that ends elsewhere, where there are positions."""
    name = next(name for name in tensors if "spectral_positions" in name).replace("positions", "origin")
    tensors[name] = tensors[name].clone()
    tensors[name][1] = stop


HOSTILE = {
    "below": (lambda t: put(t, lambda p: with_first(p, -1)), r"outside of ranks \[0, 16\)"),
    "above": (lambda t: put(t, lambda p: with_first(p, 2**31 - 1)), r"outside of ranks \[0, 16\)"),
    "twice": (lambda t: put(t, lambda p: p[:, [0, *range(p.shape[1] - 1)]]), "not in the order of rows, each once"),
    "turned": (lambda t: put(t, lambda p: p.flip(1)), "not in the order of rows, each once"),
    "fewer": (lambda t: put(t, lambda p: p[:, 1:].contiguous()), "positions of shape"),
    "flat": (lambda t: put(t, lambda p: p.flatten()), "positions of shape"),
    "empty": (lambda t: put(t, lambda p: p[:, :0].contiguous()), "positions of shape"),
    "a wide origin": (lambda t: wide(t, 10**9), "and has 16 singular values"),
    "floats": (lambda t: put(t, torch.Tensor.float), "torch.float32 positions"),
    "gone": (lambda t: t.pop(next(name for name in t if "positions" in name)), "lacks spectral_positions"),
}
DOORS = {
    "peft": loaded,
    "info": lambda base, place: folder.info(place),
    "lora": lambda base, place: folder.export_lora(place, place / "lora", base),
    "checkpoint": lambda base, place: open_tuned(place, open_checkpoint(base)),
}


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved")
    adapted(base).save_pretrained(place)
    return place


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_positions_are_refused_at_every_door_in_one_line(base, saved, tmp_path, kind, sealed):
    change, message = HOSTILE[kind]
    tensors = load_file(saved / "adapter_model.safetensors")
    config = json.loads((saved / "adapter_config.json").read_text())
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config if sealed else {**config, "seal": None}))
    for door in DOORS.values():
        with pytest.raises(InputError, match=message) as refused:
            door(base, tmp_path)
        assert "\n" not in str(refused.value)


def test_moved_positions_break_the_seal_and_another_pattern_is_told(base, saved, tmp_path):
    tensors = load_file(saved / "adapter_model.safetensors")
    config = (saved / "adapter_config.json").read_text()
    name = next(name for name in tensors if "spectral_positions" in name and tensors[name].shape[1] == 30)
    free = next(i for i in range(256) if [i // 16, i % 16] not in tensors[name].mT.tolist())
    places = sorted([[free // 16, free % 16], *tensors[name].mT.tolist()[1:]])
    tensors[name] = torch.tensor(places, dtype=torch.int32).mT.contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(config)
    for door in DOORS.values():
        with pytest.raises(InputError, match="other numbers than were saved"):
            door(base, tmp_path)
    save_file(load_file(saved / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config.replace("scattered:30", "scattered:31"))
    with pytest.raises(InputError, match=r"coefficients of shape \(30,\), the configuration wants \(31,\)"):
        loaded(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text(config.replace("scattered:30", "scattered:99999999999"))
    with pytest.raises(InputError, match=r"want 1 … 256 coefficients there"):
        loaded(base, tmp_path)


@pytest.mark.parametrize(
    "pattern", ["", "ring", "band", "band:-1", "scattered:x", "band:1\n", None, 3, {"x": "ring"}]
)
def test_a_word_that_is_no_pattern_gets_one_line(pattern):
    with pytest.raises(InputError, match=r"got pattern = .*; want 'square', 'diagonal'"):
        SpectralConfig(pattern=pattern)
