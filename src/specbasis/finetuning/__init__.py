"""The finetuning laboratory: tasks, methods, and training them under one protocol."""

from typing import TYPE_CHECKING

from specbasis.core.lazy import lazily

if TYPE_CHECKING:
    from specbasis.finetuning.options import Placement, Protocol
    from specbasis.finetuning.runs import Finetuned, finetune, load
    from specbasis.finetuning.sources import load_task
    from specbasis.finetuning.tasks import GLUE, Task, TaskData

__all__ = ["GLUE", "Finetuned", "Placement", "Protocol", "Task", "TaskData", "finetune", "load", "load_task"]

__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("Placement", "Protocol"), "options"),
        **dict.fromkeys(("Finetuned", "finetune", "load"), "runs"),
        **dict.fromkeys(("GLUE", "Task", "TaskData"), "tasks"),
        "load_task": "sources",
    },
)
