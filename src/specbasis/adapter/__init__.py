"""The spectral adapter: finetuning that moves only inside the pretrained singular basis.

The core needs torch alone. The names of the PEFT bridge are imported on first use, which registers the method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specbasis.core.lazy import lazily

if TYPE_CHECKING:
    from specbasis.adapter.gradients import initialize_gradient_basis
    from specbasis.adapter.layer import SpectralLinear
    from specbasis.adapter.peft_bridge import SpectralModel
    from specbasis.adapter.peft_config import SpectralConfig
    from specbasis.adapter.placement import Placed, place_coefficients, set_positions
    from specbasis.adapter.task_heads import ParameterCounts, parameter_counts

__all__ = [
    "ParameterCounts",
    "Placed",
    "SpectralConfig",
    "SpectralLinear",
    "SpectralModel",
    "initialize_gradient_basis",
    "parameter_counts",
    "place_coefficients",
    "set_positions",
]

__getattr__ = lazily(
    __name__,
    {
        "SpectralLinear": "layer",
        "initialize_gradient_basis": "gradients",
        **dict.fromkeys(("Placed", "place_coefficients", "set_positions"), "placement"),
        **dict.fromkeys(("SpectralConfig", "SpectralModel"), "peft_bridge"),
        **dict.fromkeys(("ParameterCounts", "parameter_counts"), "task_heads"),
    },
)
