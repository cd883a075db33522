"""Decompositions kept on disk, so that a tensor is decomposed once whoever asks: by its contents, not its name."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.atomic import whole
from specbasis.checkpoint.readers import file_entries
from specbasis.core.errors import InputError
from specbasis.core.svd import ALGORITHM, SVD, decompose

LIMIT = 20 * 10**9
"""Bytes that the entries of a folder, decompositions and samples, may take together."""

_PARTS = ("U", "S", "Vh", "spectrum", "spectrum_error", "residual", "gap")


@dataclass(frozen=True)
class Cache:
    """A folder of decompositions, one safetensors file each.

    A file's name is the SHA-256 of the matrix (shape, dtype, bytes), the algorithm and the number of ranks: an
    entry is what `decompose` would return, bit for bit. Files are written whole or not at all, carry a
    digest of what they hold, and are computed anew where that does not fit. The least recently used go first.

    Attributes:
        folder: made where it is missing; may be shared by processes and machines.
        limit: bytes that the entries may take together.
    """

    folder: Path
    limit: int = LIMIT

    def decompose(self, W: Float[Tensor, "out in"], ranks: int | None = None, *, name: str = "matrix") -> SVD:
        """What `specbasis.decompose` gives, from the folder where it is there.

        Costs one pass over W for its digest, and one over the entry.

        Raises: as `decompose`. A folder that cannot be written is a warning, once: nothing is kept then.
        """
        path = self.path(W, ranks)
        found = _read(path)
        if found is None:
            computed = decompose(W, ranks, name=name)
            # In the layout of what is read back: products of equal numbers can differ with the layout.
            found = SVD(**{part: getattr(computed, part).contiguous() for part in _PARTS})
            self._write(path, found)
        return found

    def path(self, W: Float[Tensor, "out in"], ranks: int | None = None) -> Path:
        """The file that holds, or would hold, a matrix's decomposition. Costs one pass over W for its digest."""
        return self.folder / f"{_digest([W])}-{ALGORITHM}-{min(W.shape) if ranks is None else ranks}.safetensors"

    def _write(self, path: Path, svd: SVD) -> None:
        parts = {part: getattr(svd, part).cpu() for part in _PARTS}
        digest = torch.frombuffer(bytearray.fromhex(_digest(parts.values())), dtype=torch.uint8)
        try:
            with whole(path) as temporary:
                save_file({**parts, "digest": digest}, temporary)
            _evict(self.folder, self.limit)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{self.folder}: decompositions cannot be kept here ({error})", stacklevel=2)


def mapped(path: Path) -> SVD | None:
    """An entry that `Cache.decompose` gave before in this process, mapped: numbers are read when they are used.

    Its digest is not checked again; None where it is gone.
    """
    try:
        stored = _open(path)
        return SVD(**{part: stored[part] for part in _PARTS})
    except (InputError, KeyError, OSError):
        return None


@dataclass(frozen=True)
class Samples:
    """Alignments with sampled updates, kept in the same folder by content, kind, draws and ranks.

    Attributes:
        folder: that of `Cache`.
        limit: bytes that the folder's entries may take together.
    """

    folder: Path
    limit: int = LIMIT

    def read(self, W: Tensor, T: Tensor, kind: str, draws: int, k: int) -> tuple[Tensor, Tensor] | None:
        """(left, right), (draws, k), where they are there and whole."""
        path = self._path(W, T, kind, draws, k)
        if not path.exists():
            return None
        try:
            stored = dict(_open(path))
            left, right = (stored[side].clone() for side in ("left", "right"))
            os.utime(path)
        except (InputError, KeyError, OSError):
            return None
        return (left, right) if left.shape == right.shape == (draws, k) else None

    def write(self, W: Tensor, T: Tensor, kind: str, draws: int, k: int, found: tuple[Tensor, Tensor]) -> None:
        """Keep them; a folder that cannot be written is a warning."""
        sides = {side: x.cpu().contiguous() for side, x in zip(("left", "right"), found, strict=True)}
        try:
            with whole(self._path(W, T, kind, draws, k)) as temporary:
                save_file(sides, temporary)
            _evict(self.folder, self.limit)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{self.folder}: samples cannot be kept here ({error})", stacklevel=2)

    def _path(self, W: Tensor, T: Tensor, kind: str, draws: int, k: int) -> Path:
        return self.folder / f"{_digest([W, T])}-{ALGORITHM}-{kind}-{draws}-{k}.safetensors"


def _evict(folder: Path, limit: int) -> None:
    """Remove what was used longest ago until the rest fits."""
    entries = []
    for path in folder.glob("*.safetensors"):
        try:
            entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        except OSError:  # removed by another process
            continue
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


def _open(path: Path) -> Checkpoint:
    """One file, whatever lies beside it: a cache's folder may hold ten thousands."""
    return Checkpoint(path.name, file_entries(path, path.name))


def _read(path: Path) -> SVD | None:
    """An entry that is there and whole, marked as used now."""
    if not path.exists():
        return None
    try:
        stored = dict(_open(path))
        parts = {part: stored[part].clone() for part in _PARTS}
        whole = bytes(stored["digest"].tolist()).hex() == _digest(parts.values())
        if whole:
            os.utime(path)
    except (InputError, KeyError, OSError):
        return None
    return SVD(**parts) if whole else None


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
