"""Compare a base checkpoint with its finetunes: the job that loops over matrices and writes rows."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from loky import cpu_count
from torch import Tensor

from specbasis.architecture.family import STRUCTURAL
from specbasis.architecture.key import ROLES, MatrixRef
from specbasis.architecture.pair import MatrixPair, Pairing, pair
from specbasis.checkpoint import Checkpoint, joined_sha256, open_checkpoint, open_tuned, sha256
from specbasis.comparison.findings import Finding, as_json, find
from specbasis.comparison.options import Options
from specbasis.comparison.summary import SIDES, RoleSummary, Verdict, judge, own_means, summarise
from specbasis.core.attention_heads import compare_heads
from specbasis.core.dtypes import BY_PRECISION, name_of
from specbasis.core.entries import read_entries
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.nulls import KINDS, Rounding, draw
from specbasis.core.nulls import rounding as rounding_of
from specbasis.core.options import takes
from specbasis.core.svd import ALGORITHM, SVD, HalfSVD, approximate_svd, cosines, half_svd, low_rank_svd
from specbasis.jobs import engine as engines
from specbasis.jobs import results as store
from specbasis.jobs.cache import Cache, Samples
from specbasis.jobs.cells import Progress
from specbasis.jobs.cost import Work, makespan, matrix_work, rates
from specbasis.jobs.folder import environment
from specbasis.jobs.results import Results
from specbasis.measures.measure import Measure, Values
from specbasis.measures.own import OwnMeasure
from specbasis.measures.table import measure_all, needed, reads, table
from specbasis.measures.triple import Absent, Decomposition, Triple

if TYPE_CHECKING:
    import pandas as pd

Source = str | Path | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found: rows, a manifest, and what they add up to.

    Attributes:
        results: the folder with the rows and the manifest.
        rows: all rows, one per (pair, matrix, measure, index); see `specbasis.jobs.results.SCHEMA`.
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

    @cached_property
    def pairs(self) -> list[str]:
        """The labels of the tuned checkpoints that have rows."""
        present = set(self.rows["pair"].unique().to_pylist())
        return [label for label in self.manifest["pairs"] if label in present]

    @cached_property
    def summaries(self) -> dict[str, list[RoleSummary]]:
        """For each pair: one line per role, and one over all matrices."""
        return {label: summarise(self.rows, label) for label in self.pairs}

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """For each pair: identical, finetuned, independent or mixed, with the evidence."""
        return {label: judge(self.rows, label) for label in self.pairs}

    @cached_property
    def findings(self) -> dict[str, list[Finding]]:
        """For each pair: what a user of it should know, problems first; see `specbasis.comparison.findings`."""
        return {label: find(self.rows, label, self.failed) for label in self.pairs}

    @cached_property
    def own(self) -> dict[str, list[dict[str, Any]]]:
        """For each pair: a user's own measures by role; empty without any. See `summary.own_means`."""
        names = [measure["name"] for measure in self.manifest.get("measures", [])]
        return {label: own_means(self.rows, label, names) if names else [] for label in self.pairs}

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

    def summary(self) -> dict[str, Any]:
        """Verdicts, findings and summaries as plain data for JSON; null for what is not a finite number.

        Keys: base, folder, failed, and pairs, which has for each label verdict, findings and summaries with the
        fields of `Verdict`, `Finding` and `RoleSummary`, and own, the user's own measures by role.
        """
        found = {
            label: {
                "tuned": self.manifest["pairs"][label]["tuned"]["source"],
                "verdict": asdict(self.verdicts[label]),
                "findings": [asdict(finding) for finding in self.findings[label]],
                "summaries": [asdict(line) for line in self.summaries[label]],
                "own": self.own[label],
            }
            for label in self.pairs
        }
        whole = {"base": self.manifest["base"]["source"], "folder": str(self.folder), "failed": self.failed}
        plain: dict[str, Any] = as_json(whole | {"pairs": found})
        return plain

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page, and the same figures as PNG and SVG beside it; returns the page's path.

        Args:
            path: the page's file; default `report.html` in the results folder.
        """
        from specbasis.figures import write_report

        return write_report(self.results, self.rows, Path(path) if path else self.folder / "report.html")

    def _repr_html_(self) -> str:
        from specbasis.figures.tables import summary_html

        return summary_html(self)


@takes(Options)
def compare(
    base: Source,
    tuned: Source | Sequence[Source],
    out: str | Path | None = None,
    options: Options | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    **keywords: Any,
) -> Comparison:
    """Measure what finetuning changed in the singular vectors and values of every weight matrix.

    Each worker holds one matrix at a time, and base is decomposed once for all tuned checkpoints. Rows are written
    as each matrix ends; the same call on the same folder skips what is done.

    Args:
        base: the pretrained checkpoint; see `specbasis.checkpoint.open_checkpoint` for what a source can be.
        tuned: one or several finetunes of it: checkpoints, or PEFT adapters trained on it, whose low-rank updates
            are decomposed without being formed.
        out: folder for rows and manifest; a temporary one, kept as long as the result, when None.
        options: all options as one value; or each as a keyword.
        progress: called at the start and after each matrix.
        **keywords: the fields of `Options`, below.

    Raises:
        InputError: a source cannot be read, nothing is in common, or ``out`` cannot be used.

    A matrix with NaN or Inf is not an error of the call: it is listed in ``failed``, and the others are compared.

    Source: Yu et al. 2026, §3 and §4.1–4.2; what is added beside it: bounds, subspaces, chance levels, verdicts.
    """
    chosen = Options.of(options, keywords)
    place = Place(_device(chosen.device), None if chosen.cache is None else str(chosen.cache))
    workers = chosen.workers or (cpu_count() if chosen.device == "cpu" else 1)
    matched = _matched(base, tuned, chosen)
    if matched.in_memory and chosen.engine in ("processes", "ray"):
        raise InputError(
            f"tensors in memory cannot reach engine {chosen.engine!r}; write them to a file, or use threads"
        )
    kept = tempfile.TemporaryDirectory(prefix="specbasis-") if out is None else None
    folder = Path(kept.name) if kept else Path(str(out))

    known = _known_hashes(folder)
    with ThreadPoolExecutor(cpu_count()) as pool:  # hashing leaves the interpreter to the others
        provenance = list(pool.map(partial(_provenance, known=known), (matched.base, *matched.tuned.values())))
    alone = ExitStack()
    results = alone.enter_context(store.create(folder, _config(chosen, list(matched.tuned), provenance)))
    results.manifest.update(
        environment(),
        base=provenance[0],
        pairs={
            label: _about(pairing, about)
            for (label, pairing), about in zip(matched.pairings.items(), provenance[1:], strict=True)
        },
        measures=[
            {"name": m.name, "title": m.title, "source": m.source} for m in chosen.taken if m.shown == "table"
        ],
        failed=[],
        runs=results.manifest.get("runs", []),
    )
    results.write_manifest()

    tasks = matched.tasks(results, place)
    started, done, total = time.perf_counter(), 0.0, math.fsum(task.flops for task in tasks)
    report = progress or (lambda _: None)
    report(Progress(0.0, total, tasks[0].name if tasks else ""))
    local = matched.in_memory or not _portable_measures(chosen.own, chosen.engine)
    running = engines.run(tasks, workers=workers, memory=chosen.budget, engine=chosen.engine, local=local)
    # Closed here, not when the garbage collector comes: an error's traceback would keep the workers busy.
    with alone, _opened_here(matched), closing(running):
        for task, outcomes in running:
            done += task.flops
            for label, outcome in outcomes:
                if isinstance(outcome, str):
                    results.manifest["failed"].append({"pair": label, "matrix": task.name, "error": outcome})
                else:
                    results.write(label, task.name, outcome)
            report(Progress(done, total, task.name))
    results.manifest["failed"].sort(key=lambda failure: (failure["pair"], failure["matrix"]))
    if tasks:
        run = {"seconds": round(time.perf_counter() - started, 3), "matrices": len(tasks), "workers": workers}
        results.manifest["runs"].append(run)
    results.write_manifest()
    if not any(
        results.part(label, m.key.name).exists() for label, p in matched.pairings.items() for m in p.matched
    ):
        raise InputError(f"every matrix failed; the first: {results.manifest['failed'][0]['error']}")
    return Comparison(results, results.rows(), kept)


@dataclass(frozen=True)
class Plan:
    """What `compare` would do, and what that takes.

    Attributes:
        tasks: one per matrix that is not done, longest first.
        workers: how many run at the same time.
        memory: bytes that they may take together.
    """

    tasks: tuple[Task, ...]
    workers: int
    memory: int

    @property
    def seconds(self) -> float:
        """Predicted time, from the rates of this machine, which the first call measures."""
        each = [task.work.seconds(rates()) for task in self.tasks]
        return makespan(each, self.workers) if each else 0.0

    @property
    def bytes(self) -> int:
        """Predicted peak memory of the tasks that run together."""
        largest = sorted((task.bytes for task in self.tasks), reverse=True)
        return max(min(sum(largest[: self.workers]), self.memory), *largest[:1], 0)


@takes(Options)
def plan(
    base: Source,
    tuned: Source | Sequence[Source],
    out: str | Path | None = None,
    options: Options | None = None,
    **keywords: Any,
) -> Plan:
    """What `compare` with the same arguments would do, from headers alone; nothing is decomposed or written."""
    chosen = Options.of(options, keywords)
    tasks = _matched(base, tuned, chosen).tasks(Results(Path(str(out))) if out is not None else None, Place())
    budget = engines.free_memory() // 2 if chosen.budget is None else chosen.budget
    return Plan(tuple(tasks), chosen.workers or cpu_count(), budget)


def load(folder: str | Path) -> Comparison:
    """Open the results that an earlier `compare` left in a folder.

    Raises:
        InputError: the folder holds no results, or damaged ones.
    """
    results = store.load(Path(folder))
    return Comparison(results, results.rows())


# --- the loop ---------------------------------------------------------------------------------------------------


LARGE = 8192
"""Short sides over this may be decomposed approximately, if that is asked for."""


@dataclass(frozen=True)
class Place:
    """Where and how decompositions are computed, and the folder in which they are kept, if any."""

    device: str = "cpu"
    cache: str | None = None
    approximate: bool = False

    def decompose(
        self, W: Tensor, ranks: int, name: str, minus: Tensor | None = None, start: Decomposition | None = None
    ) -> Decomposition:
        """The decomposition of a matrix, or of a difference, which is not kept."""
        if self.approximate and min(W.shape) > LARGE and 8 * ranks <= min(W.shape):
            near = start.X if isinstance(start, HalfSVD) else None
            device = torch.device(self.device)
            return approximate_svd(W, max(ranks, 1), minus=minus, start=near, name=name, device=device)
        if self.cache is None or minus is not None or not ranks:
            return half_svd(W, ranks, minus=minus, name=name, device=torch.device(self.device))
        return Cache(Path(self.cache)).decompose(W.to(self.device), ranks, name=name)

    def decompose_every(self, W: Tensor, ranks: int, name: str) -> SVD | HalfSVD:
        """The decomposition of a base whose vectors of the short side are all wanted."""
        if self.cache is None:
            return half_svd(W, ranks, name=name, every=True, device=torch.device(self.device))
        return Cache(Path(self.cache)).decompose(W.to(self.device), None, name=name)


def _device(name: str) -> str:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"got device {name!r}; want cpu, or a GPU that torch sees, such as cuda:0") from error
    return str(device)


@dataclass(frozen=True)
class Matched:
    """Two or more open checkpoints and what they have in common.

    Attributes:
        source: what the user called base.
        base: the pretrained checkpoint.
        sources: label → what the user called a tuned checkpoint.
        tuned: label → the same, open.
        pairings: label → the matrices that are in both.
        options: what to compare.
    """

    source: Source
    base: Checkpoint
    sources: Mapping[str, Source]
    tuned: Mapping[str, Checkpoint]
    pairings: Mapping[str, Pairing]
    options: Options

    @property
    def in_memory(self) -> bool:
        """Whether any source is tensors, which cannot be named to another process."""
        return any(isinstance(source, Mapping) for source in (self.source, *self.sources.values()))

    def tasks(self, results: Results | None, place: Place) -> list[Task]:
        """One task per matrix of base with pairs that are not done, longest first."""
        by_matrix: dict[str, list[tuple[str, Source, MatrixPair]]] = {}
        for label, pairing in self.pairings.items():
            for m in pairing.matched:
                if results is None or not results.is_done(label, m.key.name):
                    by_matrix.setdefault(m.key.name, []).append((label, _portable(self.sources[label]), m))
        place = replace(place, approximate=self.options.approximate)
        base, options = _portable(self.source), self.options
        tasks = [Task(base, tuple(todo), options, place) for todo in by_matrix.values()]
        return sorted(tasks, key=lambda task: -task.flops)


def _portable_measures(functions: Sequence[OwnMeasure], engine: str) -> bool:
    """Whether a user's functions can be sent to other processes; an engine that must is refused."""
    from cloudpickle import dumps

    for function in functions:
        try:
            dumps(function)
        except Exception as error:
            if engine in ("processes", "ray"):
                raise InputError(
                    f"own measure {function.__name__} cannot be sent to engine {engine!r} "
                    f"({type(error).__name__}: {error}); use engine='threads'"
                ) from error
            return False
    return True


def _matched(base: Source, tuned: Source | Sequence[Source], options: Options) -> Matched:
    sources = [tuned] if isinstance(tuned, str | Path | Mapping) else list(tuned)
    if not sources:
        raise InputError("got no tuned checkpoint; want at least one")
    opened = open_checkpoint(base, stream=options.stream)
    checkpoints = [open_tuned(source, opened, stream=options.stream) for source in sources]
    labels = store.unique_labels([checkpoint.source for checkpoint in checkpoints])
    pairings = {
        label: pair(opened, checkpoint, common_rows=options.common_rows, admits=options.filter)
        for label, checkpoint in zip(labels, checkpoints, strict=True)
    }
    if not any(pairing.matched for pairing in pairings.values()):
        everything = {
            label: pair(opened, checkpoint) for label, checkpoint in zip(labels, checkpoints, strict=True)
        }
        raise InputError(_nothing_in_common(opened, everything))
    return Matched(
        base,
        opened,
        dict(zip(labels, sources, strict=True)),
        dict(zip(labels, checkpoints, strict=True)),
        pairings,
        options,
    )


Outcome = tuple[str, pa.Table | str]


@dataclass(frozen=True)
class Task:
    """One base matrix and what it is compared with. Holds names and places, never tensors of files.

    Attributes:
        base: source of the base checkpoint.
        todo: (label, source of the tuned checkpoint, where the matrix is in both).
        options: how far to look.
        place: where to compute and what to keep.
    """

    base: Source
    todo: tuple[tuple[str, Source, MatrixPair], ...]
    options: Options
    place: Place

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.todo[0][2].key.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.todo[0][2].base.shape

    @cached_property
    def work(self) -> Work:
        """What it is predicted to cost."""
        return matrix_work(
            self.shape,
            self.options.taken,
            self.options.ranks,
            len(self.todo),
            draws=self.options.null_samples * len(KINDS),
        )

    @property
    def flops(self) -> float:
        """Predicted work."""
        return self.work.flops

    @property
    def bytes(self) -> int:
        """Predicted peak memory."""
        return self.work.bytes

    def run(self) -> list[Outcome]:
        """Compare; return the rows, or the error, of each pair."""
        outcomes: list[Outcome] = []
        decomposed: dict[MatrixRef, Decomposition] = {}
        base = _opened(self.base, None, self.options.stream)
        for label, source, matched in self.todo:
            tuned = _opened(source, self.base, self.options.stream)
            where = f"{matched.key.name} in "
            try:
                W = matched.base.read(base)
                known = decomposed.get(matched.base)
                triple = decompose_pair(
                    W,
                    matched.tuned.read(tuned),
                    ranks=min(self.options.ranks, *matched.base.shape),
                    base=known,
                    update=matched.tuned.delta_factors(tuned),
                    subspace=self.options.k,
                    measures=self.options.taken,
                    names=(where + base.source, where + tuned.source),
                    place=self.place,
                    heads=self.options.heads_of(base, matched),
                    draws=self.options.null_samples,
                )
                rows = _table(label, matched, measure_all(triple, self.options.taken))
            except NonFiniteError as error:
                outcomes.append((label, str(error)))
            else:
                known_base = triple.base if triple.every is None else triple.every
                decomposed = {} if isinstance(known_base, Absent) else {matched.base: known_base}
                outcomes.append((label, rows))
        return outcomes


_OPENED: dict[Any, Checkpoint] = {}


def _opened(source: Source, base: Source | None, stream: bool) -> Checkpoint:
    """A checkpoint of the run that this process is working for, opened once."""
    key = _key(source, base)
    if key not in _OPENED:
        _OPENED[key] = (
            open_checkpoint(source, stream=stream)
            if base is None
            else open_tuned(source, _opened(base, None, stream), stream=stream)
        )
    return _OPENED[key]


@contextmanager
def _opened_here(matched: Matched) -> Iterator[None]:
    """In this process tasks find what is open already; afterwards nothing stays open, since files may change."""
    base = _portable(matched.source)
    mine = {_key(base, None): matched.base}
    mine |= {_key(_portable(source), base): matched.tuned[label] for label, source in matched.sources.items()}
    _OPENED.update(mine)
    try:
        yield
    finally:
        for key in mine:
            _OPENED.pop(key, None)


def _key(source: Source, base: Source | None) -> Any:
    return tuple(x if isinstance(x, str) else id(x) for x in (source, base))


def decompose_pair(
    W: Tensor,
    T: Tensor,
    *,
    ranks: int | None = None,
    base: Decomposition | None = None,
    update: tuple[Tensor, Tensor] | None = None,
    subspace: int = 10,
    measures: Sequence[Measure] | None = None,
    names: tuple[str, str] = ("base", "tuned"),
    place: Place | None = None,
    heads: tuple[int, bool] | None = None,
    draws: int = 0,
) -> Triple:
    """The decompositions of a pretrained matrix W and its finetune T that some measures read.

    Args:
        W: (out, in), pretrained.
        T: (out, in), finetuned.
        ranks: leading ranks whose vectors are wanted; all when None.
        base: the decomposition of W where it is known.
        update: (B, A) with T = W + B A, where the update is known to be of low rank: it is then not formed.
        subspace: number of leading ranks at which principal angles are taken.
        measures: the measures to be taken; those of a comparison without options when None.
        names: what to call the two matrices in an error.
        place: where to compute and what to keep; here, and nothing, when None.
        heads: how many attention heads the matrix is cut into, and whether by columns (an output matrix); None:
            none.
        draws: random updates of each kind to decompose.

    Raises:
        InputError: shapes differ. NonFiniteError: NaN or Inf in either.
    """
    if W.shape != T.shape:
        raise InputError(f"{names[1]}: got shapes {tuple(W.shape)} and {tuple(T.shape)}; want equal ones")
    measures = table() if measures is None else measures
    k = min(W.shape) if ranks is None else ranks
    need = needed(measures, k)
    shape = (W.shape[0], W.shape[1])
    found: dict[str, Decomposition] = {which: Absent(which, shape) for which in need}
    place = place or Place()
    every: SVD | HalfSVD | None = None
    if need["base"] is not None and reads(measures, "every"):
        every = base if isinstance(base, SVD | HalfSVD) else place.decompose_every(W, need["base"], names[0])
        found["base"] = every.truncate(k) if isinstance(every, SVD) else every
    elif need["base"] is not None:
        found["base"] = base or place.decompose(W, need["base"], names[0])
    sums = read_entries(W, T, names)
    if sums.equal:
        found["tuned"] = found["base"]
    elif need["tuned"] is not None:
        found["tuned"] = place.decompose(T, need["tuned"], names[1], start=found["base"])
    if need["delta"] is not None and update is not None and update[0].shape[1] < min(W.shape):
        found["delta"] = low_rank_svd(*update, name=names[1])
    elif need["delta"] is not None:
        found["delta"] = place.decompose(T, need["delta"], names[1], minus=W)
    sampled = _sampled(W, T, k, draws, place, names[0]) if draws and not sums.equal else {}
    return Triple(
        found["base"],
        found["tuned"],
        found["delta"],
        sums.inner,
        subspace,
        sums.norms,
        every,
        _roundings(W, T, sums.figures) if reads(measures, "rounding") else {},
        compare_heads(W, T, *heads) if heads else None,
        sampled,
        sums.figures,
        T,
    )


def _roundings(W: Tensor, T: Tensor, figures: Mapping[str, float]) -> dict[str, Rounding]:
    """What rounding does to base and tuned, in the coarsest format that holds their entries.

    Measured on tuned: the entries of base have about the same sizes.
    """
    base, tuned = (
        BY_PRECISION.get(int(figures.get(f"precision_{which}", 0)), name_of(X.dtype))
        for which, X in (("base", W), ("tuned", T))
    )
    found = rounding_of(T, tuned, base)
    return {"tuned": found, "base": Rounding(base, found.variance)}


def _sampled(
    W: Tensor, T: Tensor, ranks: int, draws: int, place: Place, name: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Alignments of W with W plus random updates: null → (left, right), (draws, k); kept where there is a cache."""
    k = min(ranks, *W.shape)
    kept = None if place.cache is None else Samples(Path(place.cache))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    base: HalfSVD | None = None
    for kind in KINDS:
        key = (W, T, kind, draws, k)
        known = kept.read(*key) if kept else None
        if known is None:
            base = base or half_svd(W.double(), k, name=name)
            start, drawn = base, []
            for seed in range(draws):
                update = draw(kind, W, T, torch.Generator().manual_seed(seed))
                random = half_svd(W.double() + update, k, name=name)
                drawn.append([cosines(start, random, side).alignment for side in SIDES])
            known = (torch.stack([left for left, _ in drawn]), torch.stack([right for _, right in drawn]))
            if kept:
                kept.write(*key, known)
        found[kind] = known
    return found


def _table(label: str, matched: MatrixPair, measured: Iterator[tuple[Measure, Values]]) -> pa.Table:
    """The rows of one matrix of one pair."""
    key = matched.key
    found = list(measured)
    lengths = [len(values.value) for _, values in found]
    n = sum(lengths)
    places = np.arange(max(lengths, default=0), dtype=np.float64)
    whole = {name: np.full(n, np.nan) for name in ("index", "value", "bound", "resolved")}
    stop = 0
    for (measure, values), length in zip(found, lengths, strict=True):
        rows = slice(stop, stop := stop + length)
        whole["value"][rows] = values.value.cpu().numpy()
        if measure.index:
            whole["index"][rows] = values.index or places[:length]
        resolved = values.resolved(relative=measure.unit == "weight")
        if resolved is not None and values.bound is not None:
            whole["bound"][rows] = values.bound.cpu().numpy()
            whole["resolved"][rows] = resolved.cpu().numpy()
    whole["index"][whole["index"] < 0] = np.nan
    names = [measure.name for measure, _ in found]
    one = np.zeros(n, np.int32)
    # Words as codes at once: a list of equal strings takes longer to encode than many measures to compute.
    arrays: dict[str, Any] = {
        name: pa.DictionaryArray.from_arrays(one, [word])
        for name, word in {"pair": label, "matrix": key.name, "stack": key.stack, "role": key.role}.items()
    }
    arrays["measure"] = pa.DictionaryArray.from_arrays(
        np.repeat(np.arange(len(names), dtype=np.int32), lengths), names
    )
    out, into = matched.base.shape
    numbers = {"block": key.block, "out_features": out, "in_features": into}
    arrays |= {name: pa.repeat(pa.scalar(v, store.SCHEMA.field(name).type), n) for name, v in numbers.items()}
    # A bound of NaN is one of a NaN figure; where there is none at all, resolved is NaN as well.
    missing = {"index": np.isnan(whole["index"]), "bound": np.isnan(whole["resolved"])}
    missing["resolved"] = missing["bound"]
    arrays |= {name: pa.array(values, mask=missing.get(name)) for name, values in whole.items()}
    return pa.table([arrays[name].cast(store.SCHEMA.field(name).type) for name in store.SCHEMA.names], store.SCHEMA)


# --- what goes into the manifest --------------------------------------------------------------------------------


def _portable(source: Source) -> Source:
    """A source that means the same in a worker process."""
    return str(source) if isinstance(source, Path) else source


def _config(options: Options, labels: list[str], provenance: list[dict[str, Any]]) -> dict[str, Any]:
    """What makes two comparisons the same: contents, not paths, and every option that changes a number."""
    return {
        "algorithm": ALGORITHM,
        "base": provenance[0]["sha256"],
        "tuned": {label: about["sha256"] for label, about in zip(labels, provenance[1:], strict=True)},
        **options.config(),
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
            *provenance.get("notes", ()),
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
    whole = joined_sha256(checkpoint, [file["sha256"] for file in files])
    found = {"source": checkpoint.source, "sha256": whole, "files": files}
    remote = {"revision": checkpoint.revision, "digests": dict(checkpoint.digests), "notes": list(checkpoint.notes)}
    return found | {name: value for name, value in remote.items() if value}


def _known_hashes(folder: Path) -> dict[str, Any]:
    """Hashes that an earlier run of the same folder found, by path."""
    if not (folder / "manifest.json").is_file():
        return {}
    manifest = store.load(folder).manifest
    sources = [manifest.get("base", {}), *(about["tuned"] for about in manifest.get("pairs", {}).values())]
    return {file["path"]: file for source in sources for file in source.get("files", [])}


def _nothing_in_common(base: Checkpoint, pairings: Mapping[str, Pairing]) -> str:
    label, pairing = next(iter(pairings.items()))
    keys = [m.key for each in pairings.values() for m in each.matched]
    if keys:
        roles = ", ".join(role for role in ROLES if any(key.role == role for key in keys))
        blocks = sorted({key.block for key in keys if key.block is not None})
        there = f"roles {roles}" + (f"; blocks {blocks[0]} to {blocks[-1]}" if blocks else "; no blocks")
        return f"{base.source} and {label}: no matrix to compare: roles, blocks and name leave none of {there}"
    reasons = "; ".join(dict.fromkeys(s.reason for s in pairing.skipped))
    return f"{base.source} and {label}: no matrix to compare ({reasons[:300]})"
