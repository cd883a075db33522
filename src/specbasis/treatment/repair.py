"""What finetuning made a model forget, brought back: ways towards the base, judged on both sides; one is chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from specbasis.checkpoint import Checkpoint, open_checkpoint, open_tuned, weights_sha256
from specbasis.checkpoint.writer import write_model
from specbasis.core.errors import InputError
from specbasis.core.grammar import parse_bytes
from specbasis.core.options import takes
from specbasis.core.statistics import bootstrap, percentile_interval
from specbasis.core.text import shareable
from specbasis.interventions.evaluators import describe
from specbasis.interventions.evaluators.kit import Judge
from specbasis.interventions.samples import Sample
from specbasis.jobs.cache import Cache
from specbasis.jobs.cost import cache_folder
from specbasis.jobs.environment import WHERE_USED
from specbasis.jobs.experiments import Row, read_experiments, run_experiments
from specbasis.jobs.folder import locked
from specbasis.jobs.progress import Report
from specbasis.treatment.judged import refuse_chance, score
from specbasis.treatment.options import RepairOptions
from specbasis.treatment.points import INTERPOLATION, Ways, grid
from specbasis.treatment.treated import Treated, written_record

MODEL = "model"
"""In the folder of the rows: the repaired model."""

HALVES = ("choice", "report")
"""The examples with even numbers choose the point, those with odd numbers say what it is worth."""


@dataclass(frozen=True, eq=False)
class Repair(Treated):
    """What `repair` found.

    Attributes:
        folder: rows, record, and the repaired model in `model` if there is one.
        record: the chosen point, the best interpolation beside it, and the sentence.
        rows: one for each point; ``keep`` and ``recover`` are the metrics, ``back`` the share of what was forgotten
            that came back, each of both halves of the examples (``choice.…`` and ``report.…``) with its interval.
    """

    RECORD: ClassVar[str] = "repair.json"
    folder: Path
    rows: tuple[Row, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> Repair:
        """See `Treated.load`."""
        return replace(super().load(folder), rows=tuple(read_experiments(folder)))

    @property
    def sentence(self) -> str:
        """What came back, what it cost, and whether interpolation does as well."""
        return str(self.record["sentence"])

    @property
    def model(self) -> Path | None:
        """The repaired model; None where nothing was forgotten, or nothing brings it back at this cost."""
        return self.folder / MODEL if (self.folder / MODEL).exists() else None

    def __repr__(self) -> str:
        return f"Repair in {self.folder}, {len(self.rows)} points: {self.sentence}"


@takes(RepairOptions)
def repair(
    base: str | Path,
    tuned: str | Path,
    keep: Judge,
    recover: Judge,
    out: str | Path,
    options: RepairOptions | None = None,
    *,
    progress: Report | None = None,
    **keywords: Any,
) -> Repair:
    """Bring back what a finetune forgot, at a bounded cost for its task.

    Every way of `specbasis.treatment.points` is judged twice: with the finetune's head on the task that it is to
    keep, and in the base (with the base's own head) on what it is to do again. Of the points that lose no more than
    ``tolerance`` points of the task on one half of the examples, that which brings back the most there is written;
    the other half says what it is worth. The same rule picks the best interpolation (WiSE-FT), the baseline.

    back = (recover(point) − recover(tuned)) / (recover(base) − recover(tuned)), with percentile intervals over
    examples, base, tuned and point on the same resamples.

    Args:
        base: the pretrained checkpoint.
        tuned: the finetune, or a PEFT adapter of base.
        keep: the task's evaluator; scores of single examples.
        recover: an evaluator of what the base could do.
        out: folder of the rows, the record and the model; the same call continues it.
        options: all options as one value; or each as a keyword.
        progress: called as work goes on.
        **keywords: the fields of `RepairOptions`, below.

    Raises:
        InputError: a source cannot be read, or an evaluator gives no scores of single examples.

    Source: Wortsman et al. 2022 (WiSE-FT); Shuttleworth et al. 2024 (arXiv 2410.21228, intruders); arXiv 2508.16546
    (directions put back). Choice and report on different halves are this project's.
    """
    chosen, out = RepairOptions.of(options, keywords), Path(out)
    pretrained = open_checkpoint(base)
    finetuned = open_tuned(tuned, pretrained)
    if keep is recover or (getattr(keep, "__dict__", None) and describe(keep) == describe(recover)):
        raise InputError(
            "got one task to keep and to recover; want what the base could do beside the finetune's task"
        )
    for evaluator in (keep, recover):  # data that cannot be had stops all before anything is decomposed
        getattr(evaluator, "prepare", lambda: None)()
    cache = Cache(Path(chosen.cache or cache_folder() / "factors"), parse_bytes(chosen.cache_size))
    bench = _Bench(Ways.of(pretrained, finetuned, cache), keep, recover, chosen.resamples)
    run = partial(
        run_experiments,
        run=bench.run,
        out=out,
        config={
            "experiment": "repair",
            "base": weights_sha256(pretrained),
            "tuned": weights_sha256(finetuned),
            "keep": describe(keep),
            "recover": describe(recover),
            **chosen.config(),
        },
        uses=WHERE_USED,
        progress=progress,
    )
    with locked(out, beside=True):
        ends: list[dict[str, Any]] = [{"way": "tuned"}, {"way": "base"}]
        rows = run(ends)
        if _anything_forgotten(rows):
            rows = run([*ends, *grid()])
        record = {
            "base": shareable(pretrained.source),
            "tuned": shareable(finetuned.source),
            **conclude(rows, chosen.tolerance / 100),
        }
        point = record["chosen"]
        if point and not (out / MODEL).exists():
            write_model(bench.ways.at(point)[0], out / MODEL)
        record = written_record(out / Repair.RECORD, record)
    return Repair(out, record, tuple(rows))


class _Bench:
    """Judges points; base and finetune once."""

    def __init__(self, ways: Ways, keep: Judge, recover: Judge, resamples: int) -> None:
        self.ways, self.keep, self.recover, self.resamples = ways, keep, recover, resamples
        self._ends: dict[str, tuple[Sample, Sample]] = {}

    def run(self, point: dict[str, Any]) -> dict[str, Any]:
        """The values of one row."""
        keep, recover = self._judged(point)
        values: dict[str, Any] = {}
        for start, half in enumerate(HALVES):
            part = partial(_half, start=start)
            ends = [tuple(map(part, self._end(way))) for way in ("base", "tuned")]
            values |= _values(half, part(keep), part(recover), ends[0], ends[1], self.resamples)
        return values

    def _end(self, way: str) -> tuple[Sample, Sample]:
        if way not in self._ends:
            self._ends[way] = self._judged({"way": way})
        return self._ends[way]

    def _judged(self, point: Mapping[str, Any]) -> tuple[Sample, Sample]:
        """Scores of the task, and of what the base could do."""
        way = point["way"]
        if way in self._ends:
            return self._ends[way]
        as_point = {"base": {"way": INTERPOLATION, "amount": 0.0}, "tuned": {"way": INTERPOLATION, "amount": 1.0}}
        own, in_base = self.ways.at({"blocks": "all", **as_point.get(way, point)})
        sources = (self.ways.tuned.source, self.ways.base.source)
        kept, recovered = self._score(own, self.keep, sources), self._score(in_base, self.recover, sources[::-1])
        if way == "base":
            refuse_chance(recovered, self.recover)
        return _as_score(kept), _as_score(recovered)

    def _score(self, model: Checkpoint, evaluator: Judge, tokenizers: Sequence[str]) -> Sample:
        found = score(model, evaluator, tokenizers)[evaluator.metric]
        if not isinstance(found, Sample):
            raise InputError(f"{evaluator.metric}: the evaluator gives one number; want scores of single examples")
        return found


def _as_score(sample: Sample) -> Sample:
    """The higher, the better: of a loss its negative."""
    if sample.higher_is_better:
        return sample
    statistic = sample.statistic
    return replace(sample, statistic=lambda values: -statistic(values), higher_is_better=True)


def _half(sample: Sample, start: int) -> Sample:
    return replace(sample, values=sample.values[start::2])


def _values(
    half: str,
    keep: Sample,
    recover: Sample,
    base: tuple[Sample, ...],
    tuned: tuple[Sample, ...],
    resamples: int,
) -> dict[str, float]:
    """Metrics of one half of the examples, with the change of the task and the share that came back."""

    def change(drawn: Any) -> Any:
        return keep.statistic(keep.values[drawn]) - tuned[0].statistic(tuned[0].values[drawn])

    def back(drawn: Any) -> Any:
        now, then, before = (s.statistic(s.values[drawn]) for s in (recover, tuned[1], base[1]))
        with np.errstate(divide="ignore", invalid="ignore"):
            return (now - then) / (before - then)

    def forgotten(drawn: Any) -> Any:
        return base[1].statistic(base[1].values[drawn]) - tuned[1].statistic(tuned[1].values[drawn])

    values = {f"{half}.keep": keep.value, f"{half}.recover": recover.value}
    for name, statistic, n in (
        ("change", change, len(keep.values)),
        ("back", back, len(recover.values)),
        ("forgotten", forgotten, len(recover.values)),
    ):
        low, high = percentile_interval(bootstrap(statistic, n, resamples))
        whole = float(statistic(np.arange(n))) + 0.0  # no negative zero
        values |= {f"{half}.{name}": whole, f"{half}.{name}_low": low, f"{half}.{name}_high": high}
    return values


# --- what follows from the rows -----------------------------------------------------------------------------------


def conclude(rows: Sequence[Row], tolerance: float) -> dict[str, Any]:
    """The point that is chosen, the best interpolation, and a sentence; nothing is chosen where nothing was
    forgotten.

    Args:
        rows: of the points, base and tuned among them.
        tolerance: how much of the metric may be lost.
    """
    record: dict[str, Any] = {"tolerance": tolerance, "rule": RULE, "chosen": None, "interpolation": None}
    if not _anything_forgotten(rows):
        lost = _interval(rows[0].values, "report.forgotten", "+.4f")
        return record | {
            "sentence": f"Nothing was measurably forgotten (base − finetune {lost}); nothing is changed."
        }
    points = [row for row in rows if row.experiment["way"] not in ("base", "tuned")]
    allowed = [row for row in points if row.values["choice.change"] >= -tolerance]
    best = _best(allowed)
    plain = _best([row for row in allowed if row.experiment["way"] == INTERPOLATION])
    if best is None:
        return record | {
            "sentence": f"No point keeps the task within {100 * tolerance:g} points; nothing is changed."
        }
    beside = "no interpolation keeps the task so well"
    if plain is best:
        beside = "nothing else that keeps the task brings back more"
    elif plain is not None:
        returned = _interval(plain.values, "report.back", ".0%")
        beside = f"interpolation ({plain.experiment['amount']:g}) brings back {returned}"
    way = f"{best.experiment['way']} {best.experiment['amount']:g}, {best.experiment['blocks']} blocks"
    returned, change = _interval(best.values, "report.back", ".0%"), _interval(best.values, "report.change", "+.4f")
    sentence = f"Chosen: {way}. It brings back {returned} of what was forgotten and changes the task by {change}"
    values = {name: row and {**row.experiment, **row.values} for name, row in (("best", best), ("plain", plain))}
    return record | {
        "chosen": dict(best.experiment),
        "interpolation": plain and dict(plain.experiment),
        "values": values,
        "sentence": f"{sentence}; {beside}.",
    }


def _anything_forgotten(rows: Sequence[Row]) -> bool:
    """Whether base does better than the finetune; every row says so.

    Raises:
        InputError: a point could not be judged.
    """
    for row in rows:
        if row.error is not None:
            # Of an input that is wrong the message says what to do; anything else may pass.
            again = "; the same command tries it again" if re.match(r"\w*(Error|Exception): ", row.error) else ""
            raise InputError(f"{row.experiment['way']}: {row.error}{again}")
    first = rows[0].values
    return bool(first["choice.forgotten_low"] > 0 and first["report.forgotten"] > 0)


RULE = (
    "of the points that lose no more than the tolerance on the examples with even numbers, the one that brings "
    "back the most on them; what is said of it is of the examples with odd numbers"
)


def _best(rows: Sequence[Row]) -> Row | None:
    known = [row for row in rows if row.values["choice.back"] is not None and not isnan(row.values["choice.back"])]
    return max(known, key=lambda row: float(row.values["choice.back"]), default=None)


def _interval(values: Mapping[str, Any], name: str, form: str) -> str:
    value, low, high = (values[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
