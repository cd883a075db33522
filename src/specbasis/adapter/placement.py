"""Where a budget of trained coefficients goes: to those whose gradient is largest, over all adapted matrices.

    model = get_peft_model(base, SpectralConfig(rank=384, target_modules="all-linear", task_type="SEQ_CLS"))
    place_coefficients(model, dataloader, "60k")

With every coefficient at zero, M's gradient is D = Uᵀ G V of the matrix's gradient G, or diag(S) Uᵀ G V in units of
the singular values. Of all sets of so many coefficients the largest D² hold most of ‖D‖²: a first step along them
lowers the loss most for its length.

In the gradient's own basis D is diagonal: a first step says nothing of the coefficients beside it, which later
steps use. There each matrix gets a leading square instead, which grows while its next row and column hold more
energy per coefficient, σ_K² / (2 K + 1), than those of the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbasis.adapter.adapted import AdaptedLayer
from specbasis.adapter.bases import gradient_basis
from specbasis.adapter.gradients import task_gradients, untrained_layers
from specbasis.adapter.layer import SpectralLinear
from specbasis.checkpoint.adapter_file import FROM_DATA
from specbasis.checkpoint.pattern import SQUARE, at_flat
from specbasis.core.errors import InputError
from specbasis.core.grammar import parse_count
from specbasis.core.options import check_choice

BY = ("gradient", "uniform")
"""What chooses the coefficients."""


@dataclass(frozen=True)
class Placed:
    """What one matrix got of a budget.

    Attributes:
        module: its name in the base model.
        interval: ranks [k, m) between which its coefficients stand; (0, 0) where it got none.
        coefficients: how many are trained.
        energy: share of ‖G‖² of its gradient that they hold, Σ (uᵢᵀ G vⱼ)² / ‖G‖², 0 … 1.
        gradient: ‖G‖² as a share of its sum over all matrices, 0 … 1.
    """

    module: str
    interval: tuple[int, int]
    coefficients: int
    energy: float
    gradient: float


def place_coefficients(
    model: nn.Module,
    dataloader: Iterable[Any],
    budget: int | str,
    *,
    by: str = "gradient",
    seed: int = 0,
    forward_fn: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(**batch).loss,
    adapter_name: str = "default",
    fit_head: bool = True,
) -> list[Placed]:
    """Choose which coefficients of an adapter are trained, among all of its squares, before it is trained.

    Matrices that get none lose the adapter. The gradient is that of `initialize_gradient_basis`, which an adapter
    with ``basis="gradient"`` gets here too. Costs as much, and 2·r·out·in + 2·r²·min(out, in) flops a matrix; the
    same examples give the same coefficients. Make the optimizer afterwards.

    Args:
        model: with an adapter of PEFT in it.
        dataloader: as of `initialize_gradient_basis`.
        budget: numbers in all: 60000, "60k", "1.5M", or a share of the model's parameters, "0.1%".
        by: "gradient"; or as a control "uniform", at random over all squares, each coefficient equally likely.
        seed: of the control.
        forward_fn: as of `initialize_gradient_basis`.
        adapter_name: which adapter.
        fit_head: as of `initialize_gradient_basis`.

    Returns:
        What each matrix got, in the model's order.

    Raises:
        InputError: the budget is none, or larger than all squares together; no such adapter, or it has been
            trained; or as `initialize_gradient_basis`.
    """
    check_choice("by", by, BY)
    layers = untrained_layers(model, adapter_name)
    parameters = sum(p.numel() for name, p in model.named_parameters() if ".spectral_" not in f".{name}")
    count = parse_count(budget, parameters)
    sums = task_gradients(model, layers, dataloader, forward_fn, fit_head=fit_head)
    generator = torch.Generator().manual_seed(seed)
    gradients, best = {}, {}
    for name, layer in layers.items():
        G = layer.layout.matrix(sums.pop(name)).double()
        gradients[name] = float(G.square().sum())
        if not gradients[name] < float("inf"):
            raise InputError(f"{layer.module_name}: its gradient over these examples is not finite")
        energy, scores = _scores(layer, adapter_name, G)
        if by == "uniform":
            scores = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
        ranked = scores.flatten().sort(descending=True, stable=True)
        index = ranked.indices[:count]
        best[name] = ranked.values[:count], index, energy.flatten()[index]
    chosen = _largest(best, count)
    intervals = {name: layer.adapters[adapter_name].interval for name, layer in layers.items()}
    at = {layers[name].module_name: at_flat(index, intervals[name]) for name, (index, _) in chosen.items()}
    set_positions(model, at, adapter_name=adapter_name)
    total = sum(gradients.values()) or 1.0
    return [
        Placed(
            layer.module_name,
            layer.adapters[adapter_name].interval if name in chosen else (0, 0),
            len(chosen[name][0]) if name in chosen else 0,
            chosen[name][1] / gradients[name] if name in chosen and gradients[name] else 0.0,
            gradients[name] / total,
        )
        for name, layer in layers.items()
    ]


def set_positions(
    model: nn.Module, positions: Mapping[str, Int[Tensor, "2 e"]], *, adapter_name: str = "default"
) -> None:
    """Train an adapter's coefficients at these positions alone, before it is trained.

    Args:
        model: with the adapter in it, as `peft.get_peft_model` or an injection of PEFT made it.
        positions: module name in the base model → ranks of the left and right vectors, by row; see
            `SpectralLinear.place`. A module that is not among them loses the adapter.
        adapter_name: which adapter.

    Raises:
        InputError: there is no such adapter or module, or as `SpectralLinear.place`.
    """
    layers = {layer.module_name: (name, layer) for name, layer in untrained_layers(model, adapter_name).items()}
    config = getattr(model, "peft_config", {}).get(adapter_name)
    unknown = sorted(positions.keys() - layers.keys())
    if config is None or not positions or unknown:
        got = f"positions for {unknown[0]}" if unknown else f"{len(positions)} modules with positions"
        raise InputError(
            f"adapter {adapter_name!r}: got {got}; want modules of a PEFT model that have the adapter: "
            f"{', '.join(list(layers)[:3]) or 'none has'}"
        )
    for module, (name, layer) in layers.items():
        assert isinstance(layer, SpectralLinear)
        if module in positions:
            layer.place(adapter_name, positions[module].to(layer.stored_weight().device))
            continue
        layer.remove(adapter_name)
        if not layer.adapters:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    placed = {re.escape(module): layers[module][1].adapters[adapter_name] for module in positions}
    config.interval_pattern = {pattern: adapter.interval for pattern, adapter in placed.items()}
    patterns = {pattern: adapter.pattern for pattern, adapter in placed.items()}
    config.pattern = SQUARE if set(patterns.values()) == {SQUARE} else patterns
    config.target_modules, config.exclude_modules, config.layers_pattern = set(positions), None, None
    config.choose_blocks(None)


def _scores(
    layer: AdaptedLayer, name: str, G: Float[Tensor, "out in"]
) -> tuple[Float[Tensor, "r r"], Float[Tensor, "r r"]]:
    """(Uᵀ G V)² of each coefficient, and by what a coefficient is chosen; see the module. On the CPU."""
    adapter = layer.adapters[name]
    if adapter.basis in FROM_DATA:
        k, m = adapter.interval
        if not bool(G.any()):
            return (torch.zeros(0, 0, dtype=torch.float64),) * 2
        basis = gradient_basis(G, layer.weight_matrix(), (k, m), layer.module_name, fewer=True)
        adapter.interval, adapter.pattern = (k, k + len(basis.S)), SQUARE
        layer.open(name)
        layer.settle_in(name, basis)
    layer.settle(name)
    U, Vh, S = (getattr(layer, f"spectral_{part}")[name].double() for part in ("U", "Vh", "S"))
    energy = (U.mT @ G @ Vh.mT).square().cpu()
    scores = S.cpu().square()[:, None] * energy if adapter.scale == "sigma" else energy
    if adapter.basis in FROM_DATA:
        rank = torch.arange(len(S))
        shell = torch.maximum(rank[:, None], rank)
        scores = scores.diagonal()[shell] / (2 * shell + 1)
    return energy, scores


def _largest(
    best: Mapping[str, tuple[Tensor, Tensor, Tensor]], count: int
) -> dict[str, tuple[Int[Tensor, " e"], float]]:
    """Of each matrix's best coefficients (score, place in its square, energy) those among the best of all: their
    places, in order, and the sum of their energy.

    Raises:
        InputError: there are fewer.
    """
    names = list(best)
    scores = torch.cat([best[name][0] for name in names])
    owners = torch.cat([torch.full_like(best[name][1], i) for i, name in enumerate(names)])
    if len(scores) < count:
        raise InputError(
            f"got a budget of {count:,} coefficients; the adapted matrices have {len(scores):,} on their ranks: "
            "lower it, or adapt more of them"
        )
    winners = scores.sort(descending=True, stable=True).indices[:count]
    places, energies = (torch.cat([best[name][part] for name in names])[winners] for part in (1, 2))
    owned = {name: owners[winners] == i for i, name in enumerate(names)}
    return {
        name: (places[own].sort().values, float(energies[own].sum())) for name, own in owned.items() if own.any()
    }
