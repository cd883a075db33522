"""Decompositions of products that are never formed, and of stacks of small matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.blocks import EPS, want_tensors
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.residuals import gaps
from specbasis.core.svd import SVD, decompose, signs


@torch.no_grad()
def low_rank_svd(B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], *, name: str = "B @ A") -> SVD:
    """Singular value decomposition of a product without forming it, such as a LoRA update.

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, with the QR decompositions B = Q_B R_B and Aᵀ = Q_A R_A; only the small core is
    decomposed. Costs O((out + in) r²) instead of O(out·in·min(out, in)).

    Returns min(r, out, in) triplets. The singular values beyond are exactly zero: ``spectrum`` lists them.

    Raises:
        InputError: the inner sizes differ, or an operand is not a floating matrix with entries.
        NonFiniteError: an operand holds NaN or Inf.
    """
    want_tensors(name, B, A)
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or not B.numel() or not A.numel():
        raise InputError(f"{name}: got shapes {tuple(B.shape)} and {tuple(A.shape)}; want (out, r) and (r, in)")
    if not (B.is_floating_point() and A.is_floating_point()):
        raise InputError(f"{name}: got {B.dtype} and {A.dtype}; want floating-point matrices (out, r) and (r, in)")
    B, A = B.double(), A.double()
    if not bool(torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise NonFiniteError(f"{name}: an operand holds NaN or Inf, so the product has no SVD")
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.mT)
    core = decompose(RB @ RA.mT, name=name)
    U = QB @ core.U
    V = QA @ core.Vh.mT
    # The residual of the core plus the rounding of the two QR decompositions (backward stable: r·eps·‖B‖‖A‖).
    rounding = B.shape[1] * EPS * float(torch.linalg.norm(RB, 2) * torch.linalg.norm(RA, 2))
    sign = signs(U)
    beyond = core.S.new_zeros(min(len(U), len(V)) - len(core.S))
    spectrum, error = torch.cat([core.S, beyond]), torch.cat([core.spectrum_error + rounding, beyond])
    return SVD(
        (U * sign).contiguous(),
        core.S,
        (V * sign).mT.contiguous(),
        spectrum=spectrum,
        spectrum_error=error,
        residual=core.residual + rounding,
        gap=gaps(spectrum, error, null_space=len(U) != len(V))[: len(core.S)],
    )


@torch.no_grad()
def stacked_svd(
    A: Float[Tensor, "b n m"],
) -> tuple[Float[Tensor, "b n n"], Float[Tensor, "b n"], Float[Tensor, "b m n"]]:
    """Singular triplets of a stack of small matrices, such as the heads of a layer: X, S, Y with A ≈ X diag(S) Yᵀ.

    By float64 Gram matrices, without deflation: vectors of values below about 1e-4 of the largest lose digits,
    and those of values below 1e-7 are completed to orthonormal columns. Costs 2n²m + 2n²m flops each, and an
    eigensolver of n³.
    """
    n, m = A.shape[1:]
    if n > m:
        Y, S, X = stacked_svd(A.mT)
        return X, S, Y
    A = A.double()
    squares, X = torch.linalg.eigh(A @ A.mT)
    S, X = squares.flip(-1).clamp(min=0).sqrt(), X.flip(-1)
    Y = (A.mT @ X) / torch.where(S > 0, S, 1.0)[:, None, :]
    if bool((S <= 1e-7 * S[:, :1]).any()):
        Q, R = torch.linalg.qr(Y)
        Y = Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :]
    return X, S, Y
