"""The file of a LoRA as PEFT reads it: names, shapes and configuration, and factors that are made when written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specbasis.checkpoint.adapter_file import PREFIX
from specbasis.checkpoint.entry import Entry
from specbasis.checkpoint.places import transformers_address
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


@dataclass(eq=False)
class Factors:
    """The two factors of one matrix as entries of the file; decomposed when the first of them is written.

    Attributes:
        holder: the module that they are of.
        shape: of the parameter, as stored.
        matrix_shape: (out, in).
        rank: of the factors.
        dtype: that they are stored in.
        decompose: gives at most so many triplets of the update.
    """

    holder: Holder
    shape: tuple[int, ...]
    matrix_shape: tuple[int, int]
    rank: int
    dtype: str
    decompose: Callable[[], SVD]

    def entries(self) -> dict[str, Entry]:
        """Names in the file → shapes, and how the tensors are made: A and then B."""
        out, width = self.matrix_shape
        module = f"{PREFIX}{self.holder.module}"
        names = (f"{module}.lora_A.weight", f"{module}.lora_B.weight")
        shapes: tuple[tuple[int, ...], ...] = ((self.rank, width), (out, self.rank))
        if self.holder.kind == "Embedding":  # PEFT counts the axes of an embedding the other way round
            names = (f"{module}.lora_embedding_A", f"{module}.lora_embedding_B")
            shapes = ((self.rank, out), (width, self.rank))
        elif self.holder.kind.startswith("Conv") and self.holder.kind != "Conv1D":
            kernel = self.shape[2:]
            shapes = ((self.rank, self.shape[1], *kernel), (out, self.rank, *(1 for _ in kernel)))
        return {
            name: Entry(shape, self.dtype, partial(self._tensor, i, shape))
            for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
        }

    def _tensor(self, which: int, shape: tuple[int, ...]) -> Tensor:
        if which == 0:
            svd = self.decompose()
            root, lacking = svd.S.sqrt(), self.rank - len(svd.S)  # of a product of fewer columns
            A = torch.nn.functional.pad(root[:, None] * svd.Vh, (0, 0, 0, lacking))
            B = torch.nn.functional.pad(svd.U * root, (0, lacking))
            self._halves = (B.mT, A.mT) if self.holder.kind == "Embedding" else (A, B)
        tensor = self._halves[which].reshape(shape).to(getattr(torch, self.dtype)).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{self.holder.module}: its factors do not fit into {self.dtype}, whose numbers are too small for "
                "them; want another dtype (--dtype)"
            )
        if which == 1:
            del self._halves  # the next matrix is to have the memory
        return tensor
