"""`forgetting`, `extract`, `repair`, `merge`: what was forgotten, made small, brought back, made one of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specbasis.cli.common import STDERR, STDOUT, document, line, note, progress
from specbasis.cli.flags import BASE, JSON, OUT, Examples
from specbasis.core.errors import InputError, MissingExtra
from specbasis.core.grammar import labelled, words
from specbasis.treatment.options import ExtractOptions, MergeOptions, RepairOptions

if TYPE_CHECKING:
    from specbasis.finetuning.tasks import TaskData
    from specbasis.treatment.treated import Treated

TUNED = Annotated[str, typer.Argument(metavar="TUNED", help="the finetune, or a LoRA, DoRA or AdaLoRA of the base")]
NEW = Annotated[Path, typer.Option("--out", help="new folder")]


def _training(examples: Examples, task: str, judged: str) -> TaskData:
    """The examples of a task to train on, which are none of those to be judged by.

    Raises:
        InputError: there is no such task, or it is the table that judges.
    """
    from specbasis.finetuning.sources import load_task

    form, _, argument = task.partition(":")
    if form not in ("glue", "table") or not argument:
        raise InputError(f"got --heal {task}; want glue:TASK or table:FILE")
    if form == "table" and task == judged:
        raise InputError(f"got --heal and --judge {task}; want examples to judge by that it is not trained on")
    if form == "glue":
        return load_task(argument, data_dir=examples.data_dir)
    return load_task(argument, text=words(examples.text), label=examples.label)


def extract(
    base: BASE,
    tuned: TUNED,
    out: NEW,
    options: ExtractOptions,
    examples: Examples,
    judge: Annotated[
        str,
        typer.Option("--judge", metavar="TASK", help="judge base, finetune and result: glue:sst2, table:FILE …"),
    ] = "",
    heal: Annotated[
        str,
        typer.Option("--heal", metavar="TASK", help="train the LoRA for some --steps on glue:sst2, table:FILE …"),
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="exit code 2 if anything is left out")] = False,
    json: JSON = False,
) -> None:
    """Write a finetune as a LoRA for plain PEFT, of a given rank, share or size, or in another form (--as)."""
    from specbasis.interventions.evaluators import judge as evaluator_of
    from specbasis.treatment.extract import extract as run

    evaluator = evaluator_of(judge, **examples.judging) if judge else None
    trained = _training(examples, heal, judge) if heal else None
    with progress() as tell:
        extraction = run(base, tuned, out, options, judge=evaluator, heal=trained, progress=tell)
    if json:
        document({"folder": str(extraction.folder), **extraction.record})
    else:
        show(extraction)
        line(f"written: {extraction.folder}")
    if strict and extraction.record["left_out"]:
        first = extraction.record["left_out"][0]
        line(f"error: left out: {first['name']} ({first['reason']})", console=STDERR, style="red")
        raise typer.Exit(2)


def show(treated: Treated) -> None:
    """The tables, what they come to, what is not in them, and the page."""
    from specbasis.figures.treatment import legend, tables, view

    shown = tables(treated)
    for table in shown:
        STDOUT.print(table.terminal())
    if columns := legend(shown, narrow=True):
        line(f"columns: {columns}", style="italic dim")
    left_out = treated.record.get("left_out", [])
    for text in [*view(treated).sentences(treated), *treated.record.get("notes", [])]:
        line(text)
    for left in left_out[:10]:
        line(f"left out: {left['name']}{' of ' + left['finetune'] if 'finetune' in left else ''}: {left['reason']}")
    if len(left_out) > 10:
        line(f"left out: {len(left_out) - 10} more; all are in the record")
    if treated.folder is not None:
        try:
            line(f"page: {treated.report()}")
        except MissingExtra as error:
            note(f"no page: {error}", console=STDERR)


def report(folder: Path, form: str, fail_on: Sequence[str]) -> bool:
    """Show again what a treatment wrote to a folder; False of a folder of another kind.

    Raises:
        InputError: its record is not what was written, or what is asked for is of comparisons alone.
    """
    from specbasis.figures.treatment import opened

    if (treated := opened(folder)) is None:
        return False
    if form not in ("text", "json") or fail_on:
        asked = f"--fail-on {','.join(fail_on)}" if fail_on else f"--format {form}"
        raise InputError(f"{folder}: {asked} is of comparisons; want none of it, or a folder that compare wrote")
    if form == "json":
        document({"folder": str(folder), **treated.record})
    else:
        show(treated)
    return True


def forgetting(
    base: BASE,
    tuned: TUNED,
    held_back: Annotated[
        str,
        typer.Option(
            "--held-back", metavar="FILE|TASK", help="texts that neither was trained on, or a task of base"
        ),
    ],
    examples: Examples,
    out: Annotated[Path | None, typer.Option("--out", help="new folder for the record and its page")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="exit code 1 if the whole interval is worse by more than this"),
    ] = None,
    json: JSON = False,
) -> None:
    """Tell whether a finetune forgot what its base could do: the loss, or a task's metric, before and after."""
    from specbasis.treatment.forgetting import forgetting as run, named

    result = run(base, tuned, named(held_back, base, **examples.judging), out)
    if json:
        document(result.record)
    else:
        show(result)
    if tolerance is not None and result.exceeds(tolerance):
        line(f"forgotten beyond --tolerance {tolerance:g}", console=STDERR, style="red")
        raise typer.Exit(1)
    if tolerance is not None:
        line(f"--tolerance {tolerance:g}: {result.within(tolerance)}", console=STDERR)


def repair(
    base: BASE,
    tuned: TUNED,
    keep: Annotated[str, typer.Option("--keep", metavar="TASK", help="the task that it must do: glue:sst2 …")],
    recover: Annotated[
        str,
        typer.Option("--recover", metavar="TASK|FILE", help="what the base could do: a task, or a file of texts"),
    ],
    out: OUT,
    options: RepairOptions,
    examples: Examples,
) -> None:
    """Bring back what a finetune forgot: models between it and its base, judged on both tasks."""
    from specbasis.treatment.forgetting import named
    from specbasis.treatment.repair import repair as run

    with progress() as tell:
        kept, forgotten = (named(text, base, **examples.judging) for text in (keep, recover))
        done = run(base, tuned, kept, forgotten, out, options, progress=tell)
    show(done)
    line(f"repaired model: {done.model}" if done.model else f"rows: {done.folder}")


def merge(
    base: BASE,
    tuned: Annotated[
        list[str], typer.Argument(metavar="[NAME=]TUNED...", help="the finetunes, or adapters of the base")
    ],
    options: MergeOptions,
    examples: Examples,
    out: Annotated[Path | None, typer.Option("--out", help="new folder")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show where they agree or conflict")] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option("--judge", metavar="NAME=TASK", help="judge all models on a finetune's task: glue:sst2 …"),
    ] = None,
    json: JSON = False,
) -> None:
    """Make one model of several finetunes of a base, or show where they interfere (--dry-run)."""
    from specbasis.interventions.evaluators import judge as evaluator_of
    from specbasis.treatment.merge import merge as run

    if out is None and not dry_run:
        raise InputError("got no --out; want a new folder, or --dry-run")
    named = [labelled(text) for text in judge or ()]
    if bad := [task for name, task in named if not name]:
        raise InputError(f"--judge got {bad[0]!r}; want NAME=TASK, such as sst2=glue:sst2")
    judges = {name: evaluator_of(task, **examples.judging) for name, task in named}
    if len(judges) < len(named):
        raise InputError("--judge got two tasks of one finetune; want one of each")
    with progress() as tell:
        merging = run(base, tuned, None if dry_run else out, options, judge=judges, progress=tell)
    if json:
        document({"folder": merging.folder and str(merging.folder), **merging.record})
        return
    show(merging)
    line(f"model: {merging.folder}" if merging.folder else "nothing is written; without --dry-run it is")
