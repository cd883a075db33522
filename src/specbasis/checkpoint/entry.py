"""What a checkpoint is: a lazy mapping from parameter name to tensor, and the checks that every reader shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from specbasis.checkpoint.regular import parse_json
from specbasis.core.brief import brief
from specbasis.core.dtypes import FORMATS
from specbasis.core.errors import InputError, is_out_of_memory
from specbasis.core.quantised import Grid

ABSENT = "absent"
"""The dtype of a tensor whose file is not in the cache where the Hub must not be asked: it has a name alone."""


@dataclass(frozen=True)
class Entry:
    """One stored tensor, known from headers alone: its shape, its dtype, and how to read it.

    Attributes:
        shape: as stored.
        dtype: torch's name of the numbers that are read, without ``torch.``; other formats' names in lower case.
        load: reads the tensor.
        factors: for a low-rank update of another checkpoint's tensor, reads (B, A) with
            tuned.reshape(shape[0], -1) = base.reshape(shape[0], -1) + B A.
        part: reads the numbers [start, stop) of the flattened tensor alone, by their bytes; None where the whole
            costs no more.
        layout: "in_out" or "conv" where the file, or the user, says how the axes are to be read; empty where not.
        stored: of a quantised tensor, which is read as the float32 numbers that it stands for: its format, such as
            ``q4_k`` or ``nf4``; empty where the tensor is stored as ``dtype`` says.
        grid: of a quantised tensor, reads it with its levels; None where these are not known.
        member: of a quantised stack of matrices, reads the one at a place along the first axis, with its levels.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor] = field(repr=False, compare=False)
    factors: Callable[[], tuple[Tensor, Tensor]] | None = field(default=None, repr=False, compare=False)
    part: Callable[[int, int], Tensor] | None = field(default=None, repr=False, compare=False)
    layout: str = ""
    stored: str = ""
    grid: Callable[[], Grid] | None = field(default=None, repr=False, compare=False)
    member: Callable[[int], Grid] | None = field(default=None, repr=False, compare=False)

    @property
    def is_float(self) -> bool:
        """Whether the stored numbers are floating-point."""
        return self.dtype in FORMATS and FORMATS[self.dtype].precision > 0


@brief
@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """Parameter name → tensor, read on access, one tensor in memory at a time.

    Attributes:
        source: what the user called it.
        entries: name → shape, dtype and reader, in file order.
        files: the files on disk that hold the weights, for provenance.
        config: the model's config.json where there is one, else empty.
        revision: the commit, for a repository on the Hub.
        digests: file name → digest as the Hub lists it at that commit, ``sha256:…`` or, for a small file that is
            kept in git itself, ``git-sha1:…``. Empty for files on disk.
        notes: what a person should know about how it was read, one sentence each.
        under: of an adapter: the model that it changes; None for a model of its own.
        made_from: of an adapter: the SHA-256 of the weights that it says it was made from; empty where none.
    """

    source: str
    entries: Mapping[str, Entry]
    files: tuple[Path, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    revision: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    under: Checkpoint | None = None
    made_from: str = ""

    def __getitem__(self, name: str) -> Tensor:
        with reading(self.source):
            return self.entries[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def delta_factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The factors (B, A) of a low-rank update: tuned − base = B A, both reshaped to (shape[0], -1).

        None where the tensor is no low-rank update of the base. Sign, scale and storage order (a Conv1D is stored
        (in, out)) are already in the factors.
        """
        factors = self.entries[name].factors
        with reading(self.source):
            return None if factors is None else factors()

    def member(self, name: str, place: int) -> Tensor:
        """One matrix of a stack; of a quantised one the others are not computed."""
        entry = self.entries[name]
        with reading(self.source):
            return entry.load()[place] if entry.member is None else entry.member(place).values

    def grid(self, name: str, place: int | None = None) -> Grid | None:
        """A quantised tensor, or one matrix of a stack, with its levels; None where it is none, or they are not
        known.
        """
        entry = self.entries[name]
        with reading(self.source):
            if place is None or entry.grid is None:
                return None if entry.grid is None else entry.grid()
            return entry.grid().part(lambda X: X[place]) if entry.member is None else entry.member(place)

    def select(self, names: Iterable[str]) -> Checkpoint:
        """The same checkpoint with these names only."""
        return replace(self, entries={name: self.entries[name] for name in names})


# --- checks that every reader shares ------------------------------------------------------------------------------


def json_object(text: bytes) -> dict[str, Any]:
    """A JSON object, or ValueError."""
    data = parse_json(text)
    if not isinstance(data, dict):
        raise ValueError(f"want a JSON object, got {type(data).__name__}")
    return data


def no_key(key: str, source: str) -> None:
    """Refuse a nested key where there are no dictionaries."""
    if key:
        raise InputError(
            f"{source}: '#{key}' addresses a dictionary inside one torch file, but this is none; leave it out"
        )


def check_names(names: Iterable[str], source: str) -> None:
    """Refuse names that would do something to a terminal."""
    for name in names:
        if not name.isprintable():
            raise InputError(f"{source}: tensor name {name!r} has control characters and is refused")


def shown(name: str) -> str:
    """A name as it may reach a terminal."""
    return name if name.isprintable() else repr(name)


def file_state(path: Path) -> dict[str, int]:
    """What changes when a file does: bytes, times of its contents and of its entry, and which file it is.

    The second time cannot be set: it tells a file that was given its old size and time again.
    """
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
        "changed_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


def watched(paths: Iterable[Path]) -> Callable[[], None]:
    """A check that files still are what they were now; it raises an InputError that names one that is not."""
    states = {path: file_state(path) for path in paths}

    def check() -> None:
        for path, state in states.items():
            with reading(str(path)):
                if file_state(path) != state:
                    raise InputError(
                        f"{path}: changed while it was being read, so that nothing of it is kept; run again when "
                        "nothing writes to it"
                    )

    return check


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn what a reader raises on a damaged file into one line that names the source."""
    try:
        yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"{source}: truncated or corrupted safetensors file ({first_line(error)})") from error
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or first_line(error)})") from error


@contextmanager
def parsing(name: str, source: str) -> Iterator[None]:
    """Turn what a parser raises on a damaged file into one line.

    A damaged file can make a parser fail in any way, and each of them means the same.
    """
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise InputError(f"{source}: {shown(name)} is truncated or corrupted ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one short line."""
    return shown(next(iter(str(error).strip().splitlines()), type(error).__name__)[:200])


def is_plain(path: str) -> bool:
    """Whether a relative path (or none) stays inside: no empty, . or .. part, no backslash, nothing unprintable."""
    parts = path.split("/") if path else []
    return path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(parts)


def inside(folder: Path, name: str, source: str) -> Path:
    """Path of a file in a folder, refused where it leads out.

    The Hub client's cache links snapshots/COMMIT/file to blobs of the same repository or of the whole cache: that
    much is allowed.
    """
    path = folder / name
    if not name or not is_plain(name):
        raise InputError(f"{source}: {name!r} leads out of its folder and is refused")
    if not path.exists():
        raise InputError(f"{source}: {name} is missing")
    root = folder.resolve()
    roots = [root]
    for parent in root.parents:
        if parent.name == "snapshots" and "--" in parent.parent.name:
            roots += [parent.parent / "blobs", parent.parent.parent / "blobs"]
    if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
        raise InputError(f"{source}: {name} is a link out of its folder and is refused")
    return path
