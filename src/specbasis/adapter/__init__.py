"""The spectral adapter: finetuning that moves only inside the pretrained singular basis.

The core needs torch alone. The names of the PEFT bridge are imported on first use, which registers the method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specbasis.adapter.layer import SpectralLinear
from specbasis.adapter.task_heads import ParameterCounts, parameter_counts

if TYPE_CHECKING:
    from specbasis.adapter.peft_bridge import SpectralModel
    from specbasis.adapter.peft_config import SpectralConfig

__all__ = ["ParameterCounts", "SpectralConfig", "SpectralLinear", "SpectralModel", "parameter_counts"]


def __getattr__(name: str) -> Any:
    if name in ("SpectralConfig", "SpectralModel"):
        from specbasis.adapter import peft_bridge

        return getattr(peft_bridge, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
