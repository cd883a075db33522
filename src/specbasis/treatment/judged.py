"""What a treatment did to a task: base, finetune and what was made of it, judged on the same examples."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

from specbasis.checkpoint import Checkpoint, Entry
from specbasis.checkpoint.writer import write_model
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.text import number_of
from specbasis.interventions.evaluators.kit import Judge
from specbasis.interventions.samples import Sample, as_samples, summarise
from specbasis.interventions.whole import add_tokenizer
from specbasis.treatment.finetunes import MEAN, MERGED, Finetunes
from specbasis.treatment.updates import updates

Scores = dict[str, Sample | float]

LEVEL = 0.05
"""Of a test, as of the intervals."""


def judge_pair(base: Checkpoint, tuned: Checkpoint, judge: Judge) -> dict[str, Scores]:
    """The scores of base and finetune; before the long work, which is in vain where they cannot be judged.

    The base has the finetune's own modules, such as a task head, where it has none, and the rows that it lacks of a
    larger vocabulary.
    """
    entries = {
        change.name: base.entries[change.counterpart]
        if change.counterpart
        else replace(tuned.entries[change.name], load=change.as_tuned, factors=None, part=None)
        for change in updates(base, tuned)
        if change.in_base
    }
    without = replace(tuned, entries={**tuned.entries, **entries})
    models = {"base": without, "tuned": tuned}
    return {name: score(model, judge, (tuned.source, base.source)) for name, model in models.items()}


DETAILS = ("change", "change_low", "change_high", "p", "examples")


def compared(scores: Mapping[str, Scores], **resampling: int) -> dict[str, dict[str, Any]]:
    """Every metric of some models, and how that of the last differs from that of the one before it.

    Returns:
        metric → the value of each model by its name, and, of scores of single examples, change, change_low,
        change_high, p, examples; see `specbasis.interventions.samples.summarise`, which takes ``resampling``.
    """
    before, after = list(scores.values())[-2:]
    summary = summarise(before, after, **resampling)
    return {
        metric: {name: value_of(of_model[metric]) for name, of_model in scores.items()}
        | {key: summary[f"{metric}.{key}"] for key in DETAILS if f"{metric}.{key}" in summary}
        for metric in before
    }


def judge_merged(
    finetunes: Finetunes, mean: Callable[[str], Entry], merged: Callable[[str], Entry], judges: Mapping[str, Judge]
) -> dict[str, Any]:
    """The metric of every finetune's task for single finetunes, their mean and what was made of them.

    Args:
        finetunes: base and finetunes.
        mean: from the name of a shared parameter to its numbers.
        merged: likewise.
        judges: finetune → evaluator of its task; every model is judged with that finetune's head.

    Returns:
        tasks: finetune → metric, values by model, and change, change_low, change_high of merged − mean. normalised:
        model → mean over tasks of its metric by that of the task's own finetune; of losses the inverse.
    """
    single = {label: partial(_of_finetune, finetunes, label) for label in finetunes.tuned}
    ways: dict[str, Callable[[str], Entry]] = {**single, MEAN: mean, MERGED: merged}
    tasks: dict[str, dict[str, Any]] = {}
    shares: dict[str, list[float]] = {way: [] for way in ways}
    for head, judge in judges.items():
        sources = (finetunes.tuned[head].source, finetunes.base.source)
        scores = {way: score(finetunes.model(entry, head), judge, sources) for way, entry in ways.items()}
        own = scores[head][judge.metric]
        values = {way: value_of(own_scores[judge.metric]) for way, own_scores in scores.items()}
        is_loss = isinstance(own, Sample) and not own.higher_is_better
        for way, value in values.items():
            pair = (value_of(own), value) if is_loss else (value, value_of(own))
            shares[way].append(pair[0] / pair[1] if pair[1] else nan)
        known = compared({way: scores[way] for way in (MEAN, MERGED)})[judge.metric]
        tasks[head] = {"metric": judge.metric, "values": values, **{key: known.get(key) for key in DETAILS}}
    return {"tasks": tasks, "normalised": {way: sum(values) / len(values) for way, values in shares.items()}}


def _of_finetune(finetunes: Finetunes, label: str, name: str) -> Entry:
    return finetunes.tuned[label].entries[finetunes.name(name, label)]


def score(model: Checkpoint, judge: Judge, tokenizers: Iterable[str]) -> Scores:
    """A model's metrics; it is written to a folder for as long as it is judged."""
    with tempfile.TemporaryDirectory(prefix="specbasis-") as folder:
        place = write_model(model, Path(folder, "model"))
        add_tokenizer(place, *tokenizers)
        try:
            return as_samples(judge(judge.load(str(place))))
        except NonFiniteError as error:
            raise NonFiniteError(f"{model.source}: {error}") from error
        except InputError as error:  # the folder is gone when this is read
            raise InputError(str(error).replace(str(place), model.source)) from error


def refuse_chance(base: Sample | float, judge: Judge) -> None:
    """Refuse to ask what was forgotten where the base knows nothing, as far as the metric has a chance level.

    Raises:
        InputError: chance is worse by no more than the base's interval allows.
    """
    if not isinstance(base, Sample) or base.chance is None or not decides(len(base.values)):
        return
    metric = judge.metric
    known = summarise({metric: base}, {metric: base})
    low, high = known[f"{metric}.low"], known[f"{metric}.high"]
    if (low <= base.chance) if base.higher_is_better else (high >= base.chance):
        settings = vars(judge) if hasattr(judge, "__dict__") else {}
        place = str(settings.get("source") or settings.get("path") or "the task")
        more = ", or more examples (--limit)" if settings.get("limit") else ""
        raise InputError(
            f"{place}: the base's {metric} on {number_of(len(base.values), 'example')} of it, {base.value:.2f} "
            f"[{low:.2f}, {high:.2f}], is no better than chance ({base.chance:.2f}): there is nothing in them to "
            f"forget; want a task, or texts such as whole paragraphs, that the base knows{more}"
        )


def decides(examples: int) -> bool:
    """Whether a paired test of so many examples can reach `LEVEL`: of 2ⁿ exchanges two are as far out, whatever the
    scores are.
    """
    return 2.0 ** (1 - examples) <= LEVEL


def value_of(score: Sample | float) -> float:
    """The metric itself."""
    return score.value if isinstance(score, Sample) else score
