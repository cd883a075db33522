"""`extract`, `repair`, `merge`: a finished finetune made small, what it forgot brought back, several made one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specbasis.cli.common import STDERR, STDOUT, document, line, progress
from specbasis.cli.flags import BASE, JSON, OUT
from specbasis.core.errors import InputError, MissingExtra
from specbasis.core.grammar import labelled, words
from specbasis.core.options import ADVANCED, Options, option
from specbasis.treatment.options import ExtractOptions, MergeOptions, RepairOptions

if TYPE_CHECKING:
    from specbasis.interventions.evaluators import Judge
    from specbasis.treatment.extraction import Extraction

TUNED = Annotated[str, typer.Argument(metavar="TUNED", help="the finetune, or a LoRA, DoRA or AdaLoRA of the base")]
NEW = Annotated[Path, typer.Option("--out", help="new folder")]


@dataclass(frozen=True)
class Examples(Options):
    """Which examples a task has."""

    limit: int | None = option(None, "judge on this many examples", panel=ADVANCED, least=1)
    data_dir: Path | None = option(None, "GLUE in its official layout; default: from the Hub", panel=ADVANCED)
    text: str = option("", "columns of a table that hold the one or two texts", panel=ADVANCED)
    label: str = option("", "its column with the label", panel=ADVANCED)

    def evaluator(self, task: str) -> Judge:
        """From a model to its metrics on a task.

        Raises:
            InputError: there is no such task.
        """
        from specbasis.interventions.evaluators import judge

        folder = None if self.data_dir is None else str(self.data_dir)
        return judge(task, data_dir=folder, limit=self.limit, text=words(self.text), label=self.label)


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
    strict: Annotated[bool, typer.Option("--strict", help="exit code 2 where anything is left out")] = False,
    json: Annotated[bool, typer.Option("--json", help="print one JSON document, nothing else")] = False,
) -> None:
    """Write a finetune as a LoRA of a rank, a share or a size: PEFT loads the folder without specbasis."""
    from specbasis.treatment.extract import extract as run

    evaluator = examples.evaluator(judge) if judge else None
    with progress() as tell:
        extraction = run(base, tuned, out, options, judge=evaluator, progress=tell)
    if json:
        document({"folder": str(extraction.folder), **extraction.record})
    else:
        _tell(extraction)
    if strict and extraction.record["left_out"]:
        first = extraction.record["left_out"][0]
        line(f"error: left out: {first['name']} ({first['reason']})", console=STDERR, style="red")
        raise typer.Exit(2)


def _tell(extraction: Extraction) -> None:
    """The table, what else is in the folder and what is not, and the scores."""
    from specbasis.treatment.judged import told

    record = extraction.record
    STDOUT.print(extraction.table.terminal())
    line(
        "columns: kept, the share of the squared update; chance, entries, signs, what random directions, the "
        "largest entries and the signs alone would hold of it",
        style="italic dim",
    )
    total = record["total"]
    without = [matrix["name"] for matrix in extraction.matrices if not matrix["rank"] and not matrix.get("bits")]
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        line(f"nothing kept of: {without[0]}{more}: its directions hold less for their bytes than the others'")
    line(
        f"kept: {total['share']:.2%} of the update in {total['bytes'] / 1e6:.1f} MB; the finetune has "
        f"{total['tuned_bytes'] / 1e6:.1f} MB"
    )
    if record["carried"]:
        share = sum(carried["share_of_update"] for carried in record["carried"])
        line(f"carried whole: {len(record['carried'])} parameters, new or no matrices ({share:.2%} of the update)")
    for left in record["left_out"][:10]:
        line(f"left out: {left['name']}: {left['reason']}")
    if len(record["left_out"]) > 10:
        line(f"left out: {len(record['left_out']) - 10} more; all are in the record")
    for text in record["notes"]:
        line(text)
    for text in told(record.get("scores", {})):
        line(text)
    line(f"written: {extraction.folder}")


def repair(
    base: BASE,
    tuned: TUNED,
    keep: Annotated[str, typer.Option("--keep", metavar="TASK", help="what it has to do still: glue:sst2 …")],
    recover: Annotated[
        str,
        typer.Option("--recover", metavar="TASK|FILE", help="what the base could do: a task, or a file of texts"),
    ],
    out: OUT,
    options: RepairOptions,
    examples: Examples,
) -> None:
    """Bring back what a finetune forgot: ways towards the base, judged on the task and on what was forgotten."""
    from specbasis.figures.treatment import repair_table, write_repair_figure
    from specbasis.treatment.repair import recovery
    from specbasis.treatment.repair import repair as run

    with progress() as tell:
        done = run(base, tuned, examples.evaluator(keep), recovery(recover, base, examples.limit), out, options,
                   progress=tell)  # fmt: skip
    STDOUT.print(repair_table(done).terminal())
    line(
        "change: of the task, against the finetune; recovered: the other metric (of a loss, its negative); back: "
        "share of what was forgotten that came back; *: chosen",
        style="italic dim",
    )
    line(done.sentence)
    if any("amount" in row.experiment for row in done.rows):
        try:
            line(f"picture: {write_repair_figure(done)[0]}")
        except MissingExtra as error:
            line(f"note: no picture: {error}", console=STDERR)
    line(f"repaired model: {done.model}" if done.model else f"rows: {done.folder}")


def merge(
    base: BASE,
    tuned: Annotated[
        list[str], typer.Argument(metavar="[NAME=]TUNED...", help="the finetunes, or adapters of the base")
    ],
    options: MergeOptions,
    examples: Examples,
    out: Annotated[Path | None, typer.Option("--out", help="new folder")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write nothing: who agrees and who fights")] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option("--judge", metavar="NAME=TASK", help="judge all models on a finetune's task: glue:sst2 …"),
    ] = None,
    json: JSON = False,
) -> None:
    """Make one model of several finetunes of a base, or map where they interfere (--dry-run)."""
    from specbasis.treatment.merge import merge as run

    if out is None and not dry_run:
        raise InputError("got no --out; want a new folder, or --dry-run")
    named = [labelled(text) for text in judge or ()]
    if bad := [task for name, task in named if not name]:
        raise InputError(f"--judge got {bad[0]!r}; want NAME=TASK, such as sst2=glue:sst2")
    judges = {name: examples.evaluator(task) for name, task in named}
    if len(judges) < len(named):
        raise InputError("--judge got two tasks of one finetune; want one of each")
    with progress() as tell:
        merging = run(base, tuned, None if dry_run else out, options, judge=judges, progress=tell)
    if json:
        document({"folder": merging.folder and str(merging.folder), **merging.record})
        return
    for table in filter(None, (merging.table, merging.scores)):
        STDOUT.print(table.terminal())
    for name, task in merging.record.get("scores", {"tasks": {}})["tasks"].items():
        if task["change_low"] is not None:
            line(
                f"{name}: merged − mean {task['change']:+.4f} [{task['change_low']:+.4f}, "
                f"{task['change_high']:+.4f}], {task['examples']} examples"
            )
    for left in merging.record["left_out"][:10]:
        line(f"not merged: {left['name']} of {left['finetune']}: {left['reason']}")
    if len(merging.record["left_out"]) > 10:
        line(f"not merged: {len(merging.record['left_out']) - 10} more; all are in the record")
    line(f"model: {merging.folder}" if merging.folder else "nothing is written; without --dry-run it is")
