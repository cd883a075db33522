"""The paper's experiments: `reproduce`, one verb a figure or table, `pretrain`, and in its own file `zoo`.

Nothing else imports the room of the paper. The verbs of `reproduce` are made when the first of them is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from specbasis.cli.common import STDERR, STDOUT, exit_on_failures, line, note, progress, progress_by_run
from specbasis.cli.flags import COLUMN, NO_RUN, OUT, SCORES, flags
from specbasis.cli.population import modalities
from specbasis.cli.reproduce.contents import add_verbs
from specbasis.core.errors import InputError
from specbasis.core.extras import require
from specbasis.core.grammar import words
from specbasis.paper.options import (
    AblationOptions,
    AnatomyOptions,
    FormationOptions,
    OneTaskOptions,
    PanelOptions,
    PretrainOptions,
    ScoreboardOptions,
    TableOptions,
    Training,
)

if TYPE_CHECKING:
    from specbasis.jobs.experiments import Row
    from specbasis.paper.formation_grid import Formation


class _Verbs(TyperGroup):
    """The verbs of `reproduce`, which come with the room of the paper."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self._filled())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._filled().get(cmd_name)

    def _filled(self) -> MutableMapping[str, Any]:
        if not self.commands:
            from specbasis.paper.contents import entries
            from specbasis.paper.figures import RECIPES

            app = typer.Typer()
            for recipe in RECIPES.values():
                about = f"{recipe.source}: {recipe.title}, from the rows of comparisons."
                app.command(recipe.name, help=about)(_of(_from_rows, recipe.name))
            verbs: dict[str, Callable[..., None]] = {
                "interventions": _from_grid,
                "grid": _table,
                "panel": _panel,
                "formation": _formation,
                "basis": _basis,
                "anatomy": _anatomy,
                "one-task": _one_task,
                "scoreboard": _scoreboard,
            }
            for entry in entries():
                if entry.family:
                    app.command(entry.name, help=entry.help)(_of(verbs[entry.family], entry.name))
                elif entry.name in verbs:
                    app.command(entry.name, help=entry.help)(flags(verbs[entry.name]))
            add_verbs(app)
            group: Any = typer.main.get_group(app)
            self.commands.update(group.commands)
        return self.commands


reproduce_app = typer.Typer(cls=_Verbs, help="The paper's experiments, figures and tables.", no_args_is_help=True)


def _of(verb: Callable[..., None], figure: str) -> Callable[..., None]:
    """The verb of one figure: those of a family differ in its name alone."""
    with_flags = flags(verb)
    signature = with_flags.__signature__  # type: ignore[attr-defined]

    def run(**given: Any) -> None:
        with_flags(figure=figure, **given)

    parameters = [parameter for name, parameter in signature.parameters.items() if name != "figure"]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _written(paths: Sequence[Path]) -> None:
    for path in paths:
        line(f"written: {path}")


# --- from rows ----------------------------------------------------------------------------------------------------


def _from_rows(
    figure: str,
    results: Annotated[
        list[str],
        typer.Argument(
            metavar="RESULTS...",
            help="folders that compare wrote, or finetunes to compare with --base first; MODALITY=…",
        ),
    ],
    out: OUT,
    base: Annotated[str, typer.Option(help="compare this pretrained checkpoint with RESULTS first")] = "",
    scores: SCORES = None,
    column: COLUMN = "",
    independent: Annotated[
        bool, typer.Option("--independent", help="draw pairs whose verdict is independent too")
    ] = False,
) -> None:
    from specbasis.comparison.compare import compare
    from specbasis.comparison.correlations import read_scores
    from specbasis.paper.figures import reproduce

    paths, modality = modalities(results)
    sources: Sequence[Any] = paths
    if base:
        with progress() as tell:
            comparison = compare(base, paths, out / "comparison", nulls=True, progress=tell)
        names = dict(zip(comparison.manifest["pairs"], paths, strict=True))
        modality = {label: modality[path] for label, path in names.items() if path in modality}
        sources = [comparison]
    known = read_scores(scores, column)[0] if scores else None
    drawn = reproduce(figure, sources, out, modality=modality, scores=known, independent=independent)
    for text in drawn.notes:
        note(text, console=STDERR)
    for file in drawn.files:
        line(str(file))


def _from_grid(
    figure: str,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that intervene wrote")],
    only: Annotated[str, typer.Option(help="only these models, e.g. sst2,cola")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="folder to write; default: DIR/figures")] = None,
) -> None:
    from specbasis.figures.interventions import write_figures

    _written(write_figures(folder, (figure,), only=words(only), out=out))


# --- finetuning ---------------------------------------------------------------------------------------------------


def _scoreboard(out: OUT, options: ScoreboardOptions, no_run: NO_RUN = False) -> None:
    from specbasis.paper.scoreboard import write

    _methods("scoreboard", out, options, no_run, write)


def _table(figure: str, out: OUT, options: TableOptions, no_run: NO_RUN = False) -> None:
    from specbasis.paper.table1_page import write

    _methods(figure, out, options, no_run, write)


def _methods(figure: str, out: Path, options: TableOptions, no_run: bool, write: Callable[..., list[Path]]) -> None:
    """Run the methods of a grid on its tasks, unless their rows alone are wanted, and write its page."""
    from specbasis.paper import table1
    from specbasis.paper.grid import base_name, kept_model, run_grid

    plan = table1.comparison(figure, options)
    kept = _kept(options.keep, plan.methods)
    with progress_by_run() as tell:
        run = partial(run_grid, options=options, out=out, keep=options.keep, no_run=no_run, progress=tell)
        rows = table1.rows_of(plan, run)
    paths = write(plan, rows, base_name(options.base), out)
    line(paths[0].read_text(encoding="utf-8"))
    _written(paths)
    for method, name in [(method, name) for method in kept for name in plan.tasks]:
        folder = kept_model(out, method, name)
        missing = f"not kept: {method} on {name}, whose row is older than --keep, or missing"
        line(f"kept: {folder}" if (folder / "method.json").is_file() else missing)
    exit_on_failures(rows)


def _kept(asked: Sequence[str], methods: Sequence[str]) -> list[str]:
    """The methods of a grid, at each of their ranks, whose models are asked for."""
    absent = [name for name in asked if name not in {method.partition("@")[0] for method in methods}]
    if absent:
        raise InputError(f"--keep got {absent[0]!r}; want some of this grid's methods: {', '.join(methods)}")
    return [method for method in methods if method.partition("@")[0] in asked]


def _panel(figure: str, out: OUT, options: PanelOptions, no_run: NO_RUN = False) -> None:
    from specbasis.finetuning.base import shape_of
    from specbasis.finetuning.options import require_libraries
    from specbasis.paper import fig5
    from specbasis.paper.grid import run_grid

    require_libraries()
    ranks, blocks = shape_of(options.base)
    panel = fig5.panel(figure, ranks=ranks, blocks=blocks, options=options)
    with progress_by_run() as tell:
        rows = run_grid(panel.cells(), options, out, no_run=no_run, progress=tell)
    paths = fig5.write(panel, rows, out)
    line(paths[0].read_text(encoding="utf-8"))
    _written(paths)
    exit_on_failures(rows)


def _basis(out: OUT, options: AblationOptions, no_run: NO_RUN = False) -> None:
    from specbasis.paper import ablation, ablation_page

    _beyond(out, no_run, lambda tell: ablation.run(options, out, tell), ablation_page.write)


def _anatomy(out: OUT, options: AnatomyOptions, no_run: NO_RUN = False) -> None:
    from specbasis.paper import anatomy, anatomy_page

    _beyond(out, no_run, lambda tell: anatomy.run(options, out, tell), anatomy_page.write)


def _one_task(out: OUT, options: OneTaskOptions, no_run: NO_RUN = False) -> None:
    from specbasis.paper import one_task

    _beyond(out, no_run, lambda tell: one_task.run(options, out, tell), one_task.write)


def _beyond(out: Path, no_run: bool, run: Callable[[Any], list[Row]], write: Callable[..., list[Path]]) -> None:
    """Run an experiment that the paper lacks, unless its rows alone are wanted, and write its page."""
    from specbasis.jobs.experiments import GRID, read_experiments

    if no_run:
        rows = read_experiments(out)
    else:
        with progress_by_run() as tell:
            rows = run(tell)
    paths = write(rows, GRID.read(out)["config"]["base"], out)
    line(paths[0].read_text(encoding="utf-8"))
    _written(paths)
    exit_on_failures(rows)


# --- how a basis forms --------------------------------------------------------------------------------------------


def pretrain(out: OUT, options: PretrainOptions) -> None:
    """Train the paper's masked autoencoder, or a classifier on its encoder; the same command continues it."""
    require("transformers", extra="pretrain", purpose="pretraining needs")
    from specbasis.paper.images import open_images
    from specbasis.paper.training import train

    opened = open_images(options.data)
    for reason in opened.train.notes + opened.test.notes:
        line(f"passed over: {reason}", console=STDERR)
    images = opened.train.sample(len(opened.train) if options.images is None else options.images, options.seed)
    if options.shuffle_labels:
        images = images.shuffled_labels(options.seed)
    with progress() as tell:
        run = train(
            images,
            opened.test.last(options.validation),
            out,
            training=options.part(Training),
            start=options.start,
            classes=opened.train.classes or None,
            device=options.device,
            progress=tell,
        )
    last = run.log[-1]
    accuracy = f", accuracy {last['accuracy']:.3f}" if "accuracy" in last else ""
    losses = f"loss {last['loss']:.4f}, validation {last['validation']:.4f}{accuracy}"
    line(f"{last['step']} steps on {len(images)} images: {losses}")
    line(f"best checkpoint: {run.best}")
    line(f"follow the run:  specbasis track {out} --out {out}-track")


def _formation(figure: str, out: OUT, options: FormationOptions, no_run: NO_RUN = False) -> None:
    require("matplotlib", "transformers", extra="pretrain", purpose="this experiment needs")
    from specbasis.jobs.experiments import read_experiments
    from specbasis.paper.formation import experiments_of, write_outcome
    from specbasis.paper.formation_claims import table
    from specbasis.paper.formation_grid import run_formation

    plan = _plan(options)
    if not no_run:
        with progress() as tell:
            rows = run_formation(plan, out, experiments=experiments_of(figure, plan), progress=tell)
        for row in rows:
            if row.error is not None:
                line(f"failed: {' '.join(map(str, row.experiment.values()))}: {row.error}", style="yellow")
    paths, claims = write_outcome(figure, read_experiments(out), out)
    STDOUT.print(table(claims).terminal())
    _written(paths)


def _plan(options: FormationOptions) -> Formation:
    from specbasis.paper.formation import SMALL, paper

    plan = SMALL if options.size == "small" else paper()
    sizes = tuple((images, options.steps or 0) for images in options.images)
    return replace(
        plan,
        data=options.data,
        second=options.second,
        seeds=options.seeds,
        passes=(sizes,) if sizes else plan.passes,
        validation=options.validation or plan.validation,
        same_task_images=options.post_images or plan.same_task_images,
        new_task_images=options.post_images or plan.new_task_images,
    )
