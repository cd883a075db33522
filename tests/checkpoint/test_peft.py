"""PEFT's own merge_and_unload on pico models is the oracle; every case goes through folders on disk."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from specbasis.checkpoint import open_checkpoint, open_tuned
from specbasis.core.errors import InputError
from specbasis.core.low_rank import low_rank_svd
from specbasis.core.svd import decompose

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

EPS = torch.finfo(torch.float32).eps


def llama():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def convnet():
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


LINEAR = ["q_proj", "k_proj", "down_proj"]
CASES = {
    "lora": (llama, lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)),
    "rslora": (llama, lambda: peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=LINEAR)),
    "patterns": (
        llama,
        lambda: peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=LINEAR, rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
            alpha_pattern={"q_proj": 5, "0.mlp.down_proj": 1},
        ),
    ),
    "dora": (llama, lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=LINEAR)),
    "adalora": (
        llama,
        lambda: peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=8, total_step=100, target_modules=LINEAR),
    ),
    "head": (
        bert,
        lambda: peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]),
    ),
    "bias": (bert, lambda: peft.LoraConfig(r=4, target_modules=["query", "value"], bias="all")),
    "square Conv1D": (gpt2, lambda: peft.LoraConfig(r=4, target_modules=["attn.c_proj"], fan_in_fan_out=True)),
    "Conv1D": (gpt2, lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"])),
    "Conv1D dora": (gpt2, lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["c_attn", "attn.c_proj"])),
    "Conv1D adalora": (
        gpt2,
        lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=100, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "embedding": (llama, lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "embedding dora": (llama, lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens"])),
    "convolution": (convnet, lambda: peft.LoraConfig(r=4, target_modules=["convolution"])),
    "convolution dora": (convnet, lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["convolution"])),
    "pissa as trained": (
        llama,
        lambda: peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=LINEAR),
    ),
}  # fmt: skip
LOW_RANK = [name for name in CASES if "dora" not in name]


def shake(model):
    """Give every adapter tensor values that training could have given it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def make(folder, model, config):
    """Base, adapter and the oracle's merged tensors, all by way of the disk."""
    torch.manual_seed(0)
    base_model = model()
    base_model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(type(base_model).from_pretrained(folder / "base"), config())
        shake(tuned)
        tuned.save_pretrained(folder / "adapter")
        merged = peft.PeftModel.from_pretrained(
            type(base_model).from_pretrained(folder / "base"), folder / "adapter"
        ).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def assert_float32_equal(got, want, name):
    # Rounding of a sum of two products of inner size r and of the base, each of the size of the largest entry.
    assert float((got.double() - want.double()).abs().max()) <= 32 * EPS * float(want.abs().max()), name


@pytest.mark.parametrize("case", CASES)
def test_the_tuned_matrices_are_those_of_the_merged_model(case, tmp_path):
    merged = make(tmp_path, *CASES[case])
    base = open_checkpoint(tmp_path / "base")
    tuned = open_tuned(tmp_path / "adapter", base)
    assert set(base) <= set(tuned)
    changed = {name for name in tuned if name not in base or tuned.entries[name] is not base.entries[name]}
    assert changed
    for name in tuned:
        if tuned.entries[name].is_float:
            assert tuned[name].shape == tuned.entries[name].shape
            assert_float32_equal(tuned[name], merged[name], name)
    moved = {name for name in base if name in merged and not torch.equal(base[name], merged[name])}
    assert moved <= changed


@pytest.mark.parametrize("case", LOW_RANK)
def test_low_rank_updates_come_as_factors(case, tmp_path):
    merged = make(tmp_path, *CASES[case])
    base = open_checkpoint(tmp_path / "base")
    tuned = open_tuned(tmp_path / "adapter", base)
    factored = {name for name in tuned if tuned.delta_factors(name) is not None}
    assert factored
    for name in factored:
        B, A = tuned.delta_factors(name)
        delta = (merged[name].double() - base[name].double()).reshape(base[name].shape[0], -1)
        # The oracle's delta carries the float32 rounding of base + delta.
        assert float((B @ A - delta).abs().max()) <= 32 * EPS * float(merged[name].abs().max())
        assert B.shape[1] <= 8
        torch.testing.assert_close(low_rank_svd(B, A).S, decompose(B @ A).S[: B.shape[1]], rtol=1e-9, atol=1e-12)


def test_dora_is_no_low_rank_update(tmp_path):
    make(tmp_path, *CASES["dora"])
    tuned = open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    assert all(tuned.delta_factors(name) is None for name in tuned)


def test_an_adalora_adapter_whose_ranks_were_cut(tmp_path):
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, tinit=1, tfinal=1, deltaT=1, total_step=10, lora_alpha=8, target_modules=LINEAR
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(llama().__class__.from_pretrained(tmp_path / "base"), config)
        shake(tuned)
        for step in range(1, 11):
            tuned(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
            tuned.base_model.update_and_allocate(step)
        tuned.save_pretrained(tmp_path / "adapter")
        saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert saved["rank_pattern"]
        merged = peft.PeftModel.from_pretrained(
            llama().__class__.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ).merge_and_unload()
    got = open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    for name, tensor in merged.state_dict().items():
        assert_float32_equal(got[name], tensor, name)


def test_a_converted_pissa_adapter(tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=LINEAR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), config)
        tuned.peft_config["default"].init_lora_weights = True
        tuned.save_pretrained(tmp_path / "initial")
        tuned.peft_config["default"].init_lora_weights = "pissa"
        shake(tuned)
        tuned.save_pretrained(
            tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
        merged = tuned.merge_and_unload()
    got = open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    for name, tensor in merged.state_dict().items():
        assert_float32_equal(got[name], tensor, name)


def test_a_base_saved_without_its_head_and_prefix(tmp_path):
    merged = make(tmp_path, *CASES["Conv1D"])
    gpt2().transformer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "body")
    base = open_checkpoint(tmp_path / "body")
    assert "h.0.attn.c_attn.weight" in base
    tuned = open_tuned(tmp_path / "adapter", base)
    assert_float32_equal(tuned["h.0.attn.c_attn.weight"], merged["transformer.h.0.attn.c_attn.weight"], "c_attn")


def test_a_base_without_the_trained_head(tmp_path):
    merged = make(tmp_path, *CASES["head"])
    bert().bert.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "body")
    base = open_checkpoint(tmp_path / "body")
    tuned = open_tuned(tmp_path / "adapter", base)
    assert "classifier.weight" not in base
    assert torch.equal(tuned["classifier.weight"], merged["classifier.weight"])
    name = "encoder.layer.0.attention.self.query.weight"
    assert_float32_equal(tuned[name], merged["bert." + name], name)


def test_an_adapter_that_fits_two_towers_is_not_guessed(tmp_path):
    make(tmp_path, *CASES["lora"])
    weights = load_file(tmp_path / "base" / "model.safetensors")
    towers = {f"{tower}.{name}": w.clone() for tower in ("text", "vision") for name, w in weights.items()}
    with pytest.raises(InputError, match="several parts of the base"):
        open_tuned(tmp_path / "adapter", open_checkpoint(towers))
    towers |= {name: w[:, :8].clone() for name, w in towers.items() if name.startswith("vision") and w.ndim == 2}
    base = open_checkpoint(towers)
    tuned = open_tuned(tmp_path / "adapter", base)
    changed = {name for name in tuned if tuned.entries[name] is not base.entries[name]}
    assert changed
    assert all(name.startswith("text.") for name in changed)


def test_a_narrow_base_does_not_swallow_a_small_update(tmp_path):
    make(tmp_path, *CASES["lora"])
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: w.bfloat16() for name, w in weights.items()}, tmp_path / "base" / "model.safetensors")
    base = open_checkpoint(tmp_path / "base")
    tuned = open_tuned(tmp_path / "adapter", base)
    name = "model.layers.0.self_attn.q_proj.weight"
    B, A = tuned.delta_factors(name)
    assert tuned.entries[name].dtype == "float32"
    delta = tuned[name].double() - base[name].double()
    assert float((delta - B @ A).abs().max()) <= 8 * EPS * float(tuned[name].abs().max())


def test_an_adapter_whose_base_is_not_there_is_refused(tmp_path):
    make(tmp_path, *CASES["lora"])
    config = tmp_path / "adapter" / "adapter_config.json"
    named = json.loads(config.read_text())
    config.write_text(json.dumps({**named, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match=r"its base .*gone is not there"):
        open_checkpoint(tmp_path / "adapter")


def test_a_wrong_base_is_refused(tmp_path):
    make(tmp_path, *CASES["lora"])
    bert().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"has no '.*_proj'"):
        open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "other"))
    llama_wide = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=50
    )
    transformers.LlamaForCausalLM(llama_wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="do not make the base's"):
        open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "wide"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "kind 'IA3'.*merge_and_unload"),
        ({"init_lora_weights": "olora"}, "changes the base.*path_initial_model"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"alora_invocation_tokens": [1, 2]}, "some tokens only"),
        ({"lora_alpha": "eight"}, "lora_alpha"),
        ({"alpha_pattern": {"(": 2}}, "no pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)  # fmt: skip
def test_adapters_that_the_formulas_do_not_cover_are_refused(change, message, tmp_path):
    make(tmp_path, *CASES["lora"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))


def test_no_tensor_of_an_adapter_is_dropped_in_silence(tmp_path):
    make(tmp_path, *CASES["lora"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.model.layers.0.lora_strange": torch.ones(2, 2)}, path)
    with pytest.raises(InputError, match="lora_strange"):
        open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    half = {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in name}
    save_file(half, path)
    with pytest.raises(InputError, match=r"q_proj has A; want the factors"):
        open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    save_file(tensors, path)
    config = path.with_name("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(InputError, match="no magnitudes"):
        open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    path.unlink()
    with pytest.raises(InputError, match="without weights"):
        open_tuned(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config)


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


RENAMED = {
    "attention of ViT": (vit, ["q_proj", "o_proj", "fc1"], ["classifier"]),
    "gate of Mixtral": (mixtral, ["q_proj", "v_proj"], ["gate"]),
}


@pytest.mark.parametrize("case", RENAMED)
def test_families_whose_parameters_are_renamed_in_memory(case, tmp_path):
    model, targets, saved = RENAMED[case]
    torch.manual_seed(0)
    model().save_pretrained(tmp_path / "base")
    live = type(model()).from_pretrained(tmp_path / "base")
    targets = [t for t in targets if any(name.endswith(t) for name, _ in live.named_modules())]
    assert targets
    adapted = peft.get_peft_model(live, peft.LoraConfig(r=4, target_modules=targets, modules_to_save=saved))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")  # transformers gives the stored names back
    base, oracle = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "merged")
    tuned = open_tuned(tmp_path / "adapter", base)
    assert set(tuned) == set(oracle)
    assert any(not torch.equal(oracle[name], base[name]) for name in base)
    for name in oracle:
        assert_float32_equal(tuned[name], oracle[name], name)


@pytest.mark.parametrize("options", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}])
def test_the_tuned_model_is_of_the_class_that_the_adapter_was_trained_on(options, tmp_path):
    make(tmp_path, bert, lambda: peft.LoraConfig(r=4, target_modules=["query"], **options))
    bert().bert.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "body")
    base = open_checkpoint(tmp_path / "body")
    assert base.config["architectures"] == ["BertModel"]
    config = open_tuned(tmp_path / "adapter", base).config
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3
