"""Full finetuning, BitFit, and the linear probe: some of the model's own parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from specbasis.core.errors import InputError
from specbasis.finetuning.methods.kit import Method, Request, open_head, register
from specbasis.finetuning.methods.sites import Site, trained_whole
from specbasis.finetuning.options import Placement


class Subset(Method):
    """Trains all parameters (option ``which`` = "all"), the biases ("bias") or none ("none") of the model's own."""

    adds = False

    def sites(self, model: nn.Module, where: Placement) -> tuple[Site, ...]:
        """The modules whose parameters are trained; a probe has none."""
        return () if self.options["which"] == "none" else super().sites(model, where)

    def trains_all(self, request: Request) -> bool:
        """Full finetuning of the whole model does."""
        return bool(request.options["which"] == "all") and not request.sites

    def attach(self, model: nn.Module, request: Request, head: tuple[str, ...]) -> nn.Module:
        """Open the parameters."""
        which = request.options_over(which="all")["which"]
        model.requires_grad_(False)
        parameters = _chosen(model, which, request.sites, head)
        if which != "none" and not parameters:
            raise InputError(f"{self.name}: the adapted modules have no biases; use another method")
        for p in parameters:
            p.requires_grad_(True)
        open_head(model, head)
        return model

    def count(self, model: nn.Module, sites: Sequence[Site], rank: int | None) -> int:
        """Parameters that are opened, which are the model's own."""
        return sum(p.numel() for p in _chosen(model, self.options["which"], sites, tuple(trained_whole(model))))


def _chosen(model: nn.Module, which: str, sites: Sequence[Site], head: tuple[str, ...]) -> list[nn.Parameter]:
    """The parameters of the sites, or of everything but the head."""
    inside = tuple(f"{site.name}." for site in sites)
    outside = tuple(f"{name}." for name in head)
    return [
        p
        for name, p in model.named_parameters()
        if name.startswith(inside or "")
        and not name.startswith(outside)
        and p.is_floating_point()
        and (which == "all" or (which == "bias" and p.ndim == 1 and name.endswith("bias")))
    ]


register(
    Subset(
        name="full",
        title="Full FT",
        trains="every parameter",
        source="–",
        roles=(),
        learning_rate=2e-5,
        epochs=5,
        options={"which": "all"},
    ),
    Subset(
        name="bitfit",
        title="BitFit",
        trains="every bias of the backbone",
        source="Ben Zaken et al. 2022, arXiv 2106.10199",
        roles=(),
        learning_rate=1e-3,
        options={"which": "bias"},
    ),
    Subset(
        name="probe",
        title="Linear probe",
        trains="nothing besides task head and pooler",
        source="–",
        roles=(),
        learning_rate=1e-3,
        options={"which": "none"},
        note="the floor",
    ),
)
