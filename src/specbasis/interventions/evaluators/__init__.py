"""Ready-made evaluators, one a file: each loads the model that it judges, and scores it example by example.

All of them are callables from a model to `Sample`s, so one's own is any function that does the same. A file that is
added to this folder is imported with the others; what it adds to `kit.FORMS` can be named in a text.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from specbasis.core.errors import InputError
from specbasis.finetuning.tasks import GLUE, task_key
from specbasis.interventions.evaluators.classification import Classification
from specbasis.interventions.evaluators.harness import Harness
from specbasis.interventions.evaluators.kit import FORMS, Judge, describe
from specbasis.interventions.evaluators.numbering import Numbering
from specbasis.interventions.evaluators.text import Text

__all__ = ["Classification", "Harness", "Judge", "Numbering", "Text", "describe", "judge"]


def judge(text: str, /, **options: Any) -> Judge:
    """The evaluator that a text names: ``glue:TASK``, ``table:FILE``, ``images:FOLDER``, ``text:FILE``,
    ``similarity:TASK|FILE``, ``anarcii:RECEPTOR``, ``harness:TASK,TASK``, or as another file of this folder has it.

    Args:
        text: as above; of GLUE the task's name alone does as well.
        options: ``data_dir`` (GLUE), ``text`` and ``label`` (tables), ``limit`` (all of them).

    Raises:
        InputError: none of these.
    """
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    if task_key(text) in GLUE:
        text = f"glue:{text}"
    name, _, argument = text.partition(":")
    if name not in FORMS or not argument:
        raise InputError(f"got task {text!r}; want one of {', '.join(f'{form}:…' for form in FORMS)}")
    return FORMS[name](argument, options)
