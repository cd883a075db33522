"""Regular files: what is read from disk is one. A pipe, a device or a socket would be waited for, for ever."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from specbasis.core.errors import InputError
from specbasis.core.text import printable

SMALL = 2**28
"""Bytes of the largest file that is read whole as text; the index of a very large model takes a hundredth."""


def regular(path: Path) -> Path:
    """The path of a regular file, or of nothing.

    Raises:
        InputError: something else is there.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, a device or a socket"
        raise InputError(f"{printable(str(path))}: is not a regular file but {kind}")
    return path


def read_bytes(path: Path, limit: int | None = SMALL) -> bytes:
    """Content of a regular file of a limited size, of any where the limit is None.

    Raises:
        InputError: something else, or a larger one.
        OSError: as `Path.read_bytes`.
    """
    # Not to wait where a pipe took the file's place since.
    descriptor = os.open(regular(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{printable(str(path))}: is not a regular file")
        if limit is not None:
            small(status.st_size, printable(str(path)), limit)
        return file.read()


def small(size: int, label: str, limit: int = SMALL) -> None:
    """Refuse to read a file whole that is too large for it.

    Raises:
        InputError: it has more bytes than the limit.
    """
    if size > limit:
        raise InputError(f"{label}: has {size} bytes; want a file of at most {limit}")


def read_text(path: Path, limit: int | None = SMALL) -> str:
    """Content of a regular file of a limited size, in UTF-8.

    Raises:
        InputError, OSError: as `read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none, or lists in it are nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError, OSError: as `read_bytes`.
        ValueError: as `parse_json`.
    """
    return parse_json(read_text(path))
