"""The base around the adapted matrices, as an adapter remembers it: embeddings, other matrices, biases, norms.

The adapted matrices themselves are proven (`specbasis.checkpoint.proof`). The rest is fingerprinted when an adapter
is saved and compared when it is loaded. Another rest is no reason to refuse: the update is the trained one, and a
base with a resized vocabulary, or a rounded one, is of use. It is a warning that names what differs.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specbasis.adapter.adapted import AdaptedLayer
from specbasis.adapter.layouts import innermost

WIDTH = 1021
"""Sums of a fingerprint. A prime, so that rows of a weight that are exchanged meet other sums."""

_NAMED = 4  # names that a warning lists


def fingerprint(tensor: Tensor) -> str:
    """32 bits that tell a tensor from others: SHA-256 of dtype, shape, and sums over every `WIDTH`-th 64-bit word.

    Equal on every device. Reads the tensor once, at the speed of memory; a hash of all bytes takes ten times that.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // (8 * WIDTH) * 8 * WIDTH
    hashed = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if whole:
        hashed.update(flat[:whole].view(torch.int64).view(-1, WIDTH).sum(0).cpu().numpy().tobytes())
    hashed.update(flat[whole:].cpu().numpy().tobytes())
    return hashed.hexdigest()[:8]


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Block, or name outside of the blocks → fingerprints of its tensors in the order of their names.

    A tensor that is not float32 has its dtype behind it: ``1f0c22ab/bfloat16``.
    """
    words: defaultdict[str, list[str]] = defaultdict(list)
    for name, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        words[_block(name)].append(fingerprint(tensor) + ("" if dtype == "float32" else f"/{dtype}"))
    return {block: " ".join(group) for block, group in words.items()}


def differences(recorded: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors with other values than were recorded → the dtype that was recorded.

    A tensor that is held in another dtype now is compared in the recorded one. Blocks that only one of the two
    knows are left out: a head comes and goes with the task.
    """
    blocks: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(tensors):
        blocks[_block(name)].append(name)
    different = {}
    for block in sorted(recorded.keys() & blocks.keys()):
        words = str(recorded[block]).split()
        if len(words) != len(blocks[block]):
            different[block] = ""
            continue
        for name, word in zip(blocks[block], words, strict=True):
            digest, _, named = word.partition("/")
            dtype = getattr(torch, named or "float32", None)
            if not isinstance(dtype, torch.dtype) or fingerprint(tensors[name].to(dtype)) != digest:
                different[name] = named or "float32"
    return different


def warn_of_another_base(seal: Mapping[str, Any], model: nn.Module, apart: Iterable[str]) -> None:
    """Name what differs in the rest of the base from what an adapter was trained on, in one warning.

    Args:
        seal: what the adapter's configuration records.
        model: the base, with the adapter's layers.
        apart: names of tensors that the adapter's file restores.
    """
    recorded, tensors = seal["base"], rest_of(model, apart)
    different = differences(recorded, tensors)
    if not different:
        return
    now = {str(tensors[name].dtype).removeprefix("torch.") for name in different if name in tensors}
    then = set(different.values())
    rounded = f" (in {'/'.join(sorted(now))} now, in {'/'.join(sorted(then))} then)" if now != then and now else ""
    names = ", ".join(list(different)[:_NAMED]) + (", …" if len(different) > _NAMED else "")
    warnings.warn(
        f"{len(different)} of {len(tensors)} tensors of the base are not those that the adapter was "
        f"trained with{rounded}: {names}; its updates are the trained ones, the model around them is not. Load the "
        "base of the same revision and dtype",
        stacklevel=3,
    )


def rest_of(model: nn.Module, apart: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and saved buffers of a base by the names that they have without adapters.

    Args:
        model: the base, adapters in it or not; a merged layer counts with its frozen weight.
        apart: names of tensors to leave out: those that the adapter saves.
    """
    frozen = {
        id(innermost(module).weight): module._original
        for module in model.modules()
        if isinstance(module, AdaptedLayer) and module._original is not None
    }
    outside = {f".{name}" for name in apart}
    tensors: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        own = {**module._parameters, **{key: t for key, t in module._buffers.items() if key not in passing}}
        for key, tensor in own.items():
            name = re.sub(r"\.(base_layer|original_module|_orig_mod)(?=\.)", "", f".{prefix}.{key}")
            if tensor is None or ".spectral_" in name or ".modules_to_save." in name or name in outside:
                continue
            tensor = frozen.get(id(tensor), tensor)
            if is_dense(tensor):
                tensors[name.lstrip(".")] = tensor
    return tensors


def is_dense(tensor: Tensor) -> bool:
    """Whether the values are at hand: not on meta, not a shard, not packed by a quantiser."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not tensor.is_meta
        and tensor.numel() > 0
        and not tensor.is_sparse
    )


def _block(name: str) -> str:
    """The name up to its first number, ``model.layers.3``; the whole name where there is none."""
    match = re.match(r"(.*?\.)??\d+(?=\.)", name)
    return match[0] if match else name
