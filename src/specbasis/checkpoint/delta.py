"""A finetune as its difference from a base: a few singular directions, what is left in a few bits an entry.

A folder with `delta.safetensors` and `delta.json`. Of each changed matrix, on the rows that changed,

    tuned = base + Σ_i a_i b_i u_i v_iᵀ + diag(scale) Q

with u_i and v_i of 8 bits an entry, and Q of 1, 2 or 4 bits: odd multiples of one half, (code − 2^{bits−1} + ½).
Every other changed parameter is stored whole. `open_delta` gives back the finetune, one matrix at a time, float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from specbasis.checkpoint.entry import Checkpoint, Entry, json_object, parsing, reading
from specbasis.checkpoint.places import Place
from specbasis.core.errors import InputError
from specbasis.core.text import number_of

RECORD, WEIGHTS = "delta.json", "delta.safetensors"

FORMAT = 1

PARTS = ("rows", "left", "left_scale", "right", "right_scale", "codes", "scale")
"""What of a matrix may be stored, each under `NAME|PART`."""


def is_delta(place: Place) -> bool:
    """Whether a place is the folder of such a difference."""
    return not place.given and RECORD in place.names and WEIGHTS in place.names


def packed(codes: UInt8[Tensor, "out in"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Codes below 2^bits side by side in bytes, the first in the lowest bits; zeros fill up the last byte."""
    codes_per_byte = 8 // bits
    flat = torch.nn.functional.pad(codes.flatten(), (0, -codes.numel() % codes_per_byte)).view(-1, codes_per_byte)
    return torch.stack([flat[:, i] << (bits * i) for i in range(codes_per_byte)]).sum(0, dtype=torch.uint8)


def unpacked(stored: UInt8[Tensor, " bytes"], bits: int, shape: tuple[int, int]) -> UInt8[Tensor, "out in"]:
    """The codes that `packed` stored."""
    mask = 2**bits - 1
    codes = torch.stack([(stored >> (bits * i)) & mask for i in range(8 // bits)], dim=1)
    return codes.flatten()[: prod(shape)].view(shape)


def expanded(parts: Mapping[str, Tensor], bits: int, shape: tuple[int, int]) -> Float[Tensor, "out in"]:
    """The difference that the parts of a matrix hold, float32."""
    rows = parts.get("rows")
    out = shape[0] if rows is None else len(rows)
    delta = torch.zeros(out, shape[1])
    if "left" in parts:
        U, V = (parts[f"{side}"].float() * parts[f"{side}_scale"] for side in ("left", "right"))
        delta = U @ V.mT
    if bits:
        codes = unpacked(parts["codes"], bits, (out, shape[1])).float()
        delta += parts["scale"][:, None] * (codes - 2 ** (bits - 1) + 0.5)
    if rows is None:
        return delta
    return torch.zeros(shape).index_copy_(0, rows.long(), delta)


def open_delta(place: Place, base: Checkpoint) -> Checkpoint:
    """The finetune that a difference makes of its base.

    Raises:
        InputError: the folder is damaged, or the base lacks a matrix of the same shape.
    """
    with reading(place.source):
        text = place.text(RECORD)
        stored = place.entries(WEIGHTS)
        files, digests = place.provenance([WEIGHTS, RECORD])
    with parsing(RECORD, place.source):
        record = json_object(text)
        matrices = {str(name): _About.of(about) for name, about in record["matrices"].items()}
        kept = [str(name) for name in record["whole"]]
        config, version, stated = dict(record["config"]), record["delta"], str(record.get("base_sha256", ""))
    if version != FORMAT:
        raise InputError(f"{place.source}: a difference of format {version!r}; this version reads {FORMAT}")
    entries = {name: base.entries[own] for name, own in record["base_names"].items() if own in base}
    for name, about in matrices.items():
        own = base.entries.get(record["base_names"].get(name, ""))
        if own is None or prod(own.shape) != prod(about.shape):
            raise InputError(
                f"{place.source}: the base {base.source} has no {name} of shape {about.shape}, which the "
                "difference changes; give the base that it was extracted from"
            )
        parts = {part: stored[f"{name}|{part}"] for part in PARTS if f"{name}|{part}" in stored}
        about.check(parts, name, place.source)
        entries[name] = Entry(own.shape, "float32", partial(_sum, own, parts, about))
    missing = [name for name in kept if name not in stored]
    if missing:
        raise InputError(f"{place.source}: {WEIGHTS} lacks {missing[0]}; extract it again")
    entries |= {name: stored[name] for name in kept}
    held = f"{number_of(len(matrices), 'matrix')}, {number_of(len(kept), 'parameter')} stored whole"
    note = f"difference from {base.source}: {held}"
    return replace(
        base, source=place.source, entries=entries, files=files, digests=digests, config=config, under=base,
        revision=place.revision, made_from=stated, notes=(note,),
    )  # fmt: skip


class _About:
    """What the record says of a matrix: shape (out, in), bits of what is left, and how the base stores it."""

    def __init__(self, shape: tuple[int, int], bits: int, is_transposed: bool) -> None:
        self.shape, self.bits, self.is_transposed = shape, bits, is_transposed

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> _About:
        out, width = map(int, about["shape"])
        bits = int(about["bits"])
        if bits not in (0, 1, 2, 4) or min(out, width) < 1:
            raise ValueError(f"got shape {out} × {width} and {bits} bits")
        return cls((out, width), bits, bool(about["transposed"]))

    def check(self, parts: Mapping[str, Entry], name: str, source: str) -> None:
        """Refuse parts that do not make a matrix of this shape, by their headers.

        Raises:
            InputError: so they are.
        """
        out = parts["rows"].shape[0] if "rows" in parts else self.shape[0]
        rank = parts["left"].shape[-1] if "left" in parts else 0
        wanted: dict[str, tuple[int, ...]] = {"rows": (out,)} if "rows" in parts else {}
        if rank:
            wanted |= {"left": (out, rank), "left_scale": (rank,)}
            wanted |= {"right": (self.shape[1], rank), "right_scale": (rank,)}
        if self.bits:
            wanted |= {"codes": (-(-out * self.shape[1] * self.bits // 8),), "scale": (out,)}
        if {part: entry.shape for part, entry in parts.items()} != wanted or out > self.shape[0]:
            raise InputError(f"{source}: the parts of {name} do not fit together; extract it again")


def _sum(base: Entry, parts: Mapping[str, Entry], about: _About) -> Tensor:
    W: Tensor = base.load()
    loaded = {part: entry.load() for part, entry in parts.items()}
    rows = loaded.get("rows")
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < about.shape[0]:
        raise InputError("rows of the difference lie outside of the matrix; extract it again")
    delta = expanded(loaded, about.bits, about.shape)
    return W.float() + (delta.mT if about.is_transposed else delta).reshape(W.shape)
