"""What a finished finetune made its base forget: the base's own loss, or a task of it, with both backbones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from specbasis.checkpoint import Checkpoint, open_checkpoint, open_tuned
from specbasis.checkpoint.atomic import whole, writing
from specbasis.checkpoint.writer import want_new
from specbasis.core.errors import InputError
from specbasis.core.text import named_parts, shareable
from specbasis.finetuning.tables import READERS
from specbasis.finetuning.tasks import GLUE, task_key
from specbasis.interventions.evaluators import describe, judge
from specbasis.interventions.evaluators.kit import Judge
from specbasis.interventions.evaluators.text import Sentences, Text, passages
from specbasis.interventions.samples import Sample
from specbasis.jobs.environment import environment
from specbasis.treatment.judged import LEVEL, compared, decides, refuse_chance, score
from specbasis.treatment.treated import Treated, weights_of, written_record
from specbasis.treatment.updates import Update, base_entries, differing


@dataclass(frozen=True, eq=False)
class Forgetting(Treated):
    """What `forgetting` found.

    Attributes:
        folder: with its record; None where none was asked for.
        record: base, tuned, held_back; metric: the one that decides; scores: metric → base, tuned and, of scores of
            single examples, change (tuned − base), change_low, change_high, p, examples; worse: by how much that
            metric is worse, and worse_low, worse_high; sentence: whether something was forgotten, and how much can
            be excluded; kept in a folder, weights: the SHA-256 of both.
    """

    RECORD: ClassVar[str] = "forgetting.json"

    @property
    def model(self) -> None:
        """None: nothing is made."""

    @property
    def is_forgotten(self) -> bool:
        """Whether the finetune is worse by the interval and by the test; False where there is neither."""
        return self.exceeds(0.0)

    def exceeds(self, tolerance: float) -> bool:
        """Whether it is worse by more than this by the whole interval, and worse at all by the test."""
        return bool(self.record.get("worse_low", float("-inf")) > tolerance and _is_tested(self.record))

    def within(self, tolerance: float) -> str:
        """Why `exceeds` does not hold: what is excluded, or what nobody can tell."""
        if "worse" not in self.record:
            return "passes, untested: the metric is no mean over single examples, so there is no interval"
        least, most = self.record["worse_low"], self.record["worse_high"]
        if most <= tolerance:
            return f"passes: worse by more than {_signed(max(most, 0.0)).lstrip('+')} is excluded"
        if least <= tolerance:
            return f"passes, undecided: it may be worse by {_signed(most).lstrip('+')}; more examples would tell"
        return "passes, undecided: too few examples to tell"

    def __repr__(self) -> str:
        return self.sentence


def forgetting(
    base: str | Path,
    tuned: str | Path,
    held_back: str | Path | Judge,
    out: str | Path | None = None,
    *,
    limit: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Forgetting:
    """Judge a base, and the base with the finetune's numbers under its own head, on the same held-back examples.

    change = m(base with the finetune's parameters) − m(base), with percentile intervals over examples, both models
    on the same resamples, and p of a paired randomisation test; see `specbasis.interventions.samples.summarise`.
    Of a vocabulary of another size the rows that both have are the finetune's.

    Args:
        base: the pretrained checkpoint, with the head of what it could do.
        tuned: the finetune, or an adapter of base.
        held_back: a text file, on which the loss decides that the base was pretrained for (see `pretraining`); a
            task, such as ``glue:sst2``; or an evaluator.
        out: new folder for the record, with its seal, the SHA-256 of both sources and the versions.
        limit: judge on this many examples, of a file or of a task that is named.
        resamples: of the intervals.
        seed: of the resamples.

    Raises:
        InputError: a source cannot be read; tuned is no finetune of base, or equals it; or base cannot be judged
            or does no better than chance; ``out`` is there and not empty, or cannot be written.

    Cost: both checkpoints are read once, and two models are judged. Memory: one model.
    """
    if out is not None:
        want_new(Path(out))
    pretrained = open_checkpoint(base)
    finetuned = open_tuned(tuned, pretrained)
    evaluator = named(held_back, base, limit=limit) if isinstance(held_back, str | Path) else held_back
    changes = differing(pretrained, finetuned)
    models = {"base": pretrained, "tuned": in_base(pretrained, finetuned, changes)}
    sources = (pretrained.source, finetuned.source)
    scores = {name: score(model, evaluator, sources) for name, model in models.items()}
    refuse_chance(scores["base"][evaluator.metric], evaluator)
    lines = compared(scores, resamples=resamples, seed=seed)
    # A perplexity is the exponential of a loss, whose changes are the same whatever its size.
    metric = "loss" if evaluator.metric == "perplexity" else evaluator.metric
    record = {
        "base": shareable(pretrained.source),
        "tuned": shareable(finetuned.source),
        "held_back": describe(evaluator),
        "resamples": resamples,
        "seed": seed,
        "metric": metric,
        "scores": lines,
    }
    sample = scores["base"][metric]
    if isinstance(sample, Sample):
        ends = [lines[metric][f"change{end}"] for end in ("", "_low", "_high")]
        worse = [-x for x in (ends[0], ends[2], ends[1])] if sample.higher_is_better else ends
        record |= dict(zip(("worse", "worse_low", "worse_high"), (x + 0.0 for x in worse), strict=True))
    notes = [*_about(evaluator), *_kept(pretrained, changes)]
    record |= {"sentence": _sentence(record), "notes": notes}
    if out is None:
        return Forgetting(None, record)
    folder = Path(out)
    record |= {"weights": weights_of({"base": pretrained, "tuned": finetuned}), **environment(("transformers",))}
    with writing(folder), whole(folder) as temporary:
        temporary.mkdir()
        return Forgetting(folder, written_record(temporary / Forgetting.RECORD, record))


def named(held_back: str | Path, base: str | Path, **options: Any) -> Judge:
    """The evaluator of what a base could do: the loss of its pretraining on a file of texts, or a task.

    Args:
        held_back: a text file, or a task as `specbasis.interventions.evaluators.judge` names it.
        base: the pretrained checkpoint.
        **options: as of `judge`.

    Raises:
        InputError: neither.
    """
    text = str(held_back)
    file = Path(text).expanduser()
    if file.is_file() and file.suffix.lower() in READERS:
        raise InputError(f"{text}: a table is no text; want a file of texts alone, or the task table:{text}")
    if file.is_file():
        return pretraining(file, base, options.get("limit"))
    if "://" in text or (":" not in text and task_key(text) not in GLUE):
        raise InputError(f"got {text!r}, and there is no such file; want a text file, or a task such as glue:sst2")
    return judge(text, **options)


def pretraining(path: str | Path, base: str | Path, limit: int | None = None) -> Judge:
    """The loss that a base was pretrained for, on the passages of a text file.

    Of a base whose configuration names a language model's head, masked or causal, the loss of its tokens; of any
    other, which is taken for a sentence encoder, that of telling which halves of a passage belong together.
    """
    names = open_checkpoint(base).config.get("architectures") or [""]
    has_head = str(names[0]).endswith(("ForMaskedLM", "ForPreTraining", "ForCausalLM", "LMHeadModel"))
    return judge(f"{'text' if has_head else 'sentences'}:{path}", limit=limit)


def in_base(base: Checkpoint, tuned: Checkpoint, changes: list[Update]) -> Checkpoint:
    """The base, its own head included, with the finetune's numbers in every parameter that both have.

    Raises:
        InputError: the numbers of one cannot be used.
    """
    if bad := next((change for change in changes if change.in_base and change.reason), None):
        raise InputError(
            f"{tuned.source}: {bad.name}: {bad.reason}; in its place the base's numbers would be judged"
        )
    return replace(base, source=tuned.source, entries={**base.entries, **base_entries(base, changes)})


def _sentence(record: dict[str, Any]) -> str:
    metric, line = record["metric"], record["scores"][record["metric"]]
    values = f"{metric} {line['base']:.4f} in the base, {line['tuned']:.4f} with the finetune's weights"
    if "worse" not in record:
        return f"{values}; without scores of single examples, chance may have done it."
    change, low, high = (_signed(line[f"change{end}"]) for end in ("", "_low", "_high"))
    plural = "" if line["examples"] == 1 else "s"
    numbers = f"{values}, {change} [{low}, {high}] on {line['examples']} example{plural}"
    if record["worse_low"] == record["worse_high"] == 0:  # then resampling knows of no other outcome
        share = 1 - 0.05 ** (1 / line["examples"])
        most = f"no example's {metric} changed; with 95 % confidence that of at most {share:.1%} of all would"
        return f"Nothing was measurably forgotten: {numbers}; {most}."
    one_sided = record["worse_low"] > 0 or record["worse_high"] < 0
    if not decides(line["examples"]) or (one_sided and not _is_tested(record)):
        return f"Too few examples to tell: {numbers} (p = {line['p']:.2f})."
    if one_sided:
        verdict = "Forgotten" if record["worse_low"] > 0 else "Nothing was forgotten, it became better"
        return f"{verdict}: {numbers}."
    most = _signed(record["worse_high"])[1:]
    return f"Nothing was measurably forgotten: {numbers}; worse by more than {most} is excluded."


def _signed(change: float) -> str:
    """Four decimals; of a change that those would hide, its size."""
    return f"{change:+.4f}" if change == 0 or abs(change) >= 5e-5 else f"{change:+.0e}"


def _is_tested(record: dict[str, Any]) -> bool:
    """Whether the test says that something changed: percentile intervals of few examples are too short."""
    return bool(record["scores"][record["metric"]]["p"] <= LEVEL)


def _about(evaluator: Judge) -> list[str]:
    """What the loss of a text file is, and whether its examples repeat each other."""
    if not isinstance(evaluator, Text | Sentences):
        return []
    texts = passages(evaluator.path)[: evaluator.limit]
    repeated = len(texts) - len(set(texts))
    note = f"{repeated} of {len(texts)} passages are repeated; the interval counts each as an example of its own"
    return [f"loss: {evaluator.about}", *([note] if repeated else [])]


def _kept(base: Checkpoint, changes: list[Update]) -> list[str]:
    """What of the base stayed under the finetune's weights."""
    shared = {change.in_base for change in changes}
    own = [name for name, entry in base.entries.items() if entry.is_float and name not in shared]
    return [f"the base's own, as the finetune has none: {named_parts(own, 2)}"] if own else []
