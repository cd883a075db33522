"""The adapter as mathematics: one update, four ways to compute it, and the rule that picks one.

W' = W + U C Vh, with U (out, r) and Vh (r, in) frozen singular vectors of W on ranks [k, m), r = m − k, and the
core C trained: C = M, or C = diag(S) M when the coefficients are in units of the singular values.

Source: Yu et al. 2026, Eq. 3, 4, App. M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Route = Literal["factored", "folded", "inner", "outer"]

CONDITION = 100.0
"""Largest (σ_top + ‖bias‖) / σ_m for which a route may divide by singular values.

The inner and outer routes are off by about CONDITION · eps relative to the update. Larger: more matrices take
the cheaper route, with fewer right digits.
"""


def core(M: Float[Tensor, "r r"], S: Float[Tensor, " r"], scale: str) -> Float[Tensor, "r r"]:
    """Coefficients in units of the weights: M (scale "none"), or diag(S) M (scale "sigma").

    With "sigma", W' = W + U diag(S) M Vh: LoRA-XS (Bałazy et al. 2024), and PSOFT with a free R = 1 + M.
    """
    return S[:, None] * M if scale == "sigma" else M


def delta(U: Float[Tensor, "out r"], C: Float[Tensor, "r r"], Vh: Float[Tensor, "r in"]) -> Float[Tensor, "out in"]:
    """The update as a matrix: U C Vh, multiplied from the cheaper side. Costs 2·r·out·in + 2·r²·min(out, in)
    flops.
    """
    return (U @ C) @ Vh if U.shape[0] <= Vh.shape[1] else U @ (C @ Vh)


def factored(
    x: Float[Tensor, "... in"], U: Float[Tensor, "out r"], C: Float[Tensor, "r r"], Vh: Float[Tensor, "r in"]
) -> Float[Tensor, "... out"]:
    """The update's output: ((x Vhᵀ) Cᵀ) Uᵀ. Autograd keeps x Vhᵀ, tokens × r numbers, and never x."""
    return F.linear(F.linear(F.linear(x, Vh), C), U)


class _OneSide(torch.autograd.Function):
    """x + (((x − o) Bᵀ) Aᵀ) B for frozen orthonormal rows B (r, d); keeps (x − o) Bᵀ, tokens × r numbers.

    Its gradients: dA = (d Bᵀ)ᵀ z, dx = d + ((d Bᵀ) A) B. Sums go into the products (addmm): no extra pass over x.
    The projection z is an output too, so that second derivatives, which go through it, are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, o: Tensor | None, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        flat = _rows(x)
        z = flat @ B.mT
        if o is not None:
            z -= B @ o
        return torch.addmm(flat, z @ A.mT, B).view(x.shape), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # else zeros are made for z, tokens × r of them
        ctx.save_for_backward(output[1], inputs[2], inputs[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z, B, A = ctx.saved_tensors
        d, dz = grads
        dx = dA = None
        if d is not None:
            flat = _rows(d)
            q = flat @ B.mT
            dA = q.mT @ z
            dx = torch.addmm(flat, q @ A, B).view(d.shape) if ctx.needs_input_grad[0] else None
        return _plus(dx, dz, B), None, None, dA


class _CoreGradient(torch.autograd.Function):
    """The output y of a frozen layer, as a function of the core alone: dC = (dY U)ᵀ z."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, z: Tensor, U: Tensor, C: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, U = ctx.saved_tensors
        return None, None, None, (_rows(grads[0]) @ U).mT @ z


def inner(
    x: Float[Tensor, "... in"],
    U: Float[Tensor, "out r"],
    S: Float[Tensor, " r"],
    C: Float[Tensor, "r r"],
    Vh: Float[Tensor, "r in"],
    frozen: Callable[[Tensor], Tensor],
) -> Float[Tensor, "... out"]:
    """The adapted output as the frozen layer's for another input: x' = x + ((x Vhᵀ) Cᵀ / S) Vh.

    W V = U diag(S) gives W + U C Vh = W (1 + V S⁻¹ C Vh): all work is on the input side, the cheaper one where
    in < out. Where x needs no gradient, the core's is taken from the output, and the layer's input gradient is
    not formed.
    """
    A = C / S[:, None]
    if x.requires_grad or not (torch.is_grad_enabled() and C.requires_grad):
        return frozen(_OneSide.apply(x, None, Vh, A)[0])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        flat = _rows(x)
        z = flat @ Vh.mT
        y = frozen(torch.addmm(flat, z @ A.mT, Vh).view(x.shape))
    gradient: Tensor = _CoreGradient.apply(y, z, U, C)  # type: ignore[no-untyped-call]
    return gradient


def outer(
    y: Float[Tensor, "... out"],
    bias: Float[Tensor, " out"] | None,
    U: Float[Tensor, "out r"],
    S: Float[Tensor, " r"],
    C: Float[Tensor, "r r"],
) -> Float[Tensor, "... out"]:
    """The adapted output from the frozen one, y = W x + b: y' = y + (((y − b) U / S) Cᵀ) Uᵀ.

    Uᵀ W = diag(S) Vh gives W + U C Vh = (1 + U C S⁻¹ Uᵀ) W: all work is on the output side, the cheaper one
    where out < in. Autograd keeps (y − b) U, tokens × r numbers.
    """
    adapted: Tensor = _OneSide.apply(y, bias, U.mT, C / S)[0]  # type: ignore[no-untyped-call]
    return adapted


class _Folded(torch.autograd.Function):
    """y = x (W + U C Vh)ᵀ + b with the factored gradient dC = (dY U)ᵀ (x Vhᵀ): no dense gradient, x is not kept.

    The projection z = x Vhᵀ is an output too, so that second derivatives, which go through it, are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, bias: Tensor | None, U: Tensor, C: Tensor, Vh: Tensor
    ) -> tuple[Tensor, Tensor]:
        return F.linear(x, W + delta(U, C, Vh), bias), F.linear(x, Vh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, W, _, U, C, Vh = inputs
        ctx.set_materialize_grads(False)  # else zeros are made for z, tokens × r of them
        ctx.save_for_backward(output[1], W, U, C, Vh)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z, W, U, C, Vh = ctx.saved_tensors
        dy, dz = grads
        dx = dC = None
        if dy is not None:
            dC = _rows(F.linear(dy, U.mT)).mT @ _rows(z)
            dx = dy @ (W + delta(U, C, Vh)) if ctx.needs_input_grad[0] else None
        return _plus(dx, dz, Vh), None, None, None, dC, None


def _rows(x: Tensor) -> Tensor:
    """All leading dimensions as one: (…, d) to (tokens, d)."""
    return x.reshape(-1, x.shape[-1])


def _plus(dx: Tensor | None, dz: Tensor | None, B: Tensor) -> Tensor | None:
    """The input's gradient with that of its projection z = x Bᵀ: dx + dz B. Only second derivatives have a dz."""
    if dz is None:
        return dx
    more = dz @ B
    return more if dx is None else dx + more.view(dx.shape)


def folded(
    x: Float[Tensor, "... in"],
    W: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    U: Float[Tensor, "out r"],
    C: Float[Tensor, "r r"],
    Vh: Float[Tensor, "r in"],
) -> Float[Tensor, "... out"]:
    """The adapted output from the summed weight: x (W + U C Vh)ᵀ + b, with the gradient of C in factors.

    dC = (dY U)ᵀ (x Vhᵀ). The sum is formed for the step and again for the gradient of x, so that the only
    activation kept is x Vhᵀ, tokens × r numbers. Frozen W, bias, U and Vh get no gradient.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or C.requires_grad)):
        return F.linear(x, W + delta(U, C, Vh), bias)
    y: Tensor = _Folded.apply(x, W, bias, U, C, Vh)[0]  # type: ignore[no-untyped-call]
    return y


def cost(route: Route, tokens: int, out: int, in_: int, r: int, *, backward: bool, input_gradient: bool) -> float:
    """Multiply–adds that a route adds to the frozen layer, for one forward and (on request) one backward pass."""
    n, project, expand, square = tokens, in_ * r, out * r, r * r
    fold = float(out * in_ * r + square * min(out, in_))
    if route == "folded":
        forward = fold + (n * project if backward else 0)
        return forward + backward * (n * (expand + square) + input_gradient * fold)
    if route == "factored":
        side, other = project, expand
    else:
        side = other = project if route == "inner" else expand
    forward = float(n * (side + square + other))
    if not backward:
        return forward
    if route == "inner" and not input_gradient:
        return forward + n * (expand + square)
    return forward + n * (other + square) + input_gradient * n * (square + side)


def choose(
    tokens: int,
    out: int,
    in_: int,
    r: int,
    *,
    backward: bool,
    input_gradient: bool,
    candidates: tuple[Route, ...] = ("factored", "folded"),
) -> Route:
    """The route with the fewest multiply–adds among the candidates; the first of them on a tie."""
    best, least = candidates[0], float("inf")  # a loop, as torch.compile does not trace min(…, key=…)
    for route in candidates:
        price = cost(route, tokens, out, in_, r, backward=backward, input_gradient=input_gradient)
        if price < least:
            best, least = route, price
    return best
