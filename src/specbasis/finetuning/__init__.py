"""The finetuning laboratory: tasks, methods, and training them under one protocol."""

from specbasis.finetuning.protocol import Placement, Protocol
from specbasis.finetuning.runs import Finetuned, finetune, load
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import GLUE, Task, TaskData

__all__ = ["GLUE", "Finetuned", "Placement", "Protocol", "Task", "TaskData", "finetune", "load", "load_task"]
