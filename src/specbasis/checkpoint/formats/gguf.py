"""GGUF files with floating-point weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from specbasis.checkpoint.entry import Entry, check_names, no_key, parsing
from specbasis.checkpoint.formats.kit import FileFormat, extra, quantised, rounding_noise, tensor_of
from specbasis.core.dtypes import FORMATS, by_code


def entries(path: Path, source: str, key: str = "") -> dict[str, Entry]:
    """The tensors of a GGUF file, memory-mapped, in (out, in) order."""
    no_key(key, source)
    gguf = extra("gguf", source)
    with parsing(path.name, source):
        tensors = gguf.GGUFReader(path).tensors
        check_names((tensor.name for tensor in tensors), source)
        coarse = [t for t in tensors if len(t.shape) > 1 and by_code(t.tensor_type.name) not in FORMATS]
        if coarse:
            names = ", ".join(sorted({tensor.tensor_type.name for tensor in coarse}))
            share = f"{len(coarse)} of its {len(tensors)} tensors are stored as {names}"
            raise quantised(path, source, share, _noise(gguf, coarse))
        stored = {}
        for tensor in tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            dtype = by_code(tensor.tensor_type.name)
            stored[tensor.name] = Entry(
                shape,
                dtype,
                lambda data=tensor.data, shape=shape, dtype=dtype: tensor_of(data.tobytes(), dtype, shape),
            )
    return stored


def _noise(gguf: Any, coarse: list[Any]) -> tuple[str, float] | None:
    """The first matrix that can be dequantised and its rounding noise, from the levels in its blocks of 32."""
    for tensor in coarse:
        try:
            rows = gguf.quants.dequantize(tensor.data[:64], tensor.tensor_type)
        except NotImplementedError:
            continue
        blocks = torch.from_numpy(rows.astype("float64")).reshape(-1, 32)
        steps = blocks.sort(dim=1).values.diff(dim=1)
        least = torch.where(steps > 1e-6 * blocks.abs().amax(1, keepdim=True), steps, math.inf).amin(1)
        return tensor.name, rounding_noise(least[least.isfinite()], blocks)
    return None


FORMAT = FileFormat((".gguf",), lambda path, head: head.startswith(b"GGUF"), entries, rank=3)
