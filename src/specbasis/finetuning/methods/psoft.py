"""PSOFT with a free core, in PEFT."""

from __future__ import annotations

from typing import Any

from peft import PsoftConfig

from specbasis.finetuning.methods.kit import Request, register
from specbasis.finetuning.methods.sites import FEED_FORWARD
from specbasis.finetuning.methods.spectral import LAST_TWO, TABLE_5, Spectral


class Psoft(Spectral):
    """R in W + U diag(S) (R − 1) Vh, as wide as the spectral method, on the leading ranks."""

    config = PsoftConfig
    takes_interval = False

    def fields(self, request: Request) -> dict[str, Any]:
        """The rank; the update is scaled by psoft_alpha / r = 1."""
        return {"r": request.rank, "psoft_alpha": request.rank, **request.options}

    def counted(self, request: Request) -> Request:
        """The same."""
        return request


register(
    Psoft(
        name="psoft",
        title="PSOFT (free R)",
        trains="R in W + U_r diag(S_r) (R − 1) Vh_r",
        source="Wu et al. 2025, FSHrinMArK (OpenReview)",
        roles=FEED_FORWARD,
        blocks=LAST_TWO,
        learning_rate=2e-4,
        schedule=TABLE_5,
        options={"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False},
        note="R without its orthogonality and scaling vectors: LoRA-XS in other letters. PEFT computes its basis "
        "again on loading and does not check signs: a saved one belongs to one machine",
    )
)
