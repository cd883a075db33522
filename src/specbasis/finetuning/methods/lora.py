"""LoRA, PiSSA and DoRA, in PEFT."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import LoraConfig

from specbasis.finetuning.methods.kit import PeftMethod, Request, register


class Lora(PeftMethod):
    """B and A in W + (α/r) B A; α = 2 r, and r where the start is W itself."""

    config = LoraConfig

    def fields(self, request: Request) -> dict[str, Any]:
        """Rank and α."""
        at_weight = str(request.options.get("init_lora_weights", True)).startswith("pissa")
        return {"r": request.rank, "lora_alpha": request.size * (1 if at_weight else 2), **request.options}

    def counted(self, request: Request) -> Request:
        """The same without an initialisation, which may decompose the weight."""
        return dataclasses.replace(request, options={**request.options, "init_lora_weights": False})


def lora(
    name: str,
    title: str,
    trains: str,
    *,
    source: str = "Hu et al. 2022, arXiv 2106.09685",
    note: str = "",
    **options: Any,
) -> Lora:
    """A relative of LoRA at rank 8 on every matrix."""
    return Lora(name=name, title=title, trains=trains, source=source, size=8, options=options, note=note)


register(
    lora(
        "pissa",
        "PiSSA",
        "B and A in (W − B₀A₀) + B A; B₀A₀ the leading singular triplets of W",
        source="Meng et al. 2024, arXiv 2404.02948",
        note="the residual W − B₀A₀ is rounded to the weight's dtype: the start differs from the base by rounding",
        init_lora_weights="pissa",
    ),
    lora("lora", "LoRA-K", "B and A in W + (α/r) B A; A Kaiming-uniform, B zero"),
    lora(
        "lora-gaussian",
        "LoRA-G",
        "B and A in W + (α/r) B A; A Gaussian, B zero",
        init_lora_weights="gaussian",
    ),
    lora(
        "dora",
        "DoRA",
        "LoRA's B and A, and the norm of each row of the weight",
        source="Liu et al. 2024, arXiv 2402.09353",
        note="the row norms are divided out and multiplied in: the start differs from the base by rounding",
        use_dora=True,
    ),
)
