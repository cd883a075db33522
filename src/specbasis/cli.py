"""The command line: verbs and flags. No science here."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

import specbasis
from specbasis.adapter import folder as folders
from specbasis.architecture import ROLES, MatrixRef, coverage, model_map
from specbasis.compare import Plan, Progress
from specbasis.errors import InputError
from specbasis.plan import human_bytes, rates
from specbasis.recipes.zoo import run_zoo, zoo
from specbasis.report.tables import by_reason, cells
from specbasis.summary import RoleSummary, named_parts

app = typer.Typer(
    help="What finetuning changes in the singular vectors and values of a model's weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

BASE = Annotated[
    str, typer.Argument(metavar="BASE", help="pretrained: file, folder, hub:org/name, timm:name, pkg:…")
]
TUNED = Annotated[list[str], typer.Argument(metavar="TUNED...", help="one or several finetunes of it")]
OUT = Annotated[Path, typer.Option("--out", help="folder for rows, manifest, page; the same command continues it")]


STREAM = Annotated[bool, typer.Option("--stream", help="from the Hub read only the bytes that are wanted")]
ADAPTER = Annotated[Path, typer.Argument(metavar="DIR", help="the folder of a saved spectral adapter")]
ADAPTER_BASE = Annotated[
    Path | None, typer.Option("--base", help="the base checkpoint; default: the adapter's own")
]
ADAPTER_OUT = Annotated[Path, typer.Option("--out", help="folder to write")]

zoo_app = typer.Typer(help="The pairs of models that the paper compares; without a verb it lists them.")
adapter_app = typer.Typer(help="Spectral adapters on disk.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
app.add_typer(adapter_app, name="adapter")


@app.command()
def compare(
    base: BASE,
    tuned: TUNED,
    out: OUT,
    ranks: Annotated[int, typer.Option(help="leading ranks whose singular vectors are compared")] = 200,
    subspace: Annotated[int, typer.Option(help="leading ranks k at which principal angles are taken")] = 10,
    roles: Annotated[str, typer.Option(help="only these roles, e.g. ffn,attention.query")] = "",
    blocks: Annotated[str, typer.Option(help="only these blocks, e.g. 0,10-11")] = "",
    name: Annotated[str, typer.Option(help="only matrices whose name matches this pattern (* and ?)")] = "",
    common_rows: Annotated[bool, typer.Option(help="compare the common rows where a vocabulary grew")] = False,
    stream: STREAM = False,
    measures: Annotated[str, typer.Option(help="only these measures, e.g. 'alignment*,singular_value_*'")] = "",
    workers: Annotated[
        int | None, typer.Option(help="matrices at the same time; default: one for each core")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="what workers may take, e.g. 8GB; default: half of the free")
    ] = None,
    engine: Annotated[str, typer.Option(help="threads, processes, ray, or auto")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1")] = "cpu",
    cache: Annotated[
        Path | None, typer.Option(help="folder in which decompositions are kept and found again")
    ] = None,
    approximate: Annotated[
        bool, typer.Option(help="iterate where the short side is over 8192 and ranks few")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan; compute and write nothing")] = False,
    report: Annotated[bool, typer.Option(help="write the page and the figures")] = True,
) -> None:
    """Measure what finetuning changed in every weight matrix, and write rows, tables and a page."""
    from specbasis.compare import compare as run
    from specbasis.compare import plan

    what: dict[str, Any] = {
        "ranks": ranks,
        "subspace": subspace,
        "roles": _words(roles),
        "blocks": _numbers(blocks),
        "name": name,
        "common_rows": common_rows,
        "measures": _words(measures),
        "workers": workers,
        "memory": memory,
        "stream": stream,
    }
    if dry_run:
        _print_plan(plan(base, tuned, out, **what))
        return
    with _progress() as progress:
        comparison = run(
            base,
            tuned,
            out,
            **what,
            engine=engine,
            device=device,
            cache=cache,
            approximate=approximate,
            progress=progress,
        )
    _print_comparison(comparison)
    if report:
        _write_report(comparison)
    if comparison.failed:
        raise typer.Exit(2)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that compare wrote")]) -> None:
    """Print the tables of a comparison again, and rebuild its page and figures from the rows alone."""
    comparison = specbasis.load(folder)
    _print_comparison(comparison)
    _write_report(comparison)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a checkpoint, as in compare")],
    stream: STREAM = False,
) -> None:
    """Print how a model is understood: its stacks of blocks, the role of every matrix, and what has none."""
    checkpoint = specbasis.open_checkpoint(model, stream=stream)
    mapped = model_map(checkpoint)
    covered = coverage(mapped, checkpoint)
    _line(f"{model}: {mapped.family.title}", style="bold")
    for tower, family in mapped.towers.items():
        blocks = {m.key.block for m in mapped.matrices if m.parameter.startswith(tower) and m.key.block is not None}
        _line(f"{tower or 'the model'}: {len(blocks)} blocks, {family.name}")
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("stack", "role", "matrices", "blocks", "parameters", "share"):
        table.add_column(heading, justify="left" if heading in ("stack", "role") else "right", no_wrap=True)
    for (stack, role), members in _by_place(mapped.matrices).items():
        size = sum(m.shape[0] * m.shape[1] for m in members)
        blocks = {m.key.block for m in members if m.key.block is not None}
        share = f"{size / covered.total:.1%}" if covered.total else "–"
        table.add_row(stack, role, str(len(members)), str(len(blocks) or "–"), f"{size:,}", share)
    _out.print(table)
    _line(f"{covered.named:.1%} of {covered.total:,} matrix parameters have a named role")
    for note in (*checkpoint.notes, *mapped.notes):
        _line(f"note: {note}")
    if mapped.unnamed:
        _line(f"no pattern names: {named_parts(mapped.unnamed, 6)}")
    for reason, names in by_reason(
        [{"name": s.name, "side": "both", "reason": s.reason} for s in mapped.skipped]
    ).items():
        _line(f"no matrix: {len(names)}, {reason}: {named_parts(names, 2)}")


@zoo_app.callback(invoke_without_command=True)
def zoo_list(context: typer.Context) -> None:
    """List the pairs that the paper compares, with the accuracy that it prints; `zoo run` compares them."""
    if context.invoked_subcommand:
        return
    found = zoo()
    for pair in found.pairs:
        accuracy = "" if pair.accuracy is None else f", {pair.accuracy:g} %"
        sides = f"{pair.base} -> {pair.tuned}" if pair.obtainable else "nothing published"
        _line(f"{pair.name} ({pair.table}, {pair.modality}, {pair.task}{accuracy}): {sides}")
        for note in pair.notes:
            _line(f"  note: {note}")
    for note in found.notes:
        _line(f"note: {note}")


@zoo_app.command("run")
def zoo_run(
    out: OUT,
    only: Annotated[str, typer.Option(help="names, tables or modalities, e.g. '*bert*,EEG'")] = "",
    ranks: Annotated[int, typer.Option(help="leading ranks whose singular vectors are compared")] = 200,
    stream: STREAM = False,
    report: Annotated[bool, typer.Option(help="write each pair's page and figures")] = True,
) -> None:
    """Compare the paper's pairs, each into its own folder; what cannot be had is reported and passed over."""
    missing = 0
    with _progress() as progress:
        for _, outcome in run_zoo(out, _words(only), ranks=ranks, stream=stream, progress=progress):
            if isinstance(outcome, InputError):
                missing += 1
                _line(f"error: {outcome}", console=_err, style="red")
                continue
            _print_comparison(outcome)
            if report:
                _write_report(outcome)
    _line(f"{missing} pairs could not be compared" if missing else "all pairs compared")


@adapter_app.command("info")
def adapter_info(folder: ADAPTER) -> None:
    """Print what an adapter holds and what it did to each matrix, from its own file."""
    found = folders.info(folder)
    for name in ("base", "basis", "scale"):
        _line(f"{name}: {found[name]}")
    _line(
        f"parameters: {found['adapter_parameters']:,} adapter, {found['head_parameters']:,} head and other modules"
    )
    for layer in found["layers"]:
        first, last = layer["interval"]
        _line(
            f"{layer['module']}: {layer['weight']}, ranks {first + 1} … {last}, drift {layer['drift']:.3g}, "
            f"alignment {layer['mean_left_alignment']:.3f} / {layer['mean_right_alignment']:.3f}, "
            f"condition {layer['condition']:.3g}, basis {'saved' if layer['basis_saved'] else 'not saved'}"
        )


@adapter_app.command("verify")
def adapter_verify(folder: ADAPTER, base: ADAPTER_BASE = None) -> None:
    """Check every vector of the basis against the base; exit code 2 and the reason where they differ."""
    checked = folders.verify(folder, base)
    _line(f"verified: {len(checked)} matrices meet the basis that they were trained in")


@adapter_app.command("merge")
def adapter_merge(folder: ADAPTER, out: ADAPTER_OUT, base: ADAPTER_BASE = None) -> None:
    """Write the base with the adapter merged in, as a folder that transformers loads."""
    _line(f"merged: {folders.merge(folder, out, base)}")


@adapter_app.command("export-lora")
def adapter_export_lora(
    folder: ADAPTER,
    out: ADAPTER_OUT,
    base: ADAPTER_BASE = None,
    rank: Annotated[int | None, typer.Option(help="best approximation at this rank; default: exact")] = None,
) -> None:
    """Write the adapter as LoRA, for PEFT without this package."""
    _line(f"exported: {folders.export_lora(folder, out, base, rank)}")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        _out.print(specbasis.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and exit code 2, never a traceback."""
    try:
        app()
    except InputError as error:
        _line(f"error: {error}", console=_err, style="red")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            _line("interrupted: what is done is kept, and the same command continues", console=_err)
        raise


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left, where there is a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    percent = TextColumn("{task.percentage:>3.0f}%")
    quiet = not _err.is_terminal
    with Bar(*columns, percent, TimeRemainingColumn(), console=_err, transient=True, disable=quiet) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda p: bar.update(task, completed=p.done, total=p.total, description=p.matrix[-60:])


def _by_place(matrices: Iterable[MatrixRef]) -> dict[tuple[str, str], list[MatrixRef]]:
    """Matrices by stack and role, roles in the order of `ROLES`."""
    groups: dict[tuple[str, str], list[MatrixRef]] = {}
    for m in sorted(matrices, key=lambda m: (m.key.stack, ROLES.index(m.key.role))):
        groups.setdefault((m.key.stack, m.key.role), []).append(m)
    return groups


def _print_comparison(comparison: specbasis.Comparison) -> None:
    for pair in comparison.pairs:
        about = comparison.manifest["pairs"][pair]
        _out.print(_summary_table(pair, comparison.summaries[pair]))
        # Not the table's caption, which would wrap at the width of a narrow table.
        _line("L left, R right; ?: unresolved ranks, left out of the means", style="italic dim")
        for note in about["notes"]:
            _line(f"note: {note}")
        for reason, names in by_reason(about["skipped"]).items():
            _line(f"not compared: {len(names)}, {reason}: {named_parts(names, 2)}")
        _line(comparison.verdicts[pair].sentence, style="bold")
        _line("")
    for failure in comparison.failed:
        _line(f"error: {failure['error']}", console=_err, style="red")


def _print_plan(plan: Plan) -> None:
    """One line per shape, and what it comes to."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("out × in", "n", "Gflop each", "s each", "memory each"):
        table.add_column(heading, justify="right", no_wrap=True)
    shapes = Counter((task.shape, task.work) for task in plan.tasks)
    for (shape, work), count in shapes.items():
        seconds = f"{work.seconds(rates()):.2g}"
        size = "×".join(map(str, shape))
        table.add_row(size, str(count), f"{work.flops / 1e9:.3g}", seconds, human_bytes(work.bytes))
    _out.print(table)
    _line(
        f"{len(plan.tasks)} matrices, {plan.workers} at a time: about {plan.seconds:.3g} s on an idle machine, "
        f"{human_bytes(plan.bytes)} beside the libraries (budget {human_bytes(plan.memory)})"
    )


def _summary_table(pair: str, lines: list[RoleSummary]) -> Table:
    """One line per role; narrow enough for 80 columns."""
    table = Table(
        title=pair, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    headings = ("role", "n", "top-10\nL     R", "top-30\nL     R", "chance\nL    R", "RSD", "‖Δ‖/‖W‖", "?")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "role" else "right", no_wrap=True)
    for line in lines:
        if line is lines[-1]:
            table.add_section()
        role, matrices, *sides, rsd, update, unresolved = cells(line)
        both = (f"{left} {right}" for left, right in zip(sides[::2], sides[1::2], strict=True))
        table.add_row(role, matrices, *both, rsd, update, unresolved)
    return table


def _line(text: str, *, console: Console = _out, style: str = "") -> None:
    """Print text as it is: no markup, no wrapping, so that it can be copied and searched."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _write_report(comparison: specbasis.Comparison) -> None:
    page = comparison.report()
    _line(f"page: {page}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    """Block numbers from a list with ranges: "0,10-11" is 0, 10, 11."""
    numbers: list[int] = []
    for word in _words(text):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", word, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise InputError(f"--blocks got {word!r}; want numbers and ascending ranges, such as 0,10-11")
        numbers += range(first, last + 1)
    return numbers
