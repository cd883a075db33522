"""Nulls: what an update of the same size without a direction, or rounding alone, would leave.

Taken with `nulls=True` (`--nulls`); [nulls.md](nulls.md) derives them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specbasis.core import nulls, perturbation, rounding
from specbasis.measures.measure import BOTH_SIDES, PAIR, SIDES, measure
from specbasis.measures.triple import Triple

NEGLIGIBLE = 1e-4
"""Where the mean entry of an update holds less than this share of its energy, permuting it is the Gaussian null."""

COARSE = ("bfloat16", "float16", "int8", rounding.QUANTISED)
"""Formats whose rounding is taken as a null; that of float32 turns nothing by more than 10⁻⁶."""

STEWART = "Stewart 1991, first order"
PAIRWISE = "pairs of ranks"

null = partial(
    measure, index="rank", vectors=PAIR, nonzero=("base",), when="nulls", shown="rows", variants=BOTH_SIDES
)
of_update = partial(null, values=("delta",), reads=("every",))


def _spectrum(t: Triple) -> Tensor:
    return t.base.spectrum.cpu()


def _is_coarse(t: Triple) -> bool:
    return "tuned" in t.rounding and t.rounding["tuned"].stored in COARSE


def _ones(t: Triple) -> Tensor:
    return torch.ones(t.ranks, dtype=torch.float64)


def _turned(t: Triple) -> tuple[Tensor, Tensor]:
    """Squared first-order rotations by the update, (short, long)."""
    return t.once("response", lambda: perturbation.response(t.core))


def _null(t: Triple, kind: str) -> tuple[Tensor, Tensor]:
    """Root mean square alignment under a null, (short, long), computed once."""
    return t.once(("null", kind), lambda: _null_alignment(t, kind))


def _null_alignment(t: Triple, kind: str) -> tuple[Tensor, Tensor]:
    variance, mean = t.variance, None
    if kind == "rounding":
        variance = t.rounding["tuned"].variance[t.rounding["tuned"].stored]
    elif t.unturned:
        return _ones(t), _ones(t)
    elif kind == "permuted":
        assert t.every is not None
        entry = perturbation.mean_entry(t.delta)  # type: ignore[arg-type]
        if entry**2 < NEGLIGIBLE * variance:
            return _null(t, "gaussian")
        variance, mean = max(0.0, variance - entry**2), perturbation.mean_update(t.every, entry)
    return nulls.null_alignment(_spectrum(t), t.sizes, t.ranks, variance, mean)


@null(formula="P(|cos θ| ≥ alignment)", source="Beta law", nonzero=PAIR)
def p_independent(t: Triple, side: str) -> Tensor:
    """Chance of so high a {side} alignment of independent directions."""
    return nulls.p_independent(t.observed(side), t.dimension(side))


@null(formula="root mean square", source=PAIRWISE)
def null_alignment_gaussian(t: Triple, side: str) -> Tensor:
    """Alignment of {side} vectors under a Gaussian update with the same ‖Δ‖_F; the same for Δ rotated at random."""
    return t.of_side(_null(t, "gaussian"), side)


@of_update(formula="root mean square", source=PAIRWISE)
def null_alignment_permuted(t: Triple, side: str) -> Tensor:
    """Alignment of {side} vectors under the entries of Δ in random places, which keep their mean."""
    return t.of_side(_null(t, "permuted"), side)


@null(formula="root mean square", source=PAIRWISE, reads=("rounding",))
def null_alignment_rounding(t: Triple, side: str) -> Tensor | None:
    """Alignment of {side} vectors under rounding alone; only of matrices stored in bfloat16 or float16, or
    quantised.
    """
    return t.of_side(_null(t, "rounding"), side) if _is_coarse(t) else None


@of_update(formula="P(‖du*‖² ≤ ‖du‖²)", source=STEWART + "; Kuonen 1999", turned=True)
def p_gaussian(t: Triple, side: str) -> Tensor:
    """Chance that a Gaussian update of this size turns the {side} vector at most so far: small where finetuning
    left it more alone than its size explains.
    """
    return t.of_side(t.once("p gaussian", lambda: nulls.p_gaussian(t.core, _turned(t))), side)


@of_update(formula="Π cos θᵢⱼ", source=PAIRWISE)
def predicted_alignment(t: Triple, side: str) -> Tensor:
    """Alignment of {side} vectors that perturbation theory predicts of W and Δ."""
    if t.unturned:
        return _ones(t)
    return t.of_side(t.once("predicted", lambda: perturbation.predicted_alignment(t.core)), side)


@of_update(formula="‖du‖² / E‖du*‖²", source=STEWART, turned=True)
def rotation_factor(t: Triple, side: str) -> Tensor:
    """Squared first-order {side} rotation by Δ over its expectation for noise of the same size."""
    expected = t.once("sensitivity", lambda: nulls.sensitivity(_spectrum(t), t.sizes, t.ranks))
    size = (t.norm("delta") / t.norm("base")) ** 2
    return t.of_side(_turned(t), side) / (t.of_side(expected, side) * size)


@null(formula="(g² − 1/d)/(a² − 1/d)", source="Yu et al. 2026, §4.2", nonzero=PAIR, turned=True)
def size_share(t: Triple, side: str) -> Tensor:
    """Share of the observed {side} alignment a that the Gaussian null g leaves as well; the rest is owed to the
    direction of the update.
    """
    return nulls.size_share(t.observed(side), t.of_side(_null(t, "gaussian"), side), t.dimension(side))


def _interval(t: Triple, side: str, end: int) -> Tensor | None:
    if not _is_coarse(t) or t.entries is None:
        return None
    if t.identical:
        return _ones(t)
    return t.of_side(t.once("intervals", lambda: _intervals(t)), side)[end]


def _intervals(t: Triple) -> tuple[rounding.Interval, rounding.Interval]:
    """Intervals of the alignment before tuned was rounded, (short, long)."""
    assert t.entries is not None
    short, long = SIDES if t.base_wide else SIDES[::-1]
    form = t.rounding["tuned"].stored
    error = t.rounding["tuned"].variance[form]
    mean = form == rounding.QUANTISED
    return rounding.intervals(
        (t.matrix(short), t.matrix(long)),
        (t.tuned.vectors(short, t.ranks).cpu(), t.tuned.vectors(long, t.ranks).cpu()),
        t.tuned.spectrum.cpu(),
        (t.entries if t.base_wide else t.entries.mT).cpu(),
        lambda W: torch.full_like(W, error, dtype=torch.float64) if mean else rounding.entry_variance(W, form),
    )


of_interval = partial(null, source=STEWART, nonzero=PAIR, reads=("rounding",))


@of_interval(formula="a·(1 + ½ Σ Var) − 1.96 s")
def alignment_low(t: Triple, side: str) -> Tensor | None:
    """Lower end of the 95 % interval of the {side} alignment before tuned was rounded; only of matrices stored in
    bfloat16 or float16, or quantised.
    """
    return _interval(t, side, 0)


@of_interval(formula="a·(1 + ½ Σ Var) + 1.96 s")
def alignment_high(t: Triple, side: str) -> Tensor | None:
    """Upper end of the same interval, {side}."""
    return _interval(t, side, 1)
