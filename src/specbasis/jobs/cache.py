"""Decompositions kept on disk, so that a tensor is decomposed once whoever asks: by its contents, not its name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.atomic import whole
from specbasis.checkpoint.digest import digest
from specbasis.checkpoint.formats import file_entries
from specbasis.checkpoint.formats.safetensors import entries
from specbasis.core.errors import InputError
from specbasis.core.grammar import parse_bytes
from specbasis.core.svd import ALGORITHM, SVD, decompose

LIMIT = 20 * 10**9
"""Bytes that the entries of a folder, decompositions and samples, may take together."""

_SIDES = ("left", "right")
_PARTS = ("U", "S", "Vh", "spectrum", "spectrum_error", "residual", "gap")


@dataclass(frozen=True)
class Cache:
    """A folder of decompositions, and of alignments with sampled updates, one safetensors file each.

    A file's name is the SHA-256 of the matrices (shape, dtype, bytes), the algorithm and the number of ranks: an
    entry is what would be computed, bit for bit. Files are written whole or not at all, carry a seal over their
    name and what they hold (`checkpoint.digest`), and are computed anew where it does not fit. The least recently
    used go first. A folder that cannot be written is a warning: nothing is kept then.

    Versions before seals kept a digest of the contents alone. A decomposition of theirs is taken, and sealed, where
    it is shown to be that of the matrix (`_decomposes`); samples of theirs are drawn anew.

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
        parts, is_sealed = _read(path, _PARTS)
        if parts and (is_sealed or _decomposes(SVD(**parts), W)):
            svd = SVD(**parts)
        else:
            svd, is_sealed = decompose(W, ranks, name=name), False
            # In the layout of what is read back: products of equal numbers can differ with the layout.
            svd = SVD(**{part: getattr(svd, part).contiguous() for part in _PARTS})
        if not is_sealed:
            self._write(path, {part: getattr(svd, part) for part in _PARTS}, "decompositions")
        return svd

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
        path = self.folder / f"{digest(W, T)}-{ALGORITHM}-{kind}-{draws}-{k}.safetensors"
        sides, is_sealed = _read(path, _SIDES)
        if not is_sealed:
            sides = dict(zip(_SIDES, draw(), strict=True))
            self._write(path, sides, "samples")
        return sides["left"], sides["right"]

    def path(self, W: Float[Tensor, "out in"], ranks: int | None = None) -> Path:
        """The file that holds, or would hold, a matrix's decomposition. Costs one pass over W for its digest."""
        return self.folder / f"{digest(W)}-{ALGORITHM}-{min(W.shape) if ranks is None else ranks}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], noun: str) -> None:
        parts = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        seal = torch.frombuffer(bytearray.fromhex(_seal(path, parts)), dtype=torch.uint8)
        try:
            with whole(path) as temporary:
                save_file({**parts, "seal": seal}, temporary)
            _PROVEN[path] = _which(path)
            _evict(self.folder, self.limit)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{self.folder}: {noun} cannot be kept here ({error})", stacklevel=2)


def cache_folder() -> Path:
    """Where what can be computed again is kept: $XDG_CACHE_HOME/specbasis, ~/.cache/specbasis."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specbasis"


def factors_in(folder: str | Path | None, size: str = "20GB") -> Cache:
    """The cache in a folder, by default the user's own, and what its entries may take."""
    return Cache(Path(folder or cache_folder() / "factors"), parse_bytes(size))


_PROVEN: dict[Path, tuple[int, int]] = {}
"""The files whose seals this process has checked: inode and bytes. An entry is never written in place."""


def mapped(path: Path) -> SVD | None:
    """An entry that `Cache.decompose` gave before in this process, mapped: numbers are read when they are used.

    None where the file is gone, or is another one than that whose seal was checked.
    """
    try:
        if _PROVEN.get(path) != _which(path):
            return None
        stored = entries(path, path.name)
        return SVD(**{part: stored[part].load() for part in _PARTS})
    except (InputError, KeyError, OSError):
        return None


def _which(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size


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


def _read(path: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], bool]:
    """An entry that is there and whole, marked as used now, and whether its seal says that it belongs there.

    Empty where there is none, or one that does not hold what was written.
    """
    if not path.exists():
        return {}, False
    try:
        stored = dict(_open(path))
        parts = {name: stored[name] for name in names}
        is_sealed = "seal" in stored
        kept, wanted = ("seal", _seal(path, parts)) if is_sealed else ("digest", digest(*parts.values()))
        if bytes(stored[kept].tolist()).hex() != wanted:
            return {}, False
        os.utime(path)
        _PROVEN[path] = _which(path)
    except (InputError, KeyError, OSError, TypeError, ValueError):
        return {}, False
    return parts, is_sealed


def _seal(path: Path, parts: Mapping[str, Tensor]) -> str:
    """The seal of an entry: its name is its identity."""
    return digest(json.dumps([path.name, *parts]), *parts.values())


def _decomposes(svd: SVD, W: Tensor) -> bool:
    """Whether triplets are those of W, by its products with one random combination of the vectors of either side.

    For each rank ‖W v − σ u‖ and ‖Wᵀ u − σ v‖ are at most its residual, so that of a combination with weights g the
    distance is at most Σ |g_i| residual_i; of another matrix's triplets it is of the size of its values.
    """
    if svd.shape != tuple(W.shape) or not torch.isfinite(svd.S).all():
        return False
    g = torch.randn(len(svd.S), dtype=svd.S.dtype, generator=torch.Generator().manual_seed(0)).to(svd.S.device)
    bound = 2 * float(g.abs() @ svd.residual) + 1e-13 * float(svd.S[0]) * len(g)
    W = W.detach().to(svd.U)
    return (
        max(
            float((W @ (svd.Vh.mT @ g) - svd.U @ (svd.S * g)).norm()),
            float((W.mT @ (svd.U @ g) - svd.Vh.mT @ (svd.S * g)).norm()),
        )
        <= bound
    )
