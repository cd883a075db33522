"""`pretrain`, `track`, and the experiments on how a basis forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from specbasis.cli.common import OUT, STDERR, STDOUT, STREAM, line, numbers, progress, words
from specbasis.cli.reproduce import reproduce_app
from specbasis.core.errors import InputError

if TYPE_CHECKING:
    from specbasis.paper.formation_claims import Claim
    from specbasis.paper.formation_grid import Formation

DATA = Annotated[
    str,
    typer.Option("--data", help="fashion-mnist, mnist-5k, a folder (CIFAR-10, idx files, images), or an .npz file"),
]
DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda, …; default: a GPU where there is one")]


def pretrain(
    out: OUT,
    data: DATA = "fashion-mnist",
    images: Annotated[
        int | None, typer.Option(help="learn from so many of them, drawn by the seed; default: all")
    ] = None,
    task: Annotated[str, typer.Option(help="reconstruct (hidden patches) or classify")] = "reconstruct",
    epochs: Annotated[int, typer.Option(help="passes over the images")] = 200,
    steps: Annotated[int | None, typer.Option(help="optimizer steps, in place of epochs")] = None,
    batch: Annotated[int, typer.Option(help="images a step")] = 64,
    rate: Annotated[float, typer.Option(help="learning rate at the start of the cosine")] = 1.5e-3,
    start: Annotated[Path | None, typer.Option(help="checkpoint to start from; default: random weights")] = None,
    shuffle_labels: Annotated[
        bool, typer.Option("--shuffle-labels", help="learn from labels in random order")
    ] = False,
    validation: Annotated[
        int, typer.Option(help="so many of the last test images choose the best checkpoint")
    ] = 5000,
    checkpoints: Annotated[int, typer.Option(help="how many are kept, evenly spaced")] = 50,
    validations: Annotated[int, typer.Option(help="how often the validation loss is taken")] = 200,
    seed: Annotated[int, typer.Option(help="of images, weights, order and masks")] = 0,
    device: DEVICE = None,
) -> None:
    """Train the paper's masked autoencoder, or a classifier on its encoder; the same command continues it."""
    from specbasis.paper.images import open_images
    from specbasis.paper.training import Training, train

    opened = open_images(data)
    for note in opened.train.notes + opened.test.notes:
        line(f"passed over: {note}", console=STDERR)
    chosen = opened.train.sample(len(opened.train) if images is None else images, seed)
    if shuffle_labels:
        chosen = chosen.shuffled_labels(seed)
    training = Training(
        task=task,
        epochs=epochs,
        steps=steps,
        batch=batch,
        rate=rate,
        checkpoints=checkpoints,
        validations=validations,
        seed=seed,
    )
    with progress() as tell:
        run = train(
            chosen,
            opened.test.last(validation),
            out,
            training=training,
            start=start,
            classes=opened.train.classes or None,
            device=device,
            progress=tell,
        )
    last = run.log[-1]
    accuracy = f", accuracy {last['accuracy']:.3f}" if "accuracy" in last else ""
    losses = f"loss {last['loss']:.4f}, validation {last['validation']:.4f}{accuracy}"
    line(f"{last['step']} steps on {len(chosen)} images: {losses}")
    line(f"best checkpoint: {run.best}")
    line(f"follow the run:  specbasis track {out} --out {out}-track")


def track(
    run: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="folder with numbered checkpoints, 'hub:org/name@step*', or several sources"
        ),
    ],
    out: OUT,
    ranks: Annotated[int, typer.Option(help="leading ranks that are followed")] = 32,
    top: Annotated[int, typer.Option(help="leading ranks over which heat map and curves go")] = 10,
    roles: Annotated[str, typer.Option(help="only these roles, e.g. ffn,attention.query")] = "",
    blocks: Annotated[str, typer.Option(help="only these blocks, e.g. 0,10-11")] = "",
    name: Annotated[str, typer.Option(help="only matrices whose name matches this pattern (* and ?)")] = "",
    stream: STREAM = False,
    approximate: Annotated[
        bool, typer.Option(help="iterate where the short side is over 8192 and ranks few")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="matrices at the same time; default: one for each core")
    ] = None,
) -> None:
    """Alignment of every checkpoint of a training to the first, the last and the one before, with a figure."""
    from specbasis.figures.tracking import write_track_figure
    from specbasis.tracking.track import track as follow

    with progress() as tell:
        found = follow(
            run[0] if len(run) == 1 else run,
            out,
            ranks=ranks,
            top=top,
            roles=words(roles),
            blocks=numbers(blocks),
            name=name,
            stream=stream,
            approximate=approximate,
            workers=workers,
            progress=tell,
        )
    about = found.manifest
    matrices = about["pairs"]["checkpoints"]["matrices"]
    line(f"{len(about['checkpoints'])} checkpoints, {len(matrices)} matrices, {found.rows.num_rows} rows in {out}")
    for one in about["passed_over"]:
        line(f"passed over: {one['source']}: {one['reason']}", style="yellow")
    for note in about["notes"]:
        line(f"note: {note}", style="yellow")
    for one in about["failed"]:
        line(f"failed: {one['checkpoint']}: {one['error']}", style="yellow")
    for path in write_track_figure(found):
        line(f"figure: {path}")


SIZE = Annotated[str, typer.Option(help="small (CPU) or paper (App. L; a GPU)")]
SECOND = Annotated[str, typer.Option(help="images of another distribution, as --data")]
SEEDS = Annotated[str, typer.Option(help="seeds, e.g. 0-2,7")]
IMAGES = Annotated[
    str, typer.Option(help="sizes of the pretraining sets in place of the plan's, e.g. 500,2000; with --steps")
]
STEPS = Annotated[int | None, typer.Option(help="optimizer steps of each of these pretrainings")]
POST = Annotated[int | None, typer.Option(help="images to train on after pretraining; default: as planned")]
VALIDATION = Annotated[int | None, typer.Option(help="test images for validation; default: as planned")]
DRAW = Annotated[bool, typer.Option("--draw", help="figure and claims from the rows that are there; run nothing")]


ABOUT = {
    "fig4": "Between checkpoints of pretraining; larger sets against smaller, after a new task and on new data.",
    "fig9": "True against random labels, from pretrained and from random weights.",
    "fig21": "Every size of pretraining set, with equal steps and with equal epochs.",
    "scratch": "The same training from random weights; two seeds compared; all cells of the other figures.",
}


def _verb(figure: str) -> Callable[..., None]:
    """The verb of one figure: they differ in the cells that they run and in what they draw."""

    def reproduce(
        out: OUT,
        data: DATA = "fashion-mnist",
        second: SECOND = "mnist-5k",
        size: SIZE = "small",
        seeds: SEEDS = "0-2",
        images: IMAGES = "",
        steps: STEPS = None,
        post_images: POST = None,
        validation: VALIDATION = None,
        draw: DRAW = False,
    ) -> None:
        plan = _plan(data, second, size, seeds, images, steps, post_images, validation)
        _reproduce(figure, out, plan, draw)

    return reproduce


for _figure, _about in ABOUT.items():
    reproduce_app.command(_figure, help=_about)(_verb(_figure))


def _plan(
    data: str,
    second: str,
    size: str,
    seeds: str,
    images: str,
    steps: int | None,
    post_images: int | None,
    validation: int | None,
) -> Formation:
    from specbasis.paper.formation import SMALL, paper

    if size not in ("small", "paper"):
        raise InputError(f"got --size {size!r}; want small or paper")
    if bool(images) != (steps is not None):
        raise InputError("got one of --images and --steps; want both, or neither for the plan's own sizes")
    plan = replace(SMALL, data=data, second=second) if size == "small" else paper(data, second)
    changes = {
        "seeds": tuple(_counts("--seeds", seeds)),
        "passes": (tuple((n, steps) for n in _counts("--images", images)),) if images else plan.passes,
        "validation": validation or plan.validation,
        "same_task_images": post_images or plan.same_task_images,
        "new_task_images": post_images or plan.new_task_images,
    }
    return replace(plan, **changes)  # type: ignore[arg-type]


def _counts(flag: str, text: str) -> list[int]:
    try:
        found = numbers(text)
    except InputError as error:
        raise InputError(f"{flag} got {text!r}; want numbers and ascending ranges, such as 0,4-6") from error
    if not found:
        raise InputError(f"{flag} got {text!r}; want at least one number")
    return found


def _reproduce(figure: str, out: Path, plan: Formation, draw: bool) -> None:
    from specbasis.jobs.experiments import read_experiments
    from specbasis.paper.formation import cells_of, write_outcome
    from specbasis.paper.formation_grid import run_formation

    if not draw:
        with progress() as tell:
            rows = run_formation(plan, out, cells=cells_of(figure, plan), progress=tell)
        for row in rows:
            if row.error is not None:
                line(f"failed: {' '.join(map(str, row.experiment.values()))}: {row.error}", style="yellow")
    paths, found = write_outcome(figure, read_experiments(out), out)
    STDOUT.print(_table(found))
    for path in paths:
        line(f"written: {path}")


def _table(found: list[Claim]) -> Table:
    table = Table(title="effects, with 95 % intervals over seeds")
    for column in ("claim", "setting", "matrices", "effect", "interval", "seeds", "verdict"):
        table.add_column(column, justify="right" if column in ("effect", "seeds") else "left", overflow="fold")
    for one in found:
        ends = "–" if one.low != one.low else f"{one.low:+.3f} … {one.high:+.3f}"
        table.add_row(
            f"{one.claim}: {one.measure}",
            one.setting,
            one.group,
            f"{one.effect:+.3f}",
            ends,
            str(one.seeds),
            one.verdict,
        )
    return table
