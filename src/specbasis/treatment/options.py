"""What `extract` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specbasis.core.errors import InputError
from specbasis.core.grammar import parse_bytes
from specbasis.core.options import ADVANCED, Options, option

HOW_LARGE = ("rank", "energy", "size")
FORMS = {
    "lora": (*HOW_LARGE, "max_rank", "dtype"),
    "spectral": (*HOW_LARGE, "max_rank"),
    "delta": ("energy", "size"),
    "dense": (),
}
"""What a finetune can be extracted as, and what of the options says how large that is."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExtractOptions(Options):
    """How large. One of ``rank``, ``energy`` and ``size`` says how large; ``energy`` by default.

    ``size`` and ``energy`` are shared out over the matrices by captured energy per stored byte
    (`treatment.budget`).
    """

    rank: int | None = option(None, "this rank for every matrix, or this size of every core", least=1)
    energy: float | None = option(None, "share of the squared update that is kept; default: 0.99", least=0)
    size: str | int | None = option(None, "largest size of the folder, e.g. 24MB", metavar="BYTES")
    form: str = option(
        "lora",
        "lora: PEFT's folder; spectral: cores in the base's own basis, for PEFT with specbasis; read by specbasis "
        "alone: delta, few bits an entry; dense, what is changed, bit for bit",
        flag="--as",
        choices=tuple(FORMS),
    )
    max_rank: int | None = option(None, "no matrix more than this; servers often take 64", panel=ADVANCED, least=1)
    dtype: str = option("float32", "number format of the stored factors", panel=ADVANCED, choices=DTYPES)
    carry: bool = option(
        True, "also store what no low-rank update can hold: biases, norms, a new head, new tokens", panel=ADVANCED
    )
    steps: int = option(100, "steps of --heal", panel=ADVANCED, least=1)
    learning_rate: float = option(1e-4, "learning rate of --heal", panel=ADVANCED, least=0)
    seed: int = option(42, "seed of --heal", panel=ADVANCED, least=0)
    cache: str | Path | None = option(
        None, "folder in which decompositions are kept and found again", panel=ADVANCED, decides=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in HOW_LARGE if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"got {' and '.join(given)}; want one of rank, energy and size")
        set_ = [*given, *(["max_rank"] if self.max_rank else []), *(["dtype"] if self.dtype != "float32" else [])]
        wrong = [name for name in set_ if name not in FORMS[self.form]]
        if wrong:
            takes = ", ".join(FORMS[self.form]) or "none, since it holds all"
            raise InputError(f"got {' and '.join(wrong)} with --as {self.form}, which takes of these: {takes}")
        if not given and self.form != "dense":
            object.__setattr__(self, "energy", 0.99)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"got energy = {self.energy}; want a share above 0 and at most 1")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"got size = {self.size}; want more than nothing, such as '24MB'")

    @property
    def budget(self) -> int | None:
        """Bytes of the folder."""
        return parse_bytes(self.size) if isinstance(self.size, str) else self.size


@dataclass(frozen=True)
class RepairOptions(Options):
    """How much of the task may be lost, and where decompositions are kept."""

    tolerance: float = option(
        1.0, "points (hundredths of the metric) of the task that the repaired model may lose at most", least=0
    )
    resamples: int = option(1000, "of the intervals", panel=ADVANCED, least=100)
    cache: str | Path | None = option(
        None, "folder in which decompositions are kept and found again", panel=ADVANCED, decides=False
    )
    cache_size: str = option("20GB", "limit for the cache", panel=ADVANCED, decides=False)


DEFAULTS = {
    "mean": (1.0, None),
    "task-arithmetic": (0.4, None),
    "magnitude": (0.4, 0.2),
    "ties": (1.0, 0.2),
    "dare": (0.4, 0.5),
    "tsv-m": (1.0, None),
    "iso-c": (1.0, None),
    "iso-cts": (1.0, None),
    "knots": (1.0, 0.2),
}
"""The methods of `treatment.methods`: scale and density, None where every entry is kept; as their papers advise."""


@dataclass(frozen=True)
class MergeOptions(Options):
    """How finetunes are merged."""

    method: str = option("mean", f"one of {', '.join(DEFAULTS)}", choices=tuple(DEFAULTS))
    scale: float | None = option(
        None, "factor on the result; default: 1, or 0.4 for the sums: task-arithmetic, magnitude and dare", least=0
    )
    density: float | None = option(
        None, "share of entries that ties, knots and magnitude (0.2) and dare (0.5) keep", least=0
    )
    common: float = option(0.8, "share of iso-cts's directions that come from the sum", panel=ADVANCED, least=0)
    calibrate: float | None = option(
        None, "scale down over-counted directions (SVC) to at least 1/this, e.g. 1", panel=ADVANCED, least=0
    )
    seed: int = option(0, "seed of dare", panel=ADVANCED)
    ranks: int = option(10, "leading directions that --dry-run compares", panel=ADVANCED, least=1)
    head: str = option("", "the finetune whose own modules, such as a task head, the model gets", metavar="NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        scale, density = DEFAULTS[self.method]
        if self.density is not None and density is None:
            raise InputError(
                f"got density = {self.density} with {self.method}, which keeps every entry; leave it out"
            )
        object.__setattr__(self, "scale", scale if self.scale is None else self.scale)
        object.__setattr__(self, "density", density if self.density is None else self.density)
        if self.common > 1 or not (self.density is None or 0 < self.density <= 1):
            raise InputError(f"got density = {self.density} and common = {self.common}; want shares, at most 1")
