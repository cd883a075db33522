"""SpecLoRA: LoRA, and a trained rescaling of the leading singular values."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from specbasis.adapter.layouts import matrix_shape
from specbasis.core.errors import InputError
from specbasis.finetuning.methods.kit import AddedMethod, Request, register
from specbasis.finetuning.methods.sites import Site
from specbasis.finetuning.methods.updates import Update

TOP = 128
"""How many leading singular values SpecLoRA rescales; the published description does not say."""


class SpecLoRA(Update):
    """LoRA and a trained rescaling of the leading singular values: W' = U diag((1 + d) ⊙ S) Vh + s B A.

    d is trained on the first k entries, and zero elsewhere and at the start; B (out, r) is zero at the start,
    A (r, in) Kaiming-uniform. Applied as W x + U_k ((d ⊙ S_k) ⊙ Vh_k x) + s B (A x), s = α/r.

    The formula is this project's reading of what is published about the method: LoRA together with a learnable
    rescaling of the top singular directions, by a mask and a Hadamard product.

    Source: Si et al. 2025, arXiv 2505.23099.
    """

    def __init__(self, layer: nn.Module, r: int, top: int, scaling: float, name: str) -> None:
        out, in_ = matrix_shape(layer, name)
        if top < 1:
            raise InputError(f"{name}: got top = {top}; want the number of rescaled singular values, at least 1")
        super().__init__(layer, min(top, out, in_), name)
        device = self.frozen["S"].device
        self.scaling = scaling
        self.d = nn.Parameter(torch.zeros(len(self.frozen["S"]), device=device))
        self.A = nn.Parameter(torch.empty(r, in_, device=device))
        self.B = nn.Parameter(torch.zeros(out, r, device=device))
        if device.type != "meta":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """D x for x (…, in)."""
        rescaled = self.project(x, self.frozen["Vh"]) * (self.d * self.frozen["S"])
        low_rank = self.project(self.project(x, self.A), self.B)
        return self.project(rescaled, self.frozen["U"]) + self.scaling * low_rank

    def delta(self) -> Float[Tensor, "out in"]:
        """U diag(d ⊙ S) Vh + s B A in float64."""
        U, S, Vh = (self.frozen[key].double() for key in ("U", "S", "Vh"))
        d, A, B = (p.detach().double() for p in (self.d, self.A, self.B))
        return (U * (d * S)) @ Vh + self.scaling * (B @ A)


class SpecLora(AddedMethod):
    """B, A and d in U diag((1 + d) ⊙ S) Vh + (α/r) B A; α = 2 r."""

    def added(self, layer: nn.Module, site: Site, request: Request) -> SpecLoRA:
        """The update of one layer."""
        options = request.options_over(top=TOP, lora_alpha=2 * request.size)
        scaling = options["lora_alpha"] / request.size
        return SpecLoRA(layer, request.size, options["top"], scaling, site.name)


register(
    SpecLora(
        name="speclora",
        title="SpecLoRA",
        trains="B, A and d in U diag((1 + d) ⊙ S) Vh + (α/r) B A",
        source="Si et al. 2025, arXiv 2505.23099",
        size=8,
        note="this project's reading of the published description; d on the leading 128 singular values",
    )
)
