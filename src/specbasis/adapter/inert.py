"""Layers that are never called: their parent multiplies with their weight itself, so that no adapter there acts."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType

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
    read, used = _uses(type(parent), child)  # type: ignore[arg-type]
    return read and (not used or bool(_FUSED.search(type(parent).__name__)))


@functools.lru_cache(maxsize=1024)
def _uses(cls: type, child: str) -> tuple[bool, bool]:
    """Whether the methods of a class compute with the weight of an attribute, and whether they use it itself."""
    read = used = False
    for method in _methods(cls, child):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            return False, True
        around = {inner: node for node in ast.walk(tree) for inner in ast.iter_child_nodes(node)}
        for node, outer in around.items():
            if isinstance(node, ast.Attribute) and node.attr == child and ast.unparse(node.value) == "self":
                used = used or not isinstance(outer, ast.Attribute)
                read = read or (isinstance(outer, ast.Attribute) and _is_computed_with(outer, around))
    return read, used


def _methods(cls: type, child: str) -> Iterator[FunctionType]:
    """Methods whose code names an attribute, of a class and those that it inherits from, but for setting up."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            method = inspect.unwrap(value) if isinstance(value, FunctionType) else None
            if isinstance(method, FunctionType) and not _SETTING_UP.match(name) and _names(method.__code__, child):
                yield method


def _names(code: CodeType, name: str) -> bool:
    """Whether code, or a function inside of it, names an attribute."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return name in code.co_names or any(_names(function, name) for function in inner)


def _is_computed_with(weight: ast.Attribute, around: dict[ast.AST, ast.AST]) -> bool:
    """Whether ``self.child.weight`` is read, and is more than asked for its dtype, device or class."""
    if weight.attr != "weight" or not isinstance(weight.ctx, ast.Load):
        return False
    outer = around[weight]
    if isinstance(outer, ast.Attribute):
        return outer.attr in ("t", "T", "mT", "transpose", "to", "float")
    asks = isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name)
    return not (asks and outer.func.id in ("isinstance", "hasattr", "getattr", "id"))  # type: ignore[attr-defined]
