"""The one place where a test's tolerance comes from."""

import math
from collections.abc import Sequence

import torch


def rounding(
    shape: Sequence[int], norm: float = 1.0, *, gap: float | None = None, dtype: torch.dtype = torch.float64
) -> float:
    """What rounding may cost a backward stable computation with matrices of this shape and norm.

    max(shape)·eps·norm for a value, a product or a residual; divided by ``gap`` for the sine of the angle of a
    singular vector, at most 1. The factor max(shape) bounds every sum of that length; 4, a few steps in a row.
    """
    error = 4 * max(shape) * torch.finfo(dtype).eps * float(norm)
    return error if gap is None else min(1.0, error / gap if gap > 0 else math.inf)
