"""Quantised files, written by the libraries of their formats or packed here as these are described."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from specbasis.architecture.key import MatrixKey, MatrixRef
from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from tests.checkpoint.test_formats import save_gguf
from tests.checkpoint.test_hostile import gguf_file

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
    lower, upper, room = entry.grid().cells()
    assert bool(((lower <= T) & (T <= upper)).all())
    assert float(((lower - room > W) | (upper + room < W)).double().mean()) <= 1e-4
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
    T, (lower, upper, _) = entry.load(), entry.grid().cells()
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
        near = torch.isclose(end, middle, rtol=0, atol=1e-5 * float(T.abs().max()))
        assert bool((near | middle.isinf()).all())


@pytest.mark.parametrize("kind", ["TQ1_0", "IQ2_S", "MXFP4"])
def test_gguf_types_without_known_levels_are_read_as_well(gguf, tmp_path, kind):
    form = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[form]
    blocks = np.random.default_rng(0).integers(0, 60, (4, 512 // block * size), dtype=np.uint8)
    save_gguf(gguf, tmp_path / "m.gguf", {"blk.0.attn_q.weight": (blocks, form)})
    entry = open_checkpoint(tmp_path / "m.gguf").entries["blk.0.attn_q.weight"]
    assert entry.grid is None
    assert np.array_equal(entry.load().numpy(), gguf.quants.dequantize(blocks, form), equal_nan=True)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "IQ2_S"])
def test_an_empty_quantised_gguf_tensor(gguf, tmp_path, kind):
    form = gguf.GGMLQuantizationType[kind]
    content = gguf_file(tensors=[("blk.0.attn_q.weight", (512, 0), int(form), 0)])
    (tmp_path / "m.gguf").write_bytes(content)
    entry = open_checkpoint(tmp_path / "m.gguf").entries["blk.0.attn_q.weight"]
    assert entry.load().shape == (0, 512)
    assert entry.grid is None or entry.grid().values.shape == (0, 512)


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
    lower, upper, room = checkpoint.entries["blk.0.attn_k.weight"].grid().cells()
    assert bool(((lower - room <= K) & (K <= upper + room)).all())


# --- safetensors: written by their libraries, or packed here as the formats are described -------------------------


def words(codes, bits):
    """32-bit words of codes along the last axis, the lowest bits first: one long number of all of them, cut."""
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append([number >> 32 * i & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    unsigned = torch.tensor(rows, dtype=torch.int64).reshape(*codes.shape[:-1], -1)
    return (unsigned - (unsigned >= 2**31) * 2**32).to(torch.int32)


def asymmetric(W, bits, group, *, symmetric=False):
    """Codes (out, in), scales and zeros (out, groups) of rounding to nearest, with scales in float16."""
    x = W.reshape(len(W), -1, group)
    top, low = x.amax(-1).clamp(min=0), x.amin(-1).clamp(max=0)
    if symmetric:
        top = torch.maximum(top, -low)
        low = -top
    scale = ((top - low) / (2**bits - 1)).half().float()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    q = ((x / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
    return q.reshape(W.shape).to(torch.int64), scale, zero.to(torch.int64)


def stand_for(q, scale, zero, group):
    return (scale[..., None] * (q.reshape(len(q), -1, group) - zero[..., None])).reshape(q.shape).float()


def folder_of(path, tensors, **config):
    path.mkdir(exist_ok=True)
    save_file({name: X.contiguous() for name, X in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(path)


def gptq(W, bits, group, order=None, first=True):
    order = torch.arange(W.shape[1]) if order is None else order
    q, scale, zero = asymmetric(W[:, order.argsort(stable=True)], bits, group)
    T = stand_for(q, scale, zero, group)[:, order.argsort(stable=True).argsort()]
    q = q[:, order.argsort(stable=True).argsort()]
    tensors = {
        "a.qweight": words(q, bits).mT,
        "a.qzeros": words((zero.mT - int(first)) % 2**bits, bits),
        "a.scales": scale.mT.half(),
        "a.g_idx": order.argsort(stable=True).argsort().to(torch.int32) // group,
    }
    return tensors, T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq(tmp_path, bits, version, shuffled):
    W = matrix(64, 256)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1)) if shuffled else None
    tensors, T = gptq(W, bits, 64, order, version == "gptq")
    config = {"quant_method": "gptq", "bits": bits, "group_size": 64, "checkpoint_format": version}
    for settings in ({"quantization_config": config}, {"quantization_config": {"checkpoint_format": version}}):
        checkpoint = folder_of(tmp_path / "m", tensors | {"a.bias": W[:, 0]}, **settings)
        assert list(checkpoint) == ["a.bias", "a.weight"]
        assert checkpoint.entries["a.weight"].stored == f"gptq int{bits}"
        check_nearest(checkpoint, "a.weight", W, T)


def test_awq(tmp_path):
    W = matrix(64, 256)
    q, scale, zero = asymmetric(W, 4, 128)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # of AutoAWQ: which column the i-th lowest half byte is of

    def interleaved(codes):
        return words(codes.reshape(len(codes), -1, 8)[..., order].flatten(1), 4)

    tensors = {"a.qweight": interleaved(q.mT), "a.qzeros": interleaved(zero.mT), "a.scales": scale.mT.half()}
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    checkpoint = folder_of(tmp_path / "m", tensors, quantization_config=config)
    check_nearest(checkpoint, "a.weight", W, stand_for(q, scale, zero, 128))
    with pytest.raises(InputError, match="version gemm"):
        folder_of(tmp_path / "m", tensors, quantization_config=config | {"version": "gemv"})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_packed(tmp_path, bits, symmetric):
    W = matrix(64, 256)
    q, scale, zero = asymmetric(W, bits, 128, symmetric=symmetric)
    tensors = {
        "a.weight_packed": words(q, bits),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([64, 256]),
    }
    if not symmetric:
        tensors["a.weight_zero_point"] = words(zero.mT, bits).mT
    checkpoint = folder_of(tmp_path / "m", tensors, quantization_config={"quant_method": "compressed-tensors"})
    assert list(checkpoint) == ["a.weight"]
    check_nearest(checkpoint, "a.weight", W, stand_for(q, scale, zero, 128))


@pytest.mark.parametrize("rows", [False, True])
def test_compressed_tensors_of_whole_numbers(tmp_path, rows):
    W = matrix()
    scale = W.abs().amax(1, keepdim=True) / 127 if rows else W.abs().amax().reshape(1) / 127
    q = (W / scale).round()
    checkpoint = folder_of(tmp_path / "m", {"a.weight": q.to(torch.int8), "a.weight_scale": scale})
    assert list(checkpoint) == ["a.weight"]
    check_nearest(checkpoint, "a.weight", W, q * scale)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("scales", ["one", "rows", "blocks", "experts"])
def test_float8_with_its_scales(tmp_path, name, scales):
    dtype = getattr(torch, name)
    W = matrix(300, 520) if scales != "experts" else matrix(600, 520).reshape(2, 300, 520)
    high = torch.finfo(dtype).max
    padded = torch.nn.functional.pad(W.abs(), (0, 120, 0, 84))
    blocks = padded.reshape(*W.shape[:-2], 3, 128, 5, 128).amax((-3, -1)) / high
    scale = {"one": W.abs().amax() / high, "rows": W.abs().amax(-1, keepdim=True) / high}.get(scales, blocks)
    spread = scale
    if scales in ("blocks", "experts"):
        spread = blocks.repeat_interleave(128, -2)[..., :300, :].repeat_interleave(128, -1)[..., :520]
    q = (W / spread).clamp(-high, high).to(dtype)
    leaf = "weight_scale_inv" if scales == "blocks" else "weight_scale"
    checkpoint = folder_of(tmp_path / "m", {"a.weight": q, f"a.{leaf}": scale, "a.input_scale": torch.tensor(1.0)})
    assert list(checkpoint) == ["a.input_scale", "a.weight"]
    assert checkpoint.entries["a.weight"].stored == f"scaled {name}"
    check_nearest(checkpoint, "a.weight", W, q.float() * spread)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes(tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = matrix(65, 128)  # of a width that is no multiple of 64 bitsandbytes itself reads other numbers on a CPU
    q, state = functional.quantize_4bit(W, quant_type=kind, compress_statistics=nested)
    T = functional.dequantize_4bit(q, state)
    tensors = {"a.weight": q, **{f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    checkpoint = folder_of(tmp_path / "m", tensors, quantization_config={"quant_method": "bitsandbytes"})
    assert list(checkpoint) == ["a.weight"]
    assert checkpoint.entries["a.weight"].stored == kind
    torch.testing.assert_close(checkpoint["a.weight"], T, rtol=1e-6, atol=0)
    check_nearest(checkpoint, "a.weight", W, checkpoint["a.weight"])


def test_eight_bits_of_bitsandbytes(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    W = matrix().half()
    q, largest, _ = functional.int8_vectorwise_quant(W)
    tensors = {"a.weight": q, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    checkpoint = folder_of(tmp_path / "m", tensors, quantization_config={"quant_method": "bitsandbytes"})
    assert list(checkpoint) == ["a.weight"]
    T = functional.int8_vectorwise_dequant(q, largest)
    torch.testing.assert_close(checkpoint["a.weight"], T, rtol=1e-6, atol=0)
    check_nearest(checkpoint, "a.weight", W.float(), checkpoint["a.weight"])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mlx(tmp_path, bits):
    W = matrix(64, 256)
    q, scale, zero = asymmetric(W, bits, 64)
    shift = (-scale * zero).half()
    tensors = {"a.weight": words(q, bits).view(torch.uint32), "a.scales": scale.half(), "a.biases": shift}
    checkpoint = folder_of(tmp_path / "m", tensors, quantization={"group_size": 64, "bits": bits})
    assert list(checkpoint) == ["a.weight"]
    T = scale[..., None] * q.reshape(64, -1, 64) + shift.float()[..., None]
    check_nearest(checkpoint, "a.weight", W, T.reshape(W.shape))
    with pytest.raises(InputError, match="gives no bits and group_size"):
        folder_of(tmp_path / "m", tensors)


AO = ("int8 rows", "float8 rows", "int4 in groups", "int4 rows")


@pytest.mark.parametrize("kind", AO)
def test_torchao_as_it_is_flattened_for_safetensors(tmp_path, kind):
    ao = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    config = {
        "int8 rows": lambda: ao.Int8WeightOnlyConfig(version=2),
        "float8 rows": lambda: ao.Float8WeightOnlyConfig(),
        "int4 in groups": lambda: ao.IntxWeightOnlyConfig(torch.int4, granularity.PerGroup(32), version=2),
        "int4 rows": lambda: ao.IntxWeightOnlyConfig(torch.int4, granularity.PerAxis(0), version=2),
    }[kind]()
    model = torch.nn.Sequential(torch.nn.Linear(512, 64, bias=False))
    model[0].weight.data = matrix()
    ao.quantize_(model, config)
    T = model[0].weight.dequantize()
    tensors, _ = support.flatten_tensor_state_dict(model.state_dict())
    checkpoint = folder_of(tmp_path / "m", tensors, quantization_config={"quant_method": "torchao"})
    assert list(checkpoint) == ["0.weight"]
    torch.testing.assert_close(checkpoint["0.weight"], T.float(), rtol=1e-6, atol=0)
    check_nearest(checkpoint, "0.weight", matrix(), checkpoint["0.weight"])


def test_torchao_in_a_packing_of_its_own_is_refused(tmp_path):
    tensors = {"0._weight_qdata": torch.zeros(64, 256, dtype=torch.uint8), "0._weight_scale": torch.ones(16, 64)}
    with pytest.raises(InputError, match=r"quantised by 'torchao', which is not read here .*dequantize"):
        folder_of(tmp_path / "m", tensors, quantization_config={"quant_method": "torchao"})


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors"])
def test_nvfp4(tmp_path, method):
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    W = matrix()
    of_all = nvfp4.per_tensor_amax_to_scale(W.abs().max())
    q = nvfp4.NVFP4Tensor.to_nvfp4(W, per_tensor_scale=of_all, is_swizzled_scales=False)
    tensors = {"a.weight": q.qdata, "a.weight_scale": q.scale, "a.weight_scale_2": of_all}
    if method == "compressed-tensors":
        tensors = {"a.weight_packed": q.qdata, "a.weight_scale": q.scale, "a.weight_global_scale": 1 / of_all}
    checkpoint = folder_of(tmp_path / "m", tensors, quantization_config={"quant_method": method})
    assert list(checkpoint) == ["a.weight"]
    assert checkpoint.entries["a.weight"].stored == "nvfp4"
    torch.testing.assert_close(checkpoint["a.weight"], q.dequantize(torch.float32), rtol=1e-6, atol=0)
    check_nearest(checkpoint, "a.weight", W, checkpoint["a.weight"])


def mxfp4(W):
    """Codes and scales of blocks of 32 along the last axis, each number rounded to the nearest level."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    parts = W.reshape(*W.shape[:-1], -1, 32)
    exponent = (torch.log2(parts.abs().amax(-1)).ceil() - 2).clamp(-127, 127)
    scaled = parts / torch.exp2(exponent)[..., None]
    codes = (scaled.abs()[..., None] - levels).abs().argmin(-1) + 8 * (scaled < 0)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    return {"_blocks": packed.to(torch.uint8), "_scales": (exponent + 127).to(torch.uint8)}


def test_mxfp4_is_read_as_transformers_does_a_stack_and_each_of_its_matrices(tmp_path):
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    W = matrix(3 * 64, 96).reshape(3, 64, 96)
    name = "model.layers.0.mlp.experts.down_proj"
    packed = mxfp4(W)
    checkpoint = folder_of(
        tmp_path / "m",
        {name + leaf: part for leaf, part in packed.items()},
        quantization_config={"quant_method": "mxfp4"},
    )
    assert list(checkpoint) == [name]
    T = convert(packed["_blocks"], packed["_scales"], dtype=torch.float32)
    assert checkpoint.entries[name].shape == tuple(T.shape) == (3, 96, 64)
    check_nearest(checkpoint, name, W.mT, T)
    for i in range(3):
        ref = MatrixRef(MatrixKey(0, "ffn.down", name), name, (64, 96), transposed=True, expert=i)
        assert torch.equal(ref.read(checkpoint), T[i].mT)
        grid = ref.grid(checkpoint)
        assert torch.equal(grid.values, T[i].mT)


@pytest.mark.parametrize(
    "broken", [{"_scales": (3, 64, 2)}, {"_blocks": (3, 64, 3, 15)}, {"_blocks": (2, 3, 64, 3, 16)}]
)
def test_mxfp4_that_does_not_fit_together_is_refused(tmp_path, broken):
    parts = mxfp4(matrix(3 * 64, 96).reshape(3, 64, 96))
    parts |= {leaf: torch.zeros(shape, dtype=torch.uint8) for leaf, shape in broken.items()}
    with pytest.raises(InputError, match=r"w_blocks is truncated or corrupted"):
        folder_of(tmp_path / "m", {"w" + leaf: part for leaf, part in parts.items()})


def test_scales_in_another_shard_are_found(tmp_path):
    tensors, T = gptq(matrix(64, 256), 4, 64)
    for i, name in enumerate(tensors, 1):
        save_file({name: tensors[name].contiguous()}, tmp_path / f"model-{i:05d}-of-00004.safetensors")
    assert torch.equal(open_checkpoint(tmp_path)["a.weight"], T)
    assert torch.equal(open_checkpoint(tensors)["a.weight"], T)


def test_a_method_that_is_not_read_is_refused(tmp_path):
    tensors = {"a.W_q": torch.zeros(4, 4, dtype=torch.uint8), "a.scale": torch.ones(4, 4)}
    with pytest.raises(InputError, match=r"quantised by 'hqq', which is not read here .*dequantize"):
        folder_of(tmp_path / "m", tensors, quantization_config={"quant_method": "hqq"})


BROKEN = {
    "g_idx": {"a.g_idx": torch.zeros(3, dtype=torch.int32)},
    "zeros": {"a.qzeros": torch.zeros(4, 9, dtype=torch.int32)},
    "scales": {"a.scales": torch.ones(7, 64)},
    "a name twice": {"a.weight": torch.ones(4, 4)},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_tensors_that_do_not_fit_together_are_refused(tmp_path, broken):
    tensors, _ = gptq(matrix(64, 256), 4, 64)
    with pytest.raises(InputError, match=r"a\.qweight is truncated or corrupted"):
        folder_of(tmp_path / "m", tensors | BROKEN[broken])


def test_an_index_of_groups_that_are_not_there_is_refused(tmp_path):
    tensors, _ = gptq(matrix(64, 256), 4, 64)
    with pytest.raises(InputError, match="truncated or corrupted"):
        folder_of(tmp_path / "m", tensors | {"a.g_idx": torch.full((256,), 99, dtype=torch.int32)})
