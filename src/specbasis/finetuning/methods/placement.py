"""Where a method goes: modules of a live model by role and block, its task head, the norm behind a layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specbasis.adapter.layer import innermost
from specbasis.adapter.task_heads import fresh_modules
from specbasis.architecture.key import ROLES, MatrixRef
from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError

FEED_FORWARD = ("ffn.up", "ffn.gate", "ffn.down")
"""The matrices of a feed-forward network; a gate only where there is one."""

ALL_LINEAR = tuple(role for role in ROLES if "." in role)
"""Every matrix of attention and feed-forward networks."""


@dataclass(frozen=True)
class Site:
    """One module that a method adapts.

    Attributes:
        name: the module's name in the model.
        shape: (out, in) of its weight as a matrix.
        roles: what it computes; several where one weight holds several matrices.
        block: number of its block; None where the module was named, not found by role.
    """

    name: str
    shape: tuple[int, int]
    roles: tuple[str, ...] = ()
    block: int | None = None

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return min(self.shape)


def sites(model: nn.Module, roles: Collection[str], blocks: Sequence[int] | None = None) -> tuple[Site, ...]:
    """The modules whose weights have one of these roles, in these blocks, in the model's order.

    Args:
        model: a transformers model without adapters; on the meta device too.
        roles: of `ROLES`.
        blocks: numbers of blocks, negative ones counted from the last of each stack; all when None.

    Raises:
        InputError: a role or block does not exist, the architecture is not known, or a weight holds a wanted and
            an unwanted matrix.
    """
    unknown = sorted(set(roles) - set(ROLES))
    if unknown:
        raise InputError(f"got role {unknown[0]!r}; want some of {', '.join(ROLES)}")
    by_module: dict[str, list[MatrixRef]] = defaultdict(list)
    for ref in model_map(open_checkpoint(dict(model.state_dict()))).matrices:
        if ref.key.block is not None and ref.expert is None:
            by_module[ref.parameter.rpartition(".")[0]].append(ref)
    inside = _inside(by_module, blocks, type(model).__name__)
    found: list[Site] = []
    for name, refs in by_module.items():
        held = tuple(ref.key.role for ref in refs)
        wanted = set(held) & set(roles)
        if not wanted or refs[0] not in inside:
            continue
        if wanted != set(held):
            raise InputError(
                f"{name}: one weight holds {', '.join(held)}; an adapter takes all of it or nothing: ask for all "
                "of these roles, or for none"
            )
        found.append(Site(name, matrix_shape(model.get_submodule(name), name), held, refs[0].key.block))
    if not found:
        known = sorted({ref.key.role for refs in by_module.values() for ref in refs} - {"other"})
        raise InputError(
            f"{type(model).__name__} has no module with a role of {', '.join(roles)}; its known roles are "
            f"{', '.join(known) or 'none: the architecture is not recognised'}; choose others, or name modules "
            "with target_modules"
        )
    return tuple(found)


def _inside(
    by_module: Mapping[str, list[MatrixRef]], blocks: Sequence[int] | None, model: str
) -> Collection[MatrixRef]:
    """The matrices in the wanted blocks."""
    refs = [ref for held in by_module.values() for ref in held]
    if blocks is None:
        return set(refs)
    counts: dict[str, int] = {}
    for ref in refs:
        counts[ref.key.stack] = max(counts.get(ref.key.stack, 0), (ref.key.block or 0) + 1)
    most = max(counts.values(), default=0)
    outside = [block for block in blocks if not -most <= block < most]
    if outside or not blocks:
        raise InputError(f"got block {outside[:1] or blocks} for {model}; want some of −{most} … {most - 1}")
    return {ref for ref in refs if any(ref.key.block == b % counts[ref.key.stack] for b in blocks)}


def named_sites(model: nn.Module, targets: Collection[str]) -> tuple[Site, ...]:
    """The modules of these names, or whose names end so.

    Raises:
        InputError: a name fits no module with a matrix.
    """
    matrices = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim >= 2
        and not isinstance(module, nn.Embedding)
    }  # fmt: skip
    found: dict[str, Site] = {}
    for target in targets:
        fits = [target] if target in matrices else [name for name in matrices if name.endswith(f".{target}")]
        if not fits:
            raise InputError(f"no module with a matrix is called {target!r}, or ends so; see model.named_modules()")
        found |= {name: Site(name, matrix_shape(matrices[name], name)) for name in fits}
    return tuple(found[name] for name in matrices if name in found)


def matrix_shape(layer: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of a layer's weight as a matrix.

    Raises:
        InputError: the layer is neither linear nor a convolution.
    """
    inner = innermost(layer)
    if isinstance(inner, nn.Conv2d):
        return inner.out_channels, inner.in_channels // inner.groups * math.prod(inner.kernel_size)
    if isinstance(inner, nn.Linear):
        return inner.out_features, inner.in_features
    if is_conv1d(inner):
        in_, out = inner.weight.shape
        return int(out), int(in_)
    raise InputError(f"{name}: got a {type(inner).__name__}; want a linear layer or a convolution")


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, a linear layer whose weight is stored (in, out)."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(layer).__mro__
    )


def head_modules(model: nn.Module) -> list[str]:
    """Modules that every method trains besides its own parameters: the task head, and what the base lacks.

    The task head is what stands outside of the backbone and does not hold the output embedding (that of a language
    model is pretrained). A pooler inside the backbone counts only if the base checkpoint has no weights for it.
    """
    backbone = getattr(model, "base_model", model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    outside = [
        name
        for name, module in model.named_children()
        if backbone is not model
        and module is not backbone
        and list(module.parameters())
        and (output is None or output not in list(module.modules()))
    ]
    return sorted({*outside, *fresh_modules(model)})


def norms_behind(model: nn.Module, places: Sequence[Site]) -> dict[str, str]:
    """For each feed-forward output: the norm that its sum with the residual goes through, or else its block.

    A post-norm model (BERT, DeBERTa, DistilBERT) normalises that sum before the block ends; in a pre-norm model
    (ViT, Llama) the sum is the block's output. Which of the two is seen by running the backbone once on a small
    input.

    Raises:
        InputError: the model takes no input that is known here, or a module is in no list of blocks.
    """
    blocks = {site.name: _block_of(model, site.name) for site in places}
    waiting: dict[str, Tensor | None] = {}
    found: dict[str, str] = {}

    def passed(name: str, _: nn.Module, args: Any, output: Tensor) -> None:
        waiting[name] = output

    def normalises(name: str, _: nn.Module, args: Any) -> None:
        for site in [site for site in waiting if name.startswith(f"{blocks[site]}.")]:
            if args and args[0] is not waiting[site]:  # a norm of the output alone comes before the sum
                found.setdefault(site, name)
                del waiting[site]

    def ends(name: str, _: nn.Module, args: Any, output: Any) -> None:
        for site in [site for site in waiting if blocks[site] == name]:
            found.setdefault(site, name)
            del waiting[site]

    handles = []
    for name, module in model.named_modules():
        if name in blocks:
            handles.append(module.register_forward_hook(partial(passed, name)))
        elif "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_pre_hook(partial(normalises, name)))
        if name in blocks.values():
            handles.append(module.register_forward_hook(partial(ends, name)))
    try:
        _run_once(model)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in blocks if name not in found]
    if missing:
        raise InputError(f"{missing[0]}: not used on a plain input; leave it out of the adapted modules")
    return found


def _block_of(model: nn.Module, name: str) -> str:
    """The innermost element of a list of modules that holds this one."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: n - 1])), nn.ModuleList):
            return ".".join(parts[:n])
    raise InputError(f"{name}: in no list of blocks; this method wants a model of blocks")


def _run_once(model: nn.Module) -> None:
    """Run the backbone on a small input, without gradients, in eval mode, and leave the model as it was."""
    backbone = getattr(model, "base_model", model)
    kind = getattr(model, "main_input_name", "input_ids")
    config: Any = getattr(model, "config", None)
    device = next(model.parameters()).device
    inputs: dict[str, Tensor]
    if kind == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs = {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    elif kind == "input_ids":
        inputs = model.dummy_inputs  # type: ignore[assignment]
    else:
        raise InputError(f"{type(model).__name__} takes {kind}; this method knows models of text and images only")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            backbone(**{key: value.to(device) for key, value in inputs.items()})
    finally:
        for module, mode in modes:
            module.training = mode
