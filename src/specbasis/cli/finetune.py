"""`finetune`: a base on a task by a method."""

from __future__ import annotations

from typing import Annotated

import typer

import specbasis
from specbasis.cli.common import line
from specbasis.cli.flags import BASE, OUT, listing
from specbasis.finetuning.options import FinetuneOptions

TASK = Annotated[
    str, typer.Option(help="cola sst2 mrpc stsb qqp mnli qnli rte wnli; or a table, or a folder of images")
]


def list_methods() -> None:
    """What `--method help` prints."""
    from specbasis.cli.tables import print_names
    from specbasis.finetuning.methods import METHODS

    print_names({name: method.trains for name, method in METHODS.items()})


METHOD = Annotated[
    str,
    typer.Option(
        help="spectral, lora, pissa, bitfit, full, probe …; `help` lists them",
        callback=listing(list_methods),
        is_eager=True,
    ),
]


def finetune(base: BASE, out: OUT, task: TASK, options: FinetuneOptions, method: METHOD = "spectral") -> None:
    """Finetune a base on a task by a method; write adapter, metrics, manifest and model card."""
    finetuned = specbasis.finetune(base, task, method, out=out, **vars(options))
    from specbasis.finetuning.train import is_main_process

    if not is_main_process():
        return
    metrics = finetuned.metrics
    for name, values in metrics.items():
        if isinstance(values, dict) and name in {"dev", "matched", "mismatched", "selection"}:
            line(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    counts = metrics["parameters"]
    line(f"parameters: {counts['adapter']:,} method, {counts['head']:,} head and pooler, {counts['total']:,} all")
    for note in metrics["notes"]:
        line(f"note: {note}")
    line(f"run: {finetuned.folder}")
