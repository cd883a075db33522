"""What would have to be kept for a cut at a given point of a model's forward, and what then stands below it.

The outermost calls below the point are replaced by stand-ins, and autograd tells which of their outputs the rest of
the model still reads: those are the values to keep. A plan is returned only if the model with stand-ins gives the
outputs of the model itself.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specbasis.finetuning.prefix.probe import (
    Call,
    Probe,
    agree,
    hooked,
    leaves_of,
    one_line,
    outputs,
    record,
    weighted,
)
from specbasis.finetuning.prefix.standin import (
    Action,
    Blank,
    Dim,
    Output,
    Site,
    Suffix,
    Value,
    keyed,
)

Actions = dict[str, tuple[Action, ...]]
_Groups = list[tuple[list[Site], Tensor]]
Positions = Literal["all", "first"]

_WRAPPERS = re.compile(r"base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")


@dataclass(frozen=True)
class Kept:
    """One value of an example that the suffix reads.

    Attributes:
        sites: the outputs whose sum it is; several where the suffix reads nothing but their sum.
        shape: its dimensions in a batch.
        dtype: in which the model computes it.
        positions: which positions of the sequence the suffix reads; the others are not kept.
    """

    sites: tuple[Site, ...]
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    positions: Positions = "all"

    @property
    def by_token(self) -> bool:
        """Whether it has a row for each token."""
        return self.shape[1:2] == ("tokens",)

    @property
    def packed(self) -> bool:
        """Whether what is kept grows with the number of tokens."""
        return self.by_token and self.positions == "all"

    @property
    def dims(self) -> tuple[int, ...]:
        """Fixed dimensions: of one token, or of an example if it has no row for each token."""
        return tuple(n for n in self.shape[1:] if not isinstance(n, str))

    @property
    def width(self) -> int:
        """Numbers for one token if it is packed, else for one example."""
        return math.prod(self.dims)

    def size(self, tokens: int) -> int:
        """Numbers for an example of so many tokens."""
        return self.width * (tokens if self.packed else 1)

    def chosen(self, mask: Tensor | None) -> Tensor | None:
        """The positions that are kept among those that are no padding, (examples, tokens); None: it has none."""
        if not self.by_token or mask is None:
            return None
        return mask if self.positions == "all" else mask & (mask.cumsum(1) == 1)

    def total(self, outputs: Mapping[Site, Tensor]) -> Tensor:
        """Its value, from the outputs of which it is the sum."""
        return functools.reduce(torch.add, [outputs[site] for site in self.sites])

    def __str__(self) -> str:
        names = " + ".join(plain_name(site.module) for site in self.sites)
        where = f" at the {self.positions} position" if self.by_token and not self.packed else ""
        return f"{names}{where} ({self.width} numbers for each {'token' if self.packed else 'example'})"


def plain_name(name: str) -> str:
    """A module's name without what PEFT's wrappers put in it."""
    return _WRAPPERS.sub("", name)


class _EnoughError(Exception):
    """Everything that is to be kept has been computed."""


def capture(model: nn.Module, batch: Mapping[str, Any], kept: Sequence[Kept]) -> list[Tensor]:
    """The values to keep of a batch, from a forward pass that ends at the last of them."""
    sites = {site for value in kept for site in value.sites}
    numbers: Counter[str] = Counter()
    outputs: dict[Site, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            number, numbers[name] = numbers[name], numbers[name] + 1
            for index, leaf in enumerate(pytree.tree_leaves(output)):
                if Site(name, number, index) in sites:
                    outputs[Site(name, number, index)] = leaf.clone()  # the model may change it in place later
            if len(outputs) == len(sites):
                raise _EnoughError

        return hook

    names = {site.module for site in sites}
    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with hooked(*handles), suppress(_EnoughError):
        model(**batch)
    return [value.total(outputs) for value in kept]


class NoPlanError(Exception):
    """A point is no place for a cut; the message is the reason."""


@dataclass(frozen=True)
class Run:
    """A made-up batch, the calls in its forward pass, the outputs, and what the model used for them.

    Attributes:
        probe: the batch.
        calls: by their start.
        outputs: at the positions that are no padding.
        used: ids of the parameters that the outputs depend on.
    """

    probe: Probe
    calls: Sequence[Call]
    outputs: Sequence[Tensor]
    used: set[int]

    @classmethod
    def of(cls, model: nn.Module, probe: Probe) -> Run:
        """The forward pass of a batch."""
        calls, result = record(model, probe.batch)
        used = leaves_of(outputs(result, None))
        return cls(probe, calls, [t.detach() for t in outputs(result, probe.mask)], used)

    @property
    def sizes(self) -> tuple[int, int | None]:
        """Number of examples and of tokens."""
        mask = self.probe.mask
        return next(iter(self.probe.batch.values())).shape[0], None if mask is None else mask.shape[1]

    def value(self, kept: Kept) -> Tensor:
        """What is to be kept of this batch, with zeros where nothing is."""
        calls = {call.key: call for call in self.calls}
        leaves = {site: calls[site.module, site.number].leaves[site.index].detach() for site in kept.sites}
        total, chosen = kept.total(leaves), kept.chosen(self.probe.mask)
        return total if chosen is None else total * chosen.view(*total.shape[:2], *(1,) * (total.dim() - 2))

    def fed(self, kept: Sequence[Kept]) -> Probe:
        """The batch with the values of a cut, as a batch of training brings them; they take gradients."""
        values = keyed(self.value(value).requires_grad_() for value in kept)
        return Probe({**self.probe.batch, **values}, self.probe.mask)


def plan(model: nn.Module, runs: Sequence[Run], point: Call) -> tuple[tuple[Kept, ...], Actions]:
    """What to keep for a cut right before a call, and what the calls below it become.

    What holds no parameter (a rotation of positions) or has no example in it (a table of relative positions) runs
    again for every batch.

    Raises:
        NoPlanError: with the reason.
    """
    below = _below(model, runs[0].calls, point)
    try:
        draft = _Draft(model, runs, below)
        read = draft.gradients()
        draft.rerun = {
            (site.module, site.number)
            for site in read
            if draft.shapes[site][:1] != ("batch",)
            or not any(True for _ in draft.modules[site.module].parameters())
        }
        if draft.rerun:
            read = draft.gradients()
        alone = [([site], grad) for site, grad in read.items()]
        groups = _sums(read)
        try:
            return draft.checked(groups)
        except NoPlanError:
            if len(alone) == len(groups):
                raise
            return draft.checked(alone)
    except NoPlanError:
        raise
    except Exception as error:  # the model's own code, fed with blanks
        raise NoPlanError(f"the model does not run without what is below ({one_line(error)})") from error


def _below(model: nn.Module, calls: Sequence[Call], point: Call) -> list[Call]:
    """The outermost calls that have ended when another one begins."""
    ended = {id(call) for call in calls if call.end < point.start}
    below = [call for call in calls if id(call) in ended and id(call.parent) not in ended]
    modules = {call.module: list(model.get_submodule(call.module).parameters()) for call in below}
    for name, parameters in modules.items():
        if any(p.requires_grad for p in parameters):
            raise NoPlanError(f"{plain_name(name)} has trained parameters that made-up inputs do not reach")
    keys = {call.key for call in below}
    for call in calls:
        if modules.get(call.module) and call.key not in keys:
            raise NoPlanError(f"{plain_name(call.module)} runs both before and after it")
    if not below:
        raise NoPlanError(f"nothing comes before {plain_name(point.module)}")
    return below


def _shapes(below: Sequence[Call], runs: Sequence[Run]) -> dict[Site, tuple[Dim, ...]]:
    """Dimensions of each call's outputs as functions of the batch, from the outputs for two batches.

    Raises:
        NoPlanError: they follow neither the number of examples nor that of tokens.
    """
    twins = {call.key: call for call in runs[1].calls}
    named = dict(zip(zip(*(run.sizes for run in runs), strict=True), ("batch", "tokens"), strict=True))
    shapes: dict[Site, tuple[Dim, ...]] = {}
    for call in below:
        twin = twins.get(call.key)
        varies = f"what {plain_name(call.module)} returns depends on the batch"
        if twin is None or len(twin.leaves) != len(call.leaves):
            raise NoPlanError(varies)
        for index, leaves in enumerate(zip(call.leaves, twin.leaves, strict=True)):
            first, second = (tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in leaves)
            if len(first) != len(second):
                raise NoPlanError(varies)
            dims: list[Dim] = []
            for pair in zip(first, second, strict=True):
                if pair[0] != pair[1] and pair not in named:
                    raise NoPlanError(f"{varies} in another way than with its examples or tokens")
                dims.append(named[pair] if pair[0] != pair[1] else pair[0])  # type: ignore[arg-type]
            shapes[Site(*call.key, index)] = tuple(dims)
    return shapes


def _sums(read: Mapping[Site, Tensor]) -> _Groups:
    """Outputs by equal gradients: they are likely to be read as a sum only, as in a residual connection."""
    groups: _Groups = []
    for site, grad in read.items():
        for sites, other in groups:
            if grad.shape == other.shape and torch.allclose(
                grad, other, rtol=1e-4, atol=1e-6 * float(other.abs().max())
            ):
                sites.append(site)
                break
        else:
            groups.append(([site], grad))
    return groups


class _Draft:
    """A plan in the making.

    Attributes:
        modules: of the model, by name.
        leaves: the outputs of the calls below the point, in the first of two batches.
        shapes: their dimensions.
        rerun: the calls that run again for every batch.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run], below: Sequence[Call]) -> None:
        self.model, self.runs, self.below = model, runs, below
        self.modules = dict(model.named_modules())
        self.leaves = {Site(*call.key, index): leaf for call in below for index, leaf in enumerate(call.leaves)}
        self.shapes = _shapes(below, runs)
        self.rerun: set[tuple[str, int]] = set()

    def actions(self, values: Mapping[Site, Value]) -> Actions:
        """What the calls below the point become: outputs at these sites are values, all others blank."""
        actions: dict[str, list[Action]] = defaultdict(list)
        for call in self.below:
            leaves = [self._leaf(Site(*call.key, index), values) for index in range(len(call.leaves))]
            actions[call.module].append(None if call.key in self.rerun else Output(call.spec, tuple(leaves)))
        return {name: tuple(calls) for name, calls in actions.items()}

    def _leaf(self, site: Site, values: Mapping[Site, Value]) -> Any:
        leaf = self.leaves[site]
        if site in values:
            return values[site]
        if isinstance(leaf, Tensor):
            return Blank(self.shapes[site], leaf.dtype)
        return leaf if isinstance(leaf, bool | int | float | str) else None

    def _values(self, sites: Sequence[Site]) -> dict[Site, Value]:
        names = keyed(self.leaves[site] for site in sites)
        return {site: Value(name, self.leaves[site].dtype) for site, name in zip(sites, names, strict=True)}

    def gradients(self) -> dict[Site, Tensor]:
        """The outputs that the rest of the model reads, with the gradients of random weights of its own outputs."""
        probe = self.runs[0].probe
        read = {
            site: leaf.detach().clone().requires_grad_()
            for site, leaf in self.leaves.items()
            if (site.module, site.number) not in self.rerun
            and isinstance(leaf, Tensor)
            and leaf.is_floating_point()
        }
        if not read:
            raise NoPlanError("nothing is read from below it")
        suffix = Suffix(self.model, self.actions(self._values(list(read))))
        with torch.enable_grad(), suffix.running():
            loss = weighted(outputs(self.model(**probe.batch, **keyed(read.values())), probe.mask))
        if loss is None:
            raise NoPlanError("the model's outputs do not depend on what is above it")
        grads = torch.autograd.grad(loss, list(read.values()), allow_unused=True)
        return {site: grad for site, grad in zip(read, grads, strict=True) if grad is not None}

    def checked(self, groups: _Groups) -> tuple[tuple[Kept, ...], Actions]:
        """The plan that keeps a value for each group, if the model's outputs come out the same."""
        if not groups:
            raise NoPlanError("nothing is read from below it")
        kept = []
        for sites, grad in groups:
            shape = self.shapes[sites[0]]
            if shape[:1] != ("batch",) or "batch" in shape[1:] or "tokens" in shape[2:]:
                raise NoPlanError(
                    f"what {plain_name(sites[0].module)} returns has no row for each example or token"
                )
            first = shape[1:2] == ("tokens",) and not bool(grad[:, 1:].any())
            kept.append(Kept(tuple(sites), shape, self.leaves[sites[0]].dtype, "first" if first else "all"))
        actions = self.actions(self._values([value.sites[0] for value in kept]))
        for run in self.runs:
            with torch.no_grad(), Suffix(self.model, actions).running():
                got = outputs(self.model(**run.fed(kept).batch), run.probe.mask)
            if not agree(got, run.outputs):
                raise NoPlanError("the outputs of the model come out different when it runs from there")
        return tuple(kept), actions
