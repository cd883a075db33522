"""Grids of interventions: every edit is applied to a finetuned model, judged, and taken back; one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from specbasis.core.edits import Edit
from specbasis.core.errors import InputError
from specbasis.core.options import takes
from specbasis.interventions.options import GridOptions
from specbasis.interventions.stage import BASE, BASELINE, STAGES, Setting, Subject, admitted, run_experiment
from specbasis.interventions.whole import whole_models
from specbasis.jobs.cache import factors_in
from specbasis.jobs.environment import WHERE_USED
from specbasis.jobs.experiments import GRID, Row, read_experiments, run_experiments
from specbasis.jobs.progress import Report, silent

CONTROLS = ("random", "zero")
"""Kinds that are in every grid."""


@takes(GridOptions)
def intervene(
    base: str,
    subjects: Mapping[str, Subject],
    out: str | Path,
    options: GridOptions | None = None,
    *,
    progress: Report | None = None,
    **keywords: Any,
) -> list[Row]:
    """Judge finetuned models while parts of their singular vectors are replaced, one edit after the other.

    For every subject: the model as it is, and each kind of edit at each set of ranks in each group of matrices,
    with every source and seed. Plain random vectors and zero are always among the kinds: without them a small
    change means nothing. Every row has the metrics, their change against the unedited model with intervals over
    examples and a paired test, and ``size``, ‖ΔW‖_F / ‖W‖_F over the edited matrices.

    An experiment whose evaluator raises, or returns NaN, is marked with its error, and the grid goes on; the same
    call tries it again and skips what is done. One live model and the factors of one matrix are in memory at a
    time: factors come from the cache, in which every matrix is decomposed once.

    Args:
        base: the pretrained checkpoint.
        subjects: label → finetuned model and its evaluator. Of one base, they are also sources for each other.
        out: folder of the rows; the same grid continues it.
        options: all options as one value; or each as a keyword.
        progress: called as work goes on.
        **keywords: the fields of `GridOptions`, below.

    Returns:
        The rows in the order of the grid; `specbasis.jobs.experiments.read_experiments` reads them again.

    Raises:
        InputError: a source cannot be read, nothing is to be edited, or an argument is none of the above.

    Source: Yu et al. 2026, §4.1, App. G, App. I; intervals, tests, complement and noise are this project's.
    """
    if not subjects:
        raise InputError("got no subject; want at least one finetuned model with its evaluator")
    chosen = GridOptions.of(options, keywords)
    if BASE in subjects:
        raise InputError(f"{BASE!r} is the name of the pretrained model; give the subject another label")
    kept = factors_in(chosen.cache, chosen.cache_size)
    config = Setting(base, dict(subjects), kept, chosen.resamples).config()
    experiments = grid_experiments(list(subjects), chosen)
    matrices = {(edit["roles"], edit["blocks"]) for edit in experiments if edit["kind"] != BASELINE}
    for subject in subjects.values():  # data that cannot be had stops the grid before anything is decomposed
        getattr(subject.evaluate, "prepare", lambda: None)()
    with whole_models(base, subjects) as whole:
        setting = Setting(base, whole, kept, chosen.resamples)
        setting.decompose_all([admitted(*group) for group in sorted(matrices)], progress or silent)
        try:
            return run_experiments(
                experiments,
                partial(run_experiment, setting),
                out,
                config=config,
                uses=WHERE_USED,
                workers=chosen.workers,
                progress=progress,
            )
        finally:
            STAGES.clear()


def grid_experiments(labels: Sequence[str], options: GridOptions) -> list[dict[str, Any]]:
    """The experiments of a grid, subject by subject, so that each model is loaded once.

    Raises:
        InputError: an unknown kind or source, or ranks that are none.
    """
    known = (BASE, *labels)
    wrong = [source for source in options.sources or () if source not in known]
    if wrong:
        raise InputError(f"no source {wrong[0]!r}; there is: {', '.join(known)}")
    experiments: list[dict[str, Any]] = []
    for label in labels:
        experiments.append({"tuned": label, "kind": BASELINE})
        others = [source for source in options.sources or known if source != label]
        for group, part in ((group, part) for group in options.roles for part in options.blocks):
            admitted(group, part)
            for which in options.ranks:
                for kind in dict.fromkeys((*options.kinds, *CONTROLS)):
                    # Says what is wrong before any work.
                    edit = Edit(kind, which, sides=options.sides, groups=options.groups)
                    if str(which).startswith("-") and kind != "zero":
                        continue
                    for source in (others if kind != "noise" else [BASE]) if edit.needs_other else [""]:
                        for seed in options.draws if edit.is_random else (0,):
                            experiments.append(
                                {"tuned": label, "kind": kind, "source": source, "roles": group, "blocks": part}
                                | {"ranks": which, "sides": options.sides, "groups": options.groups, "seed": seed}
                            )
    return experiments


def read_grid(out: str | Path) -> tuple[list[Row], dict[str, str]]:
    """The rows of a grid of interventions, and the metric of each model that figures show.

    Raises:
        InputError: no such grid there, or no model could be judged unedited.
    """
    rows = read_experiments(out)
    if not any(row.experiment.get("kind") == BASELINE for row in rows):
        raise InputError(f"{out}: holds no grid of interventions; want a folder that `specbasis intervene` wrote")
    about = GRID.read(Path(out))["config"].get("subjects", {})
    metrics = {}
    for row in rows:
        label = row.experiment["tuned"]
        if row.experiment["kind"] == BASELINE and row.error is None:
            metrics[label] = about.get(label, {}).get("metric") or next(iter(row.values))
    if not metrics:
        raise InputError(f"{out}: no model could be judged unedited: {rows[0].error}")
    return rows, metrics
