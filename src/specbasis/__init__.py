"""specbasis: what finetuning changes in the singular vectors and values of a model's weights."""

from specbasis.checkpoint import open_checkpoint
from specbasis.comparison.compare import compare
from specbasis.comparison.comparison import Comparison, load
from specbasis.comparison.population import population
from specbasis.core.edits import Edit
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.low_rank import low_rank_svd
from specbasis.core.svd import SVD, decompose
from specbasis.finetuning.runs import finetune
from specbasis.interventions import Subject, edited, intervene, matrix_edits
from specbasis.lineage.tree import lineage

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
