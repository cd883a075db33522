"""Models that are built from a stranger's configuration, for the names of their parameters alone."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from specbasis.checkpoint.entry import Checkpoint, Entry
from specbasis.checkpoint.live_names import without_memory

transformers = pytest.importorskip("transformers")

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100,
}  # fmt: skip


def described(config):
    """A file of one matrix of (100, 32) with this configuration beside it."""
    return Checkpoint("m", {"w": Entry((100, 32), "float32", Mock(side_effect=AssertionError))}, config=config)


def names(model):
    return [name for name, _ in model.named_parameters()]


def test_names_are_those_of_the_model_that_transformers_makes():
    model_class, config = transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA)
    with torch.device("meta"):
        wanted = model_class(config)
    assert names(without_memory(described(LLAMA))) == names(wanted)


SIZES = ("num_hidden_layers", "vocab_size", "hidden_size", "max_position_embeddings", "num_attention_heads")


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [10**5, 10**9, 10**18])
def test_no_size_is_believed_that_the_file_does_not_bear_out(field, value):
    model = without_memory(described({**LLAMA, field: value}))
    assert model is None or max(max(p.shape) for p in model.parameters()) < 10**5


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["SwinModel"], "model_type": "swin", "depths": [10**8, 10**8]},
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 10**9},
        {"architectures": ["XLMModel"], "model_type": "xlm", "sinusoidal_embeddings": True, "emb_dim": 10**9},
        {"architectures": ["XLMModel"], "model_type": "xlm", "sinusoidal_embeddings": True,
         "max_position_embeddings": 10**9, "emb_dim": 32, "n_heads": 4, "n_words": 100},
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
         "text_config": {"model_type": "llama", "num_hidden_layers": 10**9}},
    ],
)  # fmt: skip
def test_a_monster_is_not_built(config):
    model = without_memory(described(config))
    assert model is None or len(names(model)) < 1000


def test_a_model_of_more_parts_than_the_file_can_have_is_given_up():
    wide = Checkpoint(
        "m", {"w": Entry((10**9, 1), "float32", Mock())}, config={**LLAMA, "num_hidden_layers": 10**5}
    )
    assert without_memory(wide) is None
    assert names(without_memory(described(LLAMA)))  # and nothing of that stays behind


@pytest.mark.parametrize(
    "architectures", ["LlamaForCausalLM", ["pipeline"], ["Trainer"], ["AutoModel"], [5], {"a": 1}, [None], []]
)
def test_a_class_that_is_no_model(architectures):
    assert without_memory(described({**LLAMA, "architectures": architectures})) is None


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA, "auto_map": {"AutoModelForCausalLM": "someone/else--code.Model"}},
        {**LLAMA, "attn_implementation": "someone/kernels", "_attn_implementation": "someone/kernels"},
        {"architectures": ["TimmWrapperModel"], "model_type": "timm_wrapper", "architecture": "hf-hub:a/b"},
        {"architectures": ["TimmBackbone"], "model_type": "timm_backbone", "backbone": "resnet50",
         "use_pretrained_backbone": True},
        {"architectures": ["DetrModel"], "model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50",
         "use_pretrained_backbone": True},
    ],
)  # fmt: skip
def test_nothing_is_fetched_and_nothing_is_asked(monkeypatch, config):
    asked = Mock(side_effect=AssertionError("asked for what is elsewhere"))
    for name in ("socket.socket.connect", "socket.getaddrinfo", "builtins.input"):
        monkeypatch.setattr(name, asked)
    without_memory(described(config))
    asked.assert_not_called()
