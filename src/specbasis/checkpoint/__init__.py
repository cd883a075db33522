"""A checkpoint as a lazy mapping from parameter name to tensor, whatever it is stored in.

Weights are data: nothing is unpickled that could run code, no path is followed out of its folder, and names are
checked before they reach a terminal. Nothing here knows what a parameter means.

A *source* is what a user writes. It is located (places: a folder on disk or on the Hub), the weights in it are
chosen by name (choice), and each file is opened by its format (formats).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from specbasis.checkpoint.adapter_file import CONFIG, is_adapter, named_base
from specbasis.checkpoint.choice import open_place, read_config
from specbasis.checkpoint.delta import RECORD, is_delta, open_delta
from specbasis.checkpoint.digest import sha256
from specbasis.checkpoint.entry import ABSENT, Checkpoint, Entry
from specbasis.checkpoint.formats.kit import tensor_entries
from specbasis.checkpoint.formats.quantised import dequantised
from specbasis.checkpoint.peft import alone, open_adapter
from specbasis.checkpoint.places import Place, locate
from specbasis.core.errors import InputError
from specbasis.core.text import shareable

__all__ = [
    "ABSENT",
    "Checkpoint",
    "Entry",
    "content_sha256",
    "joined_sha256",
    "open_checkpoint",
    "open_tuned",
    "other_weights",
    "refuse_other_weights",
    "sha256",
    "weights_sha256",
]


def open_checkpoint(source: str | Path | Mapping[str, Tensor], *, stream: bool = False) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        source: one of

            - a `.safetensors` file; a torch file (`.pt .pth .bin .ckpt …`, told by content, not by name); an ONNX
              file with floating-point weights, a GGUF file (extras ``onnx``, ``gguf``), a NumPy archive (`.npz`);
            - a folder with one, sharded with an index or not (Hugging Face layout);
            - ``hub:org/name@revision/subfolder`` (revision and subfolder may be left out, the subfolder may be a
              file), a bare ``org/name`` where no such path exists, ``timm:name`` (extra ``hub``);
            - ``pkg:package/path/to/file``: a resource inside an installed package, which is not imported;
            - any of these with ``#key.key``: a dictionary nested in a torch file;
            - the folder of a PEFT adapter, or of a difference (`delta`): the model that it makes of the base that
              it names;
            - a mapping from names to tensors, such as a `state_dict`; a `Checkpoint` is returned as it is.
        stream: for a repository on the Hub, read only the byte ranges of the tensors that are read, and write
            nothing to disk; each reading of a tensor is a request. Otherwise a shard is downloaded into the
            client's cache when a tensor of it is first read. No effect on local sources.

    Raises:
        InputError: nothing there, not a checkpoint, truncated, corrupted, needing code to unpickle, leading out of
            its folder, quantised in a way that is not read, an adapter whose base is not there, or without tensors.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        entries = dequantised(tensor_entries(source, "state_dict"), {}, "state_dict")
        checkpoint = Checkpoint("state_dict", entries)
        if not checkpoint.entries:
            raise InputError("state_dict: holds no tensors; want a mapping from names to tensors")
        return checkpoint
    return _open(*locate(source, stream=stream), stream)


def _open(place: Place, key: str, stream: bool) -> Checkpoint:
    if is_adapter(place):
        return alone(open_adapter(place, _own_base(place, CONFIG, stream)))
    if is_delta(place):
        return alone(open_delta(place, _own_base(place, RECORD, stream)))
    return open_place(place, key)


def _own_base(place: Place, config: str, stream: bool) -> Checkpoint:
    """The base that the adapter or the difference in a place names, in this file.

    Raises:
        InputError: it cannot be opened, or is an adapter itself.
    """
    name = named_base(read_config(place, config)[0], place.source)
    try:
        base, key = locate(name, stream=stream)
        if is_adapter(base) or is_delta(base):
            raise InputError(f"{name}: is an adapter itself")
        return open_place(base, key)
    except InputError as error:
        raise InputError(f"{place.source}: an adapter whose base cannot be opened: {error}") from error


def open_tuned(source: str | Path | Mapping[str, Tensor], base: Checkpoint, *, stream: bool = False) -> Checkpoint:
    """Open the tuned side of a comparison: a checkpoint, or a PEFT adapter of the base.

    Args:
        source: as in `open_checkpoint`, or an adapter's folder on disk or on the Hub (``adapter_config.json``).
        base: the model that it was tuned from; where that is an adapter itself, a tuned adapter stands on
            the base that it names.
        stream: as in `open_checkpoint`; an adapter's own small file is read whole.

    Raises:
        InputError: as `open_checkpoint`, and as `peft.open_adapter`.
    """
    if isinstance(source, Mapping):
        return open_checkpoint(source)
    place, key = locate(source, stream=stream)
    if is_adapter(place) and base.under is None:
        return open_adapter(place, base)
    if is_delta(place) and base.under is None:
        return open_delta(place, base)
    return _open(place, key, stream)


def other_weights(tuned: Checkpoint, sha256: str = "") -> str:
    """Which other weights an adapter, or a difference, says that it was made from, in words; empty where none.

    Args:
        tuned: an adapter on its base, or any other checkpoint.
        sha256: that of its base's weights, where it is known.
    """
    if tuned.under is None or not tuned.made_from or tuned.made_from == (sha256 or weights_sha256(tuned.under)):
        return ""
    base = shareable(tuned.under.source)
    return f"was made from other files than those of {base} (their SHA-256 is {tuned.made_from[:12]}…)"


def refuse_other_weights(tuned: Checkpoint) -> None:
    """Refuse an adapter, or a difference, that stands on other weights than it says it was made from.

    Raises:
        InputError: its file names other weights.
    """
    if reason := other_weights(tuned):
        raise InputError(f"{tuned.source}: {reason}; want the base that it was made from")


def content_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of every tensor, for a checkpoint that has no files."""
    digest = hashlib.sha256()
    for name, entry in checkpoint.entries.items():
        digest.update(f"{name} {entry.shape} {entry.dtype}\n".encode())
        digest.update(checkpoint[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's weights: of its file, of several files' digests, or of the tensors without files.

    Costs one reading of the files. Of a checkpoint that is streamed from the Hub the Hub's own digests count.
    """
    return joined_sha256(checkpoint, [sha256(path) for path in checkpoint.files])


def joined_sha256(checkpoint: Checkpoint, files: Sequence[str]) -> str:
    """`weights_sha256`, where the digests of the files are known."""
    digests = [*files, *(f"{name} {digest}" for name, digest in sorted(checkpoint.digests.items()))]
    if not digests:
        return content_sha256(checkpoint)
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
