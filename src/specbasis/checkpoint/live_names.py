"""What transformers calls a parameter in memory: of some families it renames those that it loads."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from specbasis.checkpoint.entry import Checkpoint
from specbasis.core.extras import quiet

_FOREIGN = re.compile("auto_map|implementation|pretrained|quantization")
"""Fields of a configuration that fetch code or weights from elsewhere; names of parameters need none of them."""

_FETCHED = ("hf-hub:", "hf_hub:", "local-dir:")
"""How a name of timm begins that it looks for on the Hub or on the disk."""

POSITIONS = 32
"""Positions of a model whose names alone are asked for: some families make tables of them number by number."""


_MAPPINGS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
}
"""PEFT's word for a task → transformers' table of the classes for it, model type → class."""


def adapted_class(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> str:
    """The class that an adapter was trained on, by its configuration; the base's own where nothing else is said."""
    own = str((config.get("architectures") or [""])[0])
    mapping = adapter.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    table, model_type = _MAPPINGS.get(str(adapter.get("task_type"))), config.get("model_type")
    if named or table is None or not model_type:
        return str(named or own)
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return own
    return str(getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).get(model_type, own))


def without_memory(checkpoint: Checkpoint) -> Any:
    """The model that a checkpoint's configuration describes, on the meta device; None where transformers does not
    know it.

    A configuration is believed as far as the file bears it out: it fetches and runs nothing, no size in it exceeds
    the longest axis of the file, and a model of many more parts than the file has tensors is given up.
    """
    config = checkpoint.config
    try:
        import transformers

        model_class = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
        is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
        if not is_model or not config.get("model_type"):
            return None
        longest = max((axis for entry in checkpoint.entries.values() for axis in entry.shape), default=0)
        with quiet(), warnings.catch_warnings(), torch.device("meta"), _at_most(20_000 + 40 * len(checkpoint)):
            warnings.simplefilter("ignore")
            model = model_class(transformers.AutoConfig.for_model(**_borne_out(config, longest)))
            model.tie_weights()
    except Exception:  # whatever a stranger's configuration makes it raise: the stored names have to do then
        return None
    return model


def _borne_out(value: Any, longest: int) -> Any:
    """A configuration without what a file cannot bear out; what it then lacks are the family's own values."""
    if isinstance(value, list):
        return [_borne_out(inner, longest) for inner in value]
    if isinstance(value, str) and value.startswith(_FETCHED):
        raise ValueError("a model that has to be fetched")
    if not isinstance(value, dict):
        return value
    return {
        name: min(inner, POSITIONS) if isinstance(inner, int) and "position" in name else _borne_out(inner, longest)
        for name, inner in value.items()
        if not (_FOREIGN.search(name) or _largest(inner) > max(longest, POSITIONS))
    }


def _largest(value: Any) -> int:
    """The largest whole number in a field's value; fields within it are looked at by themselves."""
    numbers = value if isinstance(value, list) else [value]
    return max((number for number in numbers if isinstance(number, int)), default=0)


@contextmanager
def _at_most(parts: int) -> Iterator[None]:
    """Stop the making of a model in this thread that has more modules and parameters than this."""
    left, here = parts, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal left
        left -= threading.get_ident() == here
        if left < 0:
            raise ValueError("a model of more parts than its file can have")

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def live_names(model: Any) -> dict[str, str]:
    """Stored name → name in memory, of each parameter that is stored one to one; empty where nothing tells."""
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    try:
        from transformers.core_model_loading import revert_weight_conversion

        stored = revert_weight_conversion(model, dict(parameters))
    except Exception:  # an older version, or a conversion that needs numbers
        return {}
    own: dict[int, str] = {}
    for name, parameter in parameters.items():
        own.setdefault(id(parameter), name)
    return {
        name: name if parameters.get(name) is tensor else own[id(tensor)]  # of tied ones each its own
        for name, tensor in stored.items()
        if id(tensor) in own
    }
