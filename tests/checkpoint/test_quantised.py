"""Quantised files, written by the libraries of their formats or packed here as these are described."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specbasis.checkpoint import open_checkpoint
from tests.checkpoint.test_formats import save_gguf

WRITTEN = ("Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1")
CODES = {"Q2_K": (16, 80), "Q3_K": (0, 96), "Q4_K": (16, 144), "Q5_K": (16, 176), "Q6_K": (0, 192), "Q8_0": (2, 34),
         "IQ4_NL": (2, 18), "IQ4_XS": (8, 136)}  # fmt: skip
"""Type → where the codes are in a block: what is not codes are the scales."""


def matrix(rows=64, columns=512, seed=0):
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def check_nearest(checkpoint, name, W, T):
    """W rounds to T where, and only where, it lies within T's cells, which are as fine as the rounding."""
    entry = checkpoint.entries[name]
    assert entry.is_float
    assert torch.equal(checkpoint[name], T)
    lower, upper = entry.cells()
    assert bool(((lower <= T) & (T <= upper)).all())
    beyond = float(((lower > W) | (upper < W)).double().mean())
    assert beyond <= 1e-3
    width = (upper - lower)[(upper - lower).isfinite()].double()
    noise = float((width.square().mean() / 12).sqrt() / T.double().square().mean().sqrt())
    assert noise == pytest.approx(float((T - W).norm() / T.norm()), rel=0.15)
    moved = W + 0.3 * width.mean() * torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    assert float(((lower > moved) | (upper < moved)).double().mean()) > 0.05


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", WRITTEN)
def test_quantised_gguf_is_read_as_what_it_stands_for(gguf, tmp_path, kind):
    W = matrix()
    form = gguf.GGMLQuantizationType[kind]
    q = gguf.quants.quantize(W.numpy(), form)
    save_gguf(gguf, tmp_path / "m.gguf", {"blk.0.attn_q.weight": (q, form), "norm": (W[0].numpy(), None)})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.entries["blk.0.attn_q.weight"].stored == kind.lower()
    assert any(f"{kind.lower()} (1); rounding is about" in note for note in checkpoint.notes)
    check_nearest(checkpoint, "blk.0.attn_q.weight", W, torch.from_numpy(gguf.quants.dequantize(q, form)))


@pytest.mark.parametrize("kind", CODES)
def test_cells_of_gguf_blocks_are_those_of_their_levels(gguf, tmp_path, kind):
    """The levels are those that gguf's own reader gives to blocks with these scales and codes at random."""
    form = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[form]
    random = np.random.default_rng(0)
    blocks = random.integers(1, 60, (4, 512 // block * size), dtype=np.uint8)
    save_gguf(gguf, tmp_path / "m.gguf", {"blk.0.attn_q.weight": (blocks, form)})
    entry = open_checkpoint(tmp_path / "m.gguf").entries["blk.0.attn_q.weight"]
    T, (lower, upper) = entry.load(), entry.cells()
    start, stop = CODES[kind]
    levels = []
    for _ in range(3000 if kind in ("Q6_K", "Q8_0") else 300):
        other = blocks.reshape(-1, size).copy()
        other[:, start:stop] = random.integers(0, 256, (len(other), stop - start), dtype=np.uint8)
        levels.append(torch.from_numpy(gguf.quants.dequantize(other, form).reshape(4, 512)[:, :64].copy()))
    levels = torch.stack([T[:, :64], *levels]).sort(0).values
    T, lower, upper = T[:, :64], lower[:, :64], upper[:, :64]
    below = torch.where(levels < T, levels, -torch.inf).amax(0)
    above = torch.where(levels > T, levels, torch.inf).amin(0)
    for end, next_ in ((lower, below), (upper, above)):
        middle = (T + next_) / 2
        assert torch.equal(end.isinf(), middle.isinf())
        near = torch.isclose(end, middle, rtol=0, atol=2e-3 * float(T.abs().max()))
        assert bool((near | middle.isinf()).all())


@pytest.mark.parametrize("kind", ["TQ1_0", "IQ2_S", "MXFP4"])
def test_gguf_types_without_known_levels_are_read_as_well(gguf, tmp_path, kind):
    form = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[form]
    blocks = np.random.default_rng(0).integers(0, 60, (4, 512 // block * size), dtype=np.uint8)
    save_gguf(gguf, tmp_path / "m.gguf", {"blk.0.attn_q.weight": (blocks, form)})
    entry = open_checkpoint(tmp_path / "m.gguf").entries["blk.0.attn_q.weight"]
    assert entry.cells is None
    assert np.array_equal(entry.load().numpy(), gguf.quants.dequantize(blocks, form), equal_nan=True)


@pytest.mark.parametrize(("architecture", "heads"), [("llama", 4), ("llama", None), ("qwen2", 4)])
def test_rows_of_queries_and_keys_come_in_the_order_of_hugging_face(gguf, tmp_path, architecture, heads):
    """llama.cpp's converter: reshape(heads, 2, half, in).swapaxes(1, 2) of queries and keys of llama alone."""
    Q, K = matrix(32, 64), matrix(16, 64, seed=1)
    turned = architecture == "llama" and heads
    stored = [
        W.reshape(n, 2, -1, 64).transpose(1, 2).reshape(W.shape) if turned else W for W, n in ((Q, 4), (K, 2))
    ]
    form = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    if heads:
        writer.add_head_count(heads)
        writer.add_head_count_kv(2)
    writer.add_tensor("blk.0.attn_q.weight", stored[0].contiguous().numpy())
    writer.add_tensor("blk.0.attn_k.weight", gguf.quants.quantize(stored[1].numpy(), form), raw_dtype=form)
    writer.add_tensor("blk.0.attn_v.weight", K.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert torch.equal(checkpoint["blk.0.attn_q.weight"], Q)
    assert torch.equal(checkpoint["blk.0.attn_v.weight"], K)
    lower, upper = checkpoint.entries["blk.0.attn_k.weight"].cells()
    assert bool(((lower <= K) & (K <= upper)).all())
