"""What is said after a comparison, against a decomposition of the update by another library."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

import specbasis
from specbasis.treatment.advice import low_rank_size, next_steps
from tests.pico import bert_state, finetuned, write

BASE = bert_state(width=48)


def test_the_share_of_a_low_rank_and_its_bytes(tmp_path: Path) -> None:
    tuned = finetuned(BASE, 0.1)
    comparison = specbasis.compare(BASE, tuned)
    (label,) = comparison.pairs
    shapes = {n: BASE[n] for n in comparison.manifest["pairs"][label]["matrices"]}
    squares = {n: torch.linalg.svdvals(tuned[n].double() - W.double()).square() for n, W in shapes.items()}
    share = sum(float(s[:5].sum()) for s in squares.values()) / sum(float(s.sum()) for s in squares.values())
    size = sum(4 * min(5, *W.shape) * sum(W.shape) for W in shapes.values())
    assert low_rank_size(comparison.rows, label, 5) == (pytest.approx(share, rel=1e-6), size)


def test_a_command_that_is_told_works_when_it_is_pasted(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "my base.safetensors", BASE), write(tmp_path / "t.safetensors", finetuned(BASE))
    comparison = specbasis.compare(base, tuned, tmp_path / "out")
    (label,) = comparison.pairs
    step, last = next_steps(comparison, label, [str(base), str(tuned)])
    assert last.command.startswith("specbasis forgetting ")
    assert f"{low_rank_size(comparison.rows, label)[0]:.0%} of their squared update" in step.reason  # type: ignore[index]
    words = shlex.split(step.command)
    assert words[:4] == ["specbasis", "extract", str(base), str(tuned)]
    assert (
        "specbasis extract BASE TUNED " in next_steps(comparison, label)[0].command
    )  # of shared results, no path of ours


def test_a_pair_that_is_no_finetune_is_advised_nothing() -> None:
    comparison = specbasis.compare(BASE, bert_state(width=48, seed=9))
    assert next_steps(comparison, comparison.pairs[0]) == []


def test_no_lora_is_advised_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "bert"}')
    base, tuned = tmp_path / "base", write(tmp_path / "t.safetensors", finetuned(BASE))
    write(base / "model.safetensors", BASE)
    specbasis.extract(base, tuned, tmp_path / "lora", rank=2)
    comparison = specbasis.compare(base, tmp_path / "lora")
    assert comparison.verdicts["lora"].kind == "finetuned"
    assert [step.command.split()[1] for step in next_steps(comparison, "lora")] == ["forgetting"]


def test_no_lora_is_advised_that_is_as_large_as_its_matrices() -> None:
    base = {"layer.weight": torch.randn(16, 16, generator=torch.Generator().manual_seed(0))}
    comparison = specbasis.compare(base, finetuned(base, 0.1))
    (label,) = comparison.pairs
    assert low_rank_size(comparison.rows, label, 8) is None  # 8 · (16 + 16) numbers
    assert low_rank_size(comparison.rows, label, 7) is not None
