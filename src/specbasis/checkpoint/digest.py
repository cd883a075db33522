"""Digests: what proves that a kept thing is whole, and that it is the thing that is asked for.

Whatever is kept and used again carries a *seal*: `digest` of its identity (of which configuration, matrix or
weights it is) followed by its content, as it will be read and not as it is stored. Each kind has its own place for
it: the footer of a Parquet part, a tensor of a safetensors file, a key of a manifest or of a line. What does not
fit its seal is computed anew, or named where that is not possible.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEAL = "sha256"
"""What a seal is called where it is kept."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: str | bytes | Tensor) -> str:
    """SHA-256 over texts, bytes, and tensors with their shapes and formats, hexadecimal.

    Texts and bytes are not told apart by their lengths: an identity is written as JSON, which ends where it ends.
    """
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            hashed.update(f"{tuple(part.shape)} {part.dtype}".encode())
            hashed.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            hashed.update(part.encode() if isinstance(part, str) else part)
    return hashed.hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its seal in it."""
    return {**value, SEAL: _seal(value)}


def proven(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object that fits its seal; one without any, which versions before seals wrote, is taken as it is.

    Raises:
        ValueError: the seal is not that of the object.
    """
    if SEAL in value and value[SEAL] != _seal(value):
        raise ValueError("it is not what was written: its SHA-256 differs")
    return value


def _seal(value: Mapping[str, Any]) -> str:
    content = json.loads(json.dumps({name: inner for name, inner in value.items() if name != SEAL}))
    return digest(json.dumps(content, sort_keys=True))
