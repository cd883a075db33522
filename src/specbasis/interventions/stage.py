"""One experiment of a grid: a live model is edited, judged, and has its former weights back."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specbasis.architecture.key import Admits, MatrixRef
from specbasis.architecture.selection import Selection
from specbasis.checkpoint import Checkpoint, open_checkpoint, open_tuned, weights_sha256
from specbasis.core.blocks import norm
from specbasis.core.edits import Edit
from specbasis.core.errors import InputError, told
from specbasis.core.grammar import numbers
from specbasis.core.svd import ALGORITHM, SVD
from specbasis.interventions.evaluators import describe
from specbasis.interventions.live import bound, edited, region, sites, state
from specbasis.interventions.samples import Evaluator, Sample, as_samples, summarise
from specbasis.jobs.cache import Cache, mapped
from specbasis.jobs.progress import Progress, Report

BASELINE = "none"
"""The kind of the experiments in which nothing is edited."""

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


@dataclass(frozen=True, eq=False)
class Setting:
    """What all experiments of a grid share; goes to other processes as names and functions, never as weights.

    Attributes:
        base: source of the pretrained checkpoint.
        subjects: label → subject.
        cache: the decompositions on disk.
        resamples: of the intervals and tests.
        token: tells grids apart in a process that works for several.
    """

    base: str
    subjects: Mapping[str, Subject]
    cache: Cache
    resamples: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def source(self, label: str) -> str:
        """Where the model of a label is, the pretrained one among them."""
        return self.base if label == BASE else self.subjects[label].source

    def decompose_all(self, groups: Sequence[Admits | None], progress: Report) -> None:
        """Decompose every matrix that some experiment needs, once, before the first one."""
        for label in (BASE, *self.subjects):
            checkpoint = open_checkpoint(self.source(label))
            refs = {ref: None for admits in groups for ref in sites(checkpoint, None, admits)}
            for done, ref in enumerate(refs):
                progress(Progress(done, len(refs), f"decomposing {label} {ref.key.name}"))
                self.cache.decompose(ref.read(checkpoint), name=f"{ref.key.name} in {checkpoint.source}")

    def config(self) -> dict[str, Any]:
        """What makes two grids the same: contents of the models, evaluators, and every number that changes rows."""
        base = open_checkpoint(self.base)
        return {
            "experiment": "intervene",
            "algorithm": ALGORITHM,
            "base": weights_sha256(base),
            "subjects": {
                label: {
                    "weights": weights_sha256(open_tuned(subject.source, base)),
                    "evaluate": describe(subject.evaluate),
                    "metric": subject.metric or getattr(subject.evaluate, "metric", ""),
                }
                for label, subject in self.subjects.items()
            },
            "resamples": self.resamples,
        }


def admitted(roles: str, blocks: str) -> Admits | None:
    """The filter of a group of roles and a group of blocks, as the rows of a grid have them."""
    return Selection(tuple(role for role in roles.split("+") if role), numbers(blocks)).filter


class Stage:
    """A subject's live model in this process, with what its experiments share."""

    def __init__(self, setting: Setting, label: str) -> None:
        self.setting, self.subject = setting, setting.subjects[label]
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
        svd = mapped(self._entries[name]) if name in self._entries else None
        if svd is None:
            svd = self.setting.cache.decompose(W, name=name)
            self._entries[name] = self.setting.cache.path(W)
        return svd

    def opened(self, label: str) -> Checkpoint:
        """The checkpoint of a label, opened once."""
        if label not in self._opened:
            self._opened[label] = open_checkpoint(self.setting.source(label))
        return self._opened[label]

    def sites(self, source: str, roles: str, blocks: str) -> dict[MatrixRef, MatrixRef | None]:
        """The matrices of a group, as base has them, each with that of the source.

        Raises:
            InputError: the source lacks one.
        """
        key = (source, roles, blocks)
        if key not in self._sites:
            admits = admitted(roles, blocks)
            own = sites(self.stored, self.opened(BASE), admits)
            given = own if source == BASE else sites(self.stored, self.opened(source), admits)
            by_region = {(ref.parameter, *region(ref)): other for ref, other in given.items()}
            lacking = [ref.key.name for ref in own if (ref.parameter, *region(ref)) not in by_region]
            if lacking:
                raise InputError(f"{source}: has no {lacking[0]} of equal shape, which the pretrained model has")
            self._sites[key] = {ref: by_region[ref.parameter, *region(ref)] for ref in own}
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


STAGES: dict[tuple[str, str], Stage | Exception] = {}
"""The stage of this process: one, since one model is to be in memory."""


def _stage(setting: Setting, label: str) -> Stage:
    key = (setting.token, label)
    if key not in STAGES:
        STAGES.clear()
        try:
            STAGES[key] = Stage(setting, label)
        except Exception as error:
            STAGES[key] = error
    stage = STAGES[key]
    if isinstance(stage, Exception):
        raise InputError(f"{label} unedited: {told(stage)}") from stage
    return stage


def run_experiment(setting: Setting, experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Apply an experiment's edit, judge, take it back: its values."""
    stage = _stage(setting, experiment["tuned"])
    if experiment["kind"] == BASELINE:
        return summarise(stage.before, stage.before, resamples=setting.resamples)
    kind, ranks, sides, seed = (experiment[name] for name in ("kind", "ranks", "sides", "seed"))
    edit = Edit(kind, ranks, sides, seed, groups=experiment["groups"])
    source = experiment["source"] or BASE
    other = stage.opened(source) if edit.needs_other else None
    size = Size()
    started = time.perf_counter()
    edits: dict[str | MatrixRef, Callable[[Tensor], Tensor]] = {
        ref: size.of(bound(edit, ref, counterpart, other, stage.factors))
        for ref, counterpart in stage.sites(source, experiment["roles"], experiment["blocks"]).items()
    }
    with edited(stage.model, edits, originals=stage.originals):
        applied = time.perf_counter()
        after = stage.judge()
        judged = time.perf_counter()
    restored = time.perf_counter()
    values = summarise(stage.before, after, resamples=setting.resamples)
    return values | {
        "size": size.relative,
        "matrices": len(edits),
        "edit_seconds": round(applied - started + restored - judged, 4),
        "evaluate_seconds": round(judged - applied, 4),
        "summarise_seconds": round(time.perf_counter() - restored, 4),
    }


class Size:
    """How large an edit is, over all of its matrices: ‖ΔW‖_F / ‖W‖_F."""

    def __init__(self) -> None:
        self._change = self._whole = 0.0

    def of(self, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same edit, whose size is added up when it is made."""

        def measured(W: Tensor) -> Tensor:
            new = edit(W)
            self._change = math.hypot(self._change, float(norm(new - W)))
            self._whole = math.hypot(self._whole, float(norm(W)))
            return new

        return measured

    @property
    def relative(self) -> float:
        """The size of what was measured so far; 0 where all matrices are 0."""
        return self._change / self._whole if self._whole else 0.0
