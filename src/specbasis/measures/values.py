"""Singular values: what they are, how much they changed, and how many of them carry a matrix."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from specbasis.core import spectrum
from specbasis.measures.measure import ALL, PAIR, PAPER, Values, measure, scalar
from specbasis.measures.triple import Decomposition, Triple

of_each = {"which": ALL}
of_both = {"which": PAIR}
by_rank = partial(measure, index="rank", shown="ranks", leading=True)
of_change = partial(measure, values=PAIR, source=PAPER + "App. B", shown="matrices")
of_shape = partial(measure, unit="ranks", values=("{which}",), shown="matrices", digits="1")


@by_rank(formula="σᵢ, σ̃ᵢ, σᵢ(Δ)", unit="weight", source=PAPER + "§3.1", values=("{which}",), variants=of_each)
def singular_value(t: Triple, which: str) -> Values:
    """Singular values of {which}."""
    return Values(getattr(t, which).spectrum, getattr(t, which).spectrum_error)


@measure(formula="gapᵢ / σᵢ", index="rank", vectors=("{which}",), shown="rows", variants=of_both)
def relative_gap(t: Triple, which: str) -> Tensor:
    """Distance to the nearest other singular value of {which}, in units of the value.

    Where it is small the singular vectors are arbitrary inside their subspace.
    """
    gap: Tensor = getattr(t, which).relative_gap
    return gap


@by_rank(formula="(σ̃ᵢ − σᵢ)/σᵢ", source=PAPER + "Fig. 6", values=PAIR)
def singular_value_change(t: Triple) -> Values:
    """Relative change of singular values, signed.

    0 where the two are equal, ∞ where only that of base is zero.
    """
    base, tuned = t.base.spectrum, t.tuned.spectrum
    change = torch.where(tuned == base, 0.0, (tuned - base) / base)
    return Values(change, torch.zeros_like(base) if t.identical else _quotient_bound(t.tuned, t.base))


@by_rank(formula="σᵢ(Δ)/σᵢ", source=PAPER + "Eq. 1", values=("base", "delta"))
def singular_value_ratio(t: Triple) -> Values:
    """Singular values of the update over those of base; ∞ where only that of base is zero."""
    n = min(
        len(t.base.spectrum), len(t.delta.spectrum)
    )  # of a product all values are known, even where base is quick
    base, delta = t.base.spectrum[:n], t.delta.spectrum[:n]
    ratio = torch.where(delta == 0, 0.0, delta / base)
    return Values(ratio, torch.zeros_like(base) if t.identical else _quotient_bound(t.delta, t.base))


@measure(
    formula="Σ_{j≤i} σⱼ² / ‖W‖²_F",
    index="rank",
    source=PAPER + "App. H",
    values=("{which}",),
    shown="rows",
    leading=True,
    variants=of_each,
)
def explained_variance(t: Triple, which: str) -> Tensor | None:
    """Cumulative energy of {which}, 0 … 1: of the update, what the best matrix of that rank holds of it."""
    if t.norm(which) == 0:
        return None
    return spectrum.explained_variance(getattr(t, which).spectrum, _norm(t, which))


@of_change(formula="‖σ̃ − σ‖₂ / ‖σ‖₂", heading="RSD")
def rsd(t: Triple) -> Values:
    """Relative spectral distance; 0 for equal spectra."""
    if t.identical:
        return scalar(0.0, 0.0)
    norm = torch.linalg.vector_norm
    distance, size = norm(t.tuned.spectrum - t.base.spectrum), norm(t.base.spectrum)
    error = norm(t.tuned.spectrum_error) + (1 + distance / size) * norm(t.base.spectrum_error)
    return scalar(distance / size, error / size)


@of_change(formula="mean |σ̃ᵢ − σᵢ|/σᵢ", heading="MRC")
def mrc(t: Triple) -> Values:
    """Mean over ranks of the relative change, without its sign."""
    change, bound = _change(t)
    return scalar(change.abs().mean(), bound.mean())


@of_change(formula="max |σ̃ᵢ − σᵢ|/σᵢ", heading="MaxRC")
def max_rc(t: Triple) -> Values:
    """Maximum over ranks of the relative change, without its sign."""
    change, bound = _change(t)
    return scalar(change.abs().max(), bound.max())


@of_change(
    formula="(σ̃₁ − σ₁)/σ₁", source=PAPER + 'App. B (printed "TIRC")', leading=True, heading="T1RC", digits="s"
)
def t1_rc(t: Triple) -> Values:
    """Relative change of the largest singular value, signed."""
    change, bound = _change(t)
    return scalar(change[0], bound[0])


@of_change(formula="mean (σ̃ᵢ − σᵢ)/σᵢ, i > 0.9 n", heading="TailRC", digits="s")
def tail_rc(t: Triple) -> Values:
    """Mean relative change over the last 10 % of ranks (rounded up), signed."""
    change, bound = (x[-math.ceil(len(x) / 10) :] for x in _change(t))
    return scalar(change.mean(), bound.mean())


@of_shape(
    formula="exp(H(p)), p = σ/Σσ",
    source=PAPER + "Tab. 4; Roy & Vetterli 2007",
    heading="ER {which}",
    leading=True,
    variants=of_each,
)
def effective_rank(t: Triple, which: str) -> Values:
    """Effective rank of {which}: exp of the entropy of its singular values; not a number for zeros.

    Where only the leading values are known it is estimated, and the bound is half of a 95 % interval.
    """
    decomposition = getattr(t, which)
    if decomposition.density is None:
        return scalar(spectrum.effective_rank(decomposition.spectrum))
    return scalar(*decomposition.density.effective_rank(t.norm(which)))


@of_shape(
    formula="‖·‖²_F/σ₁²", source="Rudelson & Vershynin 2007", heading="SR {which}", leading=True, variants=of_each
)
def stable_rank(t: Triple, which: str) -> Values:
    """Stable rank of {which}; not a number for zeros."""
    return scalar(spectrum.stable_rank(getattr(t, which).spectrum, _norm(t, which)))


def _norm(t: Triple, which: str) -> float | None:
    """The norm of a matrix of whose spectrum only the leading values are known; None: the spectrum has it."""
    return None if getattr(t, which).density is None else t.norm(which)


def _change(t: Triple) -> tuple[Tensor, Tensor]:
    """Relative change of each singular value and its bound."""
    values = singular_value_change(t)
    assert values.bound is not None
    return values.value, values.bound


def _quotient_bound(numerator: Decomposition, denominator: Decomposition) -> Tensor:
    """Bound on the error of σ_a[i] / σ_b[i]: (error_a + ratio·error_b) / (σ_b − error_b); ∞ where that is ≤ 0."""
    n = min(len(numerator.spectrum), len(denominator.spectrum))
    (x, error_x), (y, error_y) = ((d.spectrum[:n], d.spectrum_error[:n]) for d in (numerator, denominator))
    least = y - error_y
    bound = (error_x + x / y * error_y) / least
    return torch.where(least > 0, bound, math.inf)
