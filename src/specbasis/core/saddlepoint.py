"""The law of a weighted sum of χ² over a sum of χ², by a saddlepoint approximation.

Source: Lugannani & Rice 1980; Kuonen 1999.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEPS = 60
"""Steps of the root finder, at most; ten are usual."""

_CLOSE = 1e-7
"""Last relative step of the root finder: it converges quadratically, and the exponent is flat at the root."""

_SINGLES = 8
"""Weights of a sum of χ² that are kept one by one; the others are lumped by their mean and variance."""

Floats = NDArray[np.float64]


def lumped(w: Floats) -> tuple[Floats, Floats, Floats]:
    """The largest weights of each row, and one weight and number of degrees for the rest, with their mean and
    variance.
    """
    if w.shape[1] <= _SINGLES:
        return w, np.zeros(len(w)), np.zeros(len(w))
    ordered = -np.partition(-w, _SINGLES, axis=1)
    rest = ordered[:, _SINGLES:]
    total, square = rest.sum(axis=1), (rest**2).sum(axis=1)
    positive = square > 0
    divisor = np.where(positive, total, 1.0)
    lump = np.where(positive, square / divisor, 0.0)
    count = np.where(positive, total**2 / np.where(positive, square, 1.0), 0.0)
    return ordered[:, :_SINGLES], lump, count


def ratio_cdf(weights: Floats, groups: list[tuple[Floats, Floats]], q: Floats, total: int) -> Floats:
    """P(Σ w_j z_j² ≤ q Σ z²) over `total` normal variables, row by row: single weights, then groups of equal ones.

    A saddlepoint approximation of P(Σ (w_j − q) z_j² ≤ 0).
    """
    from scipy.special import ndtr

    k = len(q)
    values = np.concatenate([weights, *[g[:, None] for g, _ in groups], np.zeros((k, 1))], axis=1)
    counts = np.concatenate([np.ones_like(weights), *[c[:, None] for _, c in groups], np.zeros((k, 1))], axis=1)
    counts[:, -1] = np.maximum(total - counts.sum(axis=1), 1e-3)
    values = np.where(counts > 0, values, 0.0)  # an empty group is no pole
    largest = values.max(axis=1)
    scale = np.where(largest > 0, largest, 1.0)
    lam = (values - q[:, None]) / scale[:, None]
    possible = (lam.min(axis=1) < 0) & (lam.max(axis=1) > 0)
    t = np.zeros(k)
    t[possible] = _saddlepoints(lam[possible].T.copy(), counts[possible].T.copy())
    weighted = counts * lam
    inner = np.maximum(1 - 2 * t[:, None] * lam, 1e-300)
    K = -0.5 * (counts * np.log(inner)).sum(axis=1)
    curvature = 2 * (counts * (lam / inner) ** 2).sum(axis=1)
    third, variance = 8 * (weighted * lam**2).sum(axis=1), 2 * (weighted * lam).sum(axis=1)
    r = np.sign(t) * np.sqrt(np.maximum(-2 * K, 0.0))
    v = t * np.sqrt(curvature)
    near = np.abs(r) < 1e-4  # the formula is 0/0 at the mean
    safe_r, safe_v = np.where(near, 1.0, r), np.where(near, 1.0, v)
    tail = ndtr(safe_r + np.log(np.maximum(safe_v / safe_r, 1e-300)) / safe_r)
    middle = 0.5 + third / (6 * np.sqrt(2 * np.pi) * np.maximum(variance, 1e-300) ** 1.5)
    p = np.clip(np.where(near, middle, tail), 0.0, 1.0)
    return np.where(possible, p, np.where(lam.max(axis=1) <= 0, 1.0, 0.0))


def _saddlepoints(lam: Floats, counts: Floats) -> Floats:
    """For each column the t between its two poles where K′(t) = 0, K(t) = −½ Σ c log(1 − 2 t λ); λ of both signs.

    Newton's method in 1/(distance to the pole ahead): K′ is concave in it, so no step goes past the root. A column
    that has converged is left alone.
    """
    t = np.zeros(lam.shape[1])
    below, above = (1 / (2 * ends) for ends in (lam.min(axis=0), lam.max(axis=0)))
    active = np.arange(len(t))
    for _ in range(_STEPS):
        at = t[active]
        ratio = lam / (1 - 2 * at * lam)
        weighted = counts * ratio
        slope, curvature = weighted.sum(axis=0), 2 * (weighted * ratio).sum(axis=0)
        ahead = np.where(slope < 0, above, below) - at
        step = ahead * np.abs(slope) / (curvature * np.abs(ahead) + np.abs(slope))
        t[active] += step
        going = np.abs(step) > _CLOSE * np.abs(t[active])
        if not going.any():
            break
        if not going.all():
            active, below, above = active[going], below[going], above[going]
            lam, counts = lam[:, going], counts[:, going]
    return t
