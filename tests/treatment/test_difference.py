"""A finetune as a difference of few bits: what is read back, what it holds, and that no other choice holds more."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

import specbasis
from specbasis import InputError, extract, open_checkpoint
from specbasis.checkpoint import open_tuned
from specbasis.checkpoint.delta import expanded, packed, unpacked
from specbasis.treatment.budget import shared_out
from specbasis.treatment.difference import DISTORTION, STEP, curve, quantised, setting
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
    squares = [np.sort(rng.exponential(size=6) ** 3)[::-1] for _ in range(3)]
    curves = [curve(own, (8, 6)) for own in squares]
    sizes = [list(zip(c.bytes.tolist(), c.lost.tolist(), strict=True)) for c in curves]
    for budget in (60, 120, 200, 400):
        chosen = shared_out(curves, budget)
        size, lost = (sum(s[option][i] for s, option in zip(sizes, chosen, strict=True)) for i in (0, 1))
        assert size <= budget
        better = [
            sum(p[1] for p in picks) for picks in itertools.product(*sizes) if sum(p[0] for p in picks) <= budget
        ]
        assert lost <= min(better) * (1 + 1e-9)
        for own, option in zip(squares, chosen, strict=True):  # what an option stands for
            rank, bits = setting(option, 6)
            left = own[rank:].sum() * DISTORTION[bits]
            bytes_ = rank * (8 + 6 + 8) + (8 * 6 * bits // 8 + 4 * 8 if bits else 0)
            mine = curve(own, (8, 6))
            assert (mine.bytes[option], mine.lost[option]) == (bytes_, pytest.approx(left))


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"energy": 0.999}, {"size": 24_000}])
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
    extracted(models, tmp_path / "out", size=25_000)
    size = sum((tmp_path / "out" / name).stat().st_size for name in ("delta.safetensors", "delta.json"))
    assert 24_000 <= size <= 25_000
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


@pytest.mark.parametrize("form", ["delta", "lora"])
def test_a_base_of_other_files_is_named(models, tmp_path: Path, form: str) -> None:
    extract(*models, tmp_path / "out", form=form)
    other = write(tmp_path / "other.safetensors", {name: W + 0.1 for name, W in BASE.items()})
    found = [specbasis.compare(path, tmp_path / "out") for path in (models[0], other)]
    wrong = [[f.sentence for f in one.findings["out"] if f.kind == "wrong-base"] for one in found]
    assert wrong[0] == []
    assert "tuned was made from other files than those of" in wrong[1][0]


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
        ({"rank": 4}, "got rank with --as delta, which takes of these: energy, size"),
        ({"size": 100}, "carried whole takes"),
        ({"dtype": "float16", "energy": 0.5}, "got dtype with --as delta"),
    ],
)
def test_what_a_difference_cannot_be_is_said(models, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract(*models, tmp_path / "out", form="delta", **options)
    assert not (tmp_path / "out").exists()


def test_cached_decompositions_are_used_and_give_the_same(models, tmp_path: Path, monkeypatch) -> None:
    plain = extracted(models, tmp_path / "plain", energy=0.95)
    extracted(models, tmp_path / "first", energy=0.95, cache=tmp_path / "cache")
    entries = len(list((tmp_path / "cache").iterdir()))
    assert entries
    for name in ("decompose", "half_svd"):
        monkeypatch.setattr(f"specbasis.treatment.updates.{name}", lambda *_, **__: pytest.fail("decomposed"))
    monkeypatch.setattr("specbasis.jobs.cache.decompose", lambda *_, **__: pytest.fail("decomposed again"))
    second = extracted(models, tmp_path / "second", energy=0.95, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == entries
    for name, tensor in plain.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)


# --- what is changed, alone ---------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def mixed() -> dict[str, torch.Tensor]:
    """A finetune with whatever a file may hold, and what it left alone."""
    tuned = dict(finetuned(BASE, 0.1))
    name = next(name for name in BASE if name.endswith("query.weight"))
    tuned[name] = BASE[name].clone()  # left alone
    tuned[name.replace("query", "key")] = tuned[name.replace("query", "key")].to(torch.bfloat16)
    other = name.replace("query", "value")
    tuned[other] = tuned[other].double()
    output = next(name for name in BASE if name.endswith("output.dense.weight"))
    tuned[output] = BASE[output].double()  # equal numbers in another format
    bias = next(name for name in BASE if name.endswith("query.bias"))
    tuned[bias] = BASE[bias].clone()
    tuned[bias][0] = -0.0 if BASE[bias][0] == 0 else -BASE[bias][0]
    nan = next(name for name in BASE if name.endswith("key.bias"))
    tuned[nan] = torch.full_like(BASE[nan], torch.nan)
    extra = {"embeddings.position_ids": torch.arange(12)[None], "head.steps": torch.tensor(7)}
    extra["flags"] = torch.tensor([True, False])
    extra["packed.weight"] = torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4)
    return tuned | extra | {"classifier.weight": torch.ones(2, 32)}


def test_what_is_changed_alone_gives_back_the_finetune_bit_for_bit(tmp_path: Path) -> None:
    tuned = mixed()
    pair = write(tmp_path / "base.safetensors", BASE), write(tmp_path / "tuned.safetensors", tuned)
    extraction = extract(*pair, tmp_path / "out", form="dense")
    read = open_tuned(tmp_path / "out", open_checkpoint(pair[0]))
    assert set(read) == set(tuned)
    for name, tensor in tuned.items():
        assert read[name].dtype == tensor.dtype, name
        assert bits(read[name]) == bits(tensor), name
    stored = load_file(tmp_path / "out" / "delta.safetensors")
    same = {name for name, t in tuned.items() if name in BASE and t.dtype == BASE[name].dtype and bits(t) == bits(BASE[name])}  # fmt: skip # noqa: E501
    assert same
    assert set(stored) == set(tuned) - same  # changed tensors only
    size = sum((tmp_path / "out" / name).stat().st_size for name in ("delta.safetensors", "delta.json"))
    assert extraction.record["total"]["bytes"] == size < pair[1].stat().st_size
    assert all(line["whole"] and line["share"] == 1.0 for line in extraction.matrices)


def test_compare_sees_the_finetune_in_what_is_changed_alone(models, tmp_path: Path) -> None:
    extract(*models, tmp_path / "out", form="dense")
    found = specbasis.compare(models[0], tmp_path / "out", tmp_path / "a").rows.to_pydict()
    want = specbasis.compare(*models, tmp_path / "b").rows.to_pydict()
    columns = ("matrix", "measure", "index", "value", "resolved")
    assert repr([found[c] for c in columns]) == repr([want[c] for c in columns])


def test_a_dense_difference_takes_no_size(models, tmp_path: Path) -> None:
    for options in ({"energy": 0.5}, {"size": "1MB"}, {"rank": 3}):
        with pytest.raises(InputError, match="with --as dense"):
            extract(*models, tmp_path / "out", form="dense", **options)


@pytest.mark.parametrize("form", ["delta", "lora"])
def test_more_bytes_hold_no_less(tmp_path: Path, form: str) -> None:
    """What names and shapes take jumps with the choice; the nearest choices may not fit, and others do."""
    base = bert_state()
    pair = write(tmp_path / "b.safetensors", base), write(tmp_path / "t.safetensors", finetuned(base, 0.3))
    sizes = [*range(9_000, 22_000, 1_013), 13_965, 15_620, 15_951, 16_944, 17_937, 18_268, 19_592]
    held = 0.0
    for size in sorted(sizes):
        total = extract(*pair, tmp_path / str(size), form=form, size=size).record["total"]
        assert total["bytes"] <= size
        assert total["share"] >= held - 0.05, f"{size} bytes hold less than fewer did"
        held = max(held, total["share"])
    assert held > 0.8
