"""What an adapter did, from its core and the singular values alone: no weight, no decomposition of one.

U and Vh are orthonormal and span invariant subspaces of W, so the singular triplets of W + U C Vh are those of the
r × r matrix diag(S) + C inside the span, and those of W outside.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from specbasis.core.svd import decompose


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """One adapted matrix inside its span.

    Attributes:
        S: new singular values, (r,), descending, in the units of W.
        left: |⟨new u_i, old u_i⟩| inside the span, (r,), 0 … 1. Below 1: rotated. Arbitrary where values are close.
        right: likewise for v_i.
        drift: ‖C‖_F / ‖S‖_2, the size of the update relative to the part of W in the span.
        condition: largest over smallest new singular value, 1 … ∞.
    """

    S: Float[Tensor, " r"]
    left: Float[Tensor, " r"]
    right: Float[Tensor, " r"]
    drift: float
    condition: float


def diagnose(C: Float[Tensor, "r r"], S: Float[Tensor, " r"]) -> Diagnosis:
    """Singular values, rotation and size of an update inside its span: the SVD of diag(S) + C. Costs O(r³).

    Args:
        C: core in units of the weight (M, or diag(S) M where the scale is "sigma").
        S: singular values of the frozen weight on the interval.
    """
    C, S = C.detach().double().cpu(), S.detach().double().cpu()
    new = decompose(S.diag() + C, name="diag(S) + C")
    smallest = float(new.S[-1])
    return Diagnosis(
        new.S,
        new.U.diagonal().abs(),
        new.Vh.diagonal().abs(),
        drift(C, S),
        float(new.S[0]) / smallest if smallest > 0 else float("inf"),
    )


def drift(C: Float[Tensor, "r r"], S: Float[Tensor, " r"]) -> float:
    """Size of the update relative to the part of W in the span: ‖C‖_F / ‖S‖_2."""
    size = float(S.norm())
    return float(C.norm()) / size if size > 0 else float("inf")
