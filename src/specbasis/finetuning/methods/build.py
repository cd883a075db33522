"""How each method is put on a model, given where and how large."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import peft
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, PeftConfig, PsoftConfig
from torch import nn
from transformers import TrainerCallback

from specbasis.adapter.peft_bridge import SpectralConfig
from specbasis.core.errors import InputError
from specbasis.finetuning.methods import layers
from specbasis.finetuning.methods.layers import Bottleneck, SpecLoRA, fasten
from specbasis.finetuning.methods.placement import Site, is_conv1d, norms_behind
from specbasis.finetuning.methods.table import Method


@dataclass(frozen=True)
class Request:
    """What `attach` was asked for, resolved: enough to attach the same method to the same base again.

    Attributes:
        method: name in `METHODS`.
        rank: the method's size; None where it has none.
        interval: ranks [k, m) of the spectral methods.
        sites: the modules it adapts; empty where it does not go by module.
        seed: of every random initialisation and pattern.
        checkpoint: whose singular vectors to use instead of the base's.
        options: settings of the method.
    """

    method: Method
    rank: int | None
    interval: tuple[int, int] | None
    sites: tuple[Site, ...]
    seed: int
    checkpoint: str | None
    options: Mapping[str, Any]

    def arguments(self) -> dict[str, Any]:
        """The arguments of `attach` that ask for the same."""
        return {
            "method": self.method.name,
            "rank": None if self.interval else self.rank,
            "interval": list(self.interval) if self.interval else None,
            "target_modules": [site.name for site in self.sites] or None,
            "seed": self.seed,
            "checkpoint": self.checkpoint,
            "options": dict(self.options),
        }


Built = tuple[nn.Module, tuple[TrainerCallback, ...]]
"""A model with the method on it, and what the Trainer must call for it."""


def build(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    """Freeze the model, add what the method trains, open the head. Draws from the global random generator."""
    return _BUILDERS[request.method.builder](model, request, head)


def _subset(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    """Full finetuning, BitFit, linear probe: some of the model's own parameters."""
    which = _options(request, which="all")["which"]
    model.requires_grad_(False)
    parameters = chosen(model, which, request.sites, head)
    if which != "none" and not parameters:
        raise InputError(f"{request.method.name}: the adapted modules have no biases; use another method")
    for p in parameters:
        p.requires_grad_(True)
    _open(model, head)
    return model, ()


def chosen(model: nn.Module, which: str, places: Sequence[Site], head: tuple[str, ...]) -> list[nn.Parameter]:
    """All parameters ("all"), the biases ("bias") or none ("none") of the places, or of everything but the head."""
    inside = tuple(f"{site.name}." for site in places)
    outside = tuple(f"{name}." for name in head)
    return [
        p
        for name, p in model.named_parameters()
        if name.startswith(inside or "")
        and not name.startswith(outside)
        and p.is_floating_point()
        and (which == "all" or (which == "bias" and p.ndim == 1 and name.endswith("bias")))
    ]


def _open(model: nn.Module, head: tuple[str, ...]) -> None:
    for name in head:
        model.get_submodule(name).requires_grad_(True)


def _spectral(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    """The spectral adapter, through its PEFT bridge. Random bases and pairings follow the seed."""
    options = {key: value for key, value in request.options.items() if key != "where"}
    basis = options.get("basis", "pretrained")
    if basis in ("random", "shuffled"):
        options["basis"] = f"{basis}:{request.seed}"
    if basis == "from":
        options["basis"] = f"from:{request.checkpoint}"
    return _with_peft(model, request, head, SpectralConfig, interval=request.interval, **options)


def _lora(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    """LoRA and its relatives in PEFT. The update is scaled by α/r; α = 2 r, and r where the start is W itself."""
    rank = request.rank
    assert rank is not None
    at_weight = str(request.options.get("init_lora_weights", True)).startswith("pissa")
    options = {"lora_alpha": rank if at_weight else 2 * rank, **request.options}
    return _with_peft(model, request, head, LoraConfig, r=rank, **options)


def _psoft(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    """PSOFT with a free core: W + U diag(S) (R − 1) Vh."""
    rank = request.rank
    return _with_peft(model, request, head, PsoftConfig, r=rank, **{"psoft_alpha": rank, **request.options})


UNKNOWN_STEPS = 1_000_000
"""AdaLoRA wants the number of steps before the Trainer knows it; the callback puts it right."""


def _adalora(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    """AdaLoRA in PEFT: starts with 1.5 times the rank and prunes to it on average (Zhang et al. 2023, §4)."""
    rank = request.rank
    assert rank is not None
    steps = request.options.get("total_step")
    options: dict[str, Any] = {"lora_alpha": 2 * rank, "init_r": math.ceil(1.5 * rank), "target_r": rank}
    options |= {"total_step": UNKNOWN_STEPS, **request.options}
    built, _ = _with_peft(model, request, head, AdaLoraConfig, **options)
    return built, (AllocateRanks(resolve=steps is None),)


class AllocateRanks(TrainerCallback):
    """Calls AdaLoRA's allocation after every step; without it, the method is a fixed-rank one.

    Args:
        resolve: take the number of steps from the Trainer, and spend the first 10 % at the starting rank and the
            last 50 % at the final one, with an allocation each 1 % between. Else PEFT's configuration stands.
    """

    def __init__(self, *, resolve: bool = True) -> None:
        self.resolve = resolve

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the allocator how many steps there will be."""
        tuner = _adalora_of(kwargs["model"])
        if self.resolve:
            steps = int(state.max_steps)
            config = tuner.peft_config[tuner.trainable_adapter_name]
            config.total_step, config.tinit, config.tfinal = steps, steps // 10, steps // 2
            config.deltaT = max(1, steps // 100)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rank the triplets by this step's gradients, which the Trainer has not cleared yet, and prune."""
        _adalora_of(kwargs["model"]).update_and_allocate(state.global_step)


def _adalora_of(model: nn.Module) -> AdaLoraModel:
    return next(module for module in model.modules() if isinstance(module, AdaLoraModel))


def _with_peft(
    model: nn.Module, request: Request, head: tuple[str, ...], kind: Callable[..., PeftConfig], **options: Any
) -> Built:
    """A PEFT method on the sites, with head and pooler as modules saved whole.

    Raises:
        InputError: PEFT does not know an option, or refuses a value.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _known(request, options, known)
    transposed = {is_conv1d(model.get_submodule(site.name)) for site in request.sites}
    if "fan_in_fan_out" in known and transposed == {True}:
        options["fan_in_fan_out"] = True
    try:
        config = kind(
            target_modules=[site.name for site in request.sites],
            modules_to_save=list(head) or None,
            task_type="SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else None,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"{request.method.name}: {error}") from None
    return peft.get_peft_model(model, config), ()


def _houlsby(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    """Behind the output matrix of attention and of the feed-forward network, before the residual sum."""
    places = {site.name: site.name for site in request.sites}
    return _bottlenecks(model, request, head, places)


def _pfeiffer(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    """Behind the norm of the feed-forward sum with the residual; without such a norm, behind the block."""
    return _bottlenecks(model, request, head, norms_behind(model, request.sites))


def _bottlenecks(model: nn.Module, request: Request, head: tuple[str, ...], places: Mapping[str, str]) -> Built:
    options = _options(request, activation="relu")
    model.requires_grad_(False)
    assert request.rank is not None
    for site in request.sites:
        layer, source = model.get_submodule(places[site.name]), model.get_submodule(site.name)
        child = Bottleneck(site.shape[0], request.rank, options["activation"], source.weight)  # type: ignore[arg-type]
        normalises = "norm" in type(layer).__name__.lower()
        fasten(layer, child, layers.add_around_norm if normalises else layers.add_behind)
    _open(model, head)
    return model, ()


def _svft(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    pattern = _options(request, pattern="plain")["pattern"]
    return _updates(model, request, head, lambda layer, name: layers.SVFT(layer, pattern, request.rank or 0, name))


TOP = 128
"""How many leading singular values SpecLoRA rescales; the published description does not say."""


def _speclora(model: nn.Module, request: Request, head: tuple[str, ...]) -> Built:
    rank = request.rank
    assert rank is not None
    options = _options(request, top=TOP, lora_alpha=2 * rank)
    scaling = options["lora_alpha"] / rank
    return _updates(model, request, head, lambda layer, name: SpecLoRA(layer, rank, options["top"], scaling, name))


def _updates(
    model: nn.Module,
    request: Request,
    head: tuple[str, ...],
    make: Callable[[nn.Module, str], layers.Update],
) -> Built:
    """One linear update for each site."""
    model.requires_grad_(False)
    made = [(layer, make(layer, site.name)) for site in request.sites for layer in [model.get_submodule(site.name)]]
    for layer, child in made:
        fasten(layer, child, layers.add_update)
    _open(model, head)
    return model, ()


def _options(request: Request, **defaults: Any) -> dict[str, Any]:
    """The request's options over the defaults.

    Raises:
        InputError: an option has no default, so the method does not know it.
    """
    _known(request, request.options, defaults)
    return {**defaults, **request.options}


def _known(request: Request, options: Any, known: Any) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(
            f"{request.method.name} has no option {unknown[0]!r}; want some of {', '.join(sorted(known))}"
        )


_BUILDERS: Mapping[str, Callable[[nn.Module, Request, tuple[str, ...]], Built]] = MappingProxyType(
    {
        "subset": _subset,
        "spectral": _spectral,
        "lora": _lora,
        "adalora": _adalora,
        "psoft": _psoft,
        "houlsby": _houlsby,
        "pfeiffer": _pfeiffer,
        "svft": _svft,
        "speclora": _speclora,
    }
)
