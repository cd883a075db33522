"""`compare`, `report` and `inspect`: what finetuning changed, and how a model is understood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import specbasis
from specbasis.architecture.key import ROLES, MatrixRef
from specbasis.architecture.recognise import coverage, model_map
from specbasis.cli.common import OUT, STDERR, STDOUT, STREAM, line, numbers, progress, words
from specbasis.comparison.compare import Plan
from specbasis.comparison.findings import CHECKS, kinds
from specbasis.comparison.summary import RoleSummary, named_parts
from specbasis.core.grammar import human_bytes
from specbasis.figures.tables import SEVERITIES, by_reason, cells, number, over_all_ranks
from specbasis.jobs.cost import rates

BASE = Annotated[
    str, typer.Argument(metavar="BASE", help="pretrained: file, folder, hub:org/name, timm:name, pkg:…")
]
JSON = Annotated[
    bool, typer.Option("--json", help="print verdicts, findings and summaries as one JSON document, nothing else")
]
FAIL_ON = Annotated[
    str,
    typer.Option(
        help="exit code 1 where one of these is found: " + ", ".join(check.kind for check in CHECKS),
        metavar="FINDINGS",
    ),
]


def _list_measures(value: str) -> str:
    """`--measures help` prints every measure and ends, whatever else is there."""
    if value != "help":
        return value
    from specbasis.measures.table import registered

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("measure", "index", "unit", "what it is"):
        table.add_column(heading, overflow="fold")
    for measure in registered():
        table.add_row(measure.name, measure.index, measure.unit, measure.title)
    STDOUT.print(table)
    raise typer.Exit


MEASURES = Annotated[
    str,
    typer.Option(
        help="only these measures, e.g. 'alignment*,singular_value_*'; `help` lists them",
        is_eager=True,
        callback=_list_measures,
    ),
]
TUNED = Annotated[list[str], typer.Argument(metavar="TUNED...", help="one or several finetunes of it")]


def compare(
    base: BASE,
    tuned: TUNED,
    out: OUT,
    ranks: Annotated[int, typer.Option(help="leading ranks whose singular vectors are compared")] = 200,
    subspace: Annotated[
        int | None, typer.Option(help="leading ranks k at which principal angles are taken; default: 10")
    ] = None,
    roles: Annotated[str, typer.Option(help="only these roles, e.g. ffn,attention.query")] = "",
    blocks: Annotated[str, typer.Option(help="only these blocks, e.g. 0,10-11")] = "",
    name: Annotated[str, typer.Option(help="only matrices whose name matches this pattern (* and ?)")] = "",
    common_rows: Annotated[bool, typer.Option(help="compare the common rows where a vocabulary grew")] = False,
    stream: STREAM = False,
    measures: MEASURES = "",
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
    nulls: Annotated[
        bool, typer.Option("--nulls", help="what chance, size and rounding would give, with p-values")
    ] = False,
    null_samples: Annotated[
        int, typer.Option(help="random updates of each kind to decompose: one decomposition each")
    ] = 0,
    heads: Annotated[
        int | None, typer.Option(help="attention heads of a model whose config.json does not say it")
    ] = None,
    approximate: Annotated[
        bool, typer.Option(help="iterate where the short side is over 8192 and ranks few")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan; compute and write nothing")] = False,
    report: Annotated[bool, typer.Option(help="write the page and the figures")] = True,
    json: JSON = False,
    fail_on: FAIL_ON = "",
) -> None:
    """Measure what finetuning changed in every weight matrix; write rows, tables, findings and a page.

    Exit codes: 0 done; 1 a finding that --fail-on names; 2 an input that cannot be used, or a matrix that failed.
    """
    from specbasis.comparison.compare import compare as run
    from specbasis.comparison.compare import plan

    wanted = kinds(words(fail_on))
    what: dict[str, Any] = {
        "ranks": ranks,
        "subspace": subspace,
        "roles": words(roles),
        "blocks": numbers(blocks),
        "name": name,
        "common_rows": common_rows,
        "measures": words(measures),
        "workers": workers,
        "memory": memory,
        "stream": stream,
        "nulls": nulls,
        "null_samples": null_samples,
        "heads": heads,
    }
    if dry_run:
        _print_plan(plan(base, tuned, out, **what))
        return
    with progress() as told:
        comparison = run(
            base,
            tuned,
            out,
            **what,
            engine=engine,
            device=device,
            cache=cache,
            approximate=approximate,
            progress=told,
        )
    _tell(comparison, json=json, report=report, wanted=wanted)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that compare wrote")],
    json: JSON = False,
    fail_on: FAIL_ON = "",
) -> None:
    """Print tables and findings of a comparison again, and rebuild its page and figures from the rows alone."""
    wanted = kinds(words(fail_on))
    _tell(specbasis.load(folder), json=json, report=not json, wanted=wanted)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a checkpoint, as in compare")],
    stream: STREAM = False,
) -> None:
    """Print how a model is understood: its stacks of blocks, the role of every matrix, and what has none."""
    checkpoint = specbasis.open_checkpoint(model, stream=stream)
    mapped = model_map(checkpoint)
    covered = coverage(mapped, checkpoint)
    line(f"{model}: {mapped.family.title}", style="bold")
    for tower, family in mapped.towers.items():
        blocks = {m.key.block for m in mapped.matrices if m.parameter.startswith(tower) and m.key.block is not None}
        line(f"{tower or 'the model'}: {len(blocks)} blocks, {family.name}")
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("stack", "role", "matrices", "blocks", "parameters", "share"):
        table.add_column(heading, justify="left" if heading in ("stack", "role") else "right", no_wrap=True)
    for (stack, role), members in _by_place(mapped.matrices).items():
        size = sum(m.shape[0] * m.shape[1] for m in members)
        blocks = {m.key.block for m in members if m.key.block is not None}
        share = f"{size / covered.total:.1%}" if covered.total else "–"
        table.add_row(stack, role, str(len(members)), str(len(blocks) or "–"), f"{size:,}", share)
    STDOUT.print(table)
    line(f"{covered.named:.1%} of {covered.total:,} matrix parameters have a named role")
    for note in (*checkpoint.notes, *mapped.notes):
        line(f"note: {note}")
    if mapped.unnamed:
        line(f"no pattern names: {named_parts(mapped.unnamed, 6)}")
    for reason, names in by_reason(
        [{"name": s.name, "side": "both", "reason": s.reason} for s in mapped.skipped]
    ).items():
        line(f"no matrix: {len(names)}, {reason}: {named_parts(names, 2)}")


def _tell(comparison: specbasis.Comparison, *, json: bool, report: bool, wanted: Sequence[str]) -> None:
    """Print what was found and write the page; end with the exit code that it comes to."""
    if json:
        print(dumps(comparison.summary(), indent=1, ensure_ascii=False))  # noqa: T201 - as it is, for other programs
    else:
        print_comparison(comparison)
    if report:
        write_report(comparison, STDERR if json else STDOUT)
    hits = [
        f"{label}: {finding.sentence}"
        for label, findings in comparison.findings.items()
        for finding in findings
        if finding.kind in wanted
    ]
    for hit in hits:
        line(f"failed on {hit}", console=STDERR, style="red")
    if comparison.failed:
        raise typer.Exit(2)
    if hits:
        raise typer.Exit(1)


def print_comparison(comparison: specbasis.Comparison) -> None:
    """Print each pair's table, notes, verdict and findings, and what failed."""
    for pair in comparison.pairs:
        about = comparison.manifest["pairs"][pair]
        STDOUT.print(_summary_table(pair, comparison.summaries[pair]))
        # Not the table's caption, which would wrap at the width of a narrow table.
        line("L left, R right; ?: unresolved ranks, left out of the means", style="italic dim")
        if every := over_all_ranks(comparison.summaries[pair][-1]):
            line(every, style="italic dim")
        if comparison.own[pair]:
            STDOUT.print(_own_table(comparison.own[pair]))
            line(
                "own measures: means over matrices, of the leading 10 ranks where they have ranks",
                style="italic dim",
            )
        for note in about["notes"]:
            line(f"note: {note}")
        for reason, names in by_reason(about["skipped"]).items():
            line(f"not compared: {len(names)}, {reason}: {named_parts(names, 2)}")
        line(comparison.verdicts[pair].sentence, style="bold")
        for finding in comparison.findings[pair]:
            line(f"{SEVERITIES[finding.severity]} {finding.sentence}")
        line("")
    for failure in comparison.failed:
        line(f"error: {failure['error']}", console=STDERR, style="red")


def write_report(comparison: specbasis.Comparison, console: Console = STDOUT) -> None:
    """Write the page and the figures, and say where."""
    page = comparison.report()
    line(f"page: {page}", console=console)


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
    STDOUT.print(table)
    line(
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
    for summary in lines:
        if summary is lines[-1]:
            table.add_section()
        role, matrices, *sides, rsd, update, unresolved = cells(summary)
        both = (f"{left} {right}" for left, right in zip(sides[::2], sides[1::2], strict=True))
        table.add_row(role, matrices, *both, rsd, update, unresolved)
    return table


def _own_table(lines: Sequence[dict[str, Any]]) -> Table:
    """A user's own measures, one line per role."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in lines[0]:
        table.add_column(heading, justify="left" if heading == "role" else "right", overflow="fold")
    for values in lines:
        if values is lines[-1]:
            table.add_section()
        table.add_row(*(v if isinstance(v, str) else number(v, ".4g") for v in values.values()))
    return table


def _by_place(matrices: Iterable[MatrixRef]) -> dict[tuple[str, str], list[MatrixRef]]:
    """Matrices by stack and role, roles in the order of `ROLES`."""
    groups: dict[tuple[str, str], list[MatrixRef]] = {}
    for m in sorted(matrices, key=lambda m: (m.key.stack, ROLES.index(m.key.role))):
        groups.setdefault((m.key.stack, m.key.role), []).append(m)
    return groups
