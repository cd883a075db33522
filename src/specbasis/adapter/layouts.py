"""How each class of layer stores its matrix, and how a factor of that matrix is applied to the layer's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from specbasis.core.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How one class of layers stores a matrix (out, in); pickled by its name in this module.

    Attributes:
        name: its name in this module.
        linear: whether the layer is a matrix product: nn.Linear or transformers' Conv1D.
        matrix: stored weight → matrix (out, in).
        stored: matrix, layer → stored weight.
        project: x, Vh, layer → x Vhᵀ.
        mix: z, C → z Cᵀ.
        expand: t, U, layer → t Uᵀ.
    """

    name: str
    linear: bool
    matrix: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, Any], Tensor]
    project: Callable[[Tensor, Tensor, Any], Tensor]
    mix: Callable[[Tensor, Tensor], Tensor]
    expand: Callable[[Tensor, Tensor, Any], Tensor]

    def __reduce__(self) -> str:
        return self.name

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """(out, in) of a layer's matrix; a quantised weight is packed in another shape, so its layer is asked."""
        layer = innermost(layer)
        if isinstance(layer, nn.Conv2d):
            return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        if isinstance(layer, nn.Linear) or hasattr(layer, "in_features"):
            return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        in_, out = weight.shape
        return out, in_


LINEAR = Layout(
    "LINEAR",
    True,
    lambda W: W,
    lambda D, _: D,
    lambda x, Vh, _: F.linear(x, Vh),
    F.linear,
    lambda t, U, _: F.linear(t, U),
)
CONV1D = Layout(
    "CONV1D",
    True,
    lambda W: W.mT,
    lambda D, _: D.mT.contiguous(),
    LINEAR.project,
    F.linear,
    LINEAR.expand,
)
CONV2D = Layout(
    "CONV2D",
    False,
    lambda W: W.flatten(1),
    lambda D, layer: D.reshape(layer.weight.shape),
    # The layer's own forward knows stride, padding, padding mode and dilation; every group sees the same Vh.
    lambda x, Vh, layer: layer._conv_forward(
        x, Vh.view(-1, *layer.weight.shape[1:]).repeat(layer.groups, 1, 1, 1).to(x.dtype), None
    ),
    lambda z, C: F.conv2d(z, C.repeat(z.shape[-3] // len(C), 1)[:, :, None, None], groups=z.shape[-3] // len(C)),
    lambda t, U, layer: F.conv2d(t, U[:, :, None, None], groups=layer.groups),
)


def layout_of(layer: nn.Module, name: str) -> Layout:
    """The layout of a layer, by its class; transformers need not be installed.

    Raises:
        InputError: the layer is of no known class.
    """
    inner = innermost(layer)
    if isinstance(inner, nn.Conv2d):
        return CONV2D
    if any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(inner).__mro__):
        return CONV1D
    if isinstance(inner, nn.Linear) or (hasattr(inner, "in_features") and hasattr(inner, "out_features")):
        return LINEAR
    raise InputError(
        f"{name}: got a {type(inner).__name__}; want nn.Linear, transformers' Conv1D or nn.Conv2d: leave this "
        "module out of target_modules"
    )


def matrix_shape(layer: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix.

    Raises:
        InputError: the layer is of no known class.
    """
    return layout_of(layer, name).shape(layer)


def innermost(layer: nn.Module) -> nn.Module:
    """The layer that holds the weight, below any number of adapters."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer  # type: ignore[assignment]
    return layer
