"""The spectral adapter through its PEFT bridge, LoRA-XS, PSOFT with a free core, and the controls."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from peft import PsoftConfig
from torch import nn

from specbasis.adapter import SpectralConfig
from specbasis.core.errors import InputError
from specbasis.finetuning.methods.kit import PeftMethod, Request, register
from specbasis.finetuning.methods.sites import ALL_LINEAR, FEED_FORWARD, Site
from specbasis.finetuning.options import Placement

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


class Spectral(PeftMethod):
    """M in W + U[:, k:m] M Vh[k:m, :]. Random bases and pairings follow the seed."""

    config = SpectralConfig
    takes_interval = True
    takes_budget = True

    def sites(self, model: nn.Module, where: Placement) -> tuple[Site, ...]:
        """Its own; a budget is spread over all matrices of the blocks that are asked for, by default of all."""
        if where.budget is not None and where.target_modules is None:
            where = dataclasses.replace(where, roles=where.roles or ALL_LINEAR)
        return super().sites(model, where)

    def default_size(self, sites: Sequence[Site]) -> int:
        """Width of the paper's interval in proportion: 300 of 768 singular values (Yu et al. 2026, §4.4)."""
        return max(1, round(300 / 768 * self.largest_size(sites)))

    def sized(self, sites: Sequence[Site], where: Placement) -> tuple[int | None, tuple[int, int] | None]:
        """The width, and the interval: at the head of the spectrum, in its middle, or at its tail.

        A budget has neither, and all ranks, where none are asked for.
        """
        width, interval = super().sized(sites, where)
        if where.budget is not None and where.rank is None and interval is None:
            return None, None
        if interval is not None:
            return interval[1] - interval[0], interval
        n = self.largest_size(sites)
        assert width is not None
        if width > n:
            raise InputError(
                f"{self.name}: got rank = {width}; the smallest adapted matrix has {n} singular values"
            )
        start = {"head": 0, "middle": (n - width) // 2, "tail": n - width}[self.options.get("where", "head")]
        return width, (start, start + width) if self.takes_interval else None

    def fields(self, request: Request) -> dict[str, Any]:
        """Interval and basis."""
        options = {key: value for key, value in request.options.items() if key != "where"}
        basis = options.get("basis", "pretrained")
        if basis in ("random", "shuffled"):
            options["basis"] = f"{basis}:{request.seed}"
        if basis == "from":
            options["basis"] = f"from:{request.checkpoint}"
        if request.interval is not None:
            return {"interval": request.interval, **options}
        ranks = {re.escape(site.name): (0, site.rank) for site in request.sites}
        return {"interval": min(ranks.values()), "interval_pattern": ranks, **options}

    def counted(self, request: Request) -> Request:
        """The same in the weight's own basis, which has as many coefficients as another."""
        return dataclasses.replace(request, options={})


class Psoft(Spectral):
    """R in W + U diag(S) (R − 1) Vh in PEFT, as wide as the spectral method, on the leading ranks."""

    config = PsoftConfig
    takes_interval = False
    takes_budget = False

    def fields(self, request: Request) -> dict[str, Any]:
        """The rank; the update is scaled by psoft_alpha / r = 1."""
        return {"r": request.rank, "psoft_alpha": request.rank, **request.options}

    def counted(self, request: Request) -> Request:
        """The same."""
        return request


def spectral(
    name: str,
    title: str,
    trains: str,
    *,
    kind: type[Spectral] = Spectral,
    note: str = "",
    source: str = "Yu et al. 2026, Eq. 3, 4, App. M",
    **options: Any,
) -> Spectral:
    """A spectral method at the paper's place: the feed-forward matrices of the last two blocks."""
    return kind(
        name=name,
        title=title,
        trains=trains,
        source=source,
        roles=FEED_FORWARD,
        blocks=LAST_TWO,
        learning_rate=2e-4,
        schedule=TABLE_5,
        options=options,
        note=note,
    )


register(
    spectral("spectral", "Spectral", "M in W + U[:, k:m] M Vh[k:m, :], pretrained singular vectors"),
    spectral(
        "lora-xs",
        "LoRA-XS",
        "R in W + U_r diag(S_r) R Vh_r",
        source="Bałazy et al. 2024, arXiv 2405.17604",
        note="the spectral method in units of the singular values; R starts at zero, not near it",
        scale="sigma",
    ),
    spectral(
        "spectral-random",
        "Spectral, random basis",
        "M in a random orthonormal basis that follows the seed",
        note="control",
        basis="random",
    ),
    spectral(
        "spectral-scratch",
        "Spectral, basis from scratch",
        "M in the singular vectors of a model of the same architecture trained from scratch",
        note="control; wants the checkpoint of that model",
        basis="from",
    ),
    spectral(
        "spectral-shuffled",
        "Spectral, pairs shuffled",
        "M between leading right singular vectors and random other left ones",
        note="control. Shuffling inside the interval alone would be no control: M takes it up",
        basis="shuffled",
    ),
    spectral("spectral-middle", "Spectral, middle ranks", "M on the middle ranks", note="control", where="middle"),
    spectral("spectral-tail", "Spectral, last ranks", "M on the last ranks", note="control", where="tail"),
    spectral(
        "psoft",
        "PSOFT (free R)",
        "R in W + U_r diag(S_r) (R − 1) Vh_r",
        kind=Psoft,
        source="Wu et al. 2025, FSHrinMArK (OpenReview)",
        note="R without its orthogonality and scaling vectors: LoRA-XS in other letters. PEFT computes its basis "
        "again on loading and does not check signs: a saved one belongs to one machine",
        psoft_orth=False,
        psoft_mag_a=False,
        psoft_mag_b=False,
    ),
)
