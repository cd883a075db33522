"""What finetuning made a model forget, brought back: ways towards the base, judged on both sides; one is chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import isnan
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from specbasis.checkpoint import open_checkpoint, open_tuned
from specbasis.checkpoint.writer import write_model
from specbasis.core.errors import InputError
from specbasis.core.options import takes
from specbasis.core.statistics import bootstrap, percentile_interval
from specbasis.core.text import shareable
from specbasis.interventions.evaluators import describe
from specbasis.interventions.evaluators.kit import Judge
from specbasis.interventions.samples import Sample
from specbasis.jobs.cache import factors_in
from specbasis.jobs.environment import WHERE_USED
from specbasis.jobs.experiments import Row, read_experiments, run_experiments
from specbasis.jobs.folder import locked
from specbasis.jobs.progress import Report
from specbasis.treatment.forgetting import named
from specbasis.treatment.judged import decides, refuse_chance, score
from specbasis.treatment.options import RepairOptions
from specbasis.treatment.points import INTERPOLATION, Ways, grid
from specbasis.treatment.treated import Treated, weights_of, written_record

MODEL = "model"
"""In the folder of the rows: the repaired model."""

HALVES = ("choice", "report")
"""The examples with even numbers choose the point, those with odd numbers say what it is worth."""


@dataclass(frozen=True, eq=False)
class Repair(Treated):
    """What `repair` found.

    Attributes:
        folder: rows, record, and the repaired model in `model` if there is one.
        record: the chosen point, the best interpolation beside it, and ``sentence``: what came back, what it cost,
            and whether interpolation does as well.
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
    def model(self) -> Path | None:
        """The repaired model; None where nothing was forgotten, or nothing brings it back at this cost."""
        return self.folder / MODEL if (self.folder / MODEL).exists() else None

    def __repr__(self) -> str:
        return f"Repair in {self.folder}, {len(self.rows)} points: {self.sentence}"


@takes(RepairOptions)
def repair(
    base: str | Path,
    tuned: str | Path,
    keep: str | Path | Judge,
    recover: str | Path | Judge,
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
        keep: the task, such as ``glue:sst2``, or its evaluator, with scores of single examples.
        recover: what the base could do: a text file, a task, or an evaluator; see `forgetting.named`.
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
    keep, recover = (named(x, base) if isinstance(x, str | Path) else x for x in (keep, recover))
    pretrained = open_checkpoint(base)
    finetuned = open_tuned(tuned, pretrained)
    if keep is recover or (getattr(keep, "__dict__", None) and describe(keep) == describe(recover)):
        raise InputError(
            "got one task to keep and to recover; want what the base could do beside the finetune's task"
        )
    for evaluator in (keep, recover):  # data that cannot be had stops all before anything is decomposed
        getattr(evaluator, "prepare", lambda: None)()
    ways = Ways.of(pretrained, finetuned, factors_in(chosen.cache, chosen.cache_size))
    weights = weights_of({"base": pretrained, "tuned": finetuned})
    bench = _Bench(ways, keep, recover, chosen.resamples)
    run = partial(
        run_experiments,
        run=bench.run,
        out=out,
        config={
            "experiment": "repair",
            **{of["name"]: of["sha256"] for of in weights},
            "keep": describe(keep),
            "recover": describe(recover),
            **chosen.config(),
        },
        uses=WHERE_USED,
        progress=progress,
    )
    with locked(out, beside=True):
        if not out.exists():
            bench.try_ends()
        ends: list[dict[str, Any]] = [{"way": "tuned"}, {"way": "base"}]
        rows = run(ends)
        if _anything_forgotten(rows):
            rows = run([*ends, *grid()])
        record = {
            "base": shareable(pretrained.source),
            "tuned": shareable(finetuned.source),
            "weights": weights,
            **conclude(rows, chosen.tolerance / 100),
        }
        point = record["chosen"]
        if point and not (out / MODEL).exists():
            write_model(bench.ways.at(point)[0], out / MODEL)
        record = written_record(out / Repair.RECORD, record)
    return Repair(out, record, tuple(rows))


ENDS = {"base": 0.0, "tuned": 1.0}
"""The points between which all others lie, as interpolations."""


class _Bench:
    """Judges points; base and finetune once."""

    def __init__(self, ways: Ways, keep: Judge, recover: Judge, resamples: int) -> None:
        self.ways, self.keep, self.recover, self.resamples = ways, keep, recover, resamples
        self.end = cache(self._end)

    def try_ends(self) -> None:
        """Judge base and finetune, so that an input that is wrong leaves no folder; what may pass is left to `run`.

        Raises:
            InputError: one of them cannot be judged.
        """
        try:
            for way in ENDS:
                self.end(way)
        except InputError:
            raise
        except Exception:  # whatever an evaluator raises: the rows keep it
            return

    def run(self, point: dict[str, Any]) -> dict[str, Any]:
        """The values of one row."""
        judged = self.end(point["way"]) if point["way"] in ENDS else self._judged(point)
        values: dict[str, Any] = {}
        for start, half in enumerate(HALVES):
            now, base, tuned = (
                [replace(sample, values=sample.values[start::2]) for sample in both]
                for both in (judged, self.end("base"), self.end("tuned"))
            )
            half_values = _values(now, base, tuned, self.resamples)
            values |= {f"{half}.{name}": value for name, value in half_values.items()}
        return values

    def _end(self, way: str) -> tuple[Sample, Sample]:
        return self._judged({"way": INTERPOLATION, "amount": ENDS[way], "blocks": "all"}, is_base=way == "base")

    def _judged(self, point: Mapping[str, Any], *, is_base: bool = False) -> tuple[Sample, Sample]:
        """Scores of the task, and of what the base could do; the higher the better, of a loss its negative."""
        scores: list[Sample] = []
        sources = [self.ways.tuned.source, self.ways.base.source]
        for model, evaluator in zip(self.ways.at(point), (self.keep, self.recover), strict=True):
            sample = score(model, evaluator, sources)[evaluator.metric]
            if not isinstance(sample, Sample):
                raise InputError(
                    f"{evaluator.metric}: the evaluator gives one number; want scores of single examples"
                )
            if is_base and evaluator is self.recover:
                refuse_chance(sample, evaluator)
            scores.append(sample if sample.higher_is_better else _negative(sample))
            sources.reverse()
        return scores[0], scores[1]


def _negative(loss: Sample) -> Sample:
    statistic = loss.statistic
    return replace(loss, statistic=lambda values: -statistic(values), higher_is_better=True)


def _values(
    point: Sequence[Sample], base: Sequence[Sample], tuned: Sequence[Sample], resamples: int
) -> dict[str, float]:
    """Metrics (keep, recover) of some examples, the change of the task, and the share that came back."""

    def at(sample: Sample, drawn: Any) -> Any:
        return sample.statistic(sample.values[drawn])

    def change(drawn: Any) -> Any:
        return at(point[0], drawn) - at(tuned[0], drawn)

    def forgotten(drawn: Any) -> Any:
        return at(base[1], drawn) - at(tuned[1], drawn)

    def back(drawn: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (at(point[1], drawn) - at(tuned[1], drawn)) / forgotten(drawn)

    values = {"keep": point[0].value, "recover": point[1].value, "examples": min(len(s.values) for s in point)}
    for statistic, sample in ((change, point[0]), (back, point[1]), (forgotten, point[1])):
        low, high = percentile_interval(bootstrap(statistic, len(sample.values), resamples))
        whole = float(statistic(np.arange(len(sample.values)))) + 0.0  # no negative zero
        name = statistic.__name__
        values |= {name: whole, f"{name}_low": low, f"{name}_high": high}
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
    beside = "no interpolation keeps the task so well on the examples that choose"
    if plain is best:
        beside = "on the examples that choose, nothing else that keeps the task brings back more"
    elif plain is not None:
        returned = _interval(plain.values, "report.back", ".0%")
        amount = f"{plain.experiment['amount']:g}"
        beside = f"the interpolation that the same rule chooses ({amount}) brings back {returned}"
    way = f"{best.experiment['way']} {best.experiment['amount']:g}, {best.experiment['blocks']} blocks"
    returned, change = _interval(best.values, "report.back", ".0%"), _interval(best.values, "report.change", "+.4f")
    sentence = (
        f"Chosen: {way}. On the other examples it brings back {returned} of what was forgotten and changes the "
        f"task by {change}"
    )
    few = best.values.get("report.examples")  # rows of earlier versions lack it
    if few is not None and not decides(few):
        sentence = f"Too few examples to tell ({few} that report; want at least 12 in all). {sentence}"
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
