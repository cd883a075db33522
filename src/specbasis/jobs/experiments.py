"""A grid of experiments: each runs once, and its row is on disk when it ends.

A results folder (see `jobs.folder`) whose manifest has the environment of the runs, anew whenever it changed, and
beside it `rows.jsonl`, a line for each experiment: `{"cell": …, "values": …}` or `{"cell": …, "error": …}`, with
seconds, time, commit and a seal. Tables and figures are made from rows alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbasis.checkpoint.atomic import writing
from specbasis.checkpoint.digest import proven, sealed
from specbasis.checkpoint.regular import parse_json, read_bytes
from specbasis.core.errors import InputError, told
from specbasis.jobs.environment import ALWAYS, environment
from specbasis.jobs.folder import Folder, Kind, opened, plain
from specbasis.jobs.progress import Progress, Report, silent

GRID = Kind("grid", version=("cells", 1), keys=("config", "runs"), form={"runs": [{"versions": {}}]})

ROWS = "rows.jsonl"

Experiment = Mapping[str, Any]
"""What tells one experiment of a grid from the others: a flat dictionary of JSON values."""

Run = Callable[[dict[str, Any]], Mapping[str, Any]]
"""From an experiment to its values, by name."""


@dataclass(frozen=True)
class Row:
    """One experiment that ran.

    Attributes:
        experiment: its identity.
        values: what it gave; empty where it failed. A value that is not finite is None.
        error: why it failed, in one line; None where it did not.
        seconds: wall time.
        written: when it ended (UTC).
        commit: of this package, where it ran from a git checkout.
    """

    experiment: dict[str, Any]
    values: dict[str, Any]
    error: str | None
    seconds: float
    written: str
    commit: str | None

    @classmethod
    def parse(cls, line: bytes) -> Row:
        """The row that a line holds; ValueError where it is not what was written."""
        stored = proven(parse_json(line))
        about = (stored[name] for name in ("seconds", "written", "commit"))
        return cls(stored["cell"], stored.get("values", {}), stored.get("error"), *about)

    def line(self) -> str:
        """The row as a line of the file."""
        outcome = {"values": self.values} if self.error is None else {"error": self.error}
        about = {"seconds": self.seconds, "written": self.written, "commit": self.commit}
        return json.dumps(sealed({"cell": plain(self.experiment)} | outcome | about), ensure_ascii=False) + "\n"


def run_experiments(
    experiments: Sequence[Experiment],
    run: Run,
    out: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    uses: Iterable[str] = (),
    workers: int = 1,
    progress: Report | None = None,
    prepare: Callable[[Experiment], object] | None = None,
) -> list[Row]:
    """Run the experiments of a grid that have not run yet, in their order, and write each as it ends.

    One that raises is marked with its error and the grid goes on; the next call tries it again. A call that was
    killed loses the experiments that were under way, no others. Several lists of experiments may share a folder.

    Args:
        experiments: what is to run; equal ones run once.
        run: gives an experiment's values. With several workers it is pickled: a function of a module, or a
            `functools.partial` of one.
        out: folder of the rows, new or of the same configuration.
        config: what all experiments share, for the manifest; another one in the same folder is refused.
        uses: modules that experiments load, whose versions the manifest is to have; see `folder.environment`.
        workers: processes side by side, each with its share of the cores' threads.
        progress: called before the first experiment and after each.
        prepare: called with each experiment that is to run, before the first of them does: what it raises, such as
            that data cannot be had, stops the grid instead of failing one experiment after the other.

    Returns:
        The rows of these experiments, in their order; one that failed has an error.

    Raises:
        InputError: the folder holds another grid or something else, is in use by another run, or cannot be written.
    """
    wanted = {_key(experiment): dict(experiment) for experiment in experiments}
    report = progress or silent
    with opened(Path(out), GRID, config or {}) as folder:
        _note_run(folder, uses)
        rows = {_key(row.experiment): row for row in _read(folder.folder, mend=True)}
        todo = [key for key in wanted if key not in rows or rows[key].error is not None]
        for key in todo if prepare else ():
            prepare(wanted[key])
        done, total = len(wanted) - len(todo), len(wanted)
        report(Progress(done, total, _name(wanted[todo[0]]) if todo else ""))
        for row in _run(run, [wanted[key] for key in todo], workers):
            _append(folder.folder, row)
            rows[_key(row.experiment)] = row
            done += 1
            report(Progress(done, total, _name(row.experiment)))
    return [rows[key] for key in wanted]


def read_experiments(out: str | Path) -> list[Row]:
    """The rows of a grid's folder, the latest of each experiment, in the order in which they first ended.

    Raises:
        InputError: no grid there, or a damaged line (a last line that was cut off by a kill is passed over).
    """
    GRID.read(Path(out))
    return list({_key(row.experiment): row for row in _read(Path(out))}.values())


def _run(run: Run, experiments: Sequence[dict[str, Any]], workers: int) -> Iterator[Row]:
    if workers == 1 or len(experiments) < 2:
        for experiment in experiments:
            yield _row(run, experiment)
        return
    import torch
    from loky import ProcessPoolExecutor

    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = [pool.submit(_row, run, experiment) for experiment in experiments]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, kill_workers=True)


def _row(run: Run, experiment: dict[str, Any]) -> Row:
    started, values, error = time.perf_counter(), {}, None
    try:
        values = plain(dict(run(dict(experiment))))
    except Exception as failure:  # whatever an experiment may raise, the others go on
        error = told(failure)
    seconds = time.perf_counter() - started
    now = environment()
    return Row(experiment, values, error, round(seconds, 3), now["written"], now["commit"])


def _key(experiment: Experiment) -> str:
    return json.dumps(plain(dict(experiment)), sort_keys=True)


def _name(experiment: Experiment) -> str:
    return " ".join(str(value) for value in experiment.values())


def _append(folder: Path, row: Row) -> None:
    path = folder / ROWS
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(row.line())
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path, *, mend: bool = False) -> Iterator[Row]:
    """Rows as they were written; what a kill left of a last line is passed over, and with `mend` cut off."""
    path = folder / ROWS
    if not path.exists():
        return
    text = read_bytes(path, limit=None)
    complete = text[: text.rfind(b"\n") + 1]
    if mend and complete != text:
        with writing(path), path.open("r+b") as file:
            file.truncate(len(complete))
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            yield Row.parse(line)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is damaged ({error}); delete this line and run again"
            ) from error


def _note_run(folder: Folder, uses: Iterable[str]) -> None:
    """Put versions, commit, machine and command into the manifest, unless those of the last run are the same."""
    now = environment(uses)
    runs = folder.manifest.setdefault("runs", [])
    if runs and _is_same(runs[-1], now):
        runs[-1]["versions"] |= now["versions"]
    else:
        runs.append(now)
    folder.write_manifest()


def _is_same(last: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two runs had the same environment; a package that only one of them has loaded makes no difference."""
    versions = last["versions"]
    agree = all(
        versions.get(name, None if name in ALWAYS else number) == number for name, number in now["versions"].items()
    )
    return agree and all(last[key] == now[key] for key in ("commit", "machine", "command"))
