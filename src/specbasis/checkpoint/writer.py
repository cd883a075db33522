"""Writing a checkpoint tensor by tensor: never a whole model in memory, and a folder is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from specbasis.checkpoint.atomic import clear_beside, whole, writing
from specbasis.checkpoint.entry import Checkpoint, Entry
from specbasis.checkpoint.formats import endings
from specbasis.checkpoint.regular import read_json
from specbasis.core.dtypes import FORMATS, Format, name_of
from specbasis.core.errors import InputError

SHARD_BYTES = 5 * 10**9
"""Size at which a new shard begins; transformers reads any."""

BESIDE = (".json", ".txt", ".model", ".jinja")
"""Endings of the files beside the weights that a model needs: configuration and tokenizer, no code, no weights."""

MODULES = "modules.json"
"""Where sentence-transformers lists the modules of a model, each but the first in a folder of its own."""


def write_model(
    checkpoint: Checkpoint,
    out: Path,
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
    *,
    shard_bytes: int = SHARD_BYTES,
    extra: Mapping[str, Callable[[], str]] | None = None,
) -> Path:
    """Write a model's weights, changed tensor by tensor, with its configuration and tokenizer.

    The weights go to `model.safetensors`, or to shards with an index where they are larger than one, in the layout
    of Hugging Face. Everything is written to a folder beside ``out`` that takes its name at the end.

    Args:
        checkpoint: the model; the files beside its weights are copied where they are on disk.
        out: the new folder.
        change: from a tensor's name and the tensor to what is written, of equal shape and dtype; as it is by
            default.
        shard_bytes: size at which a new shard begins.
        extra: file name → what makes the text of a further file, asked when the weights are written.

    Raises:
        InputError: ``out`` exists and is not empty, cannot be written, or a tensor's format is not known.
    """
    want_new(out)
    clear_beside(out)
    with writing(out), whole(out) as temporary:
        temporary.mkdir()
        _copy_beside(checkpoint, temporary)
        _write_weights(checkpoint, temporary, change, shard_bytes)
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text(), encoding="utf-8")
    return out


def want_new(folder: Path) -> None:
    """Refuse a folder that holds anything, and the one that the command runs in: a folder is put there whole.

    Raises:
        InputError: it does, is that one, or is no folder.
    """
    if folder.resolve() in (Path.cwd(), Path(folder.anchor or "/")):
        raise InputError(f"{folder}: is the folder that this runs in; want a new one, such as {folder / 'out'}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; want a new folder")


def _copy_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Configuration and tokenizer; of an adapter its own configuration, and the rest of its base's files."""
    model = checkpoint.under or checkpoint
    if model.files:
        place = model.files[0].parent
        others = {f.stem for f in place.iterdir() if f.suffix in endings()} - {f.stem for f in model.files}
        for file in sorted(place.iterdir()):
            is_beside = file.suffix in BESIDE and file.is_file() and not file.name.endswith(".index.json")
            if is_beside and file.stem not in others:  # what is called as another model's weights is of that model
                shutil.copyfile(file, folder / file.name)
        copy_modules(place, folder)
    if checkpoint.config and (checkpoint.under or not (folder / "config.json").exists()):
        (folder / "config.json").write_text(json.dumps(dict(checkpoint.config), indent=2) + "\n", encoding="utf-8")


def copy_modules(place: Path, folder: Path) -> None:
    """Copy what sentence-transformers puts behind a model: the folders that modules.json names, and it itself."""
    try:
        listed = [str(module["path"]) for module in read_json(place / MODULES)]
    except (OSError, ValueError, TypeError, KeyError):  # none there, or none of theirs
        return
    shutil.copyfile(place / MODULES, folder / MODULES)
    for name in listed:
        is_below = name not in ("", "..") and name == Path(name).name and not (place / name).is_symlink()
        if is_below and (place / name).is_dir():
            (folder / name).mkdir(exist_ok=True)
            for file in (place / name).iterdir():
                if file.suffix in (*BESIDE, ".safetensors") and file.is_file():
                    shutil.copyfile(file, folder / name / file.name)


def _write_weights(
    checkpoint: Checkpoint, folder: Path, change: Callable[[str, Tensor], Tensor], shard_bytes: int
) -> None:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in checkpoint.entries.items():
        if shards[-1] and size + stored_bytes(name, entry) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += stored_bytes(name, entry)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for file, shard in zip(names, shards, strict=True):
        tensors = ((name, change(name, checkpoint[name])) for name in shard)
        with (folder / file).open("wb") as stream:
            write_safetensors(stream, shard, tensors)
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(stored_bytes(name, entry) for shard in shards for name, entry in shard.items())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_safetensors(
    stream: BinaryIO,
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file from a stream of tensors, in the order of their entries; one is in memory at a time.

    Args:
        stream: where to write.
        entries: name → shape and dtype.
        tensors: name and tensor of each of them.
        metadata: what the header says beside ``format``.

    Raises:
        InputError: a tensor has another shape or dtype than its entry.

    Source: the safetensors format: length of the header, header as JSON, tensors without gaps.
    """
    stream.write(safetensors_header(entries, metadata))
    for name, tensor in tensors:
        entry = entries[name]
        want = _format(name, entry).name
        if tuple(tensor.shape) != entry.shape or name_of(tensor.dtype) != want:
            raise InputError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}; want {want} {entry.shape}")
        stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def safetensors_header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands in a safetensors file before the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, entry in entries.items():
        end = position + stored_bytes(name, entry)
        header[name] = {
            "dtype": _format(name, entry).codes[0],
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stored_bytes(name: str, entry: Entry) -> int:
    """Bytes of a tensor in a file that is written here."""
    return _format(name, entry).bytes * prod(entry.shape)


def _format(name: str, entry: Entry) -> Format:
    if entry.dtype not in FORMATS:
        raise InputError(f"{name}: stored as {entry.dtype}, which cannot be written here; want a floating format")
    return FORMATS[entry.dtype]
