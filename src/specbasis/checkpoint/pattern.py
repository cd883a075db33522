"""Which coefficients of a core are trained: all of the square of its ranks, or those at stored positions.

A position (i, j) couples the left vector of rank i with the right vector of rank j, k ≤ i, j < m. Positions stand
in the order of the square's rows, so that equal patterns are equal tensors. A square has none.
"""

from __future__ import annotations

import re

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specbasis.core.errors import InputError

SQUARE = "square"
PATTERN = re.compile(r"square|diagonal|(band|scattered):(\d{1,12})", re.ASCII)


def check_pattern(pattern: str) -> None:
    """Refuse a word that names no pattern.

    Raises:
        InputError: it does not.
    """
    if not isinstance(pattern, str) or not PATTERN.fullmatch(pattern):
        raise InputError(
            f"got pattern = {pattern!r}; want 'square', 'diagonal', 'band:WIDTH' (such as band:2) or "
            "'scattered:COUNT'"
        )


def positions_of(pattern: str, interval: tuple[int, int], name: str) -> Int[Tensor, "2 e"] | None:
    """Positions that a pattern means on ranks [k, m); None for the whole square.

    Args:
        pattern: "square"; "diagonal"; "band:WIDTH", all with |i − j| ≤ WIDTH; "scattered:COUNT", drawn at random,
            the same for all squares of one size, until a file or `SpectralLinear.place` brings others.
        interval: ranks [k, m).
        name: what messages call the matrix.

    Raises:
        InputError: the pattern is none, or has more positions than the square.
    """
    check_pattern(pattern)
    (k, m), kind, size = interval, pattern.partition(":")[0], int(pattern.partition(":")[2] or 0)
    r = m - k
    if kind == "scattered":
        if not 1 <= size <= r * r:
            raise InputError(
                f"{name}: got pattern = {pattern!r} on ranks [{k}, {m}); want 1 … {r * r:,} coefficients there"
            )
        drawn = torch.randperm(r * r, generator=torch.Generator().manual_seed(0))[:size].sort().values
        return at_flat(drawn, interval)
    if kind == SQUARE:
        return None
    ranks = torch.arange(r)
    inside = (ranks[:, None] - ranks).abs() <= size  # of a diagonal 0
    return at_flat(inside.flatten().nonzero()[:, 0], interval)


def at_flat(index: Int[Tensor, " e"], interval: tuple[int, int]) -> Int[Tensor, "2 e"]:
    """Positions on ranks [k, m) from places in the square read row by row."""
    k, m = interval
    return torch.stack([index // (m - k), index % (m - k)]).to(torch.int32) + k


def check_positions(positions: Tensor, M: Tensor, interval: tuple[int, int], name: str) -> None:
    """Refuse positions that are not one for each coefficient, in the square of ranks [k, m), by row, each once.

    Raises:
        InputError: they are not.
    """
    k, m = interval
    problem, is_whole = "", positions.dtype in (torch.int32, torch.int64)
    if not (is_whole and M.ndim == 1 and len(M) and positions.shape == (2, len(M))):
        problem = (
            f"{positions.dtype} positions of shape {tuple(positions.shape)} for coefficients of shape "
            f"{tuple(M.shape)}"
        )
    elif not bool(((positions >= k) & (positions < m)).all()):
        problem = f"a position outside of ranks [{k}, {m})"
    elif not bool((_flat(positions, interval).diff() > 0).all()):
        problem = "positions that are not in the order of rows, each once"
    if problem:
        raise InputError(
            f"{name}: got {problem}; want the ranks (i, j) of each coefficient, by row, each once (where a file "
            "holds them, it is damaged: fetch or save it again)"
        )


def square_of(
    M: Float[Tensor, " e"], positions: Int[Tensor, "2 e"], interval: tuple[int, int]
) -> Float[Tensor, "r r"]:
    """The core as a square on ranks [k, m), with zeros where nothing is trained. Costs r² numbers."""
    r = interval[1] - interval[0]
    return M.new_zeros(r * r).scatter(0, _flat(positions, interval), M).view(r, r)


def _flat(positions: Int[Tensor, "2 e"], interval: tuple[int, int]) -> Int[Tensor, " e"]:
    index: Tensor = positions.long() - interval[0]
    return index[0] * (interval[1] - interval[0]) + index[1]
