"""What a treatment did to a task: base, finetune and what was made of it, judged on the same examples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.writer import write_model
from specbasis.interventions.evaluators.kit import Judge
from specbasis.interventions.samples import Sample, as_samples, summarise
from specbasis.interventions.whole import add_tokenizer
from specbasis.treatment.updates import updates

Scores = dict[str, Sample | float]


def judge_treated(base: Checkpoint, tuned: Checkpoint, treated: Checkpoint, judge: Judge) -> dict[str, Any]:
    """Every metric of base, finetune and treated model, and what the treatment changed.

    The base has the finetune's own modules, such as a task head, where it has none.

    Returns:
        metric → base, tuned, treated, and change, change_low, change_high, p, examples of treated − tuned;
        see `specbasis.interventions.samples.summarise`.
    """
    entries = {
        change.name: base.entries[change.counterpart] for change in updates(base, tuned) if change.counterpart
    }
    without = replace(tuned, entries={**tuned.entries, **entries})
    models = {"base": without, "tuned": tuned, "treated": treated}
    scores = {name: score(model, judge, (tuned.source, base.source)) for name, model in models.items()}
    summary = summarise(scores["tuned"], scores["treated"])
    return {
        metric: {name: value_of(scores[name][metric]) for name in models}
        | {key: summary[f"{metric}.{key}"] for key in DETAILS if f"{metric}.{key}" in summary}
        for metric in scores["tuned"]
    }


DETAILS = ("change", "change_low", "change_high", "p", "examples")


def score(model: Checkpoint, judge: Judge, tokenizers: Iterable[str]) -> Scores:
    """A model's metrics; it is written to a folder for as long as it is judged."""
    with tempfile.TemporaryDirectory(prefix="specbasis-") as folder:
        place = write_model(model, Path(folder, "model"))
        add_tokenizer(place, *tokenizers)
        return as_samples(judge(judge.load(str(place))))


def value_of(score: Sample | float) -> float:
    """The metric itself."""
    return score.value if isinstance(score, Sample) else score


def told(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each metric, for a terminal."""
    return [
        f"{metric}: base {values['base']:.4f}, finetune {values['tuned']:.4f}, written {values['treated']:.4f}"
        + (
            f" (change {values['change']:+.4f} [{values['change_low']:+.4f}, {values['change_high']:+.4f}], "
            f"{values['examples']} examples)"
            if "examples" in values
            else ""
        )
        for metric, values in scores.items()
    ]
