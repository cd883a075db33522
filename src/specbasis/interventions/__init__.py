"""Interventions: swap, replace, randomise and mask singular vectors of a model, and see what its task says."""

from typing import TYPE_CHECKING

from specbasis.core.lazy import lazily

if TYPE_CHECKING:
    from specbasis.interventions.evaluators import Classification, Harness, Numbering, Text, judge
    from specbasis.interventions.grid import intervene, read_grid
    from specbasis.interventions.live import edited, matrix_edits
    from specbasis.interventions.samples import Sample
    from specbasis.interventions.stage import Subject

__all__ = [
    "Classification",
    "Harness",
    "Numbering",
    "Sample",
    "Subject",
    "Text",
    "edited",
    "intervene",
    "judge",
    "matrix_edits",
    "read_grid",
]

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("Classification", "Harness", "Numbering", "Text", "judge"), "evaluators"),
        **dict.fromkeys(("intervene", "read_grid"), "grid"),
        **dict.fromkeys(("edited", "matrix_edits"), "live"),
        "Sample": "samples",
        "Subject": "stage",
    },
)
