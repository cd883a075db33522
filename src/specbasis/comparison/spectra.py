"""One model's spectra: heavy tails, the bulk of random matrices, ranks; what a user of WeightWatcher knows.

Everything is a function of the eigenvalues λ_i = σ_i² of WᵀW, descending in σ.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.architecture.key import MatrixKey
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import Checkpoint
from specbasis.core.blocks import unit_scale
from specbasis.core.extras import require
from specbasis.core.spectrum import effective_rank, stable_rank
from specbasis.core.svd import half_svd

LEAST = 10
"""Fewer singular values than this have no tail to fit."""


@dataclass(frozen=True)
class Spectrum:
    """What the spectrum of one matrix says; NaN where it cannot be said.

    Attributes:
        alpha: exponent of the power law p(λ) ∝ λ^(−α) of the tail λ ≥ xmin, by maximum likelihood.
        alpha_error: its standard error, (α − 1)/√tail.
        xmin: where the tail begins: the value with the least Kolmogorov–Smirnov distance.
        distance: that distance.
        tail: eigenvalues in the tail.
        log_norm: log₁₀ ‖W‖_F².
        log_spectral_norm: log₁₀ λ_max.
        alpha_weighted: α · log₁₀ λ_max.
        log_alpha_norm: log₁₀ Σ λ^α.
        stable_rank: ‖W‖_F²/λ_max.
        effective_rank: exp of the entropy of σ/Σσ.
        entropy: entropy of λ/Σλ over log n, 0 … 1.
        mp_edge: upper edge of the Marchenko–Pastur law for independent entries of the same variance,
            std²·(√out + √in)².
        spikes: eigenvalues above it.
    """

    alpha: float
    alpha_error: float
    xmin: float
    distance: float
    tail: int
    log_norm: float
    log_spectral_norm: float
    alpha_weighted: float
    log_alpha_norm: float
    stable_rank: float
    effective_rank: float
    entropy: float
    mp_edge: float
    spikes: int


def marchenko_pastur_edge(variance: float, shape: tuple[int, int]) -> float:
    """Largest eigenvalue of WᵀW that independent entries of this variance give: variance · (√out + √in)².

    Source: Marchenko & Pastur 1967; Martin & Mahoney 2021, §3.
    """
    return variance * (math.sqrt(shape[0]) + math.sqrt(shape[1])) ** 2


def spectrum(S: Float[Tensor, " n"], shape: tuple[int, int], variance: float, scale: float = 1.0) -> Spectrum:
    """Figures of one spectrum.

    Args:
        S: all singular values, descending.
        shape: (out, in).
        variance: of the matrix's entries.
        scale: what the matrix was multiplied by, so that squares are in range; the figures are of it without.

    Raises:
        InputError: the package ``powerlaw`` is missing (extra ``spectra``).

    Source: Martin & Mahoney 2021; the fit is that of Clauset, Shalizi & Newman 2009, through ``powerlaw``.
    """
    values = S.double().cpu()
    squares = values.square()
    top, total = float(squares[0]), float(squares.sum())
    if total == 0:
        nan = math.nan
        return Spectrum(nan, nan, nan, nan, 0, -math.inf, -math.inf, nan, nan, nan, nan, nan, 0.0, 0)
    alpha, error, xmin, distance, tail = _power_law(squares.numpy())
    p, square = squares / total, 2 * math.log10(scale)
    edge = marchenko_pastur_edge(variance, shape)
    return Spectrum(
        alpha,
        error,
        xmin / scale / scale,
        distance,
        tail,
        math.log10(total) - square,
        math.log10(top) - square,
        alpha * (math.log10(top) - square),
        math.nan
        if math.isnan(alpha)
        else float((alpha * squares[squares > 0].log()).logsumexp(0)) / math.log(10) - alpha * square,
        stable_rank(values),
        effective_rank(values),
        float(-torch.special.xlogy(p, p).sum()) / math.log(len(p)) if len(p) > 1 else math.nan,
        edge / scale / scale,
        int((squares > edge).sum()),
    )


def _power_law(squares: np.ndarray) -> tuple[float, float, float, float, int]:
    """(α, its error, xmin, KS distance, eigenvalues in the tail)."""
    powerlaw = require("powerlaw", purpose="spectra need")
    positive = squares[squares > 0]
    if len(positive) < LEAST:
        return math.nan, math.nan, math.nan, math.nan, 0
    with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        # No upper end: with one, exponents below 1 come out. By default powerlaw looks no further than 3.
        fit = powerlaw.Fit(positive, verbose=False, parameter_ranges={"alpha": [1.0, 100.0]})
        alpha, xmin = float(fit.power_law.alpha), float(fit.power_law.xmin)
        distance = float(fit.power_law.D)
    tail = int((positive >= xmin).sum())
    return alpha, (alpha - 1) / math.sqrt(tail), xmin, distance, tail


def spectra(checkpoint: Checkpoint) -> Iterator[tuple[MatrixKey, tuple[int, int], Spectrum]]:
    """(where, (out, in), figures) of every matrix of a model; singular values only."""
    for ref in model_map(checkpoint).matrices:
        W = ref.read(checkpoint)
        svd = half_svd(W, 0, name=f"{ref.key.name} in {checkpoint.source}")
        scale = unit_scale(W.double(), ordinary=30)  # squares beyond about 1e±50 are misfitted
        variance = float((W.double() * scale).var(correction=0))
        yield ref.key, ref.shape, spectrum(svd.spectrum * scale, ref.shape, variance, scale)
