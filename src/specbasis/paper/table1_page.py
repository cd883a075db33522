"""Tab. 1 and the controls as a page of Markdown."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import mode
from typing import Any

from specbasis.checkpoint.atomic import write_whole
from specbasis.finetuning.grid import BEYOND, SCRATCH, search_sizes
from specbasis.finetuning.tasks import GLUE
from specbasis.jobs.experiments import Row
from specbasis.paper.differences import MEANING, percent
from specbasis.paper.table1 import Comparison, Factors, Line, lines, ours, rate_from


@cache
def printed() -> Mapping[str, Any]:
    """Tab. 1 as the paper prints it: {"base", "tasks", "row": [{"method", "parameters", "scores", "average"}]}.

    Source: Yu et al. 2026, Tab. 1.
    """
    return tomllib.loads(files("specbasis.paper").joinpath("table1.toml").read_text(encoding="utf-8"))


def write(what: Comparison, rows: Sequence[Row], factors: Factors, base: str, out: str | Path) -> list[Path]:
    """Write ``NAME.md`` into the folder of the rows, and ``NAME.png`` and ``.svg`` where there are differences."""
    path, found = Path(out) / f"{what.name}.md", lines(what, rows, factors)
    text = markdown(what, found, rows, factors, base)
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
    compared = [line for line in found if line.differences]
    if not compared:
        return [path]
    from specbasis.paper.finetune_figures import write_differences

    return [path, *write_differences(path.with_suffix(".png"), what, compared, base)]


def markdown(what: Comparison, every: Sequence[Line], rows: Sequence[Row], factors: Factors, base: str) -> str:
    """The table, what it cost, and the paper's own numbers, as Markdown."""
    found = {(line.task, line.method): line for line in every}
    titles = [GLUE[task].title for task in what.tasks]
    wanted, ran = len(found) * len(what.seeds), sum(len(line.seeds) for line in found.values())
    failed = [row for row in rows if row.error is not None]
    parts = [
        f"# {what.name}: {base}",
        "",
        f"{ran} of {wanted} runs; seeds {', '.join(map(str, what.seeds))}. Scores in percent: mean ± standard "
        "deviation over seeds on the dev set, which chose nothing; – is a run that is missing, (n) fewer "
        f"seeds than {len(what.seeds)}.",
        "",
        *_grid(
            ["method", "parameters", *titles],
            [*(_score_row(what, found, method) for method in what.methods), _chance_row(what, every)],
        ),
    ]
    for reference in ours(what.methods):
        others = [method for method in what.methods if method != reference]
        parts += [
            "",
            f"## Difference to: {title_of(reference)}",
            "",
            f"Mean over the seeds that both have, in points; {MEANING}",
            "",
            *_grid(["method", *titles], [_difference_row(what, found, method, reference) for method in others]),
        ]
    parts += ["", "## Cost", "", *_cost(what, found)]
    parts += ["", "## Learning rates", "", *_rates(what, rows, factors)]
    parts += ["", *_paper(what)]
    if failed:
        parts += ["", "## Failed", "", *(f"- {_cell_name(row.experiment)}: {row.error}" for row in failed)]
    return "\n".join([*parts, ""])


def _score_row(what: Comparison, found: Mapping[tuple[str, str], Line], method: str) -> list[str]:
    adapters = [line.values["adapter"] for (_, m), line in found.items() if m == method and line.seeds]
    size = f"{adapters[0]:,.0f}" if adapters and adapters[0] is not None else "–"
    return [title_of(method), size, *(_score(found[task, method], len(what.seeds)) for task in what.tasks)]


def _difference_row(
    what: Comparison, found: Mapping[tuple[str, str], Line], method: str, reference: str
) -> list[str]:
    each = [found[task, method].differences.get(reference) for task in what.tasks]
    return [title_of(method), *("–" if one is None else one.shown for one in each)]


def _chance_row(what: Comparison, every: Sequence[Line]) -> list[str]:
    known = {line.task: line.chance for line in every if line.chance is not None}
    return [
        "Always the most frequent class",
        "–",
        *(_number(known.get(task), "{:.2f}", 0.01) for task in what.tasks),
    ]


def _score(line: Line, seeds: int) -> str:
    missing = line.seeds and len(line.seeds) < seeds
    return percent(line.mean, line.spread) + (f" ({len(line.seeds)})" if missing else "")


def _cost(what: Comparison, found: Mapping[tuple[str, str], Line]) -> list[str]:
    headings = [
        "task",
        "method",
        "parameters: method",
        "head",
        "peak memory (MB)",
        "epoch (CPU s)",
        "epoch (wall s)",
        "files (MB)",
        "held-back loss before → after",
    ]
    body = [
        [
            GLUE[task].title,
            title_of(method),
            _number(line.values.get("adapter"), "{:,.0f}"),
            _number(line.values.get("head"), "{:,.0f}"),
            _number(line.values.get("memory"), "{:.0f}", 1e6),
            _number(line.values.get("seconds"), "{:.1f}"),
            _number(line.values.get("wall"), "{:.1f}"),
            _number(line.values.get("bytes"), "{:.2f}", 1e6),
            f"{_number(line.values.get('before'), '{:.3f}')} → {_number(line.values.get('after'), '{:.3f}')}",
        ]
        for (task, method), line in found.items()
        if line.seeds
    ]
    return _grid(headings, body)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else form.format(value / unit)


def _rates(what: Comparison, rows: Sequence[Row], factors: Factors) -> list[str]:
    if what.search is None:
        text = "Each method's own, as published (Tab. 5 for the spectral ones)."
    else:
        where = "each task" if what.search.task is None else GLUE[what.search.task].title
        sizes = {task: search_sizes(what.search.task or task) for task in what.tasks}
        tried = ", ".join(f"{factor:g}" for factor in what.search.factors)
        text = (
            f"Each method's own times a factor, chosen on a part of train of {where} alone: "
            f"{_by_task(sizes, 0)} examples, {what.search.epochs:g} epochs, seed {what.search.seed}, scored on "
            f"{_by_task(sizes, 1)} others. Tried: {tried}, and while the best was at an end, up to "
            f"{BEYOND} beyond it. A factor with * is still at an end: a better one may lie beyond."
        )
    body = [
        [_searched_as(what, method), *(_rate(what, rows, factors, task, method) for task in what.tasks)]
        for method in what.methods
    ]
    return [text, "", *_grid(["method", *(GLUE[task].title for task in what.tasks)], body)]


def _by_task(sizes: Mapping[str, tuple[int, int]], part: int) -> str:
    """The size of most tasks, and in parentheses the others."""
    most = mode(size[part] for size in sizes.values())
    others = [f"{GLUE[task].title} {size[part]}" for task, size in sizes.items() if size[part] != most]
    return f"{most}" + (f" ({', '.join(others)})" if others else "")


def _searched_as(what: Comparison, method: str) -> str:
    source = rate_from(method)
    return title_of(method) + (f" (factor of {title_of(source)})" if what.search and source != method else "")


def _rate(what: Comparison, rows: Sequence[Row], factors: Factors, task: str, method: str) -> str:
    rate = f"{what.cell(task, method, what.seeds[0], factors).learning_rate:g}"
    if what.search is None:
        return rate
    source = rate_from(method)
    if (task, source) not in factors:
        return f"{rate} (not searched yet)"
    factor, tried = factors[task, source], what.search.tried(task, source, rows)
    edge = "*" if len(tried) > 1 and factor in (tried[0], tried[-1]) else ""
    return f"{rate} (×{factor:g}{edge})"


def _paper(what: Comparison) -> list[str]:
    table = printed()
    shown = [task for task in what.tasks if task in table["tasks"]]
    named = {method.partition("@")[0] for method in what.methods}
    body = [
        [
            row["printed"],
            f"{row['parameters']:g} M",
            *(f"{row['scores'][table['tasks'].index(task)]:.2f}" for task in shown),
        ]
        for row in table["row"]
        if row["method"] in named
    ]
    if not body:
        return []
    return [
        f"## As the paper prints it ({table['base']}, one seed; Yu et al. 2026, Tab. 1)",
        "",
        *_grid(["method", "parameters", *(GLUE[task].title for task in shown)], body),
    ]


def title_of(method: str) -> str:
    """A method's name in tables and figures."""
    from specbasis.finetuning.methods import METHODS

    name, _, rank = method.partition("@")
    title = "Full, random start" if name == SCRATCH else METHODS[name].title
    return f"{title}, K = {rank}" if rank else title


def _cell_name(cell: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in cell.items())


def _grid(headings: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in headings[1:])]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *body)]
