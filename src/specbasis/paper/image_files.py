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

from specbasis.core.errors import InputError

Array = NDArray[Any]
Parts = dict[str, tuple[Array, Array]]
"""``train`` and ``test`` → pixels (n, height, width[, 3]) uint8, and labels."""


@dataclass(frozen=True)
class Folder:
    """A folder from which files are read by name, none of them through a link that leads out of it."""

    path: Path

    def read(self, name: str) -> bytes | None:
        """A file's bytes, unpacked where the file is gzipped; None where it is not there."""
        for path in (self.path / name, self.path / f"{name}.gz"):
            if path.is_file():
                if not path.resolve().is_relative_to(self.path.resolve()):
                    raise InputError(f"{path}: is a link that leads out of the folder; put the file itself there")
                return _unpacked(path) if path.suffix == ".gz" else path.read_bytes()
        return None

    def below(self, name: str) -> Folder | None:
        """A subfolder, where it is there."""
        return Folder(self.path / name) if (self.path / name).is_dir() else None


@dataclass(frozen=True)
class Archive:
    """The members of a tar archive, read in place: nothing is unpacked to disk, and links are not followed."""

    path: Path
    prefix: str

    def read(self, name: str) -> bytes | None:
        """A member's bytes; None where it is not there."""
        return self._members.get(f"{self.prefix}/{name}")

    @cached_property
    def _members(self) -> dict[str, bytes]:
        """Every regular file, in one pass: the archive is compressed as a whole."""
        found: dict[str, bytes] = {}
        try:
            with tarfile.open(self.path, "r:*") as archive:
                for member in archive:
                    file = archive.extractfile(member) if member.isreg() else None
                    if file is not None:
                        found[member.name.removeprefix("./")] = file.read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self.path}: is damaged or no archive ({error}); fetch it again") from error
        return found


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is truncated or damaged ({error}); fetch it again") from error


# --- idx: MNIST and Fashion-MNIST -------------------------------------------------------------------------------


def read_idx(folder: Folder) -> Parts | None:
    """MNIST's four idx files; None where they are not there."""
    if folder.read("train-images-idx3-ubyte") is None:
        return None
    arrays = []
    for name in (f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")):
        content = folder.read(name)
        if content is None:
            raise InputError(f"{folder.path / name}: is missing; want the four idx files together")
        arrays.append(_idx_array(content, str(folder.path / name)))
    return {"train": (arrays[0], arrays[1]), "test": (arrays[2], arrays[3])}


def _idx_array(content: bytes, name: str) -> NDArray[np.uint8]:
    """The array of an idx file: 0, 0, type (8: unsigned byte), number of axes; their lengths; the bytes."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise InputError(f"{name}: is no idx file of bytes (begins {content[:4].hex()}, want 000008..)")
    axes = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    found, wanted = len(content) - 4 - 4 * axes, math.prod(shape)
    if found != wanted:
        raise InputError(f"{name}: holds {found} bytes for {shape} ({wanted} bytes): truncated or damaged")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------

_RECORD = 1 + 3 * 32 * 32
_Decode = Callable[[bytes, str], tuple[Array, Array]]
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def read_cifar(folder: Folder) -> Parts | None:
    """CIFAR-10 in either version, from its archive or unpacked, here or in the folder that the archive makes."""
    for version, ending, inside, decode in (
        ("python", "", "cifar-10-batches-py", _python_batch),
        ("binary", ".bin", "cifar-10-batches-bin", _binary_batch),
    ):
        archive = folder.path / f"cifar-10-{version}.tar.gz"
        places: list[Folder | Archive | None] = [folder, folder.below(inside)]
        places += [Archive(archive, inside)] if archive.is_file() else []
        for place in places:
            if place is not None and place.read(f"data_batch_1{ending}") is not None:
                return {part: _batches(place, names, ending, decode) for part, names in _BATCHES.items()}
    return None


def _batches(place: Folder | Archive, names: Sequence[str], ending: str, decode: _Decode) -> tuple[Array, Array]:
    pixels, labels = [], []
    for name in names:
        label = f"{place.path}: {name}{ending}"
        content = place.read(name + ending)
        if content is None:
            raise InputError(f"{label} is missing; want all six batches of CIFAR-10")
        batch = decode(content, label)
        pixels.append(batch[0])
        labels.append(batch[1])
    return np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.concatenate(labels)


def _binary_batch(content: bytes, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if not content or len(content) % _RECORD:
        raise InputError(f"{where} has {len(content)} bytes, no multiple of {_RECORD}: truncated or damaged")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _python_batch(content: bytes, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(f"{where} is damaged ({type(error).__name__}: {error}); fetch it again") from error
    table = batch if isinstance(batch, Mapping) else {}
    named = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in table.items()}
    data, labels = named.get("data"), named.get("labels")
    if not isinstance(data, _State) or not isinstance(labels, list):
        raise InputError(f"{where} holds no data and labels; want a batch of CIFAR-10's python version")
    pixels = data.bytes_of(where)
    if len(pixels) != len(labels) * (_RECORD - 1) or not all(isinstance(label, int) for label in labels):
        raise InputError(f"{where} holds {len(pixels)} bytes for {len(labels)} images; want {_RECORD - 1} for each")
    return np.frombuffer(pixels, np.uint8).reshape(-1, _RECORD - 1), np.array(labels, dtype=np.int64)


class _State:
    """What a pickle says of an array: its state, recorded and not acted on."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def bytes_of(self, where: str) -> bytes:
        """The bytes of an array of unsigned bytes in C order."""
        match self.state:
            case (_, tuple(), _DType(name=("u1" | b"u1")), fortran, bytes() as content) if not fortran:
                return content
        raise InputError(f"{where} holds an array that is not unsigned bytes in C order")


class _DType:
    """What a pickle says of a dtype: its name."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


def _as_bytes(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes: as text in Latin-1."""
    if encoding != "latin1":
        raise InputError(f"names the encoding {encoding!r}; want latin1")
    return text.encode("latin-1")


class _Unpickler(pickle.Unpickler):
    """Reads the one thing that CIFAR-10's pickles hold beside builtins, arrays, as inert records; runs nothing."""

    ADMITTED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _State,
        ("numpy._core.multiarray", "_reconstruct"): _State,
        ("numpy", "ndarray"): _State,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): _as_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the pickle names, or an error."""
        if (module, name) not in self.ADMITTED:
            raise InputError(f"wants to run {module}.{name}, which no batch of CIFAR-10 does: not read")
        return self.ADMITTED[module, name]
