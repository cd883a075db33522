"""Rows in Parquet with a manifest beside them: written matrix by matrix, atomically, and resumable.

A results folder holds `manifest.json` and `rows/PAIR/MATRIX.parquet`. A file that is there is complete; a run that
was killed leaves at most a temporary file, which the next run removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specbasis.core.errors import InputError

FORMAT = 1
"""Version of the folder's layout and of the rows' schema."""

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
class Results:
    """A results folder: what is done is never computed again, and never lost.

    Attributes:
        folder: where `manifest.json` and `rows/` are.
        manifest: its contents; `write_manifest` puts them on disk.
    """

    folder: Path
    manifest: dict[str, Any] = field(default_factory=dict)

    def part(self, pair: str, matrix: str) -> Path:
        """The file that holds the rows of one matrix of one pair."""
        return self.folder / "rows" / _file_name(pair) / f"{_file_name(matrix)}.parquet"

    def is_done(self, pair: str, matrix: str) -> bool:
        """Whether the rows of one matrix of one pair are on disk, whole."""
        path = self.part(pair, matrix)
        try:
            return path.exists() and pq.read_metadata(path).num_rows > 0
        except (pa.ArrowInvalid, OSError):
            return False

    def write(self, pair: str, matrix: str, rows: pa.Table) -> None:
        """Put the rows of one matrix of one pair on disk, whole or not at all."""
        write_whole(
            self.part(pair, matrix),
            lambda path: pq.write_table(rows, path, compression="zstd", use_dictionary=_REPEATED),
        )

    def write_manifest(self) -> None:
        """Put the manifest on disk, whole or not at all."""
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.folder / "manifest.json", lambda path: path.write_text(text, encoding="utf-8"))

    def rows(self) -> pa.Table:
        """All rows, in the order of the manifest's pairs and matrices: the same whatever was interrupted when.

        Raises:
            InputError: no rows yet, or a damaged file.
        """
        parts = [
            self.part(pair, matrix)
            for pair, about in self.manifest["pairs"].items()
            for matrix in about["matrices"]
            if self.part(pair, matrix).exists()
        ]
        if not parts:
            raise InputError(f"{self.folder}: holds no rows yet; run the comparison first")
        with ThreadPoolExecutor() as pool:
            tables = list(pool.map(_read, parts))
        return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def refuse_another(folder: Path, kind: str, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that what a folder holds was made with the settings that are wanted.

    Raises:
        InputError: some differ; the message names them with both values, those within another as ``outer.inner``.
    """
    there, here = _flat(held), _flat(wanted)
    differing = [
        f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise InputError(f"{folder}: holds another {kind} ({'; '.join(differing)}); choose another folder")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = _flat(value) if isinstance(value, Mapping) else {}
        found |= {f"{name}.{key}": one for key, one in inner.items()} or {name: value}
    return found


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), 60, placeholder=" …") if value is not None else "none"


def create(folder: Path, config: Mapping[str, Any]) -> Results:
    """Begin, or continue, the results of one configuration in a folder.

    Raises:
        InputError: the folder is a file, cannot be written, or holds anything else than results of this config.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; want a folder for the results, new or from the same comparison")
    manifest: dict[str, Any] = {}
    if (folder / "manifest.json").exists():
        manifest = load(folder).manifest
        refuse_another(folder, "comparison", manifest["config"], config)
    elif folder.exists() and any(not _is_temporary(path) for path in folder.iterdir()):
        raise InputError(f"{folder}: is not empty and holds no results; choose a new folder")
    results = Results(folder, manifest | {"format": FORMAT, "config": dict(config)})
    with writing(folder):
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        for path in (*folder.iterdir(), *(folder / "rows").rglob("*")):
            if _is_temporary(path) and not _is_running(path):
                path.unlink(missing_ok=True)
        # Reports before hours of work that the folder cannot be written.
        probe = folder / f".probe.{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    return results


def load(folder: Path) -> Results:
    """Open a results folder for reading.

    Raises:
        InputError: no such folder, no manifest in it, or one of another format.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder}: no results here (no manifest.json); want a folder that a comparison wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        if found != FORMAT:
            raise InputError(
                f"{folder}: results of format {found}; this version reads format {FORMAT}: compare again"
            )
        missing = [key for key in ("config", "pairs") if key not in manifest]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not a manifest of results ({error}); choose another folder") from error
    if missing:
        raise InputError(f"{path}: is not a manifest of results (no {missing[0]!r}); choose another folder")
    return Results(folder, manifest)


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for a manifest."""
    packages = ("specbasis", "torch", "numpy", "pyarrow", "safetensors")
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "processors": os.cpu_count(),
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def unique_labels(names: Iterable[str]) -> list[str]:
    """The shortest path endings that tell names apart, numbered where even the whole names are equal."""
    names = list(names)
    parts = [[part for part in re.split(r"[/\\]", name) if part] or [name] for name in names]
    labels: list[str] = []
    for mine in parts:
        depth = next(
            (d for d in range(1, len(mine) + 1) if sum(other[-d:] == mine[-d:] for other in parts) == 1), len(mine)
        )
        label = re.sub(r"\.(safetensors|pt|pth|bin|ckpt|tar)$", "", "/".join(mine[-depth:]))
        count = sum(used == label or used.startswith(f"{label} (") for used in labels)
        labels.append(f"{label} ({count + 1})" if count else label)
    return labels


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, schema=SCHEMA)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: is damaged ({reason}); delete this file and run the comparison again") from error


def _file_name(text: str) -> str:
    """A file name that is readable, portable, and different for different texts."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip(".")[-80:]
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


_TEMPORARY = re.compile(r"\.(manifest\.json|probe|.+\.parquet)\.(\d+)\.tmp")


def _is_running(path: Path) -> bool:
    """Whether the process that writes a temporary file is another one that is alive."""
    found = _TEMPORARY.fullmatch(path.name)
    writer = int(found.group(2)) if found else 0
    if writer in (0, os.getpid()) or os.name == "nt":  # on Windows signal 0 would end the process
        return False
    try:
        os.kill(writer, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_temporary(path: Path) -> bool:
    return bool(_TEMPORARY.fullmatch(path.name))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the target, flush to the disk, then rename over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses (permissions, a full disk) into one line that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{path}: cannot be written ({reason}); what is done is kept: mend this and run again"
        ) from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package where it runs from its own git checkout."""
    here = Path(__file__).resolve()
    if not (here.parents[2] / ".git").exists():
        return None
    command = ["git", "-C", str(here.parents[2]), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
