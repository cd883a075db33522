"""The formats of weights files, one module each: a file's tensors, known from its header and read on access.

A module of this folder with a `FORMAT` is found by itself. A file's format is told from its first bytes, and from
its name where they do not tell. Nothing is unpickled that could run code, and names are checked before they reach a
terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TypeVar

import torch
from torch import Tensor

from specbasis.checkpoint.entry import Entry, json_object, no_key, shown, watched
from specbasis.checkpoint.formats.kit import FileFormat
from specbasis.checkpoint.mapped import copied
from specbasis.checkpoint.regular import read_bytes, regular
from specbasis.core.errors import InputError

_TENSORFLOW = ("TensorFlow", "from_tf", "tensorflow tf-keras")

_T = TypeVar("_T")

ELSEWHERE = {
    ".h5": _TENSORFLOW,
    ".index": _TENSORFLOW,
    ".meta": _TENSORFLOW,
    ".data-00000-of-00001": _TENSORFLOW,
    ".msgpack": ("Flax", "from_flax", "flax"),
}
"""Ending of a file that is not read here → framework, transformers' option that reads it, and what that needs."""


@cache
def formats() -> tuple[FileFormat, ...]:
    """Every format, in the order in which the files of a folder are preferred."""
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    return tuple(sorted((module.FORMAT for module in modules if hasattr(module, "FORMAT")), key=lambda f: f.rank))


def endings() -> tuple[str, ...]:
    """Endings of the names of weights files that are read here, the preferred first."""
    return tuple(ending for form in formats() for ending in form.endings)


def file_entries(path: Path, source: str, key: str = "") -> Mapping[str, Entry]:
    """The tensors of one weights file on disk; its kind is told from its first bytes.

    A tensor is read into memory of its own while the file is what it was when it was opened: a mapped file that is
    cut off while its numbers are used would end the process. Only a stack of matrices stays mapped, of which
    `MatrixRef.read` copies one.

    Raises:
        InputError: not a weights file; or, when a tensor is read, the file has changed.
    """
    name = shown(path.name)
    if any(
        "\ud800" <= sign <= "\udfff" for sign in str(path)
    ):  # bytes that are no UTF-8, which libraries do not take
        raise InputError(
            f"{shown(str(path))}: a name that is not UTF-8 cannot be used here; rename the file or folder"
        )
    check = watched([regular(path)])
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise InputError(f"{source}: {name} is empty (0 bytes)")
    suffix = ".h5" if head.startswith(b"\x89HDF") else path.suffix
    config = path.parent / "config.json"
    check_framework(path.with_suffix(suffix).name, source, str(path.parent), lambda: read_bytes(config))
    form = next((form for form in formats() if form.opens(path, head)), None)
    if form is not None:
        entries = form.entries(path, source, key)
        return {stored: _guarded(entry, check, stored) for stored, entry in entries.items()}
    no_key(key, source)
    raise InputError(
        f"{source}: {name} is neither a safetensors nor a torch file (it begins with {head[:4]!r}); "
        "convert it to safetensors first"
    )


def _guarded(entry: Entry, check: Callable[[], None], name: str) -> Entry:
    grid = None if entry.grid is None else partial(_checked, entry.grid, check)
    return replace(entry, load=partial(_copied, entry.load, check, name), grid=grid)


def _checked(read: Callable[[], _T], check: Callable[[], None]) -> _T:
    check()
    try:
        return read()
    finally:
        check()  # also where reading failed: a file that changed is why


def _copied(load: Callable[[], Tensor], check: Callable[[], None], name: str) -> Tensor:
    def copy() -> Tensor:
        tensor = load()
        is_stack = tensor.ndim == 3 or (tensor.ndim == 4 and tensor.dtype == torch.uint8)  # the second of blocks
        return tensor if is_stack or tensor.layout is not torch.strided else copied(tensor, name)

    return _checked(copy, check)


def check_framework(name: str, source: str, model: str, config: Callable[[], bytes]) -> None:
    """Refuse a TensorFlow or Flax file by its suffix, with the command that converts it.

    Args:
        name: the file's.
        source: what the user called it.
        model: the folder or repository, for the command.
        config: reads the model's config.json, for the class that the command loads.
    """
    if Path(name).suffix not in ELSEWHERE:
        return
    framework, option, package = ELSEWHERE[Path(name).suffix]
    try:
        architecture = str(json_object(config())["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        architecture = ""
    kind = architecture.removeprefix("TF").removeprefix("Flax")
    kind = kind if kind.isidentifier() and kind.isascii() else "AutoModel"
    place = model if re.fullmatch(r"[\w./ -]+", model, re.ASCII) else "FOLDER"
    # transformers dropped both frameworks in 5, and its last releases before that fail to convert.
    raise InputError(
        f"{source}: {shown(name)} is a {framework} file, which is not read here; convert it once, with "
        f'pip install "transformers<4.50" torch {package} and then python -c "import transformers; '
        f"transformers.{kind}.from_pretrained('{place}', {option}=True).save_pretrained('CONVERTED')\""
    )
