"""`track`: a training seen through its checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from specbasis.cli.common import line, note, progress
from specbasis.cli.flags import OUT
from specbasis.core.text import number_of
from specbasis.tracking.options import TrackOptions

RUN = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="folder with numbered checkpoints, 'hub:org/name@step*', or several sources"
    ),
]


def track(run: RUN, out: OUT, options: TrackOptions) -> None:
    """Alignment of every checkpoint of a training to the first, the last and the one before, with a figure."""
    from specbasis.figures.tracking import write_track_figure
    from specbasis.tracking.track import track as follow

    with progress() as tell:
        tracking = follow(run[0] if len(run) == 1 else run, out, options, progress=tell)
    about = tracking.manifest
    matrices = about["pairs"]["checkpoints"]["matrices"]
    rows = tracking.rows.num_rows
    line(
        f"{number_of(len(about['checkpoints']), 'checkpoint')}, {number_of(len(matrices), 'matrix')}, "
        f"{number_of(rows, 'row')} in {out}"
    )
    for source in about["passed_over"]:
        line(f"passed over: {source['source']}: {source['reason']}", style="yellow")
    for text in about["notes"]:
        note(text)
    for failure in about["failed"]:
        line(f"failed: {failure['checkpoint']}: {failure['error']}", style="yellow")
    for path in write_track_figure(tracking):
        line(f"figure: {path}")
