"""What torch's pickles may cost: they are looked through before torch loads them.

torch runs no code of a pickle that it does not know, but what it knows can be told to allocate or to compute
without end: a number makes a ``bytearray`` or a storage of that size, shared tuples as a key are hashed as if they
were written out, and some codecs take quadratic time. Each opcode is followed on a stack of descriptions, in time
and memory proportional to the pickle's size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pickletools import genops
from typing import Any, Protocol

_ALLOCATES = re.compile(r"(__builtin__|builtins) bytearray|torch(\.[\w.]+)? \w*(Tensor|Storage)")
"""Names that torch allows and that make as many bytes as they are told."""

_REBUILDS = "torch._tensor _rebuild_from_type_v2"
"""A name that calls its first argument."""

_MARKED = ("TUPLE", "SETITEMS", "APPENDS")
_DROPPED = {"SETITEM": 2, "APPEND": 1, "BUILD": 1}
DEEPEST = 50
"""Levels of tuples within tuples; hashing recurs through them."""


class CostlyError(ValueError):
    """A pickle that makes more than its file holds."""


class _Stream(Protocol):
    def read(self, n: int = ..., /) -> bytes: ...

    def readline(self) -> bytes: ...


class _Name(str):
    """A name that the pickle looks up, as "module name"."""


@dataclass(frozen=True, eq=False)
class _Tuple:
    """A tuple, with the number of values that it has when it is written out, and its levels."""

    items: tuple[Any, ...]
    size: int
    depth: int

    @classmethod
    def of(cls, items: list[Any]) -> _Tuple:
        inner = [item for item in items if isinstance(item, _Tuple)]
        size = 1 + len(items) + sum(item.size for item in inner)
        return cls(tuple(items), size, 1 + max((item.depth for item in inner), default=0))


def check(file: _Stream, size: int) -> None:
    """Look through one pickle, up to its end.

    Args:
        file: at the beginning of the pickle.
        size: bytes of the whole file.

    Raises:
        CostlyError: it would allocate or compute more than a fixed multiple of its size.
        ValueError, LookupError: it is no pickle that torch reads.
    """
    stack: list[Any] = []
    storages: set[str] = set()
    claimed = 0
    marks: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for opcode, arg, _ in genops(file):  # type: ignore[arg-type]
        name = opcode.name
        if name == "MARK":
            marks.append(stack)
            stack = []
        elif name in _MARKED:
            items, stack = stack, marks.pop()
            if name == "TUPLE":
                stack.append(_bounded(_Tuple.of(items), size))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [_bounded(_Tuple.of(stack[-count:]), size)]
        elif name == "EMPTY_TUPLE":
            stack.append(_Tuple.of([]))
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            _check_call(stack.pop(), arguments)
            stack.append(None)
        elif name == "BINPERSID":
            claimed += _storage(stack.pop(), storages)
            if claimed > size:
                raise CostlyError(f"storages of {claimed} numbers in a file of {size} bytes")
            stack.append(None)
        elif name in _DROPPED:
            del stack[-_DROPPED[name] :]
        elif name == "STOP":
            return
        elif name != "PROTO":
            stack.append(_Name(arg) if name == "GLOBAL" else arg)


def _bounded(value: _Tuple, size: int) -> _Tuple:
    if value.depth > DEEPEST or value.size > size:
        raise CostlyError(f"tuples that hold {value.size} values in {value.depth} levels")
    return value


def _check_call(function: Any, arguments: Any) -> None:
    if not isinstance(function, _Name) or not isinstance(arguments, _Tuple):
        return  # which torch refuses
    if function == _REBUILDS and arguments.items:
        _check_call(arguments.items[0], arguments.items[2] if len(arguments.items) > 2 else _Tuple.of([]))
    if _ALLOCATES.fullmatch(function) or (
        function == "_codecs encode" and arguments.items[1:] not in (("latin1",), ("latin-1",))
    ):
        raise CostlyError(f"a call of {function.replace(' ', '.')}, which no weights need")


def _storage(reference: Any, known: set[str]) -> int:
    """Numbers in a storage that was not named before, by ("storage", type, key, place, numbers, ...)."""
    items = reference.items if isinstance(reference, _Tuple) else ()
    if len(items) < 5 or not (isinstance(items[2], str) and isinstance(items[4], int)) or items[2] in known:
        return 0
    known.add(items[2])
    return items[4]
