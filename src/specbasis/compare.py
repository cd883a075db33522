"""Compare a base checkpoint with its finetunes: the job that loops over matrices and writes rows."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from loky import ProcessPoolExecutor, as_completed, cpu_count
from loky.process_executor import BrokenProcessPool
from torch import Tensor

from specbasis import results as store
from specbasis.architecture import ROLES, STRUCTURAL, MatrixKey, MatrixPair, MatrixRef, Pairing, pair
from specbasis.checkpoint import Checkpoint, content_sha256, open_checkpoint, sha256
from specbasis.errors import InputError, NonFiniteError
from specbasis.measures import Measure, Triple, Values, measure_all
from specbasis.results import Results
from specbasis.summary import RoleSummary, Verdict, judge, summarise
from specbasis.svd import ALGORITHM, SVD, decompose

if TYPE_CHECKING:
    import pandas as pd

Source = str | Path | Mapping[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What to compare, and how far down the spectrum.

    Attributes:
        ranks: leading ranks whose singular vectors are compared; singular values are compared at all ranks.
        subspace: number of leading ranks k at which principal angles are taken.
        roles: keep matrices with these roles (a prefix such as "attention" counts), or all.
        blocks: keep matrices of these blocks, or all.
        name: keep matrices whose name matches this pattern (``*`` and ``?``), or all.
        common_rows: compare the rows that both sides have where a vocabulary grew.
    """

    ranks: int = 200
    subspace: int = 10
    roles: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    name: str = ""
    common_rows: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.subspace < 1:
            raise InputError(f"got ranks = {self.ranks} and subspace = {self.subspace}; want at least 1 of each")
        known = {*ROLES, *(role.partition(".")[0] for role in ROLES)}
        unknown = [role for role in self.roles if role not in known]
        if unknown:
            raise InputError(f"no role {', '.join(unknown)}; there is: {', '.join(ROLES)}")

    def admits(self, key: MatrixKey) -> bool:
        """Whether a matrix is among those asked for."""
        return (
            (not self.roles or any(key.role == role or key.role.startswith(role + ".") for role in self.roles))
            and (not self.blocks or key.block in self.blocks)
            and (not self.name or fnmatch.fnmatchcase(key.name, self.name))
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found: rows, a manifest, and what they add up to.

    Attributes:
        results: the folder with the rows and the manifest.
        rows: all rows, one per (pair, matrix, measure, index); see `specbasis.results.SCHEMA`.
    """

    results: Results
    rows: pa.Table
    _kept: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """Where everything is on disk."""
        return self.results.folder

    @property
    def manifest(self) -> dict[str, Any]:
        """Versions, configuration, provenance, what was skipped and why, timings."""
        return self.results.manifest

    @property
    def pairs(self) -> list[str]:
        """The labels of the tuned checkpoints that have rows."""
        present = set(self.rows["pair"].unique().to_pylist())
        return [label for label in self.manifest["pairs"] if label in present]

    @property
    def summaries(self) -> dict[str, list[RoleSummary]]:
        """For each pair: one line per role, and one over all matrices."""
        return {label: summarise(self.rows, label) for label in self.pairs}

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """For each pair: identical, finetuned, independent or mixed, with the evidence."""
        return {label: judge(self.rows, label) for label in self.pairs}

    @property
    def failed(self) -> list[dict[str, str]]:
        """Matrices that could not be decomposed: pair, matrix, error."""
        return list(self.manifest["failed"])

    def to_pandas(self) -> pd.DataFrame:
        """All rows as a pandas DataFrame (needs the extra ``report``)."""
        try:
            import pandas  # noqa: F401
        except ImportError as error:
            raise InputError("to_pandas needs pandas: pip install 'specbasis[report]'") from error
        frame: pd.DataFrame = self.rows.to_pandas()
        return frame

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page, and the same figures as PNG and SVG beside it; returns the page's path.

        Args:
            path: the page's file; default `report.html` in the results folder.
        """
        from specbasis.report import write_report

        return write_report(self.results, self.rows, Path(path) if path else self.folder / "report.html")

    def _repr_html_(self) -> str:
        from specbasis.report.tables import summary_html

        return summary_html(self)


@dataclass(frozen=True)
class Progress:
    """What a caller is told after each matrix: how much of the work (in flops) is done, and what was done last."""

    done: float
    total: float
    matrix: str


def compare(
    base: Source,
    tuned: Source | Sequence[Source],
    out: str | Path | None = None,
    *,
    ranks: int = 200,
    subspace: int = 10,
    roles: Sequence[str] = (),
    blocks: Sequence[int] = (),
    name: str = "",
    common_rows: bool = False,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Measure what finetuning changed in the singular vectors and values of every weight matrix.

    Each worker holds one matrix at a time, and base is decomposed once for all tuned checkpoints. Rows are written
    as each matrix ends; the same call on the same folder skips what is done.

    Args:
        base: the pretrained checkpoint; see `specbasis.checkpoint.open_checkpoint` for what a source can be.
        tuned: one or several finetunes of it.
        out: folder for rows and manifest; a temporary one, kept as long as the result, when None.
        ranks: leading ranks whose singular vectors are compared; singular values are compared at all ranks.
        subspace: number of leading ranks at which principal angles are taken.
        roles: only these roles, such as ``["ffn", "attention.query"]``.
        blocks: only these blocks.
        name: only matrices whose name matches this pattern (``*`` and ``?``).
        common_rows: compare the rows that both sides have where a vocabulary grew.
        workers: processes, one thread each; as many as there are cores when None. The rows do not depend on it.
        progress: called at the start and after each matrix.

    Raises:
        InputError: a source cannot be read, nothing is in common, or ``out`` cannot be used.

    A matrix with NaN or Inf is not an error of the call: it is listed in ``failed``, and the others are compared.

    Source: Yu et al. 2026, §3 and §4.1–4.2; what is added beside it: bounds, subspaces, chance levels, verdicts.
    """
    options = Options(ranks, subspace, tuple(roles), tuple(blocks), name, common_rows)
    sources = [tuned] if isinstance(tuned, str | Path | Mapping) else list(tuned)
    if not sources:
        raise InputError("got no tuned checkpoint; want at least one")
    if workers is not None and workers < 1:
        raise InputError(f"got workers = {workers}; want at least 1")
    kept = tempfile.TemporaryDirectory(prefix="specbasis-") if out is None else None
    folder = Path(kept.name) if kept else Path(str(out))

    base_checkpoint = open_checkpoint(base)
    checkpoints = [open_checkpoint(source) for source in sources]
    labels = store.unique_labels([checkpoint.source for checkpoint in checkpoints])
    pairings = {
        label: _chosen(pair(base_checkpoint, checkpoint, common_rows=common_rows), options)
        for label, checkpoint in zip(labels, checkpoints, strict=True)
    }
    if not any(pairing.matched for pairing in pairings.values()):
        raise InputError(_nothing_in_common(base_checkpoint, pairings))

    known = _known_hashes(folder)
    provenance = [_provenance(checkpoint, known) for checkpoint in (base_checkpoint, *checkpoints)]
    results = store.create(folder, _config(options, labels, provenance))
    results.manifest.update(
        store.environment(),
        base=provenance[0],
        pairs={
            label: _about(pairing, about)
            for (label, pairing), about in zip(pairings.items(), provenance[1:], strict=True)
        },
        failed=[],
        runs=results.manifest.get("runs", []),
    )
    results.write_manifest()

    by_matrix: dict[str, list[tuple[str, Source, MatrixPair]]] = {}
    for (label, pairing), source in zip(pairings.items(), sources, strict=True):
        for matched in pairing.matched:
            if not results.is_done(label, matched.key.name):
                by_matrix.setdefault(matched.key.name, []).append((label, _portable(source), matched))
    bare = Results(results.folder)
    tasks = [Task(_portable(base), tuple(todo), bare, options) for todo in by_matrix.values()]
    tasks.sort(key=lambda task: -task.flops)  # longest first: no worker is left with a long one at the end

    workers = workers or cpu_count()
    started, done, total = time.perf_counter(), 0.0, math.fsum(task.flops for task in tasks)
    report = progress or (lambda _: None)
    report(Progress(0.0, total, tasks[0].name if tasks else ""))
    for task, failures in _run(tasks, workers):
        done += task.flops
        report(Progress(done, total, task.name))
        results.manifest["failed"] += failures
    results.manifest["failed"].sort(key=lambda failure: (failure["pair"], failure["matrix"]))
    if tasks:
        run = {"seconds": round(time.perf_counter() - started, 3), "matrices": len(tasks), "workers": workers}
        results.manifest["runs"].append(run)
    results.write_manifest()
    if not any(results.part(label, m.key.name).exists() for label, p in pairings.items() for m in p.matched):
        raise InputError(f"every matrix failed; the first: {results.manifest['failed'][0]['error']}")
    return Comparison(results, results.rows(), kept)


def load(folder: str | Path) -> Comparison:
    """Open the results that an earlier `compare` left in a folder.

    Raises:
        InputError: the folder holds no results, or damaged ones.
    """
    results = store.load(Path(folder))
    return Comparison(results, results.rows())


# --- the loop ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One base matrix and what it is compared with. Holds names and places, never tensors of files.

    Attributes:
        base: source of the base checkpoint.
        todo: (label, source of the tuned checkpoint, where the matrix is in both).
        results: where the rows go.
        options: how far to look.
    """

    base: Source
    todo: tuple[tuple[str, Source, MatrixPair], ...]
    results: Results
    options: Options

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.todo[0][2].key.name

    @property
    def flops(self) -> float:
        """Work: the Gram matrix and the eigensolver of each decomposition."""
        short, long = sorted(self.todo[0][2].base.shape)
        return (1 + 2 * len(self.todo)) * (short**2 * long + 9.0 * short**3)

    def run(self) -> list[dict[str, str]]:
        """Compare, write the rows, and return the failures."""
        failed = []
        decomposed: dict[MatrixRef, SVD] = {}
        base = _opened(self.base)
        for label, source, matched in self.todo:
            tuned = _opened(source)
            where = f"{matched.key.name} in "
            try:
                W = matched.base.read(base)
                if matched.base not in decomposed:
                    k = min(self.options.ranks, *matched.base.shape)
                    decomposed = {matched.base: decompose(W, k, name=where + base.source)}
                triple = decompose_pair(
                    W,
                    matched.tuned.read(tuned),
                    base=decomposed[matched.base],
                    subspace=self.options.subspace,
                    name=where + tuned.source,
                )
            except NonFiniteError as error:
                failed.append({"pair": label, "matrix": matched.key.name, "error": str(error)})
            else:
                self.results.write(label, matched.key.name, _table(label, matched, measure_all(triple)))
        return failed


SMALL_WORK = 1e11
"""Below so many flops, starting worker processes takes longer than the work."""


def _run(tasks: list[Task], workers: int) -> Iterator[tuple[Task, list[dict[str, str]]]]:
    """Run tasks, each on one thread, and yield each with its failures as it ends.

    One thread each makes the rows the same bit for bit, however many workers there are; processes in place of
    threads keep cores busy whatever the size of a matrix.
    """
    in_memory = any(
        not isinstance(source, str) for task in tasks for source in (task.base, *(t[1] for t in task.todo))
    )
    if workers == 1 or len(tasks) == 1 or in_memory or sum(task.flops for task in tasks) < SMALL_WORK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for task in tasks:
                yield task, task.run()
        finally:
            torch.set_num_threads(threads)
            _OPENED.clear()
        return
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    executor = ProcessPoolExecutor(max_workers=min(workers, len(tasks)), env=one_thread)
    try:
        futures = {executor.submit(Task.run, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise InputError(
            f"a worker process died, perhaps for lack of memory; what is done is kept: run again with fewer than "
            f"{workers} workers"
        ) from error
    finally:
        executor.shutdown(kill_workers=True)


_OPENED: dict[Any, Checkpoint] = {}


def _opened(source: Source) -> Checkpoint:
    """A checkpoint, opened once per process."""
    key = source if isinstance(source, str) else id(source)
    if key not in _OPENED:
        _OPENED[key] = open_checkpoint(source)
    return _OPENED[key]


def decompose_pair(
    W: Tensor,
    T: Tensor,
    *,
    ranks: int | None = None,
    base: SVD | None = None,
    subspace: int = 10,
    name: str = "matrix",
) -> Triple:
    """The three decompositions of a pretrained matrix W and its finetune T, ready for the measures.

    Args:
        W: (out, in), pretrained.
        T: (out, in), finetuned.
        ranks: leading ranks whose vectors are wanted; all when None. Taken from ``base`` where that is given.
        base: the SVD of W where it is known.
        subspace: number of leading ranks at which principal angles are taken.
        name: what to call the matrix in an error.

    Raises:
        InputError: shapes differ. NonFiniteError: NaN or Inf in either.
    """
    base = base or decompose(W, ranks, name=name)
    inner, equal = _inner(W, T)
    tuned = base if equal else decompose(T, len(base.S), name=name)
    delta = decompose(T, len(base.S), minus=W, name=name)
    return Triple(base, tuned, delta, inner, subspace)


def _inner(W: Tensor, T: Tensor) -> tuple[float, bool]:
    """⟨W, T⟩_F in float64, in blocks of rows, and whether the two are equal throughout."""
    inner, equal = 0.0, W.shape == T.shape
    rows = max(1, 2**21 // max(1, W.shape[1]))
    for start in range(0, len(W), rows):
        a, b = (X[start : start + rows].to(torch.float64) for X in (W, T))
        inner += float((a * b).sum())
        equal = equal and torch.equal(a, b)
    return inner, equal


def _table(label: str, matched: MatrixPair, measured: Iterator[tuple[Measure, Values]]) -> pa.Table:
    """The rows of one matrix of one pair."""
    key = matched.key
    columns: dict[str, list[Any]] = {"measure": [], "index": [], "value": [], "bound": [], "resolved": []}
    for measure, values in measured:
        n = len(values.value)
        columns["measure"] += [measure.name] * n
        columns["index"] += (values.index or list(range(n))) if measure.index else [None] * n
        columns["value"] += values.value.tolist()
        columns["bound"] += [None] * n if values.bound is None else values.bound.tolist()
        resolved = values.resolved(relative=measure.unit == "weight")
        columns["resolved"] += [None] * n if resolved is None else resolved.tolist()
    n = len(columns["value"])
    constant = {
        "pair": label,
        "matrix": key.name,
        "stack": key.stack,
        "block": key.block,
        "role": key.role,
        "out_features": matched.base.shape[0],
        "in_features": matched.base.shape[1],
    }
    columns |= {name: [value] * n for name, value in constant.items()}
    return pa.table({name: columns[name] for name in store.SCHEMA.names}, schema=store.SCHEMA)


# --- what goes into the manifest --------------------------------------------------------------------------------


def _chosen(pairing: Pairing, options: Options) -> Pairing:
    matched = tuple(m for m in pairing.matched if options.admits(m.key))
    return Pairing(pairing.family, matched, pairing.skipped, pairing.notes)


def _portable(source: Source) -> Source:
    """A source that means the same in a worker process."""
    return str(source) if isinstance(source, Path) else source


def _config(options: Options, labels: list[str], provenance: list[dict[str, Any]]) -> dict[str, Any]:
    """What makes two comparisons the same: contents, not paths, and every option that changes a number."""
    return {
        "algorithm": ALGORITHM,
        "base": provenance[0]["sha256"],
        "tuned": {label: about["sha256"] for label, about in zip(labels, provenance[1:], strict=True)},
        **{name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items()},
    }


def _about(pairing: Pairing, provenance: dict[str, Any]) -> dict[str, Any]:
    return {
        "tuned": provenance,
        "architecture": pairing.family.name,
        "matrices": [m.key.name for m in pairing.matched],
        "skipped": [{"name": s.name, "side": s.side, "reason": s.reason} for s in pairing.skipped],
        "notes": [
            *([f"no architecture file matches: {STRUCTURAL.title}"] if pairing.family is STRUCTURAL else []),
            *pairing.notes,
        ],
    }


def _provenance(checkpoint: Checkpoint, known: Mapping[str, Any]) -> dict[str, Any]:
    """Source and SHA-256 of a checkpoint's files; one unchanged since an earlier run is not read again."""
    files: list[dict[str, Any]] = []
    for path in checkpoint.files:
        stat = path.stat()
        entry = {"path": str(path), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
        earlier = known.get(str(path), {})
        same = {key: earlier.get(key) for key in entry} == entry
        files.append(entry | {"sha256": earlier["sha256"] if same else sha256(path)})
    digests = [file["sha256"] for file in files]
    if not digests:
        digests = [content_sha256(checkpoint)]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {"source": checkpoint.source, "sha256": whole, "files": files}


def _known_hashes(folder: Path) -> dict[str, Any]:
    """Hashes that an earlier run of the same folder found, by path."""
    if not (folder / "manifest.json").is_file():
        return {}
    manifest = store.load(folder).manifest
    sources = [manifest.get("base", {}), *(about["tuned"] for about in manifest.get("pairs", {}).values())]
    return {file["path"]: file for source in sources for file in source.get("files", [])}


def _nothing_in_common(base: Checkpoint, pairings: Mapping[str, Pairing]) -> str:
    label, pairing = next(iter(pairings.items()))
    reasons = "; ".join(dict.fromkeys(s.reason for s in pairing.skipped)) or "the filters leave nothing"
    return f"{base.source} and {label}: no matrix to compare ({reasons[:300]})"
