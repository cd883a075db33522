"""The report of a comparison: rows -> figures (PNG, SVG) and one self-contained page. Never touches a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from specbasis.checkpoint.atomic import write_whole
from specbasis.core.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

    from specbasis.jobs.results import Results


def write_report(results: Results, rows: pa.Table, path: Path) -> Path:
    """Write the page to ``path`` and the figures to a folder `figures` beside it.

    Args:
        results: the results folder, for its manifest.
        rows: its rows; nothing else is measured.
        path: the page's file.

    Returns:
        The page's path.

    Raises:
        InputError: the libraries of the extra ``report`` are missing, or ``path`` cannot be written.

    Equal rows and manifests give equal files, byte for byte, with equal versions of the libraries.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the report needs {error.name}, which is not installed: pip install 'specbasis[report]'"
        ) from error
    from specbasis.figures import data, figures, page

    if path.is_dir():
        raise InputError(f"{path}: is a folder; want the file for the page, such as {path / 'report.html'}")
    present = set(rows["pair"].unique().to_pylist())
    labels = [label for label in results.manifest["pairs"] if label in present]
    own = tuple(measure["name"] for measure in results.manifest.get("measures", []))
    pairs = data.read_pairs(rows, labels, own)
    bands = [data.bands(pair) for pair in pairs]
    write_whole(path, page.render(results.manifest, pairs, bands))
    for name, content in figures.draw(pairs, bands):
        write_whole(path.parent / "figures" / name, content)
    return path
