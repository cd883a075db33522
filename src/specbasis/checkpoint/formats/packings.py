"""How a quantised matrix is packed into tensors: a function a family, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint.entry import json_object
from specbasis.checkpoint.formats.grid import Family, Parts, integers, unpacked, want
from specbasis.core.dtypes import FORMATS
from specbasis.core.quantised import HALF, Grid


def _gptq_or_awq(parts: Parts) -> tuple[tuple[int, ...], str, Callable[[], Grid]]:
    """GPTQ packs the codes of (in, out) along in, AWQ along out, eight columns in an order of their own.

    scale · (code − zero); GPTQ's first version stores the zeros less 1. Source: AutoGPTQ, AutoAWQ (GEMM).
    """
    (rows, columns), (groups, out) = parts.shape(".qweight", 2), parts.shape(".scales", 2)
    zeros = parts.shape(".qzeros", 2)[1] if ".qzeros" in parts.entries else 0
    bits = int(parts.settings.get("bits", 0) or (zeros * 32 // max(out, 1)))
    want(bits in (2, 3, 4, 8), f"{bits} bits; want 2, 3, 4 or 8")
    awq = columns != out
    width = rows if awq else rows * 32 // bits
    want(columns * 32 == out * bits if awq else columns == out, f"codes {(rows, columns)}, scales {(groups, out)}")
    there = not zeros or parts.shape(".qzeros", 2) == (groups, out * bits // 32)
    want(there, f"zeros {parts.shape('.qzeros', 2) if zeros else ''}, scales {(groups, out)}")
    want(
        not awq or (bits == 4 and parts.settings.get("version", "gemm") == "gemm"),
        "AWQ of 4 bits and version gemm is read",
    )
    index = parts.entries.get(".g_idx")
    want(index is None or index.shape == (width,), "g_idx does not fit")
    size = -(-width // groups) if groups else 0
    want(groups > 0 and -(-width // size) == groups, f"{groups} groups of {width}")
    v2 = awq or parts.settings.get("checkpoint_format") == "gptq_v2"

    def read() -> Grid:
        codes, scales, zero = parts.codes.load(), parts.read(".scales"), parts.maybe(".qzeros")
        codes = _in_order(unpacked(codes, bits)).mT if awq else unpacked(codes.mT.contiguous(), bits)
        middle = torch.full((groups, out), float(2 ** (bits - 1)))
        if zero is not None:
            middle = unpacked(zero, bits)
            middle = (_in_order(middle) if awq else middle).to(torch.int16)
            middle = (middle if v2 else (middle + 1) & ((1 << bits) - 1)).float()
        order = parts.read(".g_idx") if index is not None else torch.arange(width) // size
        return _shifted(codes, scales.mT[:, order.long()], middle.mT[:, order.long()], integers(bits))

    return (out, width), f"{'awq' if awq else 'gptq'} int{bits}", read


def _in_order(codes: Tensor) -> Tensor:
    """AWQ's columns in their order: the codes of a word are those of columns 0, 2, 4, 6, 1, 3, 5, 7."""
    words = codes.reshape(*codes.shape[:-1], -1, 8)
    return words[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)


def _ordered(levels: Tensor) -> Tensor:
    """Levels in rising order, each once."""
    rising: Tensor = torch.unique(levels)
    return rising


def _shifted(codes: Tensor, scale: Tensor, zero: Tensor | float, levels: Tensor) -> Grid:
    """Numbers scale · (level − zero), of codes that count the levels from the lowest."""
    scale = scale.float()
    return Grid(scale * (levels[codes.long()] - zero), scale, -scale * zero, levels, torch.tensor(HALF))


def _packed(parts: Parts) -> tuple[tuple[int, ...], str, Callable[[], Grid]]:
    """compressed-tensors: codes of (out, in) along in, from −2^(bits − 1); scales a group or a row.

    Source: compressed-tensors, pack-quantized.
    """
    (out, words), (_, groups) = parts.shape(".weight_packed", 2), parts.shape(".weight_scale", 2)
    size = parts.entries[".weight_shape"].load()
    want(size.numel() == 2, "weight_shape is no pair")
    width = int(size.flatten()[1])
    bits = next((bits for bits in (4, 8, 2) if -(-width * bits // 32) == words), 0)
    want(bits > 0 and int(size.flatten()[0]) == out, f"{words} words for {size.tolist()}; want 2, 4 or 8 bits")
    want(0 < groups <= width and parts.entries[".weight_scale"].shape[0] == out, "scales do not fit")
    span = -(-width // groups)

    def read() -> Grid:
        codes, scale, zero = parts.codes.load(), parts.read(".weight_scale"), parts.maybe(".weight_zero_point")
        order = parts.maybe(".weight_g_idx")
        order = torch.arange(width) // span if order is None else order.long()
        middle: Tensor | float = 0.0
        if zero is not None:
            if zero.dtype == torch.int32:
                zero = unpacked(zero.mT.contiguous(), bits).mT[:out].float() - 2 ** (bits - 1)
            middle = zero.float()[:, order]
        return _shifted(
            unpacked(codes, bits)[:, :width], scale[:, order], middle, integers(bits, -(2 ** (bits - 1)))
        )

    return (out, width), f"int{bits}", read


def _scaled(parts: Parts) -> tuple[tuple[int, ...], str, Callable[[], Grid]]:
    """Numbers times a scale: of the whole, a row, a group or a block of 128 × 128.

    Source: compressed-tensors, float-quantized and int-quantized; DeepSeek-V3, where weight_scale_inv is a factor;
    torchao, Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor as it flattens them for safetensors.
    """
    codes, block = parts.codes, parts.settings.get("weight_block_size")
    leaf = next(leaf for leaf in parts.entries if leaf.endswith(("_scale", "_scale_inv")))
    middle_leaf = next((leaf for leaf in parts.entries if leaf.endswith("_zero_point")), "")
    beside = [_repeats(parts.entries[x].shape, codes.shape, block) for x in (leaf, middle_leaf) if x]

    def read() -> Grid:
        X, scale = codes.load(), parts.read(leaf)
        zero = parts.read(middle_leaf) if middle_leaf else None
        scale = _spread(scale.float(), codes.shape, beside[0])
        middle = 0.0 if zero is None else _spread(zero.float(), codes.shape, beside[1])
        form = FORMATS.get(parts.entries[leaf].dtype)
        slack = torch.tensor(max(HALF, form.step / 2 if form else 0.0))  # of a scale in its format
        if X.dtype == torch.int8:
            return Grid(scale * (X.float() - middle), scale, -scale * middle, integers(8, -128), slack)
        every = torch.arange(256, dtype=torch.uint8).view(X.dtype).float()
        return Grid(scale * X.float(), scale, torch.zeros(()), _ordered(every[every.isfinite()]), slack)

    return codes.shape, f"scaled {codes.dtype}", read


def _repeats(scale: tuple[int, ...], shape: tuple[int, ...], block: Any) -> tuple[int, ...]:
    """How often each scale counts along each axis; empty of a single scale."""
    if math.prod(scale) == 1:
        return ()
    full = scale if len(scale) == len(shape) else (*scale, *(1,) * (len(shape) - len(scale)))
    want(len(full) == len(shape) and 0 not in full and 0 not in shape, f"scales {scale} for {shape}")
    sizes = (
        block if isinstance(block, Sequence) and all(isinstance(b, int) and b > 0 for b in block) else (128, 128)
    )
    repeats = []
    for axis, (count, size) in enumerate(zip(full, shape, strict=True)):
        wide = sizes[axis - len(shape)] if len(shape) - axis <= len(sizes) else 128
        wide = size if count == 1 else wide if -(-size // wide) == count else size // count
        want(wide > 0 and -(-size // wide) == count, f"scales {scale} for {shape}")
        repeats.append(wide)
    return tuple(repeats)


def _spread(scale: Tensor, shape: tuple[int, ...], repeats: tuple[int, ...]) -> Tensor:
    """Scales as many as there are numbers along each axis, or one."""
    if not repeats:
        return scale.reshape(())
    scale = scale.reshape(*scale.shape, *(1,) * (len(shape) - scale.ndim))
    for axis, (size, wide) in enumerate(zip(shape, repeats, strict=True)):
        scale = scale if scale.shape[axis] == 1 else scale.repeat_interleave(wide, axis).narrow(axis, 0, size)
    return scale


def _int8_rows(parts: Parts) -> tuple[tuple[int, ...], str, Callable[[], Grid]]:
    """bitsandbytes, LLM.int8: rows of whole numbers, of which 127 is the row's largest size."""
    shape = parts.codes.shape
    want(len(shape) == 2 and parts.entries[".SCB"].shape == shape[:1], "SCB does not fit")

    def read() -> Grid:
        largest, form = parts.read(".SCB"), parts.maybe(".weight_format")
        want(form is None or int(form) == 0, "stored in an order of a GPU; save it with a newer bitsandbytes")
        scale = largest.float()[:, None] / 127
        return Grid(
            scale * parts.codes.load().float(), scale, torch.zeros(()), integers(8, -128), torch.tensor(HALF)
        )

    return shape, "bitsandbytes int8", read


def _four_bits(parts: Parts) -> tuple[tuple[int, ...], str, Callable[[], Grid]]:
    """The NF4 and FP4 of bitsandbytes: two codes a byte, the higher half first, times the largest size in a block.

    Source: Dettmers et al. 2023, QLoRA; with double quantisation these sizes are quantised themselves.
    """
    state = next((leaf for leaf in parts.entries if ".quant_state." in leaf), "")
    want(bool(state), "its quant_state is missing")
    about = json_object(bytes(parts.entries[state].load().flatten().tolist()))
    shape, size = tuple(about["shape"]), about["blocksize"]
    whole = [*shape, size, about.get("nested_blocksize", 1)]
    want(all(type(n) is int and n > 0 for n in whole), "its quant_state holds no sizes")
    count = math.prod(shape)
    want(-(-count // 2) == math.prod(parts.codes.shape), f"{parts.codes.shape} bytes for {shape}")
    want(math.prod(parts.entries[".weight.absmax"].shape) == -(-count // size), "absmax does not fit")
    offset = float(about.get("nested_offset", 0.0))

    def read() -> Grid:
        levels, largest = parts.read(".weight.quant_map"), parts.read(".weight.absmax")
        levels, slack = levels.float().flatten(), torch.tensor(HALF)
        if ".weight.nested_absmax" in parts.entries:
            inner, steps = parts.read(".weight.nested_absmax"), parts.read(".weight.nested_quant_map")
            inner = _in_blocks(inner.float(), about["nested_blocksize"], largest.shape)
            gaps = steps.float().diff().abs()
            gap = torch.maximum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
            code = largest.long()
            largest = steps.float()[code] * inner + offset
            slack = HALF + gap[code] / 2 * inner / largest.abs()
            slack = _in_blocks(slack, size, shape)
        packed = parts.codes.load().flatten()
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()
        scale = _in_blocks(largest.float(), size, shape)
        return Grid(levels[codes].reshape(shape) * scale, scale, torch.zeros(()), _ordered(levels), slack)

    return shape, "nf4" if state.endswith("nf4") else "fp4", read


def _in_blocks(values: Tensor, size: int, shape: tuple[int, ...]) -> Tensor:
    """A value for each block of so many numbers, as one for each number."""
    count = math.prod(shape)
    return values.flatten().repeat_interleave(min(size, count))[:count].reshape(shape)


def _mlx(parts: Parts) -> tuple[tuple[int, ...], str, Callable[[], Grid]]:
    """MLX: scale · code + bias, of groups along in; the lowest bits of a word first."""
    shape, groups = parts.codes.shape, parts.entries[".scales"].shape
    setting = parts.settings.get(parts.stem, parts.settings)
    size, bits = (setting.get(key, 0) if isinstance(setting, Mapping) else 0 for key in ("group_size", "bits"))
    want(bits in (2, 3, 4, 5, 6, 8) and type(size) is int and size > 0, "config.json gives no bits and group_size")
    width = shape[-1] * 32 // bits
    want(
        groups == parts.entries[".biases"].shape == (*shape[:-1], width // size) and not width % size,
        "scales do not fit",
    )

    def read() -> Grid:
        scale, shift = (parts.read(leaf) for leaf in (".scales", ".biases"))
        scale, shift = (X.float().repeat_interleave(size, -1) for X in (scale, shift))
        codes = unpacked(parts.codes.load(), bits).float()
        return Grid(scale * codes + shift, scale, shift, integers(bits), torch.tensor(HALF))

    return (*shape[:-1], width), f"mlx int{bits}", read


def _mxfp4(parts: Parts) -> tuple[tuple[int, ...], str, Callable[[], Grid]]:
    """MXFP4 of gpt-oss: blocks of 32 along in, two codes a byte, the lower half first, times a power of two.

    A stack is (experts, out, blocks, 16), and is read as transformers has it, (experts, in, out). Source: OCP
    Microscaling Formats 1.0; transformers, `convert_moe_packed_tensors`.
    """
    *before, out, blocks, size = parts.codes.shape
    want(size == 16 and len(before) < 2, f"{parts.codes.shape} is no shape of blocks")
    want(parts.entries["_scales"].shape == (*before, out, blocks), "scales do not fit")

    def read() -> Grid:
        packed, exponent = parts.codes.load(), parts.read("_scales")
        scale = torch.exp2(exponent.float() - 127).repeat_interleave(32, -1)
        values = (_fp4(packed).flatten(-2) * scale).mT.contiguous()
        return Grid(values, scale.mT, torch.zeros(()), _ordered(_FP4), torch.zeros(()))

    return (*before, 32 * blocks, out), "mxfp4", read


def _nvfp4(parts: Parts) -> tuple[tuple[int, ...], str, Callable[[], Grid]]:
    """NVFP4: blocks of 16 along in, each with a scale in float8, and one for all.

    Source: NVIDIA's modelopt, where both are factors; compressed-tensors, which divides by the one for all.
    """
    *before, half = parts.codes.shape
    blocks = parts.entries[".weight_scale"].shape
    want(blocks == (*before, half // 8) and not half % 8, f"scales {blocks} for {(*before, 2 * half)}")
    whole = next(leaf for leaf in (".weight_scale_2", ".weight_global_scale") if leaf in parts.entries)
    want(math.prod(parts.entries[whole].shape) == 1, "one scale for all is no number")

    def read() -> Grid:
        scale, factor = parts.read(".weight_scale"), parts.read(whole)
        of_all = factor.float().reshape(()) if whole == ".weight_scale_2" else 1 / factor.float().reshape(())
        scale = (scale.float() * of_all).repeat_interleave(16, -1)
        slack = torch.tensor(FORMATS["float8_e4m3fn"].step / 2)
        return Grid(_fp4(parts.codes.load()) * scale, scale, torch.zeros(()), _ordered(_FP4), slack)

    return (*before, 2 * half), "nvfp4", read


def _fp4(packed: Tensor) -> Tensor:
    """The numbers of bytes that hold two codes each, the lower half first."""
    return _FP4[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


_FP4 = torch.tensor([sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
_FLOAT8 = tuple(name for name in FORMATS if name.startswith("float8"))
_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
_BLOCKS = (".weight.absmax", ".weight.quant_map")
_NESTED = (".weight.nested_absmax", ".weight.nested_quant_map")
_BESIDE = (".weight_zero_point", ".weight_g_idx")

FAMILIES = (
    Family(".qweight", ("int32",), (".scales",), (".qzeros", ".g_idx"), ".weight", _gptq_or_awq),
    Family(".weight_packed", ("int32",), (".weight_scale", ".weight_shape"), _BESIDE, ".weight", _packed),
    Family(".weight", ("uint8",), (".weight_scale", ".weight_scale_2"), (), ".weight", _nvfp4),
    Family(".weight_packed", ("uint8",), (".weight_scale", ".weight_global_scale"), (), ".weight", _nvfp4),
    Family(".weight", ("uint8",), _BLOCKS, (*_NESTED, *_STATES), ".weight", _four_bits),
    Family(".weight", ("int8",), (".SCB",), (".weight_format",), ".weight", _int8_rows),
    Family(".weight", ("uint32",), (".scales", ".biases"), (), ".weight", _mlx, in_stacks=True),
    Family("_blocks", ("uint8",), ("_scales",), (), "", _mxfp4, in_stacks=True),
    Family("._weight_qdata", (*_FLOAT8, "int8"), ("._weight_scale",), ("._weight_zero_point",), ".weight", _scaled),
    Family("", _FLOAT8, ("_scale_inv",), (), "", _scaled, in_stacks=True),
    Family("", (*_FLOAT8, "int8"), ("_scale",), ("_zero_point",), "", _scaled, in_stacks=True),
)
"""The first whose tensors are there is taken."""
