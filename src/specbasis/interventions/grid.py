"""Grids of interventions: every edit is applied to a finetuned model, judged, and taken back; one row each."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specbasis.architecture.key import Admits, MatrixRef
from specbasis.architecture.selection import Selection
from specbasis.checkpoint import Checkpoint, open_checkpoint, weights_sha256
from specbasis.core.edits import KINDS, Edit
from specbasis.core.errors import InputError
from specbasis.core.grammar import numbers, parse_bytes
from specbasis.core.options import takes
from specbasis.core.svd import ALGORITHM, SVD
from specbasis.interventions.evaluators import describe
from specbasis.interventions.live import bound, edited, sites, state
from specbasis.interventions.options import GridOptions
from specbasis.interventions.samples import Evaluator, Sample, as_samples, summarise
from specbasis.jobs.cache import Cache, mapped
from specbasis.jobs.cost import cache_folder
from specbasis.jobs.experiments import Row, read_experiments, run_experiments
from specbasis.jobs.progress import Progress

BASELINE = "none"
"""The kind of the cells in which nothing is edited."""

CONTROLS = ("random", "zero")
"""Kinds that are in every grid."""

BASE = "base"
"""The source that stands for the pretrained model."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A finetuned model and how it is judged.

    Attributes:
        source: its checkpoint, as everywhere; its name is also what ``load`` gets.
        evaluate: from a model to its metrics; see `specbasis.interventions.samples.Evaluator`.
        load: from the source to a live model; by default the evaluator's own ``load``.
        metric: the metric that figures show; by default the evaluator's own, or its first.
    """

    source: str
    evaluate: Evaluator
    load: Callable[[str], nn.Module] | None = None
    metric: str = ""

    def __post_init__(self) -> None:
        if self.load is None and not hasattr(self.evaluate, "load"):
            raise InputError(f"{self.source}: the evaluator does not load models; give a function that does (load)")

    def model(self) -> nn.Module:
        """The live model, ready to be judged."""
        load: Callable[[str], nn.Module] = self.load or self.evaluate.load  # type: ignore[attr-defined]
        return load(self.source).eval()


@takes(GridOptions)
def intervene(
    base: str,
    subjects: Mapping[str, Subject],
    out: str | Path,
    options: GridOptions | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    **keywords: Any,
) -> list[Row]:
    """Judge finetuned models while parts of their singular vectors are replaced, one edit after the other.

    For every subject: the model as it is, and each kind of edit at each set of ranks in each group of matrices,
    with every source and seed. Plain random vectors and zero are always among the kinds: without them a small
    change means nothing. Every row has the metrics, their change against the unedited model with intervals over
    examples and a paired test, and ``size``, ‖ΔW‖_F / ‖W‖_F over the edited matrices.

    A cell whose evaluator raises, or returns NaN, is marked with its error, and the grid goes on; the same call
    tries it again and skips what is done. One live model and the factors of one matrix are in memory at a time:
    factors come from the cache, in which every matrix is decomposed once.

    Args:
        base: the pretrained checkpoint.
        subjects: label → finetuned model and its evaluator. Of one base, they are also sources for each other.
        out: folder of the rows; the same grid continues it.
        options: all options as one value; or each as a keyword.
        progress: called as work goes on.
        **keywords: the fields of `GridOptions`, below.

    Returns:
        The rows in the order of the grid; `specbasis.jobs.experiments.read_experiments` reads them again.

    Raises:
        InputError: a source cannot be read, nothing is to be edited, or an argument is none of the above.

    Source: Yu et al. 2026, §4.1, App. G, App. I; intervals, tests, complement and noise are this project's.
    """
    if not subjects:
        raise InputError("got no subject; want at least one finetuned model with its evaluator")
    chosen = GridOptions.of(options, keywords)
    if BASE in subjects:
        raise InputError(f"{BASE!r} is the name of the pretrained model; give the subject another label")
    grid = Grid(
        base,
        dict(subjects),
        str(chosen.cache or cache_folder() / "factors"),
        parse_bytes(chosen.cache_size),
        chosen.resamples,
    )
    cells = grid_cells(list(subjects), chosen)
    places = {(cell["roles"], cell["blocks"]) for cell in cells if cell["kind"] != BASELINE}
    grid.decompose_all([admitted(*place) for place in sorted(places)], progress or (lambda _: None))
    try:
        return run_experiments(
            cells, partial(run_cell, grid), out, config=grid.config(), workers=chosen.workers, progress=progress
        )
    finally:
        _STAGES.clear()


def grid_cells(labels: Sequence[str], options: GridOptions) -> list[dict[str, Any]]:
    """The cells of a grid, subject by subject, so that each model is loaded once.

    Raises:
        InputError: an unknown kind or source, or ranks that are none.
    """
    known = (BASE, *labels)
    wrong = [source for source in options.sources or () if source not in known]
    if wrong:
        raise InputError(f"no source {wrong[0]!r}; there is: {', '.join(known)}")
    cells: list[dict[str, Any]] = []
    for label in labels:
        cells.append({"tuned": label, "kind": BASELINE})
        others = [source for source in options.sources or known if source != label]
        for group, part in ((group, part) for group in options.roles for part in options.blocks):
            admitted(group, part)
            for which in options.ranks:
                for kind in dict.fromkeys((*options.kinds, *CONTROLS)):
                    # Says what is wrong before any work.
                    edit = Edit(kind, which, sides=options.sides, groups=options.groups)
                    if str(which).startswith("-") and kind != "zero":
                        continue
                    for source in (others if kind != "noise" else [BASE]) if edit.needs_other else [""]:
                        for seed in options.draws if edit.is_random else (0,):
                            cells.append(
                                {"tuned": label, "kind": kind, "source": source, "roles": group, "blocks": part}
                                | {"ranks": which, "sides": options.sides, "groups": options.groups, "seed": seed}
                            )
    return cells


def admitted(roles: str, blocks: str) -> Admits | None:
    """The filter of a group of roles and a group of blocks, as cells write them."""
    return Selection(tuple(filter(None, roles.split("+"))), numbers(blocks)).filter


@dataclass(frozen=True, eq=False)
class Grid:
    """What all cells of a grid share; goes to other processes as names and functions, never as weights.

    Attributes:
        base: source of the pretrained checkpoint.
        subjects: label → subject.
        cache: folder of decompositions.
        cache_bytes: what they may take.
        resamples: of the intervals and tests.
        token: tells grids apart in a process that works for several.
    """

    base: str
    subjects: Mapping[str, Subject]
    cache: str
    cache_bytes: int
    resamples: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def kept(self) -> Cache:
        """The decompositions on disk."""
        return Cache(Path(self.cache), self.cache_bytes)

    def factors(self, W: Tensor, name: str) -> SVD:
        """The full decomposition of a matrix, from the cache."""
        return self.kept.decompose(W, name=name)

    def source(self, label: str) -> str:
        """Where the model of a label is, the pretrained one among them."""
        return self.base if label == BASE else self.subjects[label].source

    def decompose_all(self, groups: Sequence[Admits | None], progress: Callable[[Progress], None]) -> None:
        """Decompose every matrix that some cell needs, once, before the first cell."""
        for label in (BASE, *self.subjects):
            checkpoint = open_checkpoint(self.source(label))
            refs = {ref: None for admits in groups for ref in sites(checkpoint, None, admits)}
            for done, ref in enumerate(refs):
                progress(Progress(done, len(refs), f"decomposing {label} {ref.key.name}"))
                self.factors(ref.read(checkpoint), f"{ref.key.name} in {checkpoint.source}")

    def config(self) -> dict[str, Any]:
        """What makes two grids the same: contents of the models, evaluators, and every number that changes rows."""
        return {
            "experiment": "intervene",
            "algorithm": ALGORITHM,
            "base": weights_sha256(open_checkpoint(self.base)),
            "subjects": {
                label: {
                    "weights": weights_sha256(open_checkpoint(subject.source)),
                    "evaluate": describe(subject.evaluate),
                    "metric": subject.metric or getattr(subject.evaluate, "metric", ""),
                }
                for label, subject in self.subjects.items()
            },
            "resamples": self.resamples,
        }


class _Stage:
    """A subject's live model in this process, with what its cells share."""

    def __init__(self, grid: Grid, label: str) -> None:
        self.grid, self.subject = grid, grid.subjects[label]
        self.model = self.subject.model()
        self.stored = state(self.model)
        self.originals = self._originals()
        self._sites: dict[tuple[str, str, str], dict[MatrixRef, MatrixRef | None]] = {}
        self._opened: dict[str, Checkpoint] = {}
        self._entries: dict[str, Path] = {}
        self.before = self.judge()

    def judge(self) -> dict[str, Sample | float]:
        """The model's metrics as it is now."""
        self.model.eval()
        return as_samples(self.subject.evaluate(self.model))

    def factors(self, W: Tensor, name: str) -> SVD:
        """A matrix's decomposition: looked up by content and checked once, afterwards mapped from its file."""
        found = mapped(self._entries[name]) if name in self._entries else None
        if found is None:
            found = self.grid.factors(W, name)
            self._entries[name] = self.grid.kept.path(W)
        return found

    def opened(self, label: str) -> Checkpoint:
        """The checkpoint of a label, opened once."""
        if label not in self._opened:
            self._opened[label] = open_checkpoint(self.grid.source(label))
        return self._opened[label]

    def places(self, source: str, roles: str, blocks: str) -> dict[MatrixRef, MatrixRef | None]:
        """The matrices of a group, as base has them, each with that of the source."""
        key = (source, roles, blocks)
        if key not in self._sites:
            admits = admitted(roles, blocks)
            ours = sites(self.stored, self.opened(BASE), admits)
            theirs = ours if source == BASE else sites(self.stored, self.opened(source), admits)
            by_place = {_place(ref): found for ref, found in theirs.items()}
            lacking = [ref.key.name for ref in ours if _place(ref) not in by_place]
            if lacking:
                raise InputError(f"{source}: has no {lacking[0]} of equal shape, which the pretrained model has")
            self._sites[key] = {ref: by_place[_place(ref)] for ref in ours}
        return self._sites[key]

    def _originals(self) -> Checkpoint | None:
        """The checkpoint, where it holds the live model's parameters bit for bit: then no copy is needed."""
        stored = open_checkpoint(self.subject.source)
        same = all(
            name in stored and stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor)
            for name, tensor in self.stored.items()
            if tensor.is_floating_point() and tensor.ndim > 1
        )
        return stored if same else None


_STAGES: dict[tuple[str, str], _Stage | Exception] = {}


def _stage(grid: Grid, label: str) -> _Stage:
    """The stage of a subject in this process; the one before it goes, so that one model is in memory."""
    key = (grid.token, label)
    if key not in _STAGES:
        _STAGES.clear()
        try:
            _STAGES[key] = _Stage(grid, label)
        except Exception as error:
            _STAGES[key] = error
    found = _STAGES[key]
    if isinstance(found, Exception):
        raise InputError(f"{label} unedited: {type(found).__name__}: {found}") from found
    return found


def run_cell(grid: Grid, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a cell's edit, judge, take it back: its values."""
    stage = _stage(grid, cell["tuned"])
    if cell["kind"] == BASELINE:
        return summarise(stage.before, stage.before, resamples=grid.resamples)
    edit = Edit(cell["kind"], cell["ranks"], cell["sides"], cell["seed"], groups=cell["groups"])
    source = cell["source"] or BASE
    other = stage.opened(source) if edit.needs_other else None
    size = _Size()
    started = time.perf_counter()
    edits: dict[str | MatrixRef, Callable[[Tensor], Tensor]] = {
        ref: size.of(bound(edit, ref, theirs, other, stage.factors))
        for ref, theirs in stage.places(source, cell["roles"], cell["blocks"]).items()
    }
    with edited(stage.model, edits, originals=stage.originals):
        applied = time.perf_counter()
        after = stage.judge()
        judged = time.perf_counter()
    restored = time.perf_counter()
    values = summarise(stage.before, after, resamples=grid.resamples)
    return values | {
        "size": size.relative,
        "matrices": len(edits),
        "edit_seconds": round(applied - started + restored - judged, 4),
        "evaluate_seconds": round(judged - applied, 4),
        "summarise_seconds": round(time.perf_counter() - restored, 4),
    }


class _Size:
    """How large an edit is, over all of its matrices: ‖ΔW‖_F / ‖W‖_F."""

    def __init__(self) -> None:
        self._change = self._whole = 0.0

    def of(self, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same edit, whose size is added up when it is made."""

        def measured(W: Tensor) -> Tensor:
            new = edit(W)
            self._change += float(torch.linalg.vector_norm(new - W)) ** 2
            self._whole += float(torch.linalg.vector_norm(W, dtype=torch.float64)) ** 2
            return new

        return measured

    @property
    def relative(self) -> float:
        return math.sqrt(self._change / self._whole) if self._whole else 0.0


def read_grid(out: str | Path) -> tuple[list[Row], dict[str, str]]:
    """The rows of a grid of interventions, and the metric of each model that figures show.

    Raises:
        InputError: no such grid there, or no model could be judged unedited.
    """
    rows = read_experiments(out)
    if not any(row.experiment.get("kind") == BASELINE for row in rows):
        raise InputError(f"{out}: holds no grid of interventions; want a folder that `specbasis intervene` wrote")
    about = json.loads((Path(out) / "manifest.json").read_text(encoding="utf-8"))["config"].get("subjects", {})
    metrics = {}
    for row in rows:
        label = row.experiment["tuned"]
        if row.experiment["kind"] == BASELINE and row.error is None:
            metrics[label] = about.get(label, {}).get("metric") or next(iter(row.values))
    if not metrics:
        raise InputError(f"{out}: no model could be judged unedited; the first error: {rows[0].error}")
    return rows, metrics


def kinds_text() -> str:
    """Every kind with what it means, for a help text."""
    return "; ".join(f"{name}: {kind.about}" for name, kind in KINDS.items())


def _place(ref: MatrixRef) -> tuple[object, ...]:
    return (ref.parameter, ref.rows, ref.columns, ref.groups, ref.expert)
