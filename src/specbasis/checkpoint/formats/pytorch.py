"""torch files: a zip archive or an older pickle with tensors, of which nothing is unpickled that could run code."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedReader, BytesIO, FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint.entry import Entry, first_line, parsing, shown
from specbasis.checkpoint.formats import pickles
from specbasis.checkpoint.formats.kit import FileFormat, named_as_text, tensor_entries
from specbasis.core.errors import InputError

LEGACY_PICKLES = 5
"""At the head of a file that is no archive: magic number, protocol, machine, content, keys of the storages."""


def entries(path: Path, source: str, key: str = "") -> Mapping[str, Entry]:
    """The tensors of a torch file, in its only dictionary of tensors or in the one at a key."""
    return tensor_entries(_nested(_torch_load(path, source), key, source), source, bounded=True)


def _torch_load(path: Path, source: str) -> Any:
    """What a torch file holds, memory-mapped where its format allows, without running any code."""
    zipped = _is_archive(path, source)
    with parsing(path.name, source):
        try:
            if zipped:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with _Bounded(FileIO(path)) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            if name and name.group(1) == _cut_name(path):
                raise ValueError("it ends within a name") from error
            detail = name.group(1) if name else first_line(ValueError(str(error).rpartition("error:")[2]))
            needs = "needs" if name else "is corrupted or needs"
            raise InputError(
                f"{source}: {shown(path.name)} {needs} code ({detail}) to be unpickled, which is refused; if you "
                "trust it, load it with torch and write its tensors with safetensors.torch.save_file"
            ) from error


def _cut_name(path: Path) -> str:
    """The name that torch makes of one within which a file ends: of a cut line it drops the last character."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200))
        cut = re.search(rb"c([\w.]*)(\n?)([\w.]*)\Z", file.read())
    if cut is None:
        return ""
    module, end, name = (part.decode("ascii", "replace") for part in cut.groups())
    return f"{module if end else module[:-1]}.{name[:-1]}"


class _Bounded(BufferedReader):
    """A file of which no more is asked than is left of it: room is made for what is asked."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(min(size, left) if size is not None and size >= 0 else size)


def _check_pickles(path: Path, source: str, archive: zipfile.ZipFile | None) -> None:
    """Refuse a file whose pickles would cost more than what it holds; a damaged one is left to torch."""
    size = path.stat().st_size
    try:
        if archive is None:
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                for _ in range(LEGACY_PICKLES):
                    pickles.check(content, size)
        else:
            for item in archive.infolist():
                if item.orig_filename.lower().endswith(".pkl"):
                    pickles.check(BytesIO(archive.read(item)), size)
    except pickles.CostlyError as error:
        raise InputError(f"{source}: {shown(path.name)} asks for {error}; refused") from error
    except (ValueError, LookupError):
        return


def _is_archive(path: Path, source: str) -> bool:
    """Whether a file is a zip archive, which is refused if it is compressed, overlapping, or of another kind."""
    name = shown(path.name)
    with parsing(name, source):
        if not zipfile.is_zipfile(path):
            _check_pickles(path, source, None)
            return False
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
            _refuse_archive(items, path, source)
            _check_pickles(path, source, archive)
            return True


def _refuse_archive(items: list[zipfile.ZipInfo], path: Path, source: str) -> None:
    name = shown(path.name)
    if any(item.filename.endswith("/constants.pkl") for item in items):
        raise InputError(
            f"{source}: {name} is a TorchScript program; load it with torch.jit.load and save its state_dict"
        )
    if any(item.compress_type != zipfile.ZIP_STORED or item.compress_size != item.file_size for item in items):
        raise InputError(f"{source}: {name} has compressed entries, which torch never writes; refused")
    if sum(item.file_size for item in items) > path.stat().st_size:
        raise InputError(f"{source}: {name} unpacks to more than its size, which torch never writes; refused")
    if not any(item.filename.endswith("data.pkl") for item in items):
        raise InputError(f"{source}: {name} is a zip archive, but not torch's (no data.pkl); want a weights file")
    if len({item.orig_filename.lower() for item in items}) != len(items):
        raise InputError(f"{source}: {name} has two entries of one name, which torch never writes; refused")


def _nested(content: Any, key: str, source: str) -> Mapping[str, Any]:
    """The dictionary of tensors at a dotted key; without a key the only one there is."""
    for part in _walk(content, key, source):
        content = part
    dictionaries = list(_state_dicts(content, source, set()))
    if len(dictionaries) == 1:
        return dictionaries[0][1]
    if dictionaries:
        some = ", ".join(f"#{shown(place)} ({len(d)})" for place, d in dictionaries[:6])
        raise InputError(f"{source}: several dictionaries of tensors inside; add the one you mean: {some}")
    if isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values()):
        return content
    kind = type(content).__name__
    raise InputError(f"{source}: holds no dictionary of tensors (got {kind})")


def _walk(content: Any, key: str, source: str) -> Iterator[Any]:
    """Steps down a dotted key; a dictionary's own key may hold dots itself."""
    while key:
        content = named_as_text(content, source) if isinstance(content, Mapping) else content
        keys = list(content) if isinstance(content, Mapping) else []
        options = [k for k in keys if (key + ".").startswith(k + ".")]
        if not options:
            have = ", ".join(map(shown, keys[:6])) if keys else type(content).__name__
            raise InputError(f"{source}: no key '{key}' inside; there is: {have}")
        step = max(options, key=len)
        content, key = content[step], key[len(step) + 1 :]
        yield content


def _state_dicts(
    content: Any, source: str, seen: set[int], place: str = "", depth: int = 4
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every nested dictionary that maps strings to tensors with at least one matrix among them, each once."""
    if not isinstance(content, Mapping) or depth == 0 or id(content) in seen:
        return
    seen.add(id(content))
    named_as_text(
        content, f"{source}#{place}" if place else source
    )  # refuses 0 beside "0", of which one would be passed over
    tensors = [v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)]
    if any(t.is_nested or t.ndim >= 2 for t in tensors):
        yield place, content
        return
    for key, value in content.items():
        if isinstance(key, str):
            yield from _state_dicts(value, source, seen, f"{place}.{key}" if place else key, depth - 1)


FORMAT = FileFormat(
    (".bin", ".pt", ".pth", ".ckpt"),
    lambda path, head: head.startswith((b"PK", b"\x80")) and path.suffix not in (".safetensors", ".npz"),
    entries,
    rank=2,
)
