"""NumPy archives: a zip archive of arrays, read one at a time; none is unpickled."""

from __future__ import annotations

import zipfile
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch

from specbasis.checkpoint.entry import Entry, check_names, no_key, parsing
from specbasis.checkpoint.formats.kit import FileFormat
from specbasis.core.dtypes import FORMATS
from specbasis.core.errors import InputError

_MOST = 64
"""How many times its size an archive may unpack to: weights shrink little."""

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def entries(path: Path, source: str, key: str = "") -> dict[str, Entry]:
    """The arrays of an archive, by the names that they were saved under."""
    no_key(key, source)
    with parsing(path.name, source), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        check_names(names, source)
        if len(set(names)) < len(names):
            raise ValueError("two arrays have one name")
        if sum(member.file_size for member in members) > _MOST * path.stat().st_size:
            raise ValueError(f"it unpacks to more than {_MOST} times its size")
        return {name: _entry(path, archive, m, source) for name, m in zip(names, members, strict=True)}


def _entry(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, source: str) -> Entry:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{member.filename}: is no array of NumPy's format 1 or 2")
        shape, _, dtype = _HEADERS[version](file)
        if prod(shape) * dtype.itemsize != member.file_size - file.tell() and not dtype.hasobject:
            raise ValueError(f"{member.filename}: {member.file_size} bytes for {shape} {dtype}")
    name = dtype.name if dtype.name in FORMATS else f"numpy {dtype.name}"
    return Entry(tuple(shape), name, partial(_read, path, member.filename, name, source))


def _read(path: Path, member: str, dtype: str, source: str) -> torch.Tensor:
    if dtype not in FORMATS:
        raise InputError(f"{source}: {member} holds {dtype}, not numbers")
    with parsing(path.name, source), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))


FORMAT = FileFormat((".npz",), lambda path, head: head.startswith(b"PK") and path.suffix == ".npz", entries, rank=5)
