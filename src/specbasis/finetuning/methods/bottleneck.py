"""Bottleneck adapters: Houlsby's behind attention and feed-forward networks, Pfeiffer's behind their norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from specbasis.core.errors import InputError
from specbasis.finetuning.methods.kit import Added, AddedMethod, Request, register
from specbasis.finetuning.methods.sites import Site
from specbasis.finetuning.prefix.probe import evaluating, hooked, make_probe, one_line


class Bottleneck(Added):
    """The residual update of a bottleneck adapter: B act(A h + a) + b, with A (r, d), B (d, r).

    B and b are zero at the start, so that the model starts as its base. (Houlsby et al. draw both near zero.)

    Source: Houlsby et al. 2019, Fig. 2; Pfeiffer et al. 2021, §3.2.
    """

    def __init__(self, d: int, r: int, activation: str, like: Tensor) -> None:
        super().__init__()
        if activation not in ACT2FN:
            raise InputError(
                f"got activation = {activation!r}; want a name that transformers knows, such as 'relu'"
            )
        self.down, self.up = nn.Linear(d, r, device=like.device), nn.Linear(r, d, device=like.device)
        self.activation = ACT2FN[activation]
        if not like.is_meta:
            nn.init.normal_(self.down.weight, std=0.02)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        """The update for hidden states h (…, d), in their dtype."""
        inside = h if torch.is_autocast_enabled(h.device.type) else h.to(self.down.weight.dtype)
        update: Tensor = self.up(self.activation(self.down(inside)))
        return update.to(h.dtype)

    def join(self, layer: nn.Module, x: Tensor, output: Any) -> Any:
        """Behind a norm with input x: norm(x + adapter(norm(x))). Elsewhere, for an output h (or a tuple that
        begins with it): h + adapter(h).
        """
        if _is_norm(layer):
            return type(layer).forward(layer, x + self(output))
        h = output[0] if isinstance(output, tuple) else output
        h = h + self(h)
        return (h, *output[1:]) if isinstance(output, tuple) else h


def _is_norm(layer: nn.Module) -> bool:
    return "norm" in type(layer).__name__.lower()


class Houlsby(AddedMethod):
    """A bottleneck behind the output matrix of attention and of the feed-forward network, before the residual
    sum.
    """

    def roles_among(self, roles: Sequence[str]) -> Sequence[str]:
        """The outputs of attention and feed-forward networks; refused where none is asked for."""
        among = [role for role in roles if role in self.roles]
        if not among:
            raise InputError(f"{self.name} adapts {' and '.join(self.roles)} only; got {', '.join(roles)}")
        return among

    def added(self, layer: nn.Module, site: Site, request: Request) -> Bottleneck:
        """A bottleneck of the layer's output width."""
        activation = request.options_over(activation="relu")["activation"]
        return Bottleneck(site.shape[0], request.size, activation, layer.weight)  # type: ignore[arg-type]


class Pfeiffer(Houlsby):
    """Behind the norm of the feed-forward sum with the residual; without such a norm, behind the block."""

    def hosts(self, model: nn.Module, sites: Sequence[Site]) -> Mapping[str, str]:
        """The norms or blocks; an empty layer that is only counted has neither."""
        return norms_behind(model, sites) if hasattr(model, "config") else super().hosts(model, sites)


def norms_behind(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """For each feed-forward output: the norm that its sum with the residual goes through, or else its block.

    A post-norm model (BERT, DeBERTa, DistilBERT) normalises that sum before the block ends; in a pre-norm model
    (ViT, Llama) the sum is the block's output. Which of the two is seen by running the backbone once on a small
    input.

    Raises:
        InputError: a module is in no list of blocks, or does not run on a plain input.
    """
    blocks = {site.name: _block_of(model, site.name) for site in sites}
    waiting: dict[str, Tensor | None] = {}
    hosts: dict[str, str] = {}

    def passed(name: str, _: nn.Module, args: Any, output: Tensor) -> None:
        waiting[name] = output

    def normalises(name: str, _: nn.Module, args: Any) -> None:
        for site in [site for site in waiting if name.startswith(f"{blocks[site]}.")]:
            if args and args[0] is not waiting[site]:  # a norm of the output alone comes before the sum
                hosts.setdefault(site, name)
                del waiting[site]

    def ends(name: str, _: nn.Module, args: Any, output: Any) -> None:
        for site in [site for site in waiting if blocks[site] == name]:
            hosts.setdefault(site, name)
            del waiting[site]

    handles = []
    for name, module in model.named_modules():
        if name in blocks:
            handles.append(module.register_forward_hook(partial(passed, name)))
        elif _is_norm(module):
            handles.append(module.register_forward_pre_hook(partial(normalises, name)))
        if name in blocks.values():
            handles.append(module.register_forward_hook(partial(ends, name)))
    try:
        with hooked(*handles), evaluating(model), torch.no_grad():
            model(**make_probe(model, 2, 4).batch)
    except Exception as error:  # any model may fail in any way on made-up inputs
        raise InputError(f"{type(model).__name__}: does not run on a plain input ({one_line(error)})") from error
    missing = [name for name in blocks if name not in hosts]
    if missing:
        raise InputError(f"{missing[0]}: not used on a plain input; leave it out of the adapted modules")
    return hosts


def _block_of(model: nn.Module, name: str) -> str:
    """The innermost element of a list of modules that holds this one."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: n - 1])), nn.ModuleList):
            return ".".join(parts[:n])
    raise InputError(f"{name}: in no list of blocks; this method wants a model of blocks")


register(
    Houlsby(
        name="houlsby",
        title="HAdapter",
        trains="bottlenecks behind attention and feed-forward, before the residual sum",
        source="Houlsby et al. 2019, arXiv 1902.00751",
        roles=("attention.output", "ffn.down"),
        size=32,
        learning_rate=3e-4,
        options={"activation": "silu"},
        note="norms stay frozen, as in the library `adapters`; the original trains them",
    ),
    Pfeiffer(
        name="pfeiffer",
        title="PAdapter",
        trains="a bottleneck behind the norm of each block's feed-forward network",
        source="Pfeiffer et al. 2021, arXiv 2005.00247",
        roles=("ffn.down",),
        size=64,
        learning_rate=3e-4,
        options={"activation": "relu"},
    ),
)
