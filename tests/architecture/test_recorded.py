"""Families whose libraries are not installed here: names and shapes recorded from them by fixtures/record.py."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from specbasis.architecture.family import STRUCTURAL
from specbasis.architecture.recognise import ModelMap, coverage, model_map
from specbasis.checkpoint import Checkpoint, Entry

FIXTURES = Path(__file__).parents[1] / "fixtures"
ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")
CROSS = tuple(f"cross_{role}" for role in ATTENTION)
MLP = ("ffn.up", "ffn.down")


def recorded(library: str, model: str) -> Checkpoint:
    found: dict[str, Any] = json.loads((FIXTURES / f"{library}.json").read_text())["models"][model]

    def read(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape)

    entries = {
        name: Entry(tuple(shape), "float32", lambda shape=tuple(shape): read(shape))
        for name, shape in found["parameters"].items()
    }
    return Checkpoint(f"{library} {model}", entries, (), found["config"])


def counts(mapped: ModelMap, stack: str | None = None) -> dict[str, int]:
    """Matrices of each attention and feed-forward role in a stack."""
    return dict(
        Counter(
            ref.key.role
            for ref in mapped.matrices
            if ref.key.role.startswith(("attention", "cross_attention", "ffn")) and stack in (None, ref.key.stack)
        )
    )


def blocks(mapped: ModelMap, role: str, stack: str | None = None) -> list[int]:
    """Blocks that hold a role, in the order in which the matrices are stored."""
    found = [ref.key.block for ref in mapped.matrices if ref.key.role == role and stack in (None, ref.key.stack)]
    return sorted(block for block in found if block is not None)


def numbers(checkpoint: Checkpoint, leaf: str) -> list[tuple[int, ...]]:
    """The oracle of block numbers: the numbers in the names of one leaf, in their natural order."""
    return sorted(
        tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name))) for name in checkpoint if name.endswith(leaf)
    )


VIT_LIKE = [
    ("timm", "vit_base_patch16_224", 3), ("timm", "vit_large_patch16_224", 2),
    ("timm", "swin_base_patch4_window7_224", 10), ("timm", "swin_large_patch4_window7_224", 5),
    ("braindecode", "Labram", 3), ("braindecode", "Labram decoder", 3),
    ("published", "LaBraM finetuned", 3), ("published", "LaBraM pretrained", 3),
    ("published", "Brain-JEPA encoder", 3), ("published", "Brain-JEPA predictor", 3),
    ("published", "Brain-JEPA finetuned", 3),
]  # fmt: skip


@pytest.mark.parametrize(("library", "model", "depth"), VIT_LIKE)
def test_fused_vision_transformers(library: str, model: str, depth: int) -> None:
    checkpoint = recorded(library, model)
    mapped = model_map(checkpoint)
    assert counts(mapped) == dict.fromkeys((*ATTENTION, *MLP), depth)
    for role in (*ATTENTION, *MLP):
        assert blocks(mapped, role) == list(range(depth))
    assert not mapped.unnamed
    for ref in mapped.matrices:
        stored = checkpoint.entries[ref.parameter].shape
        if ref.key.role in ATTENTION[:3]:
            third = stored[0] // 3
            start = ATTENTION.index(ref.key.role) * third
            assert (ref.rows, ref.shape) == ((start, start + third), (third, stored[1]))
        elif ref.key.role in (*MLP, "attention.output"):
            assert ref.shape == stored
    assert not any("relative_position_bias_table" in ref.parameter for ref in mapped.matrices)


def test_swin_counts_its_blocks_on_over_the_stages() -> None:
    checkpoint = recorded("timm", "swin_base_patch4_window7_224")
    mapped = model_map(checkpoint)
    by_place = {ref.parameter: ref.key.block for ref in mapped.matrices if ref.key.role == "ffn.up"}
    for block, (stage, layer) in enumerate(numbers(checkpoint, "mlp.fc1.weight")):
        assert by_place[f"layers.{stage}.blocks.{layer}.mlp.fc1.weight"] == block


@pytest.mark.parametrize("model", ["convnext_nano", "convnext_base", "convnext_large_mlp", "convnext_xxlarge"])
def test_convnext(model: str) -> None:
    checkpoint = recorded("timm", model)
    mapped = model_map(checkpoint)
    depth = len(numbers(checkpoint, "conv_dw.weight"))
    assert counts(mapped) == dict.fromkeys(MLP, depth)
    assert (
        blocks(mapped, "ffn.up") == blocks(mapped, "ffn.down") == blocks(mapped, "conv")[-depth:] == [*range(depth)]
    )
    assert not mapped.unnamed
    assert coverage(mapped, checkpoint).named == pytest.approx(1.0)
    for ref in mapped.matrices:
        if ref.key.role == "ffn.up":
            assert ref.shape[0] == 4 * ref.shape[1]
        if ref.key.role == "ffn.down":
            assert ref.shape[1] == 4 * ref.shape[0]


def test_openclip_towers_apart() -> None:
    mapped = model_map(recorded("open_clip", "ViT-B-32"))
    assert {stack for stack in (ref.key.stack for ref in mapped.matrices) if stack} == {"visual", "transformer"}
    for stack, width in (("visual", 768), ("transformer", 512)):
        assert counts(mapped, stack) == dict.fromkeys((*ATTENTION, *MLP), 2)
        for ref in mapped.matrices:
            if ref.key.stack == stack and ref.key.role in ATTENTION:
                assert ref.shape == (width, width)
    heads = {ref.parameter: ref for ref in mapped.matrices if ref.key.role == "head"}
    assert {name: ref.shape for name, ref in heads.items()} == {
        "visual.proj": (512, 768),
        "text_projection": (512, 512),
    }
    assert all(ref.transposed for ref in heads.values())


def test_openclip_with_a_timm_trunk_has_two_families() -> None:
    checkpoint = recorded("open_clip", "convnext_base")
    mapped = model_map(checkpoint)
    assert {family.name for family in mapped.towers.values()} == {"convnext_timm", "clip"}
    assert counts(mapped, "visual") == dict.fromkeys(MLP, len(numbers(checkpoint, "conv_dw.weight")))
    assert counts(mapped, "transformer") == dict.fromkeys((*ATTENTION, *MLP), 2)


def test_brainlm_encoder_and_decoder_apart() -> None:
    mapped = model_map(recorded("published", "BrainLM"))
    for stack, width in (("encoder", 40), ("decoder", 24)):
        assert counts(mapped, stack) == dict.fromkeys((*ATTENTION, *MLP), 3)
        assert blocks(mapped, "attention.query", stack) == [0, 1, 2]
        assert {ref.shape[1] for ref in mapped.matrices if ref.key.stack == stack and ref.key.role == "ffn.up"} == {
            width
        }
    assert not mapped.unnamed


def test_stable_diffusion_unet() -> None:
    mapped = model_map(recorded("diffusers", "UNet2DConditionModel"))
    gated = (*ATTENTION, *CROSS, "ffn.up", "ffn.gate", "ffn.down")
    for stack, depth in (("down_blocks", 2), ("mid_block", 2), ("up_blocks", 4)):
        assert counts(mapped, stack) == dict.fromkeys(gated, depth)
        assert blocks(mapped, "cross_attention.key", stack) == list(range(depth))
    assert not mapped.unnamed
    context = {ref.shape[1] for ref in mapped.matrices if ref.key.role == "cross_attention.key"}
    assert context == {48}


def test_diffusion_transformers() -> None:
    pixart = model_map(recorded("diffusers", "PixArtTransformer2DModel"))
    assert counts(pixart) == dict.fromkeys((*ATTENTION, *CROSS, *MLP), 2)
    joint = counts(model_map(recorded("diffusers", "SD3Transformer2DModel")))
    # Two streams in each of three blocks; the last block has no output and no feed-forward layer for the text.
    assert joint == dict.fromkeys(ATTENTION[:3], 6) | dict.fromkeys(("attention.output", *MLP), 5)
    flux = model_map(recorded("diffusers", "FluxTransformer2DModel"))
    assert counts(flux, "single_transformer_blocks") == dict.fromkeys((*ATTENTION, *MLP), 2)
    parts = [ref for ref in flux.matrices if ref.parameter == "single_transformer_blocks.0.proj_out.weight"]
    assert [(ref.key.role, ref.shape, ref.columns) for ref in parts] == [
        ("attention.output", (32, 32), (0, 32)),
        ("ffn.down", (32, 128), (32, 160)),
    ]


def test_look_alikes_never_get_a_role_by_their_names_alone() -> None:
    """The same names as timm's ViT hold other layouts; a split into thirds would be wrong."""
    tiny = model_map(recorded("timm", "tiny_vit_5m_224"))  # interleaved by head
    assert tiny.family is STRUCTURAL
    assert not counts(tiny)
    gcvit = model_map(recorded("timm", "gcvit_xxtiny"))  # every second block has no query in it
    checkpoint = recorded("timm", "gcvit_xxtiny")
    for ref in gcvit.matrices:
        rows, columns = (*checkpoint.entries[ref.parameter].shape, 0)[:2]
        if ref.parameter.endswith("qkv.weight") and rows == 2 * columns:
            assert ref.key.role == "other"
            assert ref.parameter in gcvit.unnamed
    assert any("do not fit" in note for note in gcvit.notes)
    packed = model_map(
        recorded("timm", "vit_giant_patch14_dinov2")
    )  # fc1 holds gate and up, in an order of its own
    assert "ffn.up" not in counts(packed)
    assert "blocks.0.mlp.fc1.weight" in packed.unnamed
    coatnet = model_map(recorded("timm", "coatnet_nano_rw_224"))  # qkv is a convolution, interleaved by head
    assert not counts(coatnet)


def test_fixtures_say_where_they_come_from() -> None:
    for path in FIXTURES.glob("*.json"):
        found = json.loads(path.read_text())
        assert re.fullmatch(r"[\w-]+ \d[\w.+]*|none", found["library"])
        if found["library"] == "none":
            assert all("read in the source code" in model["config"]["source"] for model in found["models"].values())
