"""Singular values: what they are, how much they changed, and how many of them carry a matrix."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from specbasis.core import spectrum
from specbasis.measures.measure import ALL, PAIR, PAPER, Values, measure, scalar
from specbasis.measures.triple import Decomposition, Triple

by_rank = partial(measure, index="rank")
of_change = partial(measure, values=PAIR, source=PAPER + "App. B", shown="matrices")
of_shape = partial(measure, unit="ranks", values=("{which}",), shown="matrices", digits="1")


@by_rank(
    "singular_value_{which}",
    "singular values of {which}",
    formula="σᵢ, σ̃ᵢ, σᵢ(Δ)",
    unit="weight",
    source=PAPER + "§3.1",
    values=("{which}",),
    leading=True,
    shown="ranks",
    which=ALL,
)
def singular_value(t: Triple, which: str) -> Values:
    """All singular values, in the units of the weights."""
    return Values(getattr(t, which).spectrum, getattr(t, which).spectrum_error)


@by_rank(
    "relative_gap_{which}",
    "distance to the nearest other singular value of {which}, in units of the value",
    formula="gapᵢ / σᵢ",
    vectors=("{which}",),
    shown="rows",
    which=PAIR,
)
def relative_gap(t: Triple, which: str) -> Tensor:
    """Gap over value: where it is small the singular vectors are arbitrary inside their subspace."""
    gap: Tensor = getattr(t, which).relative_gap
    return gap


@by_rank(
    "singular_value_change",
    "relative change of singular values",
    formula="(σ̃ᵢ − σᵢ)/σᵢ",
    source=PAPER + "Fig. 6",
    values=PAIR,
    leading=True,
    shown="ranks",
)
def singular_value_change(t: Triple) -> Values:
    """Signed relative change of each singular value; 0 where the two are equal, ∞ where only σ_i is zero."""
    base, tuned = t.base.spectrum, t.tuned.spectrum
    change = torch.where(tuned == base, 0.0, (tuned - base) / base)
    return Values(change, torch.zeros_like(base) if t.identical else _quotient_bound(t.tuned, t.base))


@by_rank(
    "singular_value_ratio",
    "singular values of the update over those of base",
    formula="σᵢ(Δ)/σᵢ",
    source=PAPER + "Eq. 1",
    values=("base", "delta"),
    leading=True,
    shown="ranks",
)
def singular_value_ratio(t: Triple) -> Values:
    """Size of the update at equal rank; ∞ where only σ_i is zero."""
    base, delta = t.base.spectrum, t.delta.spectrum
    ratio = torch.where(delta == 0, 0.0, delta / base)
    return Values(ratio, torch.zeros_like(base) if t.identical else _quotient_bound(t.delta, t.base))


@by_rank(
    "explained_variance_{which}",
    "cumulative energy of {which}",
    formula="Σ_{j≤i} σⱼ² / ‖W‖²_F",
    source=PAPER + "App. H",
    values=("{which}",),
    shown="rows",
    which=PAIR,
)
def explained_variance(t: Triple, which: str) -> Tensor:
    """Share of the energy that lies in the leading i + 1 ranks, 0 … 1."""
    return spectrum.explained_variance(getattr(t, which).spectrum)


@of_change("rsd", "relative spectral distance", formula="‖σ̃ − σ‖₂ / ‖σ‖₂", heading="RSD")
def relative_spectral_distance(t: Triple) -> Values:
    """RSD, 0 for equal spectra."""
    if t.identical:
        return scalar(0.0, 0.0)
    norm = torch.linalg.vector_norm
    distance, size = norm(t.tuned.spectrum - t.base.spectrum), norm(t.base.spectrum)
    error = norm(t.tuned.spectrum_error) + (1 + distance / size) * norm(t.base.spectrum_error)
    return scalar(distance / size, error / size)


@of_change(
    "mrc", "mean over ranks of the relative change, without its sign", formula="mean |σ̃ᵢ − σᵢ|/σᵢ", heading="MRC"
)
def mean_relative_change(t: Triple) -> Values:
    """MRC."""
    change, bound = _change(t)
    return scalar(change.abs().mean(), bound.mean())


@of_change(
    "max_rc",
    "maximum over ranks of the relative change, without its sign",
    formula="max |σ̃ᵢ − σᵢ|/σᵢ",
    heading="MaxRC",
)
def max_relative_change(t: Triple) -> Values:
    """MaxRC."""
    change, bound = _change(t)
    return scalar(change.abs().max(), bound.max())


@of_change(
    "t1_rc",
    "relative change of the largest singular value, signed",
    formula="(σ̃₁ − σ₁)/σ₁",
    source=PAPER + 'App. B (printed "TIRC")',
    leading=True,
    heading="T1RC",
    digits="s",
)
def top_relative_change(t: Triple) -> Values:
    """T1RC."""
    change, bound = _change(t)
    return scalar(change[0], bound[0])


@of_change(
    "tail_rc",
    "mean relative change over the last 10 % of ranks, signed",
    formula="mean (σ̃ᵢ − σᵢ)/σᵢ, i > 0.9 n",
    heading="TailRC",
    digits="s",
)
def tail_relative_change(t: Triple) -> Values:
    """TailRC; the number of ranks is rounded up."""
    change, bound = (x[-math.ceil(len(x) / 10) :] for x in _change(t))
    return scalar(change.mean(), bound.mean())


@of_shape(
    "effective_rank_{which}",
    "effective rank of {which}: exp of the entropy of its singular values",
    formula="exp(H(p)), p = σ/Σσ",
    source=PAPER + "Tab. 4; Roy & Vetterli 2007",
    heading="ER {which}",
    which=PAIR,
)
def effective_rank(t: Triple, which: str) -> Values:
    """See `specbasis.core.spectrum.effective_rank`; not a number for a matrix of zeros."""
    return scalar(spectrum.effective_rank(getattr(t, which).spectrum))


@of_shape(
    "stable_rank_{which}",
    "stable rank of {which}",
    formula="‖·‖²_F/σ₁²",
    source="Rudelson & Vershynin 2007",
    heading="SR {which}",
    which=ALL,
)
def stable_rank(t: Triple, which: str) -> Values:
    """See `specbasis.core.spectrum.stable_rank`; not a number for a matrix of zeros."""
    return scalar(spectrum.stable_rank(getattr(t, which).spectrum))


def _change(t: Triple) -> tuple[Tensor, Tensor]:
    """Relative change of each singular value and its bound."""
    values = singular_value_change(t)
    assert values.bound is not None
    return values.value, values.bound


def _quotient_bound(numerator: Decomposition, denominator: Decomposition) -> Tensor:
    """Bound on the error of σ_a[i] / σ_b[i]: (error_a + ratio·error_b) / (σ_b − error_b); ∞ where that is ≤ 0."""
    x, y = numerator.spectrum, denominator.spectrum
    least = y - denominator.spectrum_error
    bound = (numerator.spectrum_error + x / y * denominator.spectrum_error) / least
    return torch.where(least > 0, bound, math.inf)
