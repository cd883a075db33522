"""`finetune`: a base on a task by a method."""

from __future__ import annotations

from typing import Annotated

import typer

import specbasis
from specbasis.cli.common import ASIDE, line, note
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
    from specbasis.finetuning.options import require_libraries

    require_libraries()
    from specbasis.finetuning.card import forgetting
    from specbasis.finetuning.costs import EpochLines
    from specbasis.finetuning.train import is_main_process

    callbacks = [] if ASIDE.is_terminal else [EpochLines(lambda text: line(text, console=ASIDE))]
    finetuned = specbasis.finetune(base, task, method, out=out, callbacks=callbacks, **vars(options))

    if not is_main_process():
        return
    metrics = finetuned.metrics
    for name, values in metrics.items():
        if isinstance(values, dict) and name in {"dev", "matched", "mismatched", "selection"}:
            least = metrics.get("majority", {}).get(name, {})  # runs of version 0.1 have none
            shown = [
                f"{metric} {value:.4f}"
                + (f" (most frequent label: {least[metric]:.4f})" if metric in least else "")
                for metric, value in values.items()
            ]
            line(f"{name}: {', '.join(shown)}")
    if metrics["train_loss"]:
        line(f"training loss by epoch: {', '.join(f'{loss:.4f}' for loss in metrics['train_loss'])}")
    line(forgetting(metrics))
    counts = metrics["parameters"]
    line(f"parameters: {counts['adapter']:,} method, {counts['head']:,} head and pooler, {counts['total']:,} all")
    for remark in metrics["notes"]:
        note(remark)
    line(f"run: {finetuned.folder}")
