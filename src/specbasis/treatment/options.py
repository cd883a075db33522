"""What `extract` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specbasis.core.errors import InputError
from specbasis.core.grammar import parse_bytes
from specbasis.core.options import ADVANCED, Options, option

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExtractOptions(Options):
    """How large. One of ``rank``, ``energy`` and ``size`` says how large; ``energy`` by default.

    ``size`` and ``energy`` are shared out over the matrices by captured energy per stored byte
    (`treatment.budget`).
    """

    rank: int | None = option(None, "this rank for every matrix", least=1)
    energy: float | None = option(None, "share of the squared update that is kept; default: 0.99", least=0)
    size: str | int | None = option(None, "bytes of the file, e.g. 24MB", metavar="BYTES")
    max_rank: int | None = option(None, "no matrix more than this; servers often take 64", panel=ADVANCED, least=1)
    dtype: str = option("float32", "of the stored factors", panel=ADVANCED, choices=DTYPES)
    carry: bool = option(
        True, "also what no low-rank update can hold: biases, norms, a new head, new tokens", panel=ADVANCED
    )
    cache: str | Path | None = option(
        None, "folder in which decompositions are kept and found again", panel=ADVANCED, decides=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("rank", "energy", "size") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"got {' and '.join(given)}; want one of rank, energy and size")
        if not given:
            object.__setattr__(self, "energy", 0.99)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"got energy = {self.energy}; want a share above 0 and at most 1")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"got size = {self.size}; want more than nothing, such as '24MB'")

    @property
    def budget(self) -> int | None:
        """Bytes of the file's numbers."""
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
    cache_size: str = option("20GB", "what they may take", panel=ADVANCED, decides=False)
