"""Several finetunes of one base as one model, or a map of where they interfere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specbasis.checkpoint import Entry, open_checkpoint
from specbasis.checkpoint.atomic import whole, writing
from specbasis.checkpoint.digest import digest
from specbasis.checkpoint.writer import want_new, write_model
from specbasis.core.columns import generator_of
from specbasis.core.dtypes import name_of, widened
from specbasis.core.errors import InputError, want
from specbasis.core.options import takes
from specbasis.core.text import shareable
from specbasis.interventions.evaluators.kit import Judge
from specbasis.jobs.environment import environment
from specbasis.jobs.folder import locked, plain
from specbasis.jobs.progress import Progress, Report, silent
from specbasis.treatment.finetunes import MERGED, Finetunes, Source
from specbasis.treatment.judged import judge_merged
from specbasis.treatment.methods import Delta, merged
from specbasis.treatment.options import MergeOptions
from specbasis.treatment.treated import Treated, weights_of, written_record


@dataclass(frozen=True, eq=False, repr=False)
class Merging(Treated):
    """Finetunes, merged or mapped.

    Attributes:
        folder: the merged model's; None of a map.
        record: ``parameters``, one for each that any finetune changed, as `Finetunes.line` has them, of a merge the
            finetune "merged" among the others; ``left_out``; ``scores``, as `judged.judge_merged` has them.
    """

    RECORD: ClassVar[str] = "specbasis_merge.json"


@takes(MergeOptions)
def merge(
    base: Source,
    tuned: Sequence[Source] | Mapping[str, Source],
    out: str | Path | None = None,
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

    Without ``out`` nothing is written: a map says of every matrix and every pair of finetunes how their updates
    stand to each other, direction by direction, beside what random updates of equal singular values leave.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetunes, or adapters of base; with names, or as NAME=SOURCE, where the default does not do.
        out: the new folder; None for the map.
        options: all options as one value; or each as a keyword.
        judge: name of a finetune → the evaluator of its task, on which that finetune, the others, the mean of all
            and the merged model are judged, each with that finetune's own head.
        progress: called as work goes on.
        **keywords: the fields of `MergeOptions`, below.

    Raises:
        InputError: a source cannot be read, holds NaN or Inf, or is of another base; no finetune changes anything;
            a name is not known; or ``out`` holds anything.
    """
    chosen, tell, judges = MergeOptions.of(options, keywords), progress or silent, judge or {}
    if out is None:
        if judges:
            raise InputError(
                "got tasks to judge and nothing to write; want a new folder, or no tasks for the map alone"
            )
        return Merging(None, _mapped(_opened(base, tuned, chosen.head, tell), chosen, tell))
    out = Path(out)
    want_new(out)
    with locked(out, beside=True):
        want_new(out)
        finetunes = _opened(base, tuned, chosen.head, tell, *judges)
        with writing(out), whole(out) as temporary:
            return Merging(out, _written(finetunes, chosen, judges, tell, temporary))


def _opened(
    base: Source, tuned: Sequence[Source] | Mapping[str, Source], head: str, tell: Report, *judged: str
) -> Finetunes:
    """The finetunes, among which those that options name have to be."""
    finetunes = Finetunes.open(base, tuned, tell)
    want("finetune", finetunes.tuned, *judged, *filter(None, [head]))
    return finetunes


def _mapped(finetunes: Finetunes, options: MergeOptions, tell: Report) -> dict[str, Any]:
    """The record of a map: how the updates stand to each other."""
    lines: list[dict[str, Any]] = []
    for name in finetunes.changed:
        tell(Progress(len(lines), len(finetunes.changed), name))
        lines.append(finetunes.line(name, finetunes.deltas(name), options.ranks))
    record: dict[str, Any] = plain({**_about(finetunes, options), "parameters": lines, **environment()})
    return record


def _written(
    finetunes: Finetunes, options: MergeOptions, judges: Mapping[str, Judge], tell: Report, folder: Path
) -> dict[str, Any]:
    """The record of a merge, when the model and it are in a folder."""
    lines: list[dict[str, Any]] = []
    write_model(finetunes.model(lambda name: _entry(finetunes, name, options, tell, lines), options.head), folder)
    record = {**_about(finetunes, options), "parameters": lines}
    if judges:
        written = open_checkpoint(folder).entries
        record["scores"] = judge_merged(
            finetunes,
            lambda name: _entry(finetunes, name, MergeOptions(), tell),
            lambda name: written[finetunes.name(name, options.head)],
            judges,
        )
    return written_record(folder / Merging.RECORD, record | environment(("transformers",) if judges else ()))


def _about(finetunes: Finetunes, options: MergeOptions) -> dict[str, Any]:
    return {
        "base": shareable(finetunes.base.source),
        "tuned": {label: shareable(checkpoint.source) for label, checkpoint in finetunes.tuned.items()},
        "weights": weights_of({"base": finetunes.base, **finetunes.tuned}),
        "options": options.config(),
        "left_out": list(finetunes.left_out),
    }


def _entry(
    finetunes: Finetunes,
    name: str,
    options: MergeOptions,
    tell: Report,
    lines: list[dict[str, Any]] | None = None,
) -> Entry:
    """A shared parameter merged when it is read, and a line for it; the base's own where no finetune changed it."""
    own = finetunes.base.entries[name]
    if name not in finetunes.changed:
        return own
    changes = list(finetunes.shared[name].values())
    stored = (own, *(change.tuned.entries[change.name] for change in changes))
    formats = (widened(torch.empty(0, dtype=getattr(torch, entry.dtype))).dtype for entry in stored)
    dtype = reduce(torch.promote_types, formats)
    is_matrix, is_flipped = changes[0].is_matrix, changes[0].is_matrix and changes[0].is_transposed

    def load() -> Tensor:
        tell(Progress(len(lines or ()), len(finetunes.changed), name))
        W, deltas = finetunes.base[name], finetunes.deltas(name)
        seed = generator_of(f"{options.seed} {digest(W)}")  # tied weights stay equal
        delta = merged(list(deltas.values()), options, seed, is_matrix=is_matrix)
        if lines is not None:
            lines.append(finetunes.line(name, {**deltas, MERGED: Delta(delta)}))
        return (W.double() + (delta.mT if is_flipped else delta).reshape(W.shape)).to(dtype)

    return Entry(own.shape, name_of(dtype), load)
