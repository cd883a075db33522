"""The finetuning laboratory: tasks, methods, and training them under one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specbasis.finetune.tasks import GLUE, Task, TaskData, load_task

if TYPE_CHECKING:
    from specbasis.finetune.train import Finetuned, Protocol, finetune, load

__all__ = ["GLUE", "Finetuned", "Protocol", "Task", "TaskData", "finetune", "load", "load_task"]


def __getattr__(name: str) -> Any:
    if name in ("Finetuned", "Protocol", "finetune", "load"):
        from specbasis.finetune import train

        return getattr(train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
