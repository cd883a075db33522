"""A saved adapter that is not what was saved is refused at every door, and another base is named."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

from peft import PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from specbasis.adapter import SpectralConfig, folder  # noqa: E402
from specbasis.checkpoint import open_checkpoint, open_tuned  # noqa: E402
from specbasis.core.errors import InputError  # noqa: E402
from tests.adapter.helpers import randomise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

IDS = torch.arange(24).reshape(2, 12) % 60
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **SHAPE)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


def llama(base, **options):
    return transformers.LlamaForCausalLM.from_pretrained(base, **options).eval()


@pytest.fixture
def saved(base, tmp_path):
    """An adapter folder with random coefficients, and a trained head of the model saved whole."""
    config = SpectralConfig(
        rank=8, target_modules=["down_proj", "up_proj"], modules_to_save=["model.norm"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(llama(base), config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def altered(place, change) -> None:
    file = place / "adapter_model.safetensors"
    tensors, config = load_file(file), json.loads((place / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, file, metadata={"format": "pt"})
    (place / "adapter_config.json").write_text(json.dumps(config))


def of(tensors, *parts):
    return [name for name in tensors if all(part in name for part in parts)]


def exchange(tensors, *part):
    first, second = of(tensors, "down_proj", *part)
    tensors[first], tensors[second] = tensors[second], tensors[first]


def scale_all(tensors, part, factor):
    tensors.update({name: tensors[name] * factor for name in of(tensors, part)})


def drop(tensors, *parts):
    for name in of(tensors, *parts):
        del tensors[name]


def flip(tensors, part):
    """The lowest bit of one number."""
    tensors[of(tensors, part)[0]].view(torch.int32)[0] ^= 1


def natively(base, place):
    model = llama(base)
    model.load_adapter(place)
    return model


CHANGES = {
    "S doubled": lambda t, c: scale_all(t, "spectral_S", 2),
    "one bit of S": lambda t, c: flip(t, "spectral_S"),
    "one bit of M": lambda t, c: flip(t, "spectral_M"),
    "NaN in M": lambda t, c: scale_all(t, "spectral_M", float("nan")),
    "M of two layers exchanged": lambda t, c: exchange(t, "spectral_M"),
    "one bit of a sketch": lambda t, c: flip(t, "sketch_U"),
    "M rounded": lambda t, c: t.update({n: t[n].half() for n in of(t, "spectral_M")}),
    "a layer gone": lambda t, c: drop(t, "layers.1.mlp.down_proj"),
    "a layer more": lambda t, c: t.update(
        {n.replace("up_proj", "gate_proj"): t[n].clone() for n in of(t, "layers.0.mlp.up_proj")}
    ),
    "a head changed": lambda t, c: scale_all(t, "model.norm.weight", 2),
    "a head gone": lambda t, c: drop(t, "model.norm.weight"),
    "another scale": lambda t, c: c.update(scale="sigma"),
    "another basis": lambda t, c: c.update(basis="random"),
    "a damaged seal": lambda t, c: c.update(seal={"layers": 3}),
}
UNSEEN = {"a head changed", "a head gone", "a layer more"}
"""What transformers does not show, which opens the file itself; the last changes nothing there."""

DOORS = {
    "peft": lambda base, place: PeftModel.from_pretrained(llama(base), place),
    "transformers": lambda base, place: natively(base, place)(input_ids=IDS),
    "info": lambda base, place: folder.info(place),
    "checkpoint": lambda base, place: open_tuned(place, open_checkpoint(base)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_not_saved_is_refused_in_one_line(base, saved, change, door):
    if door == "transformers" and change in UNSEEN:
        return
    altered(saved, CHANGES[change])
    with pytest.raises(InputError) as error:
        DOORS[door](base, saved)
    assert "\n" not in str(error.value)
    assert "adapter again" in str(error.value)


def test_the_layer_that_differs_is_named(base, saved):
    altered(saved, CHANGES["a layer gone"])
    with pytest.raises(InputError, match=r"model.layers.1.mlp.down_proj is not in the file"):
        PeftModel.from_pretrained(llama(base), saved)


def test_a_change_that_is_meant_is_possible(base, saved):
    altered(saved, lambda t, c: (scale_all(t, "spectral_M", 0.5), c.pop("seal")))
    PeftModel.from_pretrained(llama(base), saved)


@pytest.mark.parametrize("save_basis", [True, False])
@pytest.mark.parametrize("change", ["S doubled", "NaN in M", "S of one rank"])
def test_without_a_seal_values_and_coefficients_are_still_proved(base, tmp_path, save_basis, change):
    """As in the files of version 0.1."""
    config = SpectralConfig(rank=8, target_modules=["down_proj"], save_basis=save_basis)
    model = get_peft_model(llama(base), config)
    randomise(model)
    model.save_pretrained(tmp_path)

    def one_rank(t, c):
        t[of(t, "spectral_S")[0]][5] *= 1.001

    altered(tmp_path, {**CHANGES, "S of one rank": one_rank}[change])
    altered(tmp_path, lambda t, c: c.pop("seal"))
    with pytest.raises(InputError, match=r"singular (values|vectors)|not finite"):
        PeftModel.from_pretrained(llama(base), tmp_path)


@pytest.mark.parametrize("targets", [["down_proj"], ["down_proj", "gate_proj"], ["down_proj", "up_proj", "q_proj"]])
@pytest.mark.parametrize(("door", "sealed"), [("peft", True), ("peft", False), ("transformers", True)])
def test_a_configuration_that_targets_other_layers_than_the_file_has(base, saved, targets, sealed, door):
    altered(saved, lambda t, c: (c.update(target_modules=targets), None if sealed else c.pop("seal")))
    with pytest.raises(InputError, match=r"\d\.(mlp|self_attn)\.\w+ \(and .*(in|not in) the file"):
        DOORS[door](base, saved)


def test_a_seal_follows_further_training_and_other_ways_of_saving(base, saved, tmp_path):
    model = PeftModel.from_pretrained(llama(base), saved, is_trainable=True)
    randomise(model, seed=7)
    model.save_pretrained(tmp_path / "peft")
    PeftModel.from_pretrained(llama(base), tmp_path / "peft")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    PeftModel.from_pretrained(llama(base), tmp_path / "pickled")
    native = llama(base)
    native.load_adapter(tmp_path / "peft")
    native.save_pretrained(tmp_path / "native")
    again = PeftModel.from_pretrained(llama(base), tmp_path / "native").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tensors of the base")
        PeftModel.from_pretrained(llama(base), tmp_path / "merged")


# --- the rest of the base

OTHERS = {
    "model.embed_tokens.weight": lambda m: m.model.embed_tokens.weight.data[5, 3].add_(0.3),
    "model.layers.1.self_attn.q_proj.weight": lambda m: m.model.layers[1].self_attn.q_proj.weight.data.mul_(1.01),
    "model.layers.0.input_layernorm.weight": lambda m: m.model.layers[0].input_layernorm.weight.data[0].zero_(),
    "lm_head.weight": lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data.flip(0)),
}


def complaints(base, place, change=lambda m: None, **options):
    model = llama(base, **options)
    change(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, place)
    return [str(w.message) for w in caught if "tensors of the base" in str(w.message)]


@pytest.mark.parametrize("name", OTHERS)
def test_a_change_of_the_rest_of_the_base_is_named(base, saved, name):
    assert complaints(base, saved) == []
    (message,) = complaints(base, saved, OTHERS[name])
    assert f"1 of 20 tensors of the base are not those that the adapter was trained with: {name};" in message


def test_a_resized_vocabulary_is_named_and_loads(base, saved):
    (message,) = complaints(base, saved, lambda m: m.set_input_embeddings(torch.nn.Embedding(70, 16)))
    assert "model.embed_tokens.weight" in message


def test_a_rounded_base_says_so_and_a_wider_one_of_equal_values_says_nothing(base, tmp_path):
    config = SpectralConfig(rank=8, target_modules=["down_proj"])
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(llama(base, dtype=dtype), config)
        model.save_pretrained(tmp_path / str(dtype))
    (message,) = complaints(base, tmp_path / "torch.float32", dtype=torch.bfloat16)
    assert "(in bfloat16 now, in float32 then)" in message
    assert complaints(base, tmp_path / "torch.bfloat16", dtype=torch.bfloat16) == []
    assert complaints(base, tmp_path / "torch.bfloat16", lambda m: m.bfloat16().float()) == []


def test_other_adapters_and_heads_do_not_count(base, saved, tmp_path):
    model = PeftModel.from_pretrained(llama(base), saved)
    model.add_adapter("other", SpectralConfig(rank=4, target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tensors of the base")
        model.load_adapter(tmp_path, "again")
        PeftModel.from_pretrained(llama(base), tmp_path)


def test_an_embedding_that_the_file_restores_does_not_count(base, tmp_path):
    """A vocabulary that was resized for the training is saved by PEFT with the adapter."""
    model = get_peft_model(llama(base), SpectralConfig(rank=8, target_modules=["down_proj"]))
    model.get_input_embeddings().weight.data.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert complaints(base, tmp_path) == []
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert "model.embed_tokens.weight" in complaints(base, tmp_path)[0]


def test_a_weighted_sum_and_a_selected_adapter_have_seals_of_their_own(base, saved, tmp_path):
    model = PeftModel.from_pretrained(llama(base), saved)
    model.add_weighted_adapter(["default"], [0.5], "less")
    model.save_pretrained(tmp_path, selected_adapters=["less"])
    seals = [
        json.loads((place / "adapter_config.json").read_text())["seal"] for place in (saved, tmp_path / "less")
    ]
    assert seals[0]["layers"].keys() == seals[1]["layers"].keys()
    assert seals[0]["layers"] != seals[1]["layers"]
    PeftModel.from_pretrained(llama(base), tmp_path / "less")
