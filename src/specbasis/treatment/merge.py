"""Several finetunes of one base as one model, or a map of where they interfere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specbasis.checkpoint import Entry, open_checkpoint
from specbasis.checkpoint.atomic import whole, writing
from specbasis.checkpoint.digest import digest, sealed
from specbasis.checkpoint.writer import want_new, write_model
from specbasis.core.columns import generator_of
from specbasis.core.dtypes import name_of, widened
from specbasis.core.errors import InputError, unknown
from specbasis.core.options import takes
from specbasis.core.text import shareable
from specbasis.interventions.evaluators.kit import Judge
from specbasis.jobs.folder import environment, plain
from specbasis.jobs.progress import Progress, Report, silent
from specbasis.treatment.extraction import read_record
from specbasis.treatment.finetunes import MERGED, Finetunes, Source
from specbasis.treatment.judged import judge_merged
from specbasis.treatment.methods import Delta, merged
from specbasis.treatment.options import MergeOptions

if TYPE_CHECKING:
    from specbasis.figures.table import Table

RECORD = "specbasis_merge.json"
"""Beside the merged model: what it is made of, parameter by parameter."""


@dataclass(frozen=True, eq=False)
class Merging:
    """Finetunes, merged or mapped.

    Attributes:
        record: ``parameters``, one for each that any finetune changed, as `Finetunes.line` has them, of a merge the
            finetune "merged" among the others; ``left_out``; ``scores``, as `judged.judge_merged` has them.
        folder: the merged model's; None of a map.
    """

    record: dict[str, Any]
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Merging:
        """Read again what an earlier `merge` wrote.

        Raises:
            InputError: there is no such folder, or its record is not what was written.
        """
        return cls(read_record(Path(folder, RECORD)), Path(folder))

    @property
    def table(self) -> Table:
        """How the updates stand to each other, by role."""
        # A value knows no view: these are the only late imports of a room further down.
        from specbasis.figures.treatment import merging_table

        return merging_table(self)

    @property
    def scores(self) -> Table | None:
        """Every task's metric of single finetunes, their mean and the merged model; None where none was judged."""
        from specbasis.figures.treatment import scores_table

        return scores_table(self) if "scores" in self.record else None

    def report(self, path: str | Path | None = None) -> Path:
        """Draw cosines and conflicts by block; returns the picture's path, `merge.png` in the folder by default."""
        from specbasis.figures.treatment import write_merging_figure

        return write_merging_figure(self, path)[0]

    def _repr_html_(self) -> str:
        return "".join(table.html(inline=True) for table in (self.scores, self.table) if table)


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
    if out is not None:
        want_new(Path(out))
    elif judges:
        raise InputError(
            "got tasks to judge and nothing to write; want a new folder, or no tasks for the map alone"
        )
    finetunes = Finetunes.open(base, tuned, tell)
    for label in (*judges, *filter(None, [chosen.head])):
        if label not in finetunes.tuned:
            raise unknown("finetune", label, finetunes.tuned)
    lines: list[dict[str, Any]] = []
    record = {
        "base": shareable(finetunes.base.source),
        "tuned": {label: shareable(checkpoint.source) for label, checkpoint in finetunes.tuned.items()},
        "options": chosen.config(),
        "left_out": list(finetunes.left_out),
        "parameters": lines,
        **environment(("transformers",) if judges else ()),
    }
    if out is None:
        for name in finetunes.changed:
            tell(Progress(len(lines), len(finetunes.changed), name))
            lines.append(finetunes.line(name, finetunes.deltas(name), chosen.ranks))
        return Merging(plain(record))
    with writing(Path(out)), whole(Path(out)) as temporary:
        write_model(
            finetunes.model(lambda name: _entry(finetunes, name, chosen, tell, lines), chosen.head), temporary
        )
        if judges:
            written = open_checkpoint(temporary).entries
            record["scores"] = judge_merged(
                finetunes,
                lambda name: _entry(finetunes, name, MergeOptions(), tell),
                lambda name: written[finetunes.name(name, chosen.head)],
                judges,
            )
        text = json.dumps(sealed(plain(record)), indent=1, ensure_ascii=False) + "\n"
        (temporary / RECORD).write_text(text, encoding="utf-8")
    return Merging.load(out)


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
