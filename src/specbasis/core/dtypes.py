"""The one table of number formats: what they are called, how many bytes a number takes, how precise it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """A format in which the numbers of a tensor are stored.

    Attributes:
        name: torch's, without ``torch.``.
        codes: safetensors' and GGUF's name, and behind it ONNX's where that is not ``name`` in capitals.
        bytes: that a number takes.
        precision: significant bits, the leading one included; 0 for whole numbers.
        exponent: of the smallest normal number, a power of two.
    """

    name: str
    codes: tuple[str, ...]
    bytes: int
    precision: int = 0
    exponent: int = 0

    @property
    def torch(self) -> torch.dtype:
        """The same format as torch has it."""
        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    @property
    def step(self) -> float:
        """Distance of neighbouring numbers, relative to the power of two below them: 2^(1 − precision)."""
        return 2.0 ** (1 - self.precision)


FORMATS = {
    form.name: form
    for form in (
        Format("bfloat16", ("BF16", "BFLOAT16"), 2, 8, -126),
        Format("float16", ("F16", "FLOAT16"), 2, 11, -14),
        Format("float32", ("F32", "FLOAT"), 4, 24, -126),
        Format("float64", ("F64", "DOUBLE"), 8, 53, -1022),
        Format("float8_e4m3fn", ("F8_E4M3",), 1, 4, -6),
        Format("float8_e5m2", ("F8_E5M2",), 1, 3, -14),
        Format("float8_e4m3fnuz", ("F8_E4M3FNUZ",), 1, 4, -7),
        Format("float8_e5m2fnuz", ("F8_E5M2FNUZ",), 1, 3, -15),
        Format("int64", ("I64",), 8),
        Format("int32", ("I32",), 4),
        Format("uint32", ("U32",), 4),
        Format("int16", ("I16",), 2),
        Format("int8", ("I8",), 1),
        Format("uint8", ("U8",), 1),
        Format("bool", ("BOOL",), 1),
    )
}
"""Name → format. Whatever else a file may hold is called by its own name in lower case, and holds no weights."""

UNSCALED = tuple(form.name for form in FORMATS.values() if form.precision >= 8)
"""Formats that hold weights as they are, the coarsest first; 8-bit floats mean something with their scales only."""

BY_PRECISION = {form.precision: form.name for form in reversed(FORMATS.values()) if form.precision}
"""Significant bits → the format that has them."""

_BY_CODE = {code: form.name for form in FORMATS.values() for code in form.codes}


def by_code(code: str) -> str:
    """Name of the format that safetensors, GGUF or ONNX calls so; of an unknown one the code in lower case."""
    return _BY_CODE.get(code, code.lower())


def name_of(dtype: torch.dtype) -> str:
    """Name of a format, as torch has it, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def widened(X: torch.Tensor) -> torch.Tensor:
    """The same numbers in bfloat16, which holds every 8-bit float, where they are 8-bit floats; else X itself."""
    return X.to(torch.bfloat16) if X.dtype.itemsize == 1 and X.dtype.is_floating_point else X


def roundoff(name: str) -> float:
    """Largest relative error of rounding to an unscaled format, half a step; 0 for any other name."""
    return FORMATS[name].step / 2 if name in UNSCALED else 0.0
