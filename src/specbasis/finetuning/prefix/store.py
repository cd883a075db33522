"""Activations of a frozen prefix on disk: one row an example, found by the example's content."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from specbasis.checkpoint.atomic import whole, writing
from specbasis.checkpoint.entry import reading
from specbasis.core.errors import InputError
from specbasis.finetuning.prefix.cut import Cut
from specbasis.finetuning.prefix.probe import evaluating
from specbasis.finetuning.prefix.rows import (
    Collator,
    NoPrefixError,
    check_apart,
    check_stable,
    parts_of,
    row_keys,
    values_of,
)
from specbasis.jobs.folder import locked

Progress = Callable[[int, int], None]
Dtype = Literal["float32", "bfloat16"]

_FORMAT = 1
_CHUNK = 1024  # examples that are sorted by length together and written to one file
_KEYED = 64  # examples that are collated together to be looked up
_SPARE = 64 * 2**20  # bytes of the disk that are left alone
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HEAD = np.dtype([("key", "V16"), ("offset", "<i8"), ("tokens", "<i4"), ("check", "<u4")])


@dataclass(frozen=True)
class _Row:
    """Where an example's values are, and how many tokens it has (0 if it is not made of tokens)."""

    file: Path
    offset: int
    tokens: int


class _Missing(NamedTuple):
    """An example that has no row yet."""

    key: bytes
    tokens: int
    item: Any


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
        if dtype not in _TORCH:
            raise InputError(f"got dtype = {dtype!r} for the prefix cache; want {' or '.join(map(repr, _TORCH))}")
        self.cut, self.dtype, self._torch = cut, dtype, _TORCH[dtype]
        self.folder = Path(folder) / f"{cut.digest[:32]}-{dtype}"
        self._rows: dict[bytes, _Row] = {}
        self._sizes: dict[Path, int] = {}

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
        several = isinstance(dataset, list | tuple) and not isinstance(dataset[0], Mapping)
        datasets = dataset if several else [dataset]
        if not all(hasattr(part, "__len__") for part in datasets):
            raise NoPrefixError("the prefix cache needs a dataset with a length; train a stream without it")
        with writing(cache.folder):
            cache.folder.mkdir(parents=True, exist_ok=True)
        with locked(cache.folder, wait=True), evaluating(model), torch.no_grad():
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
        rows = [self._rows[key] for key in keys if key in self._rows]
        if len(rows) < len(keys):
            raise InputError(
                f"{len(keys) - len(rows)} of {len(keys)} examples are not in the prefix cache ({self.folder}): "
                "want the examples it was built for; if they are augmented or masked at random, train without it"
            )
        # Mapped while a batch is read, not longer: pages that stay mapped count as this process's memory.
        maps = {path: self._mapped(path) for path in {row.file for row in rows}}
        parts = []
        for row in rows:
            sizes = [kept.size(row.tokens) for kept in self.cut.kept]
            parts.append(torch.split(maps[row.file][row.offset : row.offset + sum(sizes)], sizes))
        return values_of(self.cut, parts, mask)

    def _mapped(self, path: Path) -> Tensor:
        with reading(str(path)):
            size = path.stat().st_size
        if size != self._sizes[path]:  # a mapped page that is gone would end the process
            raise InputError(f"{path}: was cut off while it was used; run again, which computes its rows anew")
        return torch.from_file(str(path), shared=False, size=size // self._torch.itemsize, dtype=self._torch)

    def _bytes(self, tokens: int) -> int:
        """Bytes of a row."""
        return self._torch.itemsize * self.cut.size(tokens)

    # Opening.

    def _open(self) -> None:
        """Take up the rows that are whole; remove files that are not."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        for path in sorted(self.folder.glob("*.rows")):
            entries = self._whole(path)
            if entries is None:
                _remove(path)
            else:
                self._take_up(path, entries)

    def _take_up(self, path: Path, entries: np.ndarray[Any, Any]) -> None:
        self._sizes[path] = path.stat().st_size
        self._rows |= {e["key"].tobytes(): _Row(path, int(e["offset"]), int(e["tokens"])) for e in entries}

    def _whole(self, path: Path) -> np.ndarray[Any, Any] | None:
        """The entries of a file's index, or None if file or index is not what was written."""
        try:
            line, _, rest = path.with_suffix(".index").read_bytes().partition(b"\n")
            entries = np.frombuffer(rest, _HEAD)
            if json.loads(line) != self._head(rest):
                return None
            data = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError):
            return None
        end = 0
        for entry in entries:
            start = int(entry["offset"]) * self._torch.itemsize
            end = start + self._bytes(int(entry["tokens"]))
            if end > len(data) or zlib.crc32(data[start:end].data) != entry["check"]:
                return None
        return entries if end == len(data) else None

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
        written: list[Path] = []
        done, total = 0, sum(map(len, datasets))
        try:
            for dataset in datasets:
                for begin in range(0, len(dataset), _CHUNK):
                    items = [dataset[i] for i in range(begin, min(begin + _CHUNK, len(dataset)))]
                    missing = self._missing(items, collator)
                    if missing and not written:
                        check_stable(dataset, begin, items, collator, self.cut.inputs)
                        check_apart(model, self.cut, [example.item for example in missing], collator)
                    if missing:
                        self._check_disk(missing, total - done, len(items))
                        written.append(self._write(model, missing, collator, batch_size))
                    done += len(items)
                    if progress is not None:
                        progress(done, total)
        except (OSError, InputError) as error:
            for path in written:
                _remove(path)
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

    def _missing(self, items: Sequence[Any], collator: Collator) -> list[_Missing]:
        """The examples that have no row yet, the longest first."""
        missing: dict[bytes, _Missing] = {}
        for begin in range(0, len(items), _KEYED):
            part = list(items[begin : begin + _KEYED])
            keys, mask = row_keys(collator(part), self.cut.inputs)
            lengths = [0] * len(part) if mask is None else mask.sum(1).tolist()
            for example in map(_Missing, keys, lengths, part):
                if example.key not in self._rows:
                    missing[example.key] = example
        return sorted(missing.values(), key=lambda example: -example.tokens)

    def _check_disk(self, missing: Sequence[_Missing], remaining: int, read: int) -> None:
        """Refuse at once what will not fit: the rest of the data is taken to be like this part of it."""
        size = sum(self._bytes(example.tokens) + _HEAD.itemsize for example in missing)
        expected, free = int(size * remaining / read), shutil.disk_usage(self.folder).free
        if expected + _SPARE > free:
            raise InputError(
                f"{self.folder}: the prefix cache needs about {expected / 1e6:,.0f} MB more for {remaining} "
                f"examples, and {free / 1e6:,.0f} MB are free; want {self._want()}"
            )

    def _write(self, model: nn.Module, missing: Sequence[_Missing], collator: Collator, batch_size: int) -> Path:
        """Run the prefix and write one file of rows; its index is there before it."""
        path = self.folder / f"{time.time_ns():020d}.rows"
        entries = np.zeros(len(missing), _HEAD)
        offset = 0
        try:
            with whole(path) as temporary:
                with temporary.open("wb") as file:
                    for n, row in enumerate(self._computed(model, missing, collator, batch_size)):
                        file.write(row)
                        entries[n] = (np.void(missing[n].key), offset, missing[n].tokens, zlib.crc32(row))
                        offset += len(row) // self._torch.itemsize
                with whole(path.with_suffix(".index")) as index:
                    head = json.dumps(self._head(entries.tobytes())).encode()
                    index.write_bytes(head + b"\n" + entries.tobytes())
        except BaseException:
            _remove(path)
            raise
        self._take_up(path, entries)
        return path

    def _computed(
        self, model: nn.Module, missing: Sequence[_Missing], collator: Collator, batch_size: int
    ) -> Iterator[bytes]:
        """The bytes of the rows of some examples."""
        for begin in range(0, len(missing), batch_size):
            examples = missing[begin : begin + batch_size]
            batch = collator([example.item for example in examples])
            if row_keys(batch, self.cut.inputs)[0] != [example.key for example in examples]:
                raise NoPrefixError(
                    "the collator does not make the same of an example each time (random masking?): want one that "
                    "does, or training without the prefix cache"
                )
            for example, parts in zip(examples, parts_of(model, self.cut, batch), strict=True):
                stored = [part.to(self._torch).contiguous() for part in parts]
                if not all(bool(part.isfinite().all()) for part in stored):
                    raise NoPrefixError(
                        f"the activations at the {self.cut} are not finite in {self.dtype}: check the weights, or "
                        "train without the prefix cache"
                    )
                row = b"".join(part.view(torch.uint8).numpy().tobytes() for part in stored)
                if len(row) != self._bytes(example.tokens):
                    raise NoPrefixError("an example has no token: leave it out, or train without the prefix cache")
                yield row


def _remove(path: Path) -> None:
    """Take away a file of rows with its index."""
    path.unlink(missing_ok=True)
    path.with_suffix(".index").unlink(missing_ok=True)


class _Collator:
    """A collator whose batches bring their values; picklable, for the workers of a data loader."""

    def __init__(self, cache: PrefixCache, collator: Collator) -> None:
        self.cache, self.inner = cache, collator

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = dict(self.inner(items))
        return {**batch, **self.cache.values(batch)}
