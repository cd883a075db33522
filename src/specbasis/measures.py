"""What changed between two matrices: pure functions of their SVDs, and the table that names them all.

To add a measure, write a function of a `Triple` that returns `Values`, and add one line to `MEASURES`: it then
appears in the rows, and in the report's table of measures, like every other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specbasis.subspace import chance_alignment, nested_overlap, principal_angles
from specbasis.svd import SVD

RESOLVED = 1e-6
"""A figure whose error bound exceeds this is marked unresolved: its digits are arbitrary beyond."""


@dataclass(frozen=True, eq=False)
class Triple:
    """The three decompositions that every measure reads: base, tuned, and delta = tuned − base.

    Attributes:
        base: SVD of the pretrained matrix.
        tuned: SVD of the finetuned matrix.
        delta: SVD of tuned − base, subtracted in float64.
        inner: ⟨base, tuned⟩_F, the sum of elementwise products.
        subspace: the number of ranks k at which principal angles are taken.
    """

    base: SVD
    tuned: SVD
    delta: SVD
    inner: float
    subspace: int = 10

    @property
    def identical(self) -> bool:
        """Whether tuned is base, bit for bit: the caller then passes the same SVD twice."""
        return self.base is self.tuned


@dataclass(frozen=True, eq=False)
class Values:
    """Figures of one measure: ``value``, their error ``bound`` (None: rounding only), and their 0-based ``index``.

    The index is a rank, or a number of ranks k where the measure says so, or None for a figure of the whole matrix.
    """

    value: Float[Tensor, " n"]
    bound: Float[Tensor, " n"] | None = None
    index: list[int] | None = None

    def resolved(self, *, relative: bool) -> Bool[Tensor, " n"] | None:
        """Whether each bound is at most `RESOLVED` (times the figure where it has the weights' units)."""
        if self.bound is None:
            return None
        scale = self.value.abs() if relative else self.value.abs().clamp(min=1.0)
        return self.bound <= RESOLVED * scale


@dataclass(frozen=True)
class Measure:
    """One entry of the table: the quantity's name, its unit, what ``index`` counts, its source, its function.

    A function may return None where the measure is undefined, such as a direction of a zero update.
    """

    name: str
    title: str
    unit: str
    index: str
    source: str
    function: Callable[[Triple], Values | None]


# --- alignment of singular vectors ------------------------------------------------------------------------------


def alignment(X: Float[Tensor, "d a"], Y: Float[Tensor, "d b"]) -> Float[Tensor, " k"]:
    """Absolute cosine of the vectors of equal rank index.

    a_i = |⟨x_i, y_i⟩|, 0 … 1, for the k = min(a, b) ranks that both have, no matching of ranks, invariant to signs.
    Costs 2·d·k flops.

    Source: Yu et al. 2026, §3.1.
    """
    k = min(X.shape[1], Y.shape[1])
    return (X[:, :k] * Y[:, :k]).sum(dim=0).abs().clamp(max=1.0)


def alignment_bound(a: SVD, b: SVD) -> Float[Tensor, " k"]:
    """Bound on the numerical error of the alignment of two computed vectors of equal rank.

    π/√2 · (bound_a + bound_b), at most 1: each computed vector is within the angle arcsin(√2·bound) of the exact
    one, arcsin x ≤ π/2·x, and a cosine moves by no more than the angles do.
    """
    k = min(len(a.S), len(b.S))
    return (math.pi / math.sqrt(2) * (a.bound[:k] + b.bound[:k])).clamp(max=1.0)


def _aligned(side: str, first: str, second: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        a, b = getattr(t, first), getattr(t, second)
        if _zero(a) or _zero(b):
            return None
        if a is b:  # the same matrix: exactly 1, whatever the gaps
            return Values(torch.ones_like(a.S), torch.zeros_like(a.S))
        X, Y = (a.U, b.U) if side == "left" else (a.Vh.mT, b.Vh.mT)
        return Values(alignment(X, Y), alignment_bound(a, b))

    return function


def _overlap(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if _zero(t.base) or _zero(t.tuned):
            return None
        k = min(len(t.base.S), len(t.tuned.S))
        X, Y = (s.U if side == "left" else s.Vh.mT for s in (t.base, t.tuned))
        sizes = sorted({min(2**p, k) for p in range(k.bit_length() + 1)})
        if t.identical:
            return Values(torch.ones(len(sizes)).double(), torch.zeros(len(sizes)).double(), index=sizes)
        at = torch.tensor(sizes) - 1
        overlap = nested_overlap(X[:, :k].mT @ Y[:, :k])
        bound = subspace_bound(t.base)[:k] + subspace_bound(t.tuned)[:k]
        counts = torch.tensor(sizes, dtype=overlap.dtype)
        return Values(
            overlap.cpu()[at].clamp(max=1.0),
            (2 * bound.cpu()[at] / counts.sqrt()).clamp(max=1.0),
            index=sizes,
        )

    return function


def subspace_bound(s: SVD) -> Float[Tensor, " k"]:
    """Bound on ‖sin Θ‖_F between the computed leading j vectors of one side and the exact ones, j = 1 … k.

    √2 · √(Σ_{i<j} residual_i²) / (σ_{j−1} − σ_j), where σ past the end of the spectrum is 0 and the error of σ_j is
    taken off the gap; 0 for the whole space.

    Source: Wedin 1972.
    """
    k = len(s.S)
    after = torch.cat([s.spectrum + s.spectrum_error, s.spectrum.new_zeros(1)])[1 : k + 1]
    gap = s.S - after
    bound = torch.where(gap > 0, math.sqrt(2) * s.residual.square().cumsum(0).sqrt() / gap, math.inf)
    if k == s.U.shape[0] == s.Vh.shape[1]:
        bound[-1] = 0.0
    return bound


def _angles(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if _zero(t.base) or _zero(t.tuned):
            return None
        k = min(t.subspace, len(t.base.S), len(t.tuned.S))
        X, Y = (s.U[:, :k] if side == "left" else s.Vh[:k].mT for s in (t.base, t.tuned))
        if t.identical:
            return Values(X.new_zeros(k), X.new_zeros(k))
        bound = float(subspace_bound(t.base)[k - 1] + subspace_bound(t.tuned)[k - 1])
        angles = principal_angles(X, Y)
        return Values(angles, angles.new_full((k,), min(math.pi / 2 * bound, math.pi / 2)))

    return function


def _chance(side: str) -> Callable[[Triple], Values]:
    return lambda t: _scalar(chance_alignment(t.base.U.shape[0] if side == "left" else t.base.Vh.shape[1]))


# --- singular values --------------------------------------------------------------------------------------------


def relative_change(t: Triple) -> Values:
    """Signed relative change of each singular value.

    (S_t[i] − S_b[i]) / S_b[i]; 0 where the two are equal, ∞ where only S_b[i] is zero.

    Source: Yu et al. 2026, Fig. 6.
    """
    base, tuned = t.base.spectrum, t.tuned.spectrum
    bound = (t.tuned.spectrum_error + (tuned / base) * t.base.spectrum_error) / base
    return Values(
        torch.where(tuned == base, 0.0, (tuned - base) / base), torch.zeros_like(base) if t.identical else bound
    )


def relative_spectral_distance(t: Triple) -> Values:
    """RSD = ‖S_t − S_b‖₂ / ‖S_b‖₂. Source: Yu et al. 2026, App. B."""
    change = torch.linalg.vector_norm(t.tuned.spectrum - t.base.spectrum)
    return _scalar(change / torch.linalg.vector_norm(t.base.spectrum))


def mean_relative_change(t: Triple) -> Values:
    """MRC: mean over ranks of |S_t[i] − S_b[i]| / S_b[i]. Source: Yu et al. 2026, App. B."""
    return _scalar(_change(t).abs().mean())


def max_relative_change(t: Triple) -> Values:
    """MaxRC: maximum over ranks of |S_t[i] − S_b[i]| / S_b[i]. Source: Yu et al. 2026, App. B."""
    return _scalar(_change(t).abs().max())


def top_relative_change(t: Triple) -> Values:
    """T1RC = (S_t[0] − S_b[0]) / S_b[0], signed. Source: Yu et al. 2026, App. B (printed "TIRC")."""
    return _scalar(_change(t)[0])


def tail_relative_change(t: Triple) -> Values:
    """TailRC: mean signed relative change over the last 10 % of ranks (ceil). Source: Yu et al. 2026, App. B."""
    change = _change(t)
    return _scalar(change[-math.ceil(len(change) / 10) :].mean())


def effective_rank(S: Float[Tensor, " n"]) -> float:
    """Effective rank: exp(H(p)), p = S / ΣS, natural logarithm; 1 … n, NaN for a zero matrix.

    Source: Roy & Vetterli 2007; Yu et al. 2026, Tab. 4.
    """
    p = S / S.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(S: Float[Tensor, " n"]) -> float:
    """Stable rank: ‖W‖_F² / σ_1², 1 … n, NaN for a zero matrix. Source: Rudelson & Vershynin 2007."""
    return float(S.square().sum() / S[0] ** 2)


def explained_variance(S: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Share of energy in the leading i + 1 ranks: cumulative ΣS² / ‖W‖_F². Source: Yu et al. 2026, App. H."""
    energy = S.square().cumsum(0)
    return energy / energy[-1]


def singular_value_ratio(t: Triple) -> Values:
    """Size of the update at equal rank: r_i = S_i(delta) / S_i(base). Source: Yu et al. 2026, Eq. 1."""
    base, delta = t.base.spectrum, t.delta.spectrum
    return Values(delta / base, (t.delta.spectrum_error + (delta / base) * t.base.spectrum_error) / base)


def relative_update(t: Triple) -> Values:
    """Size of the whole update: ‖delta‖_F / ‖base‖_F."""
    return _scalar(torch.linalg.vector_norm(t.delta.spectrum) / torch.linalg.vector_norm(t.base.spectrum))


def weight_cosine(t: Triple) -> Values:
    """Cosine between the two matrices as vectors: ⟨base, tuned⟩_F / (‖base‖_F ‖tuned‖_F), −1 … 1.

    For independent matrices with centred entries it is near 0, with standard deviation at most about 1/√n for
    effective sizes n of the leading ranks; a finetune keeps it near 1, and a frozen matrix at exactly 1.
    """
    if t.identical and not _zero(t.base):
        return _scalar(1.0)
    norms = torch.linalg.vector_norm(t.base.spectrum) * torch.linalg.vector_norm(t.tuned.spectrum)
    return _scalar((t.inner / norms).clamp(-1.0, 1.0))


def _change(t: Triple) -> Tensor:
    return relative_change(t).value


def _scalar(value: float | Tensor) -> Values:
    return Values(torch.as_tensor(value, dtype=torch.float64).reshape(1))


def _zero(s: SVD) -> bool:
    return bool(s.spectrum[0] == 0)


def _of(which: str, function: Callable[[Tensor], float | Tensor]) -> Callable[[Triple], Values]:
    def measure(t: Triple) -> Values:
        out = function(getattr(t, which).spectrum)
        return Values(out) if isinstance(out, Tensor) else _scalar(out)

    return measure


def _spectrum(which: str) -> Callable[[Triple], Values]:
    return lambda t: Values(getattr(t, which).spectrum, getattr(t, which).spectrum_error)


_PAPER = "Yu et al. 2026, "
_SIDES = ("left", "right")

MEASURES: tuple[Measure, ...] = (
    *(
        Measure(
            f"alignment_{s}",
            f"{s} alignment |⟨base_i, tuned_i⟩|",
            "1",
            "rank",
            _PAPER + "§3.1",
            _aligned(s, "base", "tuned"),
        )
        for s in _SIDES
    ),
    *(
        Measure(
            f"update_alignment_{s}",
            f"{s} alignment |⟨delta_i, base_i⟩|",
            "1",
            "rank",
            _PAPER + "Eq. 2",
            _aligned(s, "delta", "base"),
        )
        for s in _SIDES
    ),
    *(
        Measure(
            f"subspace_overlap_{s}",
            f"{s} overlap of the leading k ranks",
            "1",
            "k",
            "NOTES: ‖U_kᵀ Ũ_k‖_F² / k",
            _overlap(s),
        )
        for s in _SIDES
    ),
    *(
        Measure(f"principal_angle_{s}", f"{s} principal angles", "rad", "angle", "Björck & Golub 1973", _angles(s))
        for s in _SIDES
    ),
    *(
        Measure(
            f"chance_alignment_{s}",
            f"{s} alignment of independent directions",
            "1",
            "",
            "E|cos| of uniform unit vectors",
            _chance(s),
        )
        for s in _SIDES
    ),
    *(
        Measure(f"singular_value_{w}", f"singular values of {w}", "weight", "rank", _PAPER + "§3.1", _spectrum(w))
        for w in ("base", "tuned", "delta")
    ),
    *(
        Measure(
            f"relative_gap_{w}",
            f"distance to the nearest singular value of {w}, in units of σ_i",
            "1",
            "rank",
            "gap_i / σ_i",
            lambda t, w=w: Values(getattr(t, w).relative_gap),
        )
        for w in ("base", "tuned")
    ),
    Measure(
        "singular_value_change",
        "relative change of singular values",
        "1",
        "rank",
        _PAPER + "Fig. 6",
        relative_change,
    ),
    Measure(
        "singular_value_ratio",
        "singular values of delta over those of base",
        "1",
        "rank",
        _PAPER + "Eq. 1",
        singular_value_ratio,
    ),
    *(
        Measure(
            f"explained_variance_{w}",
            f"cumulative energy of {w}",
            "1",
            "rank",
            _PAPER + "App. H",
            _of(w, explained_variance),
        )
        for w in ("base", "tuned")
    ),
    Measure("rsd", "relative spectral distance", "1", "", _PAPER + "App. B", relative_spectral_distance),
    Measure("mrc", "mean relative change", "1", "", _PAPER + "App. B", mean_relative_change),
    Measure("max_rc", "maximum relative change", "1", "", _PAPER + "App. B", max_relative_change),
    Measure("t1_rc", "relative change of the largest value", "1", "", _PAPER + "App. B", top_relative_change),
    Measure("tail_rc", "relative change of the last 10 %", "1", "", _PAPER + "App. B", tail_relative_change),
    *(
        Measure(
            f"effective_rank_{w}",
            f"effective rank of {w}",
            "ranks",
            "",
            _PAPER + "Tab. 4",
            _of(w, effective_rank),
        )
        for w in ("base", "tuned")
    ),
    *(
        Measure(
            f"stable_rank_{w}",
            f"stable rank of {w}",
            "ranks",
            "",
            "Rudelson & Vershynin 2007",
            _of(w, stable_rank),
        )
        for w in ("base", "tuned", "delta")
    ),
    *(
        Measure(
            f"norm_{w}",
            f"Frobenius norm of {w}",
            "weight",
            "",
            "‖·‖_F",
            _of(w, lambda S: float(torch.linalg.vector_norm(S))),
        )
        for w in ("base", "tuned", "delta")
    ),
    Measure("relative_update", "size of the update", "1", "", "‖delta‖_F / ‖base‖_F", relative_update),
    Measure("weight_cosine", "cosine of the two matrices", "1", "", "⟨base, tuned⟩_F / ‖·‖‖·‖", weight_cosine),
)


def measure_all(t: Triple) -> Iterator[tuple[Measure, Values]]:
    """Every measure of the table that is defined for these matrices, in the table's order."""
    for measure in MEASURES:
        values = measure.function(t)
        if values is not None:
            yield measure, values
