"""What a format of weights files is, and what the readers of several formats need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint.entry import Entry, check_names, shown
from specbasis.core.dtypes import FORMATS, name_of
from specbasis.core.errors import InputError
from specbasis.core.extras import require


@dataclass(frozen=True)
class FileFormat:
    """One format of weights files: a module of this folder with a `FORMAT`.

    Attributes:
        endings: of the names of such files, the usual one first.
        opens: whether a file is of this format, from its path and its first nine bytes.
        entries: the tensors of a file: from its path, what the user called it, and the key behind ``#``.
        rank: where a folder holds files of several formats, the lowest is read.
    """

    endings: tuple[str, ...]
    opens: Callable[[Path, bytes], bool]
    entries: Callable[[Path, str, str], Mapping[str, Entry]]
    rank: int


def tensor_entries(tensors: Mapping[str, Any], source: str, *, bounded: bool = False) -> dict[str, Entry]:
    """Entries of tensors in memory; ``bounded`` refuses views that claim more numbers than the file stores."""
    named = named_as_text({name: value for name, value in tensors.items() if isinstance(value, Tensor)}, source)
    check_names(named, source)
    entries = {}
    for name, tensor in named.items():
        form = _form(tensor, bounded)
        held = f"{form} {name_of(tensor.dtype)}".strip()
        # A model on the meta device has shapes and roles: what is asked for those reads no number.
        dtype = name_of(tensor.dtype) if form == "meta" and not bounded else held
        shape = () if tensor.is_nested else tuple(tensor.shape)
        entries[name] = Entry(shape, dtype, partial(_stored, tensor, f"{source}: {name!r} is a {held} tensor"))
    return entries


def _form(tensor: Tensor, bounded: bool) -> str:
    """What keeps a tensor from being read as a dense array of numbers, or an empty string."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return "sparse"
    if tensor.is_meta:
        return "meta"
    if bounded and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "repeated"
    return ""


def _stored(tensor: Tensor, name: str) -> Tensor:
    if _form(tensor, bounded=False):
        raise InputError(f"{name}, not an array of numbers; make it a dense one first")
    return tensor.detach()


def named_as_text(content: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """A dictionary with its keys as text.

    Raises:
        InputError: two of them are the same text, such as 0 and "0".
    """
    named = {str(key): value for key, value in content.items()}
    if len(named) < len(content):
        texts = [str(key) for key in content]
        twice = next(text for text in texts if texts.count(text) > 1)
        raise InputError(
            f"{source}: has two keys {shown(twice)}, a number and a text, and nothing says which is meant"
        )
    return named


def tensor_of(raw: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of its own from little-endian bytes."""
    kind = FORMATS[dtype].torch
    writable = raw if isinstance(raw, bytearray) else bytearray(raw)
    return (torch.frombuffer(writable, dtype=kind) if raw else torch.empty(0, dtype=kind)).reshape(shape)


def rounding_noise(steps: Tensor, values: Tensor) -> float:
    """Noise of rounding to levels a step apart, as a share of the values' root mean square: step/√12 / rms."""
    return float((steps.square().mean() / 12).sqrt() / values.square().mean().sqrt())


def quantised(path: Path, source: str, reason: str, noise: tuple[str, float] | None) -> InputError:
    """The refusal of a quantised file, with the noise of the matrix that was measured where one was."""
    figure = f" (about {noise[1]:.1%} of the root mean square of {noise[0]!r})" if noise else ""
    return InputError(
        f"{source}: {shown(path.name)} is quantised ({reason}), and its rounding noise{figure} would pass for "
        "a change of the trailing singular vectors; want the model in floating point"
    )


def extra(name: str, source: str) -> Any:
    """An optional library, or the refusal that says how to install it."""
    return require(name, purpose=f"{source}: reading this file needs")
