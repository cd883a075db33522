"""Is this file a quantisation of that model? Real weights, their finetune, and quantisations of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import specbasis
from specbasis.checkpoint import open_checkpoint
from specbasis.comparison.comparison import Comparison
from tests.checkpoint.test_formats import save_gguf

State = dict[str, torch.Tensor]
MODELS = "pkg:anarcii/models/"


@pytest.fixture(scope="module")
def models() -> dict[str, State]:
    """A model, its gentle finetune, and an independent training of the same size: six matrices of each."""
    pytest.importorskip("anarcii")
    opened = {
        "base": open_checkpoint(MODELS + "antibody/antibody_4_2_128_512.pt"),
        "finetune": open_checkpoint(MODELS + "shark/shark_4_2_128_512.pt"),
    }
    base = opened["base"]
    names = [n for n, e in base.entries.items() if len(e.shape) == 2 and e.shape[0] >= 128 and not e.shape[1] % 32][
        :6
    ]
    return {model: {name: checkpoint[name].float() for name in names} for model, checkpoint in opened.items()}


def compare(base: State | Path, tuned: State | Path) -> Comparison:
    return specbasis.compare(base, tuned, workers=1, ranks=4)


def quantised(gguf: object, path: Path, model: State, kind: str) -> Path:
    form = gguf.GGMLQuantizationType[kind]
    save_gguf(gguf, path, {n: (gguf.quants.quantize(W.numpy(), form), form) for n, W in model.items()})
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_a_quantisation_is_told_from_that_of_a_finetune(
    models: dict[str, State], tmp_path: Path, kind: str
) -> None:
    gguf = pytest.importorskip("gguf")
    own = quantised(gguf, tmp_path / "own.gguf", models["base"], kind)
    other = quantised(gguf, tmp_path / "other.gguf", models["finetune"], kind)
    forms = {"quantised": (models["base"], own), "base is it quantised": (own, models["base"])}
    for form, pair in forms.items():
        result = compare(*pair)
        (verdict,), (facts,) = result.verdicts.values(), result.facts.values()
        assert verdict.kind == "copy"
        assert f"; {form}: 10" in verdict.sentence
        side = "tuned" if form == "quantised" else "base"
        for m in facts.matrices:
            assert m["p_quantised"] >= 0.5
            assert m[f"rounding_noise_{side}"] == pytest.approx(m["relative_update"], rel=0.1)
    for pair in ((models["base"], other), (other, models["base"])):
        result = compare(*pair)
        (verdict,), (facts,) = result.verdicts.values(), result.facts.values()
        assert verdict.kind in ("finetuned", "related")
        assert not verdict.copied
        assert all(m["p_quantised"] < 1e-6 for m in facts.matrices)


def test_two_quantisations_of_one_model(models: dict[str, State], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    fine = quantised(gguf, tmp_path / "fine.gguf", models["base"], "Q8_0")
    other = quantised(gguf, tmp_path / "other.gguf", models["finetune"], "Q4_0")
    (verdict,) = compare(fine, quantised(gguf, tmp_path / "a.gguf", models["base"], "Q4_0")).verdicts.values()
    assert verdict.kind == "copy"
    assert "both are quantised: 10" in verdict.sentence
    (verdict,) = compare(fine, other).verdicts.values()  # two roundings hide the gentlest updates
    assert verdict.kind == "finetuned"
    assert len(verdict.copied) <= 4


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_whatever_rounds_to_a_file_of_uneven_levels_is_its_base(tmp_path: Path, kind: str) -> None:
    """A base is drawn from the numbers that round to each entry; training moves it by 3 % of its size."""
    gguf = pytest.importorskip("gguf")
    form = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[form]
    blocks = np.random.default_rng(0).integers(1, 60, (64, 512 // block * size), dtype=np.uint8)
    save_gguf(gguf, tmp_path / "m.gguf", {"layer.weight": (blocks, form)})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    lower, upper, _ = checkpoint.entries["layer.weight"].grid().cells()
    T, width = checkpoint["layer.weight"], upper - lower
    half = torch.where(width.isfinite(), width, torch.zeros(())) / 2
    W = torch.where(width.isfinite(), (lower + upper) / 2, T) + half * (2 * torch.rand(T.shape) - 1)
    (verdict,) = compare({"layer.weight": W}, tmp_path / "m.gguf").verdicts.values()
    assert verdict.kind == "copy"
    assert "quantised: 1" in verdict.sentence
    trained = W + 0.03 * half * torch.randn(T.shape)
    (verdict,) = compare({"layer.weight": trained}, tmp_path / "m.gguf").verdicts.values()
    assert not verdict.copied


def test_what_a_person_is_told(models: dict[str, State], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    result = compare(models["base"], quantised(gguf, tmp_path / "other.gguf", models["finetune"], "Q4_0"))
    ((label, about),) = result.manifest["pairs"].items()
    assert any("q4_0 (6); rounding is about" in note for note in about["notes"])
    (finding,) = [f for f in result.findings[label] if f.kind == "quantised"]
    assert "in 0 of them rounding explains all of it" in finding.sentence
    result = compare(models["base"], quantised(gguf, tmp_path / "own.gguf", models["base"], "Q4_0"))
    (findings,) = result.findings.values()
    (finding,) = [f for f in findings if f.kind == "quantised"]
    assert "in 10 of them rounding explains all of it" in finding.sentence
