"""Places: the folder that a source names, on disk, in an installed package or on the Hub.

Names in a place are relative, and none is followed out of it.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

from specbasis.checkpoint import hub
from specbasis.checkpoint.entry import Entry, inside, is_plain, no_key, reading, shown
from specbasis.checkpoint.formats import check_framework, endings, file_entries
from specbasis.checkpoint.formats.safetensors import remote_entries
from specbasis.checkpoint.regular import read_bytes, small
from specbasis.core.errors import InputError


class NotStreamable(InputError):  # noqa: N818 - says what is missing
    """A repository on the Hub whose weights are in no format that can be read by byte range."""


class Place(Protocol):
    """A folder, on disk or on the Hub; names in it are relative and checked before they are followed."""

    @property
    def source(self) -> str:
        """What the user called it."""

    @property
    def given(self) -> str:
        """The one file that the user named, or empty."""

    @property
    def revision(self) -> str:
        """The commit, for a repository on the Hub."""

    @property
    def names(self) -> Collection[str]:
        """Names of the files directly inside."""

    def below(self) -> Iterator[str]:
        """Paths of files one folder down, for a hint."""

    def require(self, name: str) -> bool:
        """Whether a file can be opened: not where it is not in the cache and the Hub must not be asked.

        Raises InputError unless it is there and inside.
        """

    def text(self, name: str) -> bytes:
        """Content of a small file."""

    def entries(self, name: str, key: str = "") -> Mapping[str, Entry]:
        """The tensors of one weights file."""

    def all_entries(self, names: Sequence[str]) -> list[Mapping[str, Entry]]:
        """The tensors of several weights files; what they are is asked of all at once."""

    def provenance(self, names: Iterable[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
        """The files on disk, or the digests that the Hub lists."""


Opener = Callable[[str, str, bool], Place]

SOURCES: dict[str, Opener] = {}
"""The word before the colon of an address → what opens the place it names: from the address, what messages call it,
and whether to read it by byte range."""


def address_of(*schemes: str) -> Callable[[Opener], Opener]:
    """Register a function as what opens the addresses that begin with one of these words and a colon."""

    def register(opener: Opener) -> Opener:
        SOURCES.update(dict.fromkeys(schemes, opener))
        return opener

    return register


def locate(source: str | Path, *, stream: bool = False) -> tuple[Place, str]:
    """The place that a source names, and the nested key behind ``#`` (empty without one).

    Raises:
        InputError: nothing there.
    """
    if not isinstance(source, (str, os.PathLike)):
        instead = ", here model.state_dict()" if hasattr(source, "state_dict") else ""
        raise InputError(
            f"got a {type(source).__name__}; want a path, {', '.join(f'{scheme}:…' for scheme in SOURCES)}, or a "
            f"mapping from names to tensors{instead}"
        )
    text, label = str(source), shown(str(source))
    with reading(label):
        if Path(text).exists():
            return _on_disk(Path(text), label), ""
        for at in (i for i in reversed(range(len(text))) if text[i] == "#"):  # a file's name may hold '#' itself
            if _expanded(text[:at]).exists():
                return _on_disk(_expanded(text[:at]), label), text[at + 1 :]
        name, _, key = text.partition("#")
        if _expanded(name).exists():
            return _on_disk(_expanded(name), label), key
        bare = bool(_BARE.fullmatch(name)) and not _is_file_name(name)
        opener = SOURCES.get("hub" if bare else name.partition(":")[0])
        if opener is not None:
            return opener(name, label, stream), key
    hint = "; for a model on the Hub write hub:org/name" if "://" in name else ""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) and not _is_file_name(name):
        hint = f"; for a model on the Hub write hub:{name}"
    raise InputError(f"{label}: no such file or folder{hint}")


def transformers_address(source: str | Path) -> dict[str, str]:
    """The arguments of transformers' ``from_pretrained`` that load what a source names.

    Raises:
        InputError: nothing there, or no ``config.json`` beside the weights.
    """
    text = str(source)
    if not (text.startswith("pkg:") or _expanded(text).exists()):
        if isinstance(source, Path) or text.startswith(("/", ".", "~")) or not text.strip():
            raise InputError(f"{text}: no such file or folder")
        if "/" not in text and ":" not in text:
            locate(text)  # says that the Hub's models are written hub:…
        address = hub.parse_address(text)
        parts = {"revision": address.revision, "subfolder": address.subfolder}
        return {"pretrained_model_name_or_path": address.repository, **{k: v for k, v in parts.items() if v}}
    place, _ = locate(text)
    if "config.json" not in place.names:
        raise InputError(f"{text}: holds no config.json; want a folder that transformers' save_pretrained wrote")
    (file,), _ = place.provenance(["config.json"])
    return {"pretrained_model_name_or_path": str(file.parent)}


def _expanded(name: str) -> Path:
    """A path with ~ expanded, as it is where there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


_BARE = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./%-]+)?", re.ASCII)


def _is_file_name(name: str) -> bool:
    """Whether a name ends as weights do, or what lies beside them, and so is no name of a repository."""
    return Path(name).suffix in (*endings(), ".h5", ".msgpack", ".json")


@dataclass(frozen=True)
class _Folder:
    """A folder on disk."""

    path: Path
    source: str
    given: str = ""
    revision: str = ""

    @cached_property
    def names(self) -> Collection[str]:
        return tuple(
            sorted(path.name for path in self.path.iterdir() if not path.is_dir() or _is_file_name(path.name))
        )

    def below(self) -> Iterator[str]:
        return (path.relative_to(self.path).as_posix() for path in islice(self.path.glob("*/*"), 10_000))

    def require(self, name: str) -> bool:
        return self._path(name).exists()

    def text(self, name: str) -> bytes:
        return read_bytes(self._path(name))

    def entries(self, name: str, key: str = "") -> Mapping[str, Entry]:
        return file_entries(self._path(name), self.source, key)

    def all_entries(self, names: Sequence[str]) -> list[Mapping[str, Entry]]:
        return [self.entries(name) for name in names]

    def provenance(self, names: Iterable[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
        return tuple(self.path / name for name in names), {}

    def _path(self, name: str) -> Path:
        return self.path / name if name and name == self.given else inside(self.path, name, self.source)


@dataclass(frozen=True)
class _Remote:
    """A folder of a repository on the Hub."""

    repository: hub.Repository
    folder: str
    source: str
    stream: bool
    given: str = ""

    @property
    def revision(self) -> str:
        return self.repository.commit

    @cached_property
    def names(self) -> Collection[str]:
        return tuple(name for name in self._relative() if "/" not in name)

    def below(self) -> Iterator[str]:
        return (name for name in self._relative() if name.count("/") == 1)

    def require(self, name: str) -> bool:
        if not is_plain(name):
            raise InputError(f"{self.source}: {name!r} leads out of its folder and is refused")
        if self.repository.online and self._full(name) not in self.repository.files:
            raise InputError(f"{self.source}: {name} is missing from {self.repository.name}")
        return self._full(name) in self.repository.files

    def text(self, name: str) -> bytes:
        self.require(name)
        file = self._full(name)
        if not self.repository.cached(file) and (listed := self.repository.files.get(file)):
            small(listed.size, f"{self.source}: {name}")  # before a byte of it is asked for
            if self.stream:
                return bytes(self.repository.read(file, 0, listed.size))
        return read_bytes(self.repository.path(file))

    def entries(self, name: str, key: str = "") -> Mapping[str, Entry]:
        self.require(name)
        check_framework(name, self.source, self.repository.name, lambda: self.text("config.json"))
        file = self._full(name)
        if self.repository.cached(file) or not self.repository.online:
            return file_entries(self.repository.path(file), self.source, key)
        if name.endswith(".safetensors"):
            no_key(key, self.source)
            return remote_entries(self.repository, file, self.source, self.stream)
        if self.stream:
            raise NotStreamable(
                f"{self.source}: {name} cannot be streamed; only safetensors files can be read by byte range. "
                "Read it without streaming"
            )
        return file_entries(self.repository.path(file), self.source, key)

    def all_entries(self, names: Sequence[str]) -> list[Mapping[str, Entry]]:
        return hub.at_once(self.entries, names)

    def provenance(self, names: Iterable[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
        listed = {name: self.repository.files.get(self._full(name)) for name in names}
        if not self.repository.online:
            return tuple(self.repository.path(self._full(name)) for name, file in listed.items() if file), {}
        return (), {
            name: f"sha256:{file.sha256}" if file.sha256 else f"git-sha1:{file.git_sha1}"
            for name, file in listed.items()
            if file
        }

    def _full(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def _relative(self) -> Iterator[str]:
        prefix = f"{self.folder}/" if self.folder else ""
        return (file.removeprefix(prefix) for file in self.repository.files if file.startswith(prefix))


def _on_disk(path: Path, source: str) -> _Folder:
    return _Folder(path, source) if path.is_dir() else _Folder(path.parent, source, path.name)


@address_of("hub", "timm")
def _on_hub(name: str, source: str, stream: bool) -> _Remote:
    """``hub:org/name@revision/subfolder`` or ``timm:name``: a repository on the Hub."""
    address = hub.parse_address(name)
    repository = hub.find_repository(source, address)
    if stream and not repository.online:
        raise InputError(f"{source}: HF_HUB_OFFLINE is set, so nothing can be streamed; unset it or do not stream")
    folder, _, file = address.subfolder.rpartition("/")
    if address.subfolder in repository.files:
        return _Remote(repository, folder, source, stream, file)
    place = _Remote(repository, address.subfolder, source, stream)
    if address.subfolder and not any(place._relative()):
        raise InputError(f"{source}: {repository.name} has no file or folder {address.subfolder}")
    return place


@address_of("pkg")
def _in_package(name: str, source: str, stream: bool) -> _Folder:
    """``pkg:package/inner/path``: a resource of an installed package, which is not imported."""
    package, _, inner = name.removeprefix("pkg:").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise InputError(f"{name}: no installed package {package!r}; install it, or name a path")
    return _on_disk(inside(Path(folders[0]), inner, name) if inner else Path(folders[0]), source)
