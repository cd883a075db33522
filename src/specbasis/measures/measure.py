"""A measure: one function of a `Triple`, and above it, in `@measure(...)`, all that anyone needs to know about it.

The decorator is the only table. Rows, the tables of the terminal and of the page, docs/rows.md, the prediction of
costs and `--measures help` read what it registers. To add a measure, write a function of a `Triple` in the file of
its kind and decorate it. What no wanted measure reads is never decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specbasis.measures.triple import Triple

RESOLVED = 1e-6
"""A figure whose error bound exceeds this is marked unresolved: its digits are arbitrary beyond."""

SIDES = ("left", "right")
PAIR = ("base", "tuned")
ALL = ("base", "tuned", "delta")

PAPER = "Yu et al. 2026, "


@dataclass(frozen=True, eq=False)
class Values:
    """Figures of one measure: ``value``, their error ``bound`` (None: rounding only), and their 0-based ``index``.

    The index is a rank, or a number of ranks k where the measure says so, or None for a figure of the whole matrix.
    ``tied`` marks ranks that the rounding of the stored format mixes with others: their digits are arbitrary too.
    """

    value: Float[Tensor, " n"]
    bound: Float[Tensor, " n"] | None = None
    index: list[int] | None = None
    tied: Bool[Tensor, " n"] | None = None

    def resolved(self, *, relative: bool) -> Bool[Tensor, " n"] | None:
        """Whether each bound is at most `RESOLVED` (times the figure in the weights' units), and the rank not
        tied.
        """
        if self.bound is None:
            return None
        scale = self.value.abs() if relative else self.value.abs().clamp(min=1.0)
        small = self.bound <= RESOLVED * scale
        return small if self.tied is None else small & ~self.tied.to(small.device)


def scalar(value: float | Tensor, bound: float | Tensor | None = None) -> Values:
    """One figure of the whole matrix, and its bound."""
    number, error = (
        None if x is None else torch.as_tensor(x, dtype=torch.float64).reshape(1) for x in (value, bound)
    )
    assert number is not None
    return Values(number, error)


Result = Values | Tensor | float | None


@dataclass(frozen=True)
class Measure:
    """One entry of the table; `measure` says what each field means.

    Attributes:
        line: title of all measures that one decorated function gives: they share a line of docs/rows.md.
    """

    name: str
    title: str
    function: Callable[[Triple], Result]
    formula: str = ""
    unit: str = "1"
    index: str = ""
    source: str = ""
    vectors: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    asked: bool = False
    leading: bool = False
    when: str = ""
    shown: str = "table"
    heading: str = ""
    digits: str = "f"
    line: str = ""

    def take(self, t: Triple) -> Values | None:
        """The figures of two matrices; None where there are none, such as the directions of a zero update."""
        result = self.function(t)
        if isinstance(result, Values) or result is None:
            return result
        if isinstance(result, Tensor):
            return Values(result)
        return None if math.isnan(result) else scalar(result)

    @property
    def is_free(self) -> bool:
        """Whether it is taken whatever is asked for: it reads no decomposition, and the verdict may rest on it."""
        return not (self.vectors or self.values or self.asked)


REGISTRY: list[Measure] = []
"""Every measure that was decorated so far, in any order; `measures.table.registered` has that of the rows."""

_F = TypeVar("_F", bound=Callable[..., Result])


def measure(
    name: str,
    title: str,
    *,
    formula: str = "",
    unit: str = "1",
    index: str = "",
    source: str = "",
    vectors: Sequence[str] = (),
    values: Sequence[str] = (),
    reads: Sequence[str] = (),
    asked: bool = False,
    leading: bool = False,
    when: str = "",
    shown: str = "table",
    heading: str = "",
    digits: str = "f",
    **variants: Sequence[str],
) -> Callable[[_F], _F]:
    """Register a function of a `Triple`, once for each combination of its variants.

    The function returns one number for a matrix, a tensor with a figure for each rank, `Values` where it knows a
    bound or another index, or None (or the number NaN) where the measure is undefined.

    Args:
        name: of the measure in the rows; ``{side}`` in it, and in ``title``, ``heading``, ``vectors`` and
            ``values``, stands for the variant of that name.
        title: the quantity in words.
        formula: the same in the letters of docs/rows.md.
        unit: "1", "rad", "ranks", …; "weight" where figures follow the scale of the weights.
        index: what `Values.index` counts: "rank", "k", …; empty for a figure of the whole matrix.
        source: where the quantity is from.
        vectors: the decompositions, of base, tuned and delta, whose singular vectors (and values) it reads.
        values: those whose singular values it reads.
        reads: what else it reads, as attributes of `Triple` are called: "every", "rounding", "heads".
        asked: taken only where it is asked for, although it reads no decomposition.
        leading: can be taken where only the leading singular values are known.
        when: "nulls" or "samples": taken only on that request.
        shown: where figures are shown beside the rows: "table" in the terminal's table by role and in the page's
            table of matrices, or its curves where there is a figure for each rank; "matrices" in the page's table
            of matrices; "ranks" in the page's figures of every rank; "rows" nowhere else.
        heading: of its column in a table; the name, when empty.
        digits: the page's number format of the column: "f", "s" (signed) or "1" (one decimal).
        **variants: values that the function takes as keyword arguments, such as ``side=("left", "right")``.
    """

    def register(function: _F) -> _F:
        for combination in product(*variants.values()):
            variant = dict(zip(variants, combination, strict=True))
            REGISTRY.append(
                Measure(
                    name.format(**variant),
                    title.format(**variant),
                    partial(function, **variant) if variant else function,
                    formula,
                    unit,
                    index,
                    source,
                    tuple(which.format(**variant) for which in vectors),
                    tuple(which.format(**variant) for which in values),
                    tuple(reads),
                    asked,
                    leading,
                    when,
                    shown,
                    heading.format(**variant),
                    digits,
                    title.format(**{key: "/".join(filter(None, names)) for key, names in variants.items()}),
                )
            )
        return function

    return register
