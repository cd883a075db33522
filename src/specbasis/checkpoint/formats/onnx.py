"""ONNX files with floating-point weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint.entry import Entry, check_names, inside, no_key, parsing
from specbasis.checkpoint.formats.kit import FileFormat, extra, quantised, rounding_noise, tensor_of
from specbasis.checkpoint.regular import regular
from specbasis.core.dtypes import FORMATS, UNSCALED, by_code
from specbasis.core.errors import InputError

_QUANTISED_OPERATORS = ("DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
                        "QLinearMatMul", "QLinearConv", "MatMulNBits", "QAttention", "QGemm")  # fmt: skip


def entries(path: Path, source: str, key: str = "") -> dict[str, Entry]:
    """The initialisers of an ONNX graph; data that lies outside the file is read from inside its folder only."""
    no_key(key, source)
    onnx = extra("onnx", source)
    with parsing(path.name, source):
        graph = onnx.load(str(path), load_external_data=False).graph
        operators = sorted({node.op_type for node in graph.node if node.op_type in _QUANTISED_OPERATORS})
        if operators:
            raise quantised(path, source, f"its graph uses {', '.join(operators)}", _noise(onnx, graph))
        if any(size < 0 for tensor in graph.initializer for size in tensor.dims):
            raise ValueError("a negative size")
        check_names((tensor.name for tensor in graph.initializer), source)
        layouts = _layouts(graph)
        kinds = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    return {
        tensor.name: Entry(
            tuple(tensor.dims),
            by_code(kinds[tensor.name]),
            lambda tensor=tensor: _tensor(onnx, tensor, path, source),
            layout=layouts.get(tensor.name, ""),
        )
        for tensor in graph.initializer
    }


def _layouts(graph: Any) -> dict[str, str]:
    """How the operators read their weights: kernels of a convolution, and matrices (in, out)."""
    layouts: dict[str, set[str]] = {}
    for node in graph.node:
        if len(node.input) > 1:
            swapped = any(a.name == "transB" and a.i for a in node.attribute)
            layout = {"Conv": "conv", "MatMul": "in_out", "Gemm": "" if swapped else "in_out"}.get(node.op_type, "")
            layouts.setdefault(node.input[1], set()).add(layout)
    return {name: options.pop() for name, options in layouts.items() if len(options) == 1}


def _tensor(onnx: Any, tensor: Any, path: Path, source: str) -> Tensor:
    """One floating-point initialiser, from the file itself or from the file that it points to."""
    with parsing(path.name, source):
        dtype = by_code(onnx.TensorProto.DataType.Name(tensor.data_type))
        if dtype not in UNSCALED:
            raise InputError(f"{source}: {tensor.name!r} is not stored in floating point")
        shape = tuple(tensor.dims)
        size = FORMATS[dtype].bytes * math.prod(shape)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {item.key: item.value for item in tensor.external_data}
            outside = regular(inside(path.parent, where.get("location", ""), source))
            with outside.open("rb") as file:
                begin = file.seek(int(where.get("offset") or 0))
                raw = file.read(max(0, min(size, outside.stat().st_size - begin)))
        else:
            raw = tensor.raw_data if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).tobytes()
        if len(raw) != size:
            raise InputError(f"{source}: {tensor.name!r} has {len(raw)} of its {size} bytes")
        return tensor_of(raw, dtype, shape)


def _noise(onnx: Any, graph: Any) -> tuple[str, float] | None:
    """The first quantised matrix and its rounding noise, from its integers and their scale."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        inputs = [stored[name] for name in node.input[:3] if name in stored]
        if node.op_type == "DequantizeLinear" and len(inputs) == 3 and len(inputs[0].dims) == 2:
            q, step, zero = (torch.from_numpy(onnx.numpy_helper.to_array(t).astype("float64")) for t in inputs)
            if step.numel() == 1:
                return inputs[0].name, rounding_noise(step.reshape(1), (q - zero) * step)
    return None


FORMAT = FileFormat((".onnx",), lambda path, head: path.suffix == ".onnx", entries, rank=4)
