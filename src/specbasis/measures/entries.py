"""Entries: what one reading of both matrices says, without any decomposition."""

from __future__ import annotations

import math
from functools import partial

from specbasis.measures.measure import PAIR, measure
from specbasis.measures.triple import Triple

of_entries = partial(measure, shown="rows")


@of_entries(
    "weight_cosine_z",
    "cosine against that of rows, or of columns, in random order, whichever is smaller; independent units: 0 ± 1; "
    "absent where a side is shorter than 64",
    formula="(⟨W, W̃⟩ − its mean) / its standard deviation over random orders",
    unit="standard deviations",
    source="Hoeffding 1951",
)
def weight_cosine_z(t: Triple) -> float:
    """By how many standard deviations rows and columns correspond; see `specbasis.core.entries`."""
    return t.figures.get("weight_cosine_z", math.nan)


@of_entries("equal_entries", "share of entries that are equal")
def equal_entries(t: Triple) -> float:
    """Share of entries that are equal, 0 … 1."""
    return t.figures.get("equal_entries", math.nan)


@of_entries(
    "equal_entries_rounded", "share that is equal once both are rounded to the coarser of the two precisions"
)
def equal_entries_rounded(t: Triple) -> float:
    """Share of entries that are equal in the coarser precision, 0 … 1."""
    return t.figures.get("equal_entries_rounded", math.nan)


@of_entries(
    "precision_{which}",
    "significant bits of the coarsest of bfloat16 (8), float16 (11), float32 (24), float64 (53) that holds every "
    "entry of {which}",
    unit="bits",
    which=PAIR,
)
def precision(t: Triple, which: str) -> float:
    """Significant bits of the coarsest format that holds every entry."""
    return t.figures.get(f"precision_{which}", math.nan)


@of_entries("zero_entries_{which}", "share of entries of {which} that are 0", which=PAIR)
def zero_entries(t: Triple, which: str) -> float:
    """Share of entries that are zero, 0 … 1."""
    return t.figures.get(f"zero_entries_{which}", math.nan)


@of_entries(
    "grid_levels_{which}",
    "median number of levels that the entries of 32 neighbours span on a uniform grid, as after quantising; absent "
    "where those of {which} lie on none",
    which=PAIR,
)
def grid_levels(t: Triple, which: str) -> float:
    """Levels of the grid of a quantiser."""
    return t.figures.get(f"grid_levels_{which}", math.nan)


@of_entries(
    "equal_entries_grid",
    "share of sampled groups of 32 in which base rounds to tuned on that grid; absent without one",
)
def equal_entries_grid(t: Triple) -> float:
    """Share of sampled groups in which base rounds to tuned on the grid of tuned, 0 … 1."""
    return t.figures.get("equal_entries_grid", math.nan)
