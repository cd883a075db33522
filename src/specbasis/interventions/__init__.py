"""Interventions: swap, replace, randomise and mask singular vectors of a model, and see what its task says."""

from typing import TYPE_CHECKING

from specbasis.core.lazy import lazily

if TYPE_CHECKING:
    from specbasis.interventions.evaluators import (
        Classification as Classification,
        Harness as Harness,
        Numbering as Numbering,
        Text as Text,
        judge as judge,
    )
    from specbasis.interventions.grid import intervene as intervene, read_grid as read_grid
    from specbasis.interventions.live import edited as edited, matrix_edits as matrix_edits
    from specbasis.interventions.samples import Sample as Sample
    from specbasis.interventions.stage import Subject as Subject

__getattr__, __all__ = lazily(__name__)
