"""Interventions: swap, replace, randomise and mask singular vectors of a model, and see what its task says."""

from specbasis.intervene.evaluators import Classification, Harness, Numbering, Text, judge
from specbasis.intervene.grid import Subject, intervene, read_grid
from specbasis.intervene.live import edited, matrix_edits
from specbasis.intervene.samples import Sample

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
