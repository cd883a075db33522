"""Methods that PEFT lacks, as small modules fastened to a layer of the model.

Each is a child module of the layer it adapts, and a forward hook brings it in. The layer itself, its class and the
names of its parameters stay as they are. The hooks are functions of this module, so a model with them can be copied
and pickled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import ACT2FN

from specbasis.adapter.layer import Frozen
from specbasis.adapter.proof import Proof, align, empty_proof, prove
from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, decompose
from specbasis.finetuning.methods.placement import is_conv1d

CHILD = "finetuned"
"""Under which name a method's module hangs at the layer it adapts."""


class Added(nn.Module):
    """What a method adds to one layer: a function of the layer's input or output."""


class Bottleneck(Added):
    """The residual update of a bottleneck adapter: B act(A h + a) + b, with A (r, d), B (d, r).

    B and b are zero at the start, so that the model starts as its base. (Houlsby et al. draw both near zero.)

    Source: Houlsby et al. 2019, Fig. 2; Pfeiffer et al. 2021, §3.2.
    """

    def __init__(self, d: int, r: int, activation: str, like: Tensor) -> None:
        super().__init__()
        if activation not in ACT2FN:
            raise InputError(
                f"got activation = {activation!r}; want a name that transformers knows, such as 'relu'"
            )
        self.down, self.up = nn.Linear(d, r, device=like.device), nn.Linear(r, d, device=like.device)
        self.activation = ACT2FN[activation]
        if not like.is_meta:
            nn.init.normal_(self.down.weight, std=0.02)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        """The update for hidden states h (…, d), in their dtype."""
        inside = h if torch.is_autocast_enabled(h.device.type) else h.to(self.down.weight.dtype)
        update: Tensor = self.up(self.activation(self.down(inside)))
        return update.to(h.dtype)


class Update(Added):
    """A linear update of a frozen weight: W' = W + D, applied as y + D x without forming D.

    The frozen singular vectors are not saved: they are computed from the base weight again, and a sketch in the
    saved tensors proves that they are the trained ones (`specbasis.adapter.proof`).
    """

    def __init__(self, layer: nn.Module, ranks: int, name: str) -> None:
        super().__init__()
        self.name = name
        W = weight_matrix(layer, name)
        self.frozen, self.proof = Frozen(_replaced), Frozen(_replaced)
        if W.is_meta:
            basis, proof = _empty(W, ranks), empty_proof(ranks)
        else:
            basis = decompose(W, ranks=ranks, name=name)
            proof = prove(basis, (0, ranks), W)
        self._keep(basis)
        for key, tensor in (("origin", proof.origin), ("S", proof.S), ("U", proof.sketch_U), ("V", proof.sketch_V)):
            self.proof.put(key, tensor.to(W.device))

    def _keep(self, basis: SVD) -> None:
        for key, tensor in (("U", basis.U), ("S", basis.S), ("Vh", basis.Vh)):
            self.frozen.put(key, tensor.float().contiguous(), persistent=False)

    def settle(self, layer: nn.Module) -> None:
        """After loading: give the singular vectors the signs that the coefficients were trained with.

        Raises:
            InputError: the base has other singular vectors.
        """
        W = weight_matrix(layer, self.name)
        proof = Proof(*(self.proof[key] for key in ("origin", "S", "U", "V")))
        U, S, Vh = (self.frozen[key] for key in ("U", "S", "Vh"))
        unknown = torch.full_like(S, torch.nan)
        self._keep(align(proof, SVD(U, S, Vh, S, unknown, unknown, unknown), W, self.name))

    def project(self, x: Tensor, factor: Tensor) -> Tensor:
        """The product x Fᵀ, in float32 unless autocast says otherwise."""
        return F.linear(x if torch.is_autocast_enabled(x.device.type) else x.to(factor.dtype), factor)

    def delta(self) -> Float[Tensor, "out in"]:
        """The update D as a matrix, in float64."""
        raise NotImplementedError


def _replaced(name: str) -> None:
    """Nothing follows from a frozen tensor being replaced: `load` proves what it read."""


def _empty(W: Tensor, ranks: int) -> SVD:
    S = W.new_empty(ranks)
    return SVD(W.new_empty(W.shape[0], ranks), S, W.new_empty(ranks, W.shape[1]), S, S, S, S)


class SVFT(Update):
    """Trained entries of a fixed sparse pattern in the whole singular basis: W' = W + U M Vh, M zero at the start.

    Applied as U (M (Vh x)) with a sparse M: no dense matrix is built. Costs 2 n (out + in) flops a token for
    the two factors, n = min(out, in), and 2 for each trained entry.

    Deviations from the authors' code: M starts at zero and has no sigmoid gate; "random" draws positions without
    repetition; "top-k" ranks by magnitude, which does not depend on the signs of the vectors.

    Source: Lingam et al. 2024, arXiv 2405.19597, §4.
    """

    def __init__(self, layer: nn.Module, pattern: str, width: int, name: str) -> None:
        if pattern not in PATTERNS:
            raise InputError(f"got pattern = {pattern!r}; want one of {', '.join(PATTERNS)}")
        n = min(matrix_size(layer))
        if not 0 <= width < n:
            raise InputError(f"{name}: got rank = {width} for SVFT with {n} singular values; want 0 … {n - 1}")
        super().__init__(layer, n, name)
        device = self.frozen["S"].device
        at = PATTERNS[pattern](self, width).to(device) if device.type != "meta" else entries(n, width)
        rows, columns = at if isinstance(at, Tensor) else torch.zeros(2, at, dtype=torch.int64, device=device)
        self.register_buffer("rows", rows.contiguous())
        self.register_buffer("columns", columns.contiguous())
        self.rows: Tensor
        self.columns: Tensor
        self.M = nn.Parameter(torch.zeros(len(rows), device=device))
        self._index()

    def _index(self) -> None:
        """Compress the positions anew: they are fixed while training, and read from the file when loading."""
        index = compressed(self.rows, self.columns, len(self.frozen["S"])) if not self.rows.is_meta else ()
        for key, tensor in zip(("crow", "order", "ccol", "rows_by_column"), index, strict=False):
            self.register_buffer(key, tensor, persistent=False)

    def settle(self, layer: nn.Module) -> None:
        """After loading: the signs of the singular vectors, and the file's positions."""
        super().settle(layer)
        self._index()

    def forward(self, x: Tensor) -> Tensor:
        """D x for x (…, in)."""
        z = self.project(x, self.frozen["Vh"])
        index = (self.crow, self.columns, self.order, self.ccol, self.rows_by_column)
        return self.project(sparse_mix(z, self.M, *index), self.frozen["U"])  # type: ignore[arg-type]

    def delta(self) -> Float[Tensor, "out in"]:
        """U M Vh in float64."""
        mixed = torch.zeros_like(self.frozen["Vh"], dtype=torch.float64)
        Vh = self.frozen["Vh"].double()
        mixed.index_add_(0, self.rows, Vh[self.columns] * self.M.detach().double()[:, None])
        return self.frozen["U"].double() @ mixed


def entries(n: int, width: int) -> int:
    """Trained entries of SVFT: the diagonal and ``width`` diagonals on each side, n(2w + 1) − w(w + 1)."""
    return n * (2 * width + 1) - width * (width + 1)


def _banded(update: SVFT, width: int) -> Int[Tensor, "2 e"]:
    n = len(update.frozen["S"])
    rows = torch.arange(n)[:, None].expand(n, 2 * width + 1)
    columns = rows + torch.arange(-width, width + 1)
    inside = (columns >= 0) & (columns < n)
    return torch.stack([rows[inside], columns[inside]])


def _random(update: SVFT, width: int) -> Int[Tensor, "2 e"]:
    n = len(update.frozen["S"])
    return _positions(torch.randperm(n * n)[: entries(n, width)], n)


def _top_k(update: SVFT, width: int) -> Int[Tensor, "2 e"]:
    """Where |⟨u_i, v_j⟩| is largest. Vectors of unequal length have no such product: then, as in the authors' code,
    where the square one of the two factors has its largest entries.
    """
    U, Vh = update.frozen["U"].cpu(), update.frozen["Vh"].cpu()
    n = len(Vh)
    product = (Vh @ U).mT if len(U) == Vh.shape[1] else U if len(U) == n else Vh
    return _positions(product.abs().flatten().topk(entries(n, width)).indices, n)


def _positions(flat: Tensor, n: int) -> Int[Tensor, "2 e"]:
    flat = flat.sort().values
    return torch.stack([flat // n, flat % n])


PATTERNS: Mapping[str, Callable[[SVFT, int], Tensor]] = MappingProxyType(
    {"plain": lambda update, _: _banded(update, 0), "banded": _banded, "random": _random, "top-k": _top_k}
)


def compressed(rows: Int[Tensor, " e"], columns: Int[Tensor, " e"], n: int) -> tuple[Tensor, ...]:
    """Index of a sparse n × n matrix with sorted, distinct positions: row starts, and the same of its transpose.

    Returns:
        (row starts, order of the entries by column, column starts, rows in that order).
    """
    order = torch.argsort(columns * n + rows)
    starts = [F.pad(torch.bincount(index, minlength=n).cumsum(0), (1, 0)) for index in (rows, columns)]
    return starts[0], order, starts[1], rows[order]


class _SparseMix(torch.autograd.Function):
    """M z with a sparse M in compressed rows; the gradient of its entries is sampled, never formed whole."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, m: Tensor, *index: Tensor) -> Tensor:
        ctx.save_for_backward(z, m, *index)
        crow, columns, *_ = index
        return _times(_csr(crow, columns, m), z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, m, crow, columns, order, ccol, rows = ctx.saved_tensors
        (g,) = grads
        for_z = _times(_csr(ccol, rows, m[order]), g) if ctx.needs_input_grad[0] else None
        for_m = None
        if ctx.needs_input_grad[1]:
            n = z.shape[-1]
            sampled = torch.sparse.sampled_addmm(  # (gᵀ z) at the entries of M
                _csr(crow, columns, m), g.reshape(-1, n).mT.contiguous(), z.reshape(-1, n).contiguous(), beta=0.0
            )
            for_m = sampled.values()
        return for_z, for_m, *(None for _ in range(5))


def _csr(starts: Tensor, indices: Tensor, m: Tensor) -> Tensor:
    n = len(starts) - 1
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(starts, indices, m.detach(), (n, n), check_invariants=False)


def _times(M: Tensor, z: Tensor) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):  # there is no sparse product in half precision
        return (M @ z.reshape(-1, z.shape[-1]).mT).mT.reshape(z.shape)


def sparse_mix(
    z: Float[Tensor, "*tokens n"],
    m: Float[Tensor, " e"],
    crow: Int[Tensor, " n1"],
    columns: Int[Tensor, " e"],
    order: Int[Tensor, " e"],
    ccol: Int[Tensor, " n1"],
    rows_by_column: Int[Tensor, " e"],
) -> Float[Tensor, "*tokens n"]:
    """M z for the sparse n × n matrix M with values m, in m's dtype; its positions as `compressed` gives them."""
    mixed: Tensor = _SparseMix.apply(z.to(m.dtype), m, crow, columns, order, ccol, rows_by_column)  # type: ignore[no-untyped-call]
    return mixed


class SpecLoRA(Update):
    """LoRA and a trained rescaling of the leading singular values: W' = U diag((1 + d) ⊙ S) Vh + s B A.

    d is trained on the first k entries, and zero elsewhere and at the start; B (out, r) is zero at the start,
    A (r, in) Kaiming-uniform. Applied as W x + U_k ((d ⊙ S_k) ⊙ Vh_k x) + s B (A x), s = α/r.

    The formula is this project's reading of what is published about the method: LoRA together with a learnable
    rescaling of the top singular directions, by a mask and a Hadamard product.

    Source: Si et al. 2025, arXiv 2505.23099.
    """

    def __init__(self, layer: nn.Module, r: int, top: int, scaling: float, name: str) -> None:
        out, in_ = matrix_size(layer)
        if top < 1:
            raise InputError(f"{name}: got top = {top}; want the number of rescaled singular values, at least 1")
        super().__init__(layer, min(top, out, in_), name)
        device = self.frozen["S"].device
        self.scaling = scaling
        self.d = nn.Parameter(torch.zeros(len(self.frozen["S"]), device=device))
        self.A = nn.Parameter(torch.empty(r, in_, device=device))
        self.B = nn.Parameter(torch.zeros(out, r, device=device))
        if device.type != "meta":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """D x for x (…, in)."""
        rescaled = self.project(x, self.frozen["Vh"]) * (self.d * self.frozen["S"])
        low_rank = self.project(self.project(x, self.A), self.B)
        return self.project(rescaled, self.frozen["U"]) + self.scaling * low_rank

    def delta(self) -> Float[Tensor, "out in"]:
        """U diag(d ⊙ S) Vh + s B A in float64."""
        U, S, Vh = (self.frozen[key].double() for key in ("U", "S", "Vh"))
        d, A, B = (p.detach().double() for p in (self.d, self.A, self.B))
        return (U * (d * S)) @ Vh + self.scaling * (B @ A)


# How each is fastened.


def fasten(layer: nn.Module, child: Added, hook: Callable[..., Any]) -> None:
    """Hang a module at a layer, and let a hook bring it into the layer's output.

    Raises:
        InputError: the layer has one already.
    """
    if hasattr(layer, CHILD):
        raise InputError(f"two adapters would stand at one {type(layer).__name__}; leave one of the modules out")
    layer.add_module(CHILD, child)
    layer.register_forward_hook(hook)


def add_update(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Hook of a linear layer: y + D x."""
    update: Tensor = layer.get_submodule(CHILD)(args[0])
    return output + update.to(output.dtype)


def add_behind(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Hook of a layer or block with output h (or a tuple that begins with it): h + adapter(h)."""
    h = output[0] if isinstance(output, tuple) else output
    h = h + layer.get_submodule(CHILD)(h)
    return (h, *output[1:]) if isinstance(output, tuple) else h


def add_around_norm(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Hook of a norm with input s: norm(s + adapter(norm(s)))."""
    again: Tensor = type(layer).forward(layer, args[0] + layer.get_submodule(CHILD)(output))
    return again


HOOKS = (add_update, add_behind, add_around_norm)


def fastened(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a method of this module adapts, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(getattr(m, CHILD, None), Added)}


def merge_updates(model: nn.Module) -> None:
    """Put W + D in place of each adapted weight, summed in float64 and rounded once, and take the updates off.

    Raises:
        InputError: the method is not a linear update of the weights.
    """
    layers = fastened(model)
    if not all(isinstance(getattr(layer, CHILD), Update) for layer in layers.values()):
        raise InputError("a bottleneck adapter is no linear update of the weights: it cannot be merged into them")
    for name, layer in layers.items():
        update = layer.get_submodule(CHILD)
        assert isinstance(update, Update)
        W = weight_matrix(layer, name)
        W.copy_(update.delta() + W.double())
        delattr(layer, CHILD)
        for key, hook in list(layer._forward_hooks.items()):
            if hook in HOOKS:
                del layer._forward_hooks[key]


def matrix_size(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, or of transformers' Conv1D.

    Raises:
        InputError: the layer is another one.
    """
    if not isinstance(layer, nn.Linear) and not is_conv1d(layer):
        raise InputError(f"got a {type(layer).__name__}; this method adapts linear layers: choose other modules")
    out, in_ = layer.weight.shape
    return (int(in_), int(out)) if is_conv1d(layer) else (int(out), int(in_))


def weight_matrix(layer: nn.Module, name: str) -> Float[Tensor, "out in"]:
    """The weight as a matrix (out, in)."""
    matrix_size(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().mT if is_conv1d(layer) else weight.detach()
