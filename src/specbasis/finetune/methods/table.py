"""The methods as data: what each trains, where, how large, and where that is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from specbasis.finetune.methods.placement import ALL_LINEAR, FEED_FORWARD

TABLE_5: Mapping[str, tuple[int, float]] = MappingProxyType(
    {
        "sst2": (20, 1e-4),
        "mrpc": (12, 2e-4),
        "mnli": (5, 2e-4),
        "cola": (30, 3e-4),
        "qnli": (10, 2e-4),
        "qqp": (10, 2e-4),
        "rte": (20, 2e-4),
        "stsb": (10, 2e-4),
    }
)
"""GLUE task → (epochs, learning rate) of the spectral method's runs (Yu et al. 2026, Tab. 5)."""

LAST_TWO = (-2, -1)
"""The last two blocks (Yu et al. 2026, App. M)."""


@dataclass(frozen=True)
class Method:
    """One way to finetune.

    Attributes:
        name: how the command line and result rows call it.
        title: how a table or figure calls it.
        trains: what is trained besides task head and pooler, in a formula where there is one.
        source: where the method is published.
        builder: which function of `specbasis.finetune.methods.attach` builds it.
        roles: roles of the matrices it adapts by default; empty where it does not go by matrix.
        blocks: blocks it adapts by default; None for all.
        size: default of its one size parameter, ``rank``: the width of the interval, the rank of the update, the
            width of the bottleneck, or the number of trained entries for each row (SVFT). None where it has no
            size, or where it follows the model (spectral: K = 300 at width 768).
        learning_rate: default for tasks that ``schedule`` does not list.
        epochs: default for such tasks.
        schedule: task → (epochs, learning rate), as published with the paper's own runs.
        options: settings that make it this method; a caller's options override them.
        note: what a reader of its results should know.
    """

    name: str
    title: str
    trains: str
    source: str
    builder: str
    roles: tuple[str, ...] = ALL_LINEAR
    blocks: tuple[int, ...] | None = None
    size: int | None = None
    learning_rate: float = 5e-4
    epochs: int = 10
    schedule: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def recipe(self, task: str) -> tuple[int, float]:
        """(epochs, learning rate) for a task: the published ones, or the defaults."""
        return self.schedule.get(task, (self.epochs, self.learning_rate))


PAPER = "Yu et al. 2026, Eq. 3, 4, App. M"
LORA = "Hu et al. 2022, arXiv 2106.09685"


def _spectral(name: str, title: str, trains: str, source: str = PAPER, note: str = "", **options: Any) -> Method:
    return Method(
        name, title, trains, source, "spectral", FEED_FORWARD, LAST_TWO,
        learning_rate=2e-4, schedule=TABLE_5, options=options, note=note,
    )  # fmt: skip


_ALL = (
    _spectral("spectral", "Spectral", "M in W + U[:, k:m] M Vh[k:m, :], pretrained singular vectors"),
    Method(
        "full", "Full FT", "every parameter", "–", "subset", (),
        learning_rate=2e-5, epochs=5, options={"which": "all"},
    ),
    Method("lora", "LoRA-K", "B and A in W + (α/r) B A; A Kaiming-uniform, B zero", LORA, "lora", size=8),
    Method(
        "pissa", "PiSSA", "B and A in (W − B₀A₀) + B A; B₀A₀ the leading singular triplets of W",
        "Meng et al. 2024, arXiv 2404.02948", "lora", size=8,
        options={"init_lora_weights": "pissa"},
        note="the residual W − B₀A₀ is rounded to the weight's dtype: the start differs from the base by rounding",
    ),
    Method(
        "bitfit", "BitFit", "every bias of the backbone", "Ben Zaken et al. 2022, arXiv 2106.10199", "subset", (),
        learning_rate=1e-3, options={"which": "bias"},
    ),
    Method(
        "probe", "Linear probe", "nothing besides task head and pooler", "–", "subset", (),
        learning_rate=1e-3, options={"which": "none"},
    ),
)  # fmt: skip

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
"""Every method by name, in the order in which tables show them."""
