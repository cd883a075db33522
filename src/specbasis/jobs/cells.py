"""A grid of experiments: each cell runs once, and its row is on disk when it ends.

A folder holds `manifest.json` (configuration; versions, commit, machine and command of the runs, anew whenever one
of these changed) and `rows.jsonl`, one line for each cell: `{"cell": …, "values": …}` or `{"cell": …, "error": …}`,
with seconds, time and commit beside it. Tables and figures are made from rows alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specbasis.checkpoint.atomic import writing
from specbasis.core.errors import InputError
from specbasis.jobs.folder import ALWAYS, Folder, Kind, environment, opened

GRID = Kind("grid", version=("cells", 1), keys=("config", "runs"))

Cell = Mapping[str, Any]
"""What tells one experiment of a grid from the others: a flat dictionary of JSON values."""


@dataclass(frozen=True)
class Progress:
    """What a caller is told as work goes on: how much of it is done (in any unit), and what was done last."""

    done: float
    total: float
    name: str


@dataclass(frozen=True)
class Row:
    """One cell that ran.

    Attributes:
        cell: its identity.
        values: what it gave; empty where it failed. A value that is not finite is None.
        error: why it failed, in one line; None where it did not.
        seconds: wall time.
        written: when it ended (UTC).
        commit: of this package, where it ran from a git checkout.
    """

    cell: dict[str, Any]
    values: dict[str, Any]
    error: str | None
    seconds: float
    written: str
    commit: str | None


def run_cells(
    cells: Sequence[Cell],
    run: Callable[[dict[str, Any]], Mapping[str, Any]],
    out: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    uses: Sequence[str] = (),
    workers: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> list[Row]:
    """Run the cells of a grid that have not run yet, in their order, and write each as it ends.

    A cell that raises is marked with its error and the grid goes on; the next run tries it again. A run that was
    killed loses the cells that were under way, no others. Several lists of cells may share a folder.

    Args:
        cells: what is to run; equal cells run once.
        run: a cell's experiment: its values, by name. With several workers it is pickled: a function of a module,
            or a `functools.partial` of one.
        out: folder of the rows, new or of the same configuration.
        config: what all cells share, for the manifest; another one in the same folder is refused.
        uses: modules that the experiments load, whose versions the manifest is to have; see `folder.environment`.
        workers: processes side by side, each with its share of the cores' threads.
        progress: called before the first cell and after each.

    Returns:
        The rows of these cells, in their order; a cell that failed has an error.

    Raises:
        InputError: the folder holds another grid or something else, is in use by another run, or cannot be written.
    """
    folder, wanted = Path(out), {_key(cell): dict(cell) for cell in cells}
    with opened(folder, GRID, config or {}) as kept:
        _note_run(kept, uses)
        have = {_key(row.cell): row for row in _read(folder, mend=True)}
        todo = [key for key in wanted if key not in have or have[key].error is not None]
        done, total = len(wanted) - len(todo), len(wanted)
        tell = progress or (lambda _: None)
        tell(Progress(done, total, "" if not todo else _name(wanted[todo[0]])))
        for row in _run(run, [wanted[key] for key in todo], workers):
            _append(folder, row)
            have[_key(row.cell)] = row
            done += 1
            tell(Progress(done, total, _name(row.cell)))
    return [have[key] for key in wanted]


def read_cells(out: str | Path) -> list[Row]:
    """The rows of a grid's folder, the latest of each cell, in the order in which cells first ended.

    Raises:
        InputError: no grid there, or a damaged line (a last line that was cut off by a kill is passed over).
    """
    folder = Path(out)
    GRID.read(folder)
    return list({_key(row.cell): row for row in _read(folder)}.values())


def _run(
    run: Callable[[dict[str, Any]], Mapping[str, Any]], cells: Sequence[dict[str, Any]], workers: int
) -> Iterator[Row]:
    if workers == 1 or len(cells) < 2:
        for cell in cells:
            yield _row(run, cell)
        return
    from loky import ProcessPoolExecutor

    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = [pool.submit(_row, run, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, kill_workers=True)


def _row(run: Callable[[dict[str, Any]], Mapping[str, Any]], cell: dict[str, Any]) -> Row:
    started, values, error = time.perf_counter(), {}, None
    try:
        values = _plain(dict(run(dict(cell))))
    except Exception as failure:  # whatever an experiment may raise, the others go on
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    seconds = time.perf_counter() - started
    now = environment()
    return Row(cell, values, error, round(seconds, 3), now["written"], now["commit"])


def _plain(value: Any) -> Any:
    """As JSON has it: what is not a finite number becomes None, a tensor or an array a list."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _key(cell: Cell) -> str:
    return json.dumps(_plain(dict(cell)), sort_keys=True)


def _name(cell: Cell) -> str:
    return " ".join(str(value) for value in cell.values())


def _append(folder: Path, row: Row) -> None:
    outcome = {"values": row.values} if row.error is None else {"error": row.error}
    about = {"seconds": row.seconds, "written": row.written, "commit": row.commit}
    text = json.dumps({"cell": _plain(row.cell)} | outcome | about, ensure_ascii=False) + "\n"
    path = folder / "rows.jsonl"
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path, *, mend: bool = False) -> Iterator[Row]:
    """Rows as they were written; what a kill left of a last line is passed over, and with `mend` cut off."""
    path = folder / "rows.jsonl"
    if not path.exists():
        return
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if mend and whole != text:
        with writing(path), path.open("r+b") as file:
            file.truncate(len(whole))
    for number, one in enumerate(whole.splitlines(), start=1):
        try:
            found = json.loads(one)
            yield Row(
                found["cell"],
                found.get("values", {}),
                found.get("error"),
                found["seconds"],
                found["written"],
                found["commit"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: line {number} is damaged ({error}); delete this line and run again"
            ) from error


def _note_run(folder: Folder, uses: Sequence[str]) -> None:
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
