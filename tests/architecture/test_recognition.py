"""Recognition: strict about evidence, indifferent to prefixes and wrong configurations, loud about the rest."""

import pickle
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from specbasis.architecture.family import STRUCTURAL, families
from specbasis.architecture.key import ROLES
from specbasis.architecture.pair import pair
from specbasis.architecture.recognise import model_map, recognise
from specbasis.checkpoint import Checkpoint, Entry
from specbasis.core.errors import InputError


def stored(shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None = None, **dtypes: str) -> Checkpoint:
    entries = {
        name: Entry(shape, dtypes.get(name, "float32"), lambda shape=shape: torch.ones(shape))
        for name, shape in shapes.items()
    }
    return Checkpoint("test", entries, (), config or {})


def bert_layer(prefix: str = "encoder.layer.0.", d: int = 8) -> dict[str, tuple[int, ...]]:
    square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    return {f"{prefix}{name}.weight": (d, d) for name in square} | {
        f"{prefix}intermediate.dense.weight": (3 * d, d),
        f"{prefix}output.dense.weight": (d, 3 * d),
    }


def neox_layer(n: int, d: int = 12) -> dict[str, tuple[int, ...]]:
    p = f"gpt_neox.layers.{n}."
    return {
        p + "attention.query_key_value.weight": (3 * d, d), p + "attention.dense.weight": (d, d),
        p + "mlp.dense_h_to_4h.weight": (4 * d, d), p + "mlp.dense_4h_to_h.weight": (d, 4 * d),
    }  # fmt: skip


def roles(checkpoint: Checkpoint) -> dict[str, str]:
    return {ref.key.name: ref.key.role for ref in model_map(checkpoint).matrices}


NEOX = {"model_type": "gpt_neox", "num_attention_heads": 3, "hidden_size": 12}


@pytest.mark.parametrize("prefix", ["", "bert.", "model.text.encoder_a.", "module.", "_orig_mod.", "a.0.b.", "12."])
def test_prefixes_do_not_matter(prefix: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(3):
        shapes |= bert_layer(f"{prefix}encoder.layer.{n}.")
    mapped = model_map(stored(shapes))
    assert mapped.family.name == "bert"
    assert sorted(ref.key.block for ref in mapped.matrices if ref.key.role == "ffn.up") == [0, 1, 2]  # type: ignore[type-var]
    assert not mapped.unnamed


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bert"},
        NEOX | {"num_attention_heads": 5},  # does not divide the rows
        NEOX | {"hidden_size": 64},  # another model's file
        NEOX | {"num_attention_heads": 0},
        NEOX | {"num_attention_heads": "3"},
        {"model_type": "gpt_neox"},
        {"text_config": NEOX, "vision_config": NEOX | {"num_attention_heads": 4}},  # two answers
    ],
)
def test_a_layout_that_only_the_config_tells_is_not_guessed(config: dict[str, Any]) -> None:
    checkpoint = stored(neox_layer(0) | neox_layer(1), config)
    mapped = model_map(checkpoint)
    fused = [ref for ref in mapped.matrices if "query_key_value" in ref.parameter]
    assert [(ref.key.role, ref.shape, ref.rows) for ref in fused] == [("other", (36, 12), None)] * 2
    assert {ref.key.block for ref in fused} == {0, 1}
    assert {ref.parameter for ref in fused} <= set(mapped.unnamed)
    assert mapped.notes
    assert roles(checkpoint)["gpt_neox.layers.1.attention.dense.weight"] == "attention.output"


@pytest.mark.parametrize("config", [NEOX, {"text_config": NEOX}])
def test_the_config_splits_by_head(config: dict[str, Any]) -> None:
    checkpoint = stored(neox_layer(0), config)
    W = torch.arange(36.0)[:, None].expand(36, 12).contiguous()
    for ref in model_map(checkpoint).matrices:
        if ref.key.role == "attention.key":
            assert ref.read({ref.parameter: W})[:, 0].tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]


def test_a_family_is_not_claimed_on_half_of_its_evidence() -> None:
    shapes = bert_layer()
    for left_out in ("intermediate.dense", "attention.self.query", "attention.output.dense"):
        part = {name: shape for name, shape in shapes.items() if left_out not in name}
        mapped = model_map(stored(part))
        assert mapped.family is STRUCTURAL
        assert {ref.key.role for ref in mapped.matrices} == {"other"}


def test_evidence_must_lie_in_one_stack() -> None:
    shapes = {name.replace("encoder.layer", "a"): s for name, s in bert_layer().items() if "self" in name}
    shapes |= {name.replace("encoder.layer", "b"): s for name, s in bert_layer().items() if "self" not in name}
    assert recognise(stored(shapes)) is STRUCTURAL


def test_a_name_with_another_shape_than_its_role_needs_falls_to_other() -> None:
    shapes = bert_layer() | {"encoder.layer.0.intermediate.dense.weight": (48, 8)}  # gate and up in one, say
    mapped = model_map(stored(shapes))
    assert roles(stored(shapes))["encoder.layer.0.intermediate.dense.weight"] == "other"
    assert mapped.unnamed == ("encoder.layer.0.intermediate.dense.weight",)
    assert "1 matrices" in mapped.notes[0]
    three_axes = bert_layer() | {"encoder.layer.0.attention.self.query.weight": (8, 8, 1)}
    assert "encoder.layer.0.attention.self.query.weight" not in roles(stored(three_axes))


def test_what_no_pattern_names_is_other_with_its_block_and_a_note() -> None:
    shapes = bert_layer() | {"encoder.layer.0.adapter.down.weight": (2, 8), "extra.weight": (3, 3)}
    mapped = model_map(stored(shapes))
    found = {ref.key.name: ref.key for ref in mapped.matrices}
    assert (
        found["encoder.layer.0.adapter.down.weight"].role,
        found["encoder.layer.0.adapter.down.weight"].block,
    ) == ("other", 0)
    assert found["extra.weight"].role == "other"
    assert set(mapped.unnamed) == {"encoder.layer.0.adapter.down.weight", "extra.weight"}


def test_missing_blocks_are_noticed() -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for n in (0, 1, 4):
        shapes |= bert_layer(f"encoder.layer.{n}.")
    assert any("blocks 2, 3" in note for note in model_map(stored(shapes)).notes)


def test_two_towers_of_different_families() -> None:
    vision = {name.replace("gpt_neox.layers", "language.layers"): shape for name, shape in neox_layer(0).items()}
    mapped = model_map(stored(bert_layer("vision.layer.0.") | vision, NEOX))
    assert {c: f.name for c, f in mapped.towers.items()} == {
        "vision.layer": "bert",
        "language.layers": "query_key_value",
    }
    assert {ref.key.stack for ref in mapped.matrices} == {"vision", "language"}


def test_weights_that_cannot_be_read_as_they_stand_are_skipped_with_the_reason() -> None:
    shapes: dict[str, tuple[int, ...]] = bert_layer()
    extra: dict[str, tuple[tuple[int, ...], str, str]] = {
        "encoder.layer.0.attention.self.query.lora_A.default.weight": ((2, 8), "float32", "adapter"),
        "g.qweight": ((8, 8), "int32", "int32"), "g.scales": ((4, 8), "float16", "scales"),
        "pos.conv.weight_v": ((8, 4, 3), "float32", "factor"), "attn.bias": ((1, 1, 9, 9), "float32", ""),
        "x.relative_position_bias_table": ((9, 2), "float32", "no linear map|not a linear map"),
        "pos_embed": ((1, 9, 8), "float32", "positions"), "cls_token": ((1, 1, 8), "float32", "vector"),
        "mystery": ((2, 3, 4), "float32", "unknown"),
    }  # fmt: skip
    checkpoint = stored(
        shapes | {n: s for n, (s, _, _) in extra.items()}, **{n: d for n, (_, d, _) in extra.items()}
    )
    mapped = model_map(checkpoint)
    reasons = {item.name: item.reason for item in mapped.skipped}
    assert set(reasons) == set(extra)
    for name, (_, _, words) in extra.items():
        assert any(word in reasons[name] for word in words.split("|")), (name, reasons[name])
    assert any("not merged" in note for note in mapped.notes)


def test_ties_are_compared_after_all_where_tuned_unties_them() -> None:
    torch.manual_seed(0)
    E = torch.randn(20, 8)
    layer = {name: torch.randn(shape) for name, shape in bert_layer().items()}
    names = ("embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")

    def checkpoint(a: Tensor, b: Tensor) -> Checkpoint:
        tensors = layer | dict(zip(names, (a, b), strict=True))
        entries = {n: Entry(tuple(t.shape), "float32", lambda t=t: t) for n, t in tensors.items()}
        return Checkpoint("test", entries)

    tied, untied = checkpoint(E, E.clone()), checkpoint(E, torch.randn(20, 8))
    assert names[1] not in {m.key.name for m in pair(tied, tied).matched}
    both = pair(tied, untied)
    assert names[1] in {m.key.name for m in both.matched}
    assert names[1] not in {s.name for s in both.skipped}
    assert names[1] in {m.key.name for m in pair(untied, tied).matched}
    told = Checkpoint("test", tied.entries, (), {"tie_word_embeddings": False})
    assert not model_map(told).shared  # the config's word is taken, and nothing is read


def mixture(layers: int) -> Checkpoint:
    """A mixture of 170 experts a layer: 514 parameters each."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, 8)}
    for n in range(layers):
        p = f"model.layers.{n}."
        shapes |= {p + f"self_attn.{x}_proj.weight": (8, 8) for x in "qkvo"}
        for e in range(170):
            q = p + f"mlp.experts.{e}."
            shapes |= {q + "gate_proj.weight": (6, 8), q + "up_proj.weight": (6, 8), q + "down_proj.weight": (8, 6)}
    return stored(shapes, {"tie_word_embeddings": False})


def test_work_grows_with_the_number_of_tensors_and_no_faster() -> None:
    def calls(checkpoint: Checkpoint) -> int:
        """Calls of Python and C functions: the work, whatever else the machine is doing."""
        count = 0

        def profile(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            mapped = model_map(checkpoint)
        finally:
            sys.setprofile(None)
        assert not mapped.unnamed
        assert len({ref.key.name for ref in mapped.matrices}) == len(mapped.matrices) == len(checkpoint)
        return count

    small, large = mixture(2), mixture(8)
    assert len(large) > 4000
    calls(small)  # compiles the patterns
    assert calls(large) < 6 * calls(small)  # four times the tensors; quadratic would be sixteen times the work


def test_refs_are_plain_values_that_survive_pickling() -> None:
    for ref in model_map(stored(neox_layer(0), NEOX)).matrices:
        assert pickle.loads(pickle.dumps(ref)) == ref
        assert hash(pickle.loads(pickle.dumps(ref))) == hash(ref)


@settings(max_examples=40, deadline=None)
@given(heads=st.integers(1, 4), size=st.integers(1, 3), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_write_is_the_inverse_of_read(heads: int, size: int, width: int, seed: int) -> None:
    """Reading all parts of a fused weight and writing them back elsewhere rebuilds it, bit for bit."""
    d = heads * size
    shapes: dict[str, tuple[int, ...]] = {
        "h.0.attention.query_key_value.weight": (3 * d, d), "h.0.attention.dense.weight": (d, d),
        "h.0.mlp.dense_h_to_4h.weight": (width, d), "h.0.mlp.dense_4h_to_h.weight": (d, width),
    }  # fmt: skip
    mapped = model_map(stored(shapes, {"model_type": "gpt_neox", "num_attention_heads": heads}))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    rebuilt = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for ref in mapped.matrices:
        ref.write(rebuilt[ref.parameter], ref.read(tensors))
    assert all(torch.equal(rebuilt[name], tensors[name]) for name in shapes)
    with pytest.raises(InputError, match="want"):
        mapped.matrices[0].write(rebuilt[mapped.matrices[0].parameter], torch.zeros(1, 99))


def test_every_family_file_is_whole() -> None:
    for family in families():
        assert family.title
        assert family.matrices
        assert family.recognised_by or family.name == "common"
        for entry in family.matrices:
            for role in entry.get("rows") or entry.get("columns") or [entry.get("role", "other")]:
                assert role in ROLES


def test_a_numbered_wrapper_is_dropped_and_blocks_are_not_confused() -> None:
    shapes = bert_layer("encoder.layer.0.") | bert_layer("encoder.layer.1.")
    wrapped = stored({f"0.auto_model.{name}": shape for name, shape in shapes.items()})
    for base, tuned in ((stored(shapes), wrapped), (wrapped, stored(shapes))):
        assert len(pair(base, tuned).matched) == len(shapes)
    with pytest.raises(InputError, match="no parameter in common"):
        pair(stored(bert_layer("layer.3.")), stored(bert_layer("layer.5.")))
