"""A gather that keeps nothing for the backward pass but its index.

torch keeps the whole input of a gather until the backward pass, which reads no more than its shape. In an attention
with relative positions (DeBERTa) that input is the score of every token with every relative position, twice: with
64 tokens and 512 positions eight times the attention's own scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class LeanGather(TorchFunctionMode):
    """Inside, `torch.gather` gives the same values and gradients and holds less memory until the backward pass."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Put the lean gather in the place of torch's."""
        if func is torch.gather or func is Tensor.gather:
            return _gather(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _gather(input: Tensor, dim: int, index: Tensor, **rest: Any) -> Tensor:
    if rest or not (torch.is_grad_enabled() and input.requires_grad):
        return torch.gather(input, dim, index, **rest)
    output: Tensor = _Gather.apply(input, dim, index)  # type: ignore[no-untyped-call]
    return output


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.dim, ctx.shape = dim, values.shape
        ctx.save_for_backward(index)
        return torch.gather(values, dim, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(ctx.dim, index, grad), None, None
