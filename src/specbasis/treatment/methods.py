"""From the updates of one matrix by several finetunes to one update: pure functions, one a method.

They take matrices alike whatever their roles, one by one, in float64. The papers of TIES and KnOTS trim a whole
model at once; here, as in PEFT, each matrix keeps its own share, so that one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.low_rank import low_rank_svd
from specbasis.core.svd import SVD, decompose
from specbasis.treatment.options import MergeOptions

RANK = 1e-9
"""Singular values below this share of the largest are zero: their vectors are arbitrary, and are not taken."""


class Delta:
    """The update of one matrix by one finetune: a tensor, or the factors (B, A) of one that is a product."""

    def __init__(self, tensor: Tensor | None = None, factors: tuple[Tensor, Tensor] | None = None) -> None:
        self.tensor = tensor
        self.factors = None if factors is None else (factors[0].double(), factors[1].double())

    @cached_property
    def matrix(self) -> Float[Tensor, "out in"]:
        """The update itself."""
        return self.factors[0] @ self.factors[1] if self.factors else self.tensor  # type: ignore[return-value]

    @cached_property
    def svd(self) -> SVD:
        """All triplets; of a product those that it can have."""
        return low_rank_svd(*self.factors) if self.factors else decompose(self.matrix)


Method = Callable[[Sequence[Delta], MergeOptions, torch.Generator], Tensor]


def merged(
    deltas: Sequence[Delta], options: MergeOptions, generator: torch.Generator, *, is_matrix: bool = True
) -> Tensor:
    """The update that a method makes of several: scale · method(Δ_1 … Δ_n), calibrated on request.

    Args:
        deltas: of one parameter.
        options: the method and its settings.
        generator: of the random numbers of dare.
        is_matrix: False for vectors, such as biases and norms, and for kernels: of these the methods that decompose
            take the mean, as their papers do.
    """
    is_mean = not is_matrix and options.method in SPECTRAL
    delta = (mean if is_mean else METHODS[options.method])(deltas, options, generator) * (options.scale or 0.0)
    return calibrated(delta, deltas, options.calibrate) if options.calibrate is not None and is_matrix else delta


def mean(deltas: Sequence[Delta], *_: object) -> Tensor:
    """Σ Δ_i / n: the update of the mean of the finetunes (Wortsman et al. 2022)."""
    return total(deltas) / len(deltas)


def total(deltas: Sequence[Delta], *_: object) -> Tensor:
    """Σ Δ_i (Ilharco et al. 2023, task arithmetic)."""
    summed = torch.zeros_like(deltas[0].matrix)
    for delta in deltas:
        summed += delta.matrix
    return summed


def magnitude(deltas: Sequence[Delta], options: MergeOptions, _: torch.Generator) -> Tensor:
    """Σ of the updates, of each its largest entries."""
    return total([Delta(_largest(delta.matrix, options)) for delta in deltas])


def ties(deltas: Sequence[Delta], options: MergeOptions, _: torch.Generator) -> Tensor:
    """Trim, elect a sign by the sum, and average the entries that have it.

    Source: Yadav et al. 2023, Alg. 1; a sum of zero elects the positive sign, as in PEFT.
    """
    entries = torch.stack([_largest(delta.matrix, options) for delta in deltas])
    kept = entries.sign() == torch.where(entries.sum(0) >= 0, 1, -1)
    return (entries * kept).sum(0) / kept.sum(0).clamp(min=1)


def _largest(X: Tensor, options: MergeOptions) -> Tensor:
    count = int((options.density or 1.0) * X.numel())
    largest = X.abs().flatten().topk(count).indices
    return torch.zeros_like(X).flatten().index_copy_(0, largest, X.flatten()[largest]).reshape(X.shape)


def dare(deltas: Sequence[Delta], options: MergeOptions, generator: torch.Generator) -> Tensor:
    """Σ Δ_i ⊙ Z_i / p with Z_i ~ Bernoulli(p), p the density: drop and rescale (Yu et al. 2024)."""
    summed, p = torch.zeros_like(deltas[0].matrix), options.density or 1.0
    for delta in deltas:
        summed += delta.matrix * torch.bernoulli(torch.full_like(summed, p), generator=generator) / p
    return summed


def tsv_m(deltas: Sequence[Delta], *_: object) -> Tensor:
    """Leading min(out, in)/n triplets of each, their vectors replaced by the nearest orthonormal ones.

    Σ_i Ũ_i S_i Ṽ_iᵀ with [Ũ_1 … Ũ_n] the polar factor of [U_1 … U_n], and Ṽ alike.

    Source: Gargiulo et al. 2025 (arXiv 2412.00081), Alg. 1. An update of lower rank brings as many triplets as it
    has; the authors' code fills up with vectors of zero singular values, which are arbitrary.
    """
    count = max(1, min(deltas[0].matrix.shape) // len(deltas))
    svds = [leading(delta.svd, count) for delta in deltas if delta.svd.S[0] > 0]
    U, S, Vh = (
        torch.cat([getattr(svd, part) for svd in svds], dim) for part, dim in (("U", 1), ("S", 0), ("Vh", 0))
    )
    return (_polar(U) * S) @ _polar(Vh)


def iso_c(deltas: Sequence[Delta], *_: object) -> Tensor:
    """The sum of the updates with the mean of its singular values in place of each.

    Source: Marczak et al. 2025 (arXiv 2502.04959), Alg. 1; zero values stay zero and out of the mean.
    """
    svd = _joint_svd(deltas)
    return svd.S.mean() * svd.U @ svd.Vh


def iso_cts(deltas: Sequence[Delta], options: MergeOptions, _: torch.Generator) -> Tensor:
    """The leading directions of the sum, and of each update the leading ones of what is orthogonal to them.

    All of these, orthogonalised as in `tsv_m`, with the mean of their singular values.

    Source: Marczak et al. 2025 (arXiv 2502.04959), Alg. 2; as in the authors' code each update gets equally many.
    """
    summed, n = _joint_svd(deltas), len(deltas)
    rank = len(summed.S)
    own = min(round((rank - int(rank * options.common)) / n), rank // n)
    parts = [summed.truncate(rank - own * n)] if rank > own * n else []
    for delta in deltas if own else ():
        common = parts[0].U if rank > own * n else summed.U[:, :0]
        rest = decompose(delta.matrix - common @ (common.mT @ delta.matrix))
        parts += [leading(rest, own)] if rest.S[0] > RANK * summed.S[0] else []
    U, S, Vh = (
        torch.cat([getattr(svd, part) for svd in parts], dim) for part, dim in (("U", 1), ("S", 0), ("Vh", 0))
    )
    return S.mean() * _polar(U) @ _polar(Vh)


def knots(deltas: Sequence[Delta], options: MergeOptions, generator: torch.Generator) -> Tensor:
    """TIES on the coefficients of each update in the left vectors of all: [Δ_1 … Δ_n] = U S [V_1ᵀ … V_nᵀ].

    Source: Stoica et al. 2025 (arXiv 2410.19735), KnOTS-TIES.
    """
    svd = _joint_svd(deltas, are_summed=False)
    coefficients = svd.S[:, None] * svd.Vh
    coefficients[coefficients.abs() < RANK * svd.S[0]] = 0  # the rounding of a zero would count in a mean
    return svd.U @ ties([Delta(part) for part in coefficients.chunk(len(deltas), 1)], options, generator)


def calibrated(merged: Tensor, deltas: Sequence[Delta], least: float) -> Tensor:
    """A merged update whose singular values are divided by how often their directions were counted.

    γ_r = n / Σ_i max(least, s_ri) with s_ri = ⟨u_rᵀ M, u_rᵀ Δ_i⟩ / ‖u_rᵀ Δ_i‖², for M = U S Vᵀ and S_r ← γ_r S_r.

    Source: singular value calibration, arXiv 2602.05536, Alg. 1.
    """
    svd = decompose(merged)
    counts = torch.zeros_like(svd.S)
    for delta in deltas:
        own = svd.U.mT @ delta.matrix
        response = svd.S * (own * svd.Vh).sum(1) / own.square().sum(1).clamp(min=1e-12)
        counts += response.clamp(min=least)
    return (svd.U * (svd.S * len(deltas) / counts)) @ svd.Vh


METHODS: dict[str, Method] = {
    "mean": mean,
    "task-arithmetic": total,
    "magnitude": magnitude,
    "ties": ties,
    "dare": dare,
    "tsv-m": tsv_m,
    "iso-c": iso_c,
    "iso-cts": iso_cts,
    "knots": knots,
}
SPECTRAL = ("tsv-m", "iso-c", "iso-cts", "knots")
"""Methods that decompose, and mean nothing for a vector."""


def _joint_svd(deltas: Sequence[Delta], *, are_summed: bool = True) -> SVD:
    """The triplets of the sum of several updates, or of these side by side; of products the sum is not formed."""
    factors = [delta.factors for delta in deltas if delta.factors]
    if len(factors) == len(deltas):
        B, A = (list(part) for part in zip(*factors, strict=True))
        return leading(low_rank_svd(torch.cat(B, 1), torch.cat(A) if are_summed else torch.block_diag(*A)))  # type: ignore[no-untyped-call]
    return leading(decompose(total(deltas) if are_summed else torch.cat([delta.matrix for delta in deltas], 1)))


def leading(svd: SVD, most: int | None = None) -> SVD:
    """At most so many triplets, those of zero singular values left out."""
    rank = max(1, int((svd.S > RANK * svd.S[0]).sum()))
    return svd.truncate(min(rank, most or rank))


def _polar(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or rows; of one that lacks rank a partial isometry."""
    svd = leading(decompose(X))
    return svd.U @ svd.Vh
