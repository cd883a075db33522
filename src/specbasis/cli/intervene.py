"""Verbs of interventions: edit a checkpoint, run a grid, draw the paper's figures from its rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from specbasis.cli.common import STDERR, STDOUT, line, numbers, progress, words
from specbasis.cli.reproduce import reproduce_app
from specbasis.core.edits import KINDS, Edit
from specbasis.core.errors import InputError
from specbasis.interventions.live import blocks_and_roles
from specbasis.interventions.stored import write_edited
from specbasis.jobs.experiments import Row

_KINDS = "; ".join(f"{name}: {kind.about}" for name, kind in KINDS.items())

BASE = Annotated[str, typer.Argument(metavar="BASE", help="pretrained checkpoint, as in compare")]
KIND = Annotated[str, typer.Option(help=_KINDS)]
SIDES = Annotated[str, typer.Option(help="both, left or right")]
GROUPS = Annotated[
    float, typer.Option(help="move ranks together whose relative distance is below this; 0: single ranks")
]
RESULTS = Annotated[Path, typer.Argument(metavar="DIR", help="a folder that intervene wrote")]


def edit(
    base: BASE,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="the finetune that is edited")],
    out: Annotated[Path, typer.Option("--out", help="new folder for the edited model")],
    kind: KIND = "swap",
    ranks: Annotated[str, typer.Option(help="n leading ranks, -n trailing ones, k:m, or all")] = "all",
    roles: Annotated[str, typer.Option(help="only these roles, e.g. ffn,attention.query")] = "ffn,attention",
    blocks: Annotated[str, typer.Option(help="only these blocks, e.g. 0,10-11")] = "",
    name: Annotated[str, typer.Option(help="only matrices whose name matches this pattern (* and ?)")] = "",
    source: Annotated[str, typer.Option("--from", help="take vectors from this model; default: BASE")] = "",
    sides: SIDES = "both",
    seed: Annotated[int, typer.Option(help="of the random kinds")] = 0,
    factor: Annotated[float, typer.Option(help="of the kind rescale")] = 1.0,
    groups: GROUPS = 0.0,
) -> None:
    """Write a finetune with some of its singular vectors replaced or masked; transformers loads the folder."""
    with progress() as tell:
        written = write_edited(
            base,
            tuned,
            Edit(kind, _ranks(ranks), sides, seed, factor, groups),
            out,
            other=source or None,
            admits=blocks_and_roles(words(roles), numbers(blocks), name),
            progress=tell,
        )
    line(f"edited model: {written}")


def intervene(
    base: BASE,
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]TASK=TUNED...",
            help="a finetune and how it is judged: glue:sst2=DIR, anarcii:tcr=FILE, text:FILE=DIR, images:DIR=DIR, "
            "table:FILE=DIR, harness:TASKS=DIR",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder for rows and figures; the same command continues it")],
    kinds: Annotated[str, typer.Option(help=f"{_KINDS}; random and zero are always there")] = (
        "swap,random_complement,noise"
    ),
    ranks: Annotated[
        str, typer.Option(help="sets of ranks: n leading, k:m, all; -n trailing ones, for zero alone")
    ] = "1,5,10,30,100,200,all",
    roles: Annotated[str, typer.Option(help="groups edited together; + joins roles in one")] = "ffn,attention",
    blocks: Annotated[str, typer.Option(help="groups of blocks apart by ;, e.g. '0-5;6-11'; empty: all")] = "",
    sources: Annotated[str, typer.Option(help="take vectors from these only: base and labels; empty: all")] = "",
    seeds: Annotated[int, typer.Option(help="draws of each random kind")] = 3,
    sides: SIDES = "both",
    groups: GROUPS = 0.0,
    limit: Annotated[int | None, typer.Option(help="judge on this many examples")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="GLUE in its official layout; default: from the Hub")
    ] = None,
    text: Annotated[str, typer.Option(help="columns of a table that hold the one or two texts")] = "",
    label: Annotated[str, typer.Option(help="its column with the label")] = "",
    resamples: Annotated[int, typer.Option(help="of the intervals and tests")] = 1000,
    cache: Annotated[Path | None, typer.Option(help="folder of decompositions")] = None,
    cache_size: Annotated[str, typer.Option(help="what that folder may take")] = "20GB",
    workers: Annotated[int, typer.Option(help="processes side by side, each with its own model")] = 1,
    figures: Annotated[bool, typer.Option(help="draw the figures and the table of sharing")] = True,
) -> None:
    """Judge finetunes while their singular vectors are swapped, randomised and masked, against controls."""
    from specbasis.figures.interventions_report import write_figures
    from specbasis.interventions import Subject, judge
    from specbasis.interventions import intervene as run

    found: dict[str, Subject] = {}
    options = {
        "data_dir": None if data_dir is None else str(data_dir),
        "limit": limit,
        "text": words(text),
        "label": label,
    }
    for given in subjects:
        name, task, source = _subject(given)
        if name in found:
            raise InputError(f"two models are called {name!r}; write LABEL=TASK=TUNED")
        found[name] = Subject(source, judge(task, **options))
    with progress() as tell:
        rows = run(
            base,
            found,
            out,
            kinds=words(kinds),
            ranks=[_ranks(word) for word in words(ranks)],
            roles=words(roles),
            blocks=[part.strip() for part in blocks.split(";")],
            sources=words(sources) or None,
            seeds=seeds,
            sides=sides,
            groups=groups,
            resamples=resamples,
            cache=cache,
            cache_size=cache_size,
            workers=workers,
            progress=tell,
        )
    _print_grid(out)
    if figures:
        models = {"base": base, **{label: subject.source for label, subject in found.items()}}
        for path in write_figures(out, models=models, cache=cache):
            line(f"written: {path}")
    failed = [row for row in rows if row.error is not None]
    for row in failed[:10]:
        line(f"error: {' '.join(map(str, row.experiment.values()))}: {row.error}", console=STDERR, style="red")
    if failed:
        line(f"{len(failed)} of {len(rows)} cells failed; the same command tries them again", console=STDERR)
        raise typer.Exit(2)


def _figure_verb(name: str, about: str) -> Callable[..., None]:
    def verb(
        folder: RESULTS,
        only: Annotated[str, typer.Option(help="only these models, e.g. sst2,cola")] = "",
        out: Annotated[Path | None, typer.Option("--out", help="folder to write; default: DIR/figures")] = None,
    ) -> None:
        from specbasis.figures.interventions_report import write_figures

        for path in write_figures(folder, (name,), only=words(only), out=out):
            line(f"written: {path}")

    verb.__doc__ = about
    return verb


for _name, _about in {
    "fig2d": "Fig. 2D: pretrained singular vectors in finetuned models, against random vectors and zero.",
    "fig2e": "Fig. 2E: change of the metric by singular vectors of other tasks.",
    "fig12": "Fig. 12: pretrained to finetuned, feed-forward layers (the grid's first group).",
    "fig13": "Fig. 13: singular vectors of other tasks, feed-forward layers (the first group).",
    "fig14": "Fig. 14: pretrained to finetuned, attention (the second group).",
    "fig15": "Fig. 15: singular vectors of other tasks, attention (the second group).",
    "fig17": "Fig. 17: masking from the leading ranks down, and from the trailing ranks up.",
    "sharing": "Sharing across tasks as a number: table and figure of every swap, with overlap of subspaces.",
}.items():
    reproduce_app.command(_name)(_figure_verb(_name, _about))


def _subject(text: str) -> tuple[str, str, str]:
    """Label, task and source of LABEL=TASK=TUNED or TASK=TUNED."""
    found = re.fullmatch(r"(?:([^=:]+)=)?([a-z]+:[^=]+)=(.+)", text)
    if not found:
        raise InputError(f"got {text!r}; want TASK=TUNED, such as glue:sst2=finetuned/sst2, or LABEL=TASK=TUNED")
    label, task, source = found.groups()
    return label or Path(task.partition(":")[2]).stem, task, source


def _ranks(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d{1,7}", text, re.ASCII) else text


def _print_grid(out: Path) -> None:
    """The change of each model's metric by kind and ranks, mean over seeds; * where every draw has p < 0.05."""
    from specbasis.interventions.grid import BASELINE, read_grid

    rows, metrics = read_grid(out)
    for label, metric in metrics.items():
        mine = [row for row in rows if row.experiment["tuned"] == label and row.error is None]
        before = next(row.values for row in mine if row.experiment["kind"] == BASELINE)
        groups = dict.fromkeys(
            (r.experiment["roles"], r.experiment["blocks"]) for r in mine if r.experiment["kind"] != BASELINE
        )
        for roles, blocks in groups:
            cells = [r for r in mine if r.experiment.get("roles") == roles and r.experiment.get("blocks") == blocks]
            where = roles + (f", blocks {blocks}" if blocks else "")
            line(f"{label}: {metric} {before[metric]:.4f}; its change by edits of {where}", style="bold")
            STDOUT.print(_changes(cells, metric))
    line(
        "*: every draw changes it, p < 0.05, paired test; not corrected for the number of cells", style="italic dim"
    )


def _changes(cells: list[Row], metric: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    sizes = list(dict.fromkeys(row.experiment["ranks"] for row in cells))
    table.add_column("")
    for size in sizes:
        table.add_column(str(size), justify="right", no_wrap=True)
    for kind, source in dict.fromkeys((row.experiment["kind"], row.experiment["source"]) for row in cells):
        texts = []
        for size in sizes:
            values = [
                r.values
                for r in cells
                if (r.experiment["kind"], r.experiment["source"], r.experiment["ranks"]) == (kind, source, size)
                and metric in r.values
            ]
            change = sum(v[f"{metric}.change"] for v in values) / max(1, len(values))
            sure = values and all(v.get(f"{metric}.p", 1.0) < 0.05 for v in values)
            texts.append(f"{change:+.3f}{'*' if sure else ' '}" if values else "")
        table.add_row(f"{kind} {source}".strip(), *texts)
    return table
