"""A finetune extracted as its difference from the base, which `specbasis.checkpoint.open_tuned` reads.

In few bits, or as the tensors that are not the base's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.checkpoint.delta import FORMAT, RECORD, WEIGHTS, expanded, packed
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.writer import stored_bytes
from specbasis.core.dtypes import FORMATS
from specbasis.core.statistics import Array
from specbasis.core.svd import SVD
from specbasis.treatment.budget import Curve, left_of
from specbasis.treatment.form import Choice, Form, made_together, unusable
from specbasis.treatment.lora import base_address
from specbasis.treatment.updates import Update, leading, spectrum_of


class Difference(Form):
    """Directions and bits of each matrix, and all the rest whole; an option is one of `setting`."""

    WEIGHTS = WEIGHTS

    def sort(self, changed: Sequence[Update]) -> None:
        """Matrices are stored in few bits, all other changes as they are."""
        self.left_out = [(c, unusable(c)) for c in changed if unusable(c)]
        usable = [c for c in changed if not unusable(c)]
        self.matrices = [c for c in usable if c.is_matrix]
        self.carry([c for c in usable if not c.is_matrix])
        known = {c.name for c in self.changes}  # whole numbers, such as positions, are none of them
        self.rest = [n for n, entry in self.tuned.entries.items() if n not in known and entry.dtype in FORMATS]

    def carry(self, others: Sequence[Update]) -> None:
        """Store changes as they are, or leave them out where that is asked for."""
        self.carried = list(others) if self.options.carry else []
        self.left_out += [] if self.options.carry else [(c, "not asked for (carry)") for c in others]

    def chosen(self) -> Choice:
        """Directions and bits of each matrix, at one price of a byte."""
        curves = []
        self.rows: list[Tensor | None] = []
        for change in self.matrices:
            delta = self.tell(change, "singular values of ").delta()
            self.rows.append(changed_rows(delta))
            stored = delta if self.rows[-1] is None else delta[self.rows[-1].long()]
            squares = spectrum_of(stored, self.cache, change.name).square().cpu().numpy()
            curves.append(curve(squares, (len(stored), stored.shape[1])))
        return self.spread(curves)

    def entries(self, choice: Choice) -> dict[str, Entry]:
        """Parts of the matrices, and what is stored as it is."""
        entries: dict[str, Entry] = {}
        for change, rows, option in zip(self.matrices, self.rows, choice, strict=True):
            if option:
                entries |= self._parts(change, rows, *self._setting(change, rows, option))
        return entries | {name: self.tuned.entries[name] for name in self.whole}

    @property
    def whole(self) -> list[str]:
        """Names of what is stored as it is."""
        return [*(c.name for c in self.carried), *self.rest]

    def texts(self, choice: Choice) -> dict[str, str]:
        """The record that says how to read the file."""
        whole = self.whole
        chosen = zip(self.matrices, self.rows, choice, strict=True)
        record = {
            "delta": FORMAT,
            "base_model_name_or_path": base_address(self.address).get("pretrained_model_name_or_path"),
            "base_sha256": self.base_sha256,
            "base_names": {c.name: c.counterpart for c in self.changes if c.counterpart and c.name not in whole},
            "matrices": {
                c.name: {
                    "shape": list(c.matrix_shape),
                    "bits": self._setting(c, rows, option)[1],
                    "transposed": c.is_transposed,
                }
                for c, rows, option in chosen
                if option
            },
            "whole": whole,
            "config": dict(self.tuned.config),
        }
        return {RECORD: json.dumps(record, indent=1) + "\n"}

    def write(self, folder: Path) -> None:
        """See `Form.write`; matrices of which nothing is stored get their lines."""
        for change, option in zip(self.matrices, self.choice, strict=True):
            if not option:
                self.note(change, rank=0, bits=0, bytes=0, share=0.0)
        super().write(folder)

    def _setting(self, change: Update, rows: Tensor | None, option: int) -> tuple[int, int]:
        out, width = change.matrix_shape
        return setting(option, min(out if rows is None else len(rows), width))

    def _parts(self, change: Update, rows: Tensor | None, rank: int, bits: int) -> dict[str, Entry]:
        """The parts of one matrix, by their shapes."""
        out, width = change.matrix_shape
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        if rows is not None:
            out = len(rows)
            shapes["rows"] = ("int32", (out,))
        if rank:
            for side, length in (("left", out), ("right", width)):
                shapes[f"{side}_scale"] = ("float32", (rank,))
                shapes[side] = ("int8", (length, rank))
        if bits:
            shapes["scale"] = ("float32", (out,))
            shapes["codes"] = ("uint8", (-(-out * width * bits // 8),))
        named = {f"{change.name}|{part}": about for part, about in shapes.items()}
        return made_together(named, partial(self._made, change, rows, rank, bits))

    def _made(self, change: Update, rows: Tensor | None, rank: int, bits: int) -> dict[str, Tensor]:
        """The parts of one matrix, and a line on what they hold, measured on what was rounded."""
        self.tell(change)
        delta = change.delta()
        chosen = delta if rows is None else delta[rows.long()]
        svd = leading(chosen, rank, self.cache, change.name) if rank else None
        parts = quantised(chosen.float(), rows, svd, bits)
        lost = float((expanded(parts, bits, change.matrix_shape) - delta).square().sum())
        size = sum(part.numel() * part.element_size() for part in parts.values())
        self.note(change, rank=rank, bits=bits, bytes=size, share=max(0.0, 1 - lost / change.squares[0]))
        return {f"{change.name}|{part}": tensor for part, tensor in parts.items()}


class Dense(Difference):
    """The tensors that are not the base's, bit for bit, in the finetune's formats."""

    def sort(self, changed: Sequence[Update]) -> None:
        """Whatever has another bit is stored; what is in no format that can be written is left out."""
        names, known = {c.name: c.counterpart for c in self.changes}, {c.name for c in changed}
        stored = [c for c in changed if self.tuned.entries[c.name].dtype in FORMATS]
        self.left_out = [(c, unusable(c)) for c in changed if c not in stored]
        self.whole_matrices = [c for c in stored if c.is_matrix and not unusable(c)]
        self.carry([c for c in stored if c not in self.whole_matrices])
        self.carried += self.whole_matrices
        self.rest = [
            name
            for name, entry in self.tuned.entries.items()
            if name not in known
            and entry.dtype in FORMATS
            and not _is_same(entry, self.base.entries.get(names.get(name, "")))
        ]

    def write(self, folder: Path) -> None:
        """See `Form.write`; the matrices get their lines."""
        super().write(folder)
        for change in self.whole_matrices:
            size = stored_bytes(change.name, self.tuned.entries[change.name])
            self.note(change, rank=min(change.matrix_shape), whole=True, bytes=size, share=1.0)


def _is_same(own: Entry, theirs: Entry | None) -> bool:
    """Whether two tensors are equal to the bit."""
    if theirs is None or (own.dtype, own.shape) != (theirs.dtype, theirs.shape):
        return False
    return own is theirs or torch.equal(*(e.load().contiguous().flatten().view(torch.uint8) for e in (own, theirs)))


# --- what is left, in few bits ---------------------------------------------------------------------------------

DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 4: 0.01154}
"""Bits an entry → share of the square that the best uniform quantiser of normal numbers loses. Source: Max 1960."""

STEP = {1: 1.596, 2: 0.9957, 4: 0.3352}
"""Bits an entry → its step, in standard deviations."""

SCALE = 4
"""Bytes of a scale: float32, one a row of what is left and two a direction."""

FEW_ROWS = 0.5
"""Where fewer rows than this share changed, such as tokens that were seen, only they are stored."""


def curve(squares: Array, shape: tuple[int, int]) -> Curve:
    """What a matrix costs and loses at each number of bits and directions; see `setting`.

    The loss is predicted: the error of 8 bits a direction is left out, since what is left corrects it.

    Args:
        squares: of the singular values of its update, descending.
        shape: (rows that changed, in).
    """
    out, width = shape
    directions, left = np.arange(len(squares) + 1) * (out + width + 2 * SCALE), left_of(squares)
    sizes = [directions + (-(-out * width * bits // 8) + SCALE * out if bits else 0) for bits in DISTORTION]
    return Curve(
        np.concatenate(sizes).astype(np.float64), np.concatenate([left * lost for lost in DISTORTION.values()])
    )


def setting(option: int, ranks: int) -> tuple[int, int]:
    """Directions and bits of an option of a `curve` of so many ranks."""
    return option % (ranks + 1), list(DISTORTION)[option // (ranks + 1)]


def changed_rows(delta: Float[Tensor, "out in"]) -> Tensor | None:
    """The rows that are not zero, where they are few; None where all are stored."""
    rows = delta.any(dim=1).nonzero().flatten()
    return rows.int() if len(rows) < FEW_ROWS * len(delta) else None


def quantised(delta: Float[Tensor, "out in"], rows: Tensor | None, svd: SVD | None, bits: int) -> dict[str, Tensor]:
    """The parts of one matrix; see `specbasis.checkpoint.delta`.

    Args:
        delta: of the rows that are stored.
        rows: which they are; None for all.
        svd: the directions that are stored; None for none.
        bits: an entry of what is left, after the rounded directions are taken off.
    """
    parts: dict[str, Tensor] = {} if rows is None else {"rows": rows}
    left = delta.float()
    if svd is not None:
        root = svd.S.sqrt()
        for side, vectors in (("left", svd.U * root), ("right", svd.Vh.mT * root)):
            scale = (vectors.abs().amax(0) / 127).float()
            parts[f"{side}_scale"] = scale
            parts[side] = (vectors / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
        directions = {name: part for name, part in parts.items() if name != "rows"}
        left = left - expanded(directions, 0, (len(delta), delta.shape[1]))
    if bits:
        half = 2 ** (bits - 1)
        size = left.square().mean(1).sqrt() * STEP[bits]
        units = left / torch.where(size > 0, size, 1.0)[:, None]
        levels = (units.floor() + 0.5).clamp(0.5 - half, half - 0.5)
        # The best size for the levels that were chosen, by least squares.
        parts["scale"] = (left * levels).sum(1) / levels.square().sum(1)
        parts["codes"] = packed((levels + half - 0.5).to(torch.uint8), bits)
    return parts
