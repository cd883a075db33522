"""specbasis: what finetuning changes in the singular vectors and values of a model's weights."""

from specbasis.checkpoint import open_checkpoint
from specbasis.compare import Comparison, compare, load
from specbasis.edits import Edit
from specbasis.errors import InputError, NonFiniteError
from specbasis.finetune.runs import finetune
from specbasis.intervene import Subject, edited, intervene, matrix_edits
from specbasis.lineage import lineage
from specbasis.population import population
from specbasis.svd import SVD, decompose, low_rank_svd

__version__ = "0.1.0"

__all__ = [
    "SVD",
    "Comparison",
    "Edit",
    "InputError",
    "NonFiniteError",
    "Subject",
    "compare",
    "decompose",
    "edited",
    "finetune",
    "intervene",
    "lineage",
    "load",
    "low_rank_svd",
    "matrix_edits",
    "open_checkpoint",
    "population",
]
