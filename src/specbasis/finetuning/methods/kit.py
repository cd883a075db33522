"""What finetuning methods are made of: the row of a method, where it stands and how large it is, and the ways to
put one on a model. A method itself is one file beside this one: a class, and its rows given to `register`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import peft
import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from specbasis.adapter.layouts import CONV1D, layout_of
from specbasis.core.errors import InputError
from specbasis.finetuning.methods.sites import ALL_LINEAR, Site, named_sites, sites
from specbasis.finetuning.options import Placement


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to finetune: its row as data, and how it is counted and put on a model.

    Attributes:
        name: how the command line and result rows call it.
        title: how a table or figure calls it.
        trains: what is trained besides task head and pooler, in a formula where there is one.
        source: where the method is published.
        roles: roles of the matrices it adapts by default; empty where it does not go by matrix.
        blocks: blocks it adapts by default; None for all.
        size: default of its one size parameter, ``rank``: the width of the interval, the rank of the update, the
            width of the bottleneck, or the number of trained entries for each row (SVFT). None where it has no
            size, or where it follows the model (spectral: K = 300 at width 768).
        learning_rate: default for tasks that ``schedule`` does not list. The paper gives rates for its own method
            alone; the others' are this project's, in the range of their papers, to be tuned on a split of train.
        epochs: default for such tasks.
        schedule: task → (epochs, learning rate), as published with the paper's own runs.
        options: settings that make it this method; a caller's options override them.
        note: what a reader of its results should know.
    """

    name: str
    title: str
    trains: str
    source: str
    roles: tuple[str, ...] = ALL_LINEAR
    blocks: tuple[int, ...] | None = None
    size: int | None = None
    learning_rate: float = 5e-4
    epochs: int = 10
    schedule: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    adds: ClassVar[bool] = True
    """Whether what it trains comes on top of the model's own parameters."""
    takes_budget: ClassVar[bool] = False
    """Whether a budget of coefficients can be spread over its matrices."""
    takes_interval: ClassVar[bool] = False
    """Whether it can be asked for ranks [k, m) in place of a rank."""

    def recipe(self, task: str) -> tuple[int, float]:
        """(epochs, learning rate) for a task: the published ones, or the defaults."""
        return self.schedule.get(task, (self.epochs, self.learning_rate))

    def sites(self, model: nn.Module, where: Placement) -> tuple[Site, ...]:
        """The modules that the method adapts, by name, or by role and block; its own where neither is given."""
        given = [name for name in ("roles", "blocks") if getattr(where, name) is not None]
        if where.target_modules is not None:
            if given:
                raise InputError(f"got target_modules and {given[0]}; want one of the two")
            return named_sites(model, where.target_modules)
        if not given and not self.roles:
            return ()
        roles = self.roles_among(where.roles or self.roles or ALL_LINEAR)
        return sites(model, roles, where.blocks if given else self.blocks)

    def roles_among(self, roles: Sequence[str]) -> Sequence[str]:
        """Those of the roles asked for that the method can adapt."""
        return roles

    def default_size(self, sites: Sequence[Site]) -> int | None:
        """The size where none is asked for; None for a method without a size."""
        return self.size

    def largest_size(self, sites: Sequence[Site]) -> int:
        """The largest size that every adapted matrix has room for."""
        return min(site.rank for site in sites)

    def sized(self, sites: Sequence[Site], where: Placement) -> tuple[int | None, tuple[int, int] | None]:
        """(rank, interval) from what was asked for and the defaults.

        Raises:
            InputError: the method takes no interval, or has no such size.
        """
        rank, interval, default = where.rank, where.interval, self.default_size(sites)
        if where.budget is not None and not self.takes_budget:
            raise InputError(f"got budget = {where.budget!r}; {self.name} takes rank only")
        if interval is not None and not self.takes_interval:
            raise InputError(f"got interval = {interval}; {self.name} takes rank only")
        if interval is not None and rank is not None:
            raise InputError(f"got interval = {interval} and rank = {rank}; want one of the two")
        if rank is not None and (rank < 1 or default is None):
            want = "no rank: this method has no size" if default is None else "rank >= 1"
            raise InputError(f"{self.name}: got rank = {rank}; want {want}")
        return rank or default, interval

    def check_options(self, options: Iterable[str], known: Iterable[str]) -> None:
        """Refuse an option that the method does not know."""
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InputError(f"{self.name} has no option {unknown[0]!r}; want some of {', '.join(sorted(known))}")

    def trains_all(self, request: Request) -> bool:
        """Whether every parameter of the model is trained, so that the whole model is what is saved."""
        return False

    def attach(self, model: nn.Module, request: Request, head: tuple[str, ...]) -> nn.Module:
        """Freeze the model, add what the method trains, open the head. Draws from the global random generator."""
        raise NotImplementedError

    def callbacks(self, request: Request) -> tuple[TrainerCallback, ...]:
        """What the Trainer must call for the method."""
        return ()

    def count(self, model: nn.Module, sites: Sequence[Site], rank: int | None) -> int:
        """Parameters that the method trains, without head and pooler: attached to empty layers of these shapes."""
        request = self.counted(Request(self, rank, (0, rank) if rank else None, (), 0, "", self.options))
        shapes = Counter(site.shape for site in sites)
        return sum(self.count_of(shape, request) * times for shape, times in shapes.items())

    def counted(self, request: Request) -> Request:
        """The request whose parameters count, without options that would read a weight."""
        return request

    def count_of(self, shape: tuple[int, int], request: Request) -> int:
        """Parameters that the method trains at one matrix (out, in), attached on the meta device."""
        with torch.device("meta"):
            model = nn.ModuleDict({"layer": nn.Linear(shape[1], shape[0], bias=False)})
        request = dataclasses.replace(request, sites=(Site("layer", shape),))
        with torch.random.fork_rng(devices=[]):
            attached = self.attach(model, request, ())
        return sum(p.numel() for p in attached.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Request:
    """What `attach` was asked for, resolved: enough to attach the same method to the same base again.

    Attributes:
        method: the method.
        rank: its size; None where it has none.
        interval: ranks [k, m) of the spectral methods.
        sites: the modules it adapts; empty where it does not go by module.
        seed: of every random initialisation and pattern.
        checkpoint: whose singular vectors to use instead of the base's.
        options: settings of the method.
        budget: coefficients in all, where they are not all of each matrix's square.
    """

    method: Method
    rank: int | None
    interval: tuple[int, int] | None
    sites: tuple[Site, ...]
    seed: int
    checkpoint: str | None
    options: Mapping[str, Any]
    budget: int | str | None = None

    @property
    def size(self) -> int:
        """The rank, of a method that has one."""
        assert self.rank is not None
        return self.rank

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
            "budget": self.budget,
        }

    def options_over(self, **defaults: Any) -> dict[str, Any]:
        """The request's options over the defaults.

        Raises:
            InputError: an option has no default, so the method does not know it.
        """
        self.method.check_options(self.options, defaults)
        return {**defaults, **self.options}


_METHODS: dict[str, Method] = {}

METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""Every method by name, in the order of their files."""


def register(*methods: Method) -> None:
    """Make methods known by their names."""
    _METHODS.update({method.name: method for method in methods})


def method_named(method: str | Method) -> Method:
    """The method of a name.

    Raises:
        InputError: there is none.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise InputError(f"got method {method!r}; want one of {', '.join(METHODS)}")
    return METHODS[method]


def open_head(model: nn.Module, head: tuple[str, ...]) -> None:
    """Train the head and pooler."""
    for name in head:
        model.get_submodule(name).requires_grad_(True)


class PeftMethod(Method):
    """A method of PEFT: a configuration for the sites, with head and pooler as modules saved whole."""

    config: ClassVar[Callable[..., PeftConfig]]
    """PEFT's class of the configuration."""

    def fields(self, request: Request) -> dict[str, Any]:
        """Fields of the configuration, the request's options among them."""
        raise NotImplementedError

    def attach(self, model: nn.Module, request: Request, head: tuple[str, ...]) -> nn.Module:
        """Inject the method.

        Raises:
            InputError: PEFT does not know an option, or refuses a value.
        """
        fields = self.fields(request)
        known = {entry.name for entry in dataclasses.fields(self.config)}  # type: ignore[arg-type]
        self.check_options(fields, known)
        layers = [model.get_submodule(site.name) for site in request.sites]
        if "fan_in_fan_out" in known and layers and all(layout_of(layer, self.name) is CONV1D for layer in layers):
            fields["fan_in_fan_out"] = True
        try:
            config = type(self).config(
                target_modules=[site.name for site in request.sites],
                modules_to_save=list(head) or None,
                task_type="SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else None,
                **fields,
            )
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.name}: {error}") from None
        adapted: nn.Module = peft.get_peft_model(model, config)
        return adapted


# Methods that PEFT lacks are small modules that hang at a layer of the model, and a forward hook brings them in.
# The layer itself, its class and the names of its parameters stay as they are. The hook is a function of this
# module, so that a model with hooks can be copied and pickled.

CHILD = "finetuned"
"""Under which name a method's module hangs at the layer it adapts."""


class Added(nn.Module):
    """What a method adds to one layer: a function of the layer's input or output."""

    def join(self, layer: nn.Module, x: Tensor, output: Any) -> Any:
        """The layer's output with what this module adds, for the layer's first input x."""
        raise NotImplementedError


def joined(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Hook of a layer: bring in the module that hangs at it."""
    child = layer.get_submodule(CHILD)
    assert isinstance(child, Added)
    return child.join(layer, args[0] if args else None, output)  # type: ignore[arg-type]


def additions(model: nn.Module) -> dict[str, Added]:
    """What a method has added to a model, by the name of the layer at which it hangs."""
    return {
        name: module.get_submodule(CHILD)
        for name, module in model.named_modules()
        if isinstance(getattr(module, CHILD, None), Added)
    }


class AddedMethod(Method):
    """A method that PEFT lacks: one `Added` for each site."""

    def added(self, layer: nn.Module, site: Site, request: Request) -> Added:
        """What the method adds to one layer."""
        raise NotImplementedError

    def hosts(self, model: nn.Module, sites: Sequence[Site]) -> Mapping[str, str]:
        """At which module each site's addition hangs."""
        return {site.name: site.name for site in sites}

    def attach(self, model: nn.Module, request: Request, head: tuple[str, ...]) -> nn.Module:
        """Hang an addition at the host of each site.

        Raises:
            InputError: a layer has one already.
        """
        model.requires_grad_(False)
        hosts = self.hosts(model, request.sites)
        children = [self.added(model.get_submodule(site.name), site, request) for site in request.sites]
        for site, child in zip(request.sites, children, strict=True):
            host = model.get_submodule(hosts[site.name])
            if hasattr(host, CHILD):
                raise InputError(
                    f"two adapters would stand at one {type(host).__name__}; leave one of the modules out"
                )
            host.add_module(CHILD, child)
            host.register_forward_hook(joined)
        open_head(model, head)
        return model
