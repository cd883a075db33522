"""A user's own functions as measures."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from specbasis.core.errors import InputError
from specbasis.core.svd import SVD, HalfSVD
from specbasis.measures.measure import PAIR, Measure, Values
from specbasis.measures.triple import Triple

OwnMeasure = Callable[..., Any]
"""A function of one SVD (then taken of base and of tuned), or of two (base, tuned): a number, or one for each
rank."""

OWN = "own measure"
"""What stands for the source of a user's function."""


def own(function: OwnMeasure) -> tuple[Measure, ...]:
    """The entries of the table for a user's function: NAME of two SVDs, NAME_base and NAME_tuned of one.

    It is called with `SVD` values of the leading ranks, (base) and (tuned), or (base, tuned), and returns a
    number or a one-dimensional tensor, whose index is the rank.

    Raises:
        InputError: it has no name of its own, or takes another number of arguments.
    """
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise InputError(f"got the own measure {function!r} without a name; want a function made with def")
    count = _arguments(function)
    if count not in (1, 2):
        raise InputError(f"own measure {name} takes {count} arguments; want (svd), or (base, tuned)")
    title = (inspect.getdoc(function) or name).splitlines()[0]
    forms = [(name, title, PAIR)]
    if count == 1:
        forms = [(f"{name}_{which}", f"{title} ({which})", (which,)) for which in PAIR]
    return tuple(
        Measure(
            name=name,
            title=title,
            function=partial(_take, function=function, name=name, which=which),
            index="rank",
            source=OWN,
            vectors=which,
        )
        for name, title, which in forms
    )


def _arguments(function: OwnMeasure) -> int:
    """How many positional arguments without a default a function takes; 0 where that cannot be known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _take(t: Triple, function: OwnMeasure, name: str, which: tuple[str, ...]) -> Values:
    svds = [t.once(("svd", part), partial(_svd, getattr(t, part), t.scale)) for part in which]
    try:
        figures = torch.as_tensor(function(*svds)).detach().cpu()
    except Exception as error:
        raise InputError(f"own measure {name} failed: {type(error).__name__}: {error}") from error
    if figures.ndim > 1 or figures.is_complex() or not figures.numel():
        raise InputError(
            f"own measure {name} returned shape {tuple(figures.shape)} of {figures.dtype}; want a number or a "
            "one-dimensional tensor of real numbers"
        )
    return Values(figures.double().reshape(-1), index=None if figures.ndim else [-1])


def _svd(decomposition: SVD | HalfSVD, scale: float) -> SVD:
    """Both sides, in the units of the weights."""
    svd = decomposition.svd() if isinstance(decomposition, HalfSVD) else decomposition
    if scale == 1.0:
        return svd
    values = ("S", "spectrum", "spectrum_error", "residual", "gap")
    return replace(svd, **{name: getattr(svd, name) / scale for name in values})


def digest(function: OwnMeasure) -> str:
    """What tells one own measure from another of the same name: its source, or its code where there is none."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = "" if code is None else f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
