"""A measure: one function of a `Triple` under `@measure(...)`, which is the only table.

Rows, the tables of the terminal and of the page, docs/rows.md, the prediction of costs and `--measures help` read
what the decorator registers. To add a measure, write a function of a `Triple` in the file of its kind and decorate
it. What no wanted measure reads is never decomposed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

BOTH_SIDES: Mapping[str, Sequence[str]] = {"side": SIDES}
"""Variants of a measure of the left and of the right singular vectors."""


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

    def divided(self, scale: float) -> Values:
        """Figures in the units of the weights, of the weights without a scale."""
        if scale == 1.0:
            return self
        return replace(self, value=self.value / scale, bound=None if self.bound is None else self.bound / scale)

    def resolved(self, tolerance: float = RESOLVED, *, relative: bool) -> Bool[Tensor, " n"] | None:
        """Whether each bound is at most ``tolerance`` (times the figure in the weights' units), and the rank not
        tied.
        """
        if self.bound is None:
            return None
        scale = self.value.abs() if relative else self.value.abs().clamp(min=1.0)
        small = self.bound <= tolerance * scale
        return small if self.tied is None else small & ~self.tied.to(small.device)


def scalar(value: float | Tensor, bound: float | Tensor | None = None) -> Values:
    """One figure of the whole matrix, and its bound."""
    number, error = (
        None if x is None else torch.as_tensor(x, dtype=torch.float64).reshape(1) for x in (value, bound)
    )
    assert number is not None
    return Values(number, error)


Result = Values | Tensor | float | None


_F = TypeVar("_F", bound=Callable[..., Result])


@dataclass(frozen=True, eq=False, kw_only=True)
class Measure:
    """A quantity that rows hold. As a decorator, `measure`, it registers a function once for each of its variants.

    The function's name, with the variant behind it, is the measure's; the first paragraph of its docstring is the
    title, in which, as in ``heading``, ``vectors`` and ``values``, ``{side}`` stands for the variant of that name.
    It returns one number for a matrix, a tensor with a figure for each rank, `Values` where it knows a bound or
    another index, or None (or the number NaN) where the quantity is undefined.

    Attributes:
        formula: the quantity in the letters of docs/rows.md.
        unit: "1", "rad", "ranks", …; "weight" where figures follow the scale of the weights.
        index: what `Values.index` counts: "rank", "k", …; empty for a figure of the whole matrix.
        source: where the quantity is from.
        vectors: the decompositions, of base, tuned and delta, whose singular vectors (and values) it reads.
        values: those whose singular values it reads.
        reads: what else it reads, as attributes of `Triple` are called: "every", "rounding", "heads".
        nonzero: the matrices without which, being zero, it is undefined.
        turned: whether it is undefined where nothing turns base; see `Triple.unturned`.
        asked: taken only where it is asked for, although it reads no decomposition.
        leading: can be taken where only the leading singular values are known.
        when: "nulls" or "samples": taken only on that request.
        shown: where figures are shown beside the rows: "table" in the terminal's table by role and in the page's
            table of matrices, or its curves where there is a figure for each rank; "matrices" in the page's table
            of matrices; "ranks" in the page's figures of every rank; "rows" nowhere else.
        heading: of its column in a table; the name, when empty.
        digits: the page's number format of the column: "f", "s" (signed) or "1" (one decimal).
        variants: names and values of arguments that the function takes beside the `Triple`.
        name, title, function: set when a function is decorated.
        line: title of all variants together, which share a line of docs/rows.md.
    """

    formula: str = ""
    unit: str = "1"
    index: str = ""
    source: str = ""
    vectors: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    nonzero: tuple[str, ...] = ()
    turned: bool = False
    asked: bool = False
    leading: bool = False
    when: str = ""
    shown: str = "table"
    heading: str = ""
    digits: str = "f"
    variants: Mapping[str, Sequence[str]] = field(default_factory=dict)
    name: str = ""
    title: str = ""
    function: Callable[[Triple], Result] = lambda t: None
    line: str = ""

    def __call__(self, function: _F) -> _F:
        """Register a function, once for each combination of the variants."""
        text = " ".join(inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].split()).rstrip(".")
        line = text.format(**{argument: "/".join(names) for argument, names in self.variants.items()})
        for names in product(*self.variants.values()):
            variant = dict(zip(self.variants, names, strict=True))
            entry = replace(
                self,
                name="_".join([self.name or function.__name__, *names]),
                title=text.format(**variant),
                function=partial(function, **variant),
                line=line,
                heading=self.heading.format(**variant),
                vectors=tuple(which.format(**variant) for which in self.vectors),
                values=tuple(which.format(**variant) for which in self.values),
            )
            REGISTRY.append(entry)
        return function

    def take(self, t: Triple) -> Values | None:
        """The figures of two matrices; None where there are none, such as the directions of a zero update."""
        if any(t.is_zero(which) for which in self.nonzero) or (self.turned and t.unturned):
            return None
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


measure = Measure
"""The decorator; ``functools.partial`` of it says once what several measures share."""

REGISTRY: list[Measure] = []
"""Every measure that was decorated so far, in any order; `measures.table.registered` has that of the rows."""
