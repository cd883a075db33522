"""Nulls: what an update of the same size without a direction, or rounding alone, would leave.

Taken with `nulls=True` (`--nulls`); [nulls.md](nulls.md) derives them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specbasis.core import nulls
from specbasis.measures.measure import PAIR, SIDES, measure
from specbasis.measures.triple import Triple

NEGLIGIBLE = 1e-4
"""Where the mean entry of an update holds less than this share of its energy, permuting it is the Gaussian null."""

COARSE = ("bfloat16", "float16", "int8")
"""Formats whose rounding is taken as a null; that of float32 turns nothing by more than 10⁻⁶."""

STEWART = "Stewart 1991, first order"
PAIRWISE = "pairs of ranks"

null = partial(measure, index="rank", vectors=PAIR, when="nulls", shown="rows", side=SIDES)
null_of_update = partial(null, values=("delta",), reads=("every",))


def _spectrum(t: Triple) -> Tensor:
    return t.base.spectrum.cpu()


def _is_coarse(t: Triple) -> bool:
    return "tuned" in t.rounding and t.rounding["tuned"].stored in COARSE


def _unit(t: Triple) -> Tensor:
    return torch.ones(t.ranks, dtype=torch.float64)


def _turned(t: Triple) -> tuple[Tensor, Tensor]:
    """Squared first-order rotations by the update, (short, long)."""
    return t.once("response", lambda: nulls.response(t.core))


def _null(t: Triple, kind: str) -> tuple[Tensor, Tensor] | None:
    """Root mean square alignment under a null, (short, long), computed once."""
    return t.once(("null", kind), lambda: _null_alignment(t, kind))


def _null_alignment(t: Triple, kind: str) -> tuple[Tensor, Tensor] | None:
    if kind == "rounding":
        if not _is_coarse(t):
            return None
        rounding = t.rounding["tuned"]
        return nulls.null_alignment(_spectrum(t), t.sizes, t.ranks, rounding.variance[rounding.stored])
    if t.unturned:
        return _unit(t), _unit(t)
    if kind == "gaussian":
        return nulls.null_alignment(_spectrum(t), t.sizes, t.ranks, t.variance)
    assert t.every is not None
    mean = nulls.mean_entry(t.delta)  # type: ignore[arg-type]
    if mean**2 < NEGLIGIBLE * t.variance:
        return _null(t, "gaussian")
    spread = max(0.0, t.variance - mean**2)
    return nulls.null_alignment(_spectrum(t), t.sizes, t.ranks, spread, nulls.mean_update(t.every, mean))


def _of_null(t: Triple, kind: str, side: str) -> Tensor | None:
    alignments = None if t.is_zero("base") else _null(t, kind)
    return None if alignments is None else t.of_side(alignments, side)


@null(
    "p_independent_{side}",
    "chance of so high a {side} alignment of independent directions",
    formula="P(|cos θ| ≥ alignment)",
    source="Beta law",
)
def p_independent(t: Triple, side: str) -> Tensor | None:
    """Probability that independent directions align at least so well."""
    if t.is_zero("base") or t.is_zero("tuned"):
        return None
    return nulls.p_independent(t.observed(side), t.dimension(side))


@null(
    "null_alignment_gaussian_{side}",
    "{side} alignment under a Gaussian update with the same ‖Δ‖_F; the same for Δ rotated at random",
    formula="root mean square",
    source=PAIRWISE,
)
def null_alignment_gaussian(t: Triple, side: str) -> Tensor | None:
    """Root mean square alignment that the size of the update alone would leave."""
    return _of_null(t, "gaussian", side)


@null_of_update(
    "null_alignment_permuted_{side}",
    "{side} alignment under the entries of Δ in random places",
    formula="root mean square",
    source=PAIRWISE,
)
def null_alignment_permuted(t: Triple, side: str) -> Tensor | None:
    """Root mean square alignment under the permuted update, which keeps the mean of its entries."""
    return _of_null(t, "permuted", side)


@null(
    "null_alignment_rounding_{side}",
    "{side} alignment under rounding alone; only of matrices stored in bfloat16 or float16",
    formula="root mean square",
    source=PAIRWISE,
    reads=("rounding",),
)
def null_alignment_rounding(t: Triple, side: str) -> Tensor | None:
    """Root mean square alignment that rounding to the stored format would leave."""
    return _of_null(t, "rounding", side)


@null_of_update(
    "p_gaussian_{side}",
    "chance that a Gaussian update of this size turns the {side} vector at most so far: small where finetuning "
    "left it more alone than its size explains",
    formula="P(‖du*‖² ≤ ‖du‖²)",
    source=STEWART + "; Kuonen 1999",
)
def p_gaussian(t: Triple, side: str) -> Tensor | None:
    """Probability that a Gaussian update of the same norm turns a rank at most so far."""
    if t.unturned:
        return None
    return t.of_side(t.once("p gaussian", lambda: nulls.p_gaussian(t.core, _turned(t))), side)


@null_of_update(
    "predicted_alignment_{side}",
    "{side} alignment that perturbation theory predicts of W and Δ",
    formula="Π cos θᵢⱼ",
    source=PAIRWISE,
)
def predicted_alignment(t: Triple, side: str) -> Tensor | None:
    """Alignment that pairwise perturbation theory expects."""
    if t.is_zero("base"):
        return None
    if t.unturned:
        return _unit(t)
    return t.of_side(t.once("predicted", lambda: nulls.predicted_alignment(t.core)), side)


@null_of_update(
    "rotation_factor_{side}",
    "squared first-order {side} rotation by Δ over its expectation for noise of the same size",
    formula="‖du‖² / E‖du*‖²",
    source=STEWART,
)
def rotation_factor(t: Triple, side: str) -> Tensor | None:
    """First-order rotation of the update over the one that is expected of its size."""
    if t.unturned:
        return None
    expected = t.once("sensitivity", lambda: nulls.sensitivity(_spectrum(t), t.sizes, t.ranks))
    size = (t.norm("delta") / t.norm("base")) ** 2
    return t.of_side(_turned(t), side) / (t.of_side(expected, side) * size)


@null(
    "size_share_{side}",
    "share of the observed {side} alignment a that the Gaussian null g leaves as well; the rest is owed to the "
    "direction of the update",
    formula="(g² − 1/d)/(a² − 1/d)",
    source="Yu et al. 2026, §4.2",
)
def size_share(t: Triple, side: str) -> Tensor | None:
    """Share of the stability that size alone explains."""
    alignment = None if t.unturned or t.is_zero("tuned") else _of_null(t, "gaussian", side)
    return None if alignment is None else nulls.size_share(t.observed(side), alignment, t.dimension(side))


def _interval(t: Triple, side: str, end: int) -> Tensor | None:
    if not _is_coarse(t) or t.entries is None or t.is_zero("base") or t.is_zero("tuned"):
        return None
    if t.identical:
        return _unit(t)
    return t.of_side(t.once("intervals", lambda: _intervals(t)), side)[end]


def _intervals(t: Triple) -> tuple[nulls.Interval, nulls.Interval]:
    """Intervals of the alignment before tuned was rounded, (short, long)."""
    assert t.entries is not None
    short, long = SIDES if t.base_wide else SIDES[::-1]
    form = t.rounding["tuned"].stored
    return nulls.intervals(
        (t.matrix(short), t.matrix(long)),
        (t.tuned.vectors(short, t.ranks).cpu(), t.tuned.vectors(long, t.ranks).cpu()),
        t.tuned.spectrum.cpu(),
        (t.entries if t.base_wide else t.entries.mT).cpu(),
        lambda W: nulls.entry_variance(W, form),
    )


@null(
    "alignment_low_{side}",
    "{side} alignment before tuned was rounded, lower end of 95 %; only of matrices stored in bfloat16 or float16",
    formula="a·(1 + …) − 1.96 s",
    source=STEWART,
    reads=("rounding",),
)
def alignment_low(t: Triple, side: str) -> Tensor | None:
    """Lower end of the interval of the alignment before tuned was rounded."""
    return _interval(t, side, 0)


@null(
    "alignment_high_{side}",
    "upper end of the same interval, {side}",
    formula="a·(1 + …) + 1.96 s",
    source=STEWART,
    reads=("rounding",),
)
def alignment_high(t: Triple, side: str) -> Tensor | None:
    """Upper end of the interval of the alignment before tuned was rounded."""
    return _interval(t, side, 1)
