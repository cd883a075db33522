"""The methods as data: what each trains, where, how large, and where that is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from specbasis.finetuning.methods.placement import ALL_LINEAR, FEED_FORWARD

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
        builder: which function of `specbasis.finetuning.methods.build` builds it.
        roles: roles of the matrices it adapts by default; empty where it does not go by matrix.
        blocks: blocks it adapts by default; None for all.
        size: default of its one size parameter, ``rank``: the width of the interval, the rank of the update, the
            width of the bottleneck, or the number of trained entries for each row (SVFT). None where it has no
            size, or where it follows the model (spectral: K = 300 at width 768).
        learning_rate: default for tasks that ``schedule`` does not list. The paper gives rates for its own method
            alone; the others' are this project's, in the range of their papers, to be tuned on a split of train.
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
SVFT = "Lingam et al. 2024, arXiv 2405.19597"


def _spectral(name: str, title: str, trains: str, source: str = PAPER, note: str = "", **options: Any) -> Method:
    return Method(
        name, title, trains, source, "spectral", FEED_FORWARD, LAST_TWO,
        learning_rate=2e-4, schedule=TABLE_5, options=options, note=note,
    )  # fmt: skip


def _lora(name: str, title: str, trains: str, source: str = LORA, note: str = "", **options: Any) -> Method:
    return Method(name, title, trains, source, "lora", size=8, options=options, note=note)


def _svft(pattern: str, trains: str, size: int | None) -> Method:
    name = "svft" if pattern == "plain" else f"svft-{pattern}"
    return Method(
        name, f"SVFT ({pattern})", f"{trains} of M in W + U M Vh, all singular vectors", SVFT, "svft", size=size,
        learning_rate=5e-3, options={"pattern": pattern},
    )  # fmt: skip


_ALL = (
    _spectral("spectral", "Spectral", "M in W + U[:, k:m] M Vh[k:m, :], pretrained singular vectors"),
    Method(
        "full", "Full FT", "every parameter", "–", "subset", (),
        learning_rate=2e-5, epochs=5, options={"which": "all"},
    ),
    _lora(
        "pissa", "PiSSA", "B and A in (W − B₀A₀) + B A; B₀A₀ the leading singular triplets of W",
        "Meng et al. 2024, arXiv 2404.02948",
        note="the residual W − B₀A₀ is rounded to the weight's dtype: the start differs from the base by rounding",
        init_lora_weights="pissa",
    ),
    _lora("lora", "LoRA-K", "B and A in W + (α/r) B A; A Kaiming-uniform, B zero"),
    _lora("lora-gaussian", "LoRA-G", "B and A in W + (α/r) B A; A Gaussian, B zero", init_lora_weights="gaussian"),
    Method(
        "adalora", "AdaLoRA", "P, Λ, Q in W + P Λ Q, pruned to the rank on average over the matrices",
        "Zhang et al. 2023, arXiv 2303.10512", "adalora", size=8,
        note="counted at its start, with 1.5 times the rank; the rank is what remains. Its loss contains a penalty "
        "for non-orthogonal P and Q",
    ),
    _lora(
        "dora", "DoRA", "LoRA's B and A, and the norm of each row of the weight",
        "Liu et al. 2024, arXiv 2402.09353",
        note="the row norms are divided out and multiplied in: the start differs from the base by rounding",
        use_dora=True,
    ),
    Method(
        "houlsby", "HAdapter", "bottlenecks behind attention and feed-forward, before the residual sum",
        "Houlsby et al. 2019, arXiv 1902.00751", "houlsby", ("attention.output", "ffn.down"), size=32,
        learning_rate=3e-4, options={"activation": "silu"},
        note="norms stay frozen, as in the library `adapters`; the original trains them",
    ),
    Method(
        "pfeiffer", "PAdapter", "a bottleneck behind the norm of each block's feed-forward network",
        "Pfeiffer et al. 2021, arXiv 2005.00247", "pfeiffer", ("ffn.down",), size=64,
        learning_rate=3e-4, options={"activation": "relu"},
    ),
    Method(
        "bitfit", "BitFit", "every bias of the backbone", "Ben Zaken et al. 2022, arXiv 2106.10199", "subset", (),
        learning_rate=1e-3, options={"which": "bias"},
    ),
    _svft("plain", "the diagonal", None),
    _svft("banded", "the diagonal and `rank` diagonals on each side", 2),
    _svft("random", "as many random entries as in the band", 2),
    _svft("top-k", "as many entries as in the band, where |⟨u_i, v_j⟩| is largest,", 2),
    Method(
        "speclora", "SpecLoRA", "B, A and d in U diag((1 + d) ⊙ S) Vh + (α/r) B A",
        "Si et al. 2025, arXiv 2505.23099", "speclora", size=8,
        note="this project's reading of the published description; d on the leading 128 singular values",
    ),
    _spectral(
        "lora-xs", "LoRA-XS", "R in W + U_r diag(S_r) R Vh_r",
        "Bałazy et al. 2024, arXiv 2405.17604",
        note="the spectral method in units of the singular values; R starts at zero, not near it", scale="sigma",
    ),
    Method(
        "psoft", "PSOFT (free R)", "R in W + U_r diag(S_r) (R − 1) Vh_r", "Wu et al. 2025, FSHrinMArK (OpenReview)",
        "psoft", FEED_FORWARD, LAST_TWO, learning_rate=2e-4, schedule=TABLE_5,
        options={"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False},
        note="R without its orthogonality and scaling vectors: LoRA-XS in other letters. PEFT computes its basis "
        "again on loading and does not check signs: a saved one belongs to one machine",
    ),
    _spectral(
        "spectral-random", "Spectral, random basis", "M in a random orthonormal basis that follows the seed",
        note="control", basis="random",
    ),
    _spectral(
        "spectral-scratch", "Spectral, basis from scratch",
        "M in the singular vectors of a model of the same architecture trained from scratch",
        note="control; wants the checkpoint of that model", basis="from",
    ),
    _spectral(
        "spectral-shuffled", "Spectral, pairs shuffled",
        "M between leading right singular vectors and random other left ones",
        note="control. Shuffling inside the interval alone would be no control: M takes it up", basis="shuffled",
    ),
    _spectral("spectral-middle", "Spectral, middle ranks", "M on the middle ranks", note="control", where="middle"),
    _spectral("spectral-tail", "Spectral, last ranks", "M on the last ranks", note="control", where="tail"),
    Method(
        "probe", "Linear probe", "nothing besides task head and pooler", "–", "subset", (),
        learning_rate=1e-3, options={"which": "none"}, note="the floor",
    ),
)  # fmt: skip

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
"""Every method by name, in the order in which tables show them."""
