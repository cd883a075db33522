"""The table of all measures: which are wanted, what they read, and how docs/rows.md lists them.

python -m specbasis.measures.table docs/rows.md    # write the list of measures in docs/rows.md anew
"""

from __future__ import annotations

import fnmatch
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from types import ModuleType

from specbasis.core.errors import InputError, want
from specbasis.measures import (
    alignment,
    entries,
    heads,
    intruders,
    matching,
    nulls,
    sampled,
    storage,
    update,
    values,
)
from specbasis.measures.measure import ALL, REGISTRY, Measure, Values
from specbasis.measures.own import OwnMeasure, own
from specbasis.measures.triple import Triple

KINDS = (alignment, values, update, entries, storage, intruders, heads, nulls, matching, sampled)
"""The file of each kind, in the order of the rows; measures that were decorated elsewhere come after them."""


def module(m: Measure) -> ModuleType:
    """The file in which a measure's function stands."""
    function = m.function
    while isinstance(function, partial):
        function = function.func
    return sys.modules[function.__module__]


def registered() -> list[Measure]:
    """Every measure that was decorated so far, in the order of the rows."""
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(REGISTRY, key=lambda m: order.get(module(m), len(order)))


def table(*, null: bool = False, sampled: bool = False, owned: Sequence[OwnMeasure] = ()) -> tuple[Measure, ...]:
    """All measures of a comparison, in the order of the rows.

    Raises:
        InputError: an own measure has the name of another one.
    """
    requested = {"", *(["nulls"] if null else []), *(["samples"] if sampled else [])}
    owned_measures = [m for function in owned for m in own(function)]
    builtin = registered()
    taken = {m.name for m in builtin}
    for m in owned_measures:
        if m.name in taken:
            raise InputError(f"own measure {m.name}: the name is taken; give the function another one")
        taken.add(m.name)
    return (*(m for m in builtin if m.when in requested), *owned_measures)


def choose(
    patterns: Sequence[str], *, whole: bool = True, measures: Sequence[Measure] | None = None
) -> tuple[Measure, ...]:
    """The measures that match any of some patterns (``*`` and ``?``), in the table's order; all when none.

    Without ``whole``, only those that can be taken where no more than the leading singular values are known; those
    of attention heads, which decompose every head, only where a pattern asks for them. Those that read no
    decomposition are always among them: they cost nothing, and the verdict rests on them.

    Args:
        patterns: of names.
        whole: whether all singular values are known.
        measures: to choose from; those that are taken by default, when None.

    Raises:
        InputError: a pattern matches no measure.
    """
    measures = table() if measures is None else measures
    names = [m.name for m in measures]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            want("measure", names, pattern)
    return tuple(
        m
        for m in measures
        if (not patterns or m.is_free or any(fnmatch.fnmatchcase(m.name, pattern) for pattern in patterns))
        and (whole or m.leading or not (m.values or "every" in m.reads or ("heads" in m.reads and not patterns)))
    )


def needed(measures: Sequence[Measure], ranks: int) -> dict[str, int | None]:
    """How many vectors some measures read of base, tuned and delta; 0 for values only, None for nothing."""
    return {
        which: ranks
        if any(which in m.vectors for m in measures)
        else 0
        if any(which in m.values for m in measures)
        else None
        for which in ALL
    }


def reads(measures: Sequence[Measure], part: str) -> bool:
    """Whether any of some measures reads "every", "rounding" or "heads" of a `Triple`."""
    return any(part in m.reads for m in measures)


def measure_all(t: Triple, measures: Sequence[Measure]) -> Iterator[tuple[Measure, Values]]:
    """Each of some measures that is defined for these matrices, in their order."""
    for m in measures:
        figures = m.take(t)
        if figures is not None:
            yield m, figures.divided(t.scale) if m.unit == "weight" else figures


# --- the page of docs -------------------------------------------------------------------------------------------

BEGIN, END = "<!-- measures: written by `make rows` -->\n", "<!-- end of measures -->\n"


def listing() -> str:
    """The measures of specbasis as Markdown: a section for each kind, a line for each decorated function."""
    sections = []
    for kind in KINDS:
        lines = [
            "| measure | index | unit | what it is | formula | source |",
            "|---|---|---|---|---|---|",
        ]
        here = (m for m in registered() if module(m) is kind)
        for (line, formula), group in groupby(here, key=lambda m: (m.line, m.formula)):
            variants = list(group)
            names, first = ", ".join(f"`{m.name}`" for m in variants), variants[0]
            cells = [names, first.index, first.unit, line, formula, first.source]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        title, _, text = inspect.cleandoc(kind.__doc__ or "").partition(": ")
        sections.append("\n".join([f"### {title}", "", text[:1].upper() + text[1:], "", *lines, ""]))
    return "\n".join(sections)


def write_listing(path: Path) -> None:
    """Put `listing` between the two marks of a page."""
    text = path.read_text(encoding="utf-8")
    written = re.sub(f"(?<={BEGIN}).*(?={END})", lambda _: "\n" + listing() + "\n", text, flags=re.DOTALL)
    path.write_text(written, encoding="utf-8")
