"""Experiments of finetuning: the unit of a grid is one run, (task, method, seed, learning rate, placement).

And the search of learning rates: on a part of train, with a seed of its own.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specbasis.checkpoint import open_checkpoint, weights_sha256
from specbasis.core.errors import InputError
from specbasis.core.options import rules
from specbasis.finetuning.methods import METHODS, method_named
from specbasis.finetuning.options import FinetuneOptions, Placement, Protocol, require_libraries
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import Split, TaskData, subset
from specbasis.jobs.environment import WHERE_USED
from specbasis.jobs.experiments import Row, read_experiments, run_experiments
from specbasis.jobs.progress import Report
from specbasis.paper.floors import FLOORS, floor
from specbasis.paper.options import GlueOptions

SCRATCH = "scratch"
"""As an experiment's method: full finetuning from random weights. As its checkpoint: the model which that left."""


@dataclass(frozen=True)
class Experiment:
    """What tells one run of a grid from the others; None is the default of the method.

    Attributes:
        task: name of a GLUE task.
        method: name in `methods.METHODS`, `SCRATCH`, or one of `floors.FLOORS`, which are not trained.
        selection: size of the fixed part of train that is scored, in place of the dev set.
        checkpoint: `SCRATCH`, or the path of the model whose basis is used.
        held_out: size of the fixed part of train that is scored in place of the dev set, and trained on by nothing.

    The other fields are those of `FinetuneOptions`.
    """

    task: str
    method: str
    seed: int
    epochs: float
    learning_rate: float
    examples: int | None = None
    selection: int | None = None
    rank: int | None = None
    interval: tuple[int, int] | None = None
    blocks: tuple[int, ...] | None = None
    checkpoint: str | None = None
    basis: str | None = None
    budget: str | None = None
    held_out: int | None = None

    def row(self) -> dict[str, Any]:
        """As `jobs.experiments` wants it: flat, and without what is not set."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Experiment:
        """The experiment of a row."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        return cls(**fields)


VARIED = ("rank", "basis", "budget")
"""Fields of an experiment that the name of a method in a grid may set."""


def variant(method: str) -> tuple[str, dict[str, Any]]:
    """A method's name and the fields that are set in it: "lora", "lora@8", "spectral@basis=gradient@budget=1k".

    Raises:
        InputError: it is none.
    """
    name, *settings = method.split("@")
    fields: dict[str, Any] = {}
    for setting in settings:
        field, is_set, value = setting.partition("=")
        field, value = (field, value) if is_set else ("rank", setting)
        if field not in VARIED or field in fields or not value or (field == "rank" and not value.isdigit()):
            raise InputError(
                f"got method {method!r}; want NAME or NAME@RANK, and of the spectral ones also NAME@basis=BASIS, "
                "NAME@budget=BUDGET or both"
            )
        fields[field] = int(value) if field == "rank" else value
    return name, fields


def check_method(method: str) -> None:
    """Refuse a method that could not be run, before others are.

    Raises:
        InputError: there is none of the name, or it does not take what is set.
    """
    name, fields = variant(method)
    known = {SCRATCH, *FLOORS}
    if name not in known:
        method_named(name)
    Placement(**fields)  # refuses what no method takes
    if fields.get("rank") == 0 or (fields and name in known):
        raise InputError(f"got method {method!r}; want {name if name in known else f'{name}@1 or more'}")
    if fields.keys() & {"basis", "budget"} and not METHODS[name].takes_budget:
        raise InputError(f"got method {method!r}; {name} takes a rank alone, as a basis and a budget are of cores")


def base_name(base: str) -> str:
    """A base as tables and manifests call it: without this machine's path."""
    local = Path(base)
    return "/".join(local.absolute().parts[-2:]) if local.exists() else base


def kept_model(out: str | Path, method: str, task: str) -> Path:
    """Where a grid in ``out`` leaves the model of a method (NAME or NAME@RANK); its ``method.json`` is last."""
    return Path(out).with_name(f"{Path(out).name}-models") / f"{method}-{task}"


def run_grid(
    experiments: Iterable[Experiment],
    options: GlueOptions,
    out: str | Path,
    *,
    keep: Sequence[str] = (),
    no_run: bool = False,
    progress: Report | None = None,
) -> list[Row]:
    """Run the experiments that have no row yet; see `jobs.experiments.run_experiments`.

    Args:
        experiments: what is to run.
        options: what they share.
        out: folder of the rows.
        keep: methods whose model of the first seed is left where `kept_model` says, beside `SCRATCH`.
        no_run: give the rows that are there.
        progress: called before the first experiment and after each.

    Raises:
        InputError: as `run_experiments`, or no grid there.
    """
    if no_run:
        wanted = set(experiments)
        return [row for row in read_experiments(out) if Experiment.of(row.experiment) in wanted]
    require_libraries()
    config = {
        **about_base(options.base),
        "protocol": _protocol(options),
        "prefix_cached": options.cache_prefix is not None,
    }
    run = functools.partial(run_experiment, options=options, out=Path(out), keep=(SCRATCH, *keep))
    rows = [experiment.row() for experiment in experiments]
    data_dir = None if options.data_dir is None else str(options.data_dir)
    return run_experiments(
        rows,
        run,
        out,
        config=config,
        uses=WHERE_USED,
        progress=progress,
        prepare=lambda row: whole_task(row["task"], data_dir=data_dir),
    )


def run_experiment(row: Mapping[str, Any], options: GlueOptions, out: Path, keep: Sequence[str]) -> dict[str, Any]:
    """Run one experiment: the metrics of `train.train`.

    Raises:
        InputError: the experiment wants a basis from scratch, and no such model was trained yet.
    """
    from specbasis.finetuning import runs, train

    experiment = Experiment.of(row)
    task, method, searches = experiment.task, experiment.method, bool(experiment.selection)
    data_dir = None if options.data_dir is None else str(options.data_dir)
    apart = sum(search_sizes(task)) if getattr(options, "search", ()) else 0
    data = _data(task, data_dir, experiment.examples, experiment.selection, experiment.held_out, apart)
    if method in FLOORS:
        return floor(method, options.base, data, options.head)
    checkpoint = experiment.checkpoint
    if checkpoint == SCRATCH:
        checkpoint = str(kept_model(out, SCRATCH, task))
        if not Path(checkpoint).is_dir():
            raise InputError(f"no model of {task} from scratch yet; run its experiment of method {SCRATCH} first")
    run = train.Run(
        options.base,
        data,
        "full" if method == SCRATCH else method,
        FinetuneOptions(
            **{name: value for name, value in vars(experiment).items() if name in rules(FinetuneOptions)}
            | {"checkpoint": checkpoint, "examples": None, "cache_prefix": options.cache_prefix}
            | _protocol(options)
        ),
        ("", ()) if searches else runs.held_back_texts(None, data, data_dir),
        resumable=False,
        scratch=method == SCRATCH,
    )
    with tempfile.TemporaryDirectory() as temporary:
        kept = method in keep and experiment.seed == options.seeds[0] and not searches
        name = method if experiment.rank is None else f"{method}@{experiment.rank}"
        values = train.train(run, kept_model(out, name, task) if kept else Path(temporary))
    if searches:  # its score is all that is wanted
        del values["predictions"]
    return values


def _protocol(options: GlueOptions) -> dict[str, Any]:
    """The protocol's fields beside epochs and learning rate that differ from their defaults."""
    asked, usual = {"group_by_length": options.group_by_length, "head": options.head}, Protocol()
    return {name: value for name, value in asked.items() if value != getattr(usual, name)}


@functools.cache
def about_base(base: str) -> dict[str, str]:
    """What a manifest says of a base; read once for all lists of experiments of a command."""
    return {"base": base_name(base), "base_sha256": weights_sha256(open_checkpoint(base))}


whole_task = functools.lru_cache(maxsize=8)(load_task)
"""A task of GLUE, read once."""


@functools.lru_cache(maxsize=8)
def _data(
    task: str,
    data_dir: str | None,
    examples: int | None,
    selection: int | None,
    held_out: int | None,
    apart: int = 0,
) -> TaskData:
    """A task, or parts of its train; ``apart``: how many the search of learning rates takes."""
    data = whole_task(task, data_dir=data_dir)
    if held_out:
        order = data.train.by_content()
        used = max(examples or 1, apart)
        if held_out + used > len(order):
            raise InputError(
                f"{data.task.title}: train holds {len(order)} examples; got {held_out} to score on and {used} to "
                "train on or to search learning rates on; want fewer"
            )
        # The last ones: searches take the first.
        scored = {"held-out": data.train.take(sorted(order[-held_out:]))}
        data = replace(data, train=data.train.take(sorted(order[:-held_out])), dev=scored)
    if examples or selection:
        data = subset(data, examples=examples, selection=selection)
    return replace(data, selection=Split([], []), dev={"selection": data.selection}) if selection else data


# --- learning rates -----------------------------------------------------------------------------------------------

BEYOND = 3
"""How many factors a search tries beyond those that it was given."""

SEARCH_SIZES = {"cola": (7000, 1500), "rte": (1660, 830), "wnli": (420, 210)}
"""`search_sizes` of some tasks. CoLA: models call everything acceptable until they have seen several thousand
sentences, and every rate would score 0. RTE and WNLI are small: two thirds and a third."""


def search_sizes(task: str) -> tuple[int, int]:
    """Examples of train that a search trains on, and others that it scores."""
    return SEARCH_SIZES.get(task, (2000, 1000))


def scaled_rate(method: str, task: str, factor: float = 1.0) -> float:
    """A multiple of the learning rate of a method's recipe (spectral: Tab. 5's); 0 of what is not trained."""
    if method in FLOORS:
        return 0.0
    rate = METHODS["full" if method == SCRATCH else method].recipe(task)[1] * factor
    return float(f"{rate:.6g}")


@dataclass(frozen=True)
class Search:
    """How each method's learning rate is chosen.

    Every factor times the method's own rate is tried on few examples of the task. While the best is the smallest or
    the greatest that was tried, the next one beyond it is tried too, in the same ratio, `BEYOND` times at most.

    Attributes:
        factors: what the method's own learning rate is multiplied by.
        task: on which it is searched for all tasks; each on its own when empty.
        epochs: passes.
        seed: of the search alone.
    """

    factors: tuple[float, ...]
    task: str = ""
    epochs: float = 2
    seed: int = 0

    def experiments(self, task: str, method: str, rows: Iterable[Row] = ()) -> list[Experiment]:
        """The runs of a method's search, as far as they are known from the rows that are there."""
        return [self._experiment(task, method, factor) for factor in self.tried(task, method, rows)]

    def tried(self, task: str, method: str, rows: Iterable[Row] = ()) -> list[float]:
        """The factors of these runs, ascending."""
        rows, tried = list(rows), sorted(set(self.factors))
        if len(tried) < 2:
            return tried
        smaller, greater = tried[0] / tried[1], tried[-1] / tried[-2]
        for _ in range(BEYOND):
            best = self._best(task, method, tried, rows)
            if best == tried[0]:
                tried = [best * smaller, *tried]
            elif best == tried[-1]:
                tried = [*tried, best * greater]
            else:
                break
        return tried

    def factor(self, task: str, method: str, rows: Sequence[Row]) -> float | None:
        """The best factor of a method on a task, by the rows of its search; None until all of them are there."""
        return self._best(task, method, self.tried(task, method, rows), rows)

    def _best(self, task: str, method: str, factors: Sequence[float], rows: Sequence[Row]) -> float | None:
        """The best of some factors; of equal ones the nearest to 1. None where one has no score yet."""
        scores = {Experiment.of(row.experiment): row.values["score"] for row in rows if row.error is None}
        score = {factor: scores.get(self._experiment(task, method, factor)) for factor in factors}
        if None in score.values():
            return None
        return max(factors, key=lambda factor: (score[factor], -abs(math.log(factor))))

    def _experiment(self, task: str, method: str, factor: float) -> Experiment:
        task, (name, fields) = self.task or task, variant(method)
        rate = scaled_rate(name, task, factor)
        return Experiment(task, name, self.seed, self.epochs, rate, *search_sizes(task), **fields)
