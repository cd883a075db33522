"""SVFT: trained entries of a fixed sparse pattern in the whole singular basis."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from specbasis.adapter.layouts import matrix_shape
from specbasis.checkpoint.pattern import at_flat, positions_of
from specbasis.core.errors import InputError
from specbasis.finetuning.methods.kit import AddedMethod, Request, register
from specbasis.finetuning.methods.sites import Site
from specbasis.finetuning.methods.updates import Update


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
        n = min(matrix_shape(layer, name))
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
        mixed = sparse_mix(z, self.M, self.crow, self.columns, self.order, self.ccol, self.rows_by_column)  # type: ignore[arg-type]
        return self.project(mixed, self.frozen["U"])

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
    positions = positions_of(f"band:{width}", (0, len(update.frozen["S"])), update.name)
    assert positions is not None
    return positions.long()


def _random(update: SVFT, width: int) -> Int[Tensor, "2 e"]:
    n = len(update.frozen["S"])
    return at_flat(torch.randperm(n * n)[: entries(n, width)].sort().values, (0, n)).long()


def _top_k(update: SVFT, width: int) -> Int[Tensor, "2 e"]:
    """Where |⟨u_i, v_j⟩| is largest. Vectors of unequal length have no such product: then, as in the authors' code,
    where the square one of the two factors has its largest entries.
    """
    U, Vh = update.frozen["U"].cpu(), update.frozen["Vh"].cpu()
    n = len(Vh)
    product = (Vh @ U).mT if len(U) == Vh.shape[1] else U if len(U) == n else Vh
    return at_flat(product.abs().flatten().topk(entries(n, width)).indices.sort().values, (0, n)).long()


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


def sparse_mix(z: Float[Tensor, "*tokens n"], m: Float[Tensor, " e"], *index: Tensor) -> Float[Tensor, "*tokens n"]:
    """M z in m's dtype, for the sparse n × n matrix M with values m.

    Args:
        z: hidden states in the singular basis.
        m: values, by row.
        *index: row starts and columns, then order, column starts and rows by column, as `compressed` gives them.
    """
    mixed: Tensor = _SparseMix.apply(z.to(m.dtype), m, *index)  # type: ignore[no-untyped-call]
    return mixed


class Svft(AddedMethod):
    """M in W + U M Vh on all ranks; the size is the number of diagonals on each side."""

    def largest_size(self, sites: Sequence[Site]) -> int:
        """The band that is the whole matrix."""
        return super().largest_size(sites) - 1

    def added(self, layer: nn.Module, site: Site, request: Request) -> SVFT:
        """The sparse update of one layer."""
        pattern = request.options_over(pattern="plain")["pattern"]
        return SVFT(layer, pattern, request.rank or 0, site.name)


def svft(pattern: str, trains: str, size: int | None) -> Svft:
    """SVFT on every matrix with one of `PATTERNS`."""
    return Svft(
        name="svft" if pattern == "plain" else f"svft-{pattern}",
        title=f"SVFT ({pattern})",
        trains=f"{trains} of M in W + U M Vh, all singular vectors",
        source="Lingam et al. 2024, arXiv 2405.19597",
        size=size,
        learning_rate=5e-3,
        options={"pattern": pattern},
    )


register(
    svft("plain", "the diagonal", None),
    svft("banded", "the diagonal and `rank` diagonals on each side", 2),
    svft("random", "as many random entries as in the band", 2),
    svft("top-k", "as many entries as in the band, where |⟨u_i, v_j⟩| is largest,", 2),
)
