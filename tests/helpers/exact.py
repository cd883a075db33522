"""References in more digits than float64 has."""

import mpmath
import numpy as np
from torch import Tensor

from specbasis.core.svd import SVD

DIGITS = 45


def exact_svd(W: Tensor) -> tuple[mpmath.matrix, list[mpmath.mpf], mpmath.matrix]:
    """U (out, k), S (k), V (in, k) of the stored entries of W, in 45 digits. For small matrices: slow."""
    with mpmath.workdps(DIGITS):
        M = mpmath.matrix(W.double().tolist())
        wide = M.rows < M.cols
        U, S, Vh = mpmath.svd_r(M.T if wide else M)
        return (Vh.T, list(S), U) if wide else (U, list(S), Vh.T)


def value_errors(d: SVD, S: list[mpmath.mpf]) -> np.ndarray:
    """|computed − exact| of the whole spectrum."""
    with mpmath.workdps(DIGITS):
        return np.array([float(abs(mpmath.mpf(float(s)) - e)) for s, e in zip(d.spectrum, S, strict=True)])


def sines(X: Tensor, exact: mpmath.matrix) -> np.ndarray:
    """Sine of the angle between each column of X and the exact one of equal index, without cancellation."""
    out = []
    with mpmath.workdps(DIGITS):
        for i in range(X.shape[1]):
            x = mpmath.matrix([float(v) for v in X[:, i]])
            e = exact[:, i]
            out.append(float(mpmath.norm(x - e * (e.T * x)[0]) / mpmath.norm(x)))
    return np.array(out)


def true_residuals(W: Tensor, d: SVD) -> np.ndarray:
    """max(‖W v − σ u‖, ‖Wᵀ u − σ v‖) in extended precision, for matrices too large for mpmath."""
    W_, U, S, V = (a.double().numpy().astype(np.longdouble) for a in (W, d.U, d.S, d.Vh.mT))
    right = np.sqrt(((W_ @ V - U * S) ** 2).sum(axis=0))
    left = np.sqrt(((W_.T @ U - V * S) ** 2).sum(axis=0))
    return np.maximum(right, left).astype(float)
