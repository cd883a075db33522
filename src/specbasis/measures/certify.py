"""The second table of measures: what chance, size, rounding and degeneracy would give beside each figure.

`table` puts it behind `measures.MEASURES`: `ALWAYS` by default, `NULLS` on request, the heads where a
model says how many it has, and a user's own functions.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specbasis.core import nulls
from specbasis.core.attention_heads import HeadFigures
from specbasis.core.errors import InputError
from specbasis.core.groups import (
    INTRUDER_COSINE,
    INTRUDER_RANKS,
    degenerate_groups,
    group_alignment,
    grouped,
    intruder_cosine,
    matched_chance,
    matching,
)
from specbasis.core.svd import SVD, HalfSVD
from specbasis.measures.measures import MEASURES, Measure, Triple, Values

SIDES = ("left", "right")
OwnMeasure = Callable[..., Any]
"""A function of one SVD (then taken of base and of tuned), or of two (base, tuned): a number, or one for each
rank."""

_PAIR = ("base", "tuned")


NEGLIGIBLE = 1e-4
"""Where the mean entry of an update holds less than this share of its energy, permuting it is the Gaussian null."""

COARSE = ("bfloat16", "float16", "int8")
"""Formats whose rounding is taken as a null; that of float32 turns nothing by more than 10⁻⁶."""


def _zero(t: Triple) -> bool:
    """Whether there is nothing to turn, or nothing that turns it."""
    return t.once("zero", lambda: bool(t.base.spectrum[0] == 0) or t.identical or t.norm("delta") == 0)  # type: ignore[no-any-return]


def _side(t: Triple, pair: tuple[Any, Any], side: str) -> Any:
    """The one of (short, long) that is a side."""
    return pair[0 if (side == "left") == t.base_wide else 1]


def _dimension(t: Triple, side: str) -> int:
    return t.base.shape[0 if side == "left" else 1]


def _number(value: float, bound: float | None = None) -> Values:
    figures = (None if x is None else torch.tensor([x], dtype=torch.float64) for x in (value, bound))
    return Values(*figures)  # type: ignore[arg-type]


# --- rounding, groups, intruders: by default ---------------------------------------------------------------------


def _rounding(form: str) -> Callable[[Triple], Values | None]:
    """√(Σ step²/12) / ‖W̃‖_F of the format as stored, or of another one."""

    def function(t: Triple) -> Values | None:
        found = t.rounding.get("tuned")
        norm = t.norm("tuned")
        if found is None or not norm:
            return None
        variance = found.variance[form or found.stored]
        return _number(math.sqrt(variance * t.base.shape[0] * t.base.shape[1]) / norm)

    return function


def _groups(t: Triple, by: str) -> Tensor | None:
    """The degenerate group of each leading rank of base, under the stored rounding or under the update."""

    def compute() -> Tensor | None:
        if by == "update":
            variance = t.norm("delta") ** 2 / (t.base.shape[0] * t.base.shape[1])
        elif "base" in t.rounding:
            variance = t.rounding["base"].variance[t.rounding["base"].stored]
        else:
            return None
        return degenerate_groups(t.base.spectrum, variance, len(t.base.S))

    return t.once(f"groups {by}", compute)  # type: ignore[no-any-return]


def _group_rows(by: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        first = None if _zero(t) and by == "update" else _groups(t, by)
        if first is None:
            return None
        members = grouped(first).nonzero()[:, 0]
        return Values(first[members].double(), index=members.tolist()) if len(members) else None

    return function


def _group_alignment(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        first = None if _zero(t) or t.tuned.spectrum[0] == 0 else _groups(t, "update")
        if first is None:
            return None
        starts, alignments, _ = group_alignment(t.matrix(side), first[: t.ranks])
        return Values(torch.tensor(alignments, dtype=torch.float64), index=starts) if starts else None

    return function


def _intruders(t: Triple, side: str) -> Tensor:
    def compute() -> Tensor:
        k = len(t.tuned.S)
        if t.identical:
            return torch.ones(k, dtype=torch.float64)
        assert t.every is not None
        return intruder_cosine(t.every, t.tuned, side, k).cpu()  # type: ignore[arg-type]

    return t.once(f"intruders {side}", compute)  # type: ignore[no-any-return]


def _intruder_cosine(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        return None if t.base.spectrum[0] == 0 or t.tuned.spectrum[0] == 0 else Values(_intruders(t, side))

    return function


def _intruder_count(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if t.base.spectrum[0] == 0 or t.tuned.spectrum[0] == 0:
            return None
        return _number(float((_intruders(t, side)[:INTRUDER_RANKS] < INTRUDER_COSINE).sum()))

    return function


def _chance_intruder(side: str) -> Callable[[Triple], Values]:
    return lambda t: _number(nulls.chance_quantile(_dimension(t, side), 0.95, among=min(t.base.shape)))


ALWAYS: tuple[Measure, ...] = (
    *(
        Measure(
            "rounding_update" + (f"_{form}" if form else ""),
            f"expected size of rounding to {form or 'the stored format'}",
            "1",
            "",
            "Σ step²/12",
            _rounding(form),
            asked=True,
        )
        for form in ("", "bfloat16", "float16", "int8")
    ),
    Measure(
        "degenerate_group_stored",
        "first rank of the group of base that rounding to the stored format mixes",
        "rank",
        "rank",
        "σ_i − σ_{i+1} ≤ √2·noise",
        _group_rows("stored"),
        vectors=("base",),
    ),
    Measure(
        "degenerate_group_update",
        "first rank of the group of base that noise of the update's size mixes",
        "rank",
        "rank",
        "σ_i − σ_{i+1} ≤ √2·noise",
        _group_rows("update"),
        vectors=("base",),
    ),
    *(
        Measure(
            f"group_alignment_{s}",
            f"{s} alignment of each group as a subspace",
            "1",
            "first rank",
            "√(‖U_Gᵀ Ũ_G‖_F² / |G|)",
            _group_alignment(s),
            vectors=_PAIR,
        )
        for s in SIDES
    ),
    *(
        Measure(
            f"intruder_cosine_{s}",
            f"best {s} alignment of each tuned vector with any of base",
            "1",
            "rank",
            "Shuttleworth et al. 2024",
            _intruder_cosine(s),
            vectors=_PAIR,
            every=True,
        )
        for s in SIDES
    ),
    *(
        Measure(
            f"intruders_{s}",
            f"{s} intruder dimensions: of the leading {INTRUDER_RANKS}, those below {INTRUDER_COSINE}",
            "ranks",
            "",
            "Shuttleworth et al. 2024",
            _intruder_count(s),
            vectors=_PAIR,
            every=True,
        )
        for s in SIDES
    ),
    *(
        Measure(
            f"chance_intruder_cosine_{s}",
            f"what the best of min(out, in) independent {s} directions stays below in 95 %",
            "1",
            "",
            "Beta law, Šidák",
            _chance_intruder(s),
        )
        for s in SIDES
    ),
)
"""Measures of what storage, degeneracy and intruders say, taken by default."""


# --- nulls: on request -------------------------------------------------------------------------------------------


def _observed(t: Triple, side: str) -> Tensor:
    return t.cosines("base", "tuned", side).diagonal.abs().clamp(max=1.0).cpu()


def _spectrum(t: Triple) -> Tensor:
    return t.base.spectrum.cpu()


def _sizes(t: Triple) -> tuple[int, int]:
    return min(t.base.shape), max(t.base.shape)


def _variance(t: Triple) -> float:
    return t.norm("delta") ** 2 / (t.base.shape[0] * t.base.shape[1])


def _coarse(t: Triple) -> bool:
    return "tuned" in t.rounding and t.rounding["tuned"].stored in COARSE


def _null(t: Triple, kind: str) -> tuple[Tensor, Tensor] | None:
    """Root mean square alignment under a null, (short, long)."""
    if kind == "rounding":
        if not _coarse(t):
            return None
        found = t.rounding["tuned"]
        return nulls.null_alignment(_spectrum(t), _sizes(t), t.ranks, found.variance[found.stored])
    if _zero(t):
        one = torch.ones(t.ranks, dtype=torch.float64)
        return one, one
    if kind == "permuted":
        assert t.every is not None
        mean = nulls.mean_entry(t.delta)  # type: ignore[arg-type]
        if mean**2 < NEGLIGIBLE * _variance(t):
            return t.once("null gaussian", lambda: _null(t, "gaussian"))  # type: ignore[no-any-return]
        return nulls.null_alignment(
            _spectrum(t), _sizes(t), t.ranks, max(0.0, _variance(t) - mean**2), nulls.mean_update(t.every, mean)
        )
    return nulls.null_alignment(_spectrum(t), _sizes(t), t.ranks, _variance(t))


def _null_alignment(kind: str, side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if t.base.spectrum[0] == 0:
            return None
        found = t.once(f"null {kind}", lambda: _null(t, kind))
        return None if found is None else Values(_side(t, found, side))

    return function


def _predicted(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if t.base.spectrum[0] == 0:
            return None
        if _zero(t):
            return Values(torch.ones(t.ranks, dtype=torch.float64))
        return Values(_side(t, t.once("predicted", lambda: nulls.predicted_alignment(t.core)), side))

    return function


def _turned(t: Triple) -> tuple[Tensor, Tensor]:
    """Squared first-order rotations by the update, (short, long)."""
    return t.once("response", lambda: nulls.response(t.core))  # type: ignore[no-any-return]


def _rotation_factor(side: str) -> Callable[[Triple], Values | None]:
    """First-order rotation of the update over the one that is expected of its size."""

    def function(t: Triple) -> Values | None:
        if _zero(t):
            return None
        expected = t.once("sensitivity", lambda: nulls.sensitivity(_spectrum(t), _sizes(t), t.ranks))
        size = (t.norm("delta") / t.norm("base")) ** 2
        return Values(_side(t, _turned(t), side) / (_side(t, expected, side) * size))

    return function


def _p_gaussian(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        return (
            None if _zero(t) else Values(_side(t, t.once("p", lambda: nulls.p_gaussian(t.core, _turned(t))), side))
        )

    return function


def _p_independent(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if t.base.spectrum[0] == 0 or t.tuned.spectrum[0] == 0:
            return None
        observed = torch.ones(t.ranks, dtype=torch.float64) if t.identical else _observed(t, side)
        return Values(nulls.p_independent(observed, _dimension(t, side)))

    return function


def _size_share(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if _zero(t) or t.tuned.spectrum[0] == 0:
            return None
        null = _side(t, t.once("null gaussian", lambda: _null(t, "gaussian")), side)
        return Values(nulls.size_share(_observed(t, side), null, _dimension(t, side)))

    return function


def _interval(side: str, end: int) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if not _coarse(t) or t.entries is None or t.base.spectrum[0] == 0 or t.tuned.spectrum[0] == 0:
            return None
        if t.identical:
            return Values(torch.ones(t.ranks, dtype=torch.float64))
        ends = _side(t, t.once("intervals", lambda: _intervals(t)), side)
        return Values(ends[end])

    return function


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


def _matched(t: Triple) -> Tensor:
    return t.once("matched", lambda: matching(t.matrix("left"), t.matrix("right")))  # type: ignore[no-any-return]


def _matched_rank(t: Triple) -> Values | None:
    if _zero(t) or t.tuned.spectrum[0] == 0:
        return None
    return Values(_matched(t).double())


def _matched_alignment(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if _zero(t) or t.tuned.spectrum[0] == 0:
            return None
        return Values(t.matrix(side)[torch.arange(t.ranks), _matched(t)].abs().clamp(max=1.0))

    return function


def _matched_chance(side: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if _zero(t):
            return None
        mean, error = matched_chance(t.ranks, *t.base.shape)[0 if side == "left" else 1]
        return _number(mean, 2 * error)

    return function


def _both(
    name: str,
    title: str,
    source: str,
    make: Callable[[str], Callable[[Triple], Values | None]],
    *,
    vectors: tuple[str, ...] = _PAIR,
    values: tuple[str, ...] = (),
    every: bool = False,
) -> tuple[Measure, ...]:
    """One measure for each side."""
    return tuple(
        Measure(f"{name}_{s}", f"{s} {title}", "1", "rank", source, make(s), vectors, values, every) for s in SIDES
    )


_CORE: dict[str, Any] = {"values": ("delta",), "every": True}
_ORDER = "Stewart 1991, first order"

NULLS: tuple[Measure, ...] = (
    *_both("p_independent", "chance of so high an alignment of independent directions", "Beta law", _p_independent),
    *_both(
        "null_alignment_gaussian",
        "alignment under a Gaussian update of the same size",
        "pairs of ranks",
        lambda s: _null_alignment("gaussian", s),
    ),
    *_both(
        "null_alignment_permuted",
        "alignment under the permuted update",
        "pairs of ranks",
        lambda s: _null_alignment("permuted", s),
        **_CORE,
    ),
    *_both(
        "null_alignment_rounding",
        "alignment under rounding to the stored format alone",
        "pairs of ranks",
        lambda s: _null_alignment("rounding", s),
    ),
    *_both(
        "p_gaussian", "chance that a Gaussian update of this size turns it so little", _ORDER, _p_gaussian, **_CORE
    ),
    *_both(
        "predicted_alignment", "alignment that perturbation theory predicts", "pairs of ranks", _predicted, **_CORE
    ),
    *_both(
        "rotation_factor", "squared rotation over that of noise of this size", _ORDER, _rotation_factor, **_CORE
    ),
    *_both("size_share", "share of the stability that size alone explains", "Yu et al. 2026, §4.2", _size_share),
    *_both(
        "alignment_low", "alignment before tuned was rounded, lower end of 95 %", _ORDER, lambda s: _interval(s, 0)
    ),
    *_both("alignment_high", "alignment before tuned was rounded, upper end", _ORDER, lambda s: _interval(s, 1)),
    Measure(
        "matched_rank",
        "rank of tuned that is matched with this rank of base",
        "rank",
        "rank",
        "Kuhn 1955",
        _matched_rank,
        vectors=_PAIR,
    ),
    *_both("matched_alignment", "alignment after matching ranks within a band", "Kuhn 1955", _matched_alignment),
    *(
        Measure(
            f"matched_chance_{s}",
            f"mean {s} alignment that matching finds in independent directions",
            "1",
            "",
            "sampled; bound: 2 standard errors",
            _matched_chance(s),
            vectors=_PAIR,
        )
        for s in SIDES
    ),
)
"""Measures of what an update of the same size without a direction would leave."""


def _sampled(kind: str, side: str, what: str) -> Callable[[Triple], Values | None]:
    at = SIDES.index(side)

    def function(t: Triple) -> Values | None:
        if kind not in t.sampled:
            return None
        drawn = t.sampled[kind][at]
        if what == "mean":
            return Values(drawn.mean(dim=0), 2 * nulls.standard_error(drawn))
        observed = torch.ones(t.ranks, dtype=torch.float64) if t.identical else _observed(t, side)
        return Values(nulls.p_sampled(observed, drawn))

    return function


SAMPLED: tuple[Measure, ...] = tuple(
    measure
    for kind in nulls.KINDS
    for measure in (
        *_both(
            f"sampled_alignment_{kind}",
            f"mean alignment under sampled updates: {kind}",
            "sampled; bound: 2 standard errors",
            lambda s, kind=kind: _sampled(kind, s, "mean"),
        ),
        *_both(
            f"p_sampled_{kind}",
            f"chance of so high an alignment under sampled updates: {kind}",
            "Phipson & Smyth 2010",
            lambda s, kind=kind: _sampled(kind, s, "p"),
        ),
    )
)
"""Measures of whole decompositions of base plus random updates."""


def _head(field: str) -> Callable[[Triple], Values | None]:
    def function(t: Triple) -> Values | None:
        if t.heads is None:
            return None
        found = getattr(t.heads, field)
        return None if bool(found.isnan().all()) else Values(found)

    return function


HEADS: tuple[Measure, ...] = tuple(
    Measure(f"head_{field}", title, "1", "head", "each head's slice", _head(field), asked=True)
    for field, title in zip(
        HeadFigures.__dataclass_fields__,
        (
            "mean left alignment of a head's leading ranks",
            "mean right alignment of a head's leading ranks",
            "share of the update's energy in a head",
            "size of the update of a head, over the head's",
            "rotation of the subspace that a head reads from or writes to",
        ),
        strict=True,
    )
)
"""Measures of the heads of attention matrices; taken where their number is known."""


# --- a user's own functions --------------------------------------------------------------------------------------


def own(function: OwnMeasure) -> tuple[Measure, ...]:
    """The entries of the table for a user's function: NAME of two SVDs, NAME_base and NAME_tuned of one.

    It is called with `SVD` values of the leading ranks, (base) and (tuned), or (base, tuned), and returns a
    number or a one-dimensional tensor, whose index is the rank.

    Raises:
        InputError: it has no name of its own, or takes another number of arguments.
    """
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise InputError(f"got the own measure {function!r} without a name; want a function made with def")
    try:
        taken = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]
    except (TypeError, ValueError):
        taken = []
    if len(taken) not in (1, 2):
        raise InputError(f"own measure {name} takes {len(taken)} arguments; want (svd), or (base, tuned)")
    title = (inspect.getdoc(function) or name).splitlines()[0]
    if len(taken) == 2:
        return (Measure(name, title, "1", "rank", "own measure", _own(function, name, _PAIR), vectors=_PAIR),)
    return tuple(
        Measure(
            f"{name}_{which}", f"{title} ({which})", "1", "rank", "own measure",
            _own(function, f"{name}_{which}", (which,)), vectors=(which,),
        )
        for which in _PAIR
    )  # fmt: skip


def _own(function: OwnMeasure, name: str, reads: tuple[str, ...]) -> Callable[[Triple], Values]:
    def measure(t: Triple) -> Values:
        given = [t.once(f"svd {which}", lambda which=which: _whole(getattr(t, which))) for which in reads]
        try:
            found = torch.as_tensor(function(*given)).detach().cpu()
        except Exception as error:
            raise InputError(f"own measure {name} failed: {type(error).__name__}: {error}") from error
        if found.ndim > 1 or found.is_complex() or not found.numel():
            raise InputError(
                f"own measure {name} returned shape {tuple(found.shape)} of {found.dtype}; want a number or a "
                "one-dimensional tensor of real numbers"
            )
        whole = found.ndim == 0
        return Values(found.double().reshape(-1), index=[-1] if whole else None)

    return measure


def _whole(decomposition: SVD | HalfSVD) -> SVD:
    return decomposition.svd() if isinstance(decomposition, HalfSVD) else decomposition


def digest(function: OwnMeasure) -> str:
    """What tells one own measure from another of the same name: its source, or its code where there is none."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = "" if code is None else f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def table(*, null: bool = False, sampled: bool = False, owned: Sequence[OwnMeasure] = ()) -> tuple[Measure, ...]:
    """All measures of a comparison, in the order of the rows.

    Raises:
        InputError: an own measure has the name of another one.
    """
    built = (*MEASURES, *ALWAYS, *HEADS, *(NULLS if null else ()), *(SAMPLED if sampled else ()))
    mine = [measure for function in owned for measure in own(function)]
    taken = {measure.name for measure in (*MEASURES, *ALWAYS, *HEADS, *NULLS, *SAMPLED)}
    for measure in mine:
        if measure.name in taken:
            raise InputError(f"own measure {measure.name}: the name is taken; give the function another one")
        taken.add(measure.name)
    return (*built, *mine)
