"""Put a method on a model, save what it trained, load it again; and the size at which methods train equally
much.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from specbasis.adapter.task_heads import ParameterCounts
from specbasis.checkpoint import open_checkpoint
from specbasis.checkpoint.adapter_file import PREFIX, adapter_folder
from specbasis.checkpoint.atomic import write_whole
from specbasis.checkpoint.regular import read_json
from specbasis.core.errors import InputError
from specbasis.core.options import takes
from specbasis.finetuning.methods.kit import CHILD, METHODS, Method, Request, additions, method_named
from specbasis.finetuning.methods.sites import trained_whole
from specbasis.finetuning.methods.updates import Update, merge_updates
from specbasis.finetuning.options import Placement

DESCRIPTION, TRAINED = "method.json", "trained.safetensors"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Attached:
    """A model with a method on it, ready for transformers' Trainer.

    Attributes:
        model: exactly the method's parameters, the task head, and modules that the base checkpoint lacks require
            gradients.
        request: what was attached.
        head: names of head and pooler modules in the base model.
        base_parameters: parameters of the base model, its task head included.
        base_fingerprint: a hash of the base's weights before the method came, without the head; see `fingerprint`.
    """

    model: nn.Module
    request: Request
    head: tuple[str, ...]
    base_parameters: int
    base_fingerprint: str

    @property
    def method(self) -> Method:
        """The method."""
        return self.request.method

    @property
    def callbacks(self) -> tuple[TrainerCallback, ...]:
        """What the Trainer must call for this method (AdaLoRA's allocation); empty for the others."""
        return self.method.callbacks(self.request)

    @property
    def counts(self) -> ParameterCounts:
        """Parameters in training: the method's own, then head and pooler; and all of base and method together."""
        prefix = PREFIX if isinstance(self.model, PeftModel) else ""
        trained = {name: p.numel() for name, p in self.model.named_parameters() if p.requires_grad}
        heads = tuple(f"{prefix}{name}." for name in self.head)
        head = sum(count for name, count in trained.items() if name.startswith(heads))
        own = sum(trained.values()) - head
        return ParameterCounts(own, head, self.base_parameters + (own if self.method.adds else 0))

    def save(self, folder: str | Path) -> None:
        """Write the method's folder: a PEFT adapter where PEFT knows the method, else what was trained alone.

        ``method.json`` says how to attach the method again; `load` does. Full finetuning writes the whole model as
        ``save_pretrained`` does, so that the folder is a checkpoint like any other.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        peft = isinstance(self.model, PeftModel)
        if peft:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
        elif self.method.trains_all(self.request):
            self.model.save_pretrained(folder)  # type: ignore[operator]
        else:
            trained = {name: tensor.cpu().clone().contiguous() for name, tensor in _saved(self.model).items()}
            write_whole(folder / TRAINED, lambda path: save_file(trained, path))
        described = {"format": FORMAT, "peft": peft, **self.request.arguments()}
        described["base_fingerprint"] = self.base_fingerprint
        write_whole(folder / DESCRIPTION, json.dumps(described, indent=2) + "\n")

    def merged(self) -> nn.Module:
        """The plain model with the method's update in its weights, summed once; this one is used up.

        Raises:
            InputError: the method is no linear update (bottleneck adapters).
        """
        if not isinstance(self.model, PeftModel):
            merge_updates(self.model)
            return self.model
        # Trained head modules in place of PEFT's wrappers: some of its tuners cannot unload those with parts.
        for name, wrapper in list(self.model.named_modules()):
            if isinstance(wrapper, ModulesToSaveWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, wrapper.modules_to_save[wrapper.active_adapter])
        merged: nn.Module = self.model.merge_and_unload()
        return merged


@takes(Placement)
def attach(
    model: nn.Module, method: str | Method, where: Placement | None = None, *, seed: int = 0, **keywords: Any
) -> Attached:
    """Put a method on a model: freeze everything, add what the method trains, and open head and missing pooler.

    The model is changed in place. It computes what it computed before (PiSSA: up to the rounding of its residual).

    Args:
        model: a transformers model without adapters.
        method: a name in `METHODS`.
        where: where it goes and how large it is. ``interval`` and ``rank``, and ``target_modules`` (names, or their
            endings) and roles or blocks (negative ones from the last), exclude each other. ``options`` go on top of
            `Method.options`; for a PEFT method they are fields of its configuration.
        seed: of random initialisations and patterns. The global random state is left as it was.
        **keywords: the fields of `Placement`, in place of ``where``.

    Raises:
        InputError: an argument does not fit the method or the model.
    """
    if isinstance(model, PeftModel) or hasattr(model, "peft_config") or additions(model):
        raise InputError(f"{type(model).__name__} has adapters already; want a model without: load the base again")
    request = _request(model, method, Placement.of(where, keywords), seed)

    def build(head: tuple[str, ...]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return request.method.attach(model, request, head)

    return _attached(model, request, build)


def _request(model: nn.Module, method: str | Method, where: Placement, seed: int) -> Request:
    """What was asked for, resolved for this model."""
    method = method_named(method)
    sites = method.sites(model, where)
    width, ranks = method.sized(sites, where)
    options = {**method.options, **where.options, **({"basis": where.basis} if where.basis else {})}
    if (where.checkpoint is None) == bool(options.get("basis") == "from"):
        wanted = "want the checkpoint of a model" if where.checkpoint is None else "leave checkpoint out"
        raise InputError(f"{method.name}: got checkpoint = {where.checkpoint!r}; {wanted}")
    assert not isinstance(where.checkpoint, Path)
    return Request(method, width, ranks, sites, seed, where.checkpoint, options, where.budget)


def _attached(model: nn.Module, request: Request, build: Callable[[tuple[str, ...]], nn.Module]) -> Attached:
    """The model with its method, which ``build`` puts on it, and what was there before."""
    head = tuple(trained_whole(model))
    total, hashed = sum(p.numel() for p in model.parameters()), fingerprint(model, head)
    return Attached(build(head), request, head, total, hashed)


def load(folder: str | Path, base: nn.Module) -> Attached:
    """Attach a saved method to its base model, with the trained values.

    Raises:
        InputError: the folder holds no method, or one that does not fit the base.
    """
    folder = Path(folder)
    described = _described(folder)
    name, seed = described["method"], described["seed"]
    where = Placement(**{key: described[key] for key in _PLACEMENT}, budget=described.get("budget"))
    if described["peft"]:
        adapter_folder(folder)  # refuses a folder that is incomplete
        attached = _attached(base, _request(base, name, where, seed), lambda _: _peft_model(folder, base))
    else:
        attached = attach(base, name, where, seed=seed)
        if attached.method.trains_all(attached.request):
            base.load_state_dict(type(base).from_pretrained(folder).state_dict())  # type: ignore[attr-defined]
            return attached
        _fill(attached.model, open_checkpoint(folder / TRAINED), folder)
    if described["base_fingerprint"] != attached.base_fingerprint:  # a rounded base is another one, but usable
        warnings.warn(
            f"{folder}: this base does not hold the weights that {name} was trained on (another model, revision or "
            "dtype); results will differ",
            stacklevel=2,
        )
    return attached


def _peft_model(folder: Path, base: nn.Module) -> PeftModel:
    """A PEFT adapter on its base, still in training."""
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except RuntimeError as error:  # shapes that do not fit, several lines of them
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: does not fit this base; load its own ({reason})") from None


SAMPLE = 4096
"""Values of each parameter that a fingerprint takes in, evenly spaced."""


def fingerprint(model: nn.Module, head: Sequence[str]) -> str:
    """SHA-256 of names, shapes and a sample of the values of every parameter outside of the head; "" on meta."""
    outside = tuple(f"{name}." for name in head)
    hashed = hashlib.sha256()
    for name, p in model.named_parameters():
        if p.is_meta:
            return ""
        if not name.startswith(outside):
            sample = p.detach().flatten()[:: max(1, p.numel() // SAMPLE)].float().cpu().numpy()
            hashed.update(f"{name} {tuple(p.shape)} ".encode() + sample.tobytes())
    return hashed.hexdigest()


_PLACEMENT = ("rank", "interval", "target_modules", "checkpoint", "options")


def _described(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not file.is_file():
        raise InputError(f"{folder}: no {DESCRIPTION}; want a folder that a finetuning method saved")
    try:
        described = read_json(file)
        if described["format"] != FORMAT or not {*_PLACEMENT, "method", "seed", "peft", "base_fingerprint"} <= set(
            described
        ):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: damaged, or of a newer version; want format {FORMAT}") from None
    return dict(described)


def _fill(model: nn.Module, stored: Mapping[str, Tensor], folder: Path) -> None:
    """Copy stored values into what is trained, name by name, and prove that they meet the basis they belong to.

    Raises:
        InputError: the file does not fit the model, or the base has another basis.
    """
    current = _saved(model)
    wrong = sorted(set(current) ^ set(stored)) or [n for n in stored if current[n].shape != stored[n].shape]
    if wrong:
        raise InputError(f"{folder}: {wrong[0]} does not fit this base; load the base that it was trained on")
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(stored[name])
    for name, child in additions(model).items():
        if isinstance(child, Update):
            child.settle(model.get_submodule(name))


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, and what the method's own modules need to find their basis again, by name."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, child in additions(model).items():
        trained |= child.state_dict(prefix=f"{name}.{CHILD}.")
    return trained


@dataclass(frozen=True)
class Size:
    """A size of a method.

    Attributes:
        rank: what `attach` takes as ``rank``; None where the method has no size.
        parameters: what it trains, without task head and pooler. For AdaLoRA, what remains in the end.
    """

    rank: int | None
    parameters: int


def match_budget(
    model: nn.Module,
    budget: int | None = None,
    methods: Iterable[str | Method] | None = None,
    **where: Any,
) -> dict[str, Size]:
    """The size of each method that comes nearest to a budget of trained parameters, and what it then trains.

    Works on shapes alone: the model may be on the meta device. Where two sizes are equally near, the smaller one.

    Args:
        model: a transformers model without adapters.
        budget: trained parameters without head and pooler; what the spectral method trains when None.
        methods: names in `METHODS`; all when None.
        **where: ``roles`` and ``blocks`` that every method adapts, each its own when not given; ``rank``, the width
            of the spectral method's interval where it sets the budget.

    Raises:
        InputError: as `attach`; or the budget is not positive.
    """
    if budget is None:
        budget = parameters("spectral", model, **where)
    if budget < 1:
        raise InputError(f"got a budget of {budget} parameters; want at least 1")
    sizes = {}
    for method in map(method_named, METHODS if methods is None else methods):
        sites = method.sites(model, Placement(**where))
        count = functools.cache(functools.partial(method.count, model, sites))
        ranks: Sequence[int | None] = [None]
        if method.default_size(sites) is not None:
            every = range(1, method.largest_size(sites) + 1)
            above = bisect_left(every, budget, key=count)
            ranks = every[max(0, above - 1) : above + 1]
        distances = [abs(count(rank) - budget) for rank in ranks]
        rank = ranks[distances.index(min(distances))]
        sizes[method.name] = Size(rank, count(rank))
    return sizes


def parameters(method: str | Method, model: nn.Module, **where: Any) -> int:
    """How many parameters a method trains on a model, without task head and pooler; from shapes alone.

    Args:
        method: a name in `METHODS`.
        model: on the meta device too.
        **where: ``rank``, ``roles`` and ``blocks``, as of `Placement`.
    """
    method, placement = method_named(method), Placement(**where)
    sites = method.sites(model, placement)
    return method.count(model, sites, placement.rank or method.default_size(sites))
