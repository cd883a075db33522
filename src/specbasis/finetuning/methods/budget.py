"""Equal budgets: the size at which each method trains as nearly as possible the same number of parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from specbasis.core.errors import InputError
from specbasis.finetuning.methods.attach import default_width, method_named, method_sites
from specbasis.finetuning.methods.build import TOP, chosen
from specbasis.finetuning.methods.layers import entries
from specbasis.finetuning.methods.placement import Site, head_modules
from specbasis.finetuning.methods.table import METHODS, Method


@dataclass(frozen=True)
class Size:
    """A method at a size.

    Attributes:
        method: its name.
        rank: what `attach` takes as ``rank``; None where the method has no size.
        parameters: what it trains, without task head and pooler. For AdaLoRA, what remains in the end.
    """

    method: str
    rank: int | None
    parameters: int


def match_budget(
    model: nn.Module,
    budget: int | None = None,
    methods: Iterable[str | Method] = tuple(METHODS),
    *,
    rank: int | None = None,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> dict[str, Size]:
    """The size of each method that comes nearest to a budget of trained parameters, and what it then trains.

    Works on shapes alone: the model may be on the meta device. Where two sizes are equally near, the smaller one.

    Args:
        model: a transformers model without adapters.
        budget: trained parameters without head and pooler; what the spectral method trains when None.
        methods: names in `METHODS`.
        rank: width of the spectral method's interval where it sets the budget; its default when None.
        roles: adapt these roles with every method; each method's own when None.
        blocks: adapt these blocks with every method.

    Raises:
        InputError: as `attach`; or the budget is not positive.
    """
    if budget is None:
        budget = parameters("spectral", model, rank=rank, roles=roles, blocks=blocks)
    if budget < 1:
        raise InputError(f"got a budget of {budget} parameters; want at least 1")
    wanted = [method_named(method) for method in methods]
    kinds = {_placement(method): method for method in wanted}
    places = {kind: method_sites(model, method, None, roles, blocks) for kind, method in kinds.items()}
    return {method.name: _nearest(method, model, places[_placement(method)], budget) for method in wanted}


def _placement(method: Method) -> tuple[Any, ...]:
    """Methods of one placement stand at the same modules of any model."""
    return method.builder, method.roles, method.blocks, method.options.get("which")


def parameters(
    method: str | Method,
    model: nn.Module,
    *,
    rank: int | None = None,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> int:
    """How many parameters a method trains on a model, without task head and pooler; from shapes alone."""
    method = method_named(method)
    places = method_sites(model, method, None, roles, blocks)
    if method.builder == "subset":
        return _subset(method, model, places)
    follows = _sized(method) and method.size is None
    return _count(method, places, rank or method.size or (default_width(_smallest(places)) if follows else 0))


def _smallest(places: Sequence[Site]) -> int:
    return min(site.rank for site in places)


def _nearest(method: Method, model: nn.Module, places: Sequence[Site], budget: int) -> Size:
    if method.builder == "subset":
        return Size(method.name, None, _subset(method, model, places))
    if not _sized(method):
        return Size(method.name, None, _count(method, places, 0))
    ranks = range(1, _smallest(places) + (method.builder != "svft"))
    above = bisect_left(ranks, budget, key=lambda r: _count(method, places, r))
    near = [ranks[i] for i in (above - 1, above) if 0 <= i < len(ranks)]
    best = min(near, key=lambda r: abs(_count(method, places, r) - budget))
    return Size(method.name, best, _count(method, places, best))


def _sized(method: Method) -> bool:
    return method.size is not None or method.builder in ("spectral", "psoft")


def _count(method: Method, places: Sequence[Site], rank: int) -> int:
    return sum(_PER_SITE[method.builder](method, site, rank) for site in places)


_PER_SITE: Mapping[str, Callable[[Method, Site, int], int]] = MappingProxyType(
    {
        "spectral": lambda method, site, r: r * r,
        "psoft": lambda method, site, r: r * r,
        "lora": lambda method, site, r: r * sum(site.shape) + bool(method.options.get("use_dora")) * site.shape[0],
        "adalora": lambda method, site, r: r * (sum(site.shape) + 1),
        "houlsby": lambda method, site, r: 2 * site.shape[0] * r + r + site.shape[0],
        "pfeiffer": lambda method, site, r: 2 * site.shape[0] * r + r + site.shape[0],
        "svft": lambda method, site, w: entries(site.rank, w),
        "speclora": lambda method, site, r: r * sum(site.shape) + min(TOP, site.rank),
    }
)


def _subset(method: Method, model: nn.Module, places: Sequence[Site]) -> int:
    return sum(p.numel() for p in chosen(model, method.options["which"], places, tuple(head_modules(model))))
