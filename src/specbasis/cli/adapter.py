"""`adapter`: spectral adapters on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specbasis.cli.common import line
from specbasis.core.text import number_of

ADAPTER = Annotated[Path, typer.Argument(metavar="DIR", help="the folder of a saved spectral adapter")]
ADAPTER_BASE = Annotated[str | None, typer.Option("--base", help="the base checkpoint; default: the adapter's own")]
ADAPTER_OUT = Annotated[Path, typer.Option("--out", help="folder to write")]

adapter_app = typer.Typer(help="Spectral adapters on disk.", no_args_is_help=True)


@adapter_app.command("info")
def adapter_info(folder: ADAPTER) -> None:
    """Print what an adapter holds and what it did to each matrix, from its own file."""
    from specbasis.adapter import folder as folders

    info = folders.info(folder)
    for name in ("base", "basis", "scale"):
        line(f"{name}: {info[name]}")
    line(f"parameters: {info['adapter_parameters']:,} adapter, {info['head_parameters']:,} head and other modules")
    for layer in info["layers"]:
        first, last = layer["interval"]
        line(
            f"{layer['module']}: {layer['weight']}, ranks {first + 1} … {last}, "
            f"{number_of(layer['parameters'], 'coefficient')}, drift {layer['drift']:.3g}, "
            f"alignment {layer['mean_left_alignment']:.3f} / {layer['mean_right_alignment']:.3f}, "
            f"condition {layer['condition']:.3g}, basis {'saved' if layer['basis_saved'] else 'not saved'}"
        )


@adapter_app.command("verify")
def adapter_verify(folder: ADAPTER, base: ADAPTER_BASE = None) -> None:
    """Check every vector of the basis against the base; exit code 2 and the reason if they differ."""
    from specbasis.adapter import folder as folders

    checked = folders.verify(folder, base)
    line(f"verified: {number_of(len(checked), 'matrix')}, each in the basis that it was trained in")


@adapter_app.command("merge")
def adapter_merge(folder: ADAPTER, out: ADAPTER_OUT, base: ADAPTER_BASE = None) -> None:
    """Write the base with an adapter or a run of finetune merged in: a folder that transformers loads."""
    from specbasis.adapter import folder as folders
    from specbasis.finetuning import runs

    is_run = (folder / runs.METRICS).is_file() and (folder / runs.MANIFEST).is_file()
    line(f"merged model: {runs.merge(folder, out, base) if is_run else folders.merge(folder, out, base)}")


@adapter_app.command("export-lora")
def adapter_export_lora(
    folder: ADAPTER,
    out: ADAPTER_OUT,
    base: ADAPTER_BASE = None,
    rank: Annotated[int | None, typer.Option(help="best approximation at this rank; default: exact")] = None,
) -> None:
    """Write the adapter as LoRA, for PEFT without this package."""
    from specbasis.adapter import folder as folders

    line(f"exported: {folders.export_lora(folder, out, base, rank)}")
    if rank is not None:
        kept = folders.kept_shares(folder, rank)
        least = min(kept, key=kept.__getitem__)
        line(f"at rank {rank} each layer keeps {kept[least]:.1%} of its squared update or more (least: {least})")
