"""Where a parameter stands in the live model: transformers' own modules are the oracle."""

from __future__ import annotations

import pytest
import torch

from specbasis.checkpoint import open_checkpoint
from specbasis.treatment.modules import LOW_RANK, holders

from .models import bert, convnext, deberta, gpt2, llama, mixtral, t5, vit


@pytest.mark.parametrize("make", [bert, convnext, deberta, gpt2, llama, t5, vit])
def test_every_parameter_stands_in_a_module_of_the_live_model(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    found, model_class = holders(open_checkpoint(tmp_path), frozenset())
    assert model_class == type(model).__name__
    live = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(found) == len(live)
    for holder in found.values():
        owner = model.get_submodule(holder.module)
        assert live.pop(id(getattr(owner, holder.leaf)))
        assert not holder.kind or holder.kind in [cls.__name__ for cls in type(owner).__mro__]
    assert not live


def test_tied_weights_know_of_each_other(tmp_path):
    model = llama(tied=True)
    model.save_pretrained(tmp_path)
    found, _ = holders(open_checkpoint(tmp_path), frozenset())
    assert found["model.embed_tokens.weight"].twins == ("lm_head",)
    both = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= both.keys()
    torch.save(both, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    found, _ = holders(open_checkpoint(tmp_path), frozenset())
    assert found["lm_head.weight"].module == "lm_head"
    assert found["model.embed_tokens.weight"].module == "model.embed_tokens"


@pytest.mark.parametrize(
    ("make", "leaf"),
    [
        (deberta, "rel_embeddings.weight"),
        (convnext, "dwconv.weight"),
        (bert, "LayerNorm.weight"),
        (vit, "cls_token"),
    ],
)
def test_no_low_rank_update_where_it_would_have_no_effect(make, leaf, tmp_path):
    make().save_pretrained(tmp_path)
    found, _ = holders(open_checkpoint(tmp_path), frozenset())
    kinds = {name: holder.kind for name, holder in found.items()}
    assert [kind for name, kind in kinds.items() if name.endswith(leaf)]
    assert not any(kind for name, kind in kinds.items() if name.endswith(leaf))
    assert any(kind in LOW_RANK for kind in kinds.values())


def test_experts_that_are_one_tensor_in_memory_keep_the_names_that_they_are_stored_by(tmp_path):
    mixtral().save_pretrained(tmp_path)
    base = open_checkpoint(tmp_path)
    found, _ = holders(base, frozenset())
    for name in base:
        if ".experts." in name:
            assert f"{found[name].module}.{found[name].leaf}" == name


def test_without_a_configuration_shapes_tell():
    shapes = {
        "layer.weight": (4, 3), "words.weight": (9, 4), "norm.weight": (4,), "layer.bias": (4,),
        "mix.in_proj_weight": (6, 2), "mix.out_proj.weight": (2, 2), "out_proj.weight": (2, 2),
        "conv.weight": (4, 3, 5, 5), "deep.weight": (4, 1, 5, 5),
    }  # fmt: skip
    state = open_checkpoint({name: torch.ones(shape) for name, shape in shapes.items()})
    found, model_class = holders(state, frozenset({"words.weight"}))
    assert model_class == ""
    kinds = {name: holder.kind for name, holder in found.items()}
    assert kinds == {
        "layer.weight": "Linear", "words.weight": "Embedding", "norm.weight": "", "layer.bias": "",
        "mix.in_proj_weight": "", "mix.out_proj.weight": "", "out_proj.weight": "Linear",
        "conv.weight": "Conv2d", "deep.weight": "",
    }  # fmt: skip
