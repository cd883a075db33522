"""Matrices in float64 blocks of columns: products, Gram matrices and orthonormal columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from specbasis.core.errors import InputError, NonFiniteError

EPS = torch.finfo(torch.float64).eps
BLOCK_BYTES = 32 * 2**20  # one float64 block of columns
CACHED = 2**18
"""Entries of float32 that stay in a core's cache."""

ORDINARY = 200
"""Exponents of a largest entry that are left as they are, of 1023 in which sums of fourth powers must find room."""


def device_named(name: str, dtype: torch.dtype = torch.float64) -> torch.device:
    """A device on which torch computes with numbers of a format.

    Raises:
        InputError: there is none of that name, or it has no memory (``meta``) or not that format.
    """
    try:
        device = torch.device(name)
        torch.ones(1, dtype=dtype, device=device).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise InputError(f"got device {name!r}; want cpu, or a GPU that torch sees, such as cuda:0") from error
    return device


def want_tensors(name: str, *operands: object) -> None:
    """Refuse arrays of other libraries."""
    for kind in (type(X).__name__ for X in operands if not isinstance(X, Tensor)):
        raise InputError(f"{name}: got {kind}; want a torch tensor, as torch.as_tensor makes it")


def short_side(W: Tensor, name: str) -> int:
    """Length of the short side of a matrix; refuses what is none."""
    want_tensors(name, W)
    if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point():
        raise InputError(
            f"{name}: got {W.dtype} of shape {tuple(W.shape)}; want a floating-point matrix (out, in) with entries"
        )
    return min(W.shape)


def unit_scale(*matrices: Tensor, ordinary: int = ORDINARY) -> float:
    """A power of two that brings float64 weights to a size whose fourth powers are in range; 1 where they are.

    Those of narrower formats always are.
    """
    if not any(X.dtype == torch.float64 for X in matrices):
        return 1.0
    largest = max(float(X.abs().max()) for X in matrices)
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    # 2^1024 is not a number: a subnormal largest entry is not scaled up to 1.
    return 1.0 if abs(exponent) <= ordinary else 2.0 ** -max(-1000, min(1000, exponent))


def norm(X: Tensor) -> Tensor:
    """Frobenius norm in float64, of numbers of any size."""
    scale = unit_scale(X)
    size: Tensor = torch.linalg.vector_norm(X if scale == 1.0 else X * scale, dtype=torch.float64) / scale
    return size


class Blocks:
    """A matrix, or the difference of two, in float64 blocks of columns, scaled to a largest entry near 1.

    The short side comes first. The scale is a power of two, so that scaling is exact and squares neither overflow
    nor vanish. A matrix of one block is converted once and kept.
    """

    def __init__(self, operands: list[Tensor], name: str, device: torch.device) -> None:
        # Exact, and torch has no arithmetic in 8-bit floats.
        self.operands = [X if X.element_size() > 1 else X.to(torch.bfloat16) for X in operands]
        self.shape, self.device = operands[0].shape, device
        self.width = max(1, BLOCK_BYTES // (8 * self.shape[0]))
        self.top = 0.0  # the largest singular value, once it is known
        largest = self._largest()
        if not math.isfinite(largest):
            bad = sum(int((~torch.isfinite(block)).sum()) for block in self._columns())
            raise NonFiniteError(
                f"{name}: {bad} of {operands[0].numel()} entries are NaN or Inf: no SVD; repair or leave it out"
            )
        self._kept: list[Tensor] | None = None
        exponent = math.frexp(largest)[1]
        # 2¹⁰²⁴ is not a float. A matrix of zeros has the scale 0.
        self.scale = 2.0 ** min(max(exponent, -1000), 1000) if largest else 0.0
        if not largest:
            return
        self._kept = list(self) if self.shape[1] <= self.width else None

    @classmethod
    def of(cls, W: Tensor, minus: Tensor | None, name: str, device: torch.device | None) -> Blocks:
        """W, or W − minus, with its short side first.

        Raises:
            InputError: W is not a floating matrix with entries, or ``minus`` has another shape.
            NonFiniteError: either holds NaN or Inf.
        """
        short_side(W, name)
        if minus is not None and (minus.shape != W.shape or not minus.is_floating_point()):
            raise InputError(
                f"{name}: got {tuple(W.shape)} minus {minus.dtype} {tuple(minus.shape)}; want floats of one shape"
            )
        operands = [W] if minus is None else [W, minus]
        wide = W.shape[0] <= W.shape[1]
        return cls([X if wide else X.mT for X in operands], name, device or W.device)

    def _largest(self) -> float:
        """The largest absolute entry, of a difference of narrow formats rounded; not finite where one is not."""
        first, *rest = self.operands
        parts: Iterable[Tensor] = [first]
        if rest:
            narrow = all(X.element_size() <= 4 for X in self.operands)
            parts = _differences(first, rest[0]) if narrow else self._columns()
        # torch's maximum keeps a NaN, Python's loses one that does not come first.
        largest = float(torch.stack([torch.stack(_by_rows(X).aminmax()).abs().max().cpu() for X in parts]).max())
        if math.isinf(largest) and rest:  # of float32 perhaps, whose differences can be beyond it
            return max(float(block.abs().max()) for block in self._columns())
        return largest

    def _columns(self) -> Iterator[Tensor]:
        for start in range(0, self.shape[1], self.width):
            first, *rest = (self._moved(X[:, start : start + self.width]) for X in self.operands)
            yield first.sub_(rest[0]) if rest else first

    def _moved(self, block: Tensor) -> Tensor:
        """A copy of a block on the device, in float64; moved as stored, the fewest bytes, through pinned memory."""
        if block.device != self.device and self.device.type == "cuda":
            block = block.contiguous().pin_memory().to(self.device, non_blocking=True)
        return block.to(self.device).to(torch.float64, copy=True)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._kept if self._kept is not None else (b.div_(self.scale) for b in self._columns())

    def gram(self, basis: Tensor | None) -> Tensor:
        """Upper triangle of (basisᵀ A)(basisᵀ A)ᵀ; the basis is the identity when None."""
        n = self.shape[0] if basis is None else basis.shape[1]
        G = torch.zeros(n, n, dtype=torch.float64, device=self.device)
        for block in self:
            add_gram(G, block if basis is None else basis.mT @ block)
        return G

    def times(self, right: Tensor | Iterable[Tensor], left: Tensor | None = None) -> Tensor:
        """A R, or L A R, for R whole or in blocks of rows as wide as this matrix's blocks of columns."""
        rows = torch.split(right, self.width) if isinstance(right, Tensor) else right
        out: Tensor | None = None
        for block, part in zip(self, rows, strict=True):
            rotated = block if left is None else left @ block
            out = rotated @ part if out is None else out.addmm_(rotated, part)
        if out is None:
            raise AssertionError("a matrix has at least one block")
        return out

    def transposed(self) -> Iterator[Tensor]:
        """Aᵀ in blocks of rows."""
        return (block.mT for block in self)

    def transposed_times(self, X: Tensor) -> Tensor:
        """Aᵀ X."""
        return torch.cat([block.mT @ X for block in self])

    def coupling(self, X: Tensor) -> Tensor:
        """A (Aᵀ X), block by block: accurate relative to ‖A‖·‖Aᵀ X‖, which the Gram matrix is not."""
        out = torch.zeros_like(X)
        for block in self:
            out.addmm_(block, block.mT @ X)
        return out


def _by_rows(X: Tensor) -> Tensor:
    """X or its transpose, whose rows lie together in memory: read so, it is neither copied nor jumped about in."""
    return X.mT if X.stride(0) == 1 else X


def _differences(X: Tensor, Y: Tensor) -> Iterator[Tensor]:
    """X − Y in float32, in parts that stay in a core's cache."""
    for x, y in _parts(X, Y):
        yield x.to(torch.float32) - y


def subtract(X: Tensor, Y: Tensor) -> None:
    """X − Y in place, of X in float32 and Y of no wider format."""
    for x, y in _parts(X, Y):
        x -= y.to(x.device)


def _parts(X: Tensor, Y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if X.stride(0) == 1:
        X, Y = X.mT, Y.mT
    step = max(1, CACHED // X.shape[1]) if X.device.type == "cpu" else len(X)
    return zip(torch.split(X, step), torch.split(Y, step), strict=True)


def add_gram(G: Tensor, Y: Tensor) -> None:
    """G + Y Yᵀ in place, upper triangle only: by panels, 9/16 of the flops of the full product."""
    n = len(G)
    columns = max(128, -(-n // 8))
    for c in range(0, n, columns):
        G[: c + columns, c : c + columns].addmm_(Y[: c + columns], Y[c : c + columns].mT)


def orthonormal(Z: Tensor) -> Tensor:
    """Columns of Z made orthonormal in order, directions kept; zero columns become an orthonormal completion."""
    norms = Z.norm(dim=0)
    Q, R = torch.linalg.qr(Z / torch.where(norms > 0, norms, 1.0))
    signed: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return signed


def reorthonormal(Y: Tensor) -> Tensor:
    """Nearly orthonormal columns (to about eps / DEFLATE²) made so to rounding, in order; cheaper than a QR."""
    G = Y.new_zeros(Y.shape[1], Y.shape[1])
    add_gram(G, Y.mT)
    R = torch.linalg.cholesky(G, upper=True)
    Q: Tensor = torch.linalg.solve_triangular(R, Y, upper=True, left=False)
    return Q
