"""The adapted layer at work: its output by the cheapest of equal routes, and merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from specbasis.adapter import functional
from specbasis.adapter.adapted import AdaptedLayer
from specbasis.adapter.layouts import innermost
from specbasis.checkpoint.pattern import SQUARE, check_positions, square_of
from specbasis.checkpoint.proof import Proof
from specbasis.core.errors import InputError


class SpectralLinear(AdaptedLayer):
    """A frozen layer W and adapters W' = W + U[:, k:m] C Vh[k:m, :], of which only the core is trained.

    Of a core, all of the square is trained or the coefficients at some positions; the rest of it is zero.

    Wraps nn.Linear, transformers' Conv1D (whose weight is transposed) and nn.Conv2d (as out × in·kh·kw). The
    layer's own forward is called wherever the route allows, so hooks, quantised weights and subclasses keep
    working. With the core at zero the output is the base layer's, bit for bit.

    Several adapters may be active at once: their updates add. ``forward(x, adapter_names=[…])`` gives every row of
        a batch its own adapter; adapters that share a basis share the product x Vhᵀ.

    Arguments and errors are those of `AdaptedLayer`.

    Source: Yu et al. 2026, Eq. 3, 4, App. M.
    """

    # Merging.

    def core(self, adapter_name: str) -> Float[Tensor, "r r"]:
        """The adapter's core in units of the weight: M, or diag(S) M."""
        scale = self.adapters[adapter_name].scale
        S = self.spectral_S[adapter_name]
        return functional.core(self.coefficients(adapter_name).to(S.dtype), S, scale)

    def coefficients(self, adapter_name: str) -> Float[Tensor, "r r"]:
        """M as the square of its ranks, with zeros where the adapter's pattern has nothing to train."""
        M: Tensor = self.spectral_M[adapter_name]
        if adapter_name in self.spectral_positions:
            M = square_of(M, self.spectral_positions[adapter_name], self.adapters[adapter_name].interval)
        return M

    def place(self, adapter_name: str, positions: Int[Tensor, "2 e"]) -> None:
        """Train the coefficients at these positions alone, and keep the vectors between their ranks alone.

        Positions that fill a square are one. (The vectors of a random basis depend on the interval, which stays.)

        Args:
            adapter_name: an adapter whose coefficients are zero.
            positions: ranks of left and right vectors in the adapter's interval, by row, each pair once.

        Raises:
            InputError: the positions are none, or the adapter has been trained.
        """
        self.settle(adapter_name)
        adapter, label = self.adapters[adapter_name], self.module_name
        if bool(self.spectral_M[adapter_name].any()):
            raise InputError(
                f"{label} (adapter {adapter_name!r}): its coefficients are not zero, and at other positions they "
                "would be another update; choose the positions before training"
            )
        check_positions(positions, torch.empty(positions.shape[1:]), adapter.interval, label)
        k, m = adapter.interval
        first, stop = int(positions.min()), int(positions.max()) + 1
        if adapter.basis.startswith("random"):
            first, stop = k, m
        ranks, proof = slice(first - k, stop - k), self.proof(adapter_name)
        origin = proof.origin.clone()
        origin[0], origin[1] = first, stop
        proof = Proof(origin, *(part[ranks] for part in (proof.S, proof.sketch_U, proof.sketch_V)))
        count, is_square = positions.shape[1], positions.shape[1] == (stop - first) ** 2
        adapter.interval, adapter.pattern = (first, stop), SQUARE if is_square else f"scattered:{count}"
        self.open(adapter_name, None if is_square else positions.to(torch.int32))
        U, Vh = self.spectral_U[adapter_name][:, ranks], self.spectral_Vh[adapter_name][ranks]
        self._settled(adapter_name, U, Vh, proof, exact=adapter.exact)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update in the base layer's layout and dtype: U C Vh, formed in float64.

        Raises:
            InputError: the adapter was loaded and its basis is not the trained one.
        """
        return self._as_stored(self._delta(adapter_name))

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """The frozen weight plus the updates of these adapters, summed in float64, in the weight's layout and
        dtype.

        Raises:
            InputError: as `get_delta_weight`.
        """
        W = self.weight_matrix().double()
        for name in adapter_names:
            W = W + self._delta(name)
        return self._as_stored(W)

    def _delta(self, name: str) -> Float[Tensor, "out in"]:
        self.settle(name)
        U, Vh = self.spectral_U[name].double(), self.spectral_Vh[name].double()
        return functional.delta(U, self.core(name).detach().double(), Vh)

    def _as_stored(self, matrix: Float[Tensor, "out in"]) -> Tensor:
        dtype = self.stored_weight().dtype
        return self.layout.stored(matrix, innermost(self)).to(dtype if dtype.is_floating_point else torch.float32)

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
        names = [name for name in names if name in self.adapters and name not in self.merged_adapters]
        if not names:
            return
        weight = self.merged_weight([*self.merged_adapters, *names])
        if safe_merge and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"NaNs detected in the merged weights of {self.module_name}. The adapter {', '.join(names)} seems "
                "to be broken"
            )
        original = innermost(self).weight
        if self._original is None:
            assert isinstance(original, nn.Parameter)
            vars(self)["_original"] = original  # registered, it would be one of the adapter's own parameters
        self._put_weight(weight)
        self.merged_adapters.extend(names)

    def _put_weight(self, weight: Tensor) -> None:
        innermost(self).weight = nn.Parameter(weight, requires_grad=False)

    def unmerge(self) -> None:
        """Put the frozen weight back, bit for bit, and tied to what it was tied to."""
        if self._original is None:
            return
        current, original = innermost(self).weight, self._original
        assert isinstance(current, Tensor)
        floating = original.is_floating_point() and current.is_floating_point()
        if current.device != original.device or (floating and current.dtype != original.dtype):
            original.data = original.data.to(current.device, current.dtype)  # the model was moved meanwhile
        innermost(self).weight = original
        self._original = None
        self.merged_adapters.clear()

    # The output.

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The adapted layer's output for input x; every row with its own adapter when ``adapter_names`` is given.

        Raises:
            ValueError: ``adapter_names`` is not one name for every row, or adapters are merged.
            InputError: an adapter was loaded and its basis is not the trained one.
        """
        if adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return self._base(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.adapters]
        for name in names:
            self.settle(name)
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
        """Which of the equal ways to compute the adapted output costs least. Any but the first needs float32 or
        float64.
        """
        base, adapter, U = self.base_layer, self.adapters[name], self.spectral_U[name]
        bias = getattr(base, "bias", None)
        exact = (
            self.layout.linear
            and type(base.weight) is nn.Parameter
            and x.dtype == base.weight.dtype == U.dtype
            and not base.weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
            and not (self.training and adapter.dropout)
        )
        if not exact:
            return "factored"
        out, in_ = U.shape[0], self.spectral_Vh[name].shape[1]
        candidates: list[functional.Route] = ["factored"]
        hooks = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
        if type(base) is nn.Linear and not hooks:
            candidates.append("folded")
        # Only for the very weight that was decomposed: another one has other singular vectors. Compiled code
        # cannot tell.
        if not torch.compiler.is_compiling() and adapter.rated and self._is_rated_weight():
            candidates.append("inner" if in_ <= out else "outer")
        M = self.spectral_M[name]
        return functional.choose(
            x.numel() // in_,
            out,
            in_,
            U.shape[1],
            backward=torch.is_grad_enabled() and (M.requires_grad or x.requires_grad),
            input_gradient=x.requires_grad,
            candidates=tuple(candidates),
        )

    def _update(self, x: Tensor, name: str) -> Tensor:
        """The update's output alone, in factors."""
        z = self._project(F.dropout(x, self.adapters[name].dropout, self.training), name)
        return self.layout.expand(self.layout.mix(z, self.core(name)), self.spectral_U[name], innermost(self))

    def _project(self, x: Tensor, name: str) -> Tensor:
        Vh = self.spectral_Vh[name]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(Vh.dtype)
        return self.layout.project(x, Vh, innermost(self))

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
        names = sorted({name for name in adapter_names if name in self.adapters})
        for name in names:
            self.settle(name)
        for group in self._by_basis(names):
            rows = {name: [i for i, row in enumerate(adapter_names) if row == name] for name in group}
            z = self._project(x, group[0])
            mixed = torch.zeros_like(z)
            for name, index in rows.items():
                mixed[index] = self.layout.mix(z[index], self.core(name)).to(mixed.dtype)
            y = y + self.layout.expand(mixed, self.spectral_U[group[0]], innermost(self)).to(y.dtype)
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
        groups = self._by_basis([name for name in self.adapters if not self.spectral_U[name].is_meta])
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for first, *others in groups:
            for name in others:
                for frozen in (self.spectral_U, self.spectral_Vh):
                    if name in frozen._buffers and first in frozen._buffers:
                        frozen._buffers[name] = frozen._buffers[first]
        return self

    def extra_repr(self) -> str:
        """Adapters and their ranks, for printing a model."""
        return ", ".join(f"{name}: ranks [{a.interval[0]}, {a.interval[1]})" for name, a in self.adapters.items())
