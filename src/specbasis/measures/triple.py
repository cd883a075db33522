"""What a measure reads: the decompositions of base, tuned and delta, and what was found on the way to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specbasis.core.attention_heads import HeadFigures
from specbasis.core.cosines import Cosines, cosines
from specbasis.core.groups import degenerate_groups, grouped
from specbasis.core.perturbation import Core, core
from specbasis.core.rounding import Rounding
from specbasis.core.svd import SVD, HalfSVD

_T = TypeVar("_T")
_V = TypeVar("_V")


@dataclass(frozen=True)
class Absent:
    """A decomposition that no wanted measure reads: only the shape of its matrix is known."""

    which: str
    shape: tuple[int, int]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a measure reads the {name} of {self.which} and does not declare it; see `measure`")


Decomposition = SVD | HalfSVD | Absent


@dataclass(frozen=True, eq=False)
class Triple:
    """The three decompositions that every measure reads: base, tuned, and delta = tuned − base.

    Attributes:
        base: SVD of the pretrained matrix.
        tuned: SVD of the finetuned matrix.
        delta: SVD of tuned − base, subtracted in float64.
        inner: ⟨base, tuned⟩_F, the sum of elementwise products.
        subspace: the number of ranks k at which principal angles are taken.
        norms: Frobenius norms of base, tuned and delta, from their entries; from the spectra when None.
        every: base with every vector of its short side, where a measure reads them.
        rounding: what rounding to the storage formats of base and of tuned does to an entry.
        heads: what changed in each attention head, where base is cut into heads.
        sampled: null → alignments, left and right, (draws, k), with random updates in place of delta.
        figures: other figures of the entries, by measure; see `specbasis.core.entries.read_entries`.
        entries: tuned as stored, (out, in), for what reads the size of each entry.
        scale: the power of two that everything here is multiplied by, so that it is in range; `measure_all` takes
            it out of the figures again.
    """

    base: Decomposition
    tuned: Decomposition
    delta: Decomposition
    inner: float
    subspace: int = 10
    norms: Mapping[str, float] | None = None
    every: SVD | HalfSVD | None = None
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    heads: HeadFigures | None = None
    sampled: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    entries: Tensor | None = None
    scale: float = 1.0
    _computed: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Any, compute: Callable[[], _T]) -> _T:
        """What several measures read, computed by the first of them."""
        if key not in self._computed:
            self._computed[key] = compute()
        value: _T = self._computed[key]
        return value

    @property
    def identical(self) -> bool:
        """Whether tuned is base, bit for bit: the caller then passes the same SVD twice."""
        return self.base is self.tuned

    def is_zero(self, which: str) -> bool:
        """Whether a matrix has no direction at all."""
        return self.once(("zero", which), lambda: bool(getattr(self, which).spectrum[0] == 0))

    @property
    def unturned(self) -> bool:
        """Whether there is nothing to turn, or nothing that turns it."""
        return self.is_zero("base") or self.identical or self.norm("delta") == 0

    def norm(self, which: str) -> float:
        """Frobenius norm of base, tuned or delta."""
        if self.norms is not None:
            return self.norms[which]
        return float(torch.linalg.vector_norm(getattr(self, which).spectrum))

    @property
    def variance(self) -> float:
        """Mean square of the update's entries: ‖delta‖_F² / (out · in)."""
        return self.norm("delta") ** 2 / (self.base.shape[0] * self.base.shape[1])

    def cosines(self, first: str, second: str, side: str) -> Cosines:
        """Cosines between the left or right vectors of two of the three, computed once."""
        return self.once(
            ("cosines", first, second, side), lambda: cosines(getattr(self, first), getattr(self, second), side)
        )

    def matrix(self, side: str) -> Float[Tensor, "k k"]:
        """⟨base_i, tuned_j⟩ for all leading ranks of the left or right side, computed once, on the CPU."""
        return self.once(("matrix", side), lambda: self.cosines("base", "tuned", side).matrix().cpu())

    def observed(self, side: str) -> Float[Tensor, " k"]:
        """Alignment of base and tuned, on the CPU; 1 where the two are identical."""
        if self.identical:
            return torch.ones(self.ranks, dtype=torch.float64)
        return self.cosines("base", "tuned", side).alignment.cpu()

    @property
    def base_wide(self) -> bool:
        """Whether the short side is the left one."""
        return self.base.shape[0] <= self.base.shape[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """(short, long) sides of the matrices."""
        return min(self.base.shape), max(self.base.shape)

    def dimension(self, side: str) -> int:
        """Dimension of the space in which the left or right vectors lie."""
        return self.base.shape[0 if side == "left" else 1]

    def of_side(self, pair: tuple[_V, _V], side: str) -> _V:
        """The one of (short, long) that belongs to the left or right side."""
        return pair[0 if (side == "left") == self.base_wide else 1]

    @property
    def ranks(self) -> int:
        """How many leading ranks of both have vectors."""
        return min(len(self.base.S), len(self.tuned.S))

    @property
    def core(self) -> Core:
        """The update in the basis of base."""
        assert self.every is not None
        base, delta = self.every, self.delta
        assert not isinstance(delta, Absent)
        return self.once("core", lambda: core(base, delta, self.ranks, self.norm("delta")))

    def tied(self, which: str) -> Bool[Tensor, " k"] | None:
        """Whether each leading rank shares a degenerate group with another under the rounding of the stored format.

        Of delta, whose entries carry both roundings, with both. None where the rounding is not known.
        """
        sides = ("base", "tuned") if which == "delta" else (which,)
        if not all(side in self.rounding for side in sides):
            return None
        variance = math.fsum(r.variance[r.stored] for r in (self.rounding[side] for side in sides))
        decomposition = getattr(self, which)
        return self.once(
            ("tied", which),
            lambda: grouped(degenerate_groups(decomposition.spectrum, variance, len(decomposition.S))),
        )
