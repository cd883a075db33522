"""Where a model can be cut: before its first trained module, found by watching the model's own forward.

Nothing here knows a family. The model runs on a small made-up batch while every call of a module is noted. What
has ended when the first trained module begins is the frozen prefix. Its outermost calls are replaced by stand-ins,
and autograd tells which of their outputs the rest of the model still reads: those are the values to keep. A cut is
returned only if the model with stand-ins gives the outputs of the model itself.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specbasis.finetuning.prefix.gather import LeanGather
from specbasis.finetuning.prefix.narrow import search_narrow, slicing
from specbasis.finetuning.prefix.probe import (
    Call,
    Probe,
    agree,
    leaves_of,
    make_probe,
    one_line,
    outputs,
    probing,
    record,
    weighted,
)
from specbasis.finetuning.prefix.standin import Action, Blank, Constant, Dim, Leaf, Output, Site, Suffix, Value

Positions = Literal["all", "first"]

_WRAPPERS = re.compile(r"base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")
_VOLATILE = re.compile(r"^_|^id2label$|^label2id$|^problem_type$|^architectures$|^(torch_)?dtype$|drop|use_cache")
_LABELS = ("start_positions", "end_positions")
_LEAST_SHARE = 0.1  # of the matrix work of a forward pass: less than this below the cut is not worth a cache


@dataclass(frozen=True)
class Uncut:
    """A model that has no frozen prefix worth keeping, and why, in words for a person."""

    reason: str


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

    def __str__(self) -> str:
        named = " + ".join(plain_name(site.module) for site in self.sites)
        where = f" at the {self.positions} position" if self.by_token and not self.packed else ""
        return f"{named}{where} ({self.width} numbers for each {'token' if self.packed else 'example'})"


@dataclass(frozen=True)
class Cut:
    """A point of a model's forward below which nothing is trained.

    Attributes:
        before: the module whose call comes right after the cut.
        kept: what the suffix reads from below the cut.
        actions: what the calls below the cut become, by module name.
        inputs: names under which the model takes what the kept values depend on: all of its inputs but labels.
        narrow: module after which the suffix needs the first position only, or None.
        share: part of a forward pass's matrix work that lies below the cut.
        digest: SHA-256 of all that the kept values depend on besides the example: weights, structure, place.
    """

    before: str
    kept: tuple[Kept, ...]
    actions: Mapping[str, tuple[Action, ...]]
    inputs: frozenset[str]
    narrow: str | None
    share: float
    digest: str

    def __str__(self) -> str:
        kept = " and ".join(map(str, self.kept))
        return f"cut before {plain_name(self.before)}, {self.share:.0%} of the matrix work below it; kept: {kept}"

    @contextmanager
    def suffix(self, model: nn.Module, *, park: Path | None = None) -> Iterator[nn.Module]:
        """The model, with its prefix standing still for batches that bring their activations.

        Inside, a batch with the keys that `PrefixCache.collator` adds runs only what is above the cut; any other
        batch runs through the whole model. Parameters, names and the state dict are those of the model, so
        saving needs no care. At the end the model is as it was.

        Args:
            model: the one in which the cut was found.
            park: a folder where a file of the prefix's size may be: its weights are then held there, mapped into
                memory, and their memory is free while training; on a GPU they move to the host's memory.

        Raises:
            InputError: the model is not one in which the cut was found.
        """
        suffix = Suffix(model, self.actions, [value.dtype for value in self.kept], self.before)
        with suffix.running(park), slicing(model, self.narrow), LeanGather():
            yield model


def plain_name(name: str) -> str:
    """A module's name without what PEFT's wrappers put in it."""
    return _WRAPPERS.sub("", name)


def find_cut(model: nn.Module) -> Cut | Uncut:
    """The place before the model's first trained module to cut at, or the reason why there is none.

    The cut may lie inside of a block: where only the feed-forward layer is trained, after the attention. Among
    the points between the start of the first trained module's block and that module it is the one at which fewest
    numbers have to be kept, and of those the one with the most matrix work below it.

    Costs some tens of forward passes of three short examples. The model is left as it was.
    """
    with probing(model):
        try:
            probes = tuple(make_probe(model, rows, tokens) for rows, tokens in ((3, 11), (2, 7)))
            runs = tuple(_run(model, probe) for probe in probes)
        except Exception as error:  # any model may fail in any way on made-up inputs
            return Uncut(f"the model does not run on a batch of random inputs ({one_line(error)})")
        return _search(model, runs)


@dataclass(frozen=True)
class _Run:
    """A batch, the calls in its forward pass, and the outputs."""

    probe: Probe
    calls: Sequence[Call]
    outputs: Sequence[Tensor]
    used: set[int]

    @property
    def sizes(self) -> tuple[int, int | None]:
        """Number of examples and of tokens."""
        batch = self.probe.batch
        return next(iter(batch.values())).shape[0], self.probe.mask.shape[
            1
        ] if self.probe.mask is not None else None

    def value(self, kept: Kept) -> Tensor:
        """What is to be kept of this batch, with zeros where nothing is."""
        at = {call.key: call for call in self.calls}
        total = sum(at[site.module, site.number].leaves[site.index].detach() for site in kept.sites)
        assert isinstance(total, Tensor)
        if not kept.by_token or self.probe.mask is None:
            return total
        return total * chosen(self.probe.mask, kept.positions).view(*total.shape[:2], *(1,) * (total.dim() - 2))


def _run(model: nn.Module, probe: Probe) -> _Run:
    calls, result = record(model, probe.batch)
    return _Run(probe, calls, [t.detach() for t in outputs(result, probe.mask)], leaves_of(outputs(result, None)))


# --- the search ---------------------------------------------------------------------------------------------------


class _NoPlanError(Exception):
    """A point is no place for a cut; the message is the reason."""


@dataclass(frozen=True)
class _Plan:
    before: Call
    kept: tuple[Kept, ...]
    actions: Mapping[str, tuple[Action, ...]]
    below: Sequence[Call]

    @property
    def size(self) -> int:
        """Numbers to keep for an example of sixteen tokens."""
        return sum(value.width * (16 if value.packed else 1) for value in self.kept)


def _search(model: nn.Module, runs: Sequence[_Run]) -> Cut | Uncut:
    calls = runs[0].calls
    first = _first_trained(model, runs[0])
    if isinstance(first, Uncut):
        return first
    work = _Work(model, calls)
    if work.share(first) < _LEAST_SHARE:
        return Uncut(
            f"{plain_name(first.module)} is trained, and {work.share(first):.0%} of the work is done before it: "
            "too little to keep"
        )
    plans: list[tuple[_Plan, float]] = []
    reason = ""
    for share, points in reversed(_points(calls, first, work).items()):
        for point in points:
            try:
                plans.append((_plan(model, runs, point), share))
                if len(plans[-1][0].kept) == 1:
                    break
            except _NoPlanError as error:
                reason = reason or str(error)
    if not plans:
        return Uncut(f"no cut before {plain_name(first.module)}: {reason}")
    best, share = min(plans, key=lambda entry: (entry[0].size, -entry[1]))
    if share < _LEAST_SHARE:
        return Uncut(f"no cut that spares work before {plain_name(first.module)}: {reason}")
    narrow = _narrow(model, runs[0], best)
    digest = _digest(model, runs[0], best)
    return Cut(best.before.module, best.kept, best.actions, _inputs(model), narrow, share, digest)


def _inputs(model: nn.Module) -> frozenset[str]:
    """What the model's forward takes besides labels; below PEFT's wrappers, which take anything."""
    inner: Any = model
    inner = inner.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(inner.forward).parameters
    return frozenset(name for name in names if "label" not in name and name not in _LABELS)


def _narrow(model: nn.Module, run: _Run, plan: _Plan) -> str | None:
    suffix = Suffix(model, plan.actions, [value.dtype for value in plan.kept])
    values = [run.value(kept) for kept in plan.kept]
    return search_narrow(model, run.probe, lambda: suffix.fed([v.detach().requires_grad_() for v in values]))


def _first_trained(model: nn.Module, run: _Run) -> Call | Uncut:
    """The first call of a module that owns a trained parameter, or inside of which one is read."""
    called = {call.module for call in run.calls}
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not trained:
        return Uncut("no parameter of the model is trained")
    owners = set()
    for name, parameter in trained:
        owner = name.rpartition(".")[0]
        if id(parameter) in run.used:
            while owner not in called:
                owner = owner.rpartition(".")[0]
            owners.add(owner)
    if not owners:
        return Uncut("the model's outputs depend on no trained parameter")
    return next(call for call in run.calls if call.module in owners)


class _Work:
    """Matrix work of calls: entries of the matrices multiplied by, which is multiply–adds for each token."""

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        modules = dict(model.named_modules())
        self.calls = [
            (call.end, sum(p.numel() for p in modules[call.module].parameters(recurse=False) if p.dim() > 1))
            for call in calls
            if not isinstance(modules[call.module], nn.Embedding)
        ]
        self.total = sum(size for _, size in self.calls)

    def share(self, point: Call) -> float:
        """Part of it that is done when a call begins."""
        return sum(size for end, size in self.calls if end < point.start) / self.total if self.total else 0.0


def _points(calls: Sequence[Call], first: Call, work: _Work) -> dict[float, list[Call]]:
    """Calls right before which the cut may be, in order, by the share of work below.

    They lie in the block of the first trained module; outside of any block (a head) they follow the last matrix.
    """
    around = [first]
    while around[-1].parent is not None:
        around.append(around[-1].parent)
    inside = {id(call) for call in around}
    block = next((call for call in reversed(around) if re.search(r"\.\d+$", call.module)), None)
    found: dict[float, list[Call]] = defaultdict(list)
    for call in calls:
        before = call.start <= first.start and (block is None or call.start >= block.start)
        if (
            before
            and call.module
            and (id(call) in inside or (id(call.parent) in inside and call.end < first.start))
        ):
            found[work.share(call)].append(call)
    return dict(found) if block is not None else {max(found): found[max(found)]}


def _plan(model: nn.Module, runs: Sequence[_Run], point: Call) -> _Plan:
    """What to keep for a cut at a point.

    What holds no parameter (a rotation of positions) or has no example in it (a table of relative positions) runs
    again for every batch.

    Raises:
        _NoPlanError: with the reason.
    """
    calls = runs[0].calls
    ended = {id(call) for call in calls if call.end < point.start}
    below = [call for call in calls if id(call) in ended and id(call.parent) not in ended]
    modules = dict(model.named_modules())
    for call in below:
        if any(p.requires_grad for p in modules[call.module].parameters()):
            raise _NoPlanError(f"{plain_name(call.module)} has trained parameters that made-up inputs do not reach")
    prefix = {call.key for call in below}
    names = {call.module for call in below}
    for call in calls:
        if call.module in names and call.key not in prefix and any(True for _ in modules[call.module].parameters()):
            raise _NoPlanError(f"{plain_name(call.module)} runs both before and after it")
    if not below:
        raise _NoPlanError(f"nothing comes before {plain_name(point.module)}")
    try:
        shapes = _shapes(below, runs)
        read = _gradients(model, runs[0], below, shapes, rerun=set())
        rerun = {
            (site.module, site.number)
            for site in read
            if shapes[site.module, site.number][site.index][:1] != ("batch",)
            or not any(True for _ in modules[site.module].parameters())
        }
        if rerun:
            read = _gradients(model, runs[0], below, shapes, rerun)
        groups = _sums(read)
        try:
            return _checked(model, runs, point, below, shapes, rerun, groups)
        except _NoPlanError:
            alone = [([site], grad) for site, grad in read.items()]
            if len(alone) == len(groups):
                raise
            return _checked(model, runs, point, below, shapes, rerun, alone)
    except _NoPlanError:
        raise
    except Exception as error:  # the model's own code, fed with blanks
        raise _NoPlanError(f"the model does not run without what is below ({one_line(error)})") from error


_Key = tuple[str, int]
_Shapes = Mapping[_Key, Sequence[tuple[Dim, ...]]]
_Groups = list[tuple[list[Site], Tensor]]


def _shapes(below: Sequence[Call], runs: Sequence[_Run]) -> _Shapes:
    """Dimensions of each call's outputs as functions of the batch, from the outputs for two batches.

    Raises:
        _NoPlanError: they follow neither the number of examples nor that of tokens.
    """
    twins = {call.key: call for call in runs[1].calls}
    known = dict(zip(zip(*(run.sizes for run in runs), strict=True), ("batch", "tokens"), strict=True))
    found: dict[_Key, list[tuple[Dim, ...]]] = {}
    for call in below:
        twin = twins.get(call.key)
        varies = f"what {plain_name(call.module)} returns depends on the batch"
        if twin is None or len(twin.leaves) != len(call.leaves):
            raise _NoPlanError(varies)
        found[call.key] = []
        for a, b in zip(call.leaves, twin.leaves, strict=True):
            sizes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in (a, b)]
            if len(sizes[0]) != len(sizes[1]):
                raise _NoPlanError(varies)
            dims: list[Dim] = []
            for pair in zip(*sizes, strict=True):
                if pair[0] != pair[1] and pair not in known:
                    raise _NoPlanError(f"{varies} in another way than with its examples or tokens")
                dims.append(known[pair] if pair[0] != pair[1] else pair[0])  # type: ignore[arg-type]
            found[call.key].append(tuple(dims))
    return found


def _fed(
    below: Sequence[Call], shapes: _Shapes, rerun: set[_Key], values: Mapping[Site, int]
) -> dict[str, tuple[Action, ...]]:
    """Actions of all calls below the cut: outputs at the given sites are values, all others blank."""
    actions: dict[str, list[Action]] = defaultdict(list)
    for call in below:
        if call.key in rerun:
            actions[call.module].append(None)
            continue
        leaves: list[Leaf] = []
        for index, (leaf, shape) in enumerate(zip(call.leaves, shapes[call.key], strict=True)):
            site = Site(*call.key, index)
            if site in values:
                leaves.append(Value(values[site]))
            elif isinstance(leaf, Tensor):
                leaves.append(Blank(shape, leaf.dtype))
            else:
                leaves.append(Constant(leaf if isinstance(leaf, bool | int | float | str) else None))
        actions[call.module].append(Output(call.spec, tuple(leaves)))
    return {name: tuple(found) for name, found in actions.items()}


def _gradients(
    model: nn.Module, run: _Run, below: Sequence[Call], shapes: _Shapes, rerun: set[_Key]
) -> dict[Site, Tensor]:
    """Which outputs below the cut the rest of the model reads, with the gradient of random weights of its own."""
    values = {
        Site(*call.key, index): leaf.detach().clone().requires_grad_()
        for call in below
        if call.key not in rerun
        for index, leaf in enumerate(call.leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    actions = _fed(below, shapes, rerun, {site: n for n, site in enumerate(values)})
    suffix = Suffix(model, actions, [value.dtype for value in values.values()])
    with torch.enable_grad(), suffix.fed(list(values.values())):
        loss = weighted(outputs(model(**run.probe.batch), run.probe.mask))
    if loss is None:
        raise _NoPlanError("the model's outputs do not depend on what is above it")
    grads = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    return {site: grad for site, grad in zip(values, grads, strict=True) if grad is not None}


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


def _checked(
    model: nn.Module,
    runs: Sequence[_Run],
    point: Call,
    below: Sequence[Call],
    shapes: _Shapes,
    rerun: set[_Key],
    groups: _Groups,
) -> _Plan:
    """The plan that keeps a value for each group, if the model's outputs come out the same."""
    if not groups:
        raise _NoPlanError("nothing is read from below it")
    at = {call.key: call for call in below}
    kept = []
    for sites, grad in groups:
        key, index = (sites[0].module, sites[0].number), sites[0].index
        shape = shapes[key][index]
        if shape[:1] != ("batch",) or "batch" in shape[1:] or "tokens" in shape[2:]:
            raise _NoPlanError(f"what {plain_name(key[0])} returns has no row for each example or token")
        first = shape[1:2] == ("tokens",) and not bool(grad[:, 1:].any())
        kept.append(Kept(tuple(sites), shape, at[key].leaves[index].dtype, "first" if first else "all"))
    actions = _fed(below, shapes, rerun, {value.sites[0]: n for n, value in enumerate(kept)})
    plan = _Plan(point, tuple(kept), actions, below)
    suffix = Suffix(model, actions, [value.dtype for value in kept])
    for run in runs:
        with torch.no_grad(), suffix.fed([run.value(value) for value in kept]):
            got = outputs(model(**run.probe.batch), run.probe.mask)
        if not agree(got, run.outputs):
            raise _NoPlanError("the outputs of the model come out different when it runs from there")
    return plan


# --- the values of a batch, and their identity --------------------------------------------------------------------


def chosen(mask: Tensor, positions: Positions) -> Tensor:
    """The positions that are kept of each example, among those that are no padding: (examples, tokens), bool."""
    return mask if positions == "all" else mask & (mask.cumsum(1) == 1)


class _EnoughError(Exception):
    """Everything that is to be kept has been computed."""


def capture(model: nn.Module, batch: Mapping[str, Any], kept: Sequence[Kept]) -> list[Tensor]:
    """The values to keep of a batch, from a forward pass that ends at the last of them."""
    wanted = {site for value in kept for site in value.sites}
    numbers: Counter[str] = Counter()
    found: dict[Site, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            number, numbers[name] = numbers[name], numbers[name] + 1
            for index, leaf in enumerate(pytree.tree_leaves(output)):
                if Site(name, number, index) in wanted:
                    found[Site(name, number, index)] = leaf.clone()  # the model may go on to change it in place
            if len(found) == len(wanted):
                raise _EnoughError

        return hook

    names = dict.fromkeys(site.module for site in wanted)
    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        model(**batch)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [_sum(found[site] for site in value.sites) for value in kept]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    first, *rest = tensors
    for tensor in rest:
        first = first + tensor
    return first


def _digest(model: nn.Module, run: _Run, plan: _Plan) -> str:
    """SHA-256 of the weights that the kept values depend on, of the configuration, and of the cut's place."""
    import transformers

    parameters = [p for p in model.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            used = leaves_of(capture(model, run.probe.batch, plan.kept))
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    below = [model.get_submodule(call.module) for call in plan.below]
    used |= {id(p) for module in below for p in module.parameters() if not p.is_floating_point()}
    buffers = {id(b): b for module in below for b in module.buffers()}
    digest = hashlib.sha256(transformers.__version__.encode())
    for tensor in (*(p for p in model.parameters() if id(p) in used), *buffers.values()):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    settings = {key: value for key, value in settings.items() if not _VOLATILE.search(key)}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for value in plan.kept:
        places = [(plain_name(site.module), site.number, site.index) for site in value.sites]
        digest.update(repr((places, value.shape, str(value.dtype), value.positions)).encode())
    return digest.hexdigest()
