"""Compare a base checkpoint with its finetunes: the job that loops over matrices and writes rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loky import cpu_count
from torch import Tensor

from specbasis.comparison.comparison import Comparison
from specbasis.comparison.matched import Matched
from specbasis.comparison.options import Options
from specbasis.comparison.task import Outcome, Task
from specbasis.core.blocks import device_named
from specbasis.core.brief import brief
from specbasis.core.errors import InputError
from specbasis.core.options import takes
from specbasis.jobs import engine as engines
from specbasis.jobs.cost import makespan, rates
from specbasis.jobs.progress import Report
from specbasis.jobs.results import COMPARISON, Results, load
from specbasis.measures.own import OwnMeasure

Source = str | Path | Mapping[str, Tensor]
"""What a checkpoint can be called; see `specbasis.checkpoint.open_checkpoint`."""


@takes(Options)
def compare(
    base: Source,
    tuned: Source | Sequence[Source] | Mapping[str, Source],
    out: str | Path | None = None,
    options: Options | None = None,
    *,
    progress: Report | None = None,
    **keywords: Any,
) -> Comparison:
    """Measure what finetuning changed in the singular vectors and values of every weight matrix.

    Each worker holds one matrix at a time, and base is decomposed once for all tuned checkpoints. Rows are written
    as each matrix ends; the same call on the same folder skips what is done.

    Args:
        base: the pretrained checkpoint; see `specbasis.checkpoint.open_checkpoint` for what a source can be.
        tuned: one or several finetunes of it: checkpoints, or PEFT adapters trained on it, whose low-rank updates
            are decomposed without being formed. ``"NAME=PATH"``, or a mapping from names, names a pair.
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
    device_named(chosen.device)
    workers = chosen.workers or (cpu_count() if chosen.device == "cpu" else 1)
    matched = Matched.open(base, tuned, chosen)
    if matched.in_memory and chosen.engine in ("processes", "ray"):
        raise InputError(
            f"tensors in memory cannot reach engine {chosen.engine!r}; write them to a file, or use threads"
        )
    local = matched.in_memory or not _portable_measures(chosen.own, chosen.engine)
    kept = tempfile.TemporaryDirectory(prefix="specbasis-") if out is None else None
    unchanged = matched.watched()  # from before the files are hashed until their rows are kept
    with matched.results(Path(kept.name) if kept else Path(str(out))) as results:
        tasks = matched.tasks(results)
        running = engines.run(
            tasks, workers=workers, memory=chosen.budget, engine=chosen.engine, local=local, progress=progress
        )
        # Closed here, not when the garbage collector comes: an error's traceback would keep the workers busy.
        with results.timed(len(tasks), workers), matched.sharing(), closing(running):
            _write(results, running, unchanged)
    if not any(
        results.part(label, m.key.name).exists() for label, p in matched.pairings.items() for m in p.matched
    ):
        raise InputError(f"every matrix failed; the first: {results.manifest['failed'][0]['error']}")
    return Comparison(results, results.rows(), kept)


def _write(results: Results, running: Iterable[tuple[Task, list[Outcome]]], unchanged: Callable[[], None]) -> None:
    """Put the rows of each task on disk as it ends, and into the manifest what failed.

    Raises:
        InputError: the weights that they were computed from are no longer those that were hashed.
    """
    for task, outcomes in running:
        unchanged()
        for label, outcome in outcomes:
            if isinstance(outcome, str):
                results.part(label, task.name).unlink(missing_ok=True)  # a damaged one, which is not to be read
                failure = {"pair": label, "matrix": task.name, "size": prod(task.shape), "error": outcome}
                results.manifest["failed"].append(failure)
            else:
                results.write(label, task.name, outcome)
    results.manifest["failed"].sort(key=lambda failure: (failure["pair"], failure["matrix"]))


@brief
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
        seconds = [task.work.seconds(rates()) for task in self.tasks]
        return makespan(seconds, self.workers) if seconds else 0.0

    @property
    def bytes(self) -> int:
        """Predicted peak memory of the tasks that run together."""
        largest = sorted((task.bytes for task in self.tasks), reverse=True)
        return max(min(sum(largest[: self.workers]), self.memory), *largest[:1], 0)


@takes(Options)
def plan(
    base: Source,
    tuned: Source | Sequence[Source] | Mapping[str, Source],
    out: str | Path | None = None,
    options: Options | None = None,
    **keywords: Any,
) -> Plan:
    """What `compare` with the same arguments would do, from headers alone; nothing is decomposed or written."""
    chosen = Options.of(options, keywords)
    folder = None if out is None else Path(str(out))
    begun = folder is not None and (folder / COMPARISON.manifest).is_file()
    tasks = Matched.open(base, tuned, chosen).tasks(load(folder) if folder and begun else None)
    budget = engines.free_memory() // 2 if chosen.budget is None else chosen.budget
    return Plan(tuple(tasks), chosen.workers or cpu_count(), budget)


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
