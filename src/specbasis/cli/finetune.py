"""`finetune`, and of `reproduce` the experiments that finetune: table1, controls, fig5a, fig5b, fig5c."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from specbasis.cli.common import STDERR, line, numbers, progress, words
from specbasis.cli.reproduce import reproduce_app
from specbasis.core.errors import InputError
from specbasis.finetuning import Finetuned
from specbasis.finetuning import finetune as run_finetune
from specbasis.finetuning.grid import SCRATCH, Search, Setting, kept_model, stored
from specbasis.finetuning.tasks import GLUE, task_named
from specbasis.jobs.experiments import Row, read_experiments
from specbasis.jobs.progress import Progress
from specbasis.paper import fig5, table1, table1_page

BASE = Annotated[str, typer.Argument(metavar="BASE", help="pretrained: folder, hub:org/name, timm:name, pkg:…")]
DATA_DIR = Annotated[
    Path | None, typer.Option("--data-dir", help="GLUE in its official layout; default: from the Hub")
]
CACHE = Annotated[
    Path | None,
    typer.Option("--cache-prefix", help="folder: what lies below the first trained module runs once an example"),
]
GROUPED = Annotated[bool, typer.Option("--group-by-length", help="batches of texts of like length: less padding")]


def finetune(
    base: BASE,
    out: Annotated[Path, typer.Option("--out", help="folder of the run; the same command continues it")],
    task: Annotated[
        str, typer.Option(help="cola sst2 mrpc stsb qqp mnli qnli rte wnli; or a table, or a folder of images")
    ],
    method: Annotated[str, typer.Option(help="spectral, lora, pissa, bitfit, full, probe …")] = "spectral",
    seed: Annotated[int, typer.Option(help="of head, order, dropout and the method's random parts")] = 42,
    data_dir: DATA_DIR = None,
    dev: Annotated[Path | None, typer.Option(help="dev set of your own task; default: a tenth of it")] = None,
    text: Annotated[str, typer.Option(help="column of your table with the text, or two: premise,hypothesis")] = "",
    label: Annotated[str, typer.Option(help="column of your table with the label")] = "",
    regression: Annotated[bool, typer.Option("--regression", help="the label is a number")] = False,
    examples: Annotated[int | None, typer.Option(help="train on a fixed part of train, of this size")] = None,
    epochs: Annotated[float | None, typer.Option(help="default: Tab. 5's, or the method's")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="default: Tab. 5's, or the method's")] = None,
    batch_size: Annotated[int, typer.Option(help="of one process")] = 16,
    max_length: Annotated[int, typer.Option(help="tokens at which texts are cut")] = 256,
    warmup: Annotated[float, typer.Option(help="share of the steps")] = 0.06,
    weight_decay: Annotated[float, typer.Option(help="of AdamW")] = 0.0,
    rank: Annotated[int | None, typer.Option(help="size of the method; default: its own")] = None,
    interval: Annotated[str, typer.Option(help="ranks of the spectral methods, e.g. 0:300")] = "",
    blocks: Annotated[str, typer.Option(help="blocks to adapt, e.g. 10-11; default: the method's own")] = "",
    checkpoint: Annotated[str | None, typer.Option(help="model whose singular vectors are used")] = None,
    select: Annotated[str, typer.Option(help="last epoch, or the best on a fixed part of train")] = "last",
    precision: Annotated[str, typer.Option(help="float32, bf16, fp16")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="less memory, more time")
    ] = False,
    group_by_length: GROUPED = False,
    cache_prefix: CACHE = None,
    held_back: Annotated[
        Path | None, typer.Option(help="texts, one a line, for the pretraining loss before and after")
    ] = None,
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb, trackio …")] = "none",
) -> None:
    """Finetune a base on a task by a method; write adapter, metrics, manifest and model card."""
    _extras()
    found: Finetuned = run_finetune(
        base,
        task,
        method,
        out=out,
        seed=seed,
        data_dir=data_dir,
        dev=dev,
        text=words(text),
        label=label,
        regression=regression,
        examples=examples,
        rank=rank,
        interval=_interval(interval),
        blocks=numbers(blocks) if blocks else None,
        checkpoint=checkpoint,
        cache_prefix=cache_prefix,
        held_back=held_back,
        report_to=report_to,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        warmup=warmup,
        weight_decay=weight_decay,
        select=select,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        group_by_length=group_by_length,
    )
    from specbasis.finetuning.train import is_main_process

    if not is_main_process():
        return
    metrics = found.metrics
    for name, values in metrics.items():
        if isinstance(values, dict) and name in {"dev", "matched", "mismatched", "selection"}:
            line(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    counts = metrics["parameters"]
    line(f"parameters: {counts['adapter']:,} method, {counts['head']:,} head and pooler, {counts['total']:,} all")
    for note in metrics["notes"]:
        line(f"note: {note}")
    line(f"run: {found.folder}")


# --- reproduce ----------------------------------------------------------------------------------------------------

MODEL = Annotated[str, typer.Option("--base", help="the pretrained model")]
GRID_OUT = Annotated[Path, typer.Option("--out", help="folder of the rows; the same command continues it")]
SEEDS = Annotated[str, typer.Option(help="e.g. 42,43,44")]
EPOCHS = Annotated[str, typer.Option(help="for all tasks, or for some: 3, or sst2=2,rte=3; default: the paper's")]
EXAMPLES = Annotated[str, typer.Option(help="train on a fixed part: 8000, or sst2=8000; default: all")]
ONLY_TABLE = Annotated[bool, typer.Option("--no-run", help="rebuild table or figure from the rows that are there")]
SEARCH = Annotated[
    str, typer.Option(help="factors on each method's learning rate, tried on a part of train: 1,4,16")
]
SEARCH_TASK = Annotated[
    str, typer.Option(help="task on which learning rates are searched for all; default: each on its own")
]
TASKS = Annotated[str, typer.Option(help="e.g. sst2,rte; default: the paper's")]
METHODS = Annotated[str, typer.Option(help="e.g. spectral,spectral@300,lora; default: all")]
KEEP = Annotated[
    str, typer.Option(help="methods whose model of the first seed is left in OUT-models, e.g. full,spectral")
]


def _comparison_verb(name: str) -> Callable[..., None]:
    def verb(
        out: GRID_OUT,
        base: MODEL = table1.BASE,
        tasks: TASKS = "",
        methods: METHODS = "",
        seeds: SEEDS = "42",
        data_dir: DATA_DIR = None,
        epochs: EPOCHS = "",
        examples: EXAMPLES = "",
        search: SEARCH = "",
        search_task: SEARCH_TASK = "",
        keep: KEEP = "",
        group_by_length: GROUPED = False,
        cache_prefix: CACHE = None,
        no_run: ONLY_TABLE = False,
    ) -> None:
        _comparison(**{**locals(), "name": name})

    return verb


for _name, _about in (
    ("table1", "Tab. 1: every method on every task over seeds, as a grid that resumes; missing runs stay empty."),
    ("controls", "The spectral adapter in other bases (random, from scratch, shuffled, other ranks)."),
):
    reproduce_app.command(_name, help=_about)(_comparison_verb(_name))


def _comparison(
    name: str, *, out: Path, base: str, no_run: bool, search: str, search_task: str, **given: Any
) -> None:
    _extras()
    what = table1.comparison(
        name,
        tasks=words(given["tasks"]),
        methods=words(given["methods"]),
        seeds=numbers(given["seeds"], "--seeds"),
        epochs=_by_task(given["epochs"], "--epochs", float),
        examples=_by_task(given["examples"], "--examples", int),
        search=_search(search, search_task),
    )
    setting = _setting(base, out, given, what.seeds)
    kept = _kept(words(given["keep"]), what.methods)
    if no_run:
        searched = stored(what.search_cells(read_experiments(out)), out)
        factors = what.factors(searched)
        rows = [*searched, *stored(what.cells(factors), out)]
    else:
        with progress() as told:
            rows, factors = table1.run(what, setting, out, _told(told))
    paths = table1_page.write(what, rows, factors, setting.base_name, out)
    line(paths[0].read_text(encoding="utf-8"))
    for path in paths:
        line(f"written: {path}")
    for method, task in [(method, task) for method in kept for task in what.tasks]:
        folder = kept_model(setting, method, task)
        there = (folder / "method.json").is_file()
        missing = f"not kept: {method} on {task}, whose row is older than --keep, or missing"
        line(f"kept: {folder}" if there else missing)
    _exit_on_failures([row for row in rows if row.error is not None])


def _figure_verb(name: str) -> Callable[..., None]:
    def verb(
        out: GRID_OUT,
        base: MODEL = table1.BASE,
        task: Annotated[str, typer.Option(help="a GLUE task")] = fig5.TASK,
        seeds: SEEDS = "42",
        data_dir: DATA_DIR = None,
        epochs: Annotated[float, typer.Option(help="passes over train")] = fig5.EPOCHS,
        learning_rate: Annotated[float, typer.Option(help="at its peak")] = fig5.LEARNING_RATE,
        examples: Annotated[int | None, typer.Option(help="train on a fixed part of this size")] = None,
        group_by_length: GROUPED = False,
        cache_prefix: CACHE = None,
        no_run: ONLY_TABLE = False,
    ) -> None:
        _extras()
        from specbasis.finetuning.base import shape_of

        ranks, blocks = shape_of(base)
        what = fig5.panel(
            name,
            ranks=ranks,
            blocks=blocks,
            task=task,
            seeds=numbers(seeds, "--seeds"),
            epochs=epochs,
            learning_rate=learning_rate,
            examples=examples,
        )
        given = {"data_dir": data_dir, "group_by_length": group_by_length, "cache_prefix": cache_prefix}
        setting = _setting(base, out, given, what.seeds)
        if no_run:
            rows = stored(what.cells(), out)
        else:
            with progress() as told:
                rows = fig5.run(what, setting, out, _told(told))
        paths = fig5.write(what, rows, setting.base_name, out)
        line(paths[0].read_text(encoding="utf-8"))
        for path in paths:
            line(f"written: {path}")
        _exit_on_failures([row for row in rows if row.error is not None])

    return verb


for _name, _about in (
    ("fig5a", "Fig. 5A: the spectral adapter's rank budget, [0, m) for m = 50 … 700 or the model's limit."),
    ("fig5b", "Fig. 5B: the spectral adapter's place among the blocks, two at a time."),
    ("fig5c", "Fig. 5C: a block of 200 ranks, from the first to the last."),
):
    reproduce_app.command(_name, help=_about)(_figure_verb(_name))


def _setting(base: str, out: Path, given: dict[str, Any], seeds: Sequence[int]) -> Setting:
    return Setting(
        base,
        None if given["data_dir"] is None else str(given["data_dir"]),
        {"group_by_length": True} if given["group_by_length"] else {},
        None if given["cache_prefix"] is None else str(given["cache_prefix"]),
        models=str(out.with_name(f"{out.name}-models")),
        keep=(SCRATCH, *words(given.get("keep", ""))),
        first_seed=seeds[0],
    )


def _kept(asked: Sequence[str], methods: Sequence[str]) -> list[str]:
    """The methods of a grid, at each of their ranks, whose models are asked for."""
    absent = [name for name in asked if name not in {method.partition("@")[0] for method in methods}]
    if absent:
        raise InputError(f"--keep got {absent[0]!r}; want some of this grid's methods: {', '.join(methods)}")
    return [method for method in methods if method.partition("@")[0] in asked]


def _search(text: str, task: str) -> Search | None:
    try:
        factors = tuple(float(word) for word in words(text))
    except ValueError:
        factors = (0.0,)
    if any(factor <= 0 for factor in factors):
        raise InputError(f"--search got {text!r}; want positive factors, such as 1,4,16")
    return Search(factors, task_named(task).name if task else None) if factors else None


_Number = TypeVar("_Number", int, float)


def _by_task(text: str, flag: str, kind: type[_Number]) -> dict[str, _Number]:
    """A number for each task, from 3 (for every one) or sst2=2,rte=3."""
    found: dict[str, _Number] = {}
    for word in words(text):
        name, equals, value = word.rpartition("=")
        try:
            number = kind(value)
        except ValueError:
            number = kind(0)
        if number <= 0:
            raise InputError(f"{flag} got {word!r}; want a number, or TASK=NUMBER")
        found |= {task_named(name).name: number} if equals else dict.fromkeys(GLUE, number)
    return found


def _interval(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    k, colon, m = text.partition(":")
    if not (colon and k.isdigit() and m.isdigit()):
        raise InputError(f"--interval got {text!r}; want two ranks, such as 0:300")
    return int(k), int(m)


def _told(bar: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """The bar, and a line for each run that ended, where there is no terminal."""

    def tell(now: Progress) -> None:
        bar(now)
        if not STDERR.is_terminal:
            line(f"{now.done:g} of {now.total:g}: {now.name}", console=STDERR)

    return tell


def _exit_on_failures(failed: Sequence[Row]) -> None:
    for row in failed:
        line(f"error: {' '.join(map(str, row.experiment.values()))}: {row.error}", console=STDERR, style="red")
    if failed:
        raise typer.Exit(2)


def _extras() -> None:
    """One line instead of a traceback where the libraries of finetuning are not installed."""
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(f"finetuning needs {error.name}: pip install 'specbasis[finetune]'") from error
