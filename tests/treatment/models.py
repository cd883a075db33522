"""Pico models of transformers, finetunes of them, and what plain PEFT makes of a folder."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(5, 19).reshape(2, 7)
TEXT = {"input_ids": IDS}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def bert(labels=3):
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=labels))


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=32, **TOKENS)
    return transformers.GPT2LMHeadModel(config)


def llama(tied=False):
    config = transformers.LlamaConfig(**SMALL, **TOKENS, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def vit():
    sizes = {**SMALL, "image_size": 16, "patch_size": 4}
    sizes.pop("vocab_size")
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], image_size=32, layer_scale_init_value=1.0
    )
    return transformers.ConvNextForImageClassification(config)


def mixtral():
    config = transformers.MixtralConfig(**SMALL, **TOKENS, num_key_value_heads=2, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


def deberta():
    config = transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        share_att_key=True, norm_rel_ebd="layer_norm", position_buckets=8,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(config)


def input_of(model):
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))}
    return {**TEXT, "decoder_input_ids": IDS} if model.config.is_encoder_decoder else TEXT


def shaken(model, size=0.05, only=""):
    """A copy whose parameters, those with ``only`` in their names, took a random step."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def pair(folder, make, tune=shaken, **options):
    """base/ and tuned/ in a folder, on disk; returns both models as loaded from there."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(folder / "base")
    tune(model, **options).save_pretrained(folder / "tuned")
    return type(model).from_pretrained(folder / "base"), type(model).from_pretrained(folder / "tuned")


def function(model):
    """What a model says of its input, in evaluation."""
    with torch.no_grad():
        output = model.eval()(**input_of(model))
    return output.logits if "logits" in output else output.last_hidden_state


def by_peft(model, folder):
    """What plain PEFT makes of a base and a folder: as adapter and merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of keys that it lacks
        warnings.filterwarnings("ignore", message=".*(tie|tied|fan_in_fan_out).*")
        adapted = peft.PeftModel.from_pretrained(model, folder)
    live = function(adapted)
    return live, function(adapted.merge_and_unload())


def assert_same_function(got, want, base=None):
    """Equal to rounding of float32, where a base's function is far away."""
    scale = float(want.abs().max())
    assert float((got - want).abs().max()) <= 2e-5 * scale
    assert base is None or float((base - want).abs().max()) > 1e-3 * scale
