"""A database of fingerprints: one Parquet file, a row and a row group each, each with the seal of its content."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from specbasis.checkpoint.atomic import write_whole
from specbasis.checkpoint.digest import SEAL, digest, proven
from specbasis.checkpoint.entry import first_line
from specbasis.core.errors import InputError, want
from specbasis.lineage.fingerprint import Fingerprint

AHEAD = 2**28
"""Bytes of records that are read ahead: of a thousand models most, while the model that is asked about is read."""

SCHEMA = pa.schema([("header", pa.string()), ("values", pa.binary())])


def is_database(path: str | Path) -> bool:
    """Whether a path is a file of fingerprints, by its first bytes."""
    file = Path(path)
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"PAR1"


def read(path: Path) -> Iterator[Fingerprint]:
    """The fingerprints of a file, each checked against its seal, read ahead from the call on; see `AHEAD`.

    Raises:
        InputError: no such file, none of fingerprints, or a record is not what was written.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; `specbasis db add {path} MODEL` makes a database")
    with _whole(path):
        file = pq.ParquetFile(path)
        if not file.schema_arrow.equals(SCHEMA):
            file.close()
            raise InputError(f"{path}: a Parquet file, but not one of fingerprints; want one of `specbasis db`")
    numbers = iter(range(file.num_row_groups))
    largest = max((file.metadata.row_group(k).total_byte_size for k in range(file.num_row_groups)), default=1)
    pool = ThreadPoolExecutor(1)

    def group(number: int) -> list[Fingerprint]:
        rows = file.read_row_group(number, use_threads=False).to_pylist()
        return [_record(row["header"], row["values"]) for row in rows]

    waiting = deque(pool.submit(group, k) for k in islice(numbers, max(2, AHEAD // max(1, largest))))

    def records() -> Iterator[Fingerprint]:
        try:
            while waiting:
                with _whole(path):
                    found = waiting.popleft().result()
                waiting.extend(pool.submit(group, k) for k in islice(numbers, 1))
                yield from found
        finally:
            pool.shutdown(cancel_futures=True)
            file.close()

    return records()


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """What a file that is damaged raises is one line."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not a whole database of fingerprints ({first_line(error)}); fetch or make it again"
        ) from error


def _record(text: str, content: bytes) -> Fingerprint:
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
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
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
