"""Which ranks of a matrix are meant.

Ranks are 0-based and given as an int n (the leading n; the trailing |n| where negative), "all", intervals such as
"0:30,100,-5:" (`specbasis.core.grammar`), a range, or a sequence of ranks. What goes beyond the last rank is cut
off, since the matrices of one model have different numbers of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from specbasis.core.errors import InputError
from specbasis.core.grammar import ranges

Ranks = int | str | range | Sequence[int]


def rank_set(ranks: Ranks, count: int) -> Int[Tensor, " r"]:
    """The ranks that are meant, of a matrix that has ``count`` of them, ascending.

    Raises:
        InputError: no rank is left, a rank is negative, or the text is none of the forms above.
    """
    given = parsed(ranks) if isinstance(ranks, str) else ranks
    if isinstance(given, int):
        return torch.arange(min(given, count)) if given > 0 else torch.arange(max(count + given, 0), count)
    chosen: set[int] = set()
    for item in given:
        inside = range(count)[item] if isinstance(item, slice) else [item]
        chosen.update(inside or ([item.start] if isinstance(item, slice) and item.start else []))
    if chosen and min(chosen) < 0:
        raise InputError(f"got rank {min(chosen)}; want ranks from 0")
    if chosen and min(chosen) >= count:
        raise InputError(f"got ranks {ranks!r}; the matrix has the ranks 0 … {count - 1}")
    return torch.tensor(sorted(rank for rank in chosen if rank < count), dtype=torch.long)


def parsed(text: str) -> int | list[slice]:
    """Ranks that are given as text: a number of ranks, or intervals as in `specbasis.core.grammar`.

    Raises:
        InputError: it is neither.
    """
    if text == "all":
        return [slice(None)]
    try:
        items = ranges(text, "ranks")
    except InputError:
        items = ()
    if not items:
        raise InputError(f"got ranks {text!r}; want n (the leading n), -n (the trailing n), k:m with k < m, or all")
    if len(items) == 1 and isinstance(items[0], int):
        return items[0]
    return [item if isinstance(item, slice) else slice(item, item + 1 or None) for item in items]
