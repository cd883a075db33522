"""LoRA, PiSSA, DoRA and AdaLoRA, in PEFT; the last with the callback without which its rank would be fixed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from peft import AdaLoraConfig, AdaLoraModel, LoraConfig
from torch import nn
from transformers import TrainerCallback

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


UNKNOWN_STEPS = 1_000_000
"""AdaLoRA wants the number of steps before the Trainer knows it; the callback puts it right."""


class AdaLora(PeftMethod):
    """P, Λ, Q in W + P Λ Q: starts with 1.5 times the rank and prunes to it on average (Zhang et al. 2023, §4)."""

    config = AdaLoraConfig

    def fields(self, request: Request) -> dict[str, Any]:
        """Ranks and the number of steps."""
        rank = request.size
        ranks = {"lora_alpha": 2 * rank, "init_r": math.ceil(1.5 * rank), "target_r": rank}
        return {**ranks, "total_step": UNKNOWN_STEPS, **request.options}

    def callbacks(self, request: Request) -> tuple[TrainerCallback, ...]:
        """The allocation of ranks."""
        return (AllocateRanks(resolve=request.options.get("total_step") is None),)

    def counted(self, request: Request) -> Request:
        """The triplets that remain in the end."""
        return dataclasses.replace(request, options={**request.options, "init_r": request.rank})

    def count_of(self, shape: tuple[int, int], request: Request) -> int:
        """Without the one number in which PEFT keeps the rank as a parameter, and which no gradient reaches."""
        return super().count_of(shape, request) - 1


class AllocateRanks(TrainerCallback):
    """Calls AdaLoRA's allocation after every step; without it, the method is a fixed-rank one.

    Args:
        resolve: take the number of steps from the Trainer, and spend the first 10 % at the starting rank and the
            last 50 % at the final one, with an allocation each 1 % between. Else PEFT's configuration stands.
    """

    def __init__(self, *, resolve: bool = True) -> None:
        self.resolve = resolve

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the allocator how many steps there will be."""
        tuner = _adalora_of(kwargs["model"])
        if self.resolve:
            steps = int(state.max_steps)
            config = tuner.peft_config[tuner.trainable_adapter_name]
            config.total_step, config.tinit, config.tfinal = steps, steps // 10, steps // 2
            config.deltaT = max(1, steps // 100)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rank the triplets by this step's gradients, which the Trainer has not cleared yet, and prune."""
        _adalora_of(kwargs["model"]).update_and_allocate(state.global_step)


def _adalora_of(model: nn.Module) -> AdaLoraModel:
    return next(module for module in model.modules() if isinstance(module, AdaLoraModel))


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
    AdaLora(
        name="adalora",
        title="AdaLoRA",
        trains="P, Λ, Q in W + P Λ Q, pruned to the rank on average over the matrices",
        source="Zhang et al. 2023, arXiv 2303.10512",
        size=8,
        note="counted at its start, with 1.5 times the rank; the rank is what remains. Its loss contains a penalty "
        "for non-orthogonal P and Q",
    ),
)
