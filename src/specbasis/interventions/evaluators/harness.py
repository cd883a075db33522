"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import Any

import numpy as np
from torch import nn

from specbasis.core.extras import require
from specbasis.interventions.evaluators.kit import FORMS, pretrained, tokenizer_of
from specbasis.interventions.samples import Sample


@dataclass(frozen=True, eq=False)
class Harness:
    """Tasks of lm-evaluation-harness, with one score for each example where it gives one.

    Attributes:
        tasks: names, separated by commas.
        limit: examples of each task.
        include: folder with task files of one's own.
        metric: the metric that figures show; the first that the first task reports by default.
    """

    tasks: str
    limit: int | None = None
    include: str | None = None
    metric: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_manager"}

    @cached_property
    def _manager(self) -> Any:
        """The harness's index of its tasks, which takes seconds to read."""
        require("lm_eval", purpose="harness tasks need")
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.include)

    def load(self, source: str) -> nn.Module:
        """A causal language model of transformers."""
        import transformers

        return pretrained(transformers.AutoModelForCausalLM, source)

    def __call__(self, model: nn.Module) -> dict[str, Sample | float]:
        """``TASK.METRIC`` for every task and metric."""
        manager = self._manager
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        tokenizer = tokenizer_of(model)
        config: Any = model.config
        # What stands before a text of which every token counts; the harness fails where a tokenizer names nothing.
        first = [tokenizer.bos_token_id, tokenizer.eos_token_id, config.bos_token_id, 0]
        with redirect_stderr(StringIO()):  # its bars, once for every edit, would run over the grid's own
            report = simple_evaluate(
                HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,
                    batch_size=16,
                    prefix_token_id=next(token for token in first if token is not None),
                ),
                tasks=self.tasks.split(","),
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=manager,
            )
        scores: dict[str, Sample | float] = {}
        for task, results in report["results"].items():
            for key, value in results.items():
                metric, _, _ = key.partition(",")
                if isinstance(value, int | float) and not metric.endswith(("_stderr", "sample_len")):
                    examples = [sample.get(metric) for sample in report["samples"].get(task, [])]
                    scored = examples and all(isinstance(score, int | float) for score in examples)
                    sample = Sample(np.array(examples, float)[:, None]) if scored else float(value)
                    scores[f"{task}.{metric}"] = sample
        return scores


FORMS["harness"] = lambda tasks, options: Harness(tasks, options.get("limit"))
