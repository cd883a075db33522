"""Rows in Parquet: one file for each matrix of each pair, in a results folder.

Beside `manifest.json` the folder holds `rows/PAIR/MATRIX.parquet`. A file that is there is complete, and proves by
its seal (`checkpoint.digest`) that it holds the rows of this matrix, pair and configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from specbasis.architecture.key import MatrixKey
from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.atomic import write_whole
from specbasis.checkpoint.digest import SEAL, digest
from specbasis.checkpoint.entry import first_line
from specbasis.core.brief import brief
from specbasis.core.errors import InputError
from specbasis.core.grammar import labelled
from specbasis.jobs.folder import EACH, Folder, Kind, opened

_WEIGHTS = {"source": str, "files": [{"path": str, "bytes": int}], "notes": [str]}
_SKIPPED = {"name": str, "side": str, "reason": str, "size": int}

COMPARISON = Kind(
    "comparison",
    version=("format", 1),
    keys=("config", "pairs"),
    grows="tuned",
    form={
        "base": _WEIGHTS,
        "pairs": {
            EACH: {
                "tuned": _WEIGHTS,
                "architecture": str,
                "matrices": [str],
                "skipped": [_SKIPPED],
                "notes": [str],
                "other_base": str,
            }
        },
        "measures": [{"name": str}],
        "failed": [{"error": str}],
        "runs": [{"seconds": float | int, "matrices": int, "workers": int}],
        "checkpoints": [{"label": str, "source": str, "weights": _WEIGHTS}],
        "passed_over": [{"source": str, "reason": str}],
        "notes": [str],
        "versions": {},
        "machine": {},
        "command": [str],
    },
)
"""The version is that of the layout and of the rows' schema."""

_WORD = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("pair", _WORD, metadata={"about": "label of the tuned checkpoint"}),
        pa.field("matrix", _WORD, metadata={"about": "name of the matrix, unique in its model"}),
        pa.field("stack", _WORD, metadata={"about": "encoder, decoder, …; empty in models with one stack"}),
        pa.field("block", pa.int32(), metadata={"about": "number of the block, null outside of the blocks"}),
        pa.field("role", _WORD),
        pa.field("out_features", pa.int64()),
        pa.field("in_features", pa.int64()),
        pa.field("measure", _WORD),
        pa.field("index", pa.int32(), metadata={"about": "0-based rank, or k; null for a whole matrix"}),
        pa.field("value", pa.float64()),
        pa.field(
            "bound", pa.float64(), metadata={"about": "bound on the numerical error of value; null: rounding"}
        ),
        pa.field("resolved", pa.bool_(), metadata={"about": "the bound is small; null where there is none"}),
    ]
)
"""One row is (pair, matrix, measure, index, value), with what is needed to group rows beside it."""

_REPEATED = [name for name in SCHEMA.names if name not in ("value", "bound", "resolved")]
"""Columns that a dictionary makes smaller; looking for repetition among figures takes time and finds none."""


@dataclass(frozen=True, eq=False)
class Figures:
    """What one measure gave for one matrix of one pair: (n,) numbers on the CPU, or None for what there is not.

    Attributes:
        pair: label of the tuned checkpoint.
        measure: name of the measure.
        value: the figures.
        index: rank or k of each; a negative one is none.
        bound: bound on the numerical error of each.
        resolved: whether the bound is small; where it is NaN there is no bound.
    """

    pair: str
    measure: str
    value: npt.ArrayLike
    index: npt.ArrayLike | None = None
    bound: npt.ArrayLike | None = None
    resolved: npt.ArrayLike | None = None


def rows_of(key: MatrixKey, shape: tuple[int, int], figures: Iterable[Figures]) -> pa.Table:
    """The rows of one matrix, in the order of the figures."""
    figures = list(figures)
    lengths = [len(np.atleast_1d(f.value)) for f in figures]
    n, stop = sum(lengths), 0
    numbers = {name: np.full(n, np.nan) for name in ("index", "value", "bound", "resolved")}
    for f, length in zip(figures, lengths, strict=True):
        rows = slice(stop, stop := stop + length)
        for name, column in numbers.items():
            values = getattr(f, name)
            if values is not None:
                column[rows] = values
    numbers["index"][numbers["index"] < 0] = np.nan
    # A bound of NaN is one of a NaN figure; where there is none at all, resolved is NaN as well.
    missing = {"index": np.isnan(numbers["index"])}
    missing["bound"] = missing["resolved"] = np.isnan(numbers["resolved"])
    arrays = {name: pa.array(values, mask=missing.get(name)) for name, values in numbers.items()}
    # Words as codes at once: a list of equal strings takes longer to encode than many measures to compute.
    arrays |= {name: _words([getattr(f, name) for f in figures], lengths) for name in ("pair", "measure")}
    words = {"matrix": key.name, "stack": key.stack, "role": key.role}
    arrays |= {name: _words([word], [n]) for name, word in words.items()}
    constants = {"block": key.block, "out_features": shape[0], "in_features": shape[1]}
    arrays |= {name: pa.repeat(pa.scalar(v, SCHEMA.field(name).type), n) for name, v in constants.items()}
    return pa.table([arrays[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names], SCHEMA)


def _words(words: Sequence[str], counts: Sequence[int]) -> pa.Array:
    """Each word so many times, stored once."""
    codes = {word: code for code, word in enumerate(dict.fromkeys(words))}
    return pa.DictionaryArray.from_arrays(
        np.repeat(np.array([codes[word] for word in words], dtype=np.int32), counts), list(codes)
    )


@brief
@dataclass(frozen=True, eq=False)
class Results(Folder):
    """A folder of rows: what is done is never computed again, and never lost."""

    kind: Kind = COMPARISON

    def part(self, pair: str, matrix: str) -> Path:
        """The file that holds the rows of one matrix of one pair."""
        return self.folder / "rows" / _file_name(pair) / f"{_file_name(matrix)}.parquet"

    def is_done(self, pair: str, matrix: str) -> bool:
        """Whether the rows of one matrix of one pair are on disk, whole, and prove that they are these."""
        try:
            return self.part(pair, matrix).exists() and self.read(pair, matrix).num_rows > 0
        except InputError:
            return False

    def read(self, pair: str, matrix: str) -> pa.Table:
        """The rows of one matrix of one pair.

        Raises:
            InputError: the file cannot be read, or does not hold what was written for this matrix.
        """
        path = self.part(pair, matrix)
        try:
            file = pq.ParquetFile(path)
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError("its columns are not those of rows")
            rows = file.read().cast(SCHEMA)
            seal = (file.metadata.metadata or {}).get(SEAL.encode(), b"").decode()
            if not seal and (self.manifest.get("sealed") or rows["matrix"].unique().to_pylist() != [matrix]):
                raise ValueError("it has no SHA-256, or the rows of another matrix")
            if seal and seal != self._seal(pair, matrix, rows):
                raise ValueError("it is not what was written for this matrix: its SHA-256 differs")
        except Exception as error:  # a damaged file can make a parser fail in any way
            reason = first_line(error)
            raise InputError(
                f"{path}: is damaged ({reason}); delete this file and run the comparison again"
            ) from error
        return rows

    def _seal(self, pair: str, matrix: str, rows: pa.Table) -> str:
        """The seal of the rows of one matrix of one pair: what was compared under which settings, and every row."""
        config = dict(self.manifest.get("config", {}))
        tuned = config.get("tuned")
        if isinstance(tuned, Mapping):  # other pairs of the folder change nothing
            config["tuned"] = tuned.get(pair)
        return digest(json.dumps([pair, matrix, config], sort_keys=True), *_content(rows))

    def write(self, pair: str, matrix: str, rows: pa.Table) -> None:
        """Put the rows of one matrix of one pair on disk, whole or not at all."""
        rows = rows.replace_schema_metadata({SEAL: self._seal(pair, matrix, rows)})
        write_whole(
            self.part(pair, matrix),
            lambda path: pq.write_table(rows, path, compression="zstd", use_dictionary=_REPEATED),
        )

    @contextmanager
    def timed(self, jobs: int, workers: int) -> Iterator[None]:
        """Note in the manifest how long the block took for so many matrices, if any, and put it on disk."""
        started = time.perf_counter()
        yield
        if jobs:
            seconds = round(time.perf_counter() - started, 3)
            self.manifest["runs"].append({"seconds": seconds, "matrices": jobs, "workers": workers})
        self.write_manifest()

    def rows(self) -> pa.Table:
        """All rows, in the order of the manifest's pairs and matrices: the same whatever was interrupted when.

        Raises:
            InputError: no rows yet, or a damaged file.
        """
        parts = [
            (pair, matrix)
            for pair, about in self.manifest["pairs"].items()
            for matrix in about["matrices"]
            if self.part(pair, matrix).exists()
        ]
        if not parts:
            raise InputError(f"{self.folder}: holds no rows yet; run the comparison first")
        with ThreadPoolExecutor() as pool:
            tables = list(pool.map(lambda part: self.read(*part), parts))
        return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


@contextmanager
def create(
    folder: Path, config: Mapping[str, Any], kind: Kind = COMPARISON, *, add: bool = False
) -> Iterator[Results]:
    """Begin, continue, or add to, the rows of one configuration in a folder, alone in it until the block ends.

    Raises:
        InputError: see `specbasis.jobs.folder.opened`.
    """
    with opened(folder, kind, config, add=add) as kept:
        yield Results(kept.folder, kept.manifest, kind)


def load(folder: Path, kind: Kind = COMPARISON) -> Results:
    """Open a folder of rows for reading.

    Raises:
        InputError: no such folder, no manifest in it, or one of another kind or version.
    """
    return Results(folder, kind.read(folder), kind)


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows and the folder that they are in: what `compare` and `track` return.

    Attributes:
        results: the folder with the rows and the manifest.
        rows: all rows, one per (pair, matrix, measure, index); see `SCHEMA`.
    """

    results: Results
    rows: pa.Table
    _kept: TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """Where everything is on disk."""
        return self.results.folder

    @property
    def manifest(self) -> dict[str, Any]:
        """Versions, configuration, provenance, notes, what was skipped or passed over and why, timings."""
        return self.results.manifest


def opened_by_label(
    sources: Iterable[Any] | Mapping[str, Any], open_one: Callable[[Any], Checkpoint]
) -> tuple[dict[str, Any], dict[str, Checkpoint]]:
    """Label → what a checkpoint is called, and label → the same, open.

    A mapping says the labels, and so does ``"LABEL=SOURCE"``.

    Raises:
        InputError: as ``open_one``; or a label is given twice.
    """
    named: list[tuple[str, Any]]
    if isinstance(sources, Mapping):
        named = list(sources.items())
    else:
        named = [labelled(source) if isinstance(source, str) else ("", source) for source in sources]
    opened = [open_one(place) for _, place in named]
    labels = labels_of([label for label, _ in named], [checkpoint.source for checkpoint in opened])
    return dict(zip(labels, (place for _, place in named), strict=True)), dict(zip(labels, opened, strict=True))


def labels_of(given: Sequence[str], names: Sequence[str]) -> list[str]:
    """The labels that were given, and where one is empty `unique_labels` of the names.

    Raises:
        InputError: a label is given twice.
    """
    made = iter(unique_labels(name for label, name in zip(given, names, strict=True) if not label))
    labels = [label or next(made) for label in given]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(
                f"two models are called {label!r}; give each a label of its own, as in NAME={names[0]}"
            )
    return labels


def unique_labels(names: Iterable[str]) -> list[str]:
    """The shortest path endings that tell names apart, numbered where even the whole names are equal."""
    names = list(names)
    divider = r"[/\\]" if os.name == "nt" else "/"  # elsewhere a backslash is a part of a name
    parts = [[part for part in re.split(divider, name) if part] or [name] for name in names]
    labels: list[str] = []
    for own in parts:
        depth = next(
            (d for d in range(1, len(own) + 1) if sum(other[-d:] == own[-d:] for other in parts) == 1), len(own)
        )
        label = re.sub(r"\.(safetensors|pt|pth|bin|ckpt|tar)$", "", "/".join(own[-depth:]))
        count = sum(used == label or used.startswith(f"{label} (") for used in labels)
        labels.append(f"{label} ({count + 1})" if count else label)
    return labels


def _content(rows: pa.Table) -> Iterator[str | bytes]:
    """What rows say, whatever their dictionaries, chunks and versions of Arrow are."""
    rows = rows.unify_dictionaries()
    for part in SCHEMA:
        column = rows[part.name].combine_chunks()
        if part.type == _WORD:  # few different ones after another: runs of equal words, and how long they are
            runs = pc.run_end_encode(column.cast(pa.string()))
            yield json.dumps([runs.run_ends.to_pylist(), runs.values.to_pylist()])
        else:
            yield column.is_null().to_numpy(zero_copy_only=False).tobytes()
            yield column.fill_null(pa.scalar(0).cast(part.type)).to_numpy(zero_copy_only=False).tobytes()


def _file_name(text: str) -> str:
    """A file name that is readable, portable, and different for different texts."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip(".")[-80:]
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
