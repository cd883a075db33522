"""How many of its singular values carry a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def effective_rank(S: Float[Tensor, " n"]) -> float:
    """Effective rank: exp(H(p)), p = S / ΣS, natural logarithm; 1 … n, NaN for a zero matrix.

    Source: Roy & Vetterli 2007; Yu et al. 2026, Tab. 4.
    """
    p = S / S.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(S: Float[Tensor, " k"], norm: float | None = None) -> float:
    """Stable rank: ‖W‖_F² / σ_1², 1 … n, NaN for a zero matrix; the norm that of S when None.

    Source: Rudelson & Vershynin 2007.
    """
    square = S.square().sum() if norm is None else norm**2
    return float(square / S[0] ** 2)


def explained_variance(S: Float[Tensor, " k"], norm: float | None = None) -> Float[Tensor, " k"]:
    """Share of energy in the leading i + 1 ranks: cumulative ΣS² / ‖W‖_F²; the norm that of S when None.

    Source: Yu et al. 2026, App. H.
    """
    energy = S.square().cumsum(0)
    return (energy / (energy[-1] if norm is None else norm**2)).clamp(max=1.0)


@dataclass(frozen=True, eq=False)
class Density:
    """What is known of a whole spectrum whose leading values alone were computed.

    Over the others, Σ f(σ_i) = E zᵀ P f(A Aᵀ) P z for Gaussian z, P the projector that leaves the leading vectors
    out, and block Lanczos quadrature gives zᵀ P f(A Aᵀ) P z ≈ Σ_l f(θ_l) w_l over the other Ritz values θ² of A Aᵀ,
    with w_l = ⟨z, ritz vector_l⟩². Where the whole spectrum is known it is the head, and there are no nodes.

    Attributes:
        head: leading singular values, (k,).
        others: how many values there are beyond the head.
        nodes, weights: θ, (d,), and w, (d, probes): of all steps of the iteration, and of all but its last one.

    Source: Golub & Meurant 2010, §§6–7; Meyer, Musco, Musco & Woodruff 2021 (Hutch++) for the head apart; Deville &
    Särndal 1992 for the calibration.
    """

    head: Float[Tensor, " k"]
    others: int = 0
    nodes: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()

    def effective_rank(self, norm: float) -> tuple[float, float]:
        """`effective_rank` of the whole spectrum, and the half width of an interval of about 95 %.

        exp(log a − b/a) with a = Σσ and b = Σσ log σ. Beyond the head the weights are calibrated: the least change
        w (α + β θ²) that makes Σw the known number of values and Σw θ² what the head leaves of the known ``norm``².
        The interval has two standard errors (jackknife over the probes) and the error of the quadrature: of a root
        where values reach to zero it falls as 1/steps², so that (s − 1)²/(2s − 1) times the last change is left.
        """
        if not self.others:
            return effective_rank(self.head), 0.0
        if len(self.nodes) < 2:
            return math.nan, math.inf
        (value, error), (before, _) = (
            self._estimate(nodes, w, norm) for nodes, w in zip(self.nodes, self.weights, strict=True)
        )
        known, shorter = (len(nodes) + len(self.head) for nodes in self.nodes)
        steps = known / (known - shorter)
        return value, error + (steps - 1) ** 2 / (2 * steps - 1) * abs(value - before)

    def _estimate(self, nodes: Tensor, weights: Tensor, norm: float) -> tuple[float, float]:
        """The estimate from some nodes, and two standard errors."""
        unit = self.head[0]  # which the effective rank does not depend on
        known, theta = _sums(self.head / unit), nodes / unit
        rest = max((norm / float(unit)) ** 2 - float((self.head / unit).square().sum()), 0.0)
        wanted = weights.new_tensor([float(self.others), rest])
        powers = torch.stack([torch.ones_like(theta), theta.square()])

        def rank(w: Tensor) -> Tensor:
            calibrated = w * (torch.linalg.solve((powers * w) @ powers.mT, wanted) @ powers)
            a, b = known + _sums(theta, calibrated)
            return torch.exp(a.log() - b / a)

        p = weights.shape[1]
        total = weights.sum(1)
        left_out = torch.stack([rank((total - w) / (p - 1)) for w in weights.mT])
        error = math.sqrt((p - 1) / p * float((left_out - left_out.mean()).square().sum()))
        return float(rank(total / p)), 2 * error


def _sums(S: Float[Tensor, " n"], weights: Tensor | float = 1.0) -> Float[Tensor, " 2"]:
    """Σ w σ and Σ w σ log σ."""
    return torch.stack([(weights * S).sum(), (weights * torch.special.xlogy(S, S)).sum()])
