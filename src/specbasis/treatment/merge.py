"""Several finetunes of one base as one model, and a map of where they interfere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint import Entry, open_checkpoint
from specbasis.checkpoint.atomic import whole, writing
from specbasis.checkpoint.digest import digest, sealed
from specbasis.checkpoint.writer import want_new, write_model
from specbasis.core.columns import generator_of
from specbasis.core.dtypes import name_of
from specbasis.core.errors import unknown
from specbasis.core.options import takes
from specbasis.core.text import shareable
from specbasis.interventions.evaluators.kit import Judge
from specbasis.jobs.folder import environment, plain
from specbasis.jobs.progress import Progress, Report, silent
from specbasis.treatment.finetunes import Finetunes, Source
from specbasis.treatment.judged import judge_merged
from specbasis.treatment.merging import RECORD, Merging
from specbasis.treatment.methods import Delta, merged
from specbasis.treatment.options import MergeOptions


@takes(MergeOptions)
def merge(
    base: Source,
    tuned: Sequence[Source] | Mapping[str, Source],
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    judge: Mapping[str, Judge] | None = None,
    progress: Report | None = None,
    **keywords: Any,
) -> Merging:
    """Write one model of several finetunes of a base: W = base + method(Δ_1 … Δ_n), parameter by parameter.

    What all of them have as the base has it is merged. The rest, such as the heads of their tasks, is listed and
    stays as the base has it, or as the finetune ``head`` has it. Numbers are stored as the widest of the formats in
    which base and finetunes store them. One matrix and its updates are in memory at a time; base and finetunes are
    read twice.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetunes, or adapters of base; with names, or as NAME=SOURCE, where the default does not do.
        out: the new folder.
        options: all options as one value; or each as a keyword.
        judge: name of a finetune → the evaluator of its task, on which that finetune, the others, the mean of all
            and the merged model are judged, each with that finetune's own head.
        progress: called as work goes on.
        **keywords: the fields of `MergeOptions`, below.

    Raises:
        InputError: a source cannot be read, holds NaN or Inf, or is of another base; a name is not known; or
            ``out`` holds anything.
    """
    chosen, out, judges = MergeOptions.of(options, keywords), Path(out), judge or {}
    want_new(out)
    finetunes = Finetunes.open(base, tuned, progress or silent)
    for label in (*judges, *filter(None, [chosen.head])):
        if label not in finetunes.tuned:
            raise unknown("finetune", label, finetunes.tuned)
    lines: list[dict[str, Any]] = []
    tell = progress or silent
    with writing(out), whole(out) as temporary:
        write_model(
            finetunes.model(lambda name: _entry(finetunes, name, chosen, tell, lines), chosen.head), temporary
        )
        record = _record(finetunes, lines, chosen)
        if judges:
            written = open_checkpoint(temporary)
            ways: dict[str, Callable[[str], Entry]] = {
                label: partial(_single, finetunes, label) for label in finetunes.tuned
            }
            ways["mean"] = lambda name: _entry(finetunes, name, MergeOptions(), tell)
            ways["merged"] = lambda name: written.entries[finetunes.name(name, chosen.head)]
            record["scores"] = judge_merged(finetunes, ways, judges)
        text = json.dumps(sealed(plain(record)), indent=1, ensure_ascii=False) + "\n"
        (temporary / RECORD).write_text(text, encoding="utf-8")
    return Merging.load(out)


def interference(
    base: Source,
    tuned: Sequence[Source] | Mapping[str, Source],
    *,
    ranks: int = 10,
    progress: Report | None = None,
) -> Merging:
    """How the updates of several finetunes of a base stand to each other, before anything is merged.

    For every matrix and every pair of finetunes: the norms, the cosine of the updates, the share of entries that
    they change in opposite directions, the overlap of their leading subspaces, and direction by direction what one
    does where the other acts, each beside what random updates of equal singular values leave; see `Finetunes.line`.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetunes, as in `merge`.
        ranks: leading directions of each update.
        progress: called as work goes on.

    Raises:
        InputError: as `merge`.
    """
    finetunes = Finetunes.open(base, tuned, progress or silent)
    lines, names = [], finetunes.changed
    for done, name in enumerate(names):
        (progress or silent)(Progress(done, len(names), name))
        lines.append(finetunes.line(name, finetunes.deltas(name), ranks))
    return Merging(plain(_record(finetunes, lines)))


def _entry(
    finetunes: Finetunes,
    name: str,
    options: MergeOptions,
    tell: Report,
    lines: list[dict[str, Any]] | None = None,
) -> Entry:
    """A shared parameter merged when it is read; the base's own where no finetune changed it."""
    own = finetunes.base.entries[name]
    changes = list(finetunes.shared[name].values())
    if not any(change.is_changed for change in changes):
        return own
    stored = (own, *(change.tuned.entries[change.name] for change in changes))
    dtype = reduce(torch.promote_types, (getattr(torch, entry.dtype) for entry in stored))
    change = changes[0]

    def load() -> Tensor:
        tell(Progress(len(lines or ()), len(finetunes.changed), name))
        deltas = finetunes.deltas(name)
        W = finetunes.base[name]
        seed = generator_of(f"{options.seed} {digest(W)}")  # tied weights stay equal
        delta = merged(list(deltas.values()), options, seed, is_matrix=change.is_matrix)
        if lines is not None:
            lines.append({**finetunes.line(name, deltas), **_outcome(delta, deltas)})
        delta = (delta.mT if change.is_matrix and change.is_transposed else delta).reshape(own.shape)
        return (W.double() + delta).to(dtype)

    return Entry(own.shape, name_of(dtype), load)


def _single(finetunes: Finetunes, label: str, name: str) -> Entry:
    """A shared parameter as one finetune has it."""
    return finetunes.tuned[label].entries[finetunes.name(name, label)]


def _outcome(delta: Tensor, deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """The norm of a merged update, and its cosine with that of each finetune."""
    norm = float(delta.norm())
    cosines = {}
    for label, own in deltas.items():
        scale = norm * float(own.matrix.norm())
        cosines[label] = float((delta * own.matrix).sum()) / scale if scale else None
    return {"norm": norm, "cosines": cosines}


def _record(
    finetunes: Finetunes, lines: list[dict[str, Any]], options: MergeOptions | None = None
) -> dict[str, Any]:
    """What was merged, of what, and what was not; see `Merging`."""
    return {
        "base": shareable(finetunes.base.source),
        "tuned": {label: shareable(checkpoint.source) for label, checkpoint in finetunes.tuned.items()},
        "options": options and options.config(),
        "parameters": lines,
        "left_out": list(finetunes.left_out),
        **environment(),
    }
