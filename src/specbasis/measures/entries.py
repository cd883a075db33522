"""Entries: what one reading of both matrices says, without any decomposition.

Each is a figure of `specbasis.core.entries.read_entries`, absent where it has none.
"""

from __future__ import annotations

import math
from functools import partial

from specbasis.measures.measure import PAIR, measure
from specbasis.measures.triple import Triple

of_entries = partial(measure, shown="rows")
of_each = partial(of_entries, variants={"which": PAIR})


@of_entries(
    formula="(⟨W, W̃⟩ − its mean) / its standard deviation over random orders",
    unit="standard deviations",
    source="Hoeffding 1951",
)
def weight_cosine_z(t: Triple) -> float:
    """Cosine against that of rows, or of columns, in random order, whichever is smaller; independent units: 0 ± 1;
    absent where a side is shorter than 8.
    """
    return t.figures.get("weight_cosine_z", math.nan)


@of_entries(formula="‖W C‖ ‖W̃ C‖ / the same standard deviation, C the centring of what is ordered")
def weight_cosine_z_limit(t: Triple) -> float:
    """The most that weight_cosine_z could be, of a copy; the ratio of both is a cosine without the means."""
    return t.figures.get("weight_cosine_z_limit", math.nan)


@of_entries()
def equal_entries(t: Triple) -> float:
    """Share of entries that are equal."""
    return t.figures.get("equal_entries", math.nan)


@of_entries()
def equal_entries_rounded(t: Triple) -> float:
    """Share of entries that are equal once both are rounded to the coarser of the two precisions."""
    return t.figures.get("equal_entries_rounded", math.nan)


@of_each(unit="bits")
def precision(t: Triple, which: str) -> float:
    """Significant bits of the coarsest of bfloat16 (8), float16 (11), float32 (24), float64 (53) that holds every
    entry of {which}.
    """
    return t.figures.get(f"precision_{which}", math.nan)


@of_each()
def zero_entries(t: Triple, which: str) -> float:
    """Share of entries of {which} that are 0."""
    return t.figures.get(f"zero_entries_{which}", math.nan)


@of_each()
def grid_levels(t: Triple, which: str) -> float:
    """Median number of levels that the entries of 32 neighbours in {which} span on a uniform grid, as after
    quantising; absent where they lie on none.
    """
    return t.figures.get(f"grid_levels_{which}", math.nan)


@of_entries()
def equal_entries_grid(t: Triple) -> float:
    """Share of sampled groups of 32 in which one side rounds to the other on its grid; absent without one."""
    return t.figures.get("equal_entries_grid", math.nan)


@of_each(formula="√(Σ width²/12) / ‖W‖_F")
def rounding_noise(t: Triple, which: str) -> float:
    """Size of rounding to the levels of {which} where it is stored quantised; absent elsewhere."""
    return t.figures.get(f"rounding_noise_{which}", math.nan)


@of_entries()
def beyond_rounding(t: Triple) -> float:
    """Share of entries that do not round to those of the quantised side; absent where neither is quantised."""
    return t.figures.get("beyond_rounding", math.nan)


@of_entries(formula="P(Binomial(n, 0.0001) ≥ n · beyond_rounding)")
def p_quantised(t: Triple) -> float:
    """Chance of so many entries beyond rounding where one side is the other quantised, and nothing was trained."""
    return t.figures.get("p_quantised", math.nan)
