"""What a value that holds tensors, tables or long lists shows of itself: a few lines, not its numbers."""

from __future__ import annotations

import reprlib
import textwrap
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

LINES, WIDTH = 5, 100


def brief(cls: T) -> T:
    """Give a dataclass a ``repr`` of at most `LINES` lines: of arrays their size, of collections how many."""
    setattr(cls, "__repr__", _repr)  # noqa: B010 - mypy takes a plain assignment for an instance's method
    return cls


def clipped(text: str) -> str:
    """A text in at most `LINES` lines, wrapped where one is too long."""
    wrapped = [part for line in text.splitlines() for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ")]
    return "\n".join(wrapped if len(wrapped) <= LINES else [*wrapped[: LINES - 1], "    …"])


def _repr(value: Any) -> str:
    shown = [f"{field.name}={_shown(getattr(value, field.name))}" for field in fields(value) if field.repr]
    return clipped(f"{type(value).__name__}({', '.join(shown)})")


def _shown(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {'×'.join(map(str, value.shape))}"
    if hasattr(value, "num_rows"):
        return f"{value.num_rows} rows"
    if isinstance(value, Mapping | list | tuple) and len(value) > 3:
        return f"{type(value).__name__} of {len(value)}"
    return reprlib.repr(value).replace("\n", " ")
