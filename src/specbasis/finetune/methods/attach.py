"""Put a method on a model, save what it trained, and load it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, PsoftConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from specbasis.adapter.heads import ParameterCounts
from specbasis.adapter.peft_bridge import SpectralConfig
from specbasis.checkpoint import open_checkpoint
from specbasis.errors import InputError
from specbasis.finetune.methods.placement import ALL_LINEAR, Site, head_modules, is_conv1d, named_sites, sites
from specbasis.finetune.methods.table import METHODS, Method

DESCRIPTION, TRAINED = "method.json", "trained.safetensors"
FORMAT = 1
_PEFT_PREFIX = "base_model.model."


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


@dataclass(frozen=True, eq=False)
class Attached:
    """A model with a method on it, ready for transformers' Trainer.

    Attributes:
        model: exactly the method's parameters, the task head, and modules that the base checkpoint lacks require
            gradients.
        request: what was attached.
        head: names of head and pooler modules in the base model.
        callbacks: what the Trainer must call for this method (AdaLoRA's allocation); empty for the others.
    """

    model: nn.Module
    request: Request
    head: tuple[str, ...]
    base_parameters: int
    callbacks: tuple[TrainerCallback, ...] = ()

    @property
    def method(self) -> Method:
        """The method."""
        return self.request.method

    @property
    def counts(self) -> ParameterCounts:
        """Parameters in training: the method's own, then head and pooler; and all of base and method together."""
        prefix = _PEFT_PREFIX if isinstance(self.model, PeftModel) else ""
        trained = {name: p.numel() for name, p in self.model.named_parameters() if p.requires_grad}
        places = tuple(f"{prefix}{name}." for name in self.head)
        head = sum(count for name, count in trained.items() if name.startswith(places))
        own = sum(trained.values()) - head
        added = 0 if self.method.builder == "subset" else own
        return ParameterCounts(own, head, self.base_parameters + added)

    def save(self, folder: str | Path) -> None:
        """Write the method's folder: a PEFT adapter where PEFT knows the method, else what was trained alone.

        ``method.json`` says how to attach the method again; `load` does. Full finetuning writes the whole model as
        ``save_pretrained`` does, so that the folder is a checkpoint like any other.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        elif self.request.options.get("which") == "all" and not self.request.sites:
            self.model.save_pretrained(folder)  # type: ignore[operator]
        else:
            save_file(trained_state(self.model), folder / TRAINED)
        described = {"format": FORMAT, "peft": isinstance(self.model, PeftModel), **self.request.arguments()}
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def attach(
    model: nn.Module,
    method: str | Method,
    *,
    rank: int | None = None,
    interval: tuple[int, int] | None = None,
    target_modules: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Attached:
    """Put a method on a model: freeze everything, add what the method trains, and open head and missing pooler.

    The model is changed in place. It computes what it computed before (PiSSA: up to the rounding of its residual).

    Args:
        model: a transformers model without adapters.
        method: a name in `METHODS`.
        rank: the method's size (`Method.size`); the default of the method when None.
        interval: ranks [k, m) for the spectral methods, in place of ``rank``.
        target_modules: names, or endings of names, of the modules to adapt, in place of roles and blocks.
        roles: roles of the matrices to adapt; the method's own when None.
        blocks: blocks to adapt, negative ones from the last; the method's own when neither this, nor
            roles, nor target_modules is given, else all.
        seed: of random initialisations and patterns. The global random state is left as it was.
        checkpoint: the model whose singular vectors are the basis, for methods that want one.
        options: settings of the method, on top of `Method.options`; for a PEFT method, fields of its configuration.

    Raises:
        InputError: an argument does not fit the method or the model.
    """
    method = method_named(method)
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise InputError(f"{type(model).__name__} has adapters already; want a model without: load the base again")
    places = _sites(model, method, target_modules, roles, blocks)
    request = Request(
        method,
        *_size(method, places, rank, interval),
        places,
        seed,
        None if checkpoint is None else str(checkpoint),
        {**method.options, **(options or {})},
    )
    if (request.checkpoint is None) == bool(method.options.get("basis") == "from"):
        wanted = "want the checkpoint of a model" if request.checkpoint is None else "leave checkpoint out"
        raise InputError(f"{method.name}: got checkpoint = {checkpoint!r}; {wanted}")
    head = tuple(head_modules(model))
    total = sum(p.numel() for p in model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built, callbacks = _BUILDERS[method.builder](model, request, head)
    return Attached(built, request, head, total, callbacks)


def load(folder: str | Path, base: nn.Module) -> Attached:
    """Attach a saved method to its base model, with the trained values.

    Raises:
        InputError: the folder holds no method, or one that does not fit the base.
    """
    folder = Path(folder)
    described = _described(folder)
    if described["peft"]:
        request = _request_from(described, base)
        head = tuple(head_modules(base))
        total = sum(p.numel() for p in base.parameters())
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        return Attached(model, request, head, total)
    attached = attach(base, **{key: described[key] for key in _ARGUMENTS})
    file = TRAINED if (folder / TRAINED).is_file() else ""
    _fill(attached.model, open_checkpoint(folder / file), folder)
    return attached


_ARGUMENTS = ("method", "rank", "interval", "target_modules", "seed", "checkpoint", "options")


def _described(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not file.is_file():
        raise InputError(f"{folder}: no {DESCRIPTION}; want a folder that a finetuning method saved")
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        if described["format"] != FORMAT or not {*_ARGUMENTS, "peft"} <= set(described):
            raise KeyError
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: damaged, or of a newer version; want format {FORMAT}") from None
    return dict(described)


def _request_from(described: Mapping[str, Any], base: nn.Module) -> Request:
    method = method_named(described["method"])
    interval = described["interval"]
    return Request(
        method,
        described["rank"],
        (int(interval[0]), int(interval[1])) if interval else None,
        named_sites(base, described["target_modules"] or ()),
        described["seed"],
        described["checkpoint"],
        described["options"],
    )


def _fill(model: nn.Module, stored: Mapping[str, Tensor], folder: Path) -> None:
    """Copy stored values into what is trained, name by name."""
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    missing = sorted(wanted - set(stored))
    if missing:
        raise InputError(f"{folder}: lacks {missing[0]}; it was saved by another version, or for another model")
    current = model.state_dict()
    with torch.no_grad():
        for name in stored:
            if name not in current or current[name].shape != stored[name].shape:
                raise InputError(
                    f"{folder}: {name} {tuple(stored[name].shape)} does not fit the base; load its own base"
                )
            current[name].copy_(stored[name])


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name, ready to be written."""
    return {name: p.detach().cpu().clone().contiguous() for name, p in model.named_parameters() if p.requires_grad}


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


def _sites(
    model: nn.Module,
    method: Method,
    targets: Sequence[str] | None,
    roles: Sequence[str] | None,
    blocks: Sequence[int] | None,
) -> tuple[Site, ...]:
    """The modules that a method adapts, by name, or by role and block."""
    given = [name for name, value in (("roles", roles), ("blocks", blocks)) if value is not None]
    if method.options.get("which") == "none" and (given or targets is not None):
        raise InputError(
            f"{method.name} trains no module of the backbone; leave roles, blocks and target_modules out"
        )
    if targets is not None:
        if given:
            raise InputError(f"got target_modules and {given[0]}; want one of the two")
        return named_sites(model, targets)
    if not given and not method.roles:
        return ()
    where = method.blocks if blocks is None and roles is None else blocks
    return sites(model, roles or method.roles or ALL_LINEAR, where)


def _size(
    method: Method, places: Sequence[Site], rank: int | None, interval: tuple[int, int] | None
) -> tuple[int | None, tuple[int, int] | None]:
    """(rank, interval) of a method from what was asked for and its defaults."""
    spectral = method.builder == "spectral"
    if interval is not None and (not spectral or rank is not None):
        wrong = f"rank = {rank} as well; want one of the two" if spectral else f"{method.name} takes rank only"
        raise InputError(f"got interval = {tuple(interval)}; {wrong}")
    if rank is not None and (rank < 1 or not (spectral or method.size)):
        want = "rank >= 1" if spectral or method.size else "no rank: this method has no size"
        raise InputError(f"{method.name}: got rank = {rank}; want {want}")
    if not spectral:
        return (rank or method.size, None)
    if interval is not None:
        return interval[1] - interval[0], (int(interval[0]), int(interval[1]))
    n = min(site.rank for site in places)
    width = rank or default_width(n)
    if width > n:
        raise InputError(f"{method.name}: got rank = {width}; the smallest adapted matrix has {n} singular values")
    start = {"head": 0, "middle": (n - width) // 2, "tail": n - width}[method.options.get("where", "head")]
    return width, (start, start + width)


def default_width(n: int) -> int:
    """Width of the paper's interval in proportion: 300 of 768 singular values (Yu et al. 2026, §4.4)."""
    return max(1, round(300 / 768 * n))


_Built = tuple[nn.Module, tuple[TrainerCallback, ...]]


def _subset(model: nn.Module, request: Request, head: tuple[str, ...]) -> _Built:
    """Full finetuning, BitFit, linear probe: some of the model's own parameters."""
    model.requires_grad_(False)
    which = request.options["which"]
    roots = [model.get_submodule(site.name) for site in request.sites] or [model]
    chosen = [
        p
        for root in roots
        for name, p in root.named_parameters()
        if p.is_floating_point() and (which == "all" or (which == "bias" and p.ndim == 1 and name.endswith("bias")))
    ]
    if not chosen and which != "none":
        raise InputError(f"{request.method.name}: the adapted modules have no biases; use another method")
    for p in chosen:
        p.requires_grad_(True)
    _open(model, head)
    return model, ()


def _open(model: nn.Module, head: tuple[str, ...]) -> None:
    for name in head:
        model.get_submodule(name).requires_grad_(True)


def _spectral(model: nn.Module, request: Request, head: tuple[str, ...]) -> _Built:
    """The spectral adapter, through its PEFT bridge."""
    options = {key: value for key, value in request.options.items() if key != "where"}
    if request.checkpoint is not None:
        options["basis"] = f"from:{request.checkpoint}"
    return _with_peft(model, request, head, SpectralConfig, interval=request.interval, **options)


def _lora(model: nn.Module, request: Request, head: tuple[str, ...]) -> _Built:
    """LoRA and its relatives in PEFT. The update is scaled by α/r; α = 2 r, and r where the start is W itself."""
    rank = request.rank
    assert rank is not None
    at_weight = str(request.options.get("init_lora_weights", True)).startswith("pissa")
    options = {"lora_alpha": rank if at_weight else 2 * rank, **request.options}
    return _with_peft(model, request, head, LoraConfig, r=rank, **options)


def _with_peft(
    model: nn.Module, request: Request, head: tuple[str, ...], kind: Callable[..., PeftConfig], **options: Any
) -> _Built:
    """A PEFT method on the sites, with head and pooler as modules saved whole.

    Raises:
        InputError: PEFT does not know an option, or refuses the configuration.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"{request.method.name} has no option {unknown[0]!r}; want fields of {kind.__name__}")  # type: ignore[attr-defined]
    transposed = {is_conv1d(model.get_submodule(site.name)) for site in request.sites}
    if "fan_in_fan_out" in known and transposed == {True}:
        options["fan_in_fan_out"] = True
    config = kind(
        target_modules=[site.name for site in request.sites],
        modules_to_save=list(head) or None,
        task_type="SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else None,
        **options,
    )
    return peft.get_peft_model(model, config), ()


_BUILDERS: Mapping[str, Callable[[nn.Module, Request, tuple[str, ...]], _Built]] = {
    "subset": _subset,
    "spectral": _spectral,
    "lora": _lora,
}
