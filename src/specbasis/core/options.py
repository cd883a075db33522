"""Options that travel whole: one frozen dataclass a verb, each field with its help, from the flag to the task.

Flags, the keywords of the Python function, the manifest's configuration and the plan are made from such a class:

    @dataclass(frozen=True)
    class Options(core.options.Options):
        ranks: int = option(200, "leading ranks whose singular vectors are compared", least=1)

A module of options imports neither torch nor any other large library, since ``--help`` reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from specbasis.core.errors import InputError, guess
from specbasis.core.grammar import numbers, words

SELECTION, ADVANCED = "Selection", "Advanced"
"""Panels of ``--help`` after the everyday ones, in this order."""

PYTHON = "Python"
"""The panel of what only a call from Python can say: it has no flag."""


@dataclass(frozen=True)
class Rule:
    """What a field of options says about itself.

    Attributes:
        help: one line for ``--help`` and for the docstring.
        panel: part of ``--help``; everyday options have none.
        flag: its flag, where this is not the field's name.
        parse: from the flag's text and the flag to the value; by default what the field's type says.
        metavar: what ``--help`` calls the value.
        least: the smallest number that is allowed.
        choices: the words that are allowed.
        decides: whether it changes a number of the result, and so stands in the manifest's configuration.
    """

    help: str
    panel: str = ""
    flag: str = ""
    parse: Callable[[str, str], Any] | None = None
    metavar: str = ""
    least: float | None = None
    choices: tuple[str, ...] = ()
    decides: bool = True


def option(default: Any, help: str, **rule: Any) -> Any:
    """A field of options: its default, its help, and what else `Rule` says."""
    metadata = {"rule": Rule(help, **rule)}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """The base of every class of options: checks values by the rules of their fields."""

    def __post_init__(self) -> None:
        for name, (rule, kind) in rules(type(self)).items():
            value = getattr(self, name)
            if get_origin(without_none(kind)) is tuple and value is not None and not isinstance(value, tuple):
                read = parser(rule, kind)
                if read is not None and isinstance(value, str):  # as a flag has it
                    value = read(value, name)
                elif not isinstance(value, Sequence):
                    raise InputError(f"got {name} = {value!r}; want a list, such as [{value!r}]")
                object.__setattr__(self, name, tuple(value))
            else:
                _check(name, value, rule, kind)

    @classmethod
    def of(cls, options: Self | None, keywords: Mapping[str, Any]) -> Self:
        """The options that a Python function was given, as a whole or as keywords.

        Raises:
            InputError: an unknown keyword, both forms at once, or a value that is not allowed.
        """
        for name in keywords:
            if name not in rules(cls):
                near = guess(name, rules(cls))
                raise InputError(f"no option {name!r}; {near}there is: {', '.join(rules(cls))}")
        if options is not None and keywords:
            raise InputError(f"got options and the keyword {next(iter(keywords))!r}; want one of the two")
        return cls(**keywords) if options is None else options

    def config(self) -> dict[str, Any]:
        """What decides the numbers of a result, as JSON has it."""
        chosen = {name: getattr(self, name) for name, (rule, _) in rules(type(self)).items() if rule.decides}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}

    def part(self, kind: type[O]) -> O:
        """The fields that another class of options has as well."""
        return kind(**{name: getattr(self, name) for name in rules(kind)})


O = TypeVar("O", bound=Options)  # noqa: E741 - a type
F = TypeVar("F", bound=Callable[..., Any])


_RULES: dict[type[Options], dict[str, tuple[Rule, Any]]] = {}


def rules(kind: type[Options]) -> dict[str, tuple[Rule, Any]]:
    """Name → rule and type of each field of a class of options."""
    if kind not in _RULES:
        hints = get_type_hints(kind)
        _RULES[kind] = {f.name: (f.metadata["rule"], hints[f.name]) for f in fields(kind) if "rule" in f.metadata}
    return _RULES[kind]


def default(kind: type[Options], name: str) -> Any:
    """The default of a field; `inspect.Parameter.empty` where it must be given."""
    member: Field[Any] = next(f for f in fields(kind) if f.name == name)
    return inspect.Parameter.empty if member.default is MISSING else member.default


def takes(kind: type[Options]) -> Callable[[F], F]:
    """Give a function with ``**keywords`` the signature and the documentation of the options that it takes."""

    def document(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default(kind, name), annotation=hint)
            for name, (_, hint) in rules(kind).items()
        ]
        order = sorted([*own, *keywords], key=lambda p: p.kind)
        function.__signature__ = signature.replace(parameters=order)  # type: ignore[attr-defined]
        lines = "".join(f"\n        {name}: {rule.help}." for name, (rule, _) in rules(kind).items())
        function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n    Keywords:{lines}\n    "
        return function

    return document


def parser(rule: Rule, kind: Any) -> Callable[[str, str], Any] | None:
    """How a flag's text becomes a value; None where typer knows the type."""
    kind = without_none(kind)
    if rule.parse or get_origin(kind) is not tuple:
        return rule.parse
    return numbers if get_args(kind)[0] is int else lambda text, _: words(text)


def without_none(kind: Any) -> Any:
    """The type T of ``T | None``."""
    if not isinstance(kind, UnionType):
        return kind
    rest = [part for part in get_args(kind) if part is not NoneType]
    return rest[0] if len(rest) == 1 else str if str in rest else rest[0]


NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    tuple: "a list",
}


def _check(name: str, value: Any, rule: Rule, kind: Any) -> None:
    """Refuse a value that its field's type or rule does not allow."""
    if not _fits(value, kind) or (rule.least is not None and _fits(value, float) and not value >= rule.least):
        least = "" if rule.least is None else f", at least {rule.least:g}"
        wanted = without_none(kind)
        noun = NOUNS.get(get_origin(wanted) or wanted, "another value")
        raise InputError(f"got {name} = {value!r}; want {noun}{least}")
    if rule.choices and value is not None:
        check_choice(name, value, rule.choices)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse a word that is none of some, with the nearest that is.

    Raises:
        InputError: it is none of them.
    """
    if value not in choices:
        near = guess(str(value), choices).rstrip()
        hint = f" ({near})" if near else ""
        raise InputError(f"got {name} = {value!r}; want one of {', '.join(choices)}{hint}")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if kind in (int, float):
        return isinstance(value, kind | int) and not isinstance(value, bool)
    plain = get_origin(kind) or kind
    return plain is Any or not isinstance(plain, type) or isinstance(value, plain)
