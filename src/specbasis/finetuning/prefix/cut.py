"""Where a model can be cut: before its first trained module, found by watching the model's own forward.

Nothing here knows a family. The model runs on a small made-up batch while every call of a module is noted. What
has ended when the first trained module begins is the frozen prefix; `plan` tells what of it the rest still reads.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specbasis.checkpoint.digest import digest
from specbasis.finetuning.prefix.narrow import LeanGather, search_narrow, slicing
from specbasis.finetuning.prefix.plan import Kept, NoPlanError, Run, capture, plain_name, plan
from specbasis.finetuning.prefix.probe import Call, Probe, leaves_of, make_probe, matrix_work, one_line, probing
from specbasis.finetuning.prefix.standin import Action, Suffix

_VOLATILE = re.compile(r"^_|^id2label$|^label2id$|^problem_type$|^architectures$|^(torch_)?dtype$|drop|use_cache")
_LABELS = ("start_positions", "end_positions")
_LEAST_SHARE = 0.1  # of the matrix work of a forward pass: less than this below the cut is not worth a cache
_TOKENS = 16  # of the example that places for a cut are compared by


@dataclass(frozen=True)
class Uncut:
    """A model that has no frozen prefix worth keeping, and why, in words for a person."""

    reason: str


@dataclass(frozen=True)
class Cut:
    """A point of a model's forward below which nothing is trained.

    Attributes:
        before: the module whose call comes right after the cut.
        kept: what the suffix reads from below the cut.
        actions: what the calls below the cut become, by module name.
        inputs: names under which the model takes what the kept values depend on: all of its inputs but labels.
        share: part of a forward pass's matrix work that lies below the cut.
        narrow: module after which the suffix needs the first position only, or None.
        digest: SHA-256 of all that the kept values depend on besides the example: weights, structure, place.
    """

    before: str
    kept: tuple[Kept, ...]
    actions: Mapping[str, tuple[Action, ...]]
    inputs: frozenset[str]
    share: float
    narrow: str | None = None
    digest: str = ""

    def __str__(self) -> str:
        kept = " and ".join(map(str, self.kept))
        return f"cut before {plain_name(self.before)}, {self.share:.0%} of the matrix work below it; kept: {kept}"

    def size(self, tokens: int) -> int:
        """Numbers to keep for an example of so many tokens."""
        return sum(value.size(tokens) for value in self.kept)

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
        suffix = Suffix(model, self.actions, self.before)
        with suffix.running(park), slicing(model, self.narrow), LeanGather():
            yield model


def find_cut(model: nn.Module) -> Cut | Uncut:
    """The place before the model's first trained module to cut at, or the reason why there is none.

    The cut may lie inside of a block: where only the feed-forward layer is trained, after the attention. Among
    the points between the start of the first trained module's block and that module it is the one at which fewest
    numbers have to be kept, and of those the one with the most matrix work below it.

    Costs some tens of forward passes of three short examples. The model is left as it was.
    """
    with probing(model):
        try:
            runs = [Run.of(model, make_probe(model, rows, tokens)) for rows, tokens in ((3, 11), (2, 7))]
        except Exception as error:  # any model may fail in any way on made-up inputs
            return Uncut(f"the model does not run on a batch of random inputs ({one_line(error)})")
        try:
            cut = _search(model, runs, _first_trained(model, runs[0]))
        except NoPlanError as error:
            return Uncut(str(error))
        with Suffix(model, cut.actions).running():
            narrow = search_narrow(model, runs[0].fed(cut.kept))
        return replace(cut, narrow=narrow, digest=_digest(model, runs[0].probe, cut))


def _search(model: nn.Module, runs: Sequence[Run], first: Call) -> Cut:
    """The best cut before the first trained call, without its digest yet."""
    calls = runs[0].calls
    work = matrix_work(model, calls)
    if _share(work, first) < _LEAST_SHARE:
        raise NoPlanError(
            f"{plain_name(first.module)} is trained, and {_share(work, first):.0%} of the work is done before it: "
            "too little to keep"
        )
    # What the forward takes besides labels; below PEFT's wrappers, which take anything.
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = inspect.signature(inner.forward).parameters
    inputs = frozenset(name for name in names if "label" not in name and name not in _LABELS)
    cuts: list[Cut] = []
    reason = ""
    for share, points in reversed(_points(calls, first, work).items()):
        for point in points:
            try:
                cuts.append(Cut(point.module, *plan(model, runs, point), inputs, share))
            except NoPlanError as error:
                reason = reason or str(error)
                continue
            if len(cuts[-1].kept) == 1:
                break
    if not cuts:
        raise NoPlanError(f"no cut before {plain_name(first.module)}: {reason}")
    best = min(cuts, key=lambda cut: (cut.size(_TOKENS), -cut.share))
    if best.share < _LEAST_SHARE:
        raise NoPlanError(f"no cut that spares work before {plain_name(first.module)}: {reason}")
    return best


def _first_trained(model: nn.Module, run: Run) -> Call:
    """The first call of a module that owns a trained parameter, or inside of which one is read."""
    trained = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    if not trained:
        raise NoPlanError("no parameter of the model is trained")
    called = {call.module for call in run.calls}
    owners = set()
    for name, parameter in trained:
        owner = name.rpartition(".")[0]
        if id(parameter) in run.used:
            while owner not in called:
                owner = owner.rpartition(".")[0]
            owners.add(owner)
    if not owners:
        raise NoPlanError("the model's outputs depend on no trained parameter")
    return next(call for call in run.calls if call.module in owners)


def _share(work: Sequence[tuple[Call, int]], point: Call) -> float:
    """Part of the matrix work that is done when a call begins."""
    total = sum(size for _, size in work)
    return sum(size for call, size in work if call.end < point.start) / total if total else 0.0


def _points(calls: Sequence[Call], first: Call, work: Sequence[tuple[Call, int]]) -> dict[float, list[Call]]:
    """Calls right before which the cut may be, in order, by the share of work below.

    They lie in the block of the first trained module; outside of any block (a head) they follow the last matrix.
    """
    around = [first]
    while around[-1].parent is not None:
        around.append(around[-1].parent)
    inside = {id(call) for call in around}
    block = next((call for call in reversed(around) if re.search(r"\.\d+$", call.module)), None)
    begin = 0 if block is None else block.start
    points: dict[float, list[Call]] = defaultdict(list)
    for call in calls:
        beside = id(call.parent) in inside and call.end < first.start
        if call.module and begin <= call.start <= first.start and (id(call) in inside or beside):
            points[_share(work, call)].append(call)
    return dict(points) if block is not None else {max(points): points[max(points)]}


def _digest(model: nn.Module, probe: Probe, cut: Cut) -> str:
    """SHA-256 of the weights that the kept values depend on, of the configuration, and of the cut's place."""
    import transformers

    parameters = [p for p in model.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            used = leaves_of(capture(model, probe.batch, cut.kept))
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    below = [model.get_submodule(name) for name in cut.actions]
    used |= {id(p) for module in below for p in module.parameters() if not p.is_floating_point()}
    buffers = {id(b): b for module in below for b in module.buffers()}
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    settings = {key: value for key, value in settings.items() if not _VOLATILE.search(key)}
    places = [[(plain_name(site.module), site.number, site.index) for site in value.sites] for value in cut.kept]
    return digest(
        transformers.__version__,
        *(p for p in model.parameters() if id(p) in used),
        *buffers.values(),
        json.dumps(settings, sort_keys=True, default=str),
        *(repr((p, v.shape, str(v.dtype), v.positions)) for p, v in zip(places, cut.kept, strict=True)),
    )
