"""The file of a LoRA as PEFT reads it: names, shapes and configuration, and factors that are made when written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint.adapter_file import PREFIX
from specbasis.checkpoint.places import transformers_address
from specbasis.core.dtypes import name_of
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD
from specbasis.treatment.modules import Holder

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
"""How PEFT calls what a class of transformers is for, by the end of its name."""

NO_MODULES = "dummy-target-modules"
"""What PEFT wants for ``target_modules`` of an adapter that has no low-rank part (its DUMMY_TARGET_MODULES)."""

HEADS = dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")) | {"QUESTION_ANS": ("qa_outputs",)}
"""Modules that PEFT stores whole whatever its configuration says, by task."""


def task_of(model_class: str) -> str | None:
    """What PEFT calls the task of a class of transformers; None where it has no word for it."""
    return next((task for end, task in TASKS.items() if model_class.endswith(end)), None)


def base_address(base: object) -> dict[str, str]:
    """What a configuration calls the base: as transformers does, or as the user does where it knows none."""
    if isinstance(base, Mapping):
        return {}
    try:
        return transformers_address(str(base))
    except InputError:  # no config.json beside the weights
        return {"pretrained_model_name_or_path": str(base)}


def configuration(
    ranks: Mapping[str, int],
    whole: Iterable[str],
    *,
    task: str | None,
    base: str | Path | Mapping[str, Tensor],
    is_in_out: bool,
    has_biases: bool,
) -> dict[str, Any]:
    """PEFT's configuration of a LoRA of scaling 1.

    Args:
        ranks: module → rank; those of rank 0 are left alone.
        whole: modules that the file holds whole.
        task: PEFT's word for it.
        base: what the user calls the base.
        is_in_out: whether its linear layers are stored (in, out).
        has_biases: whether the file has biases of modules that it does not hold whole.
    """
    ranks = {module: rank for module, rank in ranks.items() if rank}
    common = max(ranks.values(), default=1)
    others = {module: rank for module, rank in ranks.items() if rank != common}
    address = base_address(base)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": address.get("pretrained_model_name_or_path"),
        "revision": address.get("revision"),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks) or NO_MODULES,
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": is_in_out,
        "bias": "all" if has_biases else "none",
        "lora_dropout": 0.0,
    }


def factor_shapes(
    holder: Holder, shape: tuple[int, ...], matrix_shape: tuple[int, int], rank: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the two factors in the file: A and then B, of an embedding Bᵀ and then Aᵀ.

    Args:
        holder: the module that they are of.
        shape: of the parameter, as stored.
        matrix_shape: (out, in).
        rank: of the factors.
    """
    out, width = matrix_shape
    module = f"{PREFIX}{holder.module}"
    if holder.kind == "Embedding":  # PEFT counts the axes of an embedding the other way round
        return {f"{module}.lora_embedding_A": (rank, out), f"{module}.lora_embedding_B": (width, rank)}
    first: tuple[int, ...] = (rank, width)
    second: tuple[int, ...] = (out, rank)
    if holder.kind.startswith("Conv") and holder.kind != "Conv1D":
        kernel = shape[2:]
        first, second = (rank, shape[1], *kernel), (out, rank, *(1 for _ in kernel))
    return {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": second}


def factors(svd: SVD, rank: int, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """B = U √S and A = √S Vh in a format; of a product of fewer columns zeros make up the rank.

    Raises:
        InputError: the format cannot hold them.
    """
    root, lacking = svd.S.sqrt(), rank - len(svd.S)
    B = torch.nn.functional.pad(svd.U * root, (0, lacking)).to(dtype)
    A = torch.nn.functional.pad(root[:, None] * svd.Vh, (0, 0, 0, lacking)).to(dtype)
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise InputError(
            f"{name}: its factors do not fit into {name_of(dtype)}, whose numbers are too small for them; want "
            "another dtype (--dtype)"
        )
    return B, A
