"""Experiments of finetuning: the unit of a grid is one run, (task, method, seed, learning rate, placement)."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specbasis.checkpoint import open_checkpoint, weights_sha256
from specbasis.core.errors import InputError
from specbasis.finetuning.options import Placement, Protocol, require_libraries
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import TaskData, subset
from specbasis.jobs.experiments import Row, read_experiments, run_experiments
from specbasis.jobs.folder import WHERE_USED
from specbasis.jobs.progress import Progress

SCRATCH = "scratch"
"""As an experiment's method: full finetuning from random weights. As its checkpoint: the model which that left."""

BEYOND = 3
"""How many factors a search of learning rates tries beyond those that it was given."""


@dataclass(frozen=True)
class Experiment:
    """What tells one run of a grid from the others; None is the default of the method.

    Attributes:
        task: name of a GLUE task.
        method: name in `methods.METHODS`, or `SCRATCH`.
        seed: of head, order, dropout, and the method's random parts.
        epochs: passes over train.
        learning_rate: at its peak.
        examples: size of the fixed part of train that is trained on; all of it when None.
        selection: size of the fixed part of train that is scored, in place of the dev set.
        rank: the method's size.
        interval: ranks [k, m).
        blocks: blocks that are adapted.
        checkpoint: `SCRATCH`, or the path of the model whose basis is used.
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


@dataclass(frozen=True)
class Setting:
    """What all experiments of a grid share.

    Attributes:
        base: the pretrained model.
        data_dir: GLUE in its official layout; from the Hub when None.
        protocol: fields of `Protocol` beside epochs and learning rate.
        cache_prefix: folder of cached activations.
        models: folder in which the models of `keep` are left, as ``METHOD-TASK``.
        keep: methods whose model of the first seed is kept.
        first_seed: that seed.
    """

    base: str
    data_dir: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    cache_prefix: str | None = None
    models: str | None = None
    keep: Sequence[str] = (SCRATCH,)
    first_seed: int = 42

    @property
    def base_name(self) -> str:
        """See `base_name`."""
        return base_name(self.base)

    @functools.cached_property
    def base_sha256(self) -> str:
        """Of the base's weights, which are read once for all lists of experiments of a command."""
        return weights_sha256(open_checkpoint(self.base))

    def config(self) -> dict[str, Any]:
        """What the manifest of a grid says: all that decides the values."""
        return {
            "base": self.base_name,
            "base_sha256": self.base_sha256,
            "protocol": dict(self.protocol),
            "prefix_cached": self.cache_prefix is not None,
        }


def base_name(base: str) -> str:
    """A base as tables and manifests call it: without this machine's path."""
    local = Path(base)
    return "/".join(local.absolute().parts[-2:]) if local.exists() else base


def run_experiment(row: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Run one experiment: the metrics of `train.train`.

    Raises:
        InputError: the experiment wants a basis from scratch, and no such model was trained yet.
    """
    from specbasis.finetuning import runs, train

    experiment = Experiment.of(row)
    task, method, seed, searches = experiment.task, experiment.method, experiment.seed, bool(experiment.selection)
    data = _data(task, setting.data_dir, experiment.examples, experiment.selection)
    checkpoint = experiment.checkpoint
    if checkpoint == SCRATCH:
        checkpoint = str(kept_model(setting, SCRATCH, task))
        if not Path(checkpoint).is_dir():
            raise InputError(f"no model of {task} from scratch yet; run its experiment of method {SCRATCH} first")
    run = train.Run(
        setting.base,
        data,
        "full" if method == SCRATCH else method,
        seed,
        Protocol(epochs=experiment.epochs, learning_rate=experiment.learning_rate, **setting.protocol),
        Placement(experiment.rank, experiment.interval, experiment.blocks, checkpoint=checkpoint),
        setting.cache_prefix,
        ("", ()) if searches else runs.held_back_texts(None, data, setting.data_dir),
        resumable=False,
        scratch=method == SCRATCH,
    )
    with tempfile.TemporaryDirectory() as temporary:
        kept = method in setting.keep and seed == setting.first_seed and setting.models and not searches
        name = method if experiment.rank is None else f"{method}@{experiment.rank}"
        values = train.train(run, kept_model(setting, name, task) if kept else Path(temporary))
    if searches:  # its score is all that is wanted
        del values["predictions"]
    return values


def run_grid(
    experiments: Iterable[Experiment],
    setting: Setting,
    out: str | Path,
    progress: Callable[[Progress], None] | None = None,
) -> list[Row]:
    """Run the experiments that have no row yet; see `jobs.experiments.run_experiments`."""
    require_libraries()
    run = functools.partial(run_experiment, setting=setting)
    rows = [experiment.row() for experiment in experiments]
    return run_experiments(rows, run, out, config=setting.config(), uses=WHERE_USED, progress=progress)


def stored(experiments: Iterable[Experiment], out: str | Path) -> list[Row]:
    """The rows of these experiments that are in a grid's folder.

    Raises:
        InputError: no grid there.
    """
    wanted = set(experiments)
    return [row for row in read_experiments(out) if Experiment.of(row.experiment) in wanted]


@dataclass(frozen=True)
class Search:
    """How each method's learning rate is chosen: on a part of train, with a seed of its own.

    Every factor times the method's own rate is tried on few examples of the task. While the best is the smallest or
    the greatest that was tried, the next one beyond it is tried too, in the same ratio, `BEYOND` times at most.

    Attributes:
        factors: what the method's own learning rate is multiplied by.
        task: on which it is searched for all tasks; each on its own when None.
        epochs: passes.
        seed: of the search alone.
    """

    factors: tuple[float, ...]
    task: str | None = None
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

    def factor(self, task: str, method: str, rows: Iterable[Row]) -> float | None:
        """The best factor of a method on a task, by the rows of its search; None until all of them are there."""
        rows = list(rows)
        return self._best(task, method, self.tried(task, method, rows), rows)

    def _best(self, task: str, method: str, factors: Sequence[float], rows: Iterable[Row]) -> float | None:
        """The best of some factors; of equal ones the nearest to 1. None where one has no score yet."""
        scores = {Experiment.of(row.experiment): row.values["score"] for row in rows if row.error is None}
        score = {factor: scores.get(self._experiment(task, method, factor)) for factor in factors}
        if None in score.values():
            return None
        return max(factors, key=lambda factor: (score[factor], -abs(math.log(factor))))

    def _experiment(self, task: str, method: str, factor: float) -> Experiment:
        task = self.task or task
        rate = scaled_rate(method, task, factor)
        return Experiment(task, method, self.seed, self.epochs, rate, *search_sizes(task))


SEARCH_SIZES = {"cola": (7000, 1500), "rte": (1660, 830), "wnli": (420, 210)}
"""`search_sizes` of some tasks. CoLA: models call everything acceptable until they have seen several thousand
sentences, and every rate would score 0. RTE and WNLI are small: two thirds and a third."""


def search_sizes(task: str) -> tuple[int, int]:
    """Examples of train that a search trains on, and others that it scores."""
    return SEARCH_SIZES.get(task, (2000, 1000))


def scaled_rate(method: str, task: str, factor: float = 1.0) -> float:
    """A multiple of the learning rate that a method is published with (Tab. 5's for the spectral ones)."""
    from specbasis.finetuning.methods import METHODS

    rate = METHODS["full" if method == SCRATCH else method].recipe(task)[1] * factor
    return float(f"{rate:.6g}")


def by_seed(rows: Iterable[Row], experiments: Iterable[Experiment]) -> dict[int, Mapping[str, Any]]:
    """The values of each seed among some experiments, for those that ran."""
    wanted = set(experiments)
    ran = [row for row in rows if row.error is None and Experiment.of(row.experiment) in wanted]
    return {row.experiment["seed"]: row.values for row in ran}


def kept_model(setting: Setting, method: str, task: str) -> Path:
    """Where the model of a method (NAME or NAME@RANK) on a task is left; its ``method.json`` is written last."""
    if setting.models is None:
        raise InputError("a grid with models that are kept wants a folder for them")
    return Path(setting.models) / f"{method}-{task}"


@functools.lru_cache(maxsize=8)
def _data(task: str, data_dir: str | None, examples: int | None, selection: int | None) -> TaskData:
    whole = _whole(task, data_dir)
    data = subset(whole, examples=examples, selection=selection) if examples or selection else whole
    if not selection:
        return data
    return TaskData(data.task, data.train, {"selection": data.selection}, notes=data.notes)


@functools.lru_cache(maxsize=8)
def _whole(task: str, data_dir: str | None) -> TaskData:
    return load_task(task, data_dir=data_dir)
