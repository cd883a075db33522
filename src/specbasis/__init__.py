"""specbasis: what finetuning changes in the singular vectors and values of a model's weights."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.lazy import lazily

if TYPE_CHECKING:
    from specbasis.checkpoint import open_checkpoint
    from specbasis.comparison.compare import compare
    from specbasis.comparison.comparison import Comparison, load
    from specbasis.comparison.population import population
    from specbasis.core.edits import Edit
    from specbasis.core.low_rank import low_rank_svd
    from specbasis.core.svd import SVD, decompose
    from specbasis.finetuning.runs import finetune
    from specbasis.interventions.grid import intervene
    from specbasis.interventions.live import edited, matrix_edits
    from specbasis.interventions.stage import Subject
    from specbasis.lineage.fingerprint import fingerprint
    from specbasis.lineage.tree import lineage
    from specbasis.lineage.which_base import which_base
    from specbasis.treatment.extract import extract
    from specbasis.treatment.forgetting import forgetting
    from specbasis.treatment.merge import merge
    from specbasis.treatment.repair import repair

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
    "extract",
    "finetune",
    "fingerprint",
    "forgetting",
    "intervene",
    "lineage",
    "load",
    "low_rank_svd",
    "matrix_edits",
    "merge",
    "open_checkpoint",
    "population",
    "repair",
    "which_base",
]

__getattr__ = lazily(
    __name__,
    {
        "open_checkpoint": "checkpoint",
        "compare": "comparison.compare",
        **dict.fromkeys(("Comparison", "load"), "comparison.comparison"),
        "population": "comparison.population",
        "Edit": "core.edits",
        "low_rank_svd": "core.low_rank",
        **dict.fromkeys(("SVD", "decompose"), "core.svd"),
        "finetune": "finetuning.runs",
        "Subject": "interventions.stage",
        "intervene": "interventions.grid",
        **dict.fromkeys(("edited", "matrix_edits"), "interventions.live"),
        "lineage": "lineage.tree",
        "fingerprint": "lineage.fingerprint",
        "which_base": "lineage.which_base",
        "extract": "treatment.extract",
        "forgetting": "treatment.forgetting",
        "merge": "treatment.merge",
        "repair": "treatment.repair",
    },
)


class _Package(ModuleType):
    """The package, in which `lineage` is the function although a room has the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets every room as an attribute of the package.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
