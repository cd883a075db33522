"""One adapter of a layer: what distinguishes it, how far its basis is settled, and the holders of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from specbasis.checkpoint.adapter_file import BASIS, POSITIONS, PROOF
from specbasis.checkpoint.pattern import SQUARE

Scale = Literal["none", "sigma"]
Init = Literal["zero", "normal"]

PARTS = (*BASIS, *PROOF, POSITIONS)
"""Frozen tensors of an adapter, in the state dict as ``spectral_PART.ADAPTER``; a square has no positions."""


@dataclass(eq=False)
class Seal:
    """What a configuration records of coefficients that are about to be loaded; the layers of an adapter share it.

    Attributes:
        digests: module name → digest of its coefficients and proof.
        arrived: whether any layer got a tensor.
    """

    digests: Mapping[str, str]
    arrived: bool = False

    def holds(self, module_name: str, digest: str) -> bool:
        """Whether a layer's digest is the recorded one; of a renamed layer, whether it is anyone's."""
        named = self.digests.get(module_name)
        return digest == named if named is not None else digest in self.digests.values()


@dataclass(eq=False)
class Adapter:
    """One adapter of a layer, besides its tensors.

    Attributes:
        interval: ranks [k, m), 0-based.
        scale: "none", or "sigma" for coefficients in units of the singular values.
        pattern: which coefficients of the square are trained; see `checkpoint.pattern.positions_of`.
        basis: "pretrained", "gradient", "random", "shuffled" (the last two also with ":SEED"), or "from:PATH".
        keep_basis: whether U and Vh are part of the state dict.
        init: how the core of a new adapter starts: "zero", or "normal".
        dropout: share of input features dropped on the adapter's path in training.
        basis_file: a basis file or a cache of decompositions to read the basis from.
        seal: what loaded coefficients must be, until they are proven.
        settled: whether the basis in place is known to be the one that the coefficients belong to.
        awaited: parts that loading has not put in place yet; with the last of them the basis is settled.
        exact: whether the basis is that of this very weight, not of one that it was rounded from.
        rated: whether a route may divide by the singular values (see ``functional.CONDITION``).
    """

    interval: tuple[int, int]
    pattern: str = SQUARE
    scale: Scale = "none"
    basis: str = "pretrained"
    keep_basis: bool = True
    init: Init = "zero"
    dropout: float = 0.0
    basis_file: str | None = None
    seal: Seal | None = None
    settled: bool = False
    awaited: set[str] = field(default_factory=set)
    exact: bool = False
    rated: bool = False

    def expect(self) -> None:
        """Loading begins: every part that a file holds is about to be replaced."""
        basis, positions = self.keep_basis * BASIS, (self.pattern != SQUARE) * (POSITIONS,)
        self.settled, self.awaited = False, {*PROOF, *basis, *positions}


class _Awaited(nn.Module):
    """Tensors by adapter name whose arrival from outside is told.

    Attributes:
        arrived: called with an adapter's name when ``load_state_dict`` has put its tensor in place here, or when it
            is replaced by assignment, which is how transformers loads one.
    """

    arrived: Callable[[str], None] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        replaced = name in self.__dict__.get("_buffers", ()) or name in self.__dict__.get("_parameters", ())
        super().__setattr__(name, value)
        if replaced and self.arrived is not None:
            self.arrived(name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in [*self._buffers, *self._parameters] if self.arrived is not None else ():
            if f"{prefix}{name}" in state_dict:
                self.arrived(name)


class Cores(_Awaited, nn.ParameterDict):
    """Trained coefficients by adapter name. Moves between devices; ``model.half()`` does not round them."""

    def __init__(self, arrived: Callable[[str], None]) -> None:
        super().__init__()
        self.arrived = arrived

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cores:
        super()._apply(_device_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class Frozen(_Awaited):
    """Frozen tensors by adapter name, in the state dict or not. Moves between devices and keeps its dtype.

    ``model.half()`` would otherwise round a basis, and the rounded basis is no longer the one that was trained in.

    Args:
        expected: called with an adapter's name before ``load_state_dict`` replaces its tensor here.
        arrived: called with the name when the tensor is in place.
    """

    def __init__(
        self, expected: Callable[[str], None] | None = None, arrived: Callable[[str], None] | None = None
    ) -> None:
        super().__init__()
        self._expected, self.arrived = expected, arrived

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self if self._expected is not None else ():
            if f"{prefix}{name}" in state_dict:
                self._expected(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        super()._apply(_device_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def put(self, name: str, tensor: Tensor, *, persistent: bool = True, parameter: bool = False) -> None:
        """Store a tensor under an adapter's name, as a buffer or as a parameter without gradient."""
        if name in self:
            del self[name]
        if parameter:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor, persistent=persistent)

    def keys(self) -> list[str]:
        """Names of the adapters that have a tensor here."""
        return [*self._buffers, *self._parameters]

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor | None = self._parameters.get(name)
        if tensor is None:
            tensor = self._buffers[name]
        assert tensor is not None
        return tensor

    def __delitem__(self, name: str) -> None:
        delattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self._buffers or name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


def _device_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def move(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return fn(tensor)
        target = fn(tensor.new_empty(0))
        return fn(tensor) if target.dtype == tensor.dtype else tensor.to(target.device)

    return move
