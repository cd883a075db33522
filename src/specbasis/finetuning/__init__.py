"""The finetuning laboratory: tasks, methods, and training them under one protocol."""

from typing import TYPE_CHECKING

from specbasis.core.lazy import lazily

if TYPE_CHECKING:
    from specbasis.finetuning.options import Placement as Placement, Protocol as Protocol
    from specbasis.finetuning.runs import Finetuned as Finetuned, finetune as finetune, load as load
    from specbasis.finetuning.sources import load_task as load_task
    from specbasis.finetuning.tasks import GLUE as GLUE, Task as Task, TaskData as TaskData

__getattr__, __all__ = lazily(__name__)
