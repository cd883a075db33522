"""What the verbs print of a comparison, a plan, a model, a population, and a grid of interventions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specbasis.architecture.key import ROLES, MatrixRef
from specbasis.architecture.recognise import coverage, model_map
from specbasis.checkpoint import Checkpoint
from specbasis.cli.common import STDERR, STDOUT, line, note
from specbasis.comparison.compare import Plan
from specbasis.comparison.comparison import Comparison
from specbasis.comparison.population import Population
from specbasis.core.grammar import human_bytes
from specbasis.core.text import named_parts, number_of
from specbasis.figures.strip import layers
from specbasis.figures.summary import SEVERITIES, by_reason, no_problems, over_all_ranks, summary_table
from specbasis.figures.table import Column, Table, number
from specbasis.jobs.cost import rates
from specbasis.jobs.experiments import Row


def print_comparison(comparison: Comparison) -> None:
    """Print each pair's headline, layers, table, notes, verdict and findings, and what failed."""
    for pair in comparison.pairs:
        about = comparison.manifest["pairs"][pair]
        name = f"{pair}: " if len(comparison.pairs) > 1 else ""
        line(name + comparison.headlines[pair], style="bold")
        if (strip := layers(comparison.facts[pair], STDOUT.width)) is not None:
            STDOUT.print(strip, soft_wrap=True)
        line("")
        STDOUT.print(summary_table(comparison.summaries[pair], pair).terminal())
        # Not the table's caption, which would wrap at the width of a narrow table.
        line(
            "means over matrices; L left, R right; RSD: change of values; ?: unresolved",
            style="italic dim",
        )
        if every := over_all_ranks(comparison.summaries[pair][-1]):
            line(every, style="italic dim")
        if comparison.own[pair]:
            STDOUT.print(Table.of(comparison.own[pair], ".4g", total=True).terminal())
            line(
                "own measures: means over matrices, of the leading 10 ranks where they have ranks",
                style="italic dim",
            )
        for text in about["notes"]:
            note(text)
        for reason, names in by_reason(comparison.skipped[pair]).items():
            line(f"not compared: {len(names)}, {reason}: {named_parts(names, 2)}")
        line(comparison.verdicts[pair].sentence, style="bold")
        for finding in comparison.findings[pair]:
            line(f"{SEVERITIES[finding.severity]} {finding.sentence}")
        if not any(finding.severity == "problem" for finding in comparison.findings[pair]):
            line(no_problems(comparison.facts[pair]))
        line("")
    alike: dict[str, list[dict[str, str]]] = {}
    for failure in comparison.failed:  # what befell many matrices is one line
        alike.setdefault(re.sub(r"\d+", "", failure["error"].replace(failure["matrix"], "")), []).append(failure)
    for first, *others in alike.values():
        names = [failure["matrix"] for failure in others]
        more = f"; the same of {len(names)} more: {named_parts(names, 2)}" if names else ""
        line(f"error: {first['error']}{more}", console=STDERR, style="red")


def print_plan(plan: Plan) -> None:
    """One line per shape, and what it comes to."""
    if not plan.tasks:
        line("nothing is left to compute: the folder holds every matrix that is asked for")
        return
    shapes = Counter((task.shape, task.work) for task in plan.tasks)
    columns = (
        Column("out × in"),
        Column("n"),
        Column("Gflop each", ".3g"),
        Column("s each", ".2g"),
        Column("memory each"),
    )
    rows = tuple(
        ("×".join(map(str, shape)), count, work.flops / 1e9, work.seconds(rates()), human_bytes(work.bytes))
        for (shape, work), count in shapes.items()
    )
    STDOUT.print(Table(columns, rows).terminal())
    line(
        f"{number_of(len(plan.tasks), 'matrix')}, {plan.workers} at a time: about {plan.seconds:.3g} s on an idle "
        f"machine, {human_bytes(plan.bytes)} beside the libraries (budget {human_bytes(plan.memory)})"
    )


def print_model(name: str, checkpoint: Checkpoint) -> None:
    """Print how a model is understood."""
    mapped = model_map(checkpoint)
    covered = coverage(mapped, checkpoint)
    line(f"{name}: {mapped.family.title}", style="bold")
    for tower, family in mapped.towers.items():
        blocks = {m.key.block for m in mapped.matrices if m.parameter.startswith(tower) and m.key.block is not None}
        line(f"{tower or 'the model'}: {len(blocks)} blocks, {family.name}")
    columns = (
        *(Column(name, words=True) for name in ("stack", "role")),
        *(Column(name) for name in ("matrices", "blocks")),
        Column("parameters", ","),
        Column("share", ".1%"),
    )
    rows = []
    for (stack, role), members in _by_role(mapped.matrices).items():
        size = sum(m.shape[0] * m.shape[1] for m in members)
        blocks = {m.key.block for m in members if m.key.block is not None}
        share = size / covered.total if covered.total else None
        rows.append((stack, role, len(members), len(blocks) or None, size, share))
    STDOUT.print(Table(columns, tuple(rows)).terminal())
    line(f"{covered.named:.1%} of {covered.total:,} matrix parameters have a named role")
    for text in (*checkpoint.notes, *mapped.notes):
        note(text)
    if mapped.unnamed:
        line(f"no pattern names: {named_parts(mapped.unnamed, 6)}")
    skipped = [{"name": s.name, "side": "both", "reason": s.reason} for s in mapped.skipped]
    for reason, names in by_reason(skipped).items():
        line(f"no matrix: {len(names)}, {reason}: {named_parts(names, 2)}")


def print_population(population: Population) -> None:
    """One line per pair, then the correlations with what they could have shown."""
    columns = {
        "pair": Column("pair", words=True),
        "verdict": Column("verdict", words=True),
        "top10_left": Column("top-10 L", ".3f"),
        "top10_right": Column("R", ".3f"),
        "chance_left": Column("chance", ".3f"),
        "relative_update": Column("‖Δ‖/‖W‖", ".2g"),
        "findings": Column("findings", words=True),
    }
    print_columns(columns, population.models)
    for c in population.correlations:
        part = " ".join(filter(None, (c.modality, c.depth, c.ranks)))
        line(
            f"{c.method} {part}: r {number(c.r, '.2f')} [{number(c.low, '.2f')}, {number(c.high, '.2f')}], "
            f"p {number(c.p, '.3g')}, BH {number(c.q_bh, '.3g')}, BY {number(c.q_by, '.3g')} "
            f"({c.models} models, {c.clusters} {c.unit}s, {c.family} tests)"
        )
    for entry in population.power:
        line(
            f"power{' in ' + entry['modality'] if entry['modality'] else ''}: "
            f"{entry['clusters']} {entry['unit']}s show "
            f"|r| ≥ {number(entry['alone'], '.2f')} 4 times in 5 in one test, "
            f"≥ {number(entry['family'], '.2f')} among {entry['tests']} tests"
        )
    if population.unscored:
        line(f"without a score: {', '.join(population.unscored)}", console=STDERR)


def print_grid(out: Path) -> None:
    """The change of each model's metric by kind and ranks, mean over seeds; * where every draw has p < 0.05."""
    from specbasis.interventions.grid import read_grid
    from specbasis.interventions.stage import BASELINE

    rows, metrics = read_grid(out)
    for label, metric in metrics.items():
        done = [row for row in rows if row.experiment["tuned"] == label and row.error is None]
        before = next(row.values for row in done if row.experiment["kind"] == BASELINE)
        groups = dict.fromkeys(
            (r.experiment["roles"], r.experiment["blocks"]) for r in done if r.experiment["kind"] != BASELINE
        )
        for roles, blocks in groups:
            group = [r for r in done if r.experiment.get("roles") == roles and r.experiment.get("blocks") == blocks]
            where = roles + (f", blocks {blocks}" if blocks else "")
            line(f"{label}: {metric} {before[metric]:.4f}; its change by edits of {where}", style="bold")
            STDOUT.print(_changes(group, metric).terminal())
    line(
        "*: every draw changes it, p < 0.05, paired test; not corrected for the number of cells", style="italic dim"
    )


def print_names(entries: Mapping[str, str]) -> None:
    """Names, each with what it is."""
    STDOUT.print(Table.of([{"name": name, "what it is": about} for name, about in entries.items()]).terminal())


def print_columns(columns: Mapping[str, Column], records: Sequence[Mapping[str, Any]]) -> None:
    """Some fields of records, by name, as a table."""
    rows = tuple(tuple(record[name] for name in columns) for record in records)
    STDOUT.print(Table(tuple(columns.values()), rows).terminal())


def _by_role(matrices: Iterable[MatrixRef]) -> dict[tuple[str, str], list[MatrixRef]]:
    """Matrices by stack and role, roles in the order of `ROLES`."""
    groups: dict[tuple[str, str], list[MatrixRef]] = {}
    for m in sorted(matrices, key=lambda m: (m.key.stack, ROLES.index(m.key.role))):
        groups.setdefault((m.key.stack, m.key.role), []).append(m)
    return groups


def _changes(rows: list[Row], metric: str) -> Table:
    """A line per kind and source, a column per set of ranks."""
    sizes = list(dict.fromkeys(row.experiment["ranks"] for row in rows))
    lines = []
    for kind, source in dict.fromkeys((row.experiment["kind"], row.experiment["source"]) for row in rows):
        texts = []
        for size in sizes:
            draws = [
                r.values
                for r in rows
                if (r.experiment["kind"], r.experiment["source"], r.experiment["ranks"]) == (kind, source, size)
                and metric in r.values
            ]
            change = sum(v[f"{metric}.change"] for v in draws) / max(1, len(draws))
            sure = draws and all(v.get(f"{metric}.p", 1.0) < 0.05 for v in draws)
            texts.append(f"{change:+.3f}{'*' if sure else ' '}" if draws else "")
        lines.append((f"{kind} {source}".strip(), *texts))
    return Table((Column("", words=True), *(Column(str(size)) for size in sizes)), tuple(lines))
