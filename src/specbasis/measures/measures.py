"""What changed between two matrices: pure functions of their SVDs, and the table that names them all.

To add a measure, write a function of a `Triple` that returns `Values`, and add one line to `MEASURES` that says
which decompositions it reads: it then appears in the rows, and in the report's table of measures, like every other.
What no measure reads is never decomposed. What chance, size and rounding would give stands in a second table, in
`specbasis.measures.certify`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specbasis.core.attention_heads import HeadFigures
from specbasis.core.errors import InputError
from specbasis.core.groups import degenerate_groups, grouped
from specbasis.core.nulls import Core, Rounding, core
from specbasis.core.subspace import chance_alignment, nested_overlap, principal_angles
from specbasis.core.svd import SVD, Cosines, HalfSVD, cosines

RESOLVED = 1e-6
"""A figure whose error bound exceeds this is marked unresolved: its digits are arbitrary beyond."""


@dataclass(frozen=True)
class Absent:
    """A decomposition that no wanted measure reads: only the shape of its matrix is known."""

    which: str
    shape: tuple[int, int]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a measure reads the {name} of {self.which} and does not declare it; see Measure")


Decomposition = SVD | HalfSVD | Absent


@dataclass(frozen=True, eq=False)
class Triple:
    """The three decompositions that every measure reads: base, tuned, and delta = tuned − base.

    Attributes:
        base: SVD of the pretrained matrix.
        tuned: SVD of the finetuned matrix.
        delta: SVD of tuned − base, subtracted in float64.
        inner: ⟨base, tuned⟩_F, the sum of elementwise products.
        subspace: the number of ranks k at which principal angles are taken.
        norms: Frobenius norms of base, tuned and delta, from their entries; from the spectra when None.
        every: base with every vector of its short side, where a measure reads them.
        rounding: what rounding to the storage formats of base and of tuned does to an entry.
        heads: what changed in each attention head, where base is cut into heads.
        sampled: null → alignments, left and right, (draws, k), with random updates in place of delta.
        figures: other figures of the entries, by measure; see `specbasis.core.entries.read_entries`.
        entries: tuned as stored, (out, in), for what reads the size of each entry.
    """

    base: Decomposition
    tuned: Decomposition
    delta: Decomposition
    inner: float
    subspace: int = 10
    norms: Mapping[str, float] | None = None
    every: SVD | HalfSVD | None = None
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    heads: HeadFigures | None = None
    sampled: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    entries: Tensor | None = None
    _cosines: dict[tuple[str, str, str], Cosines] = field(default_factory=dict, repr=False)
    _matrices: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def identical(self) -> bool:
        """Whether tuned is base, bit for bit: the caller then passes the same SVD twice."""
        return self.base is self.tuned

    def norm(self, which: str) -> float:
        """Frobenius norm of base, tuned or delta."""
        if self.norms is not None:
            return self.norms[which]
        return float(torch.linalg.vector_norm(getattr(self, which).spectrum))

    def cosines(self, first: str, second: str, side: str) -> Cosines:
        """Cosines between the left or right vectors of two of the three, computed once."""
        key = (first, second, side)
        if key not in self._cosines:
            self._cosines[key] = cosines(getattr(self, first), getattr(self, second), side)
        return self._cosines[key]

    def matrix(self, side: str) -> Float[Tensor, "k k"]:
        """⟨base_i, tuned_j⟩ for all leading ranks of the left or right side, computed once, on the CPU."""
        if side not in self._matrices:
            self._matrices[side] = self.cosines("base", "tuned", side).matrix().cpu()
        return self._matrices[side]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What several measures read, computed by the first of them."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    @property
    def base_wide(self) -> bool:
        """Whether the short side is the left one."""
        return self.base.shape[0] <= self.base.shape[1]

    @property
    def ranks(self) -> int:
        """How many leading ranks of both have vectors."""
        return min(len(self.base.S), len(self.tuned.S))

    @property
    def core(self) -> Core:
        """The update in the basis of base."""
        assert self.every is not None
        base, delta = self.every, self.delta
        assert not isinstance(delta, Absent)
        found: Core = self.once("core", lambda: core(base, delta, self.ranks, self.norm("delta")))
        return found

    def tied(self, which: str) -> Bool[Tensor, " k"] | None:
        """Whether each leading rank shares a degenerate group with another under the rounding of the stored format.

        Of delta, whose entries carry both roundings, with both. None where the rounding is not known.
        """
        sides = ("base", "tuned") if which == "delta" else (which,)
        if not all(side in self.rounding for side in sides):
            return None
        variance = math.fsum(r.variance[r.stored] for r in (self.rounding[side] for side in sides))
        decomposition = getattr(self, which)
        return self.once(  # type: ignore[no-any-return]
            f"tied {which}",
            lambda: grouped(degenerate_groups(decomposition.spectrum, variance, len(decomposition.S))),
        )


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


@dataclass(frozen=True)
class Measure:
    """One entry of the table: the quantity's name, its unit, what ``index`` counts, its source, its function.

    A function may return None where the measure is undefined, such as a direction of a zero update. It may read the
    singular vectors (and values) of the decompositions that ``vectors`` names, the singular values of those that
    ``values`` names, `Triple.every` where ``every`` says so, and of the others nothing. One that reads
    nothing is taken whatever is asked for, except where it is ``asked`` for only.
    """

    name: str
    title: str
    unit: str
    index: str
    source: str
    function: Callable[[Triple], Values | None]
    vectors: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    every: bool = False
    asked: bool = False


# --- alignment of singular vectors ------------------------------------------------------------------------------


def alignment(X: Float[Tensor, "d a"], Y: Float[Tensor, "d b"]) -> Float[Tensor, " k"]:
    """Absolute cosine of the vectors of equal rank index.

    a_i = |⟨x_i, y_i⟩|, 0 … 1, for the k = min(a, b) ranks that both have, no matching of ranks, invariant to signs.
    Costs 2·d·k flops.

    Source: Yu et al. 2026, §3.1.
    """
    k = min(X.shape[1], Y.shape[1])
    return (X[:, :k] * Y[:, :k]).sum(dim=0).abs().clamp(max=1.0)


def alignment_bound(a: Decomposition, b: Decomposition) -> Float[Tensor, " k"]:
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
        c = t.cosines(first, second, side)
        k = len(c.diagonal)
        ties = [tied[:k] for tied in (t.tied(first), t.tied(second)) if tied is not None]
        return Values(
            c.diagonal.abs().clamp(max=1.0),
            (alignment_bound(a, b) + c.error).clamp(max=1.0),
            tied=torch.stack(ties).any(dim=0) if ties else None,
        )

    return function


def _overlap(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if _zero(t.base) or _zero(t.tuned):
            return None
        k = min(len(t.base.S), len(t.tuned.S))
        sizes = sorted({min(2**p, k) for p in range(k.bit_length() + 1)})
        if t.identical:
            return Values(torch.ones(len(sizes)).double(), torch.zeros(len(sizes)).double(), index=sizes)
        at = torch.tensor(sizes) - 1
        c = t.cosines("base", "tuned", side)
        overlap = nested_overlap(t.matrix(side))
        bound = subspace_bound(t.base)[:k] + subspace_bound(t.tuned)[:k]
        counts = torch.tensor(sizes, dtype=overlap.dtype)
        return Values(
            overlap.cpu()[at].clamp(max=1.0),
            (2 * bound.cpu()[at] / counts.sqrt() + 2 * c.error.cpu()[at]).clamp(max=1.0),
            index=sizes,
        )

    return function


def subspace_bound(s: Decomposition) -> Float[Tensor, " k"]:
    """Bound on ‖sin Θ‖_F between the computed leading j vectors of one side and the exact ones, j = 1 … k.

    √2 · √(Σ_{i<j} residual_i²) / (σ_{j−1} − σ_j), where σ past the end of the spectrum is 0 and the error of σ_j is
    taken off the gap; 0 for the whole space.

    Source: Wedin 1972.
    """
    k = len(s.S)
    after = torch.cat([s.spectrum + s.spectrum_error, s.spectrum.new_zeros(1)])[1 : k + 1]
    gap = s.S - after
    bound = torch.where(gap > 0, math.sqrt(2) * s.residual.square().cumsum(0).sqrt() / gap, math.inf)
    if k == s.shape[0] == s.shape[1]:
        bound[-1] = 0.0
    return bound


def _angles(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if _zero(t.base) or _zero(t.tuned):
            return None
        k = min(t.subspace, len(t.base.S), len(t.tuned.S))
        X, Y = (s.vectors(side, k) for s in (t.base, t.tuned))
        if t.identical:
            return Values(X.new_zeros(k), X.new_zeros(k))
        bound = float(subspace_bound(t.base)[k - 1] + subspace_bound(t.tuned)[k - 1])
        angles = principal_angles(X, Y)
        return Values(angles, angles.new_full((k,), min(math.pi / 2 * bound, math.pi / 2)))

    return function


def _chance(side: str) -> Callable[[Triple], Values]:
    return lambda t: _scalar(chance_alignment(t.base.shape[0 if side == "left" else 1]))


# --- singular values --------------------------------------------------------------------------------------------


def relative_change(t: Triple) -> Values:
    """Signed relative change of each singular value.

    (S_t[i] − S_b[i]) / S_b[i]; 0 where the two are equal, ∞ where only S_b[i] is zero.

    Source: Yu et al. 2026, Fig. 6.
    """
    base, tuned = t.base.spectrum, t.tuned.spectrum
    change = torch.where(tuned == base, 0.0, (tuned - base) / base)
    return Values(change, torch.zeros_like(base) if t.identical else _quotient_bound(t.tuned, t.base))


def relative_spectral_distance(t: Triple) -> Values:
    """RSD = ‖S_t − S_b‖₂ / ‖S_b‖₂. Source: Yu et al. 2026, App. B."""
    distance, norm = _norm(t.tuned.spectrum - t.base.spectrum), _norm(t.base.spectrum)
    error = _norm(t.tuned.spectrum_error) + (1 + distance / norm) * _norm(t.base.spectrum_error)
    return _scalar(0.0, 0.0) if t.identical else _scalar(distance / norm, error / norm)


def mean_relative_change(t: Triple) -> Values:
    """MRC: mean over ranks of |S_t[i] − S_b[i]| / S_b[i]. Source: Yu et al. 2026, App. B."""
    change, bound = _change(t)
    return _scalar(change.abs().mean(), bound.mean())


def max_relative_change(t: Triple) -> Values:
    """MaxRC: maximum over ranks of |S_t[i] − S_b[i]| / S_b[i]. Source: Yu et al. 2026, App. B."""
    change, bound = _change(t)
    return _scalar(change.abs().max(), bound.max())


def top_relative_change(t: Triple) -> Values:
    """T1RC = (S_t[0] − S_b[0]) / S_b[0], signed. Source: Yu et al. 2026, App. B (printed "TIRC")."""
    change, bound = _change(t)
    return _scalar(change[0], bound[0])


def tail_relative_change(t: Triple) -> Values:
    """TailRC: mean signed relative change over the last 10 % of ranks (ceil). Source: Yu et al. 2026, App. B."""
    change, bound = (x[-math.ceil(len(x) / 10) :] for x in _change(t))
    return _scalar(change.mean(), bound.mean())


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
    """Size of the update at equal rank: r_i = S_i(delta) / S_i(base), ∞ where only S_i(base) is zero.

    Source: Yu et al. 2026, Eq. 1.
    """
    base, delta = t.base.spectrum, t.delta.spectrum
    ratio = torch.where(delta == 0, 0.0, delta / base)
    return Values(ratio, torch.zeros_like(base) if t.identical else _quotient_bound(t.delta, t.base))


def relative_update(t: Triple) -> Values:
    """Size of the whole update: ‖delta‖_F / ‖base‖_F, 0 for a frozen matrix."""
    if t.identical:
        return _scalar(0.0)
    return _scalar(torch.tensor(t.norm("delta"), dtype=torch.float64) / t.norm("base"))


def weight_cosine(t: Triple) -> Values:
    """Cosine between the two matrices as vectors: ⟨base, tuned⟩_F / (‖base‖_F ‖tuned‖_F), −1 … 1.

    For independent matrices with centred entries it is near 0, with standard deviation at most about 1/√n for
    effective sizes n of the leading ranks; a finetune keeps it near 1, and a frozen matrix at exactly 1.
    """
    if t.identical:
        return _scalar(1.0)
    if "weight_cosine" in t.figures:
        return _scalar(t.figures["weight_cosine"])
    norms = torch.tensor(t.norm("base"), dtype=torch.float64) * t.norm("tuned")
    return _scalar((t.inner / norms).clamp(-1.0, 1.0))


def _figure(name: str) -> Callable[[Triple], Values | None]:
    """A figure of the entries; undefined where they were not read, or have none."""

    def function(t: Triple) -> Values | None:
        value = t.figures.get(name, math.nan)
        return None if math.isnan(value) else _scalar(value)

    return function


def _change(t: Triple) -> tuple[Tensor, Tensor]:
    """Relative change of each singular value and its bound."""
    values = relative_change(t)
    assert values.bound is not None
    return values.value, values.bound


def _quotient_bound(numerator: Decomposition, denominator: Decomposition) -> Tensor:
    """Bound on the error of S_a[i] / S_b[i]: (error_a + ratio·error_b) / (S_b − error_b); ∞ where that is ≤ 0."""
    x, y = numerator.spectrum, denominator.spectrum
    least = y - denominator.spectrum_error
    bound = (numerator.spectrum_error + x / y * denominator.spectrum_error) / least
    return torch.where(least > 0, bound, math.inf)


def _norm(S: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(S)
    return norm


def _scalar(value: float | Tensor, bound: float | Tensor | None = None) -> Values:
    figures = [None if x is None else torch.as_tensor(x, dtype=torch.float64).reshape(1) for x in (value, bound)]
    assert figures[0] is not None
    return Values(figures[0], figures[1])


def _zero(s: Decomposition) -> bool:
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
_PAIR = ("base", "tuned")
_ALL = ("base", "tuned", "delta")

MEASURES: tuple[Measure, ...] = (
    *(
        Measure(
            f"alignment_{s}",
            f"{s} alignment |⟨base_i, tuned_i⟩|",
            "1",
            "rank",
            _PAPER + "§3.1",
            _aligned(s, "base", "tuned"),
            vectors=_PAIR,
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
            vectors=("delta", "base"),
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
            vectors=_PAIR,
        )
        for s in _SIDES
    ),
    *(
        Measure(
            f"principal_angle_{s}",
            f"{s} principal angles",
            "rad",
            "angle",
            "Björck & Golub 1973",
            _angles(s),
            vectors=_PAIR,
        )
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
        Measure(
            f"singular_value_{w}",
            f"singular values of {w}",
            "weight",
            "rank",
            _PAPER + "§3.1",
            _spectrum(w),
            values=(w,),
        )
        for w in _ALL
    ),
    *(
        Measure(
            f"relative_gap_{w}",
            f"distance to the nearest singular value of {w}, in units of σ_i",
            "1",
            "rank",
            "gap_i / σ_i",
            lambda t, w=w: Values(getattr(t, w).relative_gap),
            vectors=(w,),
        )
        for w in _PAIR
    ),
    Measure(
        "singular_value_change",
        "relative change of singular values",
        "1",
        "rank",
        _PAPER + "Fig. 6",
        relative_change,
        values=_PAIR,
    ),
    Measure(
        "singular_value_ratio",
        "singular values of delta over those of base",
        "1",
        "rank",
        _PAPER + "Eq. 1",
        singular_value_ratio,
        values=("base", "delta"),
    ),
    *(
        Measure(
            f"explained_variance_{w}",
            f"cumulative energy of {w}",
            "1",
            "rank",
            _PAPER + "App. H",
            _of(w, explained_variance),
            values=(w,),
        )
        for w in _PAIR
    ),
    *(
        Measure(name, title, "1", "", _PAPER + "App. B", function, values=_PAIR)
        for name, title, function in (
            ("rsd", "relative spectral distance", relative_spectral_distance),
            ("mrc", "mean relative change", mean_relative_change),
            ("max_rc", "maximum relative change", max_relative_change),
            ("t1_rc", "relative change of the largest value", top_relative_change),
            ("tail_rc", "relative change of the last 10 %", tail_relative_change),
        )
    ),
    *(
        Measure(
            f"effective_rank_{w}",
            f"effective rank of {w}",
            "ranks",
            "",
            _PAPER + "Tab. 4",
            _of(w, effective_rank),
            values=(w,),
        )
        for w in _PAIR
    ),
    *(
        Measure(
            f"stable_rank_{w}",
            f"stable rank of {w}",
            "ranks",
            "",
            "Rudelson & Vershynin 2007",
            _of(w, stable_rank),
            values=(w,),
        )
        for w in _ALL
    ),
    *(
        Measure(f"norm_{w}", f"Frobenius norm of {w}", "weight", "", "‖·‖_F", lambda t, w=w: _scalar(t.norm(w)))
        for w in _ALL
    ),
    Measure("relative_update", "size of the update", "1", "", "‖delta‖_F / ‖base‖_F", relative_update),
    Measure("weight_cosine", "cosine of the two matrices", "1", "", "⟨base, tuned⟩_F / ‖·‖‖·‖", weight_cosine),
    *(
        Measure(name, title, unit, "", "specbasis.core.entries", _figure(name))
        for name, title, unit in (
            ("weight_cosine_z", "cosine against rows and columns in random order", "standard deviations"),
            ("equal_entries", "share of entries that are equal", "1"),
            ("equal_entries_rounded", "share that is equal in the coarser precision", "1"),
            ("precision_base", "significant bits that hold every entry of base", "bits"),
            ("precision_tuned", "significant bits that hold every entry of tuned", "bits"),
            ("zero_entries_base", "share of zeros in base", "1"),
            ("zero_entries_tuned", "share of zeros in tuned", "1"),
            ("grid_levels_base", "levels of the grid on which base lies", "1"),
            ("grid_levels_tuned", "levels of the grid on which tuned lies", "1"),
            ("equal_entries_grid", "share of groups in which base rounds to tuned", "1"),
        )
    ),
)


def choose(patterns: Sequence[str], *, whole: bool = True, table: Sequence[Measure] = MEASURES) -> tuple[str, ...]:
    """Names of the measures that match any of some patterns (``*`` and ``?``), in the table's order; all when none.

    Without ``whole``, only those that can be taken where no more than the leading singular values are known. Those
    that read no decomposition are always among them: they cost nothing, and the verdict rests on them.

    Raises:
        InputError: a pattern matches no measure.
    """
    names = [measure.name for measure in table]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"no measure {pattern!r}; there is: {', '.join(names)}")
    return tuple(
        m.name
        for m in table
        if (
            not patterns
            or not (m.vectors or m.values or m.asked)
            or any(fnmatch.fnmatchcase(m.name, p) for p in patterns)
        )
        and (whole or not (m.values or m.every) or m.name.startswith("singular_value_") or m.name == "t1_rc")
    )


def needed(names: Sequence[str], ranks: int, table: Sequence[Measure] = MEASURES) -> dict[str, int | None]:
    """How many vectors some measures read of base, tuned and delta; 0 for values only, None for nothing."""
    wanted = [measure for measure in table if measure.name in names]
    return {
        which: ranks
        if any(which in m.vectors for m in wanted)
        else 0
        if any(which in m.values for m in wanted)
        else None
        for which in _ALL
    }


def measure_all(
    t: Triple, names: Sequence[str] | None = None, table: Sequence[Measure] = MEASURES
) -> Iterator[tuple[Measure, Values]]:
    """Every measure of a table, or of some names, that is defined for these matrices, in the table's order."""
    for measure in table:
        values = measure.function(t) if names is None or measure.name in names else None
        if values is not None:
            yield measure, values
