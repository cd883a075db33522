"""GGUF files with floating-point weights, or with quantised ones where their rounding is taken into account.

The header is read here and not by the gguf library, which takes every length in a file at its word: it allocates
and walks without end, and lets tensors overlap or begin before the file.

Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specbasis.checkpoint.entry import Entry, check_names, no_key, parsing
from specbasis.checkpoint.formats.kit import DEQUANTISE, FileFormat, extra, quantised, rounding_noise, tensor_of
from specbasis.core.dtypes import FORMATS, by_code
from specbasis.core.errors import InputError

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a number in the metadata → its bytes."""

_NESTED = 8
"""Levels of arrays within arrays."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the header has it: its type's name, its shape (out, in), and where its bytes are."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


def entries(path: Path, source: str, key: str = "") -> dict[str, Entry]:
    """The tensors of a GGUF file, memory-mapped, in (out, in) order."""
    no_key(key, source)
    gguf = extra("gguf", source)
    with parsing(path.name, source):
        with path.open("rb") as file:
            content = mmap(file.fileno(), 0, access=ACCESS_READ)
        tensors = _Header(content, gguf).tensors()
        check_names((tensor.name for tensor in tensors), source)
        coarse = [t for t in tensors if len(t.shape) > 1 and by_code(t.kind) not in FORMATS]
        if coarse and not DEQUANTISE.get():
            names = ", ".join(sorted({tensor.kind for tensor in coarse}))
            share = f"{len(coarse)} of its {len(tensors)} tensors are stored as {names}"
            raise quantised(path, source, share, _noise(gguf, content, coarse))
    stored = {
        tensor.name: Entry(tensor.shape, by_code(tensor.kind), _reader(content, tensor, source))
        for tensor in tensors
    }
    for tensor in coarse:
        stored[tensor.name] = Entry(tensor.shape, "float32", partial(_whole, gguf, content, tensor, source))
    return stored


def _reader(content: mmap, tensor: _Tensor, source: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        dtype = by_code(tensor.kind)
        if dtype not in FORMATS:
            raise InputError(f"{source}: {tensor.name!r} is stored as {dtype}, not in floating point")
        return tensor_of(content[tensor.start : tensor.stop], dtype, tensor.shape)

    return read


def _whole(gguf: Any, content: mmap, tensor: _Tensor, source: str) -> torch.Tensor:
    try:
        return torch.from_numpy(_dequantised(gguf, content, tensor)).reshape(tensor.shape)
    except NotImplementedError as error:
        raise InputError(f"{source}: {tensor.name!r} is stored as {tensor.kind}, which gguf cannot read") from error


def _dequantised(gguf: Any, content: mmap, tensor: _Tensor, most: int | None = None) -> np.ndarray:
    """The numbers that the first rows of a quantised tensor stand for, or all of them, float32."""
    width = (tensor.stop - tensor.start) // math.prod(tensor.shape[:-1])
    stop = tensor.stop if most is None else min(tensor.stop, tensor.start + most * width)
    data = np.frombuffer(content[tensor.start : stop], np.uint8).reshape(-1, width)
    rows: np.ndarray = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[tensor.kind])
    return rows


class _Header:
    """The header of a file, read from its beginning; every length is checked against what is left of the file."""

    def __init__(self, content: mmap, gguf: Any) -> None:
        self.content = content
        self.gguf = gguf
        self.place = 4
        self.alignment = 32

    def tensors(self) -> list[_Tensor]:
        """The tensors, in file order; none overlaps another, and all are inside the file.

        Raises:
            ValueError, struct.error: anything else.
        """
        version, count, settings = self._number("<I"), self._number("<Q"), self._number("<Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or written for the other byte order; want 2 or 3")
        for _ in range(settings):
            self._setting()
        listed = [self._tensor() for _ in range(count)]
        data = self.place + -self.place % self.alignment
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

    def _setting(self) -> None:
        name, kind = self._text(), self._number("<I")
        if name == "general.alignment" and kind == 4:
            self.alignment = max(1, self._number("<I"))
        else:
            self._value(kind, _NESTED)

    def _value(self, kind: int, levels: int) -> None:
        """Pass over a value of the metadata."""
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY and levels:
            inner, count = self._number("<I"), self._number("<Q")
            if inner in _SIZES:
                self._skip(count * _SIZES[inner])
            else:
                for _ in range(count):  # each takes eight bytes at least
                    self._value(inner, levels - 1)
        else:
            raise ValueError(f"a setting of type {kind}")

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


def _noise(gguf: Any, content: mmap, coarse: list[_Tensor]) -> tuple[str, float] | None:
    """The first matrix that can be dequantised and its rounding noise, from the levels in its blocks of 32."""
    for tensor in coarse:
        if not math.prod(tensor.shape):
            continue
        try:
            rows = _dequantised(gguf, content, tensor, most=64)
        except NotImplementedError:
            continue
        blocks = torch.from_numpy(rows.astype("float64")).reshape(-1, 32)
        steps = blocks.sort(dim=1).values.diff(dim=1)
        least = torch.where(steps > 1e-6 * blocks.abs().amax(1, keepdim=True), steps, math.inf).amin(1)
        return tensor.name, rounding_noise(least[least.isfinite()], blocks)
    return None


FORMAT = FileFormat((".gguf",), lambda path, head: head.startswith(b"GGUF"), entries, rank=3)
