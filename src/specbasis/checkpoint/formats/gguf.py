"""GGUF files: floating-point weights, and quantised ones as the numbers that they stand for.

The header is read here and not by the gguf library, which takes every length in a file at its word: it allocates
and walks without end, and lets tensors overlap or begin before the file.

Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specbasis.checkpoint.entry import Entry, check_names, no_key, parsing
from specbasis.checkpoint.formats.grid import integers
from specbasis.checkpoint.formats.kit import FileFormat, extra, tensor_of
from specbasis.core.dtypes import FORMATS, by_code
from specbasis.core.errors import InputError
from specbasis.core.quantised import HALF, Grid

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a number in the metadata → its bytes."""

_NESTED = 8
"""Levels of arrays within arrays."""

_ROTATED = (
    "llama", "mistral3", "arcee", "deci", "granite", "granitemoe", "smollm3", "baichuan", "xverse", "internlm2",
    "minicpm", "olmo", "deepseek", "bailingmoe", "chameleon",
)  # fmt: skip
"""Architectures whose queries and keys llama.cpp's converter stores with the rows of each head in another order."""

_NIBBLES = integers(4)
_UNEVEN = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0])

_CODES = {
    "Q4_0": (2, 18, _NIBBLES),
    "Q4_1": (4, 20, _NIBBLES),
    "Q5_0": (2, 22, integers(5)),
    "Q5_1": (4, 24, integers(5)),
    "Q8_0": (2, 34, integers(8, -128)),
    "Q2_K": (16, 80, integers(2)),
    "Q3_K": (0, 96, integers(3)),
    "Q4_K": (16, 144, _NIBBLES),
    "Q5_K": (16, 176, integers(5)),
    "Q6_K": (0, 192, integers(6)),
    "IQ4_NL": (2, 18, _UNEVEN),
    "IQ4_XS": (8, 136, _UNEVEN),
}
"""Type → where in a block's bytes the codes of its numbers are, from and to, and what the codes stand for."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the header has it: its type's name, its shape (out, in), and where its bytes are."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


def entries(path: Path, source: str, key: str = "") -> dict[str, Entry]:
    """The tensors of a GGUF file, in (out, in) order, their rows in that of Hugging Face."""
    no_key(key, source)
    gguf = extra("gguf", source)
    with parsing(path.name, source):
        with path.open("rb") as file:
            header = _Header(mmap(file.fileno(), 0, access=ACCESS_READ), gguf)
        tensors = header.tensors()
        check_names((tensor.name for tensor in tensors), source)
        return {t.name: _entry(gguf, path, t, _rows(t, header.settings), source) for t in tensors}


def _entry(gguf: Any, path: Path, tensor: _Tensor, rows: torch.Tensor | None, source: str) -> Entry:
    dtype = by_code(tensor.kind)
    if dtype not in FORMATS and len(tensor.shape) > 1:
        read = partial(_grid, gguf, path, tensor, rows, source)
        whole = partial(_whole, gguf, path, tensor, rows, source)
        return Entry(tensor.shape, "float32", whole, stored=dtype, grid=read if tensor.kind in _CODES else None)

    def load() -> torch.Tensor:
        if dtype not in FORMATS:
            raise InputError(f"{source}: {tensor.name!r} is stored as {dtype}, not in floating point")
        values = tensor_of(_content(path, tensor), dtype, tensor.shape)
        return values if rows is None else values[rows]

    return Entry(tensor.shape, dtype, load)


def _rows(tensor: _Tensor, settings: Mapping[str, Any]) -> torch.Tensor | None:
    """Where the rows of queries and keys are that llama.cpp's rotary embedding wants in another order.

    A head's rows (2, half) are stored as (half, 2). Source: `LlamaModel.permute` of llama.cpp's converter.
    """
    architecture, part = settings.get("general.architecture"), _QUERY_OR_KEY.search(tensor.name)
    if architecture not in _ROTATED or part is None:
        return None
    heads = settings.get(f"{architecture}.attention.head_count")
    heads = settings.get(f"{architecture}.attention.head_count_kv", heads) if part[1] == "k" else heads
    if not isinstance(heads, int) or heads < 1 or tensor.shape[0] % (2 * heads):
        return None
    return torch.arange(tensor.shape[0]).reshape(heads, -1, 2).mT.flatten()


_QUERY_OR_KEY = re.compile(r"\.attn_([qk])\.(weight|bias)$")


def _whole(gguf: Any, path: Path, tensor: _Tensor, rows: torch.Tensor | None, source: str) -> torch.Tensor:
    values = _dequantised(gguf, _blocks(gguf, path, tensor), tensor, source)
    return values if rows is None else values[rows]


def _content(path: Path, tensor: _Tensor) -> bytes:
    """The bytes of a tensor: read, not mapped, as a mapped file that is cut off ends the process."""
    with path.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.stop - tensor.start)


def _blocks(gguf: Any, path: Path, tensor: _Tensor) -> np.ndarray:
    """The bytes of a quantised tensor, a block a row."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    return np.frombuffer(_content(path, tensor), np.uint8).reshape(-1, size)


def _dequantised(gguf: Any, blocks: np.ndarray, tensor: _Tensor, source: str) -> torch.Tensor:
    if not len(blocks):
        return torch.zeros(tensor.shape)
    try:
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise InputError(f"{source}: {tensor.name!r} is stored as {tensor.kind}, which gguf cannot read") from error
    return torch.from_numpy(values).reshape(tensor.shape)


def _grid(gguf: Any, path: Path, tensor: _Tensor, rows: torch.Tensor | None, source: str) -> Grid:
    """A quantised tensor with its levels: what its blocks would stand for with the least and the greatest codes."""
    blocks = _blocks(gguf, path, tensor)
    start, stop, levels = _CODES[tensor.kind]
    numbers = [_dequantised(gguf, blocks, tensor, source)]
    for byte in (0x80, 0x7F) if tensor.kind == "Q8_0" else (0x00, 0xFF):
        extreme = blocks.copy()
        extreme[:, start:stop] = byte
        numbers.append(_dequantised(gguf, extreme, tensor, source))
    values, least, greatest = numbers if rows is None else (X[rows] for X in numbers)
    scale = (greatest - least) / (levels[-1] - levels[0])
    return Grid(values, scale, least - scale * levels[0], levels, torch.tensor(HALF))


class _Header:
    """The header of a file, read from its beginning; every length is checked against what is left of the file."""

    def __init__(self, content: mmap, gguf: Any) -> None:
        self.content = content
        self.gguf = gguf
        self.place = 4
        self.settings: dict[str, Any] = {}

    def tensors(self) -> list[_Tensor]:
        """The tensors, in file order; none overlaps another, and all are inside the file.

        Raises:
            ValueError, struct.error: anything else.
        """
        version, count, settings = self._number("<I"), self._number("<Q"), self._number("<Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or written for the other byte order; want 2 or 3")
        for _ in range(settings):
            name = self._text()
            self.settings[name] = self._value(self._number("<I"), _NESTED)
        listed = [self._tensor() for _ in range(count)]
        alignment = self.settings.get("general.alignment")
        data = self.place + -self.place % (alignment if isinstance(alignment, int) and alignment > 0 else 32)
        tensors = [self._placed(name, kind, shape, data + offset) for name, kind, shape, offset in listed]
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise ValueError("two tensors have one name")
        end = data
        for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
            if tensor.start < end:
                raise ValueError(f"{tensor.name!r} overlaps another tensor")
            end = tensor.stop
        return tensors

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.content, self.place)
        self.place += struct.calcsize(form)
        return int(value)

    def _skip(self, count: int) -> int:
        """Pass over so many bytes; where they began."""
        start = self.place
        if count > len(self.content) - start:
            raise ValueError(f"{count} bytes in the header, of which {len(self.content) - start} are there")
        self.place += count
        return start

    def _text(self) -> str:
        start = self._skip(self._number("<Q"))
        return self.content[start : self.place].decode("utf-8")

    def _value(self, kind: int, levels: int) -> Any:
        """A value of the metadata: a text, an unsigned number; what else there is is passed over."""
        if kind in (4, 10):
            return self._number("<I" if kind == 4 else "<Q")
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            start = self._skip(self._number("<Q"))
            return self.content[start : self.place].decode("utf-8", "replace")
        elif kind == _ARRAY and levels:
            inner, count = self._number("<I"), self._number("<Q")
            if inner in _SIZES:
                self._skip(count * _SIZES[inner])
            else:
                for _ in range(count):  # each takes eight bytes at least
                    self._value(inner, levels - 1)
        else:
            raise ValueError(f"a setting of type {kind}")
        return None

    def _tensor(self) -> tuple[str, Any, tuple[int, ...], int]:
        name, axes = self._text(), self._number("<I")
        if axes > 4:
            raise ValueError(f"{name!r} has {axes} axes")
        shape = tuple(self._number("<Q") for _ in range(axes))[::-1]
        return name, self.gguf.GGMLQuantizationType(self._number("<I")), shape, self._number("<Q")

    def _placed(self, name: str, kind: Any, shape: tuple[int, ...], start: int) -> _Tensor:
        block, size = self.gguf.GGML_QUANT_SIZES[kind]
        stop = start + math.prod(shape) // block * size
        if stop > len(self.content) or (shape and shape[-1] % block):
            raise ValueError(f"{name!r} ends at byte {stop} of {len(self.content)}")
        return _Tensor(name, kind.name, shape, start, stop)


FORMAT = FileFormat((".gguf",), lambda path, head: head.startswith(b"GGUF"), entries, rank=3)
