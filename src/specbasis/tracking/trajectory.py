"""One weight matrix over many checkpoints: each is decomposed once, and every pair of them compared through the
vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from specbasis.core.blocks import norm, unit_scale
from specbasis.core.errors import InputError, NonFiniteError
from specbasis.core.krylov import approximate_svd
from specbasis.core.subspace import chance_alignment
from specbasis.core.svd import HalfSVD, half_svd

PAIRWISE_BYTES = 2**30
"""Distances between all pairs of checkpoints are taken where a matrix of all of them, in float64, is no larger."""

CANCELLED = 1e4
"""A squared distance smaller than the squares that it is the difference of by this factor is computed by
subtraction."""

SIDES = ("left", "right")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Leading singular triplets of one matrix at C checkpoints, and how far apart the matrices are.

    Attributes:
        index: which of the checkpoints hold it, (C,); the others had NaN, or were left out by the reader.
        shape: (out, in).
        S: singular values, (C, k).
        left, right: singular vectors, (C, out, k) and (C, into, k).
        bound: of each computed pair of vectors (see `SVD.bound`), (C, k).
        relative_gap: gap_i / σ_i, (C, k).
        norms: ‖W_c‖_F, (C,).
        distance: ‖W_a − W_b‖_F, (C, C), float64; NaN for the pairs that were not taken: where the matrices do not
            fit into `PAIRWISE_BYTES`, all but those with the first, the last and the one before.
        failed: index → why a matrix was left out.
    """

    index: tuple[int, ...]
    shape: tuple[int, int]
    S: Float[Tensor, "C k"]
    left: Float[Tensor, "C out k"]
    right: Float[Tensor, "C into k"]
    bound: Float[Tensor, "C k"]
    relative_gap: Float[Tensor, "C k"]
    norms: Float[Tensor, " C"]
    distance: Float[Tensor, "C C"]
    failed: dict[int, str]

    @cached_property
    def _alignment(self) -> dict[str, Tensor]:
        return {}

    def alignment(self, side: str) -> Float[Tensor, "C C k"]:
        """|⟨x_i(a), x_i(b)⟩| for every pair of checkpoints a, b and rank i; 0 … 1. Costs C²·d·k flops, once.

        Source: Yu et al. 2026, §3.1 and Fig. 4A.
        """
        if side not in self._alignment:
            X = (self.left if side == "left" else self.right).permute(2, 0, 1)  # k, C, d
            cosines = (X @ X.mT).abs().clamp(max=1.0).permute(1, 2, 0).contiguous()
            diagonal = torch.arange(len(self.index))
            cosines[diagonal, diagonal] = 1.0
            same = self.distance == 0.0  # equal matrices: exactly 1, whatever the gaps
            self._alignment[side] = torch.where(same[..., None], 1.0, cosines)
        return self._alignment[side]

    def alignment_bound(self) -> Float[Tensor, "C C k"]:
        """Bound on the numerical error of `alignment`: π/√2·(bound_a + bound_b), at most 1, as for two matrices."""
        both = self.bound[:, None] + self.bound[None]
        bound = (math.pi / math.sqrt(2) * both).clamp(max=1.0)
        return torch.where((self.distance == 0.0)[..., None], 0.0, bound)

    def mean_alignment(self, top: int) -> Float[Tensor, "C C"]:
        """Alignment of every pair, mean over both sides and the leading ``top`` ranks."""
        k = min(top, self.S.shape[1])
        return (self.alignment("left")[..., :k] + self.alignment("right")[..., :k]).mean(dim=-1) / 2

    def relative_distance(self) -> Float[Tensor, "C C"]:
        """‖W_a − W_b‖_F / ‖W_a‖_F for every pair (a, b): the size of the update from a to b."""
        return self.distance / self.norms[:, None]

    def chance(self) -> float:
        """Expected alignment of independent directions, mean over both sides."""
        return (chance_alignment(self.shape[0]) + chance_alignment(self.shape[1])) / 2


@torch.no_grad()
def follow(
    read: Callable[[int], Tensor | None],
    count: int,
    *,
    ranks: int,
    approximate: int | None = None,
    name: Callable[[int], str] = "checkpoint {}".format,
) -> Trajectory:
    """Decompose one matrix at every checkpoint, each once.

    Where the short side exceeds ``approximate`` and at most an eighth of the ranks is wanted, by block Krylov
    iteration from the vectors of the checkpoint before: that is where a warm start pays. A whole eigensolver
        takes none.

    Args:
        read: the matrix (out, in) of checkpoint 0 … count − 1, or None to leave it out.
        count: number of checkpoints.
        ranks: leading ranks whose vectors are kept, at least 1; all where there are fewer.
        approximate: short side over which the iteration is taken; never when None.
        name: what to call a checkpoint in an error.

    Costs one decomposition a checkpoint and C²·out·in/2 for distances; memory 8·C·(out + in)·k bytes for the
    vectors.

    Raises:
        InputError: shapes differ, ranks < 1, or no checkpoint could be decomposed.
    """
    if ranks < 1:
        raise InputError(f"got ranks = {ranks}; want at least 1")
    kept: dict[int, tuple[Tensor, ...]] = {}
    failed: dict[int, str] = {}
    distances = _Distances(count)
    previous: HalfSVD | None = None
    shape: torch.Size | None = None
    for c in range(count):
        W = read(c)
        if W is None:
            continue
        shape = shape or W.shape
        if W.shape != shape:
            raise InputError(f"{name(c)}: got shape {tuple(W.shape)}, before {tuple(shape)}; want equal ones")
        k = min(ranks, *W.shape)
        try:
            if approximate is not None and min(W.shape) > approximate and 8 * k <= min(W.shape):
                svd = approximate_svd(W, k, start=None if previous is None else previous.X, name=name(c))
                previous = svd
            else:
                svd = half_svd(W, k, name=name(c), implied=False)
        except NonFiniteError as error:
            failed[c] = str(error)
            continue
        kept[c] = (svd.S, svd.vectors("left"), svd.vectors("right"), svd.bound, svd.relative_gap)
        distances.add(c, W)
    if not kept or shape is None:
        raise InputError(next(iter(failed.values()), "no checkpoint holds this matrix"))
    S, left, right, bound, gap = (torch.stack(parts) for parts in zip(*kept.values(), strict=True))
    norms, distance = distances.all(list(kept), read)
    out, into = shape
    return Trajectory(tuple(kept), (out, into), S, left, right, bound, gap, norms, distance, failed)


def pairwise_distance(X: Float[Tensor, "C d"]) -> Float[Tensor, "C C"]:
    """‖x_a − x_b‖ for all pairs of rows, in float64, to a relative error of about `CANCELLED` · eps · d.

    From the Gram matrix of the rows less the first one; pairs whose square is so small beside those it is taken
    from that digits cancel are subtracted one by one. Costs 2·C²·d flops.
    """
    scale = unit_scale(X)
    X = X if scale == 1.0 else X * scale
    Y = (X - X[0]).to(torch.float64)
    G = Y @ Y.mT
    squares = G.diagonal()
    sums = squares[:, None] + squares[None]
    square = (sums - 2 * G).clamp(min=0.0)
    for a, b in ((square < sums / CANCELLED).triu(1)).nonzero().tolist():
        square[a, b] = square[b, a] = (X[a].to(torch.float64) - X[b]).square().sum()
    return square.fill_diagonal_(0.0).sqrt() / scale


class _Distances:
    """Matrices kept for their distances as long as they fit; else those to the first, the last and the one
    before.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.stack: dict[int, Tensor] = {}
        self.norms: dict[int, Tensor] = {}
        self.pairs: dict[tuple[int, int], Tensor] = {}
        self.order: list[int] = []

    def add(self, c: int, W: Tensor) -> None:
        flat = W.detach().to(torch.float64).flatten()
        self.norms[c] = norm(flat)
        self.order.append(c)
        self.stack[c] = flat
        if 8 * flat.numel() * self.count <= PAIRWISE_BYTES:
            return
        for other in {self.order[0], self.order[-2]} if len(self.order) > 1 else ():
            self.pairs[other, c] = norm(flat - self.stack[other])
        self.stack = {self.order[0]: self.stack[self.order[0]], c: flat}

    def all(self, index: Sequence[int], read: Callable[[int], Tensor | None]) -> tuple[Tensor, Tensor]:
        """Norms, and distances of all pairs."""
        n = len(index)
        distance = torch.full((n, n), math.nan, dtype=torch.float64)
        distance.fill_diagonal_(0.0)
        norms = torch.stack([self.norms[c] for c in index])
        if len(self.stack) == n and not self.pairs:
            return norms, pairwise_distance(torch.stack([self.stack[c] for c in index]))
        last = index[-1]
        for c in index[1:-1]:
            W = read(c)
            if W is not None:
                flat = W.detach().to(torch.float64).flatten()
                self.pairs[c, last] = norm(flat - self.stack[last])
        place = {c: i for i, c in enumerate(index)}
        for (a, b), value in self.pairs.items():
            distance[place[a], place[b]] = distance[place[b], place[a]] = value
        return norms, distance
