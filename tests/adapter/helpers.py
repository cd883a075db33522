"""Matrices with a chosen spectrum, and small models made on disk by the test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


def matrix(out: int, in_: int, spectrum: Tensor | None = None, seed: int = 0) -> Tensor:
    """A float64 matrix with known singular vectors and a chosen spectrum (well separated by default)."""
    generator = torch.Generator().manual_seed(seed)
    short = min(out, in_)
    U, V = (torch.linalg.qr(torch.randn(d, short, generator=generator, dtype=torch.float64))[0] for d in (out, in_))
    S = torch.linspace(3.0, 0.5, short, dtype=torch.float64) if spectrum is None else spectrum.double()
    return (U * S) @ V.mT


def linear(out: int, in_: int, seed: int = 0, spectrum: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(in_, out)
    with torch.no_grad():
        layer.weight.copy_(matrix(out, in_, spectrum, seed))
        layer.bias.copy_(torch.linspace(-0.2, 0.3, out))
    return layer


def transcription(W: Tensor, M: Tensor, k: int, m: int) -> Tensor:
    """Eq. 3 and 4 as printed, from LAPACK's SVD: the oracle, up to the joint signs that the caller fixes."""
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return W.double() + U[:, k:m] @ M.double() @ Vh[k:m, :]


def save_deberta(folder: Path, layers: int = 3, seed: int = 0) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.DebertaV2Config(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.DebertaV2Model(config).save_pretrained(folder)
    return folder


def load_classifier(folder: Path, **options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options).eval()


TARGETS = r".*layer\.\d+\.(intermediate|output)\.dense"


def randomise(model: nn.Module, seed: int = 0, std: float = 0.2, adapter: str | None = None) -> None:
    """Give every core random coefficients, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".spectral_M." in f".{name}" and (adapter is None or name.endswith(f".{adapter}")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
