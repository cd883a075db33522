"""Tab. 1 and the controls as a page of Markdown."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import mode
from typing import Any

from specbasis.figures import kit
from specbasis.figures.kit import Axes, Figure
from specbasis.figures.table import Column, Table, number
from specbasis.finetuning.tasks import GLUE
from specbasis.jobs.experiments import Row
from specbasis.paper.differences import MEANING, Difference, percent
from specbasis.paper.floors import FLOORS
from specbasis.paper.grid import BEYOND, search_sizes
from specbasis.paper.table1 import PRESETS, Comparison, Factors, Line, lines, title_of


@cache
def printed() -> Mapping[str, Any]:
    """Tab. 1 as the paper prints it: {"base", "tasks", "row": [{"method", "parameters", "scores", "average"}]}.

    Source: Yu et al. 2026, Tab. 1.
    """
    return tomllib.loads(files("specbasis.paper").joinpath("table1.toml").read_text(encoding="utf-8"))


def write(plan: Comparison, rows: Sequence[Row], base: str, out: str | Path) -> list[Path]:
    """Write ``NAME.md`` into the folder of the rows, and ``NAME.png`` and ``.svg`` where there are differences."""
    table = lines(plan, rows)
    compared = [line for line in table if line.differences]
    page = [markdown(plan, table, rows, base)]
    return kit.write_page(
        Path(out) / f"{plan.name}.md", page, lambda: _figure(plan, compared, base) if compared else None
    )


def markdown(plan: Comparison, table: Sequence[Line], rows: Sequence[Row], base: str) -> str:
    """The table, what it cost, and the paper's own numbers, as Markdown."""
    by_cell = {(line.task, line.method): line for line in table}
    runs = sum(len(line.scores) for line in table)
    parts = [
        f"# {plan.name}: {base}",
        f"{runs} of {len(plan.cells({}))} runs; seeds {', '.join(map(str, plan.seeds))}. "
        f"Scores in percent: mean ± standard deviation over seeds on {_scored(plan)}, which chose nothing; "
        f"– is a run that is missing, (n) fewer seeds than {len(plan.seeds)}.",
        _scores(plan, by_cell),
    ]
    for reference in plan.references:
        body: list[tuple[str | None, ...]] = []
        for method in (method for method in plan.methods if method != reference):
            moves = [by_cell[task, method].differences.get(reference) for task in plan.tasks]
            body.append((title_of(method), *(move.shown if move else None for move in moves)))
        parts += [
            f"## Difference to: {title_of(reference)}",
            f"Mean over the seeds that both have, in points; {MEANING}",
            _by_task(["method"], plan.tasks, body),
        ]
    parts += ["## Cost", _cost(table), "## Learning rates", *_rates(plan, rows)]
    parts += [] if PRESETS[plan.name].own_rates else _paper(plan)
    failures = [
        f"- {' '.join(f'{name}={value}' for name, value in row.experiment.items())}: {row.error}\n"
        for row in rows
        if row.error is not None
    ]
    parts += ["## Failed", "".join(failures)] if failures else []
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _scored(plan: Comparison) -> str:
    """What the scores are of."""
    apart = [GLUE[task].title for task in plan.tasks if plan.held_out and task in plan.examples]
    return f"{plan.held_out:,} held-out examples of train ({', '.join(apart)}) or dev" if apart else "the dev set"


def _by_task(first: Sequence[str], tasks: Sequence[str], body: Sequence[tuple[str | None, ...]]) -> str:
    """A table with some columns and then one for each task."""
    columns = [Column(name) for name in (*first, *(GLUE[task].title for task in tasks))]
    return Table(tuple(columns), tuple(body)).markdown()


def _scores(plan: Comparison, by_cell: Mapping[tuple[str, str], Line]) -> str:
    body: list[tuple[str | None, ...]] = []
    for method in plan.methods:
        cells = [by_cell[task, method] for task in plan.tasks]
        values: Mapping[str, Any] = next((line.values for line in cells if line.scores), {})
        size, whole = values.get("adapter"), values.get("total")
        share = None if size is None or not whole else 100 * size / whole
        scores = [
            percent(list(line.scores.values()))
            + (f" ({n})" if 0 < (n := len(line.scores)) < len(plan.seeds) and method not in FLOORS else "")
            for line in cells
        ]
        body.append((title_of(method), number(size, ",.0f"), number(share, ".3g"), *scores))
    chance = {line.task: line.chance for line in by_cell.values() if line.chance is not None}
    floors = (number(chance.get(task), ".2f", 0.01) for task in plan.tasks)
    body.append(("Always the most frequent class", None, None, *floors))
    return _by_task(["method", "parameters", "% of all"], plan.tasks, body)


def _cost(table: Sequence[Line]) -> str:
    costs = {
        "parameters: method": ("adapter", ",.0f", 1.0),
        "head": ("head", ",.0f", 1.0),
        "peak memory (MB)": ("memory", ".0f", 1e6),
        "epoch (CPU s)": ("seconds", ".1f", 1.0),
        "epoch (wall s)": ("wall", ".1f", 1.0),
        "files (MB)": ("bytes", ".2f", 1e6),
    }
    rows = []
    for line in table:
        if line.scores:
            numbers = [number(line.values[name], form, unit) for name, form, unit in costs.values()]
            loss = " → ".join(number(line.values[name], ".3f") for name in ("before", "after"))
            rows.append((GLUE[line.task].title, title_of(line.method), *numbers, loss))
    names = ("task", "method", *costs, "held-back loss before → after")
    return Table(tuple(Column(name, words=name == "method") for name in names), tuple(rows)).markdown()


def _rates(plan: Comparison, rows: Sequence[Row]) -> list[str]:
    """How learning rates were chosen, in words, and which they are."""
    factors = plan.factors(rows)
    if plan.search is None:
        text = "Each method's own, as published (Tab. 5 for the spectral ones)."
    else:
        where = GLUE[plan.search.task].title if plan.search.task else "each task"
        sizes = {task: search_sizes(plan.search.task or task) for task in plan.tasks}
        tried = ", ".join(f"{factor:g}" for factor in plan.search.factors)
        text = (
            f"Each method's own times a factor, chosen on a part of train of {where} alone: "
            f"{_sizes(sizes, 0)} examples, {plan.search.epochs:g} epochs, seed {plan.search.seed}, scored on "
            f"{_sizes(sizes, 1)} others. Tried: {tried}, and while the best was at an end, up to "
            f"{BEYOND} beyond it. A factor with * is still at an end: a better one may lie beyond."
        )
    body = []
    for method in (method for method in plan.methods if method not in FLOORS):
        source = plan.rate_from(method)
        shared = f" (factor of {title_of(source)})" if plan.search and source != method else ""
        rates = (_rate(plan, rows, factors, task, method) for task in plan.tasks)
        body.append((title_of(method) + shared, *rates))
    return [text, _by_task(["method"], plan.tasks, body)]


def _sizes(sizes: Mapping[str, tuple[int, int]], part: int) -> str:
    """The size of most tasks, and in parentheses the others."""
    most = mode(size[part] for size in sizes.values())
    others = [f"{GLUE[task].title} {size[part]}" for task, size in sizes.items() if size[part] != most]
    return f"{most}" + (f" ({', '.join(others)})" if others else "")


def _rate(plan: Comparison, rows: Sequence[Row], factors: Factors, task: str, method: str) -> str:
    rate = f"{plan.cell(task, method, plan.seeds[0], factors).learning_rate:g}"
    if plan.search is None:
        return rate
    source = plan.rate_from(method)
    if (task, source) not in factors:
        return f"{rate} (not searched yet)"
    factor, tried = factors[task, source], plan.search.tried(task, source, rows)
    edge = "*" if len(tried) > 1 and factor in (tried[0], tried[-1]) else ""
    return f"{rate} (×{factor:g}{edge})"


def _paper(plan: Comparison) -> list[str]:
    """The numbers that the paper prints for these methods and tasks."""
    table = printed()
    shown = [task for task in plan.tasks if task in table["tasks"]]
    names = {method.partition("@")[0] for method in plan.methods if "=" not in method}
    body = [
        (
            row["printed"],
            f"{row['parameters']:g} M",
            *(f"{row['scores'][table['tasks'].index(task)]:.2f}" for task in shown),
        )
        for row in table["row"]
        if row["method"] in names
    ]
    if not body:
        return []
    heading = f"## As the paper prints it ({table['base']}, one seed; Yu et al. 2026, Tab. 1)"
    return [heading, _by_task(["method", "parameters"], shown, body)]


def _figure(plan: Comparison, compared: Sequence[Line], base: str) -> Figure:
    """Score of every method − the spectral method's, in points: mean, its interval over the dev set, and seeds."""
    from matplotlib.lines import Line2D

    tasks = [task for task in plan.tasks if any(line.task == task for line in compared)]
    methods = [method for method in plan.methods if any(line.method == method for line in compared)]
    references = plan.references
    place = {method: -i for i, method in enumerate(methods)}
    size = (2.4 / len(tasks) + 2.6, 1.0 + 0.34 * len(methods))
    figure, axes = kit.free_panels(1, len(tasks), size, f"{plan.name}: {base}", sharey=True)
    for ax, task in zip(axes[0], tasks, strict=True):
        ax.axvline(0, color=kit.QUIET, linewidth=1)
        for line in compared:
            for i, name in enumerate(references):
                if line.task == task and name in line.differences:
                    _draw(ax, line.differences[name], place[line.method] - 0.4 * i, kit.COLORS[i])
        ax.set_title(GLUE[task].title)
        ax.set_xlabel("score − spectral adapter's (points)")
        ax.grid(visible=False, axis="y")
    sizes = {line.method: line.values.get("adapter") for line in compared}
    axes[0][0].set_yticks(
        [y - 0.2 * (len(references) - 1) for y in place.values()],
        [f"{title_of(m)} · {_count(sizes[m])}" for m in methods],
    )
    bars = [Line2D([], [], color=kit.COLORS[i], marker="o", markersize=4) for i in range(len(references))]
    labels = [f"− {title_of(name)}: mean of the seeds, 95 % interval over the dev set" for name in references]
    dot = Line2D([], [], color=kit.QUIET, marker=".", linestyle="none")
    figure.legend([*bars, dot], [*labels, "one seed"], loc="outside lower center", fontsize=8)
    return figure


def _draw(ax: Axes, difference: Difference, y: float, color: str) -> None:
    if difference.interval is not None:
        ax.plot([100 * end for end in difference.interval], [y, y], color=color, linewidth=1.5)
    ax.plot(100 * difference.mean, y, "o", color=color, markersize=4)
    seeds = [100 * score for score in difference.each]
    ax.plot(seeds, [y - 0.16] * len(seeds), ".", color=kit.QUIET, markersize=3)


def _count(parameters: float | None) -> str:
    if parameters is None:
        return "–"
    if parameters < 1e3:
        return f"{parameters:.0f}"
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters / 1e3:.0f}k"
