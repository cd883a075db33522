"""What transformers calls a parameter in memory: of some families it renames those that it loads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from specbasis.core.extras import quiet


def without_memory(config: Mapping[str, Any]) -> Any:
    """The model that a configuration describes, on the meta device; None where transformers does not know it."""
    try:
        import transformers

        model_class = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
        if model_class is None or not config.get("model_type"):
            return None
        with quiet(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = model_class(transformers.AutoConfig.for_model(**config))
            model.tie_weights()
    except Exception:  # whatever a stranger's configuration makes it raise: the stored names have to do then
        return None
    return model


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
    return {name: own[id(tensor)] for name, tensor in stored.items() if id(tensor) in own}
