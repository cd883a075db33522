"""What a filter admits is what the whole comparison finds there, and no tensor is read to find it."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from specbasis.architecture.key import ROLES
from specbasis.architecture.pair import Pairing, pair
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import Checkpoint, Entry
from specbasis.comparison.options import Options
from specbasis.core.errors import InputError

from .test_recognition import NEOX, bert_layer, neox_layer, stored
from .test_recorded import recorded

Shapes = dict[str, tuple[int, ...]]


def renamed(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    entries = {prefix + name: entry for name, entry in checkpoint.entries.items()}
    return Checkpoint("renamed", entries, (), checkpoint.config)


def deberta() -> Checkpoint:
    shapes: Shapes = {"embeddings.word_embeddings.weight": (40, 12)}
    for n in range(6):
        p = f"encoder.layer.{n}."
        shapes |= {
            p + "attention.self.in_proj.weight": (36, 12), p + "attention.self.pos_proj.weight": (12, 12),
            p + "attention.self.q_bias": (12,), p + "attention.output.dense.weight": (12, 12),
            p + "intermediate.dense.weight": (20, 12), p + "output.dense.weight": (12, 20),
        }  # fmt: skip
    return stored(shapes, {"num_attention_heads": 3, "hidden_size": 12})


def llama_with_experts() -> Checkpoint:
    shapes: Shapes = {"model.embed_tokens.weight": (40, 12)}
    for n in range(4):
        p = f"model.layers.{n}."
        shapes |= {f"{p}self_attn.{x}_proj.weight": (12 if x in "qo" else 6, 12) for x in "qkvo"}
        shapes |= {p + "mlp.experts.gate_up_proj": (3, 12, 20), p + "mlp.experts.down_proj": (3, 10, 12)}
        shapes |= {p + "input_layernorm.weight": (12,), p + "mlp.gate.weight": (3, 12)}
    return stored(shapes | {"lm_head.weight": (40, 12)})


def towers() -> Checkpoint:
    """Two stacks of the same names and of different depth and width."""
    text = {"text_encoder." + name: shape for n in range(2) for name, shape in bert_layer(f"layer.{n}.").items()}
    image = {
        "image_encoder." + name: shape for n in range(4) for name, shape in bert_layer(f"layer.{n}.", 6).items()
    }
    return stored(text | image)


def berts(blocks: int = 6) -> Checkpoint:
    shapes: Shapes = {"bert.embeddings.word_embeddings.weight": (30, 8)}
    for n in range(blocks):
        shapes |= bert_layer(f"bert.encoder.layer.{n}.") | {f"bert.encoder.layer.{n}.output.dense.bias": (8,)}
    return stored(shapes | {"bert.pooler.dense.weight": (8, 8), "extra.table": (5, 8)})


def neox() -> Checkpoint:
    shapes = {name: shape for n in range(8) for name, shape in neox_layer(n).items()}
    return stored(shapes | {"gpt_neox.embed_in.weight": (40, 12), "embed_out.weight": (40, 12)}, NEOX)


def gpt2(transposed: bool) -> Checkpoint:
    shapes: Shapes = {"wte.weight": (40, 12), "wpe.weight": (8, 12)}
    for n in range(4):
        block = {"attn.c_attn": (36, 12), "attn.c_proj": (12, 12), "mlp.c_fc": (48, 12), "mlp.c_proj": (12, 48)}
        shapes |= {f"h.{n}.{k}.weight": s[::-1] if transposed else s for k, s in block.items()}
    return stored(shapes)


def swin() -> Checkpoint:
    return recorded("timm", "swin_base_patch4_window7_224")


MODELS = {
    "bert": berts, "deberta": deberta, "experts": llama_with_experts, "towers": towers, "neox": neox,
    "gpt2": lambda: gpt2(True), "gpt2 linear": lambda: gpt2(False), "swin": swin,
    "labram": lambda: recorded("published", "LaBraM finetuned"),
    "unknown": lambda: stored({f"net.{n}.w{i}.weight": (4 + i, 5) for n in range(4) for i in range(3)}),
}  # fmt: skip


@cache
def model(name: str) -> Checkpoint:
    """A model whose embedding and head are tied where their shapes agree, as every entry reads the same."""
    return MODELS[name]()


@cache
def whole(name: str, prefix: str) -> Pairing:
    return pair(model(name), renamed(model(name), prefix))


def names(pairing: Pairing) -> list[tuple[object, ...]]:
    return [(m.key, m.base, m.tuned) for m in pairing.matched]


PATTERNS = [
    "",
    "*.1.*",
    "*.2.attn*",
    "*query*",
    "*[[]key]",
    "*experts*[[]1]*",
    "*dense.weight",
    "net.?.w1*",
    "*head*",
]
FILTERS = st.fixed_dictionaries(
    {
        "roles": st.lists(st.sampled_from([*ROLES, "attention", "ffn"]), max_size=2).map(tuple),
        "blocks": st.lists(st.integers(0, 11), max_size=2).map(tuple),
        "name": st.sampled_from(PATTERNS),
    }
)


@given(st.sampled_from(sorted(MODELS)), FILTERS, st.sampled_from(["", "wrapped.net."]))
def test_a_filter_gives_what_the_whole_comparison_gives_there(
    name: str, wanted: dict[str, Any], prefix: str
) -> None:
    options = Options(**wanted)
    base, tuned = model(name), renamed(model(name), prefix)
    full = whole(name, prefix)
    want = [(m.key, m.base, m.tuned) for m in full.matched if options.admits(m.key)]
    here = pair(base, tuned, admits=options.filter)
    assert names(here) == want
    assert here.family == full.family
    assert set(here.skipped) <= set(full.skipped)
    for item in full.skipped:
        if "tied weights" in item.reason and item not in here.skipped:
            (ref,) = (r for r in model_map(base).shared if r.key.name == item.name)
            assert not options.admits(ref.key)


@pytest.mark.parametrize("prefix", ["", "wrapped."])
def test_recognition_and_pairing_read_no_tensor_but_those_that_may_be_tied(prefix: str) -> None:
    read: list[str] = []

    def load(name: str) -> torch.Tensor:
        read.append(name)
        return torch.ones(2, 2)

    entries = {name: replace(e, load=partial(load, name)) for name, e in llama_with_experts().entries.items()}
    base = Checkpoint("counted", entries)
    for options in (Options(roles=("attention",), blocks=(2,)), Options(name="*layers.3.*[[]2][[]gate]")):
        assert pair(base, renamed(base, prefix), admits=options.filter).matched
    assert read == []
    pair(base, renamed(base, prefix))
    assert set(read) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_gated_layer_whose_neighbour_is_filtered_out_does_not_pass_as_ffn_up() -> None:
    shapes = bert_layer("encoder.layer.0.") | {"encoder.layer.0.output.dense.weight": (8, 12)}
    mapped = model_map(stored(shapes), admits=Options(name="*intermediate*").filter)
    assert [ref.key.role for ref in mapped.matrices] == ["other"]
    assert mapped.unnamed == ("encoder.layer.0.intermediate.dense.weight",)
    assert any("have the role other" in note for note in mapped.notes)
    assert not model_map(stored(shapes), admits=Options(roles=("ffn.up",)).filter).matrices


def test_what_is_not_asked_for_is_not_listed() -> None:
    base = berts(3)
    tuned = renamed(base, "")
    tuned = Checkpoint("tuned", {**tuned.entries, "classifier.weight": Entry((3, 8), "float32", torch.empty)})
    everything = pair(base, tuned)
    assert {"extra.table", "classifier.weight"} <= {m.key.name for m in everything.matched} | {
        s.name for s in everything.skipped
    }
    assert [s.name for s in pair(base, tuned, admits=Options(roles=("head",)).filter).skipped] == [
        "classifier.weight"
    ]
    assert not pair(base, tuned, admits=Options(roles=("ffn",)).filter).skipped
    assert not any("hold no matrix" in n for n in pair(base, tuned, admits=Options(blocks=(2,)).filter).notes)


def test_ties_are_known_whatever_is_asked_for() -> None:
    tied = llama_with_experts()
    head = model_map(tied, admits=Options(roles=("head",)).filter)
    assert not head.matrices
    assert head.skipped[0].reason.startswith("holds the values of model.embed_tokens")
    (embedding,) = model_map(tied, admits=Options(roles=("embedding",)).filter).matrices
    assert embedding.parameter == "model.embed_tokens.weight"


def test_shapes_decide_between_towers_that_names_do_not_tell_apart() -> None:
    both = towers()
    for stack in ("text_encoder.", "image_encoder."):
        part = {name.removeprefix(stack): e for name, e in both.entries.items() if name.startswith(stack)}
        # As many blocks as both towers have: names alone fit either.
        part = {name: e for name, e in part.items() if name.startswith(("layer.0.", "layer.1."))}
        for options in (Options(roles=("attention.query",)), Options(roles=("ffn",), blocks=(0,))):
            found = pair(both, Checkpoint("part", part), admits=options.filter)
            assert found.matched
            assert all(m.base.parameter == stack + m.tuned.parameter for m in found.matched)


def test_nothing_in_common_is_said() -> None:
    with pytest.raises(InputError, match="no parameter in common"):
        pair(berts(), stored({"a.b": (5, 5)}), admits=Options(roles=("embedding",)).filter)
    # The last components agree, and the shapes do not.
    with pytest.raises(InputError, match="no parameter in common"):
        pair(berts(), stored({"a.weight": (5, 5)}), admits=Options(roles=("head",)).filter)
