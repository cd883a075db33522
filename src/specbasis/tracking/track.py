"""Follow a training over its checkpoints: every matrix decomposed once at each, and compared with the others."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from loky import cpu_count
from torch import Tensor

from specbasis.architecture.key import MatrixRef
from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.entry import watched
from specbasis.core.errors import InputError
from specbasis.core.options import takes
from specbasis.core.svd import ALGORITHM
from specbasis.jobs import engine as engines, results as store
from specbasis.jobs.cost import Work, matrix_work
from specbasis.jobs.environment import environment
from specbasis.jobs.folder import refuse_another
from specbasis.jobs.progress import Report
from specbasis.jobs.provenance import provenances
from specbasis.jobs.results import COMPARISON, Figures, Kept, Results, rows_of
from specbasis.measures.measure import RESOLVED
from specbasis.measures.table import choose
from specbasis.tracking.options import TrackOptions
from specbasis.tracking.runs import Series, Source, open_series
from specbasis.tracking.trajectory import SIDES, Trajectory, follow

LARGE = 8192
"""Short sides over this may be decomposed approximately, if that is asked for."""

REFERENCES = ("first", "last", "previous")
"""What each checkpoint is compared with rank by rank."""

TRACKING = replace(COMPARISON, noun="tracked training", mark="track")

_PART = "checkpoints"


class Tracking(Kept):
    """What `track` found: one row per (checkpoint, matrix, measure, index); ``pair`` is the checkpoint.

    docs/pretrain.md has the measures.
    """

    @property
    def steps(self) -> list[int]:
        """Place of each checkpoint on the axis of training."""
        return [about["step"] for about in self.manifest["checkpoints"]]


@takes(TrackOptions)
def track(
    run: Source | Sequence[Source],
    out: str | Path | None = None,
    options: TrackOptions | None = None,
    *,
    progress: Report | None = None,
    **keywords: Any,
) -> Tracking:
    """Alignment of every checkpoint of a training to the first, the last and the one before, per matrix and rank.

    Args:
        run: a folder of checkpoints, a pattern of revisions on the Hub, or a list of sources; see `open_series`.
        out: folder for rows and manifest, new or of the same checkpoints; a temporary one when None.
        options: all options as one value; or each as a keyword.
        progress: called at the start and after each matrix.
        **keywords: the fields of `TrackOptions`, below.

    Raises:
        InputError: fewer than two checkpoints can be read, or ``out`` cannot be used.

    Source: Yu et al. 2026, §4.3, Fig. 4A.
    """
    chosen = TrackOptions.of(options, keywords)
    series = open_series(run, admits=chosen.filter, stream=chosen.stream)
    kept = tempfile.TemporaryDirectory(prefix="specbasis-") if out is None else None
    folder = Path(kept.name) if kept else Path(str(out))
    unchanged = watched(path for checkpoint in series.checkpoints for path in checkpoint.files)
    about = [
        {"label": label, "source": saved.source, "step": step, "identity": _identity(checkpoint)}
        for label, saved, step, checkpoint in zip(
            series.labels, series.saved, series.steps, series.checkpoints, strict=True
        )
    ]
    config = {
        "kind": TRACKING.mark,
        "algorithm": ALGORITHM,
        **chosen.config(),
        "checkpoints": [[checkpoint["label"], checkpoint["identity"]] for checkpoint in about],
    }
    with store.create(folder, config, TRACKING) as results:
        earlier = results.manifest.get("checkpoints", [])
        weights = provenances(series.checkpoints, (kept.get("weights", {}) for kept in earlier))
        about = [checkpoint | {"weights": known} for checkpoint, known in zip(about, weights, strict=True)]
        before = _weights(earlier)
        refuse_another(folder, TRACKING.noun, before, {label: _weights(about).get(label) for label in before})
        results.manifest.update(
            environment(),
            checkpoints=about,
            passed_over=[{"source": skipped.source, "reason": skipped.reason} for skipped in series.passed_over],
            notes=[
                *series.notes,
                *chosen.notes(ref.key for refs in series.matrices.values() for ref in refs if ref is not None),
            ],
            pairs={_PART: {"matrices": list(series.matrices)}},
            failed=[],
            runs=results.manifest.get("runs", []),
        )
        results.write_manifest()
        jobs = [
            _Job(series, refs, chosen.ranks, chosen.top, LARGE if chosen.approximate else None)
            for name, refs in series.matrices.items()
            if not results.is_done(_PART, name)
        ]
        _run(jobs, results, chosen.workers or cpu_count(), progress, unchanged)
    return Tracking(results, results.rows(), kept)


def load_tracking(folder: str | Path) -> Tracking:
    """Open what an earlier `track` left in a folder.

    Raises:
        InputError: the folder holds no rows, or those of something else.
    """
    results = store.load(Path(folder), TRACKING)
    return Tracking(results, results.rows())


def _identity(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint's contents from another's: the digest that the Hub lists, or size and time of its
    files.
    """
    if checkpoint.digests:
        return ",".join(sorted(checkpoint.digests.values()))
    return ",".join(f"{path.stat().st_size}-{path.stat().st_mtime_ns}" for path in checkpoint.files)


def _weights(checkpoints: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Label → SHA-256 of the weights, where a manifest has it; one of a version before 0.2 has not."""
    return {about["label"]: about["weights"]["sha256"] for about in checkpoints if "weights" in about}


def _run(
    jobs: Sequence[_Job],
    results: Results,
    workers: int,
    progress: Report | None,
    unchanged: Callable[[], None],
) -> None:
    """Put the rows of each matrix on disk as it ends, and into the manifest what failed.

    Raises:
        InputError: the weights that they were computed from are no longer those that were hashed.
    """
    running = engines.run(jobs, workers=workers, engine="threads", local=True, progress=progress)
    with results.timed(len(jobs), workers), closing(running):
        for job, (rows, failed) in running:
            unchanged()
            results.manifest["failed"] += [
                {"checkpoint": job.series.labels[c], "matrix": job.name, "error": error}
                for c, error in failed.items()
            ]
            if rows is not None:
                results.write(_PART, job.name, rows)


@dataclass(frozen=True, eq=False)
class _Job:
    """One matrix over all checkpoints."""

    series: Series
    refs: tuple[MatrixRef | None, ...]
    ranks: int
    top: int
    approximate: int | None

    @property
    def ref(self) -> MatrixRef:
        return next(ref for ref in self.refs if ref is not None)

    @property
    def name(self) -> str:
        return self.ref.key.name

    @property
    def flops(self) -> float:
        return self._work.flops

    @property
    def bytes(self) -> int:
        out, into = self.ref.shape
        return self._work.bytes + 8 * len(self.refs) * min(self.ranks, out, into) * (out + into)

    @property
    def _work(self) -> Work:
        return matrix_work(
            self.ref.shape, choose(("alignment_left", "alignment_right")), self.ranks, len(self.refs) - 1
        )

    def run(self) -> tuple[pa.Table | None, dict[int, str]]:
        """The rows, and the checkpoints at which the matrix has no decomposition."""
        count, approximate = len(self.refs), self.approximate
        try:
            t = follow(self._read, count, ranks=self.ranks, approximate=approximate, name=self._name)
        except InputError as error:
            return None, dict.fromkeys(range(count), str(error))
        return rows_of(self.ref.key, t.shape, _figures(t, self.series.labels, self.top)), t.failed

    def _read(self, c: int) -> Tensor | None:
        ref = self.refs[c]
        return None if ref is None else ref.read(self.series.checkpoints[c])

    def _name(self, c: int) -> str:
        return f"{self.name} in {self.series.saved[c].source}"


# --- rows -------------------------------------------------------------------------------------------------------


def _figures(t: Trajectory, labels: Sequence[str], top: int) -> Iterator[Figures]:
    """Every measure of one matrix at each checkpoint."""
    count, ranks = len(t.index), range(t.S.shape[1])
    bounds, mean, size = t.alignment_bound(), t.mean_alignment(top), t.relative_distance()
    for c in range(count):
        label = labels[t.index[c]]
        yield Figures(label, "singular_value", t.S[c], ranks)
        yield Figures(label, "relative_gap", t.relative_gap[c], ranks)
        yield Figures(label, "norm", t.norms[c : c + 1])
        for name in REFERENCES:
            other = {"first": 0, "last": count - 1, "previous": c - 1}[name]
            if other < 0:
                continue
            bound = bounds[other, c].numpy()
            resolved = np.where(np.isnan(bound), np.nan, bound <= RESOLVED)
            for side in SIDES:
                aligned = t.alignment(side)[other, c]
                yield Figures(label, f"alignment_{side}_{name}", aligned, ranks, bound, resolved)
            early, late = sorted((other, c))  # the size of the update from the earlier to the later
            if not torch.isnan(size[early, late]):
                yield Figures(label, f"relative_update_{name}", size[early, late : late + 1])
        others = [other for other in range(count) if other != c]
        yield Figures(label, "mean_alignment", mean[c, others], [t.index[other] for other in others])
        measured = [other for other in others if not torch.isnan(size[other, c])]
        yield Figures(label, "relative_update", size[measured, c], [t.index[other] for other in measured])
