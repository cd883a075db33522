"""A transformers callback that logs how far the cores have moved."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from specbasis.adapter.diagnostics import drift
from specbasis.adapter.layer import SpectralLinear


class DriftCallback(TrainerCallback):
    """Adds ``spectral_drift/LAYER``, ‖C‖_F / ‖S‖_2 of the active adapter, to everything that the Trainer logs.

    Attributes:
        history: one dictionary for each log, {"step": …, layer: drift}.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and log; costs O(r²) for each layer."""
        drift_of = drifts(kwargs["model"])
        self.history.append({"step": state.global_step, **drift_of})
        entries = {f"spectral_drift/{name}": value for name, value in drift_of.items()}
        # Reporters read the first of these, and the Trainer keeps the second.
        for log in (kwargs.get("logs"), *state.log_history[-1:]):
            if log is not None:
                log.update(entries)


def drifts(model: nn.Module) -> dict[str, float]:
    """Drift of every adapted layer's first active adapter, by module name."""
    return {
        module.module_name: drift(module.core(name).detach(), module.spectral_S[name])
        for module in model.modules()
        if isinstance(module, SpectralLinear)
        for name in module.active_adapters[:1]
        if name in module.adapters
    }
