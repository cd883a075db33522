"""What `track` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from specbasis.architecture.selection import Selection
from specbasis.core.options import ADVANCED, option


@dataclass(frozen=True)
class TrackOptions(Selection):
    """Which matrices of a training are followed, and how far down the spectrum.

    With ``approximate`` a matrix whose short side is over 8192 is taken by block Krylov iteration where at most an
    eighth of its ranks is wanted, each checkpoint started from the one before.
    """

    ranks: int = option(32, "leading ranks that are followed", least=1)
    top: int = option(10, "leading ranks that the heat map and the curves average", least=1)
    approximate: bool = option(
        False, "iterate if the short side is over 8192 and few ranks are wanted", panel=ADVANCED
    )
    stream: bool = option(False, "read only the needed bytes from the Hub", panel=ADVANCED, decides=False)
    workers: int | None = option(
        None, "matrices at the same time; default: one for each core", panel=ADVANCED, least=1, decides=False
    )
