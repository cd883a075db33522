"""The files of MNIST and CIFAR-10 as arrays: read in place, without following links, and nothing in them is run."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specbasis.checkpoint.formats import pickles
from specbasis.checkpoint.regular import read_bytes, regular
from specbasis.core.errors import InputError

LARGEST = 2**29
"""Bytes of a file or an archive, unpacked; CIFAR-10 has a third of them."""

Array = NDArray[Any]
Parts = dict[str, tuple[Array, Array]]
"""``train`` and ``test`` → pixels (n, height, width[, 3]) uint8, and labels."""


@dataclass(frozen=True)
class Place:
    """A folder, or one inside of a tar archive, from which files are read by name.

    Nothing is unpacked to disk, and no link that leads out of the place is followed.
    """

    path: Path
    inside: str = ""

    def read(self, name: str) -> bytes | None:
        """A file's bytes, unpacked where the file is gzipped; None where it is not there."""
        if self.path.is_file():
            return self._members.get(f"{self.inside}/{name}")
        folder = self.path / self.inside
        for path in (folder / name, folder / f"{name}.gz"):
            if not path.is_file():
                continue
            if not path.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{path}: is a link that leads out of the folder; put the file itself there")
            return _unpacked(path) if path.suffix == ".gz" else read_bytes(path, LARGEST)
        return None

    @cached_property
    def _members(self) -> dict[str, bytes]:
        """Every regular file, in one pass: the archive is compressed as a whole."""
        members: dict[str, bytes] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(_unpacked(self.path)), mode="r:") as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                    if file is not None:
                        members[member.name.removeprefix("./")] = file.read()
        except (tarfile.TarError, OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: is damaged or no archive ({error}); fetch it again") from error
        return members


def _unpacked(path: Path) -> bytes:
    """What a gzipped file holds, which is no more than such data sets are."""
    try:
        with gzip.open(regular(path)) as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is truncated or damaged ({error}); fetch it again") from error
    if len(content) > LARGEST:
        raise InputError(f"{path}: holds more than {LARGEST:,} bytes unpacked, as no such data set does: not read")
    return content


# --- idx: MNIST and Fashion-MNIST -------------------------------------------------------------------------------


def read_idx(path: Path) -> Parts | None:
    """MNIST's four idx files in a folder; None where they are not there."""
    place = Place(path)
    if place.read("train-images-idx3-ubyte") is None:
        return None
    arrays = []
    for name in (f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")):
        content = place.read(name)
        if content is None:
            raise InputError(f"{path / name}: is missing; want the four idx files together")
        arrays.append(_idx_array(content, str(path / name)))
    return {"train": (arrays[0], arrays[1]), "test": (arrays[2], arrays[3])}


def _idx_array(content: bytes, name: str) -> NDArray[np.uint8]:
    """The array of an idx file: 0, 0, type (8: unsigned byte), number of axes; their lengths; the bytes."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise InputError(f"{name}: is no idx file of bytes (begins {content[:4].hex()}, want 000008..)")
    axes = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    size, wanted = len(content) - 4 - 4 * axes, math.prod(shape)
    if size != wanted:
        raise InputError(f"{name}: holds {size} bytes for {shape} ({wanted} bytes): truncated or damaged")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------

_RECORD = 1 + 3 * 32 * 32
_Decode = Callable[[bytes, str], tuple[Array, Array]]
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def read_cifar(path: Path) -> Parts | None:
    """CIFAR-10 in either version, from its archive or unpacked, here or in the folder that the archive makes."""
    for version, ending, inside, decode in (
        ("python", "", "cifar-10-batches-py", _python_batch),
        ("binary", ".bin", "cifar-10-batches-bin", _binary_batch),
    ):
        archive = path / f"cifar-10-{version}.tar.gz"
        for place in (Place(path), Place(path, inside), *([Place(archive, inside)] if archive.is_file() else [])):
            if place.read(f"data_batch_1{ending}") is not None:
                return {part: _batches(place, names, ending, decode) for part, names in _BATCHES.items()}
    return None


def _batches(place: Place, names: Sequence[str], ending: str, decode: _Decode) -> tuple[Array, Array]:
    batches = []
    for name in names:
        where = f"{place.path / place.inside}: {name}{ending}"
        content = place.read(name + ending)
        if content is None:
            raise InputError(f"{where} is missing; want all six batches of CIFAR-10")
        batches.append(decode(content, where))
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _binary_batch(content: bytes, where: str) -> tuple[Array, Array]:
    if not content or len(content) % _RECORD:
        raise InputError(f"{where} has {len(content)} bytes, no multiple of {_RECORD}: truncated or damaged")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _python_batch(content: bytes, where: str) -> tuple[Array, Array]:
    try:
        pickles.check(io.BytesIO(content), len(content))
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(f"{where} is damaged ({type(error).__name__}: {error}); fetch it again") from error
    table = batch if isinstance(batch, Mapping) else {}
    named = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in table.items()}
    data, labels = named.get("data"), named.get("labels")
    if not isinstance(data, _Inert) or not isinstance(labels, list):
        raise InputError(f"{where} holds no data and labels; want a batch of CIFAR-10's python version")
    match data.state:
        case (_, tuple(), _Inert(made_of=("u1" | b"u1", *_)), fortran, bytes() as pixels) if not fortran:
            pass
        case _:
            raise InputError(f"{where} holds an array that is not unsigned bytes in C order")
    if len(pixels) != len(labels) * (_RECORD - 1) or not all(isinstance(label, int) for label in labels):
        raise InputError(f"{where} holds {len(pixels)} bytes for {len(labels)} images; want {_RECORD - 1} for each")
    return np.frombuffer(pixels, np.uint8).reshape(-1, _RECORD - 1), np.array(labels, dtype=np.int64)


class _Inert:
    """What a pickle says of an array or a dtype: what it is made of and its state, recorded and not acted on."""

    state: Any = None

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _as_bytes(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes: as text in Latin-1."""
    if encoding != "latin1":
        raise InputError(f"names the encoding {encoding!r}; want latin1")
    return text.encode("latin-1")


class _Unpickler(pickle._Unpickler):  # in C a number makes a memo of its size
    """Reads the one thing that CIFAR-10's pickles hold beside builtins, arrays, as inert records; runs nothing."""

    ADMITTED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _Inert,
        ("numpy._core.multiarray", "_reconstruct"): _Inert,
        ("numpy", "ndarray"): _Inert,
        ("numpy", "dtype"): _Inert,
        ("_codecs", "encode"): _as_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the pickle names, or an error."""
        if (module, name) not in self.ADMITTED:
            raise InputError(f"wants to run {module}.{name}, which no batch of CIFAR-10 does: not read")
        return self.ADMITTED[module, name]
