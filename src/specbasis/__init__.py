"""specbasis: what finetuning changes in the singular vectors and values of a model's weights."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.lazy import lazily

if TYPE_CHECKING:
    from specbasis.checkpoint import open_checkpoint as open_checkpoint
    from specbasis.comparison.compare import compare as compare
    from specbasis.comparison.comparison import Comparison as Comparison, load as load
    from specbasis.comparison.population import population as population
    from specbasis.core.edits import Edit as Edit
    from specbasis.core.low_rank import low_rank_svd as low_rank_svd
    from specbasis.core.svd import SVD as SVD, decompose as decompose
    from specbasis.figures.card import card as card
    from specbasis.finetuning.runs import finetune as finetune
    from specbasis.interventions.grid import intervene as intervene
    from specbasis.interventions.live import edited as edited, matrix_edits as matrix_edits
    from specbasis.interventions.stage import Subject as Subject
    from specbasis.lineage.fingerprint import fingerprint as fingerprint
    from specbasis.lineage.tree import lineage as lineage
    from specbasis.lineage.which_base import which_base as which_base
    from specbasis.treatment.extract import extract as extract
    from specbasis.treatment.forgetting import forgetting as forgetting
    from specbasis.treatment.merge import merge as merge
    from specbasis.treatment.repair import repair as repair

__version__ = "0.1.0"

__getattr__, __all__ = lazily(__name__)
__all__ += ["InputError", "NonFiniteError"]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """The package, in which `lineage` is the function although a room has the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets every room as an attribute of the package.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
