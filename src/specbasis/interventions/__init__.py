"""Interventions: swap, replace, randomise and mask singular vectors of a model, and see what its task says."""

from specbasis.interventions.evaluators import Classification, Harness, Numbering, Text, judge
from specbasis.interventions.grid import Subject, intervene, read_grid
from specbasis.interventions.live import edited, matrix_edits
from specbasis.interventions.samples import Sample

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
