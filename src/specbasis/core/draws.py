"""Random updates of the same size as one that was observed, and what a sample of them says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.dtypes import FORMATS
from specbasis.core.options import check_choice
from specbasis.core.rounding import rounding


def gaussian(W: Tensor, T: Tensor, generator: torch.Generator) -> Tensor:
    """Independent normal entries, scaled to the Frobenius norm of T − W."""
    Z = torch.randn(W.shape, generator=generator, dtype=torch.float64)
    return Z.mul_(torch.linalg.vector_norm(T.double() - W.double()) / torch.linalg.vector_norm(Z))


def permuted(W: Tensor, T: Tensor, generator: torch.Generator) -> Tensor:
    """The entries of T − W in random places."""
    delta = T.double() - W.double()
    return delta.flatten()[torch.randperm(delta.numel(), generator=generator)].reshape(W.shape)


def rotated(W: Tensor, T: Tensor, generator: torch.Generator) -> Tensor:
    """Q₁ (T − W) Q₂ with uniformly random orthogonal Q₁ and Q₂: the spectrum stays."""
    delta = T.double() - W.double()
    return _haar(W.shape[0], generator) @ delta @ _haar(W.shape[1], generator)


def rounded(W: Tensor, T: Tensor, generator: torch.Generator) -> Tensor:
    """Errors of rounding T to the format in which it is stored, uniform within half a step."""
    stored = FORMATS[rounding(T).stored]
    step = 2.0 ** (torch.frexp(T.double()).exponent - 1).clamp(min=stored.exponent).double() * stored.step
    error: Tensor = step * (torch.rand(W.shape, generator=generator, dtype=torch.float64) - 0.5)
    return error


DRAWS: Mapping[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "gaussian": gaussian,
    "permuted": permuted,
    "rotated": rotated,
    "rounding": rounded,
}
"""Null → random updates without a direction, of the size of T − W; a new one is a function and a line here."""

KINDS = tuple(DRAWS)


def draw(kind: str, W: Float[Tensor, "out in"], T: Float[Tensor, "out in"], generator: torch.Generator) -> Tensor:
    """A random update in place of T − W, float64, (out, in).

    Raises:
        InputError: the kind is none of `DRAWS`.
    """
    check_choice("null", kind, DRAWS)
    return DRAWS[kind](W, T, generator)


def _haar(d: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix (Mezzadri 2007)."""
    Q, R = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    rotation: Tensor = Q * R.diagonal().sign()
    return rotation


def p_sampled(observed: Float[Tensor, " k"], drawn: Float[Tensor, "draws k"]) -> Float[Tensor, " k"]:
    """Probability of an alignment at least as high under a sampled null, (1 + #{drawn ≥ observed})/(1 + draws).

    Never 0, and uniform on its steps where the observed one is a draw as well.

    Source: Phipson & Smyth 2010.
    """
    p: Tensor = (1 + (drawn >= observed).sum(dim=0).double()) / (1 + len(drawn))
    return p


def standard_error(drawn: Float[Tensor, "draws k"]) -> Float[Tensor, " k"]:
    """Monte-Carlo standard error of the mean over draws; ∞ for a single one."""
    spread = drawn.std(dim=0, correction=1) if len(drawn) > 1 else torch.full_like(drawn[0], math.inf)
    return spread.div_(math.sqrt(len(drawn)))
