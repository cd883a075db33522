"""`spectra`: heavy tails, random-matrix bulk and ranks of one model."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

import specbasis
from specbasis.cli.common import STDOUT, STREAM, line
from specbasis.core.errors import InputError


def spectra(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a checkpoint, as in compare")],
    csv_file: Annotated[Path | None, typer.Option("--csv", help="write every figure to this file")] = None,
    stream: STREAM = False,
) -> None:
    """Print the power-law exponent, Marchenko-Pastur spikes and ranks of every weight matrix of one model."""
    from specbasis.comparison.spectra import spectra as found_in

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("matrix", "alpha", "D", "tail", "spikes", "log norm", "stable", "effective"):
        table.add_column(heading, justify="left" if heading == "matrix" else "right", overflow="fold")
    rows: list[dict[str, Any]] = []
    for key, (out, into), s in found_in(specbasis.open_checkpoint(model, stream=stream)):
        rows.append({"matrix": key.name, "role": key.role, "block": key.block, "out": out, "in": into, **asdict(s)})
        ranks = f"{s.stable_rank:.1f}", f"{s.effective_rank:.1f}"
        table.add_row(
            key.name, f"{s.alpha:.2f}", f"{s.distance:.3f}", str(s.tail), str(s.spikes), f"{s.log_norm:.2f}", *ranks
        )
    STDOUT.print(table)
    line("alpha: exponent of the eigenvalues' tail; D: its distance; spikes: eigenvalues above Marchenko-Pastur")
    if csv_file is not None and rows:
        try:
            with csv_file.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise InputError(f"{csv_file}: cannot be written ({error.strerror}); choose another file") from error
        line(f"figures: {csv_file}")
