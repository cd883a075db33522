"""Cells of finetuning: a grid's unit is one run, (task, method, seed, learning rate, placement), without its files."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specbasis.finetune.tasks import TaskData, load_task, subset


@dataclass(frozen=True)
class Cell:
    """What tells one run of a grid from the others; None is the default of the method.

    Attributes:
        task: name of a GLUE task.
        method: name in `methods.METHODS`.
        seed: of head, order, dropout, and the method's random parts.
        epochs: passes over train.
        learning_rate: at its peak.
        examples: size of the fixed part of train that is trained on; all of it when None.
        selection: size of the fixed part of train that is scored beside the dev set; the dev set is then not scored.
        rank: the method's size.
        interval: ranks [k, m).
        blocks: blocks that are adapted.
        checkpoint: whose basis is used.
    """

    task: str
    method: str
    seed: int
    epochs: float
    learning_rate: float
    examples: int | None = None
    selection: int | None = None
    rank: int | None = None
    interval: tuple[int, int] | None = None
    blocks: tuple[int, ...] | None = None
    checkpoint: str | None = None

    def row(self) -> dict[str, Any]:
        """As `cells` wants it: flat, and without what is not set."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value is not None
        }


@dataclass(frozen=True)
class Setting:
    """What all cells of a grid share.

    Attributes:
        base: the pretrained model.
        data_dir: GLUE in its official layout; from the Hub when None.
        protocol: fields of `train.Protocol` beside epochs and learning rate.
        cache_prefix: folder of cached activations.
        keep: folder in which the trained models of cells are kept, by `keep_methods`.
        keep_methods: methods whose cells of the first seed are kept.
    """

    base: str
    data_dir: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    cache_prefix: str | None = None
    keep: str | None = None
    keep_methods: Sequence[str] = ()

    def config(self) -> dict[str, Any]:
        """What the manifest of a grid says: nothing that leaves the values as they are."""
        return {"base": Path(self.base).name if Path(self.base).exists() else self.base, "protocol": dict(self.protocol)}


def run_cell(cell: Mapping[str, Any], setting: Setting, keep_seed: int | None = None) -> dict[str, Any]:
    """Run one cell: the metrics of `train.run`."""
    from specbasis.finetune import train

    one = Cell(**{name: tuple(value) if isinstance(value, list) else value for name, value in cell.items()})
    data = _data(one.task, setting.data_dir, one.examples, one.selection)
    protocol = train.Protocol(epochs=one.epochs, learning_rate=one.learning_rate, **setting.protocol)
    placement = train.Placement(
        rank=one.rank, interval=one.interval, blocks=one.blocks, checkpoint=one.checkpoint
    )
    with tempfile.TemporaryDirectory() as scratch:
        kept = setting.keep is not None and one.method in setting.keep_methods and one.seed == keep_seed
        folder = Path(setting.keep or scratch, one.task) if kept else Path(scratch)
        return train.run(
            setting.base,
            data,
            one.method,
            one.seed,
            protocol,
            placement,
            folder,
            cache_prefix=None if setting.cache_prefix is None else Path(setting.cache_prefix),
            held_back=train.held_back_texts(None, data, setting.data_dir),
            resumable=False,
        )


@functools.lru_cache(maxsize=8)
def _data(task: str, data_dir: str | None, examples: int | None, selection: int | None) -> TaskData:
    whole = _whole(task, data_dir)
    data = subset(whole, examples=examples, selection=selection) if examples or selection else whole
    if not selection:
        return data
    return TaskData(data.task, data.train, {"selection": data.selection}, notes=data.notes)


@functools.lru_cache(maxsize=8)
def _whole(task: str, data_dir: str | None) -> TaskData:
    return load_task(task, data_dir=data_dir)
