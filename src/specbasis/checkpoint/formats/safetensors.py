"""safetensors files, on disk and by byte range on the Hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from specbasis.checkpoint.entry import Entry, check_names, first_line, json_object, no_key, reading
from specbasis.checkpoint.formats.kit import FileFormat, tensor_of
from specbasis.checkpoint.hub import Repository
from specbasis.core.dtypes import FORMATS, by_code
from specbasis.core.errors import InputError


def entries(path: Path, source: str, key: str = "") -> dict[str, Entry]:
    """The tensors of a safetensors file on disk."""
    no_key(key, source)
    with reading(source):
        handle: Any = safe_open(path, framework="pt")
        names = list(handle.keys())
        check_names(names, source)
        headers = {name: handle.get_slice(name) for name in names}
        return {
            name: Entry(
                tuple(header.get_shape()),
                by_code(header.get_dtype()),
                lambda name=name: handle.get_tensor(name),
            )
            for name, header in headers.items()
        }


def base_sha256(path: Path) -> str:
    """The SHA-256 of the weights that an adapter's file says it was made from; empty where it does not say."""
    with reading(str(path)), safe_open(path, framework="pt") as file:
        return str((file.metadata() or {}).get("base_sha256", ""))


def remote_entries(repository: Repository, file: str, source: str, stream: bool) -> dict[str, Entry]:
    """The tensors of a safetensors file on the Hub, known from its header, which is read by byte range.

    A tensor is read by its own byte range when streaming, else from the whole file, downloaded at first need.
    """
    head = repository.header(file)
    try:
        header = _parse_header(head[8:], repository.files[file].size - len(head))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: {file} is truncated or corrupted ({first_line(error)})") from error
    check_names(header, source)
    downloaded: dict[str, Mapping[str, Entry]] = {}

    def whole(name: str) -> Tensor:
        if not downloaded:
            downloaded[file] = entries(repository.path(file), source)
        return downloaded[file][name].load()

    def part(name: str, first: int, last: int) -> Tensor:
        _, dtype, start, _ = header[name]
        if dtype not in FORMATS:
            raise InputError(f"{source}: {name!r} is stored as {dtype}, which cannot be streamed")
        start, stop = (len(head) + start + FORMATS[dtype].bytes * number for number in (first, last))
        return tensor_of(repository.read(file, start, stop), dtype, (last - first,))

    def streamed(name: str) -> Tensor:
        shape = header[name][0]
        return part(name, 0, math.prod(shape)).reshape(shape)

    load = streamed if stream else whole
    return {
        name: Entry(shape, dtype, lambda name=name: load(name), part=partial(part, name) if stream else None)
        for name, (shape, dtype, *_) in header.items()
    }


def _parse_header(text: bytes | bytearray, size: int) -> dict[str, tuple[tuple[int, ...], str, int, int]]:
    """Name → shape, dtype, start and stop of a safetensors header, its tensors filling ``size`` bytes without gaps.

    Raises:
        ValueError, KeyError, TypeError: anything else.

    Source: the safetensors format.
    """
    tensors = {}
    for name, item in json_object(bytes(text)).items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = tuple(item["shape"]), item["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"{name!r}: sizes and offsets are no whole numbers")
        dtype = by_code(str(item["dtype"]))
        if dtype in FORMATS and stop - start != FORMATS[dtype].bytes * math.prod(shape):
            raise ValueError(f"{name!r}: {stop - start} bytes for {shape} {dtype}")
        tensors[name] = (shape, dtype, start, stop)
    end = 0
    for _, _, start, stop in sorted(tensors.values(), key=lambda item: item[2:]):
        if start != end or stop < start:
            raise ValueError("tensors overlap or leave gaps")
        end = stop
    if end != size:
        raise ValueError(f"tensors fill {end} of {size} bytes")
    return tensors


FORMAT = FileFormat(
    (".safetensors",),
    lambda path, head: path.suffix == ".safetensors" or (head[8:9] == b"{" and not head.startswith(b"GGUF")),
    entries,
    rank=1,
)
