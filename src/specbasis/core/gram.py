"""Singular vectors of the short side from its float64 Gram matrix, by a symmetric eigensolver and deflation."""

from __future__ import annotations

import torch
from torch import Tensor

from specbasis.core.blocks import EPS, Blocks, orthonormal, reorthonormal

DEFLATE = 1e-3
"""Ranks below this share of their level's largest value are decomposed again at their own scale.

A symmetric eigensolver on the Gram matrix leaves a relative error of about eps / DEFLATE² = 2e-10 in the smallest
value that it keeps. Larger: more levels, more time. Smaller: fewer right digits in small singular values.
"""

IMPLIED = 3e-3
"""Ranks above this share of the largest value may leave their vectors of the long side implied.

A cosine taken through the short side has a rounding error of about eps / IMPLIED² = 3e-11. Larger: more vectors are
formed. Smaller: fewer right digits.
"""

SUBSET_SIDE = 1024
"""Short sides from this on take a subset of eigenvectors where few ranks are wanted."""

SUBSET_SHARE = 8
"""A subset of eigenvectors is taken for at most one in so many ranks. Larger shares gain little."""


def left_vectors(A: Blocks, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading k left singular vectors of a matrix whose short side comes first, all its values, their errors.

    The errors are a priori ones.
    """
    n, m = A.shape
    if k == 0 and n < m:  # square matrices have small values almost always, and those need vectors
        S = torch.linalg.eigvalsh(A.gram(None), UPLO="U").flip(0).clamp(min=0).sqrt()
        A.top = float(S[0])
        if S[-1] > max(DEFLATE, m * EPS) * A.top:
            return S.new_zeros(n, 0), S, n * EPS * (A.top**2 / S + A.top)
    if n >= SUBSET_SIDE and k and SUBSET_SHARE * k <= n < m and A.device.type == "cpu":
        squares, X = _leading_eigenvectors(A.gram(None), k)
        S = squares.clamp(min=0).sqrt()
        A.top = float(S[0])
        if S[-1] > max(DEFLATE, m * EPS) * A.top:  # none of the values needs deflation
            return X, S, n * EPS * (A.top**2 / S + A.top)
    vectors, values, errors = [], [], []
    basis: Tensor | None = None
    floor = 0.0
    while True:
        squares, E = torch.linalg.eigh(A.gram(basis), UPLO="U")
        S = squares.flip(0).clamp(min=0).sqrt()
        U = E.flip(1) if basis is None else basis @ E.flip(1)
        top = float(S[0])
        A.top = max(A.top, top)
        floor = floor or m * EPS * top
        kept = len(S) if top <= floor else int((S >= max(DEFLATE * top, floor)).sum())
        head, tail = U[:, :kept], U[:, kept:]
        if tail.shape[1]:
            # One step of subspace refinement: rotate the tail out of the head by the first-order angle.
            angle = (head.mT @ A.coupling(tail)) / (S[:kept, None] ** 2)
            tail = torch.addmm(tail, head, angle, alpha=-1)
            head.addmm_(U[:, kept:], angle.mT)
        vectors.append(head)
        values.append(S[:kept])
        errors.append(n * EPS * (top**2 / S[:kept].clamp(min=EPS * (top or 1.0)) + floor / (m * EPS)))
        if not tail.shape[1]:
            break
        basis = tail
    if len(values) == 1:
        return vectors[0][:, :k].clone(), values[0], errors[0]  # what is not wanted is freed
    # A level ends where the next begins up to rounding, so the order can break there by less than the error.
    spectrum, order = torch.sort(torch.cat(values), descending=True, stable=True)
    X = torch.cat(vectors, dim=1)
    moved = order[:k] != torch.arange(k, device=order.device)
    if bool(moved.any()):  # few are: the others stay where they are
        X[:, :k][:, moved] = X[:, order[:k][moved]]
    return X[:, :k], spectrum, torch.cat(errors)[order]


def gram_values(W: Tensor) -> Tensor:
    """All singular values of a matrix, ascending, from its Gram matrix alone: at half the price of `left_vectors`.

    Those below 1e-6 of the largest have few right digits.
    """
    A = Blocks.of(W, None, "matrix", W.device)
    squares: Tensor = torch.linalg.eigvalsh(A.gram(None), UPLO="U")
    return squares.clamp(min=0).sqrt() * A.scale


def _leading_eigenvectors(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric matrix (its upper triangle; overwritten), descending, and k eigenvectors.

    One reduction to tridiagonal form serves both; the vectors are taken by MRRR, whose orthogonality is then made
    that of rounding.
    """
    import numpy as np
    from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack

    n = len(G)
    lower = G.numpy().T  # column-major, as LAPACK has it: nothing is copied
    size, _ = lapack.dsytrd_lwork(n, lower=1)
    reflectors, diagonal, beside, tau, _ = lapack.dsytrd(lower, lower=1, lwork=int(size), overwrite_a=1)
    squares = eigvalsh_tridiagonal(diagonal, beside, lapack_driver="sterf")
    _, Z = eigh_tridiagonal(diagonal, beside, select="i", select_range=(n - k, n - 1), lapack_driver="stemr")
    X = torch.from_numpy(np.ascontiguousarray(Z[:, ::-1]))
    Q = torch.from_numpy(reflectors[1:, :-1])
    X[1:] = torch.ormqr(Q, torch.from_numpy(tau), X[1:].clone())
    return torch.from_numpy(squares).flip(0), reorthonormal(X)


def implied_ranks(S: Tensor, n: int, m: int) -> int:
    """How many leading ranks may stay implied: those above `IMPLIED`, if the others are few and none is zero."""
    head = int((S >= IMPLIED * S[0]).sum())
    return head if 4 * (len(S) - head) <= len(S) and S[-1] > m * EPS * S[0] else 0


def explicit_vectors(A: Blocks, X: Tensor, S: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors of the long side from rank ``head`` on, orthogonal to the implied ones before; and the
    product Aᵀ X that they are made from, which `residuals` reads too.
    """
    if head == X.shape[1]:
        return X.new_zeros(A.shape[1], 0), X.new_zeros(A.shape[1], 0)
    product = Z = A.transposed_times(X[:, head:])
    if not head:
        deep = len(S) > 0 and bool(S[-1] <= DEFLATE * S[0])
        return orthonormal(Z) if deep else reorthonormal(Z / S), product
    if Z.shape[1]:
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            # Y Yᵀ Z = Aᵀ X S⁻² Xᵀ A Z for the implied Y.
            Z = Z - A.transposed_times(X[:, :head] @ ((X[:, :head].mT @ A.times(Z)) / S[:head, None] ** 2))
    return orthonormal(Z), product
