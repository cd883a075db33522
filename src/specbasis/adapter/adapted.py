"""A frozen layer and the adapters that it holds: how each gets its basis, and how a loaded one is proven."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from specbasis.adapter import functional
from specbasis.adapter.bases import basis_of, check_interval
from specbasis.adapter.layouts import innermost, layout_of
from specbasis.adapter.state import PARTS, Adapter, Cores, Frozen
from specbasis.checkpoint.adapter_file import (
    AGAIN,
    BASIS,
    FROM_DATA,
    POSITIONS,
    PROOF,
    sealed_parts,
    values_digest,
)
from specbasis.checkpoint.pattern import check_positions, positions_of
from specbasis.checkpoint.proof import Proof, empty_proof, prove, settled_basis
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD


class AdaptedLayer(nn.Module):
    """A frozen layer with any number of spectral adapters, each with the basis that its coefficients belong to.

    What the layer knows of an adapter is one `Adapter` in ``adapters``; its tensors stand under its name in
    ``spectral_M`` and in one `Frozen` for each of `PARTS`, because that is how a file of PEFT names them.

    Args:
        base_layer: the layer to adapt; its parameters are frozen.
        adapter_name: name of the first adapter; None for none yet.
        interval: ranks [k, m) of the singular vectors, 0 ≤ k < m ≤ min(out, in).
        module_name: what messages call the layer.
        options: further arguments of ``add``.

    Raises:
        InputError: the layer is of another class, or the interval does not fit it.
    """

    base_layer: nn.Module
    spectral_U: Frozen
    spectral_Vh: Frozen
    spectral_S: Frozen
    spectral_sketch_U: Frozen
    spectral_sketch_V: Frozen
    spectral_origin: Frozen
    spectral_positions: Frozen
    adapter_layer_names: tuple[str, ...] = ("spectral_M",)
    other_param_names: tuple[str, ...] = (*(f"spectral_{part}" for part in PARTS), "adapters")

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
        self.layout = layout_of(base_layer, module_name)
        self.adapters: dict[str, Adapter] = {}
        self.spectral_M = Cores(partial(self._arrived, "M"))
        for part in PARTS:
            setattr(self, f"spectral_{part}", Frozen(self._expected, partial(self._arrived, part)))
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] | str = [] if adapter_name is None else [adapter_name]
        self._disable_adapters = False
        self._original: nn.Parameter | None = None
        self._rated_weight: tuple[Any, int] | None = None  # the weight that ``Adapter.rated`` is about, its version
        base_layer.requires_grad_(False)
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
            return self.layout.matrix(self._original.detach().to(self.stored_weight().device))
        return self.layout.matrix(self.stored_weight())

    def stored_weight(self) -> Tensor:
        """The frozen weight in the base layer's own layout."""
        weight = innermost(self).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    # Adapters and their bases.

    def add(
        self,
        adapter_name: str,
        interval: tuple[int, int],
        *,
        later: bool = False,
        from_file: bool = False,
        shard: bool = False,
        **options: Any,
    ) -> None:
        """Add an adapter with its core at zero.

        Costs one decomposition of the weight, unless another adapter of this layer has the same basis and interval.
        A basis from data is left empty; `settle_in` brings it.

        Args:
            adapter_name: a new name.
            interval: ranks [k, m), 0-based, m excluded.
            later: leave the basis empty; `find_bases`, or else the first use, computes it.
            from_file: leave the basis empty; loading a state dict fills it and proves it before the first use.
            shard: hold U and Vh as parameters without gradient, which FSDP shards, instead of buffers.
            options: fields of `Adapter`: pattern, scale, basis, basis_file, keep_basis, init, dropout.

        Raises:
            InputError: the interval does not fit the weight, or an option has no such value.
        """
        if "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
            raise InputError(
                f"got adapter name {adapter_name!r}, which torch's modules cannot hold; choose another"
            )
        out, in_ = self.layout.shape(self)
        k, m = check_interval(interval, (out, in_), self.module_name)
        adapter = Adapter((k, m), **options)
        if adapter.scale not in ("none", "sigma"):
            raise InputError(f"{self.module_name}: got scale = {adapter.scale!r}; want 'none' or 'sigma'")
        if adapter.init not in ("zero", "normal"):
            raise InputError(f"{self.module_name}: got init = {adapter.init!r}; want 'zero' or 'normal'")
        weight, positions = self.stored_weight(), positions_of(adapter.pattern, (k, m), self.module_name)
        self.adapters[adapter_name] = adapter
        self.open(adapter_name, positions)
        U, Vh = (torch.zeros(shape, device=weight.device) for shape in ((out, m - k), (m - k, in_)))
        self._store(adapter_name, U, Vh, empty_proof(m - k), shard)
        if from_file or self.spectral_M[adapter_name].is_meta:
            adapter.expect()
            adapter.awaited.add("M")
        elif not (later or weight.is_meta or adapter.basis in FROM_DATA):
            self.settle(adapter_name)

    def open(self, name: str, positions: Int[Tensor, "2 e"] | None = None) -> None:
        """Give an adapter new coefficients, at zero: one for each position, or all of its interval's square."""
        k, m = self.adapters[name].interval
        device = self.stored_weight().device
        is_trained = name not in self.spectral_M or self.spectral_M[name].requires_grad
        shape = (m - k, m - k) if positions is None else positions.shape[1:]
        M = torch.zeros(shape, dtype=torch.float32, device=device)
        self.spectral_M[name] = nn.Parameter(M, is_trained)
        if positions is not None:
            self.spectral_positions.put(name, positions.to(device))
        elif name in self.spectral_positions:
            del self.spectral_positions[name]

    def remove(self, adapter_name: str) -> None:
        """Take an adapter off; unlike with PEFT's `delete_adapter`, no other becomes active in its place."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]

    def cast_core(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Hold an adapter's coefficients in another floating-point dtype; they are computed with in float32."""
        M = self.spectral_M[adapter_name]
        if dtype.is_floating_point and M.dtype != dtype:
            self.spectral_M._parameters[adapter_name] = nn.Parameter(M.detach().to(dtype), M.requires_grad)

    def settle(self, adapter_name: str) -> None:
        """Make sure that an adapter's coefficients meet the basis that they belong to.

        Everything that uses a basis comes through here, and so does loading, with the last tensor of an adapter.
        A new adapter gets its basis. Loaded coefficients are proven; see ``specbasis.checkpoint.proof``: a stored
        basis is checked against its sketch and the base weight; without one the weight is decomposed, signs are set
        by the sketch, and every vector is compared.

        Raises:
            InputError: the basis is not the trained one, with the reason.
        """
        if self.adapters[adapter_name].settled:
            return
        proof, seal = self.proof(adapter_name), self.adapters[adapter_name].seal
        if bool(proof.origin.any()) or bool(self.spectral_M[adapter_name].any()):
            self._prove(adapter_name, proof)
        elif seal is not None and seal.arrived:
            raise InputError(f"{self.module_name} (adapter {adapter_name!r}): is not in the adapter file; {AGAIN}")
        else:
            self._compute(adapter_name)
            self._start(adapter_name)

    def settle_in(self, adapter_name: str, basis: SVD) -> None:
        """Give an adapter whose core is zero a basis that was made from data."""
        proof = prove(basis, self.adapters[adapter_name].interval, self.weight_matrix())
        self._settled(adapter_name, basis.U, basis.Vh, proof, exact=True)
        self._start(adapter_name)

    def settle_as(self, adapter_name: str, other: str) -> None:
        """Give a new adapter the very basis of another one."""
        self.settle(other)
        U, Vh, exact = self.spectral_U[other], self.spectral_Vh[other], self.adapters[other].exact
        self._settled(adapter_name, U, Vh, self.proof(other), exact=exact)

    def _compute(self, name: str) -> None:
        """Give a new adapter its basis, that of another adapter of this layer or a computed one."""
        twin = None if self.adapters[name].basis in FROM_DATA else self._twin(name)
        if twin is not None and self.adapters[twin].exact:
            self.settle_as(name, twin)
            return
        W, basis = self.weight_matrix(), self._basis(name)
        proof = prove(basis, self.adapters[name].interval, W)
        self._settled(name, basis.U, basis.Vh, proof, exact=True)

    def _start(self, name: str) -> None:
        """Random coefficients, where the adapter wants them."""
        adapter, M = self.adapters[name], self.spectral_M[name]
        if adapter.init == "normal":  # 1 % of the mean singular value in spectral norm
            unit = 1.0 if adapter.scale == "sigma" else float(self.spectral_S[name].mean())
            nn.init.normal_(M, std=0.005 * unit / math.sqrt(len(self.spectral_S[name])))

    def _prove(self, name: str, proof: Proof) -> None:
        """Prove loaded coefficients, or refuse them."""
        adapter, label = self.adapters[name], f"{self.module_name} (adapter {name!r})"
        if bool(proof.origin.any()) and proof.interval != adapter.interval:
            raise InputError(
                f"{label}: the file's coefficients are for ranks [{proof.interval[0]}, {proof.interval[1]}), the "
                f"configuration says [{adapter.interval[0]}, {adapter.interval[1]}); the folder mixes two "
                "adapters: save it again"
            )
        parts = {part: getattr(self, f"spectral_{part}") for part in sealed_parts(adapter.basis)}
        parts = {part: tensors[name] for part, tensors in parts.items() if name in tensors}
        rounded = parts["M"].dtype != torch.float32  # on request, after the file was proven
        if (
            adapter.seal is not None
            and not rounded
            and not adapter.seal.holds(self.module_name, values_digest(parts))
        ):
            raise InputError(f"{label}: holds other coefficients than were saved; {AGAIN}")
        if not bool(torch.isfinite(self.spectral_M[name]).all()):
            raise InputError(
                f"{label}: the coefficients are not finite; the training diverged, or the file is damaged: load an "
                "earlier one"
            )
        if POSITIONS in parts:
            check_positions(parts[POSITIONS], parts["M"], adapter.interval, label)
        twin = self._twin(name)
        factors = None if twin is None else (self.spectral_U[twin], self.spectral_Vh[twin])
        if not adapter.keep_basis and twin is not None and factors is not None and self._same_proof(name, twin):
            self._settled(name, *factors, proof, exact=self.adapters[twin].exact)
            return
        stored = (self.spectral_U[name], self.spectral_Vh[name]) if adapter.keep_basis else None
        pretrained = adapter.basis == "pretrained"
        U, Vh, exact = settled_basis(
            proof, self.weight_matrix(), stored, lambda: self._basis(name), label, singular=pretrained
        )
        if factors is not None and torch.equal(factors[0], U) and torch.equal(factors[1], Vh):
            U, Vh = factors
        self._settled(name, U, Vh, proof, exact=exact)

    def _basis(self, name: str) -> SVD:
        adapter = self.adapters[name]
        return basis_of(
            self.weight_matrix(),
            adapter.interval,
            adapter.basis,
            self.module_name,
            file=adapter.basis_file,
            layout=self.layout,
        )

    def _settled(self, name: str, U: Tensor, Vh: Tensor, proof: Proof, *, exact: bool) -> None:
        """Keep a basis that is now known to be the right one."""
        self._store(name, U, Vh, proof, shard=name in self.spectral_U._parameters)
        adapter = self.adapters[name]
        adapter.settled, adapter.exact, adapter.seal = True, exact, None
        self._rate(name)

    def _twin(self, name: str) -> str | None:
        """Another adapter with the same basis and interval, whose factors can be shared; an exact one if any."""
        wanted = self.adapters[name]
        twins = [
            other
            for other, adapter in self.adapters.items()
            if other != name and adapter.settled and not self.spectral_U[other].is_meta
            if (adapter.interval, adapter.basis) == (wanted.interval, wanted.basis)
        ]
        return next((twin for twin in twins if self.adapters[twin].exact), twins[-1] if twins else None)

    def _store(self, name: str, U: Tensor, Vh: Tensor, proof: Proof, shard: bool) -> None:
        """Keep a basis and its proof; factors that another adapter already holds are shared, not copied."""
        device, keep = self.stored_weight().device, self.adapters[name].keep_basis
        for frozen, factor in ((self.spectral_U, U), (self.spectral_Vh, Vh)):
            factor = factor.detach().to(device, torch.float32).contiguous()
            frozen.put(name, factor, persistent=keep, parameter=shard)
        for part in PROOF:
            self._frozen(part).put(name, getattr(proof, part).to(device))

    def _frozen(self, part: str) -> Frozen:
        frozen: Frozen = getattr(self, f"spectral_{part}")
        return frozen

    def proof(self, adapter_name: str) -> Proof:
        """What tells the adapter's basis from others, as it stands in the file."""
        return Proof(**{part: self._frozen(part)[adapter_name] for part in PROOF})

    def stored_basis(self, adapter_name: str) -> dict[str, Tensor]:
        """U, S, Vh and origin of an adapter's settled basis, as a basis file holds them."""
        self.settle(adapter_name)
        return {part: self._frozen(part)[adapter_name] for part in (*BASIS, "S", "origin")}

    def _same_proof(self, name: str, other: str) -> bool:
        """Whether two adapters were trained in the same basis, sign for sign and bit for bit."""
        return all(torch.equal(self._frozen(part)[name], self._frozen(part)[other]) for part in PROOF)

    def _expected(self, name: str) -> None:
        """A state dict is about to replace a tensor of an adapter."""
        if self.adapters[name].settled:
            self.adapters[name].expect()

    def _arrived(self, part: str, name: str) -> None:
        """A tensor of an adapter was put in place from outside: with the last that its file holds, settle them."""
        adapter = self.adapters[name]
        if adapter.seal is not None:
            adapter.seal.arrived = True
        if part in adapter.awaited:
            adapter.awaited.discard(part)
            if not adapter.awaited and not self.stored_weight().is_meta:
                self.settle(name)

    def _rate(self, name: str) -> None:
        """Note whether a route may divide by the singular values of this weight: see ``functional.CONDITION``."""
        adapter, weight, S = self.adapters[name], self.base_layer.weight, self.spectral_S[name]
        adapter.rated = False
        # An adapter of another kind inside the base layer would be multiplied with too.
        plain = self.layout.linear and type(weight) is nn.Parameter and self.base_layer is innermost(self)
        if not (plain and adapter.exact and adapter.basis == "pretrained"):
            return
        assert isinstance(weight, Tensor)
        top = float(S[0]) if adapter.interval[0] == 0 else float(weight.detach().float().norm())
        bias = getattr(self.base_layer, "bias", None)
        top += 0.0 if bias is None else float(bias.detach().float().norm())
        if not self._is_rated_weight():
            for other in self.adapters.values():
                other.rated = False
            self._rated_weight = weight, weight._version
        adapter.rated = float(S[-1]) * functional.CONDITION >= top

    def _is_rated_weight(self) -> bool:
        """Whether the weight is still the very one that the adapters were rated by."""
        weight, version = self._rated_weight or (None, -1)
        return weight is self.base_layer.weight and bool(version == weight._version)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files, in which the weight is another object: whether the adapters' rating still holds."""
        return {**self.__dict__, "_rated_weight": self._is_rated_weight()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        weight: Any = self.base_layer.weight
        self._rated_weight = (weight, weight._version) if state["_rated_weight"] else None
