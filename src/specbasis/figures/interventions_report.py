"""What a grid of interventions looks like: its figures and the table of sharing, beside its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from specbasis.checkpoint.atomic import write_whole
from specbasis.core.errors import InputError
from specbasis.interventions.grid import read_grid
from specbasis.interventions.sharing import overlaps, sharing
from specbasis.jobs.cache import Cache
from specbasis.jobs.cost import cache_folder

OVERLAPS = "overlaps.json"
"""Overlap of every two models' leading subspaces: the one thing that rows do not hold."""


def write_figures(
    folder: str | Path,
    names: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    out: str | Path | None = None,
    models: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
) -> list[Path]:
    """Draw figures of a grid from its rows, as PNG and SVG.

    Args:
        folder: of the grid.
        names: keys of `specbasis.figures.interventions.PLOTS`, or ``sharing``; all that the rows allow when empty.
        only: labels of the models to show.
        out: where to write; ``figures`` in the folder when None. Tables go beside the rows.
        models: label → checkpoint, ``base`` among them: overlaps of subspaces are then measured and kept in the
            folder, where a later call finds them.
        cache: folder of decompositions, for that.

    Raises:
        InputError: no grid there, a library of the extra ``report`` is missing, or a named figure has nothing to
            show.
    """
    try:
        from specbasis.figures import interventions as figures
    except ImportError as error:
        raise InputError(f"figures need {error.name}: pip install 'specbasis[report]'") from error
    folder, rows_and_metrics = Path(folder), read_grid(folder)
    rows, metrics = rows_and_metrics
    target = folder / "figures" if out is None else Path(out)
    written: list[Path] = []
    for name in names or (*figures.PLOTS, "sharing"):
        try:
            if name != "sharing":
                parts = list(figures.draw(name, rows, metrics, only))
            else:
                cells = [row.experiment for row in rows if row.experiment["kind"] == "swap"]
                groups = list(dict.fromkeys(cell["roles"] for cell in cells))
                sizes = list(dict.fromkeys(cell["ranks"] for cell in cells))
                known = _overlaps(folder, groups, sizes, models, cache)
                table = sharing(rows, metrics, overlaps=known)
                middle = 30 if 30 in sizes else sizes[len(sizes) // 2]
                parts = list(figures.draw_sharing(table, groups[0], middle))
                written.append(_write(folder / "sharing.csv", figures.sharing_csv(table).encode()))
        except InputError:
            if names:
                raise
            continue  # not every grid holds what every figure shows
        written += [_write(target / file, content) for file, content in parts]
    return written


def _overlaps(
    folder: Path,
    groups: Sequence[str],
    sizes: Sequence[int | str],
    models: Mapping[str, str] | None,
    cache: str | Path | None,
) -> dict[tuple[str, str, str, int | str], tuple[float, float]]:
    path = folder / OVERLAPS
    if models is not None:
        kept = Cache(Path(cache) if cache is not None else cache_folder() / "factors")
        found = overlaps(models, groups, sizes, factors=lambda W, name: kept.decompose(W, name=name))
        lines = [[*key, *value] for key, value in found.items()]
        _write(path, (json.dumps(lines, indent=0, ensure_ascii=False) + "\n").encode())
    if not path.exists():
        return {}
    try:
        return {(a, b, c, d): (x, y) for a, b, c, d, x, y in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error}); delete it and run the grid again") from error


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
    return path
