"""What makes a model's part above the cut lighter: a tail that runs on the first position only, and a lean gather.

A classifier on the first token ([CLS]) reads one position of the last block. From the last attention on every
position is on its own, so the feed-forward layer of that block, two thirds of its matrices, is worked out for all
positions but one in vain. Slicing the attention's output leaves outputs and gradients as they are.

torch keeps the whole input of a gather until the backward pass, which reads no more than its shape. In an attention
with relative positions (DeBERTa) that input is the score of every token with every relative position, twice: with
64 tokens and 512 positions eight times the attention's own scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from specbasis.finetuning.prefix.probe import (
    Call,
    Probe,
    agree,
    hooked,
    make_probe,
    matrix_work,
    outputs,
    probing,
    record,
    weighted,
)


@contextmanager
def narrowed(model: nn.Module) -> Iterator[nn.Module]:
    """The model, whose last block works only on the first position after its attention if nothing reads others.

    Outputs and gradients are those of the model to rounding; dropout draws other random numbers. Where the model
    reads every position (a mean over tokens, a head for each token, a language model), or cannot be run on made-up
    inputs, nothing changes. Hidden states that the model is asked to return are those of the first position.
    """
    with slicing(model, find_narrow(model)):
        yield model


def find_narrow(model: nn.Module) -> str | None:
    """Name of the module after which one position is enough; None where there is no such module."""
    with probing(model):
        try:
            return search_narrow(model, make_probe(model, 4, 11))
        except Exception:  # any model may fail in any way on made-up inputs, and goes on as it is
            return None


@contextmanager
def slicing(model: nn.Module, name: str | None) -> Iterator[None]:
    """Cut a module's output to the first position."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        return pytree.tree_unflatten([leaf[:, :1] if _by_position(leaf) else leaf for leaf in leaves], spec)

    with hooked(*([] if name is None else [model.get_submodule(name).register_forward_hook(hook)])):
        yield


def _by_position(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3 and leaf.shape[1] > 1


def search_narrow(model: nn.Module, probe: Probe) -> str | None:
    """The slice that spares most, of those that leave the model's outputs as they are.

    Args:
        model: in evaluation mode.
        probe: a batch.
    """
    calls, result = record(model, probe.batch)
    want = outputs(result, probe.mask)
    best, most = None, 0
    for name in _candidates(calls, want):
        try:
            with slicing(model, name):
                sliced, result = record(model, probe.batch)
        except Exception:  # the slice does not fit what comes next
            continue
        spared = _work(model, calls) - _work(model, sliced)
        if spared > most and agree(outputs(result, probe.mask), want):
            best, most = name, spared
    return best


def _candidates(calls: Sequence[Call], results: Sequence[Tensor]) -> list[str]:
    """Modules, called once, of whose output the first position alone is read."""
    loss = weighted(results)
    times = Counter(call.module for call in calls)
    names: dict[int, str] = {}
    tensors: dict[int, Tensor] = {}
    for call in calls:
        for leaf in call.leaves:
            if _by_position(leaf) and leaf.requires_grad and times[call.module] == 1 and call.module:
                names.setdefault(id(leaf), call.module)
                tensors[id(leaf)] = leaf
    if loss is None or not tensors:
        return []
    grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return [names[key] for key, g in zip(tensors, grads, strict=True) if g is not None and not bool(g[:, 1:].any())]


def _work(model: nn.Module, calls: Sequence[Call]) -> int:
    """Multiply–adds of the matrices with their tokens, roughly: what slicing saves is told by the difference."""
    total = 0
    for call, size in matrix_work(model, calls):
        leaf = call.leaves[0] if size and call.leaves else None
        if isinstance(leaf, Tensor) and leaf.dim() == 3:
            total += size * leaf.shape[0] * leaf.shape[1]
    return total


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
        lean = _gather if func in (torch.gather, Tensor.gather) else func
        return lean(*args, **(kwargs or {}))


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
