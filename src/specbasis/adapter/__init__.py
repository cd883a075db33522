"""The spectral adapter: finetuning that moves only inside the pretrained singular basis.

The core needs torch alone. The names of the PEFT bridge are imported on first use, which registers the method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specbasis.core.lazy import lazily

if TYPE_CHECKING:
    from specbasis.adapter.gradients import initialize_gradient_basis as initialize_gradient_basis
    from specbasis.adapter.layer import SpectralLinear as SpectralLinear
    from specbasis.adapter.peft_bridge import SpectralConfig as SpectralConfig, SpectralModel as SpectralModel
    from specbasis.adapter.placement import (
        Placed as Placed,
        place_coefficients as place_coefficients,
        set_positions as set_positions,
    )
    from specbasis.adapter.task_heads import (
        ParameterCounts as ParameterCounts,
        parameter_counts as parameter_counts,
    )

__getattr__, __all__ = lazily(__name__)
