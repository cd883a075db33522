"""Decompositions kept on disk, so that a tensor is decomposed once whoever asks: by its contents, not its name."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.atomic import whole
from specbasis.checkpoint.formats import file_entries
from specbasis.core.errors import InputError
from specbasis.core.svd import ALGORITHM, SVD, decompose

LIMIT = 20 * 10**9
"""Bytes that the entries of a folder, decompositions and samples, may take together."""

_SIDES = ("left", "right")
_PARTS = ("U", "S", "Vh", "spectrum", "spectrum_error", "residual", "gap")


@dataclass(frozen=True)
class Cache:
    """A folder of decompositions, and of alignments with sampled updates, one safetensors file each.

    A file's name is the SHA-256 of the matrices (shape, dtype, bytes), the algorithm and the number of ranks: an
    entry is what would be computed, bit for bit. Files are written whole or not at all, carry a digest of what they
    hold, and are computed anew where that does not fit. The least recently used go first. A folder that cannot be
    written is a warning: nothing is kept then.

    Attributes:
        folder: made where it is missing; may be shared by processes and machines.
        limit: bytes that the entries may take together.
    """

    folder: Path
    limit: int = LIMIT

    def decompose(self, W: Float[Tensor, "out in"], ranks: int | None = None, *, name: str = "matrix") -> SVD:
        """What `specbasis.decompose` gives, from the folder where it is there.

        Costs one pass over W for its digest, and one over the entry.

        Raises: as `decompose`.
        """
        path = self.path(W, ranks)
        parts = _read(path, _PARTS)
        if parts is None:
            svd = decompose(W, ranks, name=name)
            # In the layout of what is read back: products of equal numbers can differ with the layout.
            parts = {part: getattr(svd, part).contiguous() for part in _PARTS}
            self._write(path, parts, "decompositions")
        return SVD(**parts)

    def samples(
        self, W: Tensor, T: Tensor, kind: str, draws: int, k: int, draw: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Alignments (left, right), each (draws, k), of W with sampled updates; what ``draw`` gives the first time.

        Args:
            W: pretrained.
            T: finetuned; the updates are like that from W to T.
            kind: of the updates.
            draws: how many.
            k: ranks.
            draw: computes them.
        """
        path = self.folder / f"{_digest([W, T])}-{ALGORITHM}-{kind}-{draws}-{k}.safetensors"
        sides = _read(path, _SIDES)
        if sides is None or any(side.shape != (draws, k) for side in sides.values()):
            sides = dict(zip(_SIDES, draw(), strict=True))
            self._write(path, sides, "samples")
        return sides["left"], sides["right"]

    def path(self, W: Float[Tensor, "out in"], ranks: int | None = None) -> Path:
        """The file that holds, or would hold, a matrix's decomposition. Costs one pass over W for its digest."""
        return self.folder / f"{_digest([W])}-{ALGORITHM}-{min(W.shape) if ranks is None else ranks}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], noun: str) -> None:
        parts = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        digest = torch.frombuffer(bytearray.fromhex(_digest(parts.values())), dtype=torch.uint8)
        try:
            with whole(path) as temporary:
                save_file({**parts, "digest": digest}, temporary)
            _evict(self.folder, self.limit)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{self.folder}: {noun} cannot be kept here ({error})", stacklevel=2)


def mapped(path: Path) -> SVD | None:
    """An entry that `Cache.decompose` gave before in this process, mapped: numbers are read when they are used.

    Its digest is not checked again; None where it is gone.
    """
    try:
        stored = _open(path)
        return SVD(**{part: stored[part] for part in _PARTS})
    except (InputError, KeyError, OSError):
        return None


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


def _read(path: Path, names: Sequence[str]) -> dict[str, Tensor] | None:
    """An entry that is there and whole, marked as used now."""
    if not path.exists():
        return None
    try:
        stored = dict(_open(path))
        parts = {name: stored[name].clone() for name in names}
        # Samples that version 0.1.0 kept have no digest.
        if "digest" in stored and bytes(stored["digest"].tolist()).hex() != _digest(parts.values()):
            return None
        os.utime(path)
    except (InputError, KeyError, OSError):
        return None
    return parts


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
