"""Key: where a matrix stands in its model, and how it is taken out of the parameter that holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specbasis.core.errors import InputError

if TYPE_CHECKING:  # the roles are asked for before torch is needed
    from torch import Tensor

    from specbasis.checkpoint import Checkpoint
    from specbasis.core.quantised import Grid

ROLES = (
    *(f"attention.{part}" for part in ("query", "key", "value", "output")),
    *(f"cross_attention.{part}" for part in ("query", "key", "value", "output")),
    "ffn.up", "ffn.gate", "ffn.down",
    "conv", "embedding", "head", "other",
)  # fmt: skip
"""The closed vocabulary of roles, in the order in which tables and figures show them.

In a gated feed-forward layer ``down(act(gate(x)) * up(x))`` the gate is the branch that passes the activation.
"""


@dataclass(frozen=True)
class MatrixKey:
    """Where a matrix stands in its model.

    Attributes:
        block: number of its block, from 0 and counted on over stages, or None outside of the blocks.
        role: one of `ROLES`.
        name: unique in the model: the parameter's name, with [expert] and [part] behind it where it holds several.
        stack: "encoder", "decoder", … in models that have several, else empty.
    """

    block: int | None
    role: str
    name: str
    stack: str = ""


Admits = Callable[[MatrixKey], bool]
"""Whether a matrix is wanted. It is also asked about what a parameter can turn out to be."""


@dataclass(frozen=True)
class MatrixRef:
    """A matrix inside a checkpoint: the parameter that holds it and how to take it out.

    Attributes:
        key: where it stands in the model.
        parameter: the name under which the checkpoint stores it.
        shape: (out, in) of the matrix.
        transposed: the parameter is stored (in, out).
        rows: the rows [start, stop) of the (out, in) parameter that belong to this matrix; None for all.
        groups: the rows come in this many equal groups (one a head, in fused weights that are interleaved), and
            `rows` counts inside each.
        columns: the columns [start, stop) that belong to this matrix; None for all.
        expert: which matrix of a stack along the first axis; None where the parameter is no stack.
        kernel: the last axis of the parameter is out, as in kernels of Keras and Flax; with `transposed`.
    """

    key: MatrixKey
    parameter: str
    shape: tuple[int, int]
    transposed: bool = False
    rows: tuple[int, int] | None = None
    groups: int = 1
    columns: tuple[int, int] | None = None
    expert: int | None = None
    kernel: bool = False

    def read(self, checkpoint: Mapping[str, Tensor]) -> Tensor:
        """The matrix (out, in). Kernels are flattened to out × (in·kh·kw).

        A view of the stored tensor, except where it is gathered from several groups of rows, or is one of a stack,
        which may be mapped from a file that can be cut off (`checkpoint.formats.file_entries`).
        """
        if self.expert is None:
            return self._part(checkpoint[self.parameter]).flatten(0, -2)
        from specbasis.checkpoint.mapped import copied  # it needs torch

        member = getattr(checkpoint, "member", None)  # of a checkpoint; a plain mapping has tensors alone
        stored = member(self.parameter, self.expert) if member else checkpoint[self.parameter][self.expert]
        return copied(self._cut(stored), self.parameter).flatten(0, -2)

    def grid(self, checkpoint: Checkpoint) -> Grid | None:
        """The matrix with its levels where it is stored quantised, and they are known; None elsewhere."""
        grid = checkpoint.grid(self.parameter, self.expert)
        return None if grid is None else grid.part(lambda X: self._cut(X).flatten(0, -2))

    def delta_factors(self, checkpoint: Checkpoint) -> tuple[Tensor, Tensor] | None:
        """Factors (B, A) of a low-rank update of this matrix, (out, r) and (r, in); None where there is none.

        They are those that `Checkpoint.delta_factors` gives for the whole parameter, cut as `read` cuts it.
        """
        factors = checkpoint.delta_factors(self.parameter) if self.expert is None and not self.kernel else None
        if factors is None:
            return None
        B, A = (factors[1].mT, factors[0].mT) if self.transposed else factors
        A = A if self.columns is None else A[:, slice(*self.columns)]
        B = B if self.groups == 1 else B.reshape(self.groups, -1, B.shape[1])
        B = B if self.rows is None else B[..., slice(*self.rows), :]
        return B.flatten(0, -2), A

    def write(self, stored: Tensor, W: Tensor) -> None:
        """Put a matrix (out, in) into its place in the parameter's tensor, in place: the inverse of `read`.

        Raises:
            InputError: `W` has another shape than the matrix, or `stored` cannot be written through a view.
        """
        if tuple(W.shape) != self.shape:
            raise InputError(f"{self.key.name}: got a matrix of shape {tuple(W.shape)}, want {self.shape}")
        if not stored.is_contiguous():
            raise InputError(
                f"{self.key.name}: the stored tensor is not contiguous; call .contiguous() on it first"
            )
        part = self._part(stored)
        part.copy_(W.reshape(part.shape))

    def _part(self, stored: Tensor) -> Tensor:
        """A view of the stored tensor as (out, in), or as (groups, out / groups, in)."""
        return self._cut(stored if self.expert is None else stored[self.expert])

    def _cut(self, W: Tensor) -> Tensor:
        W = W.flatten(0, -2) if self.kernel else W.flatten(1)
        W = W.mT if self.transposed else W
        W = W if self.columns is None else W[:, slice(*self.columns)]
        W = W if self.groups == 1 else W.view(self.groups, -1, W.shape[1])
        return W if self.rows is None else W[..., slice(*self.rows), :]


@dataclass(frozen=True)
class Skipped:
    """A parameter, or a part of one, that is not compared, and why.

    Attributes:
        name: the parameter's name.
        side: "base", "tuned" or "both".
        reason: in words for a person.
        size: entries of the matrix that it is or may hold; 0 where it is none, or is compared in another place.
    """

    name: str
    side: str
    reason: str
    size: int = 0
