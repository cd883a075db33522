"""What a pair of matrices is decomposed into: base, tuned and their difference, and random updates beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from specbasis.comparison.options import Options
from specbasis.core.attention_heads import compare_heads
from specbasis.core.blocks import ORDINARY, norm
from specbasis.core.cosines import cosines
from specbasis.core.draws import KINDS, draw
from specbasis.core.dtypes import BY_PRECISION, name_of
from specbasis.core.entries import Entries, read_entries
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.krylov import quick_svd
from specbasis.core.low_rank import low_rank_svd
from specbasis.core.quantised import Grid, quantisation
from specbasis.core.rounding import QUANTISED, Rounding, rounding as rounding_of
from specbasis.core.svd import SVD, HalfSVD, half_svd
from specbasis.jobs.cache import Cache
from specbasis.measures.table import needed, reads
from specbasis.measures.triple import Absent, Decomposition, Triple


def decompose_pair(
    W: Tensor,
    T: Tensor,
    options: Options,
    *,
    names: tuple[str, str],
    base: Decomposition | None = None,
    update: tuple[Tensor, Tensor] | None = None,
    heads: tuple[int, bool] | None = None,
    grids: Callable[[], Mapping[str, Grid]] = dict,
) -> Triple:
    """The decompositions of a pretrained matrix W and its finetune T that the wanted measures read.

    Args:
        W: (out, in), pretrained.
        T: (out, in), finetuned.
        options: which measures, of how many ranks, where to compute and what to keep.
        names: what to call the two matrices in an error.
        base: the decomposition of W where it is known.
        update: (B, A) with T = W + B A, where the update is known to be of low rank: it is then not formed.
        heads: how many attention heads the matrix is cut into, and whether by columns (an output matrix); None:
            none.
        grids: reads "base" or "tuned" with its levels, where it is stored quantised; not kept meanwhile.

    Raises:
        InputError: shapes differ. NonFiniteError: NaN or Inf in either, or sizes that no number spans.
    """
    if W.shape != T.shape:
        raise InputError(f"{names[1]}: got shapes {tuple(W.shape)} and {tuple(T.shape)}; want equal ones")
    k = min(options.leading, *W.shape)
    need = needed(options.taken, k)
    parts: dict[str, Decomposition] = {which: Absent(which, (W.shape[0], W.shape[1])) for which in need}
    sums = read_entries(W, T, names)
    sums = _with_quantisation(W, T, sums, grids())
    stored = W, T
    if sums.scale != 1.0:  # exact, and every power that is taken of the entries is in range
        sizes = [float(norm(X)) for X in stored]
        if 0 < min(sizes) < max(sizes) * 2.0**-ORDINARY:
            raise NonFiniteError(
                f"{names[1]}: its norm is {sizes[1]:.2g}, that of base is {sizes[0]:.2g}: out of range together"
            )
        W, T, base = W.double() * sums.scale, T.double() * sums.scale, None
        update = None if update is None else (update[0].double() * sums.scale, update[1])
    every: SVD | HalfSVD | None = None
    if need["base"] is not None and reads(options.taken, "every"):
        every = base if isinstance(base, SVD | HalfSVD) else _every_vector(W, need["base"], options, names[0])
        parts["base"] = every.truncate(k) if isinstance(every, SVD) else every
    elif need["base"] is not None:
        parts["base"] = base or _decomposed(W, need["base"], options, names[0])
    if sums.equal:
        parts["tuned"] = parts["base"]
    elif need["tuned"] is not None:
        parts["tuned"] = _decomposed(T, need["tuned"], options, names[1], start=parts["base"])
    if need["delta"] is not None and update is not None and update[0].shape[1] < min(W.shape):
        parts["delta"] = low_rank_svd(*update, name=names[1])
    elif need["delta"] is not None:
        parts["delta"] = _decomposed(T, need["delta"], options, names[1], minus=W)
    return Triple(
        parts["base"],
        parts["tuned"],
        parts["delta"],
        inner=sums.inner * sums.scale * sums.scale,
        subspace=options.k,
        norms=sums.scaled_norms,
        every=every,
        rounding=_roundings(*stored, sums) if reads(options.taken, "rounding") else {},
        heads=compare_heads(W, T, *heads) if heads else None,
        sampled=_sampled(W, T, k, options, names[0]) if options.null_samples and not sums.equal else {},
        figures=sums.figures,
        entries=T,
        scale=sums.scale,
    )


def _roundings(W: Tensor, T: Tensor, sums: Entries) -> dict[str, Rounding]:
    """What rounding does to base and tuned, in the coarsest format that holds their entries.

    Measured on tuned: the entries of base have about the same sizes. A coarser format that holds subnormal entries
    has finer steps there than their own.
    """
    base, tuned = _formats(W, T, sums).values()
    own = name_of(T.dtype)
    error = rounding_of(T, tuned, base, own, scale=sums.scale)
    least = {form: max(error.variance[form], error.variance.get(own, 0.0)) for form in (tuned, base)}
    error = replace(error, variance=error.variance | least)
    roundings = {"tuned": error, "base": Rounding(base, error.variance)}
    for side in roundings:
        noise = sums.figures.get(f"rounding_noise_{side}", math.nan)
        if math.isfinite(noise):
            square = (noise * sums.scaled_norms[side]) ** 2 / W.numel()
            roundings[side] = Rounding(QUANTISED, error.variance | {QUANTISED: square})
    return roundings


def _with_quantisation(W: Tensor, T: Tensor, sums: Entries, grids: Mapping[str, Grid]) -> Entries:
    if not grids:
        return sums
    figures = quantisation({"base": W, "tuned": T}, grids, _formats(W, T, sums))
    return replace(sums, figures={**sums.figures, **figures})


def _formats(W: Tensor, T: Tensor, sums: Entries) -> dict[str, str]:
    """The coarsest formats that hold the entries of base and of tuned."""
    return {
        which: BY_PRECISION.get(int(sums.figures.get(f"precision_{which}", 0)), name_of(X.dtype))
        for which, X in (("base", W), ("tuned", T))
    }


def _sampled(W: Tensor, T: Tensor, ranks: int, options: Options, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Alignments of W with W plus random updates: null → (left, right), (draws, k); kept where there is a cache."""
    kept = None if options.cache is None else Cache(Path(options.cache))
    draws = options.null_samples
    base = cache(lambda: half_svd(W.double(), ranks, name=name))
    samples: dict[str, tuple[Tensor, Tensor]] = {}
    for kind in KINDS:
        compute = partial(_drawn, W, T, kind, draws, base, ranks, name)
        samples[kind] = kept.samples(W, T, kind, draws, ranks, compute) if kept else compute()
    return samples


def _drawn(
    W: Tensor, T: Tensor, kind: str, draws: int, base: Callable[[], HalfSVD], ranks: int, name: str
) -> tuple[Tensor, Tensor]:
    """Alignments, left and right, of W with W plus random updates of one kind."""
    sides: dict[str, list[Tensor]] = {"left": [], "right": []}
    for seed in range(draws):
        update = draw(kind, W, T, torch.Generator().manual_seed(seed))
        random = half_svd(W.double() + update, ranks, name=name)
        for side, alignments in sides.items():
            alignments.append(cosines(base(), random, side).alignment)
    return torch.stack(sides["left"]), torch.stack(sides["right"])


def _decomposed(
    X: Tensor,
    ranks: int,
    options: Options,
    name: str,
    *,
    minus: Tensor | None = None,
    start: Decomposition | None = None,
) -> Decomposition:
    """The decomposition of a matrix, or of a difference, which is not kept in a cache."""
    device = torch.device(options.device)
    if options.quick:
        near = start.X if isinstance(start, HalfSVD) else None
        return quick_svd(X, options.leading, minus=minus, start=near, name=name, device=device)
    if options.cache is None or minus is not None or not ranks:
        return half_svd(X, ranks, minus=minus, name=name, device=device)
    return Cache(Path(options.cache)).decompose(X.to(device), ranks, name=name)


def _every_vector(W: Tensor, ranks: int, options: Options, name: str) -> SVD | HalfSVD:
    """The decomposition of a base whose vectors of the short side are all wanted."""
    device = torch.device(options.device)
    if options.cache is None:
        return half_svd(W, ranks, name=name, every=True, device=device)
    return Cache(Path(options.cache)).decompose(W.to(device), None, name=name)
