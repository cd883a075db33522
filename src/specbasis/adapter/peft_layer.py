"""The adapted layer as a tuner layer of PEFT, over quantised base layers too."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from specbasis.adapter.layer import SpectralLinear
from specbasis.adapter.layouts import innermost, layout_of
from specbasis.adapter.state import PARTS
from specbasis.core.errors import InputError


class SpectralLayer(SpectralLinear, BaseTunerLayer):
    """`SpectralLinear` with the bookkeeping that PEFT expects of a tuner layer, and quantised base layers."""

    def __init__(self, base_layer: nn.Module, module_name: str, quantization: dict[str, Any]) -> None:
        super().__init__(base_layer, None, module_name=module_name)
        self._kept: tuple[Any, dict[str, Any]] | None = None  # what restores a quantised weight besides its tensor
        again = {"get_apply_tensor_subclass": self._unknown_quantisation, **quantization}
        self.quantization_backend = resolve_quantization_backend(innermost(base_layer), **again)

    def _unknown_quantisation(self) -> Any:
        """The recipe of torchao for a merged weight, where ``quantize_`` was called and the model has none."""
        raise InputError(
            f"{self.module_name}: the model does not tell how torchao quantised it, and a merged weight would "
            "have to be quantised again; merge into the unquantised base"
        )

    def weight_matrix(self) -> Tensor:
        """The frozen weight as a matrix (out, in), dequantised if need be."""
        if self.quantization_backend is None or self._original is not None:
            return super().weight_matrix()
        base = innermost(self)
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            base.state_dict()  # bitsandbytes packs 4-bit weights in evaluation; its state dict is what unpacks them
        return self.layout.matrix(self.quantization_backend.get_base_weight(base).detach().float())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `SpectralLinear.merge`; a sum in a quantised layer is rounded again."""
        names = check_adapters_to_merge(self, adapter_names)
        backend = self.quantization_backend
        if names and backend is not None:
            if not backend.supports_merge:
                raise ValueError(
                    f"{self.module_name}: merging into {backend.backend_name} weights is not supported by PEFT"
                )
            getattr(backend, "get_apply_tensor_subclass", bool)()  # refuses before anything is replaced
            warnings.warn(
                f"merged weights are quantised again with {backend.backend_name}; this rounding changes the model. "
                "Merge into the unquantised base for an exact result",
                stacklevel=2,
            )
        super().merge(safe_merge, names)

    def unmerge(self) -> None:
        """Put the frozen weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        super().unmerge()
        if self._kept is not None:
            state, attributes = self._kept
            vars(innermost(self).weight).update(attributes)
            if state is not None:
                innermost(self).state = state
            self._kept = None

    def _put_weight(self, weight: Tensor) -> None:
        if self.quantization_backend is None:
            super()._put_weight(weight)
            return
        base = innermost(self)
        if self._kept is None:
            # bitsandbytes keeps half of a quantised weight in the layer's state; PEFT rewrites the weight's marks.
            self._kept = getattr(base, "state", None), dict(vars(self._original))
            if self._kept[0] is not None:
                base.state = copy.copy(self._kept[0])
        self.quantization_backend.set_base_weight(self, weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter's tensors next to the weight, and keep their dtype: rounded ones are others."""
        device = device or self.stored_weight().device
        M = self.spectral_M
        if adapter_name in M and not M[adapter_name].is_meta:
            M[adapter_name] = nn.Parameter(M[adapter_name].to(device), requires_grad=M[adapter_name].requires_grad)
            for part in PARTS:
                self._frozen(part)._apply(lambda tensor: tensor.to(device))

    @property
    def in_features(self) -> int:
        """Inputs of the base layer as PEFT counts them: channels of a convolution."""
        return int(getattr(innermost(self), "in_channels", self.layout.shape(self)[1]))

    @property
    def out_features(self) -> int:
        """Outputs of the base layer, or its output channels."""
        return self.layout.shape(self)[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive."""
        return True

    def __repr__(self) -> str:
        return "spectral." + super().__repr__()


class SpectralLinearLayer(SpectralLayer):
    """Over a linear layer. PEFT takes a layer with "Linear" in its class's name for one of "all-linear"."""


class SpectralConv2dLayer(SpectralLayer):
    """Over a convolution."""


def adapted_layer(base_layer: nn.Module, module_name: str, quantization: dict[str, Any]) -> SpectralLayer:
    """The layer of PEFT's over a base layer, without an adapter yet."""
    kind = SpectralLinearLayer if layout_of(base_layer, module_name).linear else SpectralConv2dLayer
    return kind(base_layer, module_name, quantization)
