"""A finetune extracted as a difference of few bits, which `specbasis.checkpoint.open_tuned` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

from torch import Tensor

from specbasis.checkpoint import Checkpoint, weights_sha256
from specbasis.checkpoint.delta import FORMAT, RECORD, WEIGHTS, expanded
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.writer import stored_bytes, write_safetensors
from specbasis.core.errors import InputError
from specbasis.core.svd import decompose, half_svd
from specbasis.jobs.progress import Progress, Report
from specbasis.treatment.lora import base_address
from specbasis.treatment.options import ExtractOptions
from specbasis.treatment.quantised import Curve, changed_rows, quantised, shared_out
from specbasis.treatment.updates import Update


class Difference:
    """What goes into the folder: directions and bits of each matrix, and all the rest whole."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        changes: list[Update],
        options: ExtractOptions,
        progress: Report,
    ) -> None:
        self.base, self.tuned, self.progress = base, tuned, progress
        self.names = {c.name: c.counterpart for c in changes if c.counterpart}
        changed = [c for c in changes if c.reason or c.is_changed]
        usable = [c for c in changed if not c.reason and not isnan(c.squares[0])]
        self.matrices = [c for c in usable if c.is_matrix]
        others = [c for c in usable if not c.is_matrix]
        self.carried = others if options.carry else []
        self.left_out = [(c, c.reason or "holds NaN or Inf") for c in changed if c not in usable]
        self.left_out += [] if options.carry else [(c, "not asked for (carry)") for c in others]
        self.lines: list[dict[str, Any]] = []
        self._share_out(options)

    def _share_out(self, options: ExtractOptions) -> None:
        curves, self.rows = [], {}
        for done, change in enumerate(self.matrices):
            self.progress(Progress(done, len(self.matrices), f"singular values of {change.name}"))
            delta = change.delta()
            self.rows[change.name] = rows = changed_rows(delta)
            stored = delta if rows is None else delta[rows.long()]
            spectrum = half_svd(stored, 0, name=change.name).spectrum
            curves.append(Curve(spectrum.square().cpu().numpy(), (len(stored), stored.shape[1])))
        carried = sum(stored_bytes(c.name, self.tuned.entries[c.name]) for c in self.carried)
        places = sum(4 * len(rows) for rows in self.rows.values() if rows is not None)
        budget = None if options.budget is None else options.budget - carried - places
        if budget is not None and budget < 0:
            raise InputError(
                f"got size = {options.size}; what is carried whole takes {carried + places:,} bytes: want more, or "
                "leave out what is no matrix (--no-carry)"
            )
        self.plan = dict(
            zip((c.name for c in self.matrices), shared_out(curves, budget, options.energy or 1.0), strict=True)
        )

    def write(self, folder: Path, base: object) -> None:
        """The parts of every matrix, one in memory at a time, and the record that says how to read them."""
        entries: dict[str, Entry] = {}
        for done, change in enumerate(self.matrices):
            entries |= self._entries(change, Progress(done, len(self.matrices), change.name))
        entries |= {c.name: self.tuned.entries[c.name] for c in self.carried}
        record = {
            "delta": FORMAT,
            "base_model_name_or_path": base_address(base).get("pretrained_model_name_or_path"),
            "base_sha256": weights_sha256(self.base),
            "base_names": self.names,
            "matrices": {
                c.name: {
                    "shape": list(c.matrix_shape),
                    "bits": self.plan[c.name][1],
                    "transposed": c.is_transposed,
                }
                for c in self.matrices
                if any(self.plan[c.name])
            },
            "whole": [c.name for c in self.carried],
            "config": dict(self.tuned.config),
        }
        with (folder / WEIGHTS).open("wb") as stream:
            tensors = ((name, entry.load()) for name, entry in entries.items())
            write_safetensors(stream, entries, tensors, metadata={"base_sha256": str(record["base_sha256"])})
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self.stored = sum(stored_bytes(name, entry) for name, entry in entries.items())

    def _entries(self, change: Update, at: Progress) -> dict[str, Entry]:
        """The parts of one matrix, by their shapes; they are computed when the first of them is written."""
        (rank, bits), rows = self.plan[change.name], self.rows[change.name]
        out, width = change.matrix_shape
        out = out if rows is None else len(rows)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        if not rank and not bits:
            self._note(change, {}, 0)
            return {}
        if rows is not None:
            shapes["rows"] = ("int32", (out,))
        if rank:
            for side, length in (("left", out), ("right", width)):
                shapes[f"{side}_scale"] = ("float32", (rank,))
                shapes[side] = ("int8", (length, rank))
        if bits:
            shapes["scale"] = ("float32", (out,))
            shapes["codes"] = ("uint8", (-(-out * width * bits // 8),))
        parts = _Parts(self, change, at)
        return {
            f"{change.name}|{part}": Entry(shape, dtype, partial(parts.take, part, last=part == list(shapes)[-1]))
            for part, (dtype, shape) in shapes.items()
        }

    def made(self, change: Update) -> dict[str, Tensor]:
        """The parts of one matrix."""
        (rank, bits), rows = self.plan[change.name], self.rows[change.name]
        delta = change.delta()
        chosen = delta if rows is None else delta[rows.long()]
        svd = decompose(chosen, min(rank, *chosen.shape), name=change.name) if rank else None
        parts = quantised(chosen.float(), rows, svd, bits)
        self._note(change, parts, float((expanded(parts, bits, change.matrix_shape) - delta).square().sum()))
        return parts

    def _note(self, change: Update, parts: Mapping[str, Tensor], lost: float) -> None:
        """What of one matrix is in the file, measured on what was rounded."""
        (rank, bits), (out, width) = self.plan[change.name], change.matrix_shape
        total = change.squares[0]
        self.lines.append(
            {
                "name": change.name,
                "role": change.role,
                "block": change.block,
                "shape": [out, width],
                "rank": rank,
                "bits": bits,
                "bytes": sum(part.numel() * part.element_size() for part in parts.values()),
                "squares": total,
                "share": max(0.0, 1 - lost / total) if parts else 0.0,
            }
        )


class _Parts:
    """The parts of one matrix while they are written."""

    def __init__(self, difference: Difference, change: Update, at: Progress) -> None:
        self.difference, self.change, self.at = difference, change, at
        self.held: dict[str, Tensor] = {}

    def take(self, part: str, *, last: bool) -> Tensor:
        """A part; the first computes all, the last lets go of them."""
        if not self.held:
            self.difference.progress(self.at)
            self.held = self.difference.made(self.change)
        tensor = self.held[part]
        if last:
            self.held = {}
        return tensor
