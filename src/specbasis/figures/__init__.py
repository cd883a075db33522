"""Results -> pictures, tables and pages, and nothing else: from rows and manifests, never from a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from specbasis.checkpoint.atomic import write_whole
from specbasis.core.errors import InputError
from specbasis.core.extras import require

if TYPE_CHECKING:
    from specbasis.comparison.comparison import Comparison


def write_report(comparison: Comparison, path: Path, *, figures: bool = True) -> Path:
    """Write the page of a comparison to ``path``, and its figures to a folder `figures` beside it.

    Args:
        comparison: its manifest, rows, verdicts and findings; nothing is measured.
        path: the page's file.
        figures: whether to write the folder beside it; the page holds what it shows.

    Returns:
        The page's path.

    Raises:
        InputError: the libraries of the extra ``report`` are missing, or ``path`` cannot be written.

    Equal rows and manifests give equal files, byte for byte, with equal versions of the libraries.
    """
    require("jinja2", "matplotlib", extra="report", purpose="the report needs")
    from specbasis.figures import alignment, update  # noqa: F401 - the figures that `draw` draws
    from specbasis.figures.data import read_pairs
    from specbasis.figures.drawing import draw
    from specbasis.figures.page import render

    if path.is_dir():
        raise InputError(f"{path}: is a folder; want the file for the page, such as {path / 'report.html'}")
    pairs = read_pairs(comparison)
    write_whole(path, render(comparison, pairs))
    for name, content in draw(pairs) if figures else ():
        write_whole(path.parent / "figures" / name, content)
    return path
