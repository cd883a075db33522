"""Layers that are never called: their parent multiplies with their weight itself, so that no adapter there acts."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap

from torch import nn

from specbasis.core.errors import InputError

_FUSED = re.compile(r"TransformerEncoderLayer|[MB]amba|FalconH1Mixer")
"""Parents that call such a layer in training, or where a kernel is missing, and else read its weight."""

_SETTING_UP = re.compile(r"_*(init|reset|tie|get|set)_")


def refuse_inert(parent: nn.Module, child: str, name: str) -> None:
    """Refuse a layer whose parent reads its weight instead of calling it.

    torch's MultiheadAttention does so with ``out_proj``, its TransformerEncoderLayer with ``linear1`` and
    ``linear2`` in evaluation, and Mamba's fused kernels with several projections.

    Raises:
        InputError: the layer is such a one.
    """
    if is_inert(parent, child):
        raise InputError(
            f"{name}: {type(parent).__name__} reads the weight of {child} instead of calling the layer (always, in "
            "evaluation, or in a fused kernel): an adapter would not act; leave it out of target_modules"
        )


def is_inert(parent: nn.Module, child: str) -> bool:
    """Whether a module reads the weight of a layer of its own where it should call the layer, by its source."""
    read, used = _uses(type(parent))  # type: ignore[arg-type]
    return child in read and (child not in used or bool(_FUSED.search(type(parent).__name__)))


@functools.lru_cache(maxsize=256)
def _uses(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes whose ``weight`` the methods of a class compute with, and attributes that they use themselves."""
    read: set[str] = set()
    used: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and not _SETTING_UP.match(method.name):
                _note_uses(method, read, used)
    return frozenset(read), frozenset(used)


def _note_uses(method: ast.FunctionDef, read: set[str], used: set[str]) -> None:
    around = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            outer = around[node]
            if not isinstance(outer, ast.Attribute):
                used.add(node.attr)
            elif outer.attr == "weight" and isinstance(outer.ctx, ast.Load) and _is_computed_with(outer, around):
                read.add(node.attr)


def _is_computed_with(weight: ast.Attribute, around: dict[ast.AST, ast.AST]) -> bool:
    """Whether a weight is more than asked for its dtype, device or class."""
    outer = around[weight]
    if isinstance(outer, ast.Attribute):
        return outer.attr in ("t", "T", "mT", "transpose", "to", "float")
    asks = isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name)
    return not (asks and outer.func.id in ("isinstance", "hasattr", "getattr", "id"))  # type: ignore[attr-defined]
