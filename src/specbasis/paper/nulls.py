"""Alignment beside that under a random update of equal size, matrix by matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from specbasis.core.entries import LEAST_SIDE
from specbasis.figures.data import SIDES
from specbasis.paper.material import ALIGNED, Floats, Material, Records, recipe

RANGES = {"1-10": (0, 10), "11-30": (10, 30), "31-": (30, None)}
"""Ranges of 1-based ranks, and their slices."""

FIGURES: dict[str, tuple[str, Callable[[Floats], Floats]]] = {
    "alignment": ("alignment", lambda values: np.nanmean(values, axis=1)),
    "gaussian": ("null_alignment_gaussian", lambda values: np.nanmean(values, axis=1)),
    "predicted": ("predicted_alignment", lambda values: np.nanmean(values, axis=1)),
    "factor": ("rotation_factor", lambda values: np.nanmedian(values, axis=1)),
    "size_share": ("size_share", lambda values: np.nanmedian(values, axis=1)),
    "spared": ("p_gaussian", lambda values: np.nanmean(np.where(np.isnan(values), np.nan, values < 0.01), axis=1)),
    "turned": ("p_gaussian", lambda values: np.nanmean(np.where(np.isnan(values), np.nan, values > 0.99), axis=1)),
}
"""Column → the measure that it is of, and what of the ranks of a range it is."""

MEASURES = dict.fromkeys(f"{measure}_{side}" for measure, _ in FIGURES.values() for side in SIDES)


@recipe("§4.2", "size or direction, matrix by matrix", *dict.fromkeys((*ALIGNED, *MEASURES)), is_table=True)
def nulls(material: Material) -> tuple[None, Records]:
    """What a Gaussian update of equal norm leaves and does, for each matrix, side and range of ranks."""
    table: Records = []
    for model in material.models:
        pair = model.pair
        moved, rsd = pair.whole("relative_update"), pair.whole("rsd")
        for side in SIDES:
            columns = {name: _by_range(pair.measure(f"{of}_{side}").dense(), mean) for name, (of, mean) in
                FIGURES.items()}  # fmt: skip
            for i, name in enumerate(pair.matrices["name"]):
                if not moved[i] > 0 or min(pair.matrices["out"][i], pair.matrices["in"][i]) < LEAST_SIDE:
                    continue
                about = {"pair": model.name, "matrix": name, "role": pair.matrices["role"][i], "side": side}
                for ranks in RANGES:
                    values = {"rsd": float(rsd[i])} | {
                        column: float(of_range[ranks][i]) for column, of_range in columns.items()
                    }
                    if np.isfinite(values["alignment"]):
                        table.append(about | {"ranks": ranks, "relative_update": float(moved[i])} | values)
    return None, table


def _by_range(values: Floats, mean: Callable[[Floats], Floats]) -> dict[str, Floats]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a matrix has no rank in a range
        return {ranks: mean(values[:, slice(*ends)]) for ranks, ends in RANGES.items()}
