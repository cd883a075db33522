"""What rounding to a storage format does to a matrix, and to the alignment of its singular vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.dtypes import FORMATS, UNSCALED, name_of
from specbasis.core.perturbation import inverse_gap, pair_weights

_BLOCK = 2**21  # entries of one block of variances

QUANTISED = "quantised"
"""The format of a matrix that is stored quantised: its variance alone is known, of all entries together."""

Interval = tuple[Float[Tensor, " k"], Float[Tensor, " k"]]
"""Lower and upper ends."""


@dataclass(frozen=True)
class Rounding:
    """What rounding alone does to a matrix.

    Attributes:
        stored: format in which it is stored.
        variance: format → mean squared error of an entry.
    """

    stored: str
    variance: dict[str, float]


def rounding(W: Float[Tensor, "out in"], *stored: str, scale: float = 1.0) -> Rounding:
    """Mean squared error of rounding the entries of a matrix to its own format, to bfloat16, float16 and int8.

    Σ step²/12 over entries / count: the error of rounding to nearest is uniform within half a step. A step is
    the distance of neighbouring numbers at the entry's size; for int8 it is max|row|/127, the symmetric scale of
    each row.

    Args:
        W: (out, in), any floating dtype.
        stored: the format that holds its entries, and further ones; that of its dtype when none.
        scale: in what unit the errors are wanted: of the matrix times this power of two, as it was rounded before.
    """
    stored = stored or (name_of(W.dtype),)
    forms = tuple(dict.fromkeys((*UNSCALED, *stored)))
    sums, int8 = dict.fromkeys(forms, 0.0), 0.0
    rows = max(1, 2**16 // W.shape[1])  # blocks that stay in a core's cache
    for start in range(0, len(W), rows):
        block = W[start : start + rows].detach()
        X = block.to(torch.float32).contiguous()
        narrow = forms == UNSCALED and scale == 1.0
        if not narrow or not 2.0**-50 < float(X.abs().max()) < 2.0**50:  # squares are not in float32's range
            X = block.double().contiguous()
        top = X.abs().amax(dim=1).double() * scale
        int8 += float((top / 127).square().sum()) * W.shape[1]
        for form, square in _squared_powers(X, scale, forms).items():
            sums[form] += square
    count = 12.0 * W.numel()
    wanted = dict.fromkeys((*stored, "bfloat16", "float16"))
    variance = {form: sums[form] * FORMATS[form].step ** 2 / count for form in wanted}
    return Rounding(stored[0], variance | {"int8": int8 / count})


def _squared_powers(X: Tensor, scale: float, forms: Sequence[str]) -> dict[str, float]:
    """Σ 4^e over entries, by format: 2^e is the power of two below each, or the smallest that the format has.

    An entry that is less than the error of a step, and vanishes, counts with its own size.
    """
    if X.dtype == torch.float32:  # from the bits of the numbers; none is below what the other formats have
        power = (X.view(torch.int32) & 0x7F800000).view(torch.float32).flatten()
        square = float(power @ power)
        power.clamp_(min=2.0 ** FORMATS["float16"].exponent)
        return dict.fromkeys(UNSCALED, square) | {"float16": float(power @ power)}
    power = (X.view(torch.int64) & 0x7FF0000000000000).view(torch.float64).flatten()
    sums = {}
    for name in forms:
        form = FORMATS[name]
        own = X.flatten().abs() * (math.sqrt(12) / form.step)
        error = torch.minimum(power.clamp(min=2.0**form.exponent), own) * scale
        sums[name] = float(error @ error)
    return sums


def entry_variance(W: Float[Tensor, "out in"], form: str) -> Float[Tensor, "out in"]:
    """Mean squared error of rounding each entry to a format, step²/12, float64; steps as in `rounding`."""
    X = W.detach().to(torch.float64).contiguous()
    # The exponent bits alone: the power of two below each entry.
    power = (X.view(torch.int64) & 0x7FF0000000000000).view(torch.float64).clamp_(min=2.0 ** FORMATS[form].exponent)
    return power.square_().mul_(FORMATS[form].step ** 2 / 12)


def intervals(
    cosines: tuple[Float[Tensor, "k k"], Float[Tensor, "k k"]],
    vectors: tuple[Float[Tensor, "short k"], Float[Tensor, "long k"]],
    S: Float[Tensor, " n"],
    W: Float[Tensor, "short long"],
    variance: Callable[[Tensor], Tensor],
) -> tuple[Interval, Interval]:
    """95 % intervals of the alignments, (short, long), that tuned had before independent noise N on its entries.

    To first order the alignment a_i = c_ii moves by Σ_j c_ij y_ij, y_ij = (s_i x_jᵀNy_i + s_j x_iᵀNy_j)/(s_i² −
    s_j²) on the short side. That is one linear form of N, p_iᵀNy_i + x_iᵀNq_i with p_i = Σ_j g_ij s_i x_j, q_i =
    Σ_j g_ij s_j y_j, g_ij = c_ij/(s_i² − s_j²), so its variance is Σ_ab V_ab (p_ia y_ib + x_ia q_ib)² whatever
    the variances V_ab of the entries are; on the long side s_i and s_j change places in p and q. Steps of floating
    point grow with the entries, and leading vectors have theirs where the entries are large: with the mean of V in
    place of V, intervals of leading ranks are too short.

    Beyond first order a shrinks by √(1 − Σ y_ij²): the interval is a·(1 + ½ Σ Var y_ij) ± 1.96 √(variance + ½ a² Σ
    (Var y_ij)²), in 0 … 1. What lies beyond the k ranks at hand counts with the part of x_i there, with the mean
    of V.

    Costs 8nmk flops for n × m matrices, in blocks of the long side.

    Args:
        cosines: ⟨x_i(base), x_j(tuned)⟩ and ⟨y_i(base), y_j(tuned)⟩.
        vectors: X and Y of tuned.
        S: all singular values of tuned.
        W: tuned, short side first.
        variance: entries of tuned → the variance of the noise in each, such as `entry_variance`.
    """
    X, Y = vectors
    (n, k), m = X.shape, len(Y)
    inverse = inverse_gap(S, k)[:, :k]
    a, b = S[:k, None], S[None, :k]
    forms = []  # for each side p and q as columns
    for c, (into, out) in zip(cosines, ((a, b), (b, a)), strict=True):
        g = c * inverse
        forms.append((X @ (g * into).mT, Y @ (g * out).mT))
    x2, y2 = X.square(), Y.square()
    across = X.new_zeros(n, k)  # V Y²
    crossed = [X.new_zeros(n, k) for _ in forms]  # V (y ∘ q)
    spread = [X.new_zeros(k) for _ in forms]
    whole, every = X.new_zeros(k), 0.0  # Σ_b (V ᵀx²)_b: the variance of ‖Nᵀx_i‖
    step = max(1, _BLOCK // n)
    for start in range(0, m, step):
        rows = slice(start, start + step)
        V = variance(W[:, rows])
        every += float(V.sum())
        along = V.mT @ x2
        whole += along.sum(dim=0)
        across += V @ y2[rows]
        for i, (_, q) in enumerate(forms):
            spread[i] += (along * q[rows].square()).sum(dim=0)
            crossed[i] += V @ (Y[rows] * q[rows])
    within = x2.mT @ across  # Var x_iᵀNy_j
    mean = every / (n * m)
    far = mean * pair_weights(S, k)[:, k:].sum(dim=1)
    outside = (whole - within.sum(dim=1)).clamp(min=0) * ((m - n) / (m - k) if m > k else 0.0) / S[:k].square()
    ends = []
    for i, (c, (p, _)) in enumerate(zip(cosines, forms, strict=True)):
        total = spread[i] + (p.square() * across).sum(dim=0) + 2 * (p * X * crossed[i]).sum(dim=0)
        first, second = (within.mT, within) if i == 0 else (within, within.mT)
        turns = ((a.square() * first + b.square() * second) * inverse.square()).clamp(max=1.0)
        beyond = far + outside if i else far
        dimension = (m if i else n) - k
        left_over = (1 - c.square().sum(dim=1)).clamp(min=0)
        total = total + (left_over * beyond / dimension if dimension else 0.0)
        aligned = c.diagonal().abs()
        middle = aligned * (1 + (turns.sum(dim=1) + beyond) / 2)
        half = 1.959964 * (total + aligned.square() * turns.square().sum(dim=1) / 2).sqrt()
        ends.append(((middle - half).clamp(0, 1), (middle + half).clamp(0, 1)))
    short, long = ends
    return short, long
