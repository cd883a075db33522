"""A database of fingerprints: one Parquet file, a row and a row group each, each with the seal of its content."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from specbasis.checkpoint.atomic import write_whole
from specbasis.checkpoint.digest import SEAL, digest, proven
from specbasis.checkpoint.entry import first_line
from specbasis.core.errors import InputError, want
from specbasis.lineage.fingerprint import Fingerprint

SCHEMA = pa.schema([("header", pa.string()), ("values", pa.binary())])


def is_database(path: str | Path) -> bool:
    """Whether a path is a file of fingerprints, by its first bytes."""
    file = Path(path)
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"PAR1"


def read(path: Path) -> Iterator[Fingerprint]:
    """The fingerprints of a file, one after the other, each checked against its seal.

    Raises:
        InputError: no such file, none of fingerprints, or a record is not what was written.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; `specbasis db add {path} MODEL` makes a database")
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise InputError(f"{path}: a Parquet file, but not one of fingerprints; want one of `specbasis db`")

            for number in range(file.num_row_groups):
                rows = file.read_row_group(number, use_threads=False)
                for header, values in zip(rows["header"], rows["values"], strict=True):
                    yield _record(header.as_py(), values.as_buffer())  # the values stay where Arrow has them
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not a whole database of fingerprints ({first_line(error)}); fetch or make it again"
        ) from error


def _record(text: str, content: pa.Buffer) -> Fingerprint:
    header = json.loads(text)
    if header["version"] != 1:
        raise ValueError(f"version {header['version']}, want 1: it was written by a newer specbasis")
    if SEAL not in header or proven(header)["values"] != digest(content):
        raise ValueError(f"the values of {header['name']!r} are not what was written: their SHA-256 differs")
    return Fingerprint(header, np.frombuffer(content, np.float32).reshape(len(header["matrices"]), -1))


def write(path: Path, fingerprints: Iterable[Fingerprint]) -> int:
    """Write fingerprints, whole or not at all; of several with equal name and weights the first. Returns how many.

    Raises:
        InputError: two that differ have one name; the system refuses it.
    """
    written: dict[str, str] = {}

    def rows(temporary: Path) -> None:
        # Random numbers hardly shrink: zstd saves 4 % more and takes four times as long to read.
        with pq.ParquetWriter(temporary, SCHEMA, compression="lz4", use_dictionary=False) as writer:
            for record in fingerprints:
                weights = str(record.header["weights"])
                if written.get(record.name, weights) != weights:
                    raise InputError(
                        f"{path}: two different models are called {record.name!r}; give one of them a --name"
                    )
                if record.name not in written:
                    written[record.name] = weights
                    row = {"header": json.dumps(record.header), "values": record.values.tobytes()}
                    writer.write_table(pa.Table.from_pylist([row], SCHEMA))

    write_whole(path, rows)
    return len(written)


def chosen(path: Path, names: Sequence[str]) -> list[Fingerprint]:
    """The fingerprints of some names.

    Raises:
        InputError: one of them is not in the database.
    """
    records = {record.name: record for record in read(path)}
    want("model", records, *names)
    return [records[name] for name in names]
