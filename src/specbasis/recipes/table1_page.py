"""Tab. 1 and the controls as a page of Markdown."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from specbasis.cells import Row
from specbasis.finetune.grid import BEYOND, SCRATCH, Search
from specbasis.finetune.tasks import GLUE
from specbasis.recipes.differences import MEANING
from specbasis.recipes.table1 import OURS, Comparison, Line, lines, rate_from
from specbasis.results import write_whole


@cache
def printed() -> Mapping[str, Any]:
    """Tab. 1 as the paper prints it: {"base", "tasks", "row": [{"method", "parameters", "scores", "average"}]}.

    Source: Yu et al. 2026, Tab. 1.
    """
    return tomllib.loads(files("specbasis").joinpath("recipes/table1.toml").read_text(encoding="utf-8"))


def write(
    what: Comparison, rows: Sequence[Row], factors: Mapping[str, float], base: str, out: str | Path
) -> list[Path]:
    """Write ``NAME.md`` into the folder of the rows, and ``NAME.png`` and ``.svg`` where there are differences."""
    path, found = Path(out) / f"{what.name}.md", lines(what, rows, factors)
    text = markdown(what, found, rows, factors, base)
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
    compared = [line for line in found if line.difference]
    if not compared:
        return [path]
    from specbasis.recipes.finetune_figures import write_differences

    return [path, *write_differences(path.with_suffix(".png"), what, compared, base)]


def markdown(
    what: Comparison, every: Sequence[Line], rows: Sequence[Row], factors: Mapping[str, float], base: str
) -> str:
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
    others = [method for method in what.methods if method != OURS]
    if OURS in what.methods and others:
        parts += [
            "",
            "## Difference to the spectral method",
            "",
            f"Mean over the seeds that both have, in points; {MEANING}",
            "",
            *_grid(["method", *titles], [_difference_row(what, found, method) for method in others]),
        ]
    parts += ["", "## Cost", "", *_cost(what, found)]
    parts += ["", "## Learning rates", "", *_rates(what, rows, factors)]
    parts += ["", *_paper(what)]
    if failed:
        parts += ["", "## Failed", "", *(f"- {_cell_name(row.cell)}: {row.error}" for row in failed)]
    return "\n".join([*parts, ""])


def _score_row(what: Comparison, found: Mapping[tuple[str, str], Line], method: str) -> list[str]:
    adapters = [line.values["adapter"] for (_, m), line in found.items() if m == method and line.seeds]
    size = f"{adapters[0]:,.0f}" if adapters and adapters[0] is not None else "–"
    return [title_of(method), size, *(_score(found[task, method], len(what.seeds)) for task in what.tasks)]


def _difference_row(what: Comparison, found: Mapping[tuple[str, str], Line], method: str) -> list[str]:
    each = [found[task, method].difference for task in what.tasks]
    return [title_of(method), *("–" if one is None else one.shown for one in each)]


def _chance_row(what: Comparison, every: Sequence[Line]) -> list[str]:
    known = {line.task: line.chance for line in every if line.chance is not None}
    return [
        "Always the most frequent class",
        "–",
        *(_number(known.get(task), "{:.2f}", 0.01) for task in what.tasks),
    ]


def _score(line: Line, seeds: int) -> str:
    if line.mean is None:
        return "–"
    spread = "" if line.spread is None else f" ± {100 * line.spread:.2f}"
    return f"{100 * line.mean:.2f}{spread}" + ("" if len(line.seeds) == seeds else f" ({len(line.seeds)})")


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


def _rates(what: Comparison, rows: Sequence[Row], factors: Mapping[str, float]) -> list[str]:
    titles = [GLUE[task].title for task in what.tasks]
    rates = [[f"{_rate(what, factors, task, method):g}" for task in what.tasks] for method in what.methods]
    if what.search is None:
        text = "Each method's own, as published (Tab. 5 for the spectral ones)."
        body = [[title_of(method), *each] for method, each in zip(what.methods, rates, strict=True)]
        return [text, "", *_grid(["method", *titles], body)]
    text = (
        f"Each method's own times a factor, chosen on {GLUE[what.search.task].title} alone: "
        f"{what.search.examples} examples, {what.search.epochs:g} epochs, seed {what.search.seed}, scored on "
        f"{what.search.selection} other examples of train. Tried: "
        f"{', '.join(f'{f:g}' for f in what.search.factors)}, and while the best was at an end, up to {BEYOND} "
        "beyond it. A factor with * is still at an end: a better one may lie beyond."
    )
    body = [
        [title_of(method), *_factor(what, what.search, rows, factors, method), *each]
        for method, each in zip(what.methods, rates, strict=True)
    ]
    return [text, "", *_grid(["method", "tried", "factor", *titles], body)]


def _factor(
    what: Comparison, search: Search, rows: Sequence[Row], factors: Mapping[str, float], method: str
) -> tuple[str, str]:
    """What was tried, and what was chosen."""
    source = rate_from(method.partition("@")[0])
    if source not in factors:
        return "–", "1 (not searched yet)"
    if source != method:
        return "–", f"{factors[source]:g} ({title_of(source)}'s)"
    tried = search.tried(source, rows)
    edge = "*" if len(tried) > 1 and factors[source] in (tried[0], tried[-1]) else ""
    return ", ".join(f"{factor:g}" for factor in tried), f"{factors[source]:g}{edge}"


def _rate(what: Comparison, factors: Mapping[str, float], task: str, method: str) -> float:
    return what.cell(task, method, what.seeds[0], factors).learning_rate


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
    from specbasis.finetune.methods import METHODS

    name, _, rank = method.partition("@")
    title = "Full, random start" if name == SCRATCH else METHODS[name].title
    return f"{title}, K = {rank}" if rank else title


def _cell_name(cell: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in cell.items())


def _grid(headings: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in headings[1:])]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *body)]
