"""Activations of a frozen prefix on disk: one row an example, found by the example's content."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from specbasis.core.dtypes import FORMATS
from specbasis.core.errors import InputError
from specbasis.finetuning.prefix.cut import Cut, Kept, capture, chosen
from specbasis.finetuning.prefix.probe import agree, evaluating, outputs
from specbasis.finetuning.prefix.standin import KEY

Collator = Callable[[list[Any]], Mapping[str, Any]]
Progress = Callable[[int, int], None]
Dtype = Literal["float32", "bfloat16"]

_FORMAT = 1
_CHUNK = 1024  # examples that are sorted by length together and written to one file
_KEYED = 64  # examples that are collated together to be looked up
_SPARE = 64 * 2**20  # bytes of the disk that are left alone
_HEAD = np.dtype([("key", "V16"), ("offset", "<i8"), ("tokens", "<i4"), ("check", "<u4")])


@dataclass(frozen=True)
class _Row:
    """Where an example's values are, and how many tokens it has (0 if it is not made of tokens)."""

    file: Path
    offset: int
    tokens: int


class NoPrefixError(InputError):
    """Nothing can be kept of these examples, though the model has a frozen prefix: train without the cache."""


class PrefixCache:
    """What the prefix of a model gives for each of a number of examples, in files that are mapped into memory.

    A folder holds caches of any number of cuts, weights and datasets. A cache's own folder is named by the digest
    of its cut (`Cut.digest`: weights below it, structure, place) and the number format; in it an example is found
    by SHA-256 of what the collator makes of it: ids, token types, pixels, without padding and labels. A row that is
    found is therefore the right one, whatever tokeniser, task or order it was written for, and equal examples have
    one row.

    Files are written whole or not at all and carry a check sum for each row, which opening tests; what does
    not fit is removed and computed anew.

    Attributes:
        cut: where the model was cut.
        folder: of this cache.
        dtype: in which the rows are stored.
    """

    def __init__(self, cut: Cut, folder: Path, dtype: Dtype) -> None:
        if dtype not in get_args(Dtype):
            raise InputError(
                f"got dtype = {dtype!r} for the prefix cache; want {' or '.join(map(repr, get_args(Dtype)))}"
            )
        self.cut, self.dtype = cut, dtype
        self.folder = Path(folder) / f"{cut.digest[:32]}-{dtype}"
        self._rows: dict[bytes, _Row] = {}

    @classmethod
    def build(
        cls,
        model: nn.Module,
        cut: Cut,
        dataset: Any,
        collator: Collator,
        folder: Path | str,
        *,
        dtype: Dtype = "float32",
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> PrefixCache:
        """Open the cache and run the prefix once, in evaluation mode, for each example that it lacks.

        A run that was stopped goes on where it was; several processes take turns. Costs the prefix's forward pass
        for the missing examples, and reads all rows that are there once.

        Args:
            model: the model in which `cut` was found, on the device where it is to run.
            cut: of `find_cut`.
            dataset: anything with a length and items, or several in a list.
            collator: makes a batch of items, as in training.
            folder: for this and other caches.
            dtype: "float32", or "bfloat16" at half the size and about three digits.
            batch_size: examples that run together.
            progress: called with the examples done and all examples.

        Raises:
            NoPrefixError: an example changes from one reading to the next, or the model's output for it depends on
                the rest of its batch; the dataset has no length; activations are not finite. Training can go on
                without the cache.
            InputError: the disk is too small, or the folder cannot be written.
        """
        cache = cls(cut, Path(folder), dtype)
        datasets = (
            dataset if isinstance(dataset, list | tuple) and not isinstance(dataset[0], Mapping) else [dataset]
        )
        for each in datasets:
            if not hasattr(each, "__len__"):
                raise NoPrefixError("the prefix cache needs a dataset with a length; train a stream without it")
        try:
            cache.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{cache.folder}: the prefix cache cannot be written ({error.strerror})") from error
        with _locked(cache.folder / "lock"), evaluating(model), torch.no_grad():
            cache._open()
            cache._fill(model, datasets, collator, batch_size, progress)
        return cache

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process reads rows and runs no model.
        return {**self.__dict__, "cut": replace(self.cut, actions={})}

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.rows"))

    def manifest(self) -> dict[str, Any]:
        """What a report of the training should say about it."""
        return {
            "cut": str(self.cut),
            "before": self.cut.before,
            "digest": self.cut.digest,
            "dtype": self.dtype,
            "examples": len(self),
            "bytes": self.size,
            "prefix_dropout": "off: everything below the cut ran once, in evaluation mode",
        }

    # Reading.

    @contextmanager
    def suffix(self, model: nn.Module) -> Iterator[nn.Module]:
        """`Cut.suffix`, with the weights below the cut parked in this folder while batches bring their values."""
        with self.cut.suffix(model, park=self.folder):
            yield model

    def collator(self, collator: Collator) -> Collator:
        """A collator that adds to each batch the values of its examples, for `Cut.suffix`."""
        return _Collator(self, collator)

    def values(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The values of a batch's examples, padded as the batch is, by the names that `Cut.suffix` takes.

        Raises:
            InputError: an example is not in the cache.
        """
        keys, mask = row_keys(batch, self.cut.inputs)
        found = [self._rows.get(key) for key in keys]
        if None in found:
            raise InputError(
                f"{found.count(None)} of {len(keys)} examples are not in the prefix cache ({self.folder}): want "
                "the examples it was built for; if they are augmented or masked at random, train without it"
            )
        rows = [row for row in found if row is not None]
        # Mapped while a batch is read, not longer: pages that stay mapped count as this process's memory.
        dtype = FORMATS[self.dtype].torch
        maps = {
            file: torch.from_file(str(file), shared=False, size=file.stat().st_size // dtype.itemsize, dtype=dtype)
            for file in {row.file for row in rows}
        }
        return {
            f"{KEY}{n}": _padded(kept, [self._part(maps[row.file], n, row) for row in rows], mask)
            for n, kept in enumerate(self.cut.kept)
        }

    def _part(self, numbers: Tensor, n: int, row: _Row) -> Tensor:
        """One value of an example, from the numbers of its file."""
        start = row.offset + sum(self._numbers(kept, row.tokens) for kept in self.cut.kept[:n])
        return numbers[start : start + self._numbers(self.cut.kept[n], row.tokens)]

    def _numbers(self, kept: Kept, tokens: int) -> int:
        return kept.width * (tokens if kept.packed else 1)

    def _size(self, tokens: int) -> int:
        """Bytes of a row."""
        return FORMATS[self.dtype].bytes * sum(self._numbers(kept, tokens) for kept in self.cut.kept)

    # Opening.

    def _open(self) -> None:
        """Take up the rows that are whole; remove files that are not."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for path in sorted(self.folder.glob("*.rows")):
            index = path.with_suffix(".index")
            found = self._whole(path, index)
            if found is None:
                path.unlink(missing_ok=True)
                index.unlink(missing_ok=True)
            else:
                self._rows.update(found)

    def _whole(self, path: Path, index: Path) -> dict[bytes, _Row] | None:
        """The rows of a file, or None if file or index is not what was written."""
        try:
            raw = index.read_bytes()
            line, _, rest = raw.partition(b"\n")
            entries = np.frombuffer(rest, _HEAD)
            if json.loads(line) != self._head(rest):
                return None
            data = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError):
            return None
        size = FORMATS[self.dtype].bytes
        end = 0
        for entry in entries:
            start, end = int(entry["offset"]) * size, int(entry["offset"]) * size + self._size(int(entry["tokens"]))
            if end > len(data) or zlib.crc32(data[start:end].data) != entry["check"]:
                return None
        if end != len(data):
            return None
        return {e["key"].tobytes(): _Row(path, int(e["offset"]), int(e["tokens"])) for e in entries}

    def _head(self, entries: bytes) -> dict[str, Any]:
        sha = hashlib.sha256(entries).hexdigest()
        return {"format": _FORMAT, "digest": self.cut.digest, "dtype": self.dtype, "entries": sha}

    # Writing.

    def _fill(
        self,
        model: nn.Module,
        datasets: Sequence[Any],
        collator: Collator,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        total = sum(len(each) for each in datasets)
        done, written = 0, list[Path]()
        checked = False
        try:
            for each in datasets:
                for begin in range(0, len(each), _CHUNK):
                    items = [each[i] for i in range(begin, min(begin + _CHUNK, len(each)))]
                    missing = self._missing(items, collator)
                    if missing:
                        if not checked:
                            _check_stable(each, begin, items, collator, self.cut.inputs)
                            _check_apart(model, self.cut, [item for _, _, item in missing], collator)
                            checked = True
                        self._check_disk(missing, total - done, len(items))
                        written += self._write(model, missing, collator, batch_size)
                    done += len(items)
                    if progress is not None:
                        progress(done, total)
        except (OSError, InputError) as error:
            for path in written:
                path.unlink(missing_ok=True)
            if isinstance(error, InputError):
                raise
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(f"{self.folder}: the prefix cache cannot be written ({error.strerror})") from error
            raise InputError(
                f"{self.folder}: the disk is full; what this run had written of the prefix cache is removed. Want "
                f"{self._want()}"
            ) from error

    def _want(self) -> str:
        smaller = "bfloat16, " if self.dtype == "float32" else ""
        return f"another folder, more room, {smaller}or training without the cache"

    def _missing(self, items: Sequence[Any], collator: Collator) -> list[tuple[bytes, int, Any]]:
        """Key, length and item of each example that has no row yet, the longest first."""
        found: dict[bytes, tuple[bytes, int, Any]] = {}
        for begin in range(0, len(items), _KEYED):
            some = items[begin : begin + _KEYED]
            keys, mask = row_keys(collator(list(some)), self.cut.inputs)
            lengths = [0] * len(some) if mask is None else mask.sum(1).tolist()
            for key, tokens, item in zip(keys, lengths, some, strict=True):
                if key not in self._rows:
                    found[key] = (key, tokens, item)
        return sorted(found.values(), key=lambda entry: -entry[1])

    def _check_disk(self, missing: Sequence[tuple[bytes, int, Any]], remaining: int, read: int) -> None:
        """Refuse at once what will not fit: the rest of the data is taken to be like this part of it."""
        size = sum(self._size(tokens) + _HEAD.itemsize for _, tokens, _ in missing)
        expected, free = int(size * remaining / read), shutil.disk_usage(self.folder).free
        if expected + _SPARE > free:
            raise InputError(
                f"{self.folder}: the prefix cache needs about {_megabytes(expected)} more for {remaining} "
                f"examples, and {_megabytes(free)} are free; want {self._want()}"
            )

    def _write(
        self, model: nn.Module, missing: Sequence[tuple[bytes, int, Any]], collator: Collator, batch_size: int
    ) -> list[Path]:
        """Run the prefix and write one file of rows with its index."""
        name = f"{time.time_ns():020d}"
        path, index = self.folder / f"{name}.rows", self.folder / f"{name}.index"
        parts = [self.folder / f".{name}.rows.tmp", self.folder / f".{name}.index.tmp"]
        entries = np.zeros(len(missing), _HEAD)
        offset = 0
        try:
            with parts[0].open("wb") as file:
                for begin in range(0, len(missing), batch_size):
                    batch = missing[begin : begin + batch_size]
                    for n, row in enumerate(self._compute(model, batch, collator), start=begin):
                        if len(row) != self._size(missing[n][1]):
                            raise NoPrefixError(
                                "an example has no token: leave it out, or train without the prefix cache"
                            )
                        file.write(row)
                        entries[n] = (np.void(missing[n][0]), offset, missing[n][1], zlib.crc32(row))
                        offset += len(row) // FORMATS[self.dtype].bytes
                _sync(file)
            with parts[1].open("wb") as file:
                file.write(json.dumps(self._head(entries.tobytes())).encode() + b"\n" + entries.tobytes())
                _sync(file)
            parts[1].replace(index)
            parts[0].replace(path)
            _sync_folder(self.folder)
        except BaseException:
            for part in (*parts, path, index):
                with suppress(OSError):
                    part.unlink(missing_ok=True)
            raise
        self._rows.update({e["key"].tobytes(): _Row(path, int(e["offset"]), int(e["tokens"])) for e in entries})
        return [path, index]

    def _compute(
        self, model: nn.Module, batch: Sequence[tuple[bytes, int, Any]], collator: Collator
    ) -> Iterator[bytes]:
        """The bytes of the rows of some examples."""
        collated = collator([item for _, _, item in batch])
        if row_keys(collated, self.cut.inputs)[0] != [key for key, _, _ in batch]:
            raise NoPrefixError(
                "the collator does not make the same of an example each time (random masking?): want one that "
                "does, or training without the prefix cache"
            )
        for parts in _parts(model, self.cut, collated):
            stored = [part.to(FORMATS[self.dtype].torch).contiguous() for part in parts]
            if not all(bool(part.isfinite().all()) for part in stored):
                raise NoPrefixError(
                    f"the activations at the {self.cut} are not finite in {self.dtype}: check the weights, or "
                    "train without the prefix cache"
                )
            yield b"".join(part.view(torch.uint8).numpy().tobytes() for part in stored)


class _Collator:
    """A collator whose batches bring their values; picklable, for the workers of a data loader."""

    def __init__(self, cache: PrefixCache, collator: Collator) -> None:
        self.cache, self.inner = cache, collator

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = dict(self.inner(items))
        return {**batch, **self.cache.values(batch)}


def row_keys(batch: Mapping[str, Any], inputs: frozenset[str]) -> tuple[list[bytes], Tensor | None]:
    """The key of each example of a batch, and the mask of its tokens; None where it is not made of tokens.

    A key is half of SHA-256 of those of the example's tensors that are inputs, by name, without padding.
    """
    tensors = {
        name: value.cpu() for name, value in sorted(batch.items()) if isinstance(value, Tensor) and name in inputs
    }
    mask = tensors.pop("attention_mask", None)
    if mask is not None and mask.dim() != 2:
        raise NoPrefixError(
            f"got an attention mask of {mask.dim()} axes; the prefix cache wants one of (examples, tokens)"
        )
    tokens = tensors.get("input_ids")
    if mask is None and tokens is not None:
        mask = torch.ones_like(tokens)
    mask = None if mask is None else mask.bool()
    rows = mask.shape[0] if mask is not None else next(iter(tensors.values())).shape[0]
    digests = [hashlib.sha256() for _ in range(rows)]
    for name, value in tensors.items():
        by_token = mask is not None and value.shape[:2] == mask.shape
        for i, digest in enumerate(digests):
            part = value[i][mask[i]] if by_token and mask is not None else value[i]
            digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
            digest.update(
                part.contiguous().view(torch.uint8).numpy().data if part.dim() else bytes(str(part), "ascii")
            )
    if mask is not None:
        ends = mask.int()
        for i, digest in enumerate(digests):
            inner = ends[i].nonzero().flatten()
            if len(inner) and int(inner[-1] - inner[0]) + 1 != len(inner):  # holes: which positions counts
                digest.update(str((inner - inner[0]).tolist()).encode())
    return [digest.digest()[:16] for digest in digests], mask


def _check_stable(
    dataset: Any, begin: int, items: Sequence[Any], collator: Collator, inputs: frozenset[str]
) -> None:
    """Refuse a dataset that does not give the same example twice."""
    few = range(min(4, len(items)))
    once, again = (
        [row_keys(collator([item]), inputs)[0][0] for item in chosen]
        for chosen in ([items[i] for i in few], [dataset[begin + i] for i in few])
    )
    if once != again:
        raise NoPrefixError(
            "the dataset does not give the same example twice (random augmentation?): want fixed examples, or "
            "training without the prefix cache"
        )


def _check_apart(model: nn.Module, cut: Cut, items: Sequence[Any], collator: Collator) -> None:
    """Refuse activations that depend on the rest of the batch: padding that moves positions, sums over examples.

    The shortest and the longest example run alone up to the cut and together from there on; the outputs must be
    those of the two in the whole model.
    """
    pair = [items[-1], items[0]]
    together = _inputs(model, collator(pair), cut.inputs)
    mask = row_keys(together, cut.inputs)[1]
    alone = [_parts(model, cut, collator([item]))[0] for item in pair]
    values = {f"{KEY}{n}": _padded(kept, [parts[n] for parts in alone], mask) for n, kept in enumerate(cut.kept)}
    on = None if mask is None else mask.to(next(model.parameters()).device)
    want = outputs(model(**together), on)
    with cut.suffix(model):
        got = outputs(model(**together, **_inputs(model, values, values)), on)
    if not agree(got, want, relative=1e-3):
        raise NoPrefixError(
            "the model's output for an example depends on the rest of its batch (padding on the left with learned "
            "positions?), so nothing can be kept: want padding on the right, or training without the prefix cache"
        )


def _inputs(model: nn.Module, batch: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """Some of a batch, on the model's device."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k in names}


def _parts(model: nn.Module, cut: Cut, batch: Mapping[str, Any]) -> list[list[Tensor]]:
    """For each example of a batch the values to keep, without padding: (tokens, …) or (…)."""
    mask = row_keys(batch, cut.inputs)[1]
    values = [value.cpu() for value in capture(model, _inputs(model, batch, cut.inputs), cut.kept)]
    keep = [chosen(mask, kept.positions) if kept.by_token and mask is not None else None for kept in cut.kept]
    rows = range(len(values[0]))
    return [[v[i] if k is None else v[i][k[i]] for v, k in zip(values, keep, strict=True)] for i in rows]


def _padded(kept: Kept, parts: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """One value of a batch, from those of its examples."""
    if not kept.by_token or mask is None:
        return torch.stack([part.view(kept.dims) for part in parts])
    value = torch.zeros(*mask.shape, *kept.dims, dtype=parts[0].dtype)
    for row, keep, part in zip(value, chosen(mask.cpu(), kept.positions), parts, strict=True):
        row[keep] = part.view(-1, *kept.dims)
    return value


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
