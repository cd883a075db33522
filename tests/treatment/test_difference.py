"""A finetune as a difference of few bits: what is read back, what it holds, and that no other choice holds more."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import specbasis
from specbasis import InputError, extract, open_checkpoint
from specbasis.checkpoint import open_tuned
from specbasis.checkpoint.delta import expanded, packed, unpacked
from specbasis.treatment.quantised import DISTORTION, STEP, Curve, quantised, shared_out
from tests.pico import bert_state, finetuned, write

BASE = bert_state(width=32)
TUNED = finetuned(BASE, 0.1) | {"classifier.weight": torch.ones(2, 32), "pooler.dense.bias": torch.ones(32)}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "base.safetensors", BASE), write(tmp_path / "tuned.safetensors", TUNED)


def extracted(models: tuple[Path, Path], out: Path, **options: object) -> dict[str, torch.Tensor]:
    extract(*models, out, form="delta", **options)
    return dict(open_tuned(out, open_checkpoint(models[0])))


@given(bits=st.sampled_from([1, 2, 4]), out=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 1000))
def test_codes_are_unpacked_as_they_were_packed(bits: int, out: int, width: int, seed: int) -> None:
    codes = torch.randint(2**bits, (out, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    stored = packed(codes, bits)
    assert len(stored) == -(-out * width * bits // 8)
    assert torch.equal(unpacked(stored, bits, (out, width)), codes)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_loss_of_normal_numbers_is_that_of_the_best_uniform_quantiser(bits: int) -> None:
    """By brute force over steps, on the same numbers."""
    x = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    half = 2 ** (bits - 1)

    def lost(step: float) -> float:
        levels = ((x / step).floor() + 0.5).clamp(0.5 - half, half - 0.5)
        return float((x - step * levels).square().sum() / x.square().sum())

    best = min(np.linspace(0.5, 1.5, 101) * STEP[bits], key=lost)
    assert best == pytest.approx(STEP[bits], rel=0.03)
    assert lost(STEP[bits]) == pytest.approx(DISTORTION[bits], rel=0.02)
    parts = quantised(x, None, None, bits)
    mine = float((expanded(parts, bits, (1, x.shape[1])) - x).square().sum() / x.square().sum())
    assert mine <= lost(STEP[bits]) * (1 + 1e-6)


def test_directions_and_bits_are_the_best_of_their_size() -> None:
    rng = np.random.default_rng(0)
    curves = [Curve(np.sort(rng.exponential(size=6) ** 3)[::-1], (8, 6)) for _ in range(3)]
    options = list(itertools.product(range(7), DISTORTION))
    sizes = [[(float(c.bytes(b)[r]), float(c.lost(b)[r])) for r, b in options] for c in curves]
    for budget in (60, 120, 200, 400):
        chosen = shared_out(curves, budget, 1.0)
        size, lost = (sum(s[options.index(p)][i] for s, p in zip(sizes, chosen, strict=True)) for i in (0, 1))
        assert size <= budget
        better = [
            sum(p[1] for p in picks) for picks in itertools.product(*sizes) if sum(p[0] for p in picks) <= size
        ]
        assert lost <= min(better) * (1 + 1e-9)


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"energy": 0.999}, {"size": 12_000}])
def test_what_is_read_back_holds_what_the_record_says(models, tmp_path: Path, options: dict) -> None:
    tensors = extracted(models, tmp_path / "out", **options)
    record = json.loads((tmp_path / "out" / "specbasis_extract.json").read_text())
    for line in record["matrices"]:
        name = line["name"]
        delta = TUNED[name].double() - BASE[name].double()
        lost = (tensors[name].double() - TUNED[name].double()).square().sum() / delta.square().sum()
        assert line["share"] == pytest.approx(1 - float(lost), abs=1e-5)
    if "energy" in options:
        assert record["total"]["share"] >= options["energy"] - 0.01
    for name in ("classifier.weight", "pooler.dense.bias"):
        assert torch.equal(tensors[name], TUNED[name])


def test_the_file_is_no_larger_than_it_was_to_be(models, tmp_path: Path) -> None:
    extracted(models, tmp_path / "out", size=15_000)
    stored = load_file(tmp_path / "out" / "delta.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size <= 15_000
    assert size == json.loads((tmp_path / "out" / "specbasis_extract.json").read_text())["total"]["bytes"]


def test_rows_that_did_not_change_are_not_stored(tmp_path: Path) -> None:
    embedding = "embeddings.word_embeddings.weight"
    tuned = BASE | {embedding: BASE[embedding].clone()}
    tuned[embedding][[3, 7]] += 0.1
    pair = write(tmp_path / "base.safetensors", BASE), write(tmp_path / "tuned.safetensors", tuned)
    tensors = extracted(pair, tmp_path / "out", energy=0.999)
    rest = [i for i in range(30) if i not in (3, 7)]
    assert torch.equal(tensors[embedding][rest], BASE[embedding][rest])
    torch.testing.assert_close(tensors[embedding], tuned[embedding], atol=3e-3, rtol=0)
    assert load_file(tmp_path / "out" / "delta.safetensors")[f"{embedding}|rows"].tolist() == [3, 7]


def test_a_difference_is_a_finetune_wherever_one_is_taken(models, tmp_path: Path) -> None:
    extracted(models, tmp_path / "out", energy=0.99)
    comparison = specbasis.compare(models[0], tmp_path / "out")
    assert comparison.verdicts[comparison.pairs[0]].kind == "finetuned"


def test_matrices_that_are_stored_in_out_are_put_back_so(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 16}
    for name in ("base", "tuned"):
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
        if name == "tuned":
            model.load_state_dict(finetuned(dict(open_checkpoint(tmp_path / "base")), 0.05), strict=False)
        model.save_pretrained(tmp_path / name)
    tensors = extracted((tmp_path / "base", tmp_path / "tuned"), tmp_path / "out", energy=0.9999)
    tuned = open_checkpoint(tmp_path / "tuned")
    for name, tensor in tuned.items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-3, rtol=0)


def test_a_base_of_another_shape_is_refused(models, tmp_path: Path) -> None:
    extracted(models, tmp_path / "out")
    with pytest.raises(InputError, match="give the base that it was extracted from"):
        open_tuned(tmp_path / "out", open_checkpoint(bert_state(width=16)))


@pytest.mark.parametrize("damage", ["bits", "shape", "lost", "rank", "rows", "no list", "version"])
def test_a_damaged_folder_is_one_line(models, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    extracted(models, out)
    record = json.loads((out / "delta.json").read_text())
    tensors = load_file(out / "delta.safetensors")
    name = next(n for n, about in record["matrices"].items() if about["bits"])
    if damage == "bits":
        record["matrices"][name]["bits"] = 3
    if damage == "shape":
        record["matrices"][name]["shape"] = [10**9, 10**9]
    if damage == "lost":
        del tensors[f"{name}|codes"]
    if damage == "rank":
        tensors[f"{name}|scale"] = torch.zeros(1)
    if damage == "rows":
        tensors[f"{name}|rows"] = torch.full((32,), 99, dtype=torch.int32)
    if damage == "no list":
        record["matrices"] = 7
    if damage == "version":
        record["delta"] = 2
    (out / "delta.json").write_text(json.dumps(record))
    save_file(tensors, out / "delta.safetensors")
    with pytest.raises(InputError):
        dict(open_tuned(out, open_checkpoint(models[0])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "shares out bits"),
        ({"size": 100}, "carried whole takes"),
        ({"dtype": "float16"}, "shares out"),
    ],
)
def test_what_a_difference_cannot_be_is_said(models, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract(*models, tmp_path / "out", form="delta", **options)
    assert not (tmp_path / "out").exists()
