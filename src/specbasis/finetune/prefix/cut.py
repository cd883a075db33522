"""Where a model can be cut: the last point before the first trained module, found by watching the model's own forward.

Nothing here knows a family. The model runs on a small batch of random tokens (or pixels) while every module's call is
noted. Whatever has ended when the first trained module begins is the frozen prefix. Its outermost calls are then
replaced by stand-ins, and autograd tells which of their outputs the rest of the model still reads: those are the
values to keep. A cut is returned only if the model with stand-ins gives the outputs of the model itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specbasis.finetune.prefix.standin import Action, Blank, Constant, Dim, Leaf, Output, Site, Suffix, Value, sizes

Positions = Literal["all", "first", "last"]

_CARRIED = ("hidden_states", "attentions", "past_key_values", "cross_attentions", "loss")
_WRAPPERS = re.compile(r"base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.[^.]+")
_VOLATILE = re.compile(
    r"^_|^id2label$|^label2id$|^problem_type$|^architectures$|^(torch_)?dtype$|dropout|drop_rate"
)
_LEAST_SHARE = 0.02  # of the matrix parameters in use: less than this below the cut is not worth a cache


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
    def packed(self) -> bool:
        """Whether it has one row for each token, so that padding need not be kept."""
        return self.shape[1:2] == ("tokens",)

    @property
    def width(self) -> int:
        """Numbers for one token, or for one example if the value is not by tokens."""
        return int(torch.tensor([n for n in self.shape[1:] if not isinstance(n, str)]).prod())

    def __str__(self) -> str:
        named = " + ".join(plain_name(site.module) for site in self.sites)
        where = "" if self.positions == "all" else f" at the {self.positions} position"
        return f"{named}{where} ({self.width} numbers for each {'token' if self.packed else 'example'})"


@dataclass(frozen=True)
class Cut:
    """A point of a model's forward below which nothing is trained.

    Attributes:
        before: the module whose call comes right after the cut.
        kept: what the suffix reads from below the cut.
        actions: what the calls below the cut become, by module name.
        digest: SHA-256 of all that the kept values depend on besides the example: weights, structure, place.
        share: part of the matrix parameters in use that lies below the cut.
    """

    before: str
    kept: tuple[Kept, ...]
    actions: Mapping[str, tuple[Action, ...]]
    digest: str
    share: float

    def __str__(self) -> str:
        kept = " and ".join(map(str, self.kept))
        return f"cut before {plain_name(self.before)}, {self.share:.0%} of the matrices below it; kept: {kept}"

    @contextmanager
    def suffix(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model, with its prefix standing still for batches that bring their activations.

        Inside, a batch with the keys that `PrefixCache.collator` adds runs only what is above the cut; any other
        batch runs through the whole model. Parameters, names and the state dict are those of the model, so
        saving needs no care. At the end the model is as it was.
        """
        with Suffix(
            model, self.actions, [(value.sites, value.dtype) for value in self.kept], self.before
        ).running():
            yield model


def plain_name(name: str) -> str:
    """A module's name without what PEFT's wrappers put in it."""
    return _WRAPPERS.sub("", name)


def find_cut(model: nn.Module) -> Cut | Uncut:
    """The last point before the model's first trained module, or the reason why there is none.

    The cut may lie inside of a block: where only the feed-forward layer is trained, after the attention. Among the
    points of that block it is the latest at which no more numbers need keeping than at the block's start.

    Costs some tens of forward passes of three short examples. The model is left as it was.
    """
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        try:
            probes = [_probe(model, rows, tokens) for rows, tokens in ((3, 11), (2, 7))]
            traces = [_trace(model, probe) for probe in probes]
        except Exception as error:  # any model may fail in any way on made-up inputs
            return Uncut(f"the model does not run on a batch of random inputs ({_line(error)})")
        return _search(model, probes, traces)


# --- the probe ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A made-up batch of examples of unequal length, padded on the right."""

    batch: Mapping[str, Tensor]
    mask: Tensor | None

    @property
    def sizes(self) -> tuple[int, int | None]:
        return sizes((), self.batch)


def _probe(model: nn.Module, rows: int, tokens: int) -> Probe:
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    name = getattr(model, "main_input_name", None) or getattr(
        getattr(model, "base_model", None), "main_input_name", ""
    )
    if "pixel_values" in name:
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.randn(rows, getattr(config, "num_channels", 3), height, width, generator=generator)
        return Probe({"pixel_values": pixels.to(device, next(model.parameters()).dtype)}, None)
    vocabulary = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size  # type: ignore[union-attr]
    pad = getattr(config, "pad_token_id", None)
    ids = torch.randint(0, vocabulary - 1, (rows, tokens), generator=generator)
    ids += ids >= pad if isinstance(pad, int) and pad >= 0 else 0
    lengths = torch.tensor([tokens, *(tokens // 2 + row for row in range(rows - 1))])
    mask = torch.arange(tokens) < lengths[:, None]
    ids[~mask] = pad if isinstance(pad, int) and pad >= 0 else 0
    return Probe({"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}, mask.to(device))


def outputs(result: Any, mask: Tensor | None) -> list[Tensor]:
    """The floating-point outputs that training and evaluation read, at the positions that are no padding."""
    named = result if isinstance(result, Mapping) else {"": result}
    found = []
    for name, value in named.items():
        if name not in _CARRIED:
            found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
    return [t[mask] if mask is not None and t.shape[:2] == mask.shape else t for t in found]


# --- what the model's forward does --------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of a module: when it began and ended, inside of which call, and what it returned."""

    module: str
    number: int
    start: int
    parent: Call | None
    end: int = -1
    spec: Any = None
    leaves: Sequence[Any] = ()


@dataclass(frozen=True)
class Trace:
    """All calls of one forward pass, by their start, with the names of the trained parameters that were used."""

    calls: Sequence[Call]
    used: frozenset[int]


def _trace(model: nn.Module, probe: Probe) -> Trace:
    calls: list[Call] = []
    stack: list[Call] = []
    numbers: Counter[str] = Counter()
    clock = iter(range(10**9))
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            call = Call(name, numbers[name], next(clock), stack[-1] if stack else None)
            numbers[name] += 1
            calls.append(call)
            stack.append(call)

        return hook

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        call = stack.pop()
        call.leaves, call.spec = pytree.tree_flatten(output)
        call.end = next(clock)

    try:
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(enter(name)),
                module.register_forward_hook(leave),
            ]
        with torch.enable_grad():
            result = model(**probe.batch)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(calls, frozenset(_leaves_of(outputs(result, None))))


def _leaves_of(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of the leaves of autograd's graph that tensors depend on."""
    found: set[int] = {id(t) for t in tensors if t.is_leaf and t.requires_grad}
    waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


# --- the search ---------------------------------------------------------------------------------------------------


class _NoPlan(Exception):
    """This point is no place for a cut; the message is the reason."""


@dataclass(frozen=True)
class _Plan:
    before: Call
    kept: tuple[Kept, ...]
    actions: Mapping[str, tuple[Action, ...]]
    below: tuple[Call, ...]

    @property
    def size(self) -> int:
        """Numbers to keep for the first probe's batch."""
        return sum(value.width * (11 if value.packed and value.positions == "all" else 1) for value in self.kept)


def _search(model: nn.Module, probes: Sequence[Probe], traces: Sequence[Trace]) -> Cut | Uncut:
    first = _first_trained(model, traces[0])
    if isinstance(first, Uncut):
        return first
    share = _share(model, traces[0].calls, first)
    if share < _LEAST_SHARE:
        return Uncut(f"{plain_name(first.module)} is trained, and nothing that takes time comes before it")
    points = _points(traces[0].calls, first)
    plans: list[_Plan] = []
    reason = ""
    for point in (points[0], *reversed(points)):
        try:
            plans.append(_plan(model, probes, traces, point))
        except _NoPlan as error:
            reason = reason or str(error)
            continue
        if len(plans) > 1 and plans[-1].size <= plans[0].size:
            break
    if not plans:
        return Uncut(f"no cut before {plain_name(first.module)}: {reason}")
    best = min(plans, key=lambda plan: (plan.size, -plan.before.start))
    share = _share(model, traces[0].calls, best.before)
    if share < _LEAST_SHARE:
        return Uncut(f"no cut right before {plain_name(first.module)}: {reason}")
    digest = _digest(model, probes[0], best)
    return Cut(best.before.module, best.kept, best.actions, digest, share)


def _first_trained(model: nn.Module, trace: Trace) -> Call | Uncut:
    """The first call of a module that owns a trained parameter, or inside of which one is read."""
    called = {call.module for call in trace.calls}
    owners = set()
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not trained:
        return Uncut("no parameter of the model is trained")
    for name, parameter in trained:
        owner = name.rpartition(".")[0]
        if id(parameter) in trace.used:
            while owner not in called:
                owner = owner.rpartition(".")[0]
            owners.add(owner)
    if not owners:
        return Uncut("the model's outputs depend on no trained parameter")
    return next(call for call in trace.calls if call.module in owners)


def _chain(call: Call | None) -> list[Call]:
    """A call and those it is inside of, innermost first."""
    found = []
    while call is not None:
        found.append(call)
        call = call.parent
    return found


def _points(calls: Sequence[Call], first: Call) -> list[Call]:
    """Calls right before which the cut may be, in order: those of the first trained module's block, from its start.

    Outside of any block (a head) it is the first trained module alone.
    """
    around = _chain(first)
    blocks = [call for call in around if re.search(r"\.\d+$", call.module)]
    if not blocks:
        return [first]
    block = blocks[-1]
    inside = {id(call) for call in around[: around.index(block) + 1]}
    return [
        call
        for call in calls
        if block.start <= call.start <= first.start
        and (id(call) in inside or (id(call.parent) in inside and call.end < first.start))
    ]


def _below(calls: Sequence[Call], point: Call) -> list[Call]:
    """The outermost calls that have ended when another begins."""
    ended = {id(call) for call in calls if -1 < call.end < point.start}
    return [call for call in calls if id(call) in ended and id(call.parent) not in ended]


def _matrices(model: nn.Module, names: Iterable[str]) -> int:
    """Entries of the matrices that calls multiply by: look-up tables do not count, nor does a module twice."""
    modules = dict(model.named_modules())
    found = {
        id(p): p.numel()
        for name in names
        if not isinstance(modules[name], nn.Embedding)
        for p in modules[name].parameters(recurse=False)
        if p.dim() > 1
    }
    return sum(found.values())


def _share(model: nn.Module, calls: Sequence[Call], point: Call) -> float:
    everything = _matrices(model, (call.module for call in calls))
    below = _matrices(model, (call.module for call in calls if -1 < call.end < point.start))
    return below / everything if everything else 0.0


def _is_cheap(module: nn.Module) -> bool:
    """Whether a module holds no matrix: a norm, an activation, a dropout, a rotation."""
    return all(p.dim() < 2 for p in module.parameters())


def _plan(model: nn.Module, probes: Sequence[Probe], traces: Sequence[Trace], point: Call) -> _Plan:
    """What to keep for a cut at a point.

    Cheap modules below it may run again for every batch, which often saves keeping their outputs; both ways are
    tried and the one that keeps less is taken.

    Raises:
        _NoPlan: with the reason.
    """
    calls = traces[0].calls
    below = _below(calls, point)
    modules = dict(model.named_modules())
    for call in below:
        if any(p.requires_grad for p in modules[call.module].parameters()):
            raise _NoPlan(f"{plain_name(call.module)} has trained parameters that made-up inputs do not reach")
    prefix = {(call.module, call.number) for call in below}
    for call in calls:
        again = (call.module, call.number) not in prefix and call.module in {name for name, _ in prefix}
        if again and not _is_cheap(modules[call.module]):
            raise _NoPlan(f"{plain_name(call.module)} runs both before and after it")
    twins = {(call.module, call.number): call for call in traces[1].calls}
    shapes = {
        (call.module, call.number): _shapes(call, twins.get((call.module, call.number)), probes) for call in below
    }
    read = _read(model, probes[0], below, shapes, rerun=set())
    fixed = {key for key, index in read if not _by_example(shapes[key][index])}
    cheap = fixed | {key for key, _ in read if _is_cheap(modules[key[0]])}
    plans, reason = [], ""
    for rerun in (fixed, cheap) if cheap != fixed else (fixed,):
        for merge in (True, False):
            try:
                plan = _try(model, probes, below, point, shapes, rerun, merge)
            except _NoPlan as error:
                reason = str(error)
            else:
                plans.append(plan)
                break
    if not plans:
        raise _NoPlan(reason)
    return min(plans, key=lambda plan: plan.size)


_Key = tuple[str, int]
_Shapes = Mapping[_Key, Sequence[tuple[Dim, ...] | None]]


def _by_example(shape: tuple[Dim, ...] | None) -> bool:
    return shape is not None and shape[:1] == ("batch",)


def _shapes(call: Call, twin: Call | None, probes: Sequence[Probe]) -> list[tuple[Dim, ...] | None]:
    """Dimensions of a call's outputs as functions of the batch, from its outputs for two batches.

    Raises:
        _NoPlan: they follow neither the number of examples nor that of tokens.
    """
    if twin is None or len(twin.leaves) != len(call.leaves):
        raise _NoPlan(f"what {plain_name(call.module)} returns depends on the batch")
    found: list[tuple[Dim, ...] | None] = []
    for a, b in zip(call.leaves, twin.leaves, strict=True):
        if not isinstance(a, Tensor):
            found.append(None)
            continue
        dims: list[Dim] = []
        if not isinstance(b, Tensor) or a.dim() != b.dim():
            raise _NoPlan(f"what {plain_name(call.module)} returns depends on the batch")
        for at, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)):
            known: dict[tuple[int, int], Dim] = {(n, n): n}
            known[probes[0].sizes[0], probes[1].sizes[0]] = "batch"
            if probes[0].sizes[1] is not None:
                known[probes[0].sizes[1], probes[1].sizes[1] or 0] = "tokens"
            if (n, m) not in known:
                raise _NoPlan(
                    f"dimension {at} of what {plain_name(call.module)} returns is neither examples nor tokens"
                )
            dims.append(known[n, m])
        found.append(tuple(dims))
    return found


def _fed(
    below: Sequence[Call], shapes: _Shapes, rerun: set[_Key], slots: Mapping[Site, Leaf]
) -> dict[str, tuple[Action, ...]]:
    """Actions of all calls below the cut: outputs at the given sites are values, all others blank."""
    actions: dict[str, list[Action]] = defaultdict(list)
    for call in below:
        key = (call.module, call.number)
        if key in rerun:
            actions[call.module].append(None)
            continue
        leaves: list[Leaf] = []
        for index, (leaf, shape) in enumerate(zip(call.leaves, shapes[key], strict=True)):
            if shape is None:
                leaves.append(Constant(leaf if isinstance(leaf, bool | int | float | str) else None))
            else:
                leaves.append(slots.get(Site(*key, index)) or Blank(shape, leaf.dtype))
        actions[call.module].append(Output(call.spec, tuple(leaves)))
    return {name: tuple(found) for name, found in actions.items()}


def _gradients(
    model: nn.Module,
    probe: Probe,
    below: Sequence[Call],
    shapes: _Shapes,
    rerun: set[_Key],
    only: Iterable[Site] | None,
) -> dict[Site, Tensor | None]:
    """Gradient of random weights of the model's outputs to what the calls below the cut return."""
    sites = [
        Site(call.module, call.number, index)
        for call in below
        if (call.module, call.number) not in rerun
        for index, leaf in enumerate(call.leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    sites = sites if only is None else [site for site in sites if site in set(only)]
    at = {(call.module, call.number): call for call in below}
    values = [at[site.module, site.number].leaves[site.index].detach().clone().requires_grad_() for site in sites]
    slots: dict[Site, Leaf] = {site: Value(n) for n, site in enumerate(sites)}
    actions = _fed(below, shapes, rerun, slots)
    with (
        torch.enable_grad(),
        Suffix(model, actions, [((s,), v.dtype) for s, v in zip(sites, values, strict=True)]).fed(values),
    ):
        found = outputs(model(**probe.batch), probe.mask)
    generator = torch.Generator().manual_seed(1)
    weighted = [(t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in found if t.requires_grad]
    if not weighted:
        raise _NoPlan("the model's outputs do not depend on what is above it")
    grads = torch.autograd.grad(sum(weighted), values, allow_unused=True)  # type: ignore[arg-type]
    return dict(zip(sites, grads, strict=True))


def _read(
    model: nn.Module, probe: Probe, below: Sequence[Call], shapes: _Shapes, rerun: set[_Key]
) -> list[tuple[_Key, int]]:
    """Which outputs below the cut the rest of the model reads."""
    try:
        grads = _gradients(model, probe, below, shapes, rerun, None)
    except _NoPlan:
        raise
    except Exception as error:
        raise _NoPlan(f"the model does not run without what is below ({_line(error)})") from error
    return [((site.module, site.number), site.index) for site, grad in grads.items() if grad is not None]


def _try(
    model: nn.Module,
    probes: Sequence[Probe],
    below: Sequence[Call],
    point: Call,
    shapes: _Shapes,
    rerun: set[_Key],
    merge: bool,
) -> _Plan:
    """A plan in which some cheap calls run again, if the model's outputs come out the same."""
    try:
        grads = _gradients(model, probes[0], below, shapes, rerun, None)
        groups: list[tuple[list[Site], Tensor]] = []
        for site, grad in grads.items():
            if grad is None:
                continue
            if not _by_example(shapes[site.module, site.number][site.index]):
                raise _NoPlan(f"what {plain_name(site.module)} returns is not by example")
            same = (sites for sites, other in groups if merge and _equal(grad, other))
            group = next(same, None)
            if group is None:
                groups.append(([site], grad))
            else:
                group.append(site)
        if not groups:
            raise _NoPlan("nothing is read from below it")
        kept = tuple(_kept(sites, grad, below, shapes, probes[0]) for sites, grad in groups)
        slots: dict[Site, Leaf] = {value.sites[0]: Value(n) for n, value in enumerate(kept)}
        plan = _Plan(point, kept, _fed(below, shapes, rerun, slots), tuple(below))
        for probe in probes:
            _verify(model, probe, plan)
    except _NoPlan:
        raise
    except Exception as error:
        raise _NoPlan(f"the model does not run without what is below ({_line(error)})") from error
    return plan


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))


def _kept(sites: Sequence[Site], grad: Tensor, below: Sequence[Call], shapes: _Shapes, probe: Probe) -> Kept:
    site = sites[0]
    shape = shapes[site.module, site.number][site.index]
    assert shape is not None
    leaf = next(c for c in below if (c.module, c.number) == (site.module, site.number)).leaves[site.index]
    positions: Positions = "all"
    if shape[1:2] == ("tokens",):
        mask = (
            torch.ones(grad.shape[:2], dtype=torch.bool, device=grad.device) if probe.mask is None else probe.mask
        )
        used = (grad.flatten(2).abs().amax(-1) > 0) & mask
        choices: tuple[Positions, ...] = ("first", "last")
        for choice in choices:
            if bool((used <= chosen(mask, choice)).all()):
                positions = choice
    return Kept(tuple(sites), shape, leaf.dtype, positions)


def chosen(mask: Tensor, positions: Positions) -> Tensor:
    """The positions of each example that are kept, of those that are no padding: (examples, tokens), bool."""
    if positions == "all":
        return mask
    order = mask.cumsum(1)
    return mask & (order == (1 if positions == "first" else order[:, -1:]))


class _Enough(Exception):
    """Everything that is to be kept has been computed."""


def capture(model: nn.Module, batch: Mapping[str, Any], kept: Sequence[Kept]) -> list[Tensor]:
    """The values to keep of a batch, from a forward pass that ends at the last of them."""
    wanted = {site for value in kept for site in value.sites}
    numbers: Counter[str] = Counter()
    found: dict[Site, Tensor] = {}
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            number, numbers[name] = numbers[name], numbers[name] + 1
            for index, leaf in enumerate(pytree.tree_leaves(output)):
                if Site(name, number, index) in wanted:
                    found[Site(name, number, index)] = leaf
            if len(found) == len(wanted):
                raise _Enough

        return hook

    modules = dict(model.named_modules())
    try:
        for name in dict.fromkeys(site.module for site in wanted):
            handles.append(modules[name].register_forward_hook(note(name)))
        model(**batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [sum((found[site] for site in value.sites[1:]), found[value.sites[0]]) for value in kept]


def _verify(model: nn.Module, probe: Probe, plan: _Plan) -> None:
    """Raise _NoPlan if the model with stand-ins does not give the model's outputs."""
    with torch.no_grad():
        want = outputs(model(**probe.batch), probe.mask)
        values = capture(model, probe.batch, plan.kept)
        for n, value in enumerate(plan.kept):
            if value.packed and probe.mask is not None:
                keep = chosen(probe.mask, value.positions)
                values[n] = values[n] * keep.view(*keep.shape, *(1,) * (values[n].dim() - 2))
        pairs = [(value.sites, value.dtype) for value in plan.kept]
        with Suffix(model, plan.actions, pairs).fed(values):
            got = outputs(model(**probe.batch), probe.mask)
    for a, b in zip(got, want, strict=True):
        scale = float(b.abs().max())
        if not float((a - b).abs().max()) <= 64 * torch.finfo(b.dtype).eps * max(scale, 1e-3):
            raise _NoPlan("the outputs of the model come out different when it runs from there")


# --- identity -----------------------------------------------------------------------------------------------------


def _digest(model: nn.Module, probe: Probe, plan: _Plan) -> str:
    """SHA-256 of the weights that the kept values depend on, of the configuration, and of the cut's place."""
    import transformers

    parameters = [p for p in model.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            used = _leaves_of(capture(model, probe.batch, plan.kept))
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    modules = dict(model.named_modules())
    inside = {id(p) for call in plan.below for p in modules[call.module].parameters() if not p.is_floating_point()}
    buffers = {id(b): b for call in plan.below for b in modules[call.module].buffers()}
    digest = hashlib.sha256(transformers.__version__.encode())
    for tensor in (*(p for p in model.parameters() if id(p) in used | inside), *buffers.values()):
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    settings = {key: value for key, value in settings.items() if not _VOLATILE.search(key)}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for value in plan.kept:
        places = [(plain_name(site.module), site.number, site.index) for site in value.sites]
        digest.update(repr((places, value.shape, str(value.dtype), value.positions)).encode())
    return digest.hexdigest()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


evaluating = _evaluating


def _line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:200]
