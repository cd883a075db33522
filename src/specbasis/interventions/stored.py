"""An edited checkpoint on disk, made tensor by tensor."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from specbasis.architecture.key import Admits, MatrixRef
from specbasis.checkpoint import open_checkpoint, open_tuned, refuse_other_weights
from specbasis.checkpoint.writer import SHARD_BYTES, write_model
from specbasis.core.blocks import norm
from specbasis.core.edits import Edit
from specbasis.core.errors import InputError
from specbasis.interventions.live import Decompose, matrix_edits
from specbasis.jobs.progress import Progress

RECORD = "specbasis_edit.json"
"""Beside the weights: what was done to which matrix."""


def write_edited(
    base: str | Path | Mapping[str, Tensor],
    tuned: str | Path | Mapping[str, Tensor],
    edit: Edit,
    out: str | Path,
    *,
    other: str | Path | Mapping[str, Tensor] | None = None,
    admits: Admits | None = None,
    factors: Decompose | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Write a finetuned model with one edit in many of its matrices, as a folder that transformers loads.

    One tensor of the model is in memory at a time, with the factors of one matrix. Tensors that are not edited are
    copied bit for bit, and so are the files beside the weights; what was done is recorded in `RECORD`. The folder
    appears when it is complete.

    Args:
        base: the pretrained checkpoint; it says what the matrices are, and vectors come from it.
        tuned: the finetuned one, or a PEFT adapter of base.
        edit: what to do.
        out: the new folder.
        other: where vectors or values come from, if not from base.
        admits: which matrices; all of the blocks' when None.
        factors: how to decompose; see `matrix_edits`.
        shard_bytes: size at which a new shard begins.
        progress: called after each tensor with a `Progress`.

    Raises:
        InputError: a source cannot be read, no matrix is left, ``out`` exists, or an edited matrix is not finite.
    """
    pretrained = open_checkpoint(base)
    checkpoint = open_tuned(tuned, pretrained)
    source = pretrained if other is None else open_tuned(other, pretrained)
    for adapted in (checkpoint, source):
        refuse_other_weights(adapted)
    edits = matrix_edits(edit, checkpoint, source, admits=admits, factors=factors)
    by_parameter: dict[str, list[MatrixRef]] = defaultdict(list)
    for ref in edits:
        by_parameter[ref.parameter].append(ref)
    lines: list[dict[str, object]] = []
    record = {"edit": asdict(edit), "base": pretrained.source, "tuned": checkpoint.source, "other": source.source}
    done = 0

    def change(name: str, tensor: Tensor) -> Tensor:
        nonlocal done
        if name in by_parameter:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            lines.extend(_change(tensor, ref, edits[ref]) for ref in by_parameter[name])
        done += 1
        if progress is not None:
            progress(Progress(done, len(checkpoint), name))
        return tensor

    def report() -> str:
        return json.dumps({**record, "matrices": lines}, indent=1, ensure_ascii=False) + "\n"

    return write_model(checkpoint, Path(out), change, shard_bytes=shard_bytes, extra={RECORD: report})


def _change(tensor: Tensor, ref: MatrixRef, edit: Callable[[Tensor], Tensor]) -> dict[str, object]:
    """Edit one matrix of a parameter in place; what was done to it."""
    old = ref.read({ref.parameter: tensor})
    new = edit(old)
    if not bool(torch.isfinite(new).all()):
        raise InputError(f"{ref.key.name}: the edited matrix holds NaN or Inf")
    before = old.to(torch.float64)
    whole = float(norm(before))
    size = float(norm(new - before)) / whole if whole else 0.0
    ref.write(tensor, new)
    return {"name": ref.key.name, "block": ref.key.block, "role": ref.key.role, "size": size}
