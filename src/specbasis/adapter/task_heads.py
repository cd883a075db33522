"""What is trained besides the cores: a task head or pooler that the base checkpoint lacks; and the counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_LOADED = "_is_hf_initialized"  # transformers marks every parameter that came from the checkpoint


def fresh_modules(model: nn.Module) -> list[str]:
    """Modules that transformers' loading report lists as missing: random, because the checkpoint lacks their
    weights.

    Reads the mark that ``from_pretrained`` leaves on each loaded parameter. Only modules outside of the model's
    backbone, or directly below it (a pooler), are considered. Empty for a model that was not loaded from a
    checkpoint, where all or nothing is random.
    """
    if not says_what_was_loaded(model):
        return []
    embeddings = _input_embeddings(model)
    return [
        name
        for name, module in _around_backbone(model)
        if not any(getattr(p, _LOADED, False) or id(p) in embeddings for p in module.parameters())
    ]


def says_what_was_loaded(model: nn.Module) -> bool:
    """Whether any parameter carries the mark of ``from_pretrained``; the others are then known to be random."""
    return any(getattr(parameter, _LOADED, False) for parameter in model.parameters())


def head_modules(model: nn.Module) -> list[str]:
    """Modules with parameters of their own that transformers puts around a backbone; empty for a bare backbone."""
    backbone = getattr(model, "base_model", model)
    if backbone is model or not isinstance(backbone, nn.Module):
        return []
    inside = {id(parameter) for parameter in backbone.parameters()}
    return [
        name
        for name, module in model.named_children()
        if module is not backbone and any(id(p) not in inside for p in module.parameters())
    ]


def _around_backbone(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with parameters beside the backbone, and those directly below it."""
    backbone = getattr(model, "base_model", model)
    around = [(name, module) for name, module in model.named_children() if module is not backbone]
    if isinstance(backbone, nn.Module) and backbone is not model:
        prefix = next((name for name, module in model.named_modules() if module is backbone), "")
        around += [(f"{prefix}.{name}", module) for name, module in backbone.named_children()]
    return [(name, module) for name, module in around if next(module.parameters(), None) is not None]


def _input_embeddings(model: nn.Module) -> set[int]:
    """Identities of the input embeddings' parameters: resizing a vocabulary makes new ones, with the old rows."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return set()
    return {id(parameter) for parameter in embeddings.parameters()} if isinstance(embeddings, nn.Module) else set()


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: cores in training, other modules in training (head, pooler), and the whole model."""

    adapter: int
    head: int
    total: int

    def __str__(self) -> str:
        named = {"adapter": self.adapter, "head": self.head, "all": self.total}
        return " || ".join(f"{name} parameters: {count:,}" for name, count in named.items())


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Trainable parameters of the adapters and of the head apart, and all parameters.

    Papers on finetuning with few parameters count the adapter alone (Yu et al. 2026, Tab. 1); a head is trained all
    the same.
    """
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    adapter = sum(count for name, count in trained.items() if ".spectral_M." in f".{name}")
    return ParameterCounts(adapter, sum(trained.values()) - adapter, sum(p.numel() for p in model.parameters()))
