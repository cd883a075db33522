"""What the entries of two matrices say without any decomposition: sums, equality, correspondence of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.blocks import unit_scale
from specbasis.core.dtypes import FORMATS, UNSCALED, name_of, widened
from specbasis.core.errors import NonFiniteError

PROBES = 8
"""Random vectors that measure ‖WᵀT‖_F. More: a surer `_correspondence`, which is off by a fifth as a rule."""

LEAST_SIDE = 8
"""Where a side is shorter than this, it has too few orders for any test of them."""

EXACT_SIDE = 256
"""Where the shorter side is shorter than this, ‖WᵀT‖_F is computed and not measured."""

_BLOCK = 2**17  # entries of one block of rows: they stay in a core's cache


@dataclass(frozen=True)
class Entries:
    """Sums over the entries of base W and tuned T, float64.

    Attributes:
        inner: ⟨W, T⟩_F; infinite where it is out of range, which ``cosine`` never is.
        norms: Frobenius norms of base, tuned and delta.
        equal: whether the two are equal throughout.
        figures: the other figures, by the name of the measure that shows them.
        scale: `unit_scale` of the two.
        scaled_norms: norms of the two times that, which are in range.
    """

    inner: float
    norms: Mapping[str, float]
    equal: bool
    figures: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0
    scaled_norms: Mapping[str, float] = field(default_factory=dict)


def read_entries(W: Tensor, T: Tensor, names: tuple[str, str] = ("base", "tuned")) -> Entries:
    """Read two matrices of one shape once, by blocks of rows, and W a second time.

    Figures:

    - ``weight_cosine``: ⟨W, T⟩ / (‖W‖ ‖T‖), NaN where one is zero;
    - ``weight_cosine_z``: `_correspondence`, of the rows or of the columns, whichever is smaller; NaN where a side
      is shorter than `LEAST_SIDE`; ``weight_cosine_z_limit``: the most that it could be at these norms;
    - ``equal_entries``: share of entries that are equal; ``equal_entries_rounded``: equal once both are rounded to
      the coarser of the two precisions;
    - ``precision_base``, ``precision_tuned``: significant bits of the coarsest of `dtypes.UNSCALED`, and of the
      8-bit formats in which one of the two is stored, that holds every entry;
    - ``zero_entries_base``, ``zero_entries_tuned``: share of zeros;
    - ``grid_levels_base``, ``grid_levels_tuned``: `grid`, NaN where the entries lie on none;
    - ``equal_entries_grid``: share of sampled groups of one side that round to the other's on its grid, that of
      tuned, or that of base where tuned has none.

    Costs about 12·`PROBES`·out·in flops.

    Raises:
        NonFiniteError: NaN or Inf in either.
    """
    forms = (*dict.fromkeys(name_of(X.dtype) for X in (T, W) if widened(X) is not X), *_COARSE)
    W, T = widened(W), widened(T)
    out, width = W.shape
    scale = unit_scale(W, T)
    columns, rows = _probes(width), _probes(out)
    images: list[Tensor] = [columns.new_zeros(width, PROBES), rows.new_zeros(width, PROBES)]
    sums = [columns.new_zeros(width), columns.new_zeros(width)]
    squares, inner = [0.0, 0.0, 0.0], 0.0
    row_sums = columns.new_zeros(3)  # Σ (sum of a row)², of base and of tuned, and the product of both
    counts = dict.fromkeys(("zero_base", "zero_tuned", "equal", *forms), 0)
    held = {(side, format_): True for side in ("base", "tuned") for format_ in forms}
    step = max(1, _BLOCK // width)
    for start in range(0, out, step):
        a, b = (_block(X, start, step, scale) for X in (W, T))
        flat = a.flatten(), b.flatten(), (b - a).flatten()
        inner += float(flat[0] @ flat[1])
        squares = [total + float(x @ x) for total, x in zip(squares, flat, strict=True)]
        x, y = a.sum(1), b.sum(1)
        row_sums += torch.stack([x @ x, y @ y, x @ y])
        sums = [total + x.sum(0) for total, x in zip(sums, (a, b), strict=True)]
        images[0] += a.mT @ (b @ columns)
        images[1] += b.mT @ rows[start : start + step]
        # Scaling may round small numbers to zero.
        _count(W[start : start + step], T[start : start + step], flat if scale == 1.0 else None, counts, held)
    for X, total, name in zip((W, T), squares, names, strict=False):
        if not math.isfinite(total):
            bad = int((~torch.isfinite(X)).sum())
            raise NonFiniteError(
                f"{name}: {bad} of {X.numel()} entries are NaN or Inf: no SVD; repair or leave it out"
            )
    product = math.sqrt(squares[0]) * math.sqrt(squares[1])
    if min(W.shape) < EXACT_SIDE:
        spread = _exact_spread(*(X.to(torch.float64) * scale for X in (W, T)))
    else:
        spread = _centred(images[0]), _second_pass(W, images[1], scale, step)
    column_sums = torch.stack([sums[0] @ sums[0], sums[1] @ sums[1], sums[0] @ sums[1]])
    orders = [
        _correspondence([*squares[:2], inner], shared, square, n)
        for shared, square, n in ((row_sums / width, spread[0], width), (column_sums / out, spread[1], out))
    ]
    z, limit = min(orders) if min(W.shape) >= LEAST_SIDE else (math.nan, math.nan)
    stored = {side: next((form for form in forms if held[side, form]), "float64") for side in ("base", "tuned")}
    bits = {side: FORMATS[form].precision for side, form in stored.items()}
    coarser = min(stored.values(), key=lambda form: FORMATS[form].precision)
    figures = {
        "weight_cosine": max(-1.0, min(1.0, inner / product)) if product else math.nan,
        "weight_cosine_z": z,
        "weight_cosine_z_limit": limit,
        "equal_entries": counts["equal"] / W.numel(),
        "equal_entries_rounded": counts[coarser if coarser in forms else "equal"] / W.numel(),
        **{f"precision_{side}": float(n) for side, n in bits.items()},
        **{f"zero_entries_{side}": counts[f"zero_{side}"] / W.numel() for side in ("base", "tuned")},
        **_grids(W, T),
    }
    scaled = dict(zip(("base", "tuned", "delta"), map(math.sqrt, squares), strict=True))
    norms = {which: size / scale for which, size in scaled.items()}
    return Entries(inner / scale / scale, norms, counts["equal"] == W.numel(), figures, scale, scaled)


_COARSE = UNSCALED[:-1]


def _block(X: Tensor, start: int, step: int, scale: float) -> Tensor:
    block = X[start : start + step].to(torch.float64)
    return block if scale == 1.0 else block * scale


def _probes(n: int) -> Float[Tensor, "n p"]:
    """Random signs with their mean taken off: the same for every matrix with this side."""
    generator = torch.Generator().manual_seed(n)
    G = torch.randint(0, 2, (n, PROBES), generator=generator).to(torch.float64) * 2 - 1
    centred: Tensor = G - G.mean(0)
    return centred


def _centred(Z: Tensor) -> float:
    """Squared norm of what is left of columns when their means are taken off, for one probe."""
    return float((Z - Z.mean(0)).square().sum()) / PROBES


def _second_pass(W: Tensor, Y: Tensor, scale: float, step: int) -> float:
    """`_centred` of W Y, by blocks of rows."""
    total, sums = 0.0, Y.new_zeros(PROBES)
    for start in range(0, len(W), step):
        Z = _block(W, start, step, scale) @ Y
        total += float(Z.square().sum())
        sums += Z.sum(0)
    return (total - float(sums @ sums) / len(W)) / PROBES


def _exact_spread(W: Tensor, T: Tensor) -> tuple[float, float]:
    """‖C WᵀT C‖²_F and ‖C W Tᵀ C‖²_F, by products as small as the shorter side."""
    if len(W) > W.shape[1]:
        return _exact_spread(W.mT, T.mT)[::-1]
    a, b = (X - X.mean(1, keepdim=True) for X in (W, T))
    c, d = (X - X.mean(0) for X in (W, T))
    return float(((a @ a.mT) * (b @ b.mT)).sum()), float((c @ d.mT).square().sum())


def _correspondence(sums: Sequence[float], shared: Tensor, square: float, n: int) -> tuple[float, float]:
    """By how many standard deviations ⟨W, T⟩ exceeds that of T with its n columns (or rows) in random order.

    (⟨W, T⟩ − mean) / (‖C WᵀT C‖_F / √(n − 1)), C = I − 11ᵀ/n: the exact mean and variance over all orders, but for
    ‖·‖_F, which in large matrices is measured with random vectors. Standard normal for hidden units of independent
    trainings, whatever the spectra and the means. And its limit, ‖W C‖ ‖T C‖ in place of ⟨W C, T C⟩: the ratio of
    the two is the cosine of what is left when the means are taken off; a copy is at about √n·√(n_eff).

    Args:
        sums: ‖W‖²_F, ‖T‖²_F, ⟨W, T⟩.
        shared: of each, the part of the means.
        square: ‖C WᵀT C‖²_F.
        n: how many columns (or rows) there are.

    Source: Hoeffding 1951, A combinatorial central limit theorem.
    """
    first, second, inner = (whole - float(mean) for whole, mean in zip(sums, shared, strict=True))
    if not square > 0:
        return math.nan, math.nan
    deviation = math.sqrt(square / (n - 1)) if n > 1 else math.nan
    return inner / deviation, math.sqrt(max(first, 0.0)) * math.sqrt(max(second, 0.0)) / deviation


def _count(
    a: Tensor,
    b: Tensor,
    exact: tuple[Tensor, Tensor, Tensor] | None,
    counts: dict[str, int],
    held: dict[tuple[str, str], bool],
) -> None:
    """Zeros and equal entries, what each format holds, and what is equal once rounded to it, of one block.

    Args:
        a: of base, as stored.
        b: of tuned.
        exact: both and their difference in float64, where these are at hand.
        counts: to add to.
        held: whether each format holds all entries of base and of tuned so far.
    """
    zeros = [x.numel() - int(x.count_nonzero()) for x in exact or (a, b, b.to(torch.float64) - a)]
    for name, number in zip(("zero_base", "zero_tuned", "equal"), zeros, strict=True):
        counts[name] += number
    if not (a.is_floating_point() and b.is_floating_point()):
        a, b = a.to(torch.float64), b.to(torch.float64)
    forms = {format_: getattr(torch, format_) for side, format_ in held if side == "base"}
    for side, x in (("base", a), ("tuned", b)):
        for format_, dtype in forms.items():
            if held[side, format_] and not _contains(dtype, x.dtype):
                held[side, format_] = bool((x.to(dtype).to(x.dtype) == x).all())
    for format_, dtype in forms.items():
        # The coarser of two precisions holds all entries of one side: what holds those of neither is not it.
        if _contains(dtype, a.dtype) and _contains(dtype, b.dtype):
            counts[format_] += zeros[2]
        elif held["base", format_] or held["tuned", format_]:
            counts[format_] += int((widened(a.to(dtype)) == widened(b.to(dtype))).sum())


def _contains(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a format holds every number of another one of at least two bytes."""
    return wide == narrow or (min(wide.itemsize, narrow.itemsize) > 1 and torch.promote_types(wide, narrow) == wide)


GROUP = 32
"""Entries that are tested together for a grid of their own: the smallest group that quantisers scale together."""

GROUPS = 256
"""Groups that are tested, spread evenly over the matrix."""

LEVELS = 2**11
"""More levels than this are no grid of a quantiser."""


def _grids(W: Tensor, T: Tensor) -> dict[str, float]:
    groups = [_groups(X) for X in (W, T)]
    (levels, base_step), (tuned_levels, tuned_step) = (grid(x) for x in groups)
    step = base_step if math.isnan(tuned_levels) else tuned_step
    fit = (groups[1] - groups[0]).abs().amax(1) <= 0.5001 * step
    return {
        "grid_levels_base": levels,
        "grid_levels_tuned": tuned_levels,
        "equal_entries_grid": float(fit.double().mean()) if levels > 0 or tuned_levels > 0 else math.nan,
    }


def _groups(X: Tensor) -> Float[Tensor, "groups size"]:
    """Evenly spread groups of neighbours in a row."""
    size = min(GROUP, X.shape[1])
    per_row = X.shape[1] // size
    chosen = torch.linspace(0, len(X) * per_row - 1, min(GROUPS, len(X) * per_row)).long()
    columns = (chosen % per_row)[:, None] * size + torch.arange(size)
    return X[(chosen // per_row)[:, None], columns].to(torch.float64)


def grid(x: Float[Tensor, "groups size"]) -> tuple[float, Tensor]:
    """Levels of the uniform grid on which the entries of most groups lie, and each group's step.

    A group lies on a grid where all differences from its least entry are whole multiples of its least difference,
    to 1 %, and no more than `LEVELS` of them. NaN where fewer than half of the groups do, or groups are too short.
    """
    if x.shape[1] < GROUP:
        return math.nan, x.new_zeros(len(x))
    ordered = x.sort(1).values
    span = ordered[:, -1:] - ordered[:, :1]
    gaps = ordered.diff(dim=1)
    # The rounding of dequantised entries is no step of the grid.
    step = torch.where(gaps > span / LEVELS, gaps, math.inf).amin(1, keepdim=True)
    multiples = (ordered - ordered[:, :1]) / step
    on = ((multiples - multiples.round()).abs() <= 0.01).all(1) & (span > 0).squeeze(1)
    if not len(on) or on.double().mean() < 0.5:
        return math.nan, step.squeeze(1)
    return float(((span / step).squeeze(1)[on] + 1).median()), step.squeeze(1)
