"""Experiments of finetuning: the unit of a grid is one run, (task, method, seed, learning rate, placement)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specbasis.checkpoint import open_checkpoint, weights_sha256
from specbasis.core.errors import InputError
from specbasis.core.options import rules
from specbasis.finetuning.options import FinetuneOptions, require_libraries
from specbasis.finetuning.sources import load_task
from specbasis.finetuning.tasks import Split, TaskData, subset
from specbasis.jobs.experiments import Row, read_experiments, run_experiments
from specbasis.jobs.folder import WHERE_USED
from specbasis.jobs.progress import Report
from specbasis.paper.options import GlueOptions

SCRATCH = "scratch"
"""As an experiment's method: full finetuning from random weights. As its checkpoint: the model which that left."""


@dataclass(frozen=True)
class Experiment:
    """What tells one run of a grid from the others; None is the default of the method.

    Attributes:
        task: name of a GLUE task.
        method: name in `methods.METHODS`, or `SCRATCH`.
        selection: size of the fixed part of train that is scored, in place of the dev set.
        checkpoint: `SCRATCH`, or the path of the model whose basis is used.

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
        "base": base_name(options.base),
        "base_sha256": _base_sha256(options.base),
        "protocol": _protocol(options),
        "prefix_cached": options.cache_prefix is not None,
    }
    run = functools.partial(run_experiment, options=options, out=Path(out), keep=(SCRATCH, *keep))
    rows = [experiment.row() for experiment in experiments]
    return run_experiments(rows, run, out, config=config, uses=WHERE_USED, progress=progress)


def run_experiment(row: Mapping[str, Any], options: GlueOptions, out: Path, keep: Sequence[str]) -> dict[str, Any]:
    """Run one experiment: the metrics of `train.train`.

    Raises:
        InputError: the experiment wants a basis from scratch, and no such model was trained yet.
    """
    from specbasis.finetuning import runs, train

    experiment = Experiment.of(row)
    task, method, searches = experiment.task, experiment.method, bool(experiment.selection)
    data_dir = None if options.data_dir is None else str(options.data_dir)
    data = _data(task, data_dir, experiment.examples, experiment.selection)
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
    return {"group_by_length": True} if options.group_by_length else {}


@functools.cache
def _base_sha256(base: str) -> str:
    """Read once for all lists of experiments of a command."""
    return weights_sha256(open_checkpoint(base))


_whole = functools.lru_cache(maxsize=8)(load_task)


@functools.lru_cache(maxsize=8)
def _data(task: str, data_dir: str | None, examples: int | None, selection: int | None) -> TaskData:
    data = _whole(task, data_dir=data_dir)
    if examples or selection:
        data = subset(data, examples=examples, selection=selection)
    return replace(data, selection=Split([], []), dev={"selection": data.selection}) if selection else data
