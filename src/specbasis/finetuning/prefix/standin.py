"""Stand-ins for the modules of a frozen prefix: the model's own forward runs, but they return what is given."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from specbasis.core.errors import InputError
from specbasis.finetuning.prefix.probe import evaluating, hooked

KEY = "prefix_value_"
"""Begin of the names under which a batch brings the values of its examples."""

Dim = int | Literal["batch", "tokens"]


@dataclass(frozen=True)
class Site:
    """One output of one call: the module's name, which of its calls in a forward pass, which tensor it returns."""

    module: str
    number: int
    index: int


@dataclass(frozen=True)
class Blank:
    """An output that nothing reads but for its shape, dtype and device: zeros that take no memory."""

    shape: tuple[Dim, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Value:
    """An output that comes with the batch, under this name; the model computes it in this dtype."""

    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Output:
    """What a call returns in place of computing: the structure and its leaves, constants where not tensors."""

    spec: Any
    leaves: tuple[Any, ...]


Action = Output | None
"""A call's output, or None: it runs, in evaluation mode."""


def keyed(values: Iterable[Tensor]) -> dict[str, Tensor]:
    """Values by the names under which a batch brings them."""
    return {f"{KEY}{n}": value for n, value in enumerate(values)}


def _sizes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int | None]:
    """Number of examples, and of tokens where the input is tokens."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1]
    tokens = [value for value in tensors if value.dim() == 2 and not value.is_floating_point()]
    main = (tokens or tensors)[0]
    return main.shape[0], main.shape[1] if tokens else None


class Suffix:
    """A model whose calls below a cut are replaced while a batch that brings values runs.

    Only ``forward`` of the modules concerned is set, on the instance, and taken away again: parameters, names and
    hooks stay.

    Args:
        model: the model whose call takes the batch.
        actions: by module name, what its first, second, … call becomes.
        before: name of the module at the cut: what it is inside of is not checkpointed, as it holds stand-ins.

    Raises:
        InputError: the model has no module of such a name.
    """

    def __init__(self, model: nn.Module, actions: Mapping[str, tuple[Action, ...]], before: str = "") -> None:
        self.model, self.actions, self.before = model, actions, before
        self.modules = dict(model.named_modules())
        absent = [name for name in (*actions, before) if name not in self.modules]
        if absent:
            raise InputError(f"the model has no module {absent[0]!r}: want the model in which the cut was found")
        self.values: Mapping[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.sizes: tuple[int, int | None] = (0, None)

    @contextmanager
    def running(self, park: Path | None = None) -> Iterator[None]:
        """Take values from batches that bring them; let all others through the whole model.

        Args:
            park: folder for the weights that stand still, to give their memory back.
        """
        standing = [name for name, actions in self.actions.items() if None not in actions] if park else []
        parked = Parked(self.model, standing, park or Path())
        parts = self.before.split(".")
        around = [self.modules[".".join(parts[:n])] for n in range(1, len(parts) + 1) if self.before]
        unchecked: list[nn.Module] = []

        def start(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # A checkpointed block would call its stand-ins again in the backward pass, when the batch is gone.
            for part in around:
                if getattr(part, "gradient_checkpointing", False):
                    vars(part)["gradient_checkpointing"] = False
                    unchecked.append(part)
            values = {name: value for name, value in kwargs.items() if name.startswith(KEY)}
            rest = {name: value for name, value in kwargs.items() if name not in values}
            if values and getattr(module, "_is_replica", False):
                raise InputError(
                    "the prefix cache does not run in threads (DataParallel): start one process for each GPU with "
                    "accelerate launch or torchrun, or train without it"
                )
            if values:
                parked.out()
                self.sizes = _sizes(args, rest)
            else:
                parked.back(for_good=False)
            self.values = values
            self.counts.clear()
            return args, rest

        def stop(*_: Any) -> None:
            self.values = {}

        hooks = (
            self.model.register_forward_pre_hook(start, with_kwargs=True),
            self.model.register_forward_hook(stop, always_call=True),
        )
        try:
            with self._replaced(), hooked(*hooks):
                yield
        finally:
            parked.back()
            for part in unchecked:
                vars(part)["gradient_checkpointing"] = True

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return self.values[leaf.name].to(leaf.dtype)
        if not isinstance(leaf, Blank):
            return leaf
        named = {"batch": self.sizes[0], "tokens": self.sizes[1]}
        shape = [n if isinstance(n, int) else named[n] or 0 for n in leaf.shape]
        device = next(iter(self.values.values())).device
        return torch.zeros((), dtype=leaf.dtype, device=device).expand(shape)

    def _forward(self, name: str, module: nn.Module, actions: tuple[Action, ...]) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            number, self.counts[name] = self.counts[name], self.counts[name] + 1
            if not self.values or number >= len(actions):
                return original(*args, **kwargs)
            action = actions[number]
            if action is not None:
                return pytree.tree_unflatten([self._leaf(leaf) for leaf in action.leaves], action.spec)
            with evaluating(module):
                return original(*args, **kwargs)

        return forward

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        before: list[tuple[nn.Module, bool, Any]] = []
        try:
            for name, actions in self.actions.items():
                module = self.modules[name]
                replacement = self._forward(name, module, actions)
                before.append((module, "forward" in module.__dict__, module.__dict__.get("forward")))
                module.__dict__["forward"] = replacement
            yield
        finally:
            for module, own, forward in before:
                del module.__dict__["forward"]
                if own:
                    module.__dict__["forward"] = forward


# --- weights that stand still, out of the way ---------------------------------------------------------------------

_ALIGNED = 64


class Parked:
    """Frozen parameters of a model whose memory can be given back while nothing computes with them.

    The parameters stay what they are, with their values: only where these are held changes. A state dict taken
    meanwhile is complete.

    Args:
        model: of which they are.
        standing: names of the modules that do not run.
        folder: where a file of their size can be; it has no name and is gone with the process.
    """

    def __init__(self, model: nn.Module, standing: Iterable[str], folder: Path) -> None:
        names = tuple(f"{name}." for name in standing)
        parameters = {
            id(p): p for name, p in model.named_parameters(remove_duplicate=False) if f"{name}.".startswith(names)
        }
        used = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if not f"{n}.".startswith(names)}
        self.parameters = [
            p
            for key, p in parameters.items()
            if key not in used and type(p) is nn.Parameter and not p.requires_grad and p.is_contiguous()
        ]
        self.folder = folder
        self.device: torch.device | None = None

    def out(self) -> None:
        """Give the memory back. On a full disk nothing is given back, with a warning."""
        if self.device is not None or not self.parameters:
            return
        self.device = self.parameters[0].device
        if self.device.type != "cpu":
            for p in self.parameters:
                p.data = p.data.cpu()
            return
        try:
            self._map()
        except OSError as error:
            warnings.warn(f"{self.folder}: the frozen weights stay in memory ({error.strerror})", stacklevel=2)

    def back(self, *, for_good: bool = True) -> None:
        """Hold the values in the model's own memory again; for a batch in between a mapped file serves as well."""
        if self.device is None or (self.device.type == "cpu" and not for_good):
            return
        for p in self.parameters:
            p.data = p.data.clone() if self.device.type == "cpu" else p.data.to(self.device)
        self.device = None

    def _map(self) -> None:
        offsets = [0]
        for p in self.parameters:
            size = p.numel() * p.element_size()
            offsets.append(offsets[-1] + -(-size // _ALIGNED) * _ALIGNED)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for p, offset in zip(self.parameters, offsets, strict=False):
                file.seek(offset)
                file.write(p.data.view(-1).view(torch.uint8).numpy().data)
            file.truncate(offsets[-1])
            file.flush()
            mapped = torch.from_numpy(np.memmap(file, np.uint8, mode="r+"))
        for p, offset in zip(self.parameters, offsets, strict=False):
            part = mapped[offset : offset + p.numel() * p.element_size()]
            p.data = part.view(p.dtype).view(p.shape)
