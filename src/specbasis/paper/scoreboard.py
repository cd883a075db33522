"""The scoreboard as a page: the table of Tab. 1's form, the front, and scores against what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specbasis.figures import kit
from specbasis.figures.kit import Figure
from specbasis.figures.table import Column, Table, number
from specbasis.finetuning.tasks import GLUE
from specbasis.jobs.experiments import Row
from specbasis.paper.table1 import Comparison, Line, lines, title_of
from specbasis.paper.table1_page import markdown

COSTS: Mapping[str, tuple[str, float]] = {
    "trained": ("trained numbers, with the head", 1),
    "seconds": ("processor time of an epoch (s)", 1),
    "memory": ("peak memory (MB)", 1e6),
    "after": ("loss on held-back text afterwards (nats)", 1),
}
"""What a score is set against: its axis, and the unit."""


def write(plan: Comparison, rows: Sequence[Row], base: str, out: str | Path) -> list[Path]:
    """Write ``scoreboard.md`` into the folder of the rows, and its ``.png`` and ``.svg`` where anything ran."""
    table = lines(plan, rows)
    ran = [line for line in table if line.scores]
    page = [markdown(plan, table, rows, base), *(_front(plan, ran) if ran else [])]
    return kit.write_page(Path(out) / f"{plan.name}.md", page, lambda: _figure(plan, ran, base) if ran else None)


def cost_of(line: Line, cost: str) -> float | None:
    """What a method costs, in the unit of `COSTS`; None where that is not known."""
    if cost == "trained":
        return (line.values["adapter"] or 0) + (line.values["head"] or 0)
    value = line.values[cost]
    return None if value is None else value / COSTS[cost][1]


def front(table: Sequence[Line], cost: str = "trained") -> list[Line]:
    """The methods of a task that none beats with as little or less of a cost, the cheapest first."""
    kept: list[Line] = []
    known = [(at, line) for line in table if (at := cost_of(line, cost)) is not None]
    for _, line in sorted(known, key=lambda pair: (pair[0], -pair[1].mean)):
        if not kept or line.mean > kept[-1].mean:
            kept.append(line)
    return kept


def _front(plan: Comparison, ran: Sequence[Line]) -> list[str]:
    names = [Column(name, words=True) for name in ("task", "method")]
    names += [Column(name) for name in ("trained: method", "head", "score")]
    body = [
        (
            GLUE[task].title,
            title_of(line.method),
            *(number(line.values[name], ",.0f") for name in ("adapter", "head")),
            _shown(line),
        )
        for task in plan.tasks
        for line in front([line for line in ran if line.task == task])
    ]
    text = (
        "Methods that none beats with as few trained numbers, by the mean of the seeds that ran; in brackets "
        "95 % over the examples, these seeds. Neighbours whose intervals overlap are not told apart."
    )
    return ["## The front", text, Table(tuple(names), tuple(body)).markdown()]


def _shown(line: Line) -> str:
    ends = "" if line.interval is None else " [{:.1f}, {:.1f}]".format(*(100 * end for end in line.interval))
    return f"{100 * line.mean:.1f}{ends}"


def _figure(plan: Comparison, ran: Sequence[Line], base: str) -> Figure:
    """Every method's score against each of its costs, a row a task; a step line joins the front."""
    from matplotlib.lines import Line2D

    tasks = [task for task in plan.tasks if any(line.task == task for line in ran)]
    methods = [method for method in plan.methods if any(line.method == method for line in ran)]
    look = {m: (kit.COLORS[i % len(kit.COLORS)], "os^Dv"[i // len(kit.COLORS)]) for i, m in enumerate(methods)}
    axes: Any
    figure, axes = kit.free_panels(
        len(tasks),
        len(COSTS),
        (3.0, 2.6),
        f"{plan.name}: {base}. Bars: 95 % over the examples, these seeds; dotted: what has no such cost",
        sharey="row",
    )
    for down, task in zip(axes, tasks, strict=True):
        of_task = [line for line in ran if line.task == task]
        for ax, (cost, (label, _)) in zip(down, COSTS.items(), strict=True):
            places = {line.method: cost_of(line, cost) for line in of_task}
            steps = [line for line in front(of_task, cost) if places[line.method]]
            x, y = [places[line.method] for line in steps], [100 * line.mean for line in steps]
            ax.step(x, y, where="post", color=kit.QUIET, linewidth=1)
            for line in of_task:
                (color, marker), place = look[line.method], places[line.method]
                if not place:  # nothing trained, or not known: a level
                    ax.axhline(100 * line.mean, color=color, linewidth=0.8, linestyle=":")
                    continue
                if line.interval is not None:
                    ax.plot([place] * 2, [100 * end for end in line.interval], color=color, linewidth=1.2)
                ax.plot(place, 100 * line.mean, marker, color=color, markersize=5)
            ax.set_xlabel(label)
            if cost == "trained":
                ax.set_ylabel(f"{GLUE[task].title}: score (%)")
            if not any(places.values()):
                ax.set_xticks([])
            elif cost != "after":
                kit.logarithmic(ax, "x")
                kit.few_decades(ax)
    handles = [Line2D([], [], color=c, marker=m, linestyle="none", markersize=5) for c, m in look.values()]
    names = [title_of(method) for method in methods]
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    return figure
