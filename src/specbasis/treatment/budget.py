"""How much of each matrix is stored: what is captured for stored bytes, over all matrices together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from specbasis.core.statistics import Array

TRIALS = 30_000
"""How many choices are tried at most to put what a budget leaves to use."""

DEPTH = 300
"""Over how many matrices."""

TIE = 1e-12
"""Of all squares: losses that differ by less count as equal."""


@dataclass(frozen=True, eq=False)
class Curve:
    """What a matrix costs and loses at each of its options; the first of them stores nothing.

    Attributes:
        bytes: of each option.
        lost: of the matrix's square, ‖delta‖², at each.
    """

    bytes: Array
    lost: Array

    @classmethod
    def of_directions(
        cls, squares: Array, cost: float, most: int | None = None, whole: float | None = None
    ) -> Curve:
        """0, 1, … directions of one cost.

        Args:
            squares: what each direction holds.
            cost: bytes of one.
            most: how many may be stored.
            whole: bytes of the matrix itself, where that is an option too: the last one.
        """
        lost = left_of(squares)[: None if most is None else most + 1]
        sizes = cost * np.arange(len(lost), dtype=np.float64)
        return cls(sizes, lost) if whole is None else cls(np.append(sizes, whole), np.append(lost, 0.0))

    @property
    def total(self) -> float:
        """The matrix's square."""
        return float(self.lost[0])

    @cached_property
    def least(self) -> int:
        """The cheapest option that stores anything."""
        return 1 + int(self.bytes[1:].argmin())


def left_of(squares: Array) -> Array:
    """What the leading 0, 1, … of some squares leave of their sum."""
    return np.asarray(np.clip(squares.sum() - np.concatenate([[0.0], np.cumsum(squares)]), 0.0, None))


def shared_out(curves: Sequence[Curve], budget: float | None, share: float = 1.0) -> list[int]:
    """The option of each matrix that loses least for at most so many bytes, or keeps a share for few.

    Minimise Σ_m lost_m(o_m) subject to Σ_m bytes_m(o_m) ≤ budget. At one price p of a byte for all matrices each
    takes the option with the least lost + p · bytes: the best choice of its size, since less lost at no more bytes
    would be less lost + p · bytes. The price is found by bisection. No choice loses less than that of the price at
    which the budget is met, by more than p · (bytes left); branch and bound over what each option is short of that
    puts these bytes to use, and is exact where it ends within `TRIALS`.

    Args:
        curves: of the matrices.
        budget: bytes; None to keep ``share`` instead.
        share: of the squares of all matrices together; for few bytes more than the least.

    Source: Everett 1963 (one price); Dantzig 1957 (the bound).
    """
    total = sum(curve.total for curve in curves)
    if not total:
        return [0] * len(curves)
    low, high = -40.0, 10.0  # of log10(price / total)

    def chosen(exponent: float) -> list[int]:
        return [int((c.lost + total * 10**exponent * c.bytes).argmin()) for c in curves]

    def fits(choice: list[int]) -> bool:
        if budget is not None:
            return sum(float(c.bytes[o]) for c, o in zip(curves, choice, strict=True)) <= budget
        return sum(float(c.lost[o]) for c, o in zip(curves, choice, strict=True)) > (1 - share) * total

    for _ in range(80):  # until the ends are one price
        middle = (low + high) / 2
        low, high = (low, middle) if fits(chosen(middle)) else (middle, high)
    if budget is None:
        return chosen(low)
    return _filled(curves, chosen(high), total * 10**high, budget, TIE * total)


def _filled(curves: Sequence[Curve], chosen: Sequence[int], price: float, budget: float, tie: float) -> list[int]:
    """The choice that is the least short of the bound: by its losses, and by the price of what it leaves.

    Branch and bound over the options that could do better than those of one price.
    """
    losses = [c.lost + price * c.bytes for c in curves]
    losses = [np.maximum(loss - loss[o] - tie, 0.0) for loss, o in zip(losses, chosen, strict=True)]
    left = budget - sum(float(c.bytes[o]) for c, o in zip(curves, chosen, strict=True))
    near = {m: np.flatnonzero(loss < price * left) for m, loss in enumerate(losses)}
    steps = {m: curves[m].bytes[curves[m].least] for m in near if len(near[m]) > 1}
    tried = sorted(steps, key=lambda m: -steps[m])[-DEPTH:]  # those with the finest steps last, and most
    levels = [_level(curves[m], losses[m], near[m]) for m in tried]
    path, best, trials = [0] * len(tried), (np.inf, [chosen[m] for m in tried]), 0

    def visit(at: int, left: float, lost: float) -> None:
        nonlocal best, trials
        if at == len(levels):
            best = min(best, (lost + price * left, list(path)))
            return
        for own, size, option in levels[at]:
            if lost + own >= best[0] or trials >= TRIALS:
                return
            trials += 1
            if size <= left:
                path[at] = option
                visit(at + 1, left - size, lost + own)

    visit(0, left + sum(float(curves[m].bytes[chosen[m]]) for m in tried), 0.0)
    return list((dict(enumerate(chosen)) | dict(zip(tried, best[1], strict=True))).values())


def _level(curve: Curve, losses: Array, options: npt.NDArray[np.int64]) -> list[tuple[float, float, int]]:
    """Loss, bytes and number of a matrix's options, nearest first, of equal ones the largest."""
    by_size = options[np.lexsort((curve.lost[options], curve.bytes[options]))]
    lost = curve.lost[by_size]
    options = by_size[np.concatenate([[True], lost[1:] < np.minimum.accumulate(lost)[:-1]])]  # no bytes for nothing
    near, sizes = losses[options], curve.bytes[options]
    order = np.lexsort((-sizes, near))
    return list(zip(near[order].tolist(), sizes[order].tolist(), options[order].tolist(), strict=True))
