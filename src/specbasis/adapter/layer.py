"""A frozen layer and its spectral adapters: nn.Linear, transformers' Conv1D, or nn.Conv2d, with any number of
adapters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from specbasis.adapter import functional
from specbasis.adapter.proof import Proof, align, check_format, check_stored, empty_proof, prove
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, half_svd

Scale = Literal["none", "sigma"]
Init = Literal["zero", "normal"]

SIDE_BY_SIDE = 2048
"""Longest short side of matrices that are decomposed side by side, each on one thread.

An eigensolver of this size gains little from several threads. Larger: more memory at once.
"""

MOST_AT_ONCE = 8
"""Decompositions that may run side by side. Larger: more memory at once."""


@dataclass(frozen=True)
class Settings:
    """What distinguishes one adapter of a layer, besides its tensors.

    Attributes:
        interval: ranks [k, m), 0-based.
        scale: "none", or "sigma" for coefficients in units of the singular values.
        basis: "pretrained", "random", "shuffled" (each also with ":SEED"), or "from:PATH".
        keep_basis: whether U and Vh are part of the state dict.
        init: how the core of a new adapter starts: "zero", or "normal".
    """

    interval: tuple[int, int]
    scale: Scale = "none"
    basis: str = "pretrained"
    keep_basis: bool = True
    init: Init = "zero"


class _Cores(nn.ParameterDict):
    """Trained coefficients by adapter name. Moves between devices; ``model.half()`` does not round them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Cores:
        super()._apply(_device_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class Frozen(nn.Module):
    """Frozen tensors by adapter name, in the state dict or not. Moves between devices and keeps its dtype.

    ``model.half()`` would otherwise round a basis, and the rounded basis is no longer the one that was trained in.

    Args:
        replaced: called with an adapter's name when its tensor here is replaced by assignment, which is how
            transformers loads one.
    """

    def __init__(self, replaced: Callable[[str], None]) -> None:
        super().__init__()
        self._replaced = replaced

    def __setattr__(self, name: str, value: Any) -> None:
        known = name in self.__dict__.get("_buffers", ()) or name in self.__dict__.get("_parameters", ())
        super().__setattr__(name, value)
        if known:
            self._replaced(name)

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


_FROZEN = (
    "spectral_U",
    "spectral_Vh",
    "spectral_S",
    "spectral_sketch_U",
    "spectral_sketch_V",
    "spectral_origin",
)


class SpectralLinear(nn.Module):
    """A frozen layer W and adapters W' = W + U[:, k:m] C Vh[k:m, :], of which only the core is trained.

    Wraps nn.Linear, transformers' Conv1D (whose weight is transposed) and nn.Conv2d (as out × in·kh·kw). The
    layer's
    own forward is called wherever the route allows, so hooks, quantised weights and subclasses keep working.
    With the
    core at zero the output is the base layer's, bit for bit.

    Several adapters may be active at once: their updates add. ``forward(x, adapter_names=[…])`` gives every row
    of a
    batch its own adapter; adapters that share a basis share the product x Vhᵀ.

    Args:
        base_layer: the layer to adapt; its parameters are frozen.
        adapter_name: name of the first adapter; None for none yet.
        interval: ranks [k, m) of the singular vectors, 0 ≤ k < m ≤ min(out, in).
        options: further arguments of ``add``.

    Raises:
        InputError: the layer is of another kind, or the interval does not fit it.

    Source: Yu et al. 2026, Eq. 3, 4, App. M.
    """

    base_layer: nn.Module
    spectral_U: Frozen
    spectral_Vh: Frozen
    spectral_S: Frozen
    spectral_sketch_U: Frozen
    spectral_sketch_V: Frozen
    spectral_origin: Frozen
    adapter_layer_names: tuple[str, ...] = ("spectral_M",)
    other_param_names: tuple[str, ...] = (*_FROZEN, "spectral_dropout", "settings")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = "default",
        interval: tuple[int, int] = (0, 300),
        *,
        module_name: str = "layer",
        **options: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.kind = _kind_of(base_layer, module_name)
        self.spectral_M = _Cores()
        for part in _FROZEN:
            setattr(self, part, Frozen(functools.partial(self._arrived, part)))
        self.spectral_dropout = nn.ModuleDict()
        self.settings: dict[str, Settings] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] | str = [] if adapter_name is None else [adapter_name]
        self._disable_adapters = False
        self._original: nn.Parameter | None = None
        self._unproven: set[str] = set()
        self._awaited: dict[str, set[str]] = {}  # what an adapter from a file still lacks
        self._exact: set[str] = (
            set()
        )  # adapters whose basis is that of this very weight, not of one it was rounded from
        self._rated: dict[str, tuple[Tensor, int]] = {}
        self._sources: dict[str, Callable[[], SVD]] = {}
        base_layer.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_note_loaded)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_prove_loaded)  # type: ignore[no-untyped-call]
        if adapter_name is not None:
            self.add(adapter_name, interval, **options)

    # What a tuner layer of PEFT calls by the same names.

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters in use."""
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter

    @property
    def merged(self) -> bool:
        """Whether the frozen weight currently holds the sum."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer acts as its base layer."""
        return self._disable_adapters

    def weight_matrix(self) -> Float[Tensor, "out in"]:
        """The frozen weight as a matrix (out, in), dequantised if need be."""
        if self._original is not None:
            return self.kind.matrix(self._original.detach())
        return self.kind.matrix(self.stored_weight())

    def may_share_cores(self) -> bool:
        """Whether the weight is on the CPU and so small that it is best decomposed on one thread."""
        return self.stored_weight().device.type == "cpu" and min(self.kind.shape(innermost(self))) <= SIDE_BY_SIDE

    def stored_weight(self) -> Tensor:
        """The frozen weight in the base layer's own layout."""
        weight = innermost(self).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def add(
        self,
        adapter_name: str,
        interval: tuple[int, int],
        *,
        scale: Scale = "none",
        basis: str = "pretrained",
        dropout: float = 0.0,
        init: Init = "zero",
        keep_basis: bool = True,
        source: Callable[[], SVD] | None = None,
        from_file: bool = False,
        later: bool = False,
        shard: bool = False,
    ) -> None:
        """Add an adapter with its core at zero.

        Costs one decomposition of the weight, unless another adapter of this layer has the same basis and interval.

        Args:
            adapter_name: a new name.
            interval: ranks [k, m), 0-based, m excluded.
            scale: "sigma" puts the coefficients in units of the singular values.
            basis: "pretrained"; "random" or "shuffled", as controls (see `compute_basis`); or any other name with
                a ``source``.
            dropout: share of input features dropped on the adapter's path in training.
            init: "zero", or "normal": small random coefficients, 1 % of the mean singular value in spectral norm.
            keep_basis: make U and Vh part of the state dict.
            source: a function that returns the basis of this interval, if the caller has a better one than
                decomposing the weight.
            from_file: leave the basis empty; loading a state dict fills and proves it before the first use.
            later: leave the basis empty; `find_bases`, or else the first use, computes it.
            shard: hold U and Vh as parameters without gradient, which FSDP shards, instead of buffers.

        Raises:
            InputError: the interval does not fit the weight, or an option has no such value.
        """
        shape = self.kind.shape(innermost(self))
        k, m = check_interval(interval, shape, self.module_name)
        if scale not in ("none", "sigma"):
            raise InputError(f"{self.module_name}: got scale = {scale!r}; want 'none' or 'sigma'")
        if init not in ("zero", "normal"):
            raise InputError(f"{self.module_name}: got init = {init!r}; want 'zero' or 'normal'")
        device = self.stored_weight().device
        meta = torch.device("meta")
        if source is not None:
            self._sources[adapter_name] = source
        self.settings[adapter_name] = Settings((k, m), scale, basis, keep_basis, init)
        self.spectral_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.spectral_M[adapter_name] = nn.Parameter(torch.zeros(m - k, m - k, dtype=torch.float32, device=device))
        if not (from_file or later or device == meta):
            self._found(adapter_name, shard)
            self._start(adapter_name)
            return
        U = torch.zeros(shape[0], m - k, device=device)
        self._store(adapter_name, U, torch.zeros(m - k, shape[1], device=device), empty_proof(m - k), shard)
        self._unproven.add(adapter_name)
        if from_file:
            self._awaited[adapter_name] = {part for part in _FROZEN if keep_basis or part not in _FROZEN[:2]}

    def _found(self, name: str, shard: bool) -> None:
        """Give a new adapter its basis, that of another adapter of this layer or a computed one."""
        twin = self._twin(name)
        if twin is not None and twin in self._exact:
            self._store(name, self.spectral_U[twin], self.spectral_Vh[twin], self.proof(twin), shard)
        else:
            W, basis = self.weight_matrix(), self._basis(name)
            self._store(name, basis.U, basis.Vh, prove(basis, self.settings[name].interval, W), shard)
        self._exact.add(name)
        self._unproven.discard(name)
        self._rate(name)

    def _start(self, name: str) -> None:
        """Random coefficients, where the settings want them."""
        settings, M = self.settings[name], self.spectral_M[name]
        if settings.init == "normal":
            unit = 1.0 if settings.scale == "sigma" else float(self.spectral_S[name].mean())
            nn.init.normal_(M, std=0.005 * unit / math.sqrt(len(M)))

    def _arrived(self, part: str, name: str) -> None:
        """A tensor of an adapter was put in place from outside: with the last that its file holds, prove them."""
        awaited = self._awaited.get(name)
        if awaited is None:
            return
        awaited.discard(part)
        if not awaited and not self.stored_weight().is_meta:
            self.prove_loaded(name)

    def _basis(self, name: str) -> SVD:
        if name in self._sources:
            return self._sources[name]()
        settings = self.settings[name]
        return compute_basis(self.weight_matrix(), settings.interval, settings.basis, self.module_name)

    def _twin(self, adapter_name: str) -> str | None:
        """Another adapter with the same basis and interval, whose factors can be shared."""
        mine, found = self.settings[adapter_name], None
        for name, other in self.settings.items():
            usable = name != adapter_name and name not in self._unproven and not self.spectral_U[name].is_meta
            if usable and (other.interval, other.basis) == (mine.interval, mine.basis):
                found = name
                if name in self._exact:
                    break
        return found

    def _store(self, name: str, U: Tensor, Vh: Tensor, proof: Proof, shard: bool) -> None:
        """Keep a basis and its proof; factors that another adapter already holds are shared, not copied."""
        device, keep = self.stored_weight().device, self.settings[name].keep_basis
        for frozen, factor in ((self.spectral_U, U), (self.spectral_Vh, Vh)):
            frozen.put(
                name, factor.detach().to(device, torch.float32).contiguous(), persistent=keep, parameter=shard
            )
        for frozen, tensor in zip(
            self._proofs(), (proof.origin, proof.S, proof.sketch_U, proof.sketch_V), strict=True
        ):
            frozen.put(name, tensor.to(device))

    def _shards(self, name: str) -> bool:
        """Whether an adapter's factors are parameters."""
        return name in self.spectral_U._parameters

    def _proofs(self) -> tuple[Frozen, Frozen, Frozen, Frozen]:
        return self.spectral_origin, self.spectral_S, self.spectral_sketch_U, self.spectral_sketch_V

    def proof(self, adapter_name: str) -> Proof:
        """What tells the adapter's basis from others, as it stands in the file."""
        return Proof(*(frozen[adapter_name] for frozen in self._proofs()))

    def _rate(self, name: str) -> None:
        """Note the weight by whose singular values a route may divide, if that is accurate
        (functional.CONDITION).
        """
        self._rated.pop(name, None)
        S, base, settings = self.spectral_S[name], self.base_layer, self.settings[name]
        if (
            name not in self._exact
            or settings.basis != "pretrained"
            or not self.kind.folds
            or type(base.weight) is not nn.Parameter
        ):
            return
        top = float(S[0]) if settings.interval[0] == 0 else float(base.weight.detach().float().norm())
        bias = getattr(base, "bias", None)
        top += 0.0 if bias is None else float(bias.detach().float().norm())
        if float(S[-1]) * functional.CONDITION >= top:
            self._rated[name] = (base.weight, base.weight._version)

    def _is_rated(self, name: str) -> bool:
        """Whether the weight is still the very one that was rated."""
        weight, version = self._rated.get(name, (None, -1))
        return weight is self.base_layer.weight and version == weight._version  # type: ignore[union-attr,unused-ignore]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, in which the weight is another object: the names of the adapters rated by it."""
        return {**self.__dict__, "_rated": dict.fromkeys(filter(self._is_rated, self._rated))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        self._rated = dict.fromkeys(self._rated, (weight, weight._version))

    def prove_loaded(self, adapter_name: str) -> None:
        """Make sure that loaded coefficients meet the basis they were trained in; see ``specbasis.adapter.proof``.

        A stored basis is checked against its sketch and the base weight. Without one the weight is decomposed,
        signs are
        set by the sketch, and every vector is compared. An adapter for which nothing was loaded gets its basis
        here.

        Raises:
            InputError: the basis is not the trained one, with the reason.
        """
        settings, proof, W = self.settings[adapter_name], self.proof(adapter_name), self.weight_matrix()
        name = f"{self.module_name} (adapter {adapter_name!r})"
        shard = self._shards(adapter_name)
        if not bool(proof.origin.any()) and not bool(self.spectral_M[adapter_name].any()):
            self._found(adapter_name, shard)
            self._start(adapter_name)
            return
        if bool(proof.origin.any()) and proof.interval != settings.interval:
            raise InputError(
                f"{name}: the file's coefficients are for ranks [{proof.interval[0]}, {proof.interval[1]}), the "
                f"configuration "
                f"says [{settings.interval[0]}, {settings.interval[1]}); the folder mixes two adapters: save it "
                f"again"
            )
        U, Vh = self.spectral_U[adapter_name], self.spectral_Vh[adapter_name]
        if settings.keep_basis:
            exact = check_stored(proof, U, Vh, W, name, singular=settings.basis == "pretrained")
            twin = self._twin(adapter_name)
            if (
                twin is not None
                and torch.equal(self.spectral_U[twin], U)
                and torch.equal(self.spectral_Vh[twin], Vh)
            ):
                self._store(adapter_name, self.spectral_U[twin], self.spectral_Vh[twin], proof, shard)
        else:
            twin = self._twin(adapter_name)
            if twin is not None and self._same_proof(adapter_name, twin):
                U, Vh, exact = self.spectral_U[twin], self.spectral_Vh[twin], twin in self._exact
            else:
                check_format(proof, W, name)
                found = align(proof, self._basis(adapter_name), W, name)
                U, Vh, exact = found.U, found.Vh, True
            self._store(adapter_name, U, Vh, proof, shard)
        self._unproven.discard(adapter_name)
        self._awaited.pop(adapter_name, None)
        (self._exact.add if exact else self._exact.discard)(adapter_name)
        self._rate(adapter_name)

    def _same_proof(self, one: str, other: str) -> bool:
        """Whether two adapters were trained in the same basis, sign for sign and bit for bit."""
        return all(torch.equal(frozen[one], frozen[other]) for frozen in self._proofs())

    def core(self, adapter_name: str) -> Float[Tensor, "r r"]:
        """The adapter's core in units of the weight: M, or diag(S) M."""
        return functional.core(
            self.spectral_M[adapter_name], self.spectral_S[adapter_name], self.settings[adapter_name].scale
        )

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update in the base layer's layout and dtype: U C Vh, formed in float64.

        Raises:
            InputError: the adapter was loaded and its basis is not the trained one.
        """
        self._settle(adapter_name)
        C = self.core(adapter_name).detach().double()
        matrix = functional.delta(
            self.spectral_U[adapter_name].double(), C, self.spectral_Vh[adapter_name].double()
        )
        stored = self.stored_weight()
        dtype = stored.dtype if stored.is_floating_point() else torch.float32
        return self.kind.stored(matrix, innermost(self)).to(dtype)

    def _settle(self, *adapter_names: str) -> None:
        for name in adapter_names:
            if name in self._unproven:
                self.prove_loaded(name)

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """The frozen weight plus the updates of these adapters, summed in float64, in the weight's layout and
        dtype.

        Raises:
            InputError: the sum is not finite.
        """
        self._settle(*adapter_names)
        W = self.weight_matrix().double()
        for name in adapter_names:
            C = self.core(name).detach().double()
            W = W + functional.delta(self.spectral_U[name].double(), C, self.spectral_Vh[name].double())
        stored = self.stored_weight()
        return self.kind.stored(W, innermost(self)).to(
            stored.dtype if stored.is_floating_point() else torch.float32
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + Σ U C Vh in place of the frozen weight, which is kept aside: ``unmerge`` restores its very bits.

        A weight that is shared with another layer (tied) is replaced here only. Costs a second copy of the weight.

        Args:
            safe_merge: refuse a sum that is not finite.
            adapter_names: which adapters; the active ones by default. Merged ones are skipped.

        Raises:
            ValueError: ``safe_merge`` and the sum is not finite.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.settings and name not in self.merged_adapters]
        if not names:
            return
        weight = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"NaNs detected in the merged weights of {self.module_name}. The adapter {', '.join(names)} "
                f"seems to be broken"
            )
        original = innermost(self).weight
        if self._original is None:
            assert isinstance(original, nn.Parameter)
            self._original = original
        self._put_weight(weight)
        self.merged_adapters.extend(names)

    def _put_weight(self, weight: Tensor) -> None:
        innermost(self).weight = nn.Parameter(weight, requires_grad=False)

    def unmerge(self) -> None:
        """Put the frozen weight back, bit for bit, and tied to what it was tied to."""
        if self._original is None:
            return
        current = innermost(self).weight
        assert isinstance(current, Tensor)
        if current.device != self._original.device or (
            current.dtype != self._original.dtype
            and self._original.is_floating_point()
            and current.is_floating_point()
        ):
            self._original.data = self._original.data.to(
                current.device, current.dtype
            )  # the model was moved meanwhile
        innermost(self).weight = self._original
        self._original = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The adapted layer's output for input x; every row with its own adapter when ``adapter_names`` is given.

        Raises:
            ValueError: ``adapter_names`` is not one name for every row, or adapters are merged.
            InputError: an adapter was loaded and its basis is not the trained one.
        """
        if adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self._base(x, *args, **kwargs)
        if self.merged_adapters:
            return self._base(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.settings]
        if self._unproven:
            self._settle(*names)
        if len(names) == 1:
            return self._single(x, names[0], *args, **kwargs)
        y = self._base(x, *args, **kwargs)
        for name in names:
            y = y + self._update(x, name).to(y.dtype)
        return y

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _single(self, x: Tensor, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """One adapter, by the cheapest route."""
        C, U, Vh, S = self.core(name), self.spectral_U[name], self.spectral_Vh[name], self.spectral_S[name]
        bias = getattr(self.base_layer, "bias", None)
        route = self._route(x, name)
        if route == "folded":
            return functional.folded(x, self.base_layer.weight, bias, U, C, Vh)  # type: ignore[arg-type]
        if route == "inner":
            return functional.inner(x, U, S, C, Vh, lambda moved: self._base(moved, *args, **kwargs))
        y = self._base(x, *args, **kwargs)
        if route == "outer":
            return functional.outer(y, bias, U, S, C)
        return y + self._update(x, name).to(y.dtype)

    def _route(self, x: Tensor, name: str) -> functional.Route:
        """Which of the equal ways to compute the adapted output costs least; any but the first needs float32
        or 64.
        """
        base, dropout = self.base_layer, self.spectral_dropout[name]
        bias = getattr(base, "bias", None)
        exact = (
            self.kind.folds
            and type(base.weight) is nn.Parameter
            and x.dtype == base.weight.dtype == self.spectral_U[name].dtype
            and not base.weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
            and not (self.training and isinstance(dropout, nn.Dropout))
        )
        if not exact:
            return "factored"
        out, in_ = self.spectral_U[name].shape[0], self.spectral_Vh[name].shape[1]
        candidates: list[functional.Route] = ["factored"]
        if (
            type(base) is nn.Linear
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and "forward" not in vars(base)
        ):
            candidates.append("folded")
        # Only for the very weight that was decomposed: another one has other singular vectors. Compiled code
        # cannot tell.
        if not torch.compiler.is_compiling() and self._is_rated(name):
            candidates.append("inner" if in_ <= out else "outer")
        C = self.spectral_M[name]
        return functional.choose(
            x.numel() // in_,
            out,
            in_,
            C.shape[0],
            backward=torch.is_grad_enabled() and (C.requires_grad or x.requires_grad),
            input_gradient=x.requires_grad,
            candidates=tuple(candidates),
        )

    def _update(self, x: Tensor, name: str) -> Tensor:
        """The update's output alone, in factors."""
        z = self._project(self.spectral_dropout[name](x), name)
        return self.kind.expand(self.kind.mix(z, self.core(name)), self.spectral_U[name], innermost(self))

    def _project(self, x: Tensor, name: str) -> Tensor:
        Vh = self.spectral_Vh[name]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(Vh.dtype)
        return self.kind.project(x, Vh, innermost(self))

    def _mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Rows with different adapters; x Vhᵀ is computed once for all adapters that share a basis."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y = self._base(x, *args, **kwargs)
        names = sorted({name for name in adapter_names if name in self.settings})
        self._settle(*names)
        for group in self._by_basis(names):
            rows = {name: [i for i, row in enumerate(adapter_names) if row == name] for name in group}
            z = self._project(x, group[0])
            mixed = torch.zeros_like(z)
            for name, index in rows.items():
                mixed[index] = self.kind.mix(z[index], self.core(name)).to(mixed.dtype)
            y = y + self.kind.expand(mixed, self.spectral_U[group[0]], innermost(self)).to(y.dtype)
        return y

    def _by_basis(self, names: list[str]) -> list[list[str]]:
        """Adapters grouped by identical factors."""
        groups: dict[tuple[int, int], list[str]] = {}
        for name in names:
            key = (self.spectral_U[name].data_ptr(), self.spectral_Vh[name].data_ptr())
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralLinear:
        """Move, then share again the factors that were shared: moving copies every buffer on its own."""
        groups = self._by_basis([name for name in self.settings if not self.spectral_U[name].is_meta])
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for first, *others in groups:
            for name in others:
                for frozen in (self.spectral_U, self.spectral_Vh):
                    if name in frozen._buffers and first in frozen._buffers:
                        frozen._buffers[name] = frozen._buffers[first]
        return self

    def extra_repr(self) -> str:
        """Adapters and their ranks, for printing a model."""
        return ", ".join(f"{name}: ranks [{s.interval[0]}, {s.interval[1]})" for name, s in self.settings.items())


def find_bases(layers: Iterable[SpectralLinear], adapter_name: str) -> None:
    """Compute the bases of an adapter that was added with ``later``: matrices up to `SIDE_BY_SIDE` at once, one
    thread each; larger ones, and those on other devices, in turn with all threads.

    Raises: as `compute_basis`.
    """
    waiting = [layer for layer in layers if adapter_name in layer._unproven and not layer.stored_weight().is_meta]
    threads = torch.get_num_threads()
    small = [layer for layer in waiting if layer.may_share_cores()] if threads > 1 else []
    if len(small) > 1:
        workers = min(threads, len(small), MOST_AT_ONCE)
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
                list(executor.map(lambda layer: layer._found(adapter_name, layer._shards(adapter_name)), small))
        finally:
            torch.set_num_threads(threads)  # BLAS libraries hold this number for the whole process
    for layer in waiting:  # random numbers are drawn in order, whatever ran side by side
        if adapter_name in layer._unproven:
            layer.prove_loaded(adapter_name)
        else:
            layer._start(adapter_name)


def innermost(layer: nn.Module) -> nn.Module:
    """The layer that holds the weight, below any number of adapters."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer  # type: ignore[assignment]
    return layer


def check_interval(interval: tuple[int, int], shape: tuple[int, int], name: str) -> tuple[int, int]:
    """The interval as two integers, if 0 ≤ k < m ≤ min(out, in).

    Raises:
        InputError: it is not.
    """
    try:
        k, m = (int(bound) for bound in interval)
    except (TypeError, ValueError):
        raise InputError(f"{name}: got interval = {interval!r}; want two ranks (k, m)") from None
    if not 0 <= k < m <= min(shape):
        raise InputError(
            f"{name}: got interval [{k}, {m}) for a weight of {shape[0]} × {shape[1]}, which has {min(shape)} "
            f"singular values; "
            f"want 0 <= k < m <= {min(shape)}: lower the rank, or give this layer its own interval"
        )
    return k, m


def compute_basis(W: Float[Tensor, "out in"], interval: tuple[int, int], kind: str, name: str = "matrix") -> SVD:
    """Frozen vectors for ranks [k, m): the singular vectors of W ("pretrained"), or those of a control.

    "random" or "random:SEED": orthonormal vectors, uniform, the same for every weight of one shape (SEED is 0 when
    it is left out). "shuffled" or "shuffled:SEED": the right vectors v_k … v_{m−1} of W, paired with the left
    vectors u_π(k) … u_π(m−1) of a random permutation π of all ranks; the left vectors so come from the whole
    spectrum. (A permutation inside the interval would change nothing: M takes it up.) Both come with the singular
    values of W on the interval as their scale.

    Raises:
        InputError: the kind is none of these.
    """
    k, m = interval
    kind, _, number = kind.partition(":")
    if kind not in ("pretrained", "random", "shuffled") or not (number or "0").isdecimal():
        raise InputError(
            f"{name}: got basis = {kind!r}{number and f' with seed {number!r}'}; want 'pretrained', 'random' or "
            "'shuffled', or pass the factors"
        )
    # Vectors of the long side are right to 1e-12 this way, beyond what float32 factors hold.
    half = half_svd(W, min(W.shape) if kind == "shuffled" else m, name=name, implied=True)
    svd = half.interval(k, m)
    if kind == "pretrained":
        return svd
    generator = torch.Generator().manual_seed(int(number or 0))
    if kind == "shuffled":
        order = torch.randperm(len(half.S), generator=generator).to(W.device)
        U, Vh = half.vectors("left")[:, order[k:m]].contiguous(), svd.Vh
    else:
        U, V = (
            torch.linalg.qr(torch.randn(d, m, generator=generator, dtype=torch.float64))[0][:, k:m].to(W.device)
            for d in W.shape
        )
        Vh = V.mT.contiguous()
    return SVD(U, svd.S, Vh, svd.spectrum, svd.spectrum_error, svd.residual, svd.gap)


def _note_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Coefficients are about to be replaced: they must be proven again."""
    assert isinstance(module, SpectralLinear)
    for name in module.settings:
        if f"{prefix}spectral_M.{name}" in state_dict:
            module._unproven.add(name)


def _prove_loaded(module: nn.Module, incompatible_keys: Any) -> None:
    """Prove at load time, not at first use."""
    assert isinstance(module, SpectralLinear)
    for name in sorted(module._unproven):
        if not module.spectral_U[name].is_meta and bool(module.spectral_origin[name].any()):
            module.prove_loaded(name)


@dataclass(frozen=True)
class _Kind:
    """How one class of layers stores its matrix and applies a factor of it; pickled by its name in this module."""

    name: str
    folds: bool
    matrix: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, Any], Tensor]
    project: Callable[[Tensor, Tensor, Any], Tensor]
    mix: Callable[[Tensor, Tensor], Tensor]
    expand: Callable[[Tensor, Tensor, Any], Tensor]

    def __reduce__(self) -> str:
        return self.name

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """(out, in) of the matrix."""
        if isinstance(layer, nn.Conv2d):
            return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        if isinstance(layer, nn.Linear) or hasattr(layer, "in_features"):
            return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        in_, out = weight.shape
        return out, in_


_LINEAR = _Kind(
    "_LINEAR",
    True,
    lambda W: W,
    lambda D, _: D,
    lambda x, Vh, _: F.linear(x, Vh),
    F.linear,
    lambda t, U, _: F.linear(t, U),
)
_CONV1D = _Kind(
    "_CONV1D",
    True,
    lambda W: W.mT,
    lambda D, _: D.mT.contiguous(),
    _LINEAR.project,
    F.linear,
    _LINEAR.expand,
)
_CONV2D = _Kind(
    "_CONV2D",
    False,
    lambda W: W.flatten(1),
    lambda D, layer: D.reshape(layer.weight.shape),
    # The layer's own forward knows stride, padding, padding mode and dilation; every group sees the same Vh.
    lambda x, Vh, layer: layer._conv_forward(
        x, Vh.view(-1, *layer.weight.shape[1:]).repeat(layer.groups, 1, 1, 1).to(x.dtype), None
    ),
    lambda z, C: F.conv2d(z, C.repeat(z.shape[-3] // len(C), 1)[:, :, None, None], groups=z.shape[-3] // len(C)),
    lambda t, U, layer: F.conv2d(t, U[:, :, None, None], groups=layer.groups),
)


def _kind_of(layer: nn.Module, name: str) -> _Kind:
    """The kind of a layer, by class; transformers need not be installed.

    Raises:
        InputError: the layer is of no known kind.
    """
    inner = innermost(layer)
    if isinstance(inner, nn.Conv2d):
        return _CONV2D
    if any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(inner).__mro__):
        return _CONV1D
    if isinstance(inner, nn.Linear) or (hasattr(inner, "in_features") and hasattr(inner, "out_features")):
        return _LINEAR
    raise InputError(
        f"{name}: got a {type(inner).__name__}; a spectral adapter wraps nn.Linear, transformers' Conv1D and "
        f"nn.Conv2d: leave "
        "this module out of target_modules"
    )
