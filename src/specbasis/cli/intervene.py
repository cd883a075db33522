"""`edit` and `intervene`: singular vectors exchanged in a checkpoint, or in a grid that a task judges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from specbasis.architecture.selection import Selection
from specbasis.cli.common import exit_on_failures, line, note, progress
from specbasis.cli.flags import BASE, OUT, Examples
from specbasis.core.errors import InputError
from specbasis.core.grammar import numbers
from specbasis.interventions.options import EditOptions, GridOptions

SUBJECTS = Annotated[
    list[str],
    typer.Argument(
        metavar="[LABEL=]TASK=TUNED...",
        help="a finetune and how it is judged: glue:sst2=DIR, anarcii:tcr=FILE, text:FILE=DIR, images:DIR=DIR, "
        "table:FILE=DIR, harness:TASKS=DIR",
    ),
]


def edit(
    base: BASE,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the finetune that is edited")],
    out: Annotated[Path, typer.Option("--out", help="new folder for the edited model")],
    options: EditOptions,
    source: Annotated[str, typer.Option("--from", help="take vectors from this model; default: BASE")] = "",
) -> None:
    """Write a finetune with some of its singular vectors replaced or masked; transformers loads the folder."""
    from specbasis.architecture.key import MatrixKey
    from specbasis.checkpoint.regular import read_json
    from specbasis.core.edits import Edit
    from specbasis.interventions.stored import RECORD, write_edited

    o = options
    with progress() as tell:
        written = write_edited(
            base,
            tuned,
            Edit(o.kind, o.ranks, o.sides, o.seed, o.factor, o.groups),
            out,
            other=source or None,
            admits=options.filter,
            progress=tell,
        )
    edited = read_json(written / RECORD)["matrices"]
    for text in options.notes(MatrixKey(m["block"], m["role"], m["name"]) for m in edited):
        note(text)
    line(f"edited model: {written}")


def intervene(
    base: BASE,
    subjects: SUBJECTS,
    out: OUT,
    options: GridOptions,
    examples: Examples,
    report: Annotated[bool, typer.Option(help="draw the figures and the table of sharing")] = True,
) -> None:
    """Judge finetunes while their singular vectors are swapped, randomised and masked, against controls."""
    from specbasis.architecture.recognise import model_map
    from specbasis.checkpoint import open_checkpoint
    from specbasis.cli.tables import print_grid
    from specbasis.interventions.evaluators import judge
    from specbasis.interventions.grid import intervene as run
    from specbasis.interventions.stage import Subject

    named: dict[str, Subject] = {}
    for given in subjects:
        name, task, source = _subject(given)
        if name in named:
            raise InputError(f"two models are called {name!r}; write LABEL=TASK=TUNED")
        named[name] = Subject(source, judge(task, **examples.judging))
    with progress() as tell:
        rows = run(base, named, out, options, progress=tell)
    print_grid(out)
    roles = dict.fromkeys(role for group in options.roles for role in group.split("+") if role)
    asked = Selection(tuple(roles), tuple(block for group in options.blocks for block in numbers(group)))
    for text in asked.notes(ref.key for ref in model_map(open_checkpoint(base)).matrices):
        note(text)
    if report:
        from specbasis.figures.interventions import write_figures

        models = {"base": base, **{label: subject.source for label, subject in named.items()}}
        for path in write_figures(out, models=models, cache=options.cache):
            line(f"written: {path}")
    exit_on_failures(rows)


def list_kinds() -> None:
    """What `--kind help` prints."""
    from specbasis.cli.tables import print_names
    from specbasis.core.edits import KINDS

    print_names({name: kind.about for name, kind in KINDS.items()})


def _subject(text: str) -> tuple[str, str, str]:
    """Label, task and source of LABEL=TASK=TUNED or TASK=TUNED."""
    match = re.fullmatch(r"(?:([^=:]+)=)?([a-z]+:[^=]+)=(.+)", text)
    if not match:
        raise InputError(f"got {text!r}; want TASK=TUNED, such as glue:sst2=finetuned/sst2, or LABEL=TASK=TUNED")
    label, task, source = match.groups()
    return label or Path(task.partition(":")[2]).stem, task, source
