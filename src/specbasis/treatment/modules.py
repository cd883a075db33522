"""Which module of the live model holds a parameter: what the library that loads an adapter goes by."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from dataclasses import dataclass, replace

from torch import nn

from specbasis.checkpoint import Checkpoint
from specbasis.checkpoint.live_names import live_names, without_memory

LOW_RANK = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d")
"""Classes of modules that PEFT puts a LoRA on, those derived from them included."""


@dataclass(frozen=True)
class Holder:
    """The module that holds a parameter.

    Attributes:
        module: its path in the live model; empty for a parameter of the model itself.
        leaf: the parameter's name in it.
        kind: the one of `LOW_RANK` that it is; empty where a low-rank update cannot be put on it.
        twins: paths of other modules that hold the same numbers under the same leaf.
        is_module: False where the live model is known and has its numbers in another module: experts that
            transformers stacks, whose LoRAs PEFT turns into one of the stack.
    """

    module: str
    leaf: str
    kind: str
    twins: tuple[str, ...] = ()
    is_module: bool = True


def holders(checkpoint: Checkpoint, embeddings: frozenset[str]) -> tuple[dict[str, Holder], str]:
    """The holder of each parameter, by its stored name, and the class of the model that they were found in.

    Where transformers knows the model by its config.json, it is built without memory and asked. Elsewhere names and
    shapes tell: a weight with two axes is a linear layer's, with more a convolution's.

    Args:
        checkpoint: the finetune.
        embeddings: which of its parameters are embeddings, for the second way.
    """
    model = without_memory(checkpoint)
    if model is None:
        return {name: _by_shape(name, checkpoint, name in embeddings) for name in checkpoint}, ""
    places: defaultdict[int, list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        places[id(parameter)].append(name)
    live = live_names(model)
    prefix = f"{model.base_model_prefix}."
    by_name = {}
    for name in checkpoint:
        known = next((n for n in (live.get(name), name, prefix + name) if n in parameters), None)
        by_name[name] = (
            _held(model, known, places[id(parameters[known])])
            if known
            else replace(_by_shape(name, checkpoint, name in embeddings), is_module=False)
        )
    return by_name, type(model).__name__


def _held(model: nn.Module, name: str, names: list[str]) -> Holder:
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    classes = [cls.__name__ for cls in type(owner).__mro__]
    kind = next((kind for kind in LOW_RANK if kind in classes), "") if leaf == "weight" else ""
    if (kind.startswith("Conv") and getattr(owner, "groups", 1) > 1) or _is_bypassed(model, module):
        kind = ""
    return Holder(module, leaf, kind, tuple(n.rpartition(".")[0] for n in names if n != name))


def _is_bypassed(model: nn.Module, path: str) -> bool:
    """Whether the module around this one takes its weight without calling it: then a LoRA on it has no effect.

    So do DeBERTa's encoder with its relative positions and torch's MultiheadAttention with its last layer. The
    source tells; a weight that is only asked for its type is not taken.
    """
    parent, _, name = path.rpartition(".")
    try:
        source = inspect.getsource(type(model.get_submodule(parent)))
    except (OSError, TypeError):  # defined where there is no source
        return False
    return bool(re.search(rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!\.(dtype|device|shape))", source))


def _by_shape(name: str, checkpoint: Checkpoint, is_embedding: bool) -> Holder:
    module, _, leaf = name.rpartition(".")
    axes = len(checkpoint.entries[name].shape)
    kinds = {2: "Embedding" if is_embedding else "Linear", 3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}
    # A depthwise kernel has one input channel for each output, and no low-rank update of PEFT's.
    whole = leaf != "weight" or (axes > 2 and checkpoint.entries[name].shape[1] == 1)
    # Around the last layer of torch's MultiheadAttention nothing calls it, as in `_is_bypassed`.
    whole = whole or (module.endswith(".out_proj") and f"{module[: -len('out_proj')]}in_proj_weight" in checkpoint)
    return Holder(module, leaf, "" if whole else kinds.get(axes, ""))
